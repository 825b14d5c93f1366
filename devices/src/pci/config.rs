//! The configuration space of a function: a type 0 header (PCI 3.0 §6.1), or the type 1 header of a
//! bridge (PCI-to-PCI Bridge 1.2 §3.2).
//!
//! Each register is a value and a mask of the bits a guest may write. That alone makes BARs
//! work: the low bits of an address cannot be written, so a guest that writes all ones reads back
//! the size.

use std::sync::atomic::{AtomicU32, Ordering::SeqCst};

/// Registers of 4 bytes in the space of PCI. With the capability of PCI Express a function has more
/// behind it, and an empty list of extended capabilities there, which is 0 (PCI Express 3.0 §7.9.1);
/// without, there is nothing, which reads all ones, and Linux looks no further.
pub const REGISTERS: usize = 64;

/// Registers, by their number.
const ID: usize = 0;
pub(super) const COMMAND_STATUS: u16 = 1;
const CLASS: usize = 2;
pub(super) const BAR_0: u16 = 4;
const SUBSYSTEM: usize = 0x2c / 4;
const HEADER_TYPE: usize = 0x0c / 4;
const CAPABILITIES: usize = 0x34 / 4;
const INTERRUPT: usize = 0x3c / 4;
const FIRST_CAPABILITY: usize = 0x40;

/// COMMAND, PCI 3.0 §6.2.2.
const MEMORY_SPACE: u32 = 1 << 1;
const BUS_MASTER: u32 = 1 << 2;
const INTERRUPT_DISABLE: u32 = 1 << 10;
/// STATUS, PCI 3.0 §6.2.3, in the upper half of the register.
pub(super) const INTERRUPT_STATUS: u32 = 1 << (16 + 3);
const HAS_CAPABILITIES: u32 = 1 << (16 + 4);

/// The capability of PCI Express (PCI Express 3.0 §7.8.1).
const EXPRESS: u8 = 0x10;

/// The capability with a bridge's subsystem ids (PCI 3.0 appendix H).
const SUBSYSTEM_IDS: u8 = 0x0d;

/// A memory BAR of 64 bits, not prefetchable (PCI 3.0 §6.2.5.1).
const BAR_64_BIT: u32 = 0b100;

/// Who a function is (PCI 3.0 §6.2.1 and §6.2.4).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ids {
    /// Vendor.
    pub vendor: u16,
    /// Device, numbered by the vendor.
    pub device: u16,
    /// Base class, sub-class and programming interface, in this order: 0x060000 is a host bridge.
    pub class: u32,
    /// Revision.
    pub revision: u8,
    /// Vendor of the board.
    pub subsystem_vendor: u16,
    /// Board, numbered by its vendor.
    pub subsystem: u16,
}

/// The registers of one function, without what happens when they change.
///
/// Reads and writes are atomic per register and take no lock.
#[derive(Debug)]
pub struct Config {
    values: [AtomicU32; REGISTERS],
    writable: [u32; REGISTERS],
    /// Where the next capability goes, and where the link to it is.
    end: usize,
    link: usize,
    is_express: bool,
}

impl Config {
    /// A function without BARs and capabilities, with memory decoding and bus mastering on, as
    /// firmware leaves it.
    pub fn new(ids: &Ids) -> Self {
        let mut config = Self::with_common_header(ids);
        config.set(SUBSYSTEM, pair(ids.subsystem_vendor, ids.subsystem));
        config
    }

    /// A bridge with a type 1 header whose bus numbers and windows are 0, without BARs and
    /// capabilities; decoding and bus mastering are on. The board's ids have no place in such a
    /// header and go into a capability (PCI-to-PCI Bridge 1.2 §3.2.5.13).
    pub fn bridge(ids: &Ids) -> Self {
        let mut config = Self::with_common_header(ids);
        config.set(HEADER_TYPE, 1 << 16);
        let [a, b] = ids.subsystem_vendor.to_le_bytes();
        let [c, d] = ids.subsystem.to_le_bytes();
        config.add_capability(SUBSYSTEM_IDS, &[0, 0, a, b, c, d], &[]);
        config
    }

    /// What both types of header have in the same place.
    fn with_common_header(ids: &Ids) -> Self {
        let mut config = Self {
            values: [const { AtomicU32::new(0) }; REGISTERS],
            writable: [0; REGISTERS],
            end: FIRST_CAPABILITY,
            link: CAPABILITIES * 4,
            is_express: false,
        };
        config.set(ID, pair(ids.vendor, ids.device));
        config.set(CLASS, ids.class << 8 | u32::from(ids.revision));
        config.set(COMMAND_STATUS.into(), MEMORY_SPACE | BUS_MASTER);
        config.writable[usize::from(COMMAND_STATUS)] =
            MEMORY_SPACE | BUS_MASTER | INTERRUPT_DISABLE;
        // The interrupt line is a note from firmware to the driver.
        config.writable[INTERRUPT] = 0xff;
        config
    }

    /// The function has interrupt pin A.
    pub fn use_pin_a(&mut self) {
        self.set(INTERRUPT, 1 << 8);
    }

    /// A register with its value and the bits of it that the guest may write.
    pub(super) fn define(&mut self, register: u16, value: u32, writable: u32) {
        self.set(register.into(), value);
        self.writable[usize::from(register)] = writable;
    }

    /// Is memory decoding on?
    pub fn decodes_memory(&self) -> bool {
        self.read(COMMAND_STATUS) & MEMORY_SPACE != 0
    }

    /// May the function pull its interrupt pin?
    pub fn pin_enabled(&self) -> bool {
        self.read(COMMAND_STATUS) & INTERRUPT_DISABLE == 0
    }

    /// Adds a memory BAR of 64 bits: `index` 0, 2 or 4, at `address`, of `size` bytes.
    ///
    /// # Panics
    /// If there is no such BAR, it is taken, the size is not a power of two of at least 16, or
    /// the address is not aligned to it.
    pub fn add_bar(&mut self, index: u8, address: u64, size: u64) {
        assert!(matches!(index, 0 | 2 | 4), "no 64-bit BAR has index {index}");
        assert!(size.is_power_of_two() && size >= 16, "no BAR has {size:#x} bytes");
        assert!(address.is_multiple_of(size), "{address:#x} is not aligned to {size:#x}");
        let low = usize::from(BAR_0) + usize::from(index);
        assert!(self.writable[low + 1] == 0, "BAR {index} is taken");
        self.set(low, address as u32 | BAR_64_BIT);
        self.set(low + 1, (address >> 32) as u32);
        let writable = !(size - 1);
        self.writable[low] = writable as u32;
        self.writable[low + 1] = (writable >> 32) as u32;
    }

    /// Adds a capability to the end of the list and returns its first register. `body` follows the
    /// id and the link; `writable` says which bits of it can be written, none where it is shorter.
    ///
    /// # Panics
    /// If the space is full.
    pub fn add_capability(&mut self, id: u8, body: &[u8], writable: &[u8]) -> u16 {
        let start = self.end;
        let end = (start + 2 + body.len()).next_multiple_of(4);
        assert!(end <= REGISTERS * 4, "configuration space is full");
        self.set_byte(start, id);
        self.is_express |= id == EXPRESS;
        body.iter().enumerate().for_each(|(at, &byte)| self.set_byte(start + 2 + at, byte));
        for (at, &bits) in writable.iter().enumerate() {
            let at = start + 2 + at;
            self.writable[at / 4] |= u32::from(bits) << (at % 4 * 8);
        }
        self.set_byte(self.link, start as u8);
        *self.values[usize::from(COMMAND_STATUS)].get_mut() |= HAS_CAPABILITIES;
        (self.link, self.end) = (start + 1, end);
        (start / 4) as u16
    }

    /// Reads a register; see [`REGISTERS`] for those behind the space.
    pub fn read(&self, register: u16) -> u32 {
        let behind = if self.is_express { 0 } else { u32::MAX };
        self.values.get(usize::from(register)).map_or(behind, |value| value.load(SeqCst))
    }

    /// Writes the bits of a register that are in `lanes` and may be written.
    pub fn write(&self, register: u16, value: u32, lanes: u32) {
        let register = usize::from(register);
        if let (Some(old), Some(writable)) =
            (self.values.get(register), self.writable.get(register))
        {
            let mask = writable & lanes;
            // Cannot fail: there is always a new value.
            let _ = old.fetch_update(SeqCst, SeqCst, |old| Some(old & !mask | value & mask));
        }
    }

    /// Where BAR `index` is to be decoded; `None` while memory decoding is off.
    pub fn bar(&self, index: u8) -> Option<u64> {
        let low = BAR_0 + u16::from(index);
        let address = u64::from(self.read(low + 1)) << 32 | u64::from(self.read(low) & !0xf);
        self.decodes_memory().then_some(address)
    }

    /// All registers.
    pub fn save(&self) -> Vec<u32> {
        self.values.iter().map(|value| value.load(SeqCst)).collect()
    }

    /// Could these registers be those of this function? Else says why not.
    pub fn accepts(&self, saved: &[u32]) -> Result<(), String> {
        if saved.len() != REGISTERS {
            return Err(format!("{} configuration registers, not {REGISTERS}", saved.len()));
        }
        let own = self.save().into_iter().zip(self.writable);
        match own.zip(saved).position(|((own, mask), saved)| (own ^ saved) & !mask != 0) {
            None => Ok(()),
            Some(register) => Err(format!("configuration register {:#x} differs", register * 4)),
        }
    }

    /// Takes on registers that it [`accepts`](Self::accepts).
    pub fn restore(&self, saved: &[u32]) {
        for (register, &value) in saved.iter().enumerate() {
            self.write(register as u16, value, u32::MAX);
        }
    }

    fn set(&mut self, register: usize, value: u32) {
        *self.values[register].get_mut() = value;
    }

    fn set_byte(&mut self, at: usize, value: u8) {
        let register = self.values[at / 4].get_mut();
        let mut bytes = register.to_le_bytes();
        bytes[at % 4] = value;
        *register = u32::from_le_bytes(bytes);
    }
}

fn pair(low: u16, high: u16) -> u32 {
    u32::from(high) << 16 | u32::from(low)
}

#[cfg(test)]
mod tests {
    use super::*;

    const IDS: Ids = Ids {
        vendor: 0x1af4,
        device: 0x1042,
        class: 0x01_8000,
        revision: 1,
        subsystem_vendor: 0x1af4,
        subsystem: 0x1100,
    };

    #[test]
    fn the_ids_are_where_they_belong_and_cannot_be_written() {
        let config = Config::new(&IDS);
        for (register, value) in [(0, 0x1042_1af4), (2, 0x0180_0001), (11, 0x1100_1af4)] {
            config.write(register, !value, u32::MAX);
            assert_eq!(config.read(register), value);
        }
        assert_eq!(config.read(3), 0, "type 0, one function");
    }

    #[test]
    fn a_bridge_has_its_board_in_a_capability() {
        let config = Config::bridge(&IDS);
        assert_eq!((config.read(3), config.read(11)), (0x0001_0000, 0));
        assert_eq!((config.read(16), config.read(17)), (0x0000_000d, 0x1100_1af4));
    }

    #[test]
    fn all_ones_in_a_bar_read_back_its_size_and_each_half_is_written_alone() {
        let mut config = Config::new(&IDS);
        config.add_bar(2, 0x12_8000_0000, 0x4000);
        assert_eq!(config.bar(2), Some(0x12_8000_0000));
        config.write(6, u32::MAX, u32::MAX);
        assert_eq!(config.read(6), 0xffff_c004);
        assert_eq!(config.read(7), 0x12);
        config.write(7, u32::MAX, u32::MAX);
        assert_eq!(config.read(7), u32::MAX);
        config.write(6, 0x9000_8000, u32::MAX);
        config.write(7, 0x1, u32::MAX);
        assert_eq!(config.bar(2), Some(0x1_9000_8000));
        config.write(COMMAND_STATUS, 0, 0xffff);
        assert_eq!(config.bar(2), None);
    }

    #[test]
    fn a_bar_beyond_4_gib_is_sized_in_its_upper_half() {
        let mut config = Config::new(&IDS);
        config.add_bar(0, 0, 1 << 36);
        config.write(4, u32::MAX, u32::MAX);
        config.write(5, u32::MAX, u32::MAX);
        assert_eq!((config.read(4), config.read(5)), (0x4, 0xffff_fff0));
    }

    #[test]
    fn only_the_bytes_that_are_meant_change() {
        let config = Config::new(&IDS);
        config.write(COMMAND_STATUS, 0x0400, 0xff00);
        assert_eq!(config.read(COMMAND_STATUS), 0x0406);
        config.write(COMMAND_STATUS, 0xffff_0000, 0xffff_00ff);
        assert_eq!(config.read(COMMAND_STATUS), 0x0400);
    }

    #[test]
    fn capabilities_are_chained_and_aligned() {
        let mut config = Config::new(&IDS);
        assert_eq!(config.read(COMMAND_STATUS) & HAS_CAPABILITIES, 0);
        let first = config.add_capability(0x09, &[1, 2, 3], &[0, 0xf0]);
        let second = config.add_capability(0x11, &[4; 10], &[]);
        assert_eq!((first, second), (0x10, 0x12));
        assert_ne!(config.read(COMMAND_STATUS) & HAS_CAPABILITIES, 0);
        assert_eq!(config.read(0xd), 0x40);
        assert_eq!((config.read(first), config.read(first + 1)), (0x0201_4809, 3));
        assert_eq!(config.read(second), 0x0404_0011, "the end of the list");
        config.write(first, 0, u32::MAX);
        assert_eq!(config.read(first), 0x0201_4809 & !0xf000_0000);
    }

    #[test]
    fn there_is_no_extended_space() {
        let config = Config::new(&IDS);
        config.write(64, 1, u32::MAX);
        config.write(u16::MAX, 1, u32::MAX);
        assert_eq!((config.read(64), config.read(u16::MAX)), (u32::MAX, u32::MAX));
    }

    #[test]
    fn registers_of_another_function_are_refused() {
        let (mut own, mut other) = (Config::new(&IDS), Config::new(&IDS));
        own.add_bar(0, 0x1000, 0x1000);
        other.add_bar(0, 0x5000, 0x1000);
        own.accepts(&other.save()).unwrap();
        own.restore(&other.save());
        assert_eq!(own.bar(0), Some(0x5000));
        let smaller = Config::new(&Ids { device: 0x1044, ..IDS });
        assert!(own.accepts(&smaller.save()).unwrap_err().contains("register 0x0"));
        assert!(own.accepts(&[]).is_err());
    }
}
