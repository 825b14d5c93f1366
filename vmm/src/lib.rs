//! The virtual machine: KVM, memory, boot, vCPUs, and the `heddle` program's commands.

pub mod acpi;
pub mod bench;
pub mod boot;
pub mod cli;
pub mod console;
pub mod cpuid;
pub mod demotions;
pub mod ending;
pub mod hotplug;
pub mod irq;
pub mod limits;
pub mod machine;
pub mod memory;
pub mod mmio_slots;
pub mod prealloc;
pub mod report;
pub mod resources;
pub mod run;
pub mod session;
pub mod stall;
pub mod terminal;
pub mod timing;
pub mod vcpu;
pub mod verdict;
pub mod watchdog;
