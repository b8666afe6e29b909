//! The virtual hardware below the devices: RAM, CPU, how a guest gets there.

pub mod boot;
pub mod cpuid;
pub mod memory;
pub mod vcpu;
