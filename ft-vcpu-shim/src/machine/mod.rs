//! The virtual hardware below the devices: RAM, CPU, how a guest gets there.

pub mod boot;
pub mod branches;
pub mod cpuid;
pub mod host;
pub mod kick;
pub mod memory;
pub mod msr;
pub mod state;
pub mod vcpu;
pub mod windows;
