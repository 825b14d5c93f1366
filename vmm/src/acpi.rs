//! The ACPI tables a guest needs to find its CPUs, PCI and the power switch (ACPI 6.5).

use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::madt::{
    EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic,
};
use acpi_tables::mcfg::MCFG;
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, aml};

use crate::memory::ECAM;

pub(crate) const OEM: [u8; 6] = *b"HEDDLE";
pub(crate) const TABLE: [u8; 8] = *b"HEDDLEVM";
pub(crate) const REVISION: u32 = 1;

const LOCAL_APIC: u32 = 0xfee0_0000;
const IO_APIC: u32 = 0xfec0_0000;
/// Port blocks of the power management device, see `devices::legacy::power_ports`.
const PM1_EVENT: u32 = 0x600;
const PM1_CONTROL: u32 = 0x604;
const SCI: u16 = 9;
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

/// The bytes of all tables for a machine with these APIC ids, to be put at `base`. The RSDP is
/// the first of them.
pub fn tables(base: u64, apic_ids: &[u32]) -> Vec<u8> {
    let room_for_rsdp = vec![0; Rsdp::len()];
    let mut layout = Layout { base, bytes: room_for_rsdp };
    let dsdt = layout.add(&dsdt());
    let fadt = layout.add(&fadt(dsdt));
    let madt = layout.add(&madt(apic_ids));
    let mut mcfg = MCFG::new(OEM, TABLE, REVISION);
    mcfg.add_ecam(ECAM, 0, 0, 0);
    let mcfg = layout.add(&mcfg);
    let mut xsdt = XSDT::new(OEM, TABLE, REVISION);
    [fadt, madt, mcfg].into_iter().for_each(|table| xsdt.add_entry(table));
    let xsdt = layout.add(&xsdt);
    let mut rsdp = Vec::new();
    Rsdp::new(OEM, xsdt).to_aml_bytes(&mut rsdp);
    layout.bytes[..rsdp.len()].copy_from_slice(&rsdp);
    layout.bytes
}

/// Only the S5 state: SLP_TYP 0 for both PM1 control registers.
fn dsdt() -> Sdt {
    let zero = aml::ZERO;
    let types = aml::Package::new(vec![&zero, &zero, &zero, &zero]);
    let mut code = Vec::new();
    aml::Name::new("_S5_".into(), &types).to_aml_bytes(&mut code);
    let mut dsdt = Sdt::new(*b"DSDT", 36, 2, OEM, TABLE, REVISION);
    dsdt.append_slice(&code);
    dsdt
}

fn fadt(dsdt: u64) -> impl Aml {
    let mut fadt = FADTBuilder::new(OEM, TABLE, REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::Wbinvd)
        .flag(Flags::SlpButton)
        .flag(Flags::ResetRegSup);
    fadt.sci_int = SCI.into();
    fadt.pm1a_evt_blk = PM1_EVENT.into();
    fadt.pm1_evt_len = 4;
    fadt.pm1a_cnt_blk = PM1_CONTROL.into();
    fadt.pm1_cnt_len = 2;
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

    #[test]
    fn every_table_is_reached_from_the_rsdp_and_has_a_good_checksum() {
        let base = 0xe_0000;
        let bytes = tables(base, &(0..300).collect::<Vec<_>>());
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
            if &found[..4] == b"APIC" {
                let entries = 12 + 255 * 8 + 45 * 16;
                assert_eq!(found.len(), 44 + entries);
            }
        }
        assert_eq!(seen, ["FACP", "APIC", "MCFG"]);
    }
}
