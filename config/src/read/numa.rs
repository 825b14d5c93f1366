//! `[[numa]]`: the guest's nodes.

use super::machine::{MOST_MEMORY, PIECE, check_size};
use super::threads::up_to;
use crate::cpuset::CpuSet;
use crate::plan::{GuestNode, Machine};
use crate::reader::Reader;
use crate::tree::Loc;
use crate::units::format_size;

/// The tables that describe more would outgrow the room the firmware's data has in the guest.
const MOST_NODES: usize = 128;
const LOCAL: u8 = 10;

/// All nodes. Where the file does not say how much memory the machine has (`size_said`), it is
/// theirs.
pub(super) fn nodes(
    root: &Reader<'_>,
    count: u32,
    machine: &mut Machine,
    size_said: bool,
) -> Vec<GuestNode> {
    let at = root.loc_of("numa");
    let mut nodes = Vec::new();
    let mut places = Vec::new();
    if let Some(value) = root.value("numa") {
        if !value.is_array() {
            value.error("`numa` must be tables", Some("write [[numa]] for each node".to_owned()));
            return Vec::new();
        }
        for table in value.tables() {
            places.push(table.as_ref().map_or(at, |table| table.loc_of("distances")));
            nodes.extend(table.and_then(|table| node(&table, machine.hugepages)));
        }
    }
    if places.len() > MOST_NODES {
        root.report.error(at, format!("the most nodes are {MOST_NODES}"), None);
    } else if nodes.len() == places.len() && !nodes.is_empty() {
        vcpus(root, at, &nodes, count);
        memory(root, at, &nodes, machine, size_said);
        distances(root, &places, &nodes);
    }
    if machine.prealloc.is_some_and(|prealloc| prealloc.near)
        && nodes.iter().all(|node| node.host_node.is_none())
    {
        let at = root.loc_of("machine");
        let hint = "without one, memory comes from the node of the thread that touches it";
        let message = "`near` does nothing: no [[numa]] has a `host-node`";
        root.report.warning(at, message, Some(hint.to_owned()));
    }
    nodes
}

/// One `[[numa]]`; `None`: without a part that the whole depends on.
fn node(table: &Reader<'_>, hugepages: Option<u64>) -> Option<GuestNode> {
    let vcpus = table.value("vcpus").map(|value| value.cpus());
    let memory = table.value("memory").and_then(|value| {
        let size = value.size()?;
        check_size(&value, size, hugepages.unwrap_or(PIECE));
        Some(size)
    });
    let host_node = table.value("host-node").and_then(|value| value.int());
    let distances = table.value("distances").map(|value| {
        let items = value.items()?;
        items.iter().map(|item| item.int()).collect::<Option<Vec<u8>>>()
    });
    let vcpus = vcpus.unwrap_or(Some(CpuSet::new()))?;
    let distances = distances.map_or(Some(None), |distances| distances.map(Some))?;
    Some(GuestNode { vcpus, memory: memory?, host_node, distances })
}

/// Every vCPU is in exactly one node.
fn vcpus(root: &Reader<'_>, at: Loc, nodes: &[GuestNode], count: u32) {
    let mut seen = CpuSet::new();
    for (nth, node) in nodes.iter().enumerate() {
        let beyond: CpuSet = node.vcpus.iter().filter(|vcpu| *vcpu >= count).collect();
        if !beyond.is_empty() {
            let (beyond, has) = (beyond.counted("vCPU"), up_to(count));
            let message = format!("node {nth} has {beyond}, but the machine has {has}");
            root.report.error(at, message, None);
        }
        let twice = node.vcpus.intersection(&seen);
        if !twice.is_empty() {
            let message = format!("{} in two nodes, the second is {nth}", twice.counted("vCPU"));
            root.report.error(at, message, None);
        }
        seen.extend(node.vcpus.iter());
    }
    let missing: CpuSet = (0..count).filter(|vcpu| !seen.contains(*vcpu)).collect();
    if !missing.is_empty() {
        let message = format!("no node for {}", missing.counted("vCPU"));
        let hint = format!("add them to one: vcpus = \"{missing}\"");
        root.report.error(at, message, Some(hint));
    }
}

/// The nodes' memory is the machine's.
fn memory(root: &Reader<'_>, at: Loc, nodes: &[GuestNode], machine: &mut Machine, size_said: bool) {
    let sum = nodes.iter().fold(0u64, |sum, node| sum.saturating_add(node.memory));
    if sum > MOST_MEMORY {
        let most = format_size(MOST_MEMORY);
        root.report.error(at, format!("the nodes have more memory than the most, {most}"), None);
    } else if size_said && sum != machine.memory {
        let (sum, memory) = (format_size(sum), format_size(machine.memory));
        let message = format!("the nodes have {sum} of memory, but `machine.memory` is {memory}");
        let hint = "make them equal, or leave `machine.memory` out: it is the sum";
        root.report.error(at, message, Some(hint.to_owned()));
    } else {
        machine.memory = sum;
    }
}

/// All nodes say their distances or none, each to all, and the same both ways.
fn distances(root: &Reader<'_>, places: &[Loc], nodes: &[GuestNode]) {
    if nodes.iter().all(|node| node.distances.is_none()) {
        return;
    }
    for (nth, (node, at)) in nodes.iter().zip(places).enumerate() {
        let error = |message: String, hint: &str| {
            root.report.error(*at, message, Some(hint.to_owned()));
        };
        let Some(distances) = &node.distances else {
            error(format!("node {nth} has no `distances`"), "all nodes have them, or none");
            continue;
        };
        if distances.len() != nodes.len() {
            let (has, needs) = (distances.len(), nodes.len());
            let message = format!("node {nth} has {has} distances, there are {needs} nodes");
            error(message, "one for each node, itself included");
            continue;
        }
        for (other, distance) in distances.iter().enumerate() {
            if (other == nth) != (*distance == LOCAL) {
                let message = format!("node {nth} is {distance} from node {other}");
                error(message, "10 is the distance to itself, and only to itself");
                break;
            }
            // ACPI lets them differ; what reads the table does not expect it.
            let back = nodes[other].distances.as_ref().and_then(|back| back.get(nth));
            if other < nth && back.is_some_and(|back| back != distance) {
                let message = format!("node {nth} is {distance} from node {other}, but not back");
                error(message, "distances are the same both ways");
                break;
            }
        }
    }
}
