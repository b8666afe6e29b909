//! The machine around the service: ring 0, the clock, the console, memory that is handed out once.

mod boot;
pub(crate) mod clock;
pub(crate) mod console;
pub(crate) mod static_cell;
pub(crate) mod traps;

pub(crate) use boot::command_line;
