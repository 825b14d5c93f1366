//! The ACPI tables a guest needs to find its CPUs, PCI and the power switch (ACPI 6.5).

mod dsdt;
mod numa;

use acpi_tables::Aml;
use acpi_tables::facs::FACS;
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::madt::{
    EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic,
};
use acpi_tables::mcfg::MCFG;
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use devices::legacy::{PowerPorts, Rtc};

use crate::memory::{ECAM, GuestNode};
use crate::mmio_slots::MmioSlot;

const OEM: [u8; 6] = *b"HEDDLE";
pub(crate) const TABLE: [u8; 8] = *b"HEDDLEVM";
pub(crate) const REVISION: u32 = 1;

const LOCAL_APIC: u32 = 0xfee0_0000;
const IO_APIC: u32 = 0xfec0_0000;
/// IAPC_BOOT_ARCH, ACPI 6.5 §5.2.9.3: the ISA devices of the DSDT; nothing at the ports of a VGA
/// card, and no keyboard controller (a bit that is not set), so that no guest probes for them.
const LEGACY_DEVICES: u16 = 1 << 0;
const NO_VGA: u16 = 1 << 2;
const NO_ASPM: u16 = 1 << 4;
const NO_CLOCK: u16 = 1 << 5;
const RESET_PORT: u16 = 0xcf9;
const RESET_VALUE: u8 = 6;

/// xAPIC ids end here: 255 is broadcast.
pub(crate) const X2APIC_FROM: u32 = 255;

/// Tables laid out one after the other from a base address.
struct Layout {
    base: u64,
    bytes: Vec<u8>,
}

impl Layout {
    fn add(&mut self, table: &dyn Aml) -> u64 {
        self.bytes.resize(self.bytes.len().next_multiple_of(16), 0);
        let address = self.base + self.bytes.len() as u64;
        table.to_aml_bytes(&mut self.bytes);
        address
    }
}

/// What the tables tell.
#[derive(Debug, Clone, Copy, Default)]
pub struct Description<'a> {
    /// By vCPU: its APIC id.
    pub apic_ids: &'a [u32],
    /// Is there a real-time clock?
    pub rtc: bool,
    /// Serial ports there are, 0 for COM1.
    pub serials: &'a [usize],
    /// PCI buses, from bus 0 on; 0: there is no PCI.
    pub pci_buses: u8,
    /// The virtio-mmio devices.
    pub mmio: &'a [MmioSlot],
    /// The NUMA nodes; none: nothing is said about them.
    pub nodes: &'a [GuestNode],
}

/// The bytes of all tables for a machine, to be put at `base`, which is a multiple of 64. The RSDP
/// is the first of them.
pub fn tables(base: u64, machine: &Description<'_>) -> Vec<u8> {
    // The FACS comes next because it is the one with an alignment, 64.
    let room_for_rsdp = vec![0; Rsdp::len().next_multiple_of(64)];
    let mut layout = Layout { base, bytes: room_for_rsdp };
    let facs = layout.add(&FACS::new());
    let dsdt = layout.add(&dsdt::dsdt(machine));
    let mut listed =
        vec![layout.add(&fadt(facs, dsdt, machine.rtc)), layout.add(&madt(machine.apic_ids))];
    if let Some(last) = machine.pci_buses.checked_sub(1) {
        let mut mcfg = MCFG::new(OEM, TABLE, REVISION);
        mcfg.add_ecam(ECAM, 0, 0, last);
        listed.push(layout.add(&mcfg));
    }
    if !machine.nodes.is_empty() {
        listed.push(layout.add(&numa::srat(machine.nodes, machine.apic_ids)));
        listed.push(layout.add(&numa::slit(machine.nodes)));
    }
    let mut xsdt = XSDT::new(OEM, TABLE, REVISION);
    listed.into_iter().for_each(|table| xsdt.add_entry(table));
    let xsdt = layout.add(&xsdt);
    let mut rsdp = Vec::new();
    Rsdp::new(OEM, xsdt).to_aml_bytes(&mut rsdp);
    layout.bytes[..rsdp.len()].copy_from_slice(&rsdp);
    layout.bytes
}

/// The power button is a fixed one, by its flag not being set; there is no sleep button.
fn fadt(facs: u64, dsdt: u64, rtc: bool) -> impl Aml {
    let mut fadt = FADTBuilder::new(OEM, TABLE, REVISION)
        .firmware_ctrl_64(facs)
        .dsdt_64(dsdt)
        .flag(Flags::Wbinvd)
        .flag(Flags::SlpButton)
        .flag(Flags::ResetRegSup);
    fadt.sci_int = (PowerPorts::SCI as u16).into();
    fadt.pm1a_evt_blk = (PowerPorts::PORT as u32).into();
    fadt.pm1_evt_len = 4;
    fadt.pm1a_cnt_blk = (PowerPorts::CONTROL_PORT as u32).into();
    fadt.pm1_cnt_len = 2;
    let clock = if rtc { 0 } else { NO_CLOCK };
    fadt.century = if rtc { Rtc::CENTURY } else { 0 };
    fadt.iapc_boot_arch = (LEGACY_DEVICES | NO_VGA | NO_ASPM | clock).into();
    fadt.reset_reg = acpi_tables::gas::GAS::new(
        acpi_tables::gas::AddressSpace::SystemIo,
        8,
        0,
        acpi_tables::gas::AccessSize::ByteAccess,
        u64::from(RESET_PORT),
    );
    fadt.reset_value = RESET_VALUE;
    fadt.finalize()
}

/// Processor Local x2APIC structure, ACPI 6.5 §5.2.12.12; `acpi_tables` has none.
fn x2apic(uid: u32, apic_id: u32) -> [u8; 16] {
    let mut entry = [0; 16];
    entry[0] = 9;
    entry[1] = 16;
    entry[4..8].copy_from_slice(&apic_id.to_le_bytes());
    entry[8] = 1; // enabled
    entry[12..16].copy_from_slice(&uid.to_le_bytes());
    entry
}

/// Interrupt Source Override, ACPI 6.5 §5.2.12.5: ISA interrupt `source` comes in at `gsi`.
fn source_override(source: u8, gsi: u32, flags: u16) -> [u8; 10] {
    let mut entry = [0; 10];
    entry[..4].copy_from_slice(&[2, 10, 0, source]);
    entry[4..8].copy_from_slice(&gsi.to_le_bytes());
    entry[8..].copy_from_slice(&flags.to_le_bytes());
    entry
}

fn madt(apic_ids: &[u32]) -> Sdt {
    let mut madt = MADT::new(OEM, TABLE, REVISION, LocalInterruptController::Address(LOCAL_APIC));
    madt.add_structure(IoApic::new(0, IO_APIC, 0));
    for (uid, &id) in apic_ids.iter().enumerate().filter(|(_, id)| **id < X2APIC_FROM) {
        madt.add_structure(ProcessorLocalApic::new(uid as u8, id as u8, EnabledStatus::Enabled));
    }
    let mut bytes = Vec::new();
    madt.to_aml_bytes(&mut bytes);
    let mut table = Sdt::new(*b"APIC", 36, 5, OEM, TABLE, REVISION);
    table.append_slice(&bytes[36..]);
    // KVM wires the PIT to the input behind the cascade, as PCs do; the SCI is a level, active high.
    const ACTIVE_HIGH_LEVEL: u16 = 0b1101;
    table.append_slice(&source_override(0, 2, 0));
    table.append_slice(&source_override(PowerPorts::SCI as u8, PowerPorts::SCI, ACTIVE_HIGH_LEVEL));
    for (uid, &id) in apic_ids.iter().enumerate().filter(|(_, id)| **id >= X2APIC_FROM) {
        table.append_slice(&x2apic(uid as u32, id));
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sums_to_zero(bytes: &[u8]) -> bool {
        bytes.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte)) == 0
    }

    fn address(bytes: &[u8], at: usize) -> u64 {
        u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
    }

    fn full(apic_ids: &[u32]) -> Description<'_> {
        Description {
            apic_ids,
            rtc: true,
            serials: &[0, 1, 2, 3],
            pci_buses: 3,
            mmio: &[],
            nodes: &[],
        }
    }

    #[test]
    fn every_table_is_reached_from_the_rsdp_and_has_a_good_checksum() {
        let base = 0xe_0000;
        let bytes = tables(base, &full(&(0..300).collect::<Vec<_>>()));
        assert!(sums_to_zero(&bytes[..20]) && sums_to_zero(&bytes[..36]));
        let table = |address: u64| {
            let at = (address - base) as usize;
            let length = u32::from_le_bytes(bytes[at + 4..at + 8].try_into().unwrap());
            &bytes[at..at + length as usize]
        };
        let xsdt = table(address(&bytes, 24));
        assert!(sums_to_zero(xsdt));
        let mut seen = Vec::new();
        for entry in xsdt[36..].chunks(8) {
            let found = table(u64::from_le_bytes(entry.try_into().unwrap()));
            assert!(sums_to_zero(found), "{:?}", &found[..4]);
            seen.push(String::from_utf8_lossy(&found[..4]).into_owned());
            if &found[..4] == b"FACP" {
                let dsdt = table(address(found, 140));
                assert!(sums_to_zero(dsdt) && dsdt.windows(4).any(|name| name == b"_S5_"));
            }
            if &found[..4] == b"MCFG" {
                assert_eq!((address(found, 44), found[54], found[55]), (ECAM, 0, 2));
            }
            if &found[..4] == b"APIC" {
                let entries = 12 + 255 * 8 + 2 * 10 + 45 * 16;
                assert_eq!(found.len(), 44 + entries);
            }
        }
        assert_eq!(seen, ["FACP", "APIC", "MCFG"]);
    }
}
