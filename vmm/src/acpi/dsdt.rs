//! The DSDT: the devices that no bus tells of (ACPI 6.5 §5.2.11.1, in AML).

use acpi_tables::sdt::Sdt;
use acpi_tables::{Aml, aml};
use devices::legacy::{PanicPort, PowerPorts, Rtc, Serial};
use devices::pci::{ConfigPorts, Ecam, PciRoot};
use devices::virtio::mmio;

use super::{Description, OEM, REVISION, TABLE};
use crate::memory::{BARS, ECAM};
use crate::mmio_slots::MmioSlot;

/// Control over PCI Express that a guest gets when it asks (PCI Firmware 3.3 §4.5.2): native
/// hotplug, PME, AER, capability structures. Nothing here has an owner in firmware.
const GRANTED: u32 = 0b1_1101;
/// _OSC's status bits: an UUID or a revision it does not know, and bits it has taken away.
const UNKNOWN_UUID: u32 = 1 << 2;
const UNKNOWN_REVISION: u32 = 1 << 3;
const MASKED: u32 = 1 << 4;

/// A piece of AML that is built from pieces, put together at once.
struct Code(Vec<u8>);

impl Code {
    fn of(parts: &[&dyn Aml]) -> Self {
        let mut bytes = Vec::new();
        parts.iter().for_each(|part| part.to_aml_bytes(&mut bytes));
        Self(bytes)
    }
}

impl Aml for Code {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        sink.vec(&self.0);
    }
}

fn name(path: &str, value: &dyn Aml) -> Code {
    Code::of(&[&aml::Name::new(path.into(), value)])
}

fn eisa(id: &str) -> Code {
    name("_HID", &aml::EISAName::new(id))
}

fn device(path: &str, parts: &[&dyn Aml]) -> Code {
    Code::of(&[&aml::Device::new(path.into(), parts.to_vec())])
}

fn resources(parts: &[&dyn Aml]) -> Code {
    name("_CRS", &aml::ResourceTemplate::new(parts.to_vec()))
}

fn ports(first: u64, count: u64) -> aml::IO {
    aml::IO::new(first as u16, first as u16, 1, count as u8)
}

/// An interrupt of the ISA kind: an edge, active high.
fn edge(gsi: u32) -> aml::Interrupt {
    aml::Interrupt::new(true, true, false, false, gsi)
}

pub(super) fn dsdt(machine: &Description<'_>) -> Sdt {
    let mut parts = vec![soft_off()];
    let mut system = vec![panic_port()];
    system.extend(machine.rtc.then(clock));
    system.extend(machine.serials.iter().map(|&nth| serial(nth)));
    if let Some(last_bus) = machine.pci_buses.checked_sub(1) {
        system.push(pci_root(last_bus));
        system.push(reserved(machine.pci_buses));
    }
    system.extend(machine.mmio.iter().enumerate().map(|(nth, slot)| virtio_mmio(nth, slot)));
    let system: Vec<&dyn Aml> = system.iter().map(|part| part as &dyn Aml).collect();
    parts.push(Code::of(&[&aml::Scope::new("_SB_".into(), system)]));
    let mut dsdt = Sdt::new(*b"DSDT", 36, 2, OEM, TABLE, REVISION);
    parts.iter().for_each(|part| dsdt.append_slice(&part.0));
    dsdt
}

/// The S5 state: SLP_TYP 0 for both PM1 control registers, see [`PowerPorts`].
fn soft_off() -> Code {
    let zero: &dyn Aml = &aml::ZERO;
    name("_S5_", &aml::Package::new(vec![zero; 4]))
}

fn clock() -> Code {
    let where_it_is = resources(&[&ports(Rtc::PORT, Rtc::SIZE)]);
    device("RTC_", &[&eisa("PNP0B00"), &where_it_is])
}

/// The id under which Linux looks for a port to say that it panics.
fn panic_port() -> Code {
    let id = name("_HID", &"QEMU0001");
    let where_it_is = resources(&[&ports(PanicPort::PORT, PanicPort::SIZE)]);
    device("PEVT", &[&id, &name("_STA", &0xbu8), &where_it_is])
}

fn serial(nth: usize) -> Code {
    let number = nth as u8 + 1;
    let line = edge(Serial::IRQS[nth]);
    let where_it_is = resources(&[&ports(Serial::PORTS[nth], Serial::SIZE), &line]);
    let label = format!("COM{number}");
    let name_for_people = name("_DDN", &label);
    let (id, uid) = (eisa("PNP0501"), name("_UID", &number));
    device(&label, &[&id, &uid, &name_for_people, &where_it_is])
}

fn virtio_mmio(nth: usize, slot: &MmioSlot) -> Code {
    let registers = aml::Memory32Fixed::new(true, slot.base as u32, mmio::SIZE as u32);
    let where_it_is = resources(&[&registers, &edge(slot.gsi)]);
    let id = name("_HID", &"LNRO0005");
    let coherent = name("_CCA", &aml::ONE);
    let uid = name("_UID", &(nth as u32));
    device(&format!("V{nth:03X}"), &[&id, &uid, &coherent, &where_it_is])
}

fn pci_root(last_bus: u8) -> Code {
    let buses = aml::AddressSpace::new_bus_number(0u16, u16::from(last_bus));
    let config = ports(ConfigPorts::PORT, ConfigPorts::SIZE);
    let below = aml::AddressSpace::new_io(0u16, ConfigPorts::PORT as u16 - 1, None);
    let above_config = (ConfigPorts::PORT + ConfigPorts::SIZE) as u16;
    let above = aml::AddressSpace::new_io(above_config, u16::MAX, None);
    let (first, last) = (BARS.start as u32, (BARS.end - 1) as u32);
    let not_cached = aml::AddressSpaceCacheable::NotCacheable;
    let memory = aml::AddressSpace::new_memory(not_cached, true, first, last, None);
    let window = resources(&[&buses, &config, &below, &above, &memory]);
    device(
        "PCI0",
        &[
            &eisa("PNP0A08"),
            &name("_CID", &aml::EISAName::new("PNP0A03")),
            &name("_UID", &aml::ZERO),
            &name("_SEG", &aml::ZERO),
            &name("_BBN", &aml::ZERO),
            &window,
            &osc(),
            &routing(),
        ],
    )
}

/// Who controls PCI Express (ACPI 6.5 §6.2.11.3): the guest, as far as GRANTED goes.
fn osc() -> Code {
    let (status, control) = (aml::Path::new("CDW1"), aml::Path::new("CDW3"));
    let (uuid, revision, _count, buffer) = (aml::Arg(0), aml::Arg(1), aml::Arg(2), aml::Arg(3));
    let granted = aml::Local(0);
    let set = |bit: u32| Code::of(&[&aml::Or::new(&status, &status, &bit)]);
    let (wrong_uuid, wrong_revision, masked) =
        (set(UNKNOWN_UUID), set(UNKNOWN_REVISION), set(MASKED));
    let known = Code::of(&[
        &aml::CreateDWordField::new(&control, &buffer, &8u8),
        &aml::And::new(&granted, &control, &GRANTED),
        &aml::If::new(&aml::NotEqual::new(&revision, &aml::ONE), vec![&wrong_revision]),
        &aml::If::new(&aml::NotEqual::new(&control, &granted), vec![&masked]),
        &aml::Store::new(&control, &granted),
    ]);
    let pci_express = aml::Uuid::new("33DB4D5B-1FF7-401C-9657-7441C03DD766");
    Code::of(&[&aml::Method::new(
        "_OSC".into(),
        4,
        false,
        vec![
            &aml::CreateDWordField::new(&status, &buffer, &aml::ZERO),
            &aml::If::new(&aml::Equal::new(&uuid, &pci_express), vec![&known]),
            &aml::Else::new(vec![&wrong_uuid]),
            &aml::Return::new(&buffer),
        ],
    )])
}

/// Which input of the IOAPIC pin A of each slot leads to (ACPI 6.5 §6.2.13). Pin A of a function
/// behind a root port is that of the port: a guest that finds no `_PRT` there follows the pins up
/// to the root bus (PCI-to-PCI Bridge 1.2 §9.1).
fn routing() -> Code {
    let entries: Vec<Code> = (0..32u8)
        .map(|slot| {
            let address = u32::from(slot) << 16 | 0xffff;
            let (pin_a, wired, gsi) = (aml::ZERO, aml::ZERO, PciRoot::line_of(slot));
            Code::of(&[&aml::Package::new(vec![&address, &pin_a, &wired, &gsi])])
        })
        .collect();
    name("_PRT", &aml::Package::new(entries.iter().map(|entry| entry as &dyn Aml).collect()))
}

/// What belongs to the board and to no device: the configuration space in memory, which Linux uses
/// only if it is reserved here, and the ports of power management.
fn reserved(buses: u8) -> Code {
    let ecam = aml::Memory32Fixed::new(true, ECAM as u32, Ecam::size(buses) as u32);
    let power = ports(PowerPorts::PORT, PowerPorts::SIZE);
    device("MBRD", &[&eisa("PNP0C02"), &resources(&[&ecam, &power])])
}
