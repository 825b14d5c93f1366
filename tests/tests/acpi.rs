//! The ACPI tables, read by ACPICA's own disassembler and compiler.

use std::fs;
use std::ops::Range;
use std::path::Path;
use std::process::Command;

use vmm::acpi::{Description, tables};
use vmm::memory::GuestNode;
use vmm::mmio_slots::MmioSlot;

const BASE: u64 = 0xe_0000;

/// Runs `iasl`; what it said.
#[track_caller]
fn iasl(args: &[&str], file: &Path) -> String {
    let dir = file.parent().expect("a file in a directory");
    let output = Command::new("iasl").args(args).arg(file).current_dir(dir).output();
    let output = output.expect("iasl is installed (package acpica-tools; tests/run does it)");
    let said = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    said.into_owned()
}

fn number(bytes: &[u8], at: usize, len: usize) -> u64 {
    bytes[at..at + len].iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte))
}

/// Every table but the RSDP, by signature, found as a guest finds them.
fn all(bytes: &[u8]) -> Vec<(String, &[u8])> {
    let table = |address: u64| {
        let at = (address - BASE) as usize;
        let bytes = &bytes[at..at + number(bytes, at + 4, 4) as usize];
        (String::from_utf8_lossy(&bytes[..4]).into_owned(), bytes)
    };
    let xsdt = table(number(bytes, 24, 8));
    let mut found = vec![xsdt.clone()];
    for entry in xsdt.1[36..].chunks(8) {
        let listed = table(number(entry, 0, 8));
        if listed.0 == "FACP" {
            found.push(table(number(listed.1, 132, 8)));
            found.push(table(number(listed.1, 140, 8)));
        }
        found.push(listed);
    }
    found
}

/// iasl reads every table without a complaint, and compiles what it read to the same bytes.
#[track_caller]
fn pass(machine: &Description<'_>) -> Vec<String> {
    let bytes = tables(BASE, machine);
    let dir = tempfile::tempdir().unwrap();
    let mut names = Vec::new();
    for (name, table) in all(&bytes) {
        let file = dir.path().join(format!("{name}.dat"));
        fs::write(&file, table).unwrap();
        let said = iasl(&["-d"], &file);
        let complains = |text: &str| text.contains("Error") || text.contains("Warning");
        let text = fs::read_to_string(file.with_extension("dsl")).unwrap();
        assert!(
            !complains(&said) && !complains(&text) && !text.contains("Invalid"),
            "{said}{text}"
        );
        if name != "FACS" {
            let said = iasl(&["-p", "again"], &file.with_extension("dsl"));
            let again = fs::read(dir.path().join("again.aml")).unwrap();
            assert!(!said.contains("Errors") || said.contains("0 Errors, 0 Warnings"), "{said}");
            // The compiler signs as the creator (bytes 28 to 36) and sums anew.
            let plain = |bytes: &[u8]| [&bytes[..9], &bytes[10..28], &bytes[36..]].concat();
            assert_eq!(plain(&again), plain(table), "{name}\n{text}");
        }
        names.push(name);
    }
    names
}

#[test]
fn iasl_reads_every_table_and_compiles_it_back() {
    let many: Vec<u32> = (0..1024).collect();
    let mmio: Vec<_> = (0..15).map(|nth| MmioSlot::new(nth, "disk.d").unwrap()).collect();
    let with_pci = Description {
        apic_ids: &[0],
        rtc: true,
        serials: &[0],
        pci_buses: 1,
        mmio: &[],
        nodes: &[],
    };
    let names = pass(&with_pci);
    assert_eq!(names, ["XSDT", "FACS", "DSDT", "FACP", "APIC", "MCFG"]);
    let node = |vcpus: &str, ranges: &[Range<u64>], distances: [u8; 2]| GuestNode {
        vcpus: vcpus.parse().unwrap(),
        ranges: ranges.to_vec(),
        distances: distances.to_vec(),
    };
    let nodes = [
        node("0-511", &[Range { start: 0, end: 2 << 30 }], [10, 21]),
        node("512-1023", &[2 << 30..3 << 30, 4 << 30..5 << 30], [21, 10]),
    ];
    let large = Description { apic_ids: &many, serials: &[0, 1, 2, 3], nodes: &nodes, ..with_pci };
    assert_eq!(pass(&large)[5..], ["MCFG", "SRAT", "SLIT"]);
    let with_slots = Description { pci_buses: 32, ..with_pci };
    assert_eq!(pass(&with_slots), names);
    let without_pci = pass(&Description { pci_buses: 0, rtc: false, mmio: &mmio, ..with_pci });
    assert!(!without_pci.contains(&"MCFG".to_owned()));
}
