//! The subcommands.

pub mod machine;
pub mod replay;
pub mod run;
