//! Which threads touch which part of guest memory before the guest starts.

use std::collections::BTreeMap;
use std::ops::Range;

use crate::cpuset::CpuSet;
use crate::plan::{Plan, Prealloc};
use crate::topology::Host;

/// What the threads are called, with a number behind it.
pub const NAME: &str = "prealloc";

/// More threads than this touch memory no faster on any host.
const MOST_BY_DEFAULT: u64 = 16;
/// Without huge pages, no thread gets less.
const PIECE: u64 = 2 << 20;

/// A thread that touches memory and ends.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Toucher {
    /// `prealloc0` and so on.
    pub name: String,
    /// The CPUs of `node` that may be used; `None`: those heddle was started with.
    pub cpus: Option<CpuSet>,
    /// The host node that it is to be near to.
    pub node: Option<u32>,
    /// Offsets into guest memory without its holes, ascending, in whole huge pages.
    pub ranges: Vec<Range<u64>>,
}

/// How memory is to be touched; `None`: not at all.
///
/// Huge pages of certain host nodes are touched even if the file does not ask for it: the kernel
/// promises huge pages when they are mapped, but not on which node, and a guest would die of a
/// missing one.
pub fn wish(plan: &Plan) -> Option<Prealloc> {
    let is_bound = plan.numa.iter().any(|node| node.host_node.is_some());
    let must = plan.machine.hugepages.is_some() && is_bound;
    plan.machine.prealloc.or_else(|| must.then(Prealloc::default))
}

/// The threads that touch the memory of `plan` on `host`; each byte has one. Empty: there is no
/// [`wish`].
pub fn touchers(plan: &Plan, host: &Host) -> Vec<Toucher> {
    let Some(wish) = wish(plan) else { return Vec::new() };
    let piece = plan.machine.hugepages.unwrap_or(PIECE);
    let wanted = match wish.threads {
        Some(threads) => u64::from(threads),
        None => (host.usable().len() as u64).clamp(1, MOST_BY_DEFAULT),
    };
    let mut touchers = Vec::new();
    let mut before = 0;
    for (node, ranges) in groups(plan, wish.near) {
        let bytes: u64 = ranges.iter().map(|range| range.end - range.start).sum();
        let pieces = bytes / piece;
        // Of all threads, so many are for the memory up to here.
        let upto = |bytes: u64| {
            (u128::from(wanted) * u128::from(bytes) / u128::from(plan.machine.memory.max(1))) as u64
        };
        let count = (upto(before + bytes) - upto(before)).clamp(1, pieces.max(1));
        before += bytes;
        let cpus = node.map(|node| host.usable_on(node)).filter(|cpus| !cpus.is_empty());
        for nth in 0..count {
            let part = |nth: u64| (u128::from(pieces) * u128::from(nth) / u128::from(count)) as u64;
            touchers.push(Toucher {
                name: format!("{NAME}{}", touchers.len()),
                cpus: cpus.clone(),
                node,
                ranges: cut(&ranges, part(nth) * piece..part(nth + 1) * piece),
            });
        }
    }
    touchers
}

/// Memory by the host node that threads are to be near to.
fn groups(plan: &Plan, near: bool) -> BTreeMap<Option<u32>, Vec<Range<u64>>> {
    if !near || plan.numa.is_empty() {
        return BTreeMap::from([(None, std::iter::once(0..plan.machine.memory).collect())]);
    }
    let mut groups: BTreeMap<_, Vec<_>> = BTreeMap::new();
    let mut start = 0;
    for node in &plan.numa {
        let end = start + node.memory;
        groups.entry(node.host_node).or_default().push(start..end);
        start = end;
    }
    groups
}

/// The part `wanted` of what `ranges` make when they are put together.
fn cut(ranges: &[Range<u64>], wanted: Range<u64>) -> Vec<Range<u64>> {
    let mut before = 0;
    let mut cut = Vec::new();
    for range in ranges {
        let length = range.end - range.start;
        let from = wanted.start.clamp(before, before + length) - before;
        let to = wanted.end.clamp(before, before + length) - before;
        if from < to {
            cut.push(range.start + from..range.start + to);
        }
        before += length;
    }
    cut
}
