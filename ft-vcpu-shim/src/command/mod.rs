//! The subcommands.

pub mod bisect;
pub mod check;
pub mod machine;
pub mod replay;
pub mod rewrite;
pub mod run;
