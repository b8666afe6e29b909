//! The subcommands.

pub mod bisect;
pub mod machine;
pub mod replay;
pub mod rewrite;
pub mod run;
