//! `place`: where queues are served.

use super::threads::up_to;
use crate::cpuset::{CpuSet, excerpt};
use crate::plan::{MAIN, Placement, Thread, ThreadId};
use crate::reader::Reader;
use crate::report::did_you_mean;
use crate::value::Value;

/// The placement of every queue of a disk. Without a `count`, which has been reported, what is
/// written is still checked as far as it can be.
pub(super) fn placements(
    disk: &Reader<'_>,
    value: &Value<'_>,
    threads: &[Thread],
    count: Option<u32>,
) -> Vec<Placement> {
    const DEFAULT: Placement = Placement::Loop(MAIN);
    let number = count.unwrap_or(0) as usize;
    if !value.is_array() {
        return vec![placement(value, threads).unwrap_or(DEFAULT); number];
    }
    let mut queues = vec![None; number];
    let mut all_known = true;
    for table in value.tables() {
        let entry = table.as_ref().map(|table| entry(table, threads));
        let (Some(table), Some((Some(set), place)), Some(count)) = (&table, entry, count) else {
            all_known = false;
            continue;
        };
        let at = table.loc_of("queues");
        let beyond: CpuSet = set.iter().filter(|queue| *queue >= count).collect();
        if !beyond.is_empty() {
            let (beyond, has) = (beyond.counted("queue"), up_to(count));
            let message = format!("`{}` has no {beyond}: it has {has}", disk.path);
            table.report.error(at, message, None);
        }
        let mut twice = CpuSet::new();
        for queue in set.iter().filter(|queue| *queue < count) {
            if queues[queue as usize].replace(place.unwrap_or(DEFAULT)).is_some() {
                twice.insert(queue);
            }
        }
        if !twice.is_empty() {
            let message = format!("{} of `{}` placed twice", twice.counted("queue"), disk.path);
            table.report.error(at, message, None);
        }
    }
    let missing = queues.iter().zip(0..).filter(|(queue, _)| queue.is_none());
    let missing: CpuSet = missing.map(|(_, index)| index).collect();
    if all_known && !missing.is_empty() {
        let path = &disk.path;
        let message = format!("no place for {} of `{path}`", missing.counted("queue"));
        let hint = format!(
            "it has {number} queues; add [[{path}.place]] queues = \"{missing}\", or set {path}.queues"
        );
        disk.report.error(disk.loc_of("place"), message, Some(hint));
    }
    queues.into_iter().map(|queue| queue.unwrap_or(DEFAULT)).collect()
}

/// One `[[disk.NAME.place]]`: which queues, and where.
fn entry(table: &Reader<'_>, threads: &[Thread]) -> (Option<CpuSet>, Option<Placement>) {
    let set = table.value("queues").and_then(|value| value.cpus());
    let on = table.value("on").and_then(|value| placement(&value, threads));
    let home = table.value("home").and_then(|value| thread(&value, threads, None));
    if let (Some(Placement::Loop(_)), true) = (on, table.has("home")) {
        let hint = "the loop in `on` is their home already; leave `home` out".to_owned();
        let message = "`home` goes with `on = \"vcpu\"`";
        table.report.error(table.loc_of("home"), message, Some(hint));
    }
    match (on, home) {
        (Some(Placement::Vcpu { .. }), Some(home)) => (set, Some(Placement::Vcpu { home })),
        (on, _) => (set, on),
    }
}

/// `"main" | "vcpu" | THREAD`.
pub(super) fn placement(value: &Value<'_>, threads: &[Thread]) -> Option<Placement> {
    if value.text()? == "vcpu" {
        return Some(Placement::Vcpu { home: MAIN });
    }
    thread(value, threads, Some("vcpu")).map(Placement::Loop)
}

/// The event loop that `value` names; `also` is what else may stand there.
pub(super) fn thread(
    value: &Value<'_>,
    threads: &[Thread],
    also: Option<&str>,
) -> Option<ThreadId> {
    let name = value.text()?;
    let found = threads.iter().position(|thread| thread.name == name);
    if found.is_none() {
        let names = threads.iter().map(|thread| thread.name.as_str()).chain(also);
        let hint = match (name, did_you_mean(name, names)) {
            ("vcpu", _) => "a vCPU has no timers and no fds: name an event loop".to_owned(),
            (_, Some(hint)) => hint,
            (_, None) => format!("add [thread.{}]", excerpt(name)),
        };
        value.error(format!("there is no thread `{}`", excerpt(name)), Some(hint));
    }
    found.map(ThreadId)
}
