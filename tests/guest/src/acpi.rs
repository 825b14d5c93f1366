//! The few ACPI tables the guest needs: the CPUs, and how to switch the machine off.

use alloc::vec::Vec;

use crate::mem;
use crate::pci::Ecam;

/// What the tables say.
#[derive(Default)]
pub struct Acpi {
    /// APIC ids of the usable CPUs, in the order of the MADT.
    pub apic_ids: Vec<u32>,
    pub ecam: Option<Ecam>,
    /// Address of the I/O APIC with input 0.
    pub io_apic: Option<u64>,
    pub power_off: PowerOff,
}

/// How ACPI ends a machine.
#[derive(Clone, Copy, Default)]
pub struct PowerOff {
    /// Port of the PM1a control register.
    pub pm1a: Option<u16>,
    /// Port of the sleep control register of hardware-reduced ACPI.
    pub sleep_control: Option<u16>,
    /// The sleep type `_S5` names.
    pub s5: Option<u8>,
}

/// A table, by address and length.
#[derive(Clone, Copy)]
struct Table {
    address: u64,
    bytes: u64,
}

impl Table {
    fn open(address: u64) -> Option<Table> {
        if address == 0 || !mem::map(address, 36) {
            return None;
        }
        // SAFETY: mapped; every table starts with a header of 36 bytes.
        let bytes = u64::from(unsafe { mem::read::<u32>(address + 4) });
        ((36..1 << 24).contains(&bytes) && mem::map(address, bytes))
            .then_some(Table { address, bytes })
    }

    /// Reads a field; zero beyond the end, as older and shorter tables mean it.
    fn get<T: Copy + Default>(&self, offset: u64) -> T {
        if offset + size_of::<T>() as u64 > self.bytes {
            return T::default();
        }
        // SAFETY: within a table that is mapped; only called with integers.
        unsafe { mem::read(self.address + offset) }
    }

    fn signature(&self) -> [u8; 4] {
        self.get(0)
    }
}

fn is_rsdp(address: u64) -> bool {
    // SAFETY: called with addresses in the first 4 GiB, which is mapped.
    unsafe { mem::read::<[u8; 8]>(address) == *b"RSD PTR " }
}

impl Acpi {
    /// Follows the tables from the root pointer, or from where a PC's firmware leaves one.
    pub fn read(rsdp: Option<u64>) -> Acpi {
        let mut acpi = Acpi::default();
        let rsdp = rsdp
            .filter(|&a| mem::map(a, 36) && is_rsdp(a))
            .or_else(|| (0xe_0000..0x10_0000).step_by(16).find(|&a| is_rsdp(a)));
        let Some(rsdp) = rsdp else { return acpi };
        // SAFETY: the root pointer was recognised; it is mapped.
        let (revision, rsdt, xsdt) = unsafe {
            (mem::read::<u8>(rsdp + 15), mem::read::<u32>(rsdp + 16), mem::read::<u64>(rsdp + 24))
        };
        let wide = revision >= 2 && xsdt != 0;
        let (root, step) = if wide { (xsdt, 8) } else { (rsdt.into(), 4) };
        let Some(root) = Table::open(root) else { return acpi };
        for offset in (36..root.bytes).step_by(step) {
            let address = if wide { root.get(offset) } else { root.get::<u32>(offset).into() };
            let Some(table) = Table::open(address) else { continue };
            match &table.signature() {
                b"APIC" => acpi.read_madt(table),
                b"FACP" => acpi.read_fadt(table),
                b"MCFG" => {
                    let [first_bus, last_bus] = table.get(54);
                    acpi.ecam = Some(Ecam { base: table.get(44), first_bus, last_bus });
                }
                _ => {}
            }
        }
        acpi
    }

    fn read_madt(&mut self, table: Table) {
        let mut offset = 44;
        while offset + 2 <= table.bytes {
            let [kind, bytes] = table.get::<[u8; 2]>(offset);
            if kind == 1 && table.get::<u32>(offset + 8) == 0 {
                self.io_apic = Some(table.get::<u32>(offset + 4).into());
            }
            let (id, flags) = match kind {
                0 => (table.get::<u8>(offset + 3).into(), table.get::<u32>(offset + 4)),
                9 => (table.get::<u32>(offset + 4), table.get::<u32>(offset + 8)),
                _ => (0, 0),
            };
            if flags & 1 != 0 && !self.apic_ids.contains(&id) {
                self.apic_ids.push(id);
            }
            offset += u64::from(bytes.max(2));
        }
    }

    fn read_fadt(&mut self, table: Table) {
        let io_port = |gas: u64| {
            let port = table.get::<u64>(gas + 4);
            (table.get::<u8>(gas) == 1 && port != 0).then_some(port as u16)
        };
        self.power_off.pm1a = Some(table.get::<u32>(64) as u16).filter(|&p| p != 0);
        self.power_off.pm1a = self.power_off.pm1a.or(io_port(172));
        if table.get::<u32>(112) & 1 << 20 != 0 {
            self.power_off.sleep_control = io_port(244);
        }
        let dsdt =
            Table::open(table.get::<u64>(140)).or_else(|| Table::open(table.get::<u32>(40).into()));
        self.power_off.s5 = dsdt.and_then(find_s5);
    }
}

/// Looks for `Name (_S5_, Package { type, ...})` in the bytes of a DSDT.
fn find_s5(dsdt: Table) -> Option<u8> {
    let byte = |at: u64| dsdt.get::<u8>(at);
    let name = (36..dsdt.bytes.saturating_sub(8)).find(|&at| {
        byte(at) == b'_' && dsdt.get::<[u8; 4]>(at) == *b"_S5_" && byte(at + 4) == 0x12
    })?;
    // The top bits of the first length byte say how many follow; then comes the element count.
    let first = name + 5 + u64::from(byte(name + 5) >> 6) + 2;
    match byte(first) {
        0x0a => Some(byte(first + 1)),
        value @ (0 | 1) => Some(value),
        _ => None,
    }
}
