//! Device models: the bus, PCI, virtio transports and devices, block engines, legacy devices.
//!
//! Nothing here knows KVM. What a device needs of the machine comes in as a trait: [`irq`] sends
//! interrupts and hands out doorbells, [`power`] takes requests to end the machine. Devices do not
//! know which thread runs them, nor their transport.

pub mod block;
pub mod bus;
pub mod device;
pub mod irq;
pub mod legacy;
pub mod pci;
pub mod power;
pub mod snapshot;
pub mod virtio;
