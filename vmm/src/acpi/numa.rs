//! The ACPI tables of a guest with NUMA nodes: which memory and CPUs are near to each other
//! (SRAT), and how far the nodes are (SLIT). ACPI 6.5, sections 5.2.16 and 5.2.17.

use acpi_tables::Aml;
use acpi_tables::sdt::Sdt;
use acpi_tables::srat::MemoryAffinity;

use super::{OEM, REVISION, TABLE, X2APIC_FROM};
use crate::memory::GuestNode;

const ENABLED: u32 = 1;

/// The System Resource Affinity Table. `apic_ids` are those of the vCPUs, by number.
///
/// `acpi_tables` writes revision 1, in which a node is one byte, and has no entries for CPUs.
pub(super) fn srat(nodes: &[GuestNode], apic_ids: &[u32]) -> Sdt {
    let mut table = Sdt::new(*b"SRAT", 36, 3, OEM, TABLE, REVISION);
    table.append_slice(&1u32.to_le_bytes()); // reserved, 1 for compatibility
    table.append_slice(&0u64.to_le_bytes());
    for (domain, node) in (0..).zip(nodes) {
        for apic_id in node.vcpus.iter().filter_map(|vcpu| apic_ids.get(vcpu as usize)) {
            // The same kinds of ids as in the MADT, or the guest does not find its CPU.
            match u8::try_from(*apic_id) {
                Ok(id) if *apic_id < X2APIC_FROM => table.append_slice(&local_apic(domain, id)),
                _ => table.append_slice(&local_x2apic(domain, *apic_id)),
            }
        }
    }
    for (domain, node) in (0..).zip(nodes) {
        for range in &node.ranges {
            let mut entry = Vec::new();
            MemoryAffinity::new(domain, range.start, range.end - range.start)
                .enabled()
                .to_aml_bytes(&mut entry);
            table.append_slice(&entry);
        }
    }
    table
}

/// Processor Local APIC/SAPIC Affinity structure, section 5.2.16.1.
fn local_apic(domain: u32, apic_id: u8) -> [u8; 16] {
    let [low, rest @ ..] = domain.to_le_bytes();
    let mut entry = [0; 16];
    entry[..4].copy_from_slice(&[0, 16, low, apic_id]);
    entry[4..8].copy_from_slice(&ENABLED.to_le_bytes());
    entry[9..12].copy_from_slice(&rest);
    entry
}

/// Processor Local x2APIC Affinity structure, section 5.2.16.3.
fn local_x2apic(domain: u32, apic_id: u32) -> [u8; 24] {
    let mut entry = [0; 24];
    entry[..2].copy_from_slice(&[2, 24]);
    entry[4..8].copy_from_slice(&domain.to_le_bytes());
    entry[8..12].copy_from_slice(&apic_id.to_le_bytes());
    entry[12..16].copy_from_slice(&ENABLED.to_le_bytes());
    entry
}

/// The System Locality Information Table: a byte for the way from each node to each.
pub(super) fn slit(nodes: &[GuestNode]) -> Sdt {
    let mut table = Sdt::new(*b"SLIT", 36, 1, OEM, TABLE, REVISION);
    table.append_slice(&(nodes.len() as u64).to_le_bytes());
    nodes.iter().for_each(|node| table.append_slice(&node.distances));
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(table: &Sdt) -> Vec<u8> {
        let mut bytes = Vec::new();
        table.to_aml_bytes(&mut bytes);
        let length = u32::from_le_bytes(bytes[4..8].try_into().unwrap());
        assert_eq!(length as usize, bytes.len());
        assert_eq!(bytes.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte)), 0);
        bytes
    }

    fn node(vcpus: &str, ranges: &[std::ops::Range<u64>], distances: &[u8]) -> GuestNode {
        let vcpus = vcpus.parse().unwrap();
        GuestNode { vcpus, ranges: ranges.to_vec(), distances: distances.to_vec() }
    }

    fn u32_at(entry: &[u8], at: usize) -> u32 {
        u32::from_le_bytes(entry[at..at + 4].try_into().unwrap())
    }

    fn u64_at(entry: &[u8], at: usize) -> u64 {
        u64::from_le_bytes(entry[at..at + 8].try_into().unwrap())
    }

    #[test]
    fn the_srat_has_every_vcpu_and_every_range_in_its_node() {
        let low = 0..0x8000_0000;
        let around = [0x8000_0000..0xc000_0000, 1 << 32..5 << 30];
        let nodes = [node("0,2", &[low], &[10, 20]), node("1,3-4", &around, &[20, 10])];
        let srat = bytes(&srat(&nodes, &[0, 1, 254, 255, 0x1_0002]));
        assert_eq!((&srat[..4], srat[8], u32_at(&srat, 36)), (&b"SRAT"[..], 3, 1));
        let (mut cpus, mut memory) = (Vec::new(), Vec::new());
        let mut rest = &srat[48..];
        while !rest.is_empty() {
            let (entry, after) = rest.split_at(rest[1].into());
            match (entry[0], entry[1]) {
                (0, 16) => {
                    let domain = u32::from_le_bytes([entry[2], entry[9], entry[10], entry[11]]);
                    assert_eq!(u32_at(entry, 4), ENABLED);
                    cpus.push((0, u32::from(entry[3]), domain));
                }
                (2, 24) => {
                    assert_eq!(u32_at(entry, 12), ENABLED);
                    cpus.push((2, u32_at(entry, 8), u32_at(entry, 4)));
                }
                (1, 40) => {
                    assert_eq!(u32_at(entry, 28), ENABLED);
                    memory.push((u32_at(entry, 2), u64_at(entry, 8), u64_at(entry, 16)));
                }
                other => panic!("{other:?}"),
            }
            rest = after;
        }
        assert_eq!(cpus, [(0, 0, 0), (0, 254, 0), (0, 1, 1), (2, 255, 1), (2, 0x1_0002, 1)]);
        let expected = [(0, 0, 2 << 30), (1, 2 << 30, 1 << 30), (1, 4 << 30, 1 << 30)];
        assert_eq!(memory, expected);
    }

    #[test]
    fn a_domain_above_255_keeps_its_upper_bytes() {
        let nodes: Vec<_> = (0..300).map(|n| node(&n.to_string(), &[], &[])).collect();
        let srat = bytes(&srat(&nodes, &vec![1; 300]));
        let last = &srat[srat.len() - 16..];
        assert_eq!((last[2], &last[9..12]), (299u32.to_le_bytes()[0], &[1, 0, 0][..]));
    }

    #[test]
    fn the_largest_tables_leave_room_for_the_others() {
        // What `[[numa]]` and `machine.cpus` permit at most; one node is on both sides of the hole.
        let node = |n: u32| {
            let (first, last) = (n * 8, n * 8 + 7);
            node(&format!("{first}-{last}"), &[0..1, 2..3], &[20; 128])
        };
        let nodes: Vec<_> = (0..128).map(node).collect();
        let ids: Vec<u32> = (0..1024).collect();
        // 96 KiB for all tables, see BOOT_DATA; the MADT takes 15.
        assert!(bytes(&srat(&nodes, &ids)).len() + bytes(&slit(&nodes)).len() < 52 << 10);
    }

    #[test]
    fn the_slit_is_the_matrix() {
        let nodes = [
            node("0", &[], &[10, 11, 12]),
            node("1", &[], &[11, 10, 13]),
            node("2", &[], &[12, 13, 10]),
        ];
        let slit = bytes(&slit(&nodes));
        assert_eq!((&slit[..4], u64_at(&slit, 36)), (&b"SLIT"[..], 3));
        assert_eq!(slit[44..], [10, 11, 12, 11, 10, 13, 12, 13, 10]);
    }
}
