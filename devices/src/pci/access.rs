//! The two ways a guest reaches configuration space: a pair of ports, and memory.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU32, Ordering::SeqCst};

use iothread::ExitCx;

use super::function::{read_registers, write_registers};
use super::root::{Address, PciRoot};
use crate::device::Device;
use crate::power::{Power, PowerRequest};

/// Bits of the address port (PCI 3.0 §3.2.2.3.2): enable, bus, slot and function, register.
const ENABLE: u32 = 1 << 31;
const ADDRESS_BITS: u32 = 0x80ff_fffc;

/// Bits of the reset control register that can be read back, and the one that resets.
const RESET_BITS: u8 = 0b1110;
const RESET_NOW: u8 = 1 << 2;

/// Offsets from the first port.
const ADDRESS: u64 = 0;
const RESET: u64 = 1;
const DATA: u64 = 4;

/// Ports 0xcf8 to 0xcff: configuration mechanism #1 (PCI 3.0 §3.2.2.3.2).
///
/// The address port answers to accesses of 4 bytes only. In its shadow at port 0xcf9 lies, as on
/// PC chipsets, the reset control register, which answers to accesses of 1 byte; so one device has
/// both.
///
/// There is one address port for the whole machine: guests with several CPUs take a lock of their
/// own around the pair.
pub struct ConfigPorts {
    root: Arc<PciRoot>,
    power: Arc<dyn Power>,
    address: AtomicU32,
    reset: AtomicU8,
}

impl fmt::Debug for ConfigPorts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let address = self.address.load(SeqCst);
        f.debug_struct("ConfigPorts").field("address", &address).finish_non_exhaustive()
    }
}

impl ConfigPorts {
    /// The first port.
    pub const PORT: u64 = 0xcf8;
    /// How many ports there are.
    pub const SIZE: u64 = 8;

    /// Ports to the functions of `root`; a reset is asked of `power`.
    pub fn new(root: Arc<PciRoot>, power: Arc<dyn Power>) -> Self {
        Self { root, power, address: AtomicU32::new(0), reset: AtomicU8::new(0) }
    }

    /// What the data port leads to; `None`: nothing, it is not enabled.
    fn selected(&self) -> Option<(Address, u16)> {
        let address = self.address.load(SeqCst);
        let [register, place, bus, _] = address.to_le_bytes();
        let to = Address::from_bits(u16::from_le_bytes([place, bus]));
        (address & ENABLE != 0).then_some((to, u16::from(register / 4)))
    }

    /// The address and the state of the reset register, to be saved.
    pub fn save(&self) -> (u32, u8) {
        (self.address.load(SeqCst), self.reset.load(SeqCst))
    }

    /// Takes on what [`save`](Self::save) gave.
    pub fn restore(&self, (address, reset): (u32, u8)) {
        self.address.store(address & ADDRESS_BITS, SeqCst);
        self.reset.store(reset & RESET_BITS, SeqCst);
    }
}

impl Device for ConfigPorts {
    fn read(&self, offset: u64, data: &mut [u8], exit: &mut ExitCx<'_>) {
        data.fill(0xff);
        match (offset, data) {
            (ADDRESS, data @ [_, _, _, _]) => {
                data.copy_from_slice(&self.address.load(SeqCst).to_le_bytes());
            }
            (RESET, [byte]) => *byte = self.reset.load(SeqCst),
            (DATA.., data) => {
                if let Some((address, register)) = self.selected() {
                    let read = |_| self.root.read(address, register, exit);
                    read_registers(offset - DATA, data, read);
                }
            }
            _ => {}
        }
    }

    fn write(&self, offset: u64, data: &[u8], exit: &mut ExitCx<'_>) {
        match (offset, data) {
            (ADDRESS, &[a, b, c, d]) => {
                self.address.store(u32::from_le_bytes([a, b, c, d]) & ADDRESS_BITS, SeqCst);
            }
            (RESET, &[byte]) => {
                self.reset.store(byte & RESET_BITS & !RESET_NOW, SeqCst);
                if byte & RESET_NOW != 0 {
                    self.power.request(PowerRequest::Reset);
                }
            }
            (DATA.., data) => {
                if let Some((address, register)) = self.selected() {
                    write_registers(offset - DATA, data, |_, value, lanes| {
                        self.root.write(address, register, value, lanes, exit);
                    });
                }
            }
            _ => {}
        }
    }
}

/// Configuration space in memory: the enhanced configuration access mechanism (PCI Express 3.0
/// §7.2.2). 4 KiB per function, 1 MiB per bus, from bus 0 on.
#[derive(Debug)]
pub struct Ecam {
    root: Arc<PciRoot>,
}

impl Ecam {
    /// Bytes per bus.
    pub const BUS_SIZE: u64 = 1 << 20;

    /// Bytes for `buses` buses.
    pub const fn size(buses: u8) -> u64 {
        buses as u64 * Self::BUS_SIZE
    }

    /// Memory in which the functions of `root` are found.
    pub fn new(root: Arc<PciRoot>) -> Self {
        Self { root }
    }

    /// The function and register behind a register of the whole range.
    fn find(register: u64) -> Option<(Address, u16)> {
        let bits = u16::try_from(register >> 10).ok()?;
        Some((Address::from_bits(bits), (register & 0x3ff) as u16))
    }
}

impl Device for Ecam {
    fn read(&self, offset: u64, data: &mut [u8], exit: &mut ExitCx<'_>) {
        read_registers(offset, data, |register| {
            let found = Self::find(register);
            found.map_or(u32::MAX, |(address, register)| self.root.read(address, register, exit))
        });
    }

    fn write(&self, offset: u64, data: &[u8], exit: &mut ExitCx<'_>) {
        write_registers(offset, data, |register, value, lanes| {
            if let Some((address, register)) = Self::find(register) {
                self.root.write(address, register, value, lanes, exit);
            }
        });
    }
}

#[cfg(test)]
#[path = "access_tests.rs"]
mod tests;
