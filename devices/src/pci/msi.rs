//! MSI: one interrupt as a message whose address and data are in configuration space (PCI 3.0
//! §6.8.1). For functions that have no BAR to put a table of [MSI-X](super::msix) in.

use super::config::Config;
use crate::irq::Msi;

/// The id of the capability (PCI 3.0 appendix H).
const ID: u8 = 0x05;
/// Message control: one vector, 64-bit addresses, no mask bit.
const ENABLE: u32 = 1 << 16;
const WIDE: u8 = 1 << 7;

/// Where the capability is in a function's registers.
#[derive(Debug, Clone, Copy)]
pub(super) struct MessageRegisters {
    first: u16,
}

impl MessageRegisters {
    /// Adds the capability, disabled.
    pub(super) fn add(config: &mut Config) -> Self {
        let mut body = [0; 12]; // control, address, data
        body[0] = WIDE;
        let writable = [1, 0, 0xfc, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff];
        Self { first: config.add_capability(ID, &body, &writable) }
    }

    /// The message; `None`: the guest has not enabled it.
    pub(super) fn message(self, config: &Config) -> Option<Msi> {
        let [control, low, high, data] = [0, 1, 2, 3].map(|nth| config.read(self.first + nth));
        let address = u64::from(high) << 32 | u64::from(low);
        (control & ENABLE != 0).then_some(Msi { address, data: data & 0xffff })
    }
}
