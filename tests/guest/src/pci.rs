//! PCI: finding devices through ports 0xcf8 and 0xcfc, and their MSI-X tables.

use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;
use core::fmt;

use crate::mem::{self, Mmio};
use crate::{apic, gate};

const COMMAND: u8 = 0x04;
const MEMORY_AND_MASTER: u32 = 0x6;
const INTX_OFF: u32 = 0x400;
const CAP_VENDOR: u8 = 0x09;
const CAP_MSIX: u8 = 0x11;

/// Bus, device, function.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Address {
    bus: u8,
    device: u8,
    function: u8,
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "{:02x}:{:02x}.{}", self.bus, self.device, self.function)
    }
}

impl Address {
    fn port_value(self, register: u8) -> u32 {
        let [bus, device, function] = [self.bus, self.device, self.function].map(u32::from);
        1 << 31 | bus << 16 | device << 11 | function << 8 | u32::from(register & 0xfc)
    }

    pub fn read32(self, register: u8) -> u32 {
        gate::pci_read(self.port_value(register))
    }

    pub fn read8(self, register: u8) -> u8 {
        (self.read32(register) >> (8 * (register & 3))) as u8
    }

    fn write32(self, register: u8, value: u32) {
        gate::pci_write(self.port_value(register), value);
    }
}

/// A memory or I/O window of a device.
#[derive(Clone, Copy)]
pub struct Bar {
    pub index: u8,
    pub address: u64,
    pub io: bool,
}

/// A capability of configuration space.
#[derive(Clone, Copy)]
pub struct Capability {
    pub id: u8,
    pub offset: u8,
}

pub struct Function {
    pub address: Address,
    pub vendor: u16,
    pub device: u16,
    pub class: u32,
    pub bars: Vec<Bar>,
    pub capabilities: Vec<Capability>,
}

/// Configuration space in memory.
#[derive(Clone, Copy)]
pub struct Ecam {
    pub base: u64,
    pub first_bus: u8,
    pub last_bus: u8,
}

/// Lists the functions on bus 0 and behind its bridges.
pub fn scan() -> Vec<Function> {
    let mut found = Vec::new();
    let mut buses = Vec::from([0u8]);
    let mut next = 0;
    while let Some(&bus) = buses.get(next) {
        next += 1;
        for device in 0..32 {
            scan_device(bus, device, &mut found, &mut buses);
        }
    }
    found
}

/// Reads the ids of all functions again through configuration space in memory, which must say the
/// same as the ports.
pub fn check_ecam(ecam: Ecam, functions: &[Function]) -> Result<(), String> {
    for function in functions {
        let Address { bus, device, function: number } = function.address;
        if !(ecam.first_bus..=ecam.last_bus).contains(&bus) {
            continue;
        }
        // The base is that of bus 0 even where the first bus is another.
        let [bus, device, number] = [bus, device, number].map(u64::from);
        let start = ecam.base + (bus << 20 | device << 15 | number << 12);
        if !mem::map(start, 4096) {
            return Err(format!("configuration space is out of reach at {start:#x}"));
        }
        // SAFETY: just mapped, and the firmware says it is configuration space.
        let id = unsafe { Mmio::new(start, 4096) }.read32(0);
        if id != u32::from(function.vendor) | u32::from(function.device) << 16 {
            return Err(format!("{} has id {id:#x} at {start:#x}", function.address));
        }
    }
    Ok(())
}

fn scan_device(bus: u8, device: u8, found: &mut Vec<Function>, buses: &mut Vec<u8>) {
    let mut functions = 1;
    let mut function = 0;
    while function < functions {
        let address = Address { bus, device, function };
        function += 1;
        let id = address.read32(0);
        if id & 0xffff == 0xffff {
            continue;
        }
        let header = address.read8(0x0e);
        if header & 0x80 != 0 {
            functions = 8;
        }
        let bridge = header & 0x7f == 1;
        if bridge {
            let behind = address.read8(0x19);
            if behind != 0 && !buses.contains(&behind) {
                buses.push(behind);
            }
        }
        found.push(Function {
            address,
            vendor: id as u16,
            device: (id >> 16) as u16,
            class: address.read32(0x08) >> 8,
            bars: bars(address, if bridge { 2 } else { 6 }),
            capabilities: capabilities(address),
        });
    }
}

fn bars(address: Address, count: u8) -> Vec<Bar> {
    let mut bars = Vec::new();
    let mut index = 0;
    while index < count {
        let low = address.read32(0x10 + 4 * index);
        let (io, wide) = (low & 1 != 0, low & 7 == 4);
        let mut base = u64::from(if io { low & !3 } else { low & !15 });
        if wide && index + 1 < count {
            base |= u64::from(address.read32(0x14 + 4 * index)) << 32;
        }
        if base != 0 {
            bars.push(Bar { index, address: base, io });
        }
        index += if wide { 2 } else { 1 };
    }
    bars
}

fn capabilities(address: Address) -> Vec<Capability> {
    let mut list = Vec::new();
    if address.read32(COMMAND) >> 16 & 0x10 == 0 {
        return list;
    }
    let mut offset = address.read8(0x34) & 0xfc;
    while offset >= 0x40 && list.len() < 48 {
        let word = address.read32(offset);
        list.push(Capability { id: word as u8, offset });
        offset = (word >> 8) as u8 & 0xfc;
    }
    list
}

impl Function {
    /// Lets the device answer in memory and reach ours.
    pub fn enable(&self) {
        let command = self.address.read32(COMMAND) & 0xffff;
        self.address.write32(COMMAND, command | MEMORY_AND_MASTER | INTX_OFF);
    }

    /// Vendor-specific capabilities: where virtio describes its registers.
    pub fn vendor_capabilities(&self) -> impl Iterator<Item = u8> {
        self.capabilities.iter().filter(|c| c.id == CAP_VENDOR).map(|c| c.offset)
    }

    /// Registers within a BAR.
    pub fn registers(&self, bar: u8, offset: u32, bytes: u32) -> Result<Mmio, String> {
        let Some(bar) = self.bars.iter().find(|b| b.index == bar && !b.io) else {
            return Err(format!("BAR {bar} has no memory address"));
        };
        let start = bar.address + u64::from(offset);
        if !mem::map(start, bytes.into()) {
            return Err(format!("BAR {} is out of reach at {:#x}", bar.index, bar.address));
        }
        // SAFETY: just mapped, and a memory BAR belongs to its device.
        Ok(unsafe { Mmio::new(start, bytes as usize) })
    }

    /// The number of MSI-X vectors, 0 if the device has none.
    pub fn msix_vectors(&self) -> u16 {
        self.msix().map_or(0, |cap| (self.address.read32(cap) >> 16 & 0x7ff) as u16 + 1)
    }

    fn msix(&self) -> Option<u8> {
        self.capabilities.iter().find(|c| c.id == CAP_MSIX).map(|c| c.offset)
    }

    /// Switches MSI-X on; all vectors start masked.
    pub fn enable_msix(&self) -> Result<MsixTable, String> {
        let cap = self.msix().ok_or("no MSI-X")?;
        let control = self.address.read32(cap);
        let table = self.address.read32(cap + 4);
        let vectors = (control >> 16 & 0x7ff) + 1;
        let registers = self.registers((table & 7) as u8, table & !7, 16 * vectors)?;
        self.address.write32(cap, (control | 1 << 31) & !(1 << 30));
        Ok(MsixTable { registers, vectors: vectors as u16 })
    }
}

pub struct MsixTable {
    registers: Mmio,
    vectors: u16,
}

impl MsixTable {
    pub fn vectors(&self) -> u16 {
        self.vectors
    }

    /// Sends an entry to a vector of one CPU and unmasks it. An id above 255 needs the extended
    /// destination bits of the address, which not every machine has.
    pub fn route(&self, entry: u16, apic_id: u32, vector: u8) -> Result<(), String> {
        if apic_id > 0xff && !apic::msi_reaches(apic_id) {
            return Err(format!("no message reaches the CPU with APIC id {apic_id}"));
        }
        let offset = 16 * usize::from(entry);
        let address = 0xfee0_0000 | (apic_id & 0xff) << 12 | (apic_id >> 8 & 0x7f) << 5;
        self.registers.write32(offset, address);
        self.registers.write32(offset + 4, 0);
        self.registers.write32(offset + 8, vector.into());
        self.registers.write32(offset + 12, 0);
        Ok(())
    }
}
