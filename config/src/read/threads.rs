//! `[vcpu]` and `[thread.NAME]`.

use std::time::Duration;

use crate::cpuset::CpuSet;
use crate::plan::{Poll, Sched, Thread, Vcpu};
use crate::reader::Reader;
use crate::units::{UnitError, format_time, parse_time};
use crate::value::Value;

const LONGEST_POLL: Duration = Duration::from_secs(1);
/// CPU time is counted by ticks, of up to 10 ms.
const SHORTEST_RUNAWAY: Duration = Duration::from_millis(10);
const LONGEST_RUNAWAY: Duration = Duration::from_secs(10);
/// A loop that does not pause for so long is no real-time thread.
const LOOP_RUNAWAY: Option<Duration> = Some(Duration::from_millis(200));
/// A guest may compute for as long as it likes.
const VCPU_RUNAWAY: Option<Duration> = None;

/// All vCPUs.
pub(super) fn vcpus(table: &Reader<'_>, count: u32) -> Vec<Vcpu> {
    let sched = sched(&table.table("sched"), VCPU_RUNAWAY);
    let mut cpus = match table.value("affinity") {
        Some(affinity) => affinities(&affinity, count),
        None => vec![None; count as usize],
    };
    let mut pinned = CpuSet::new();
    for (key, loc, value) in table.map("pin") {
        let target = value.cpus();
        let vcpus = match key.parse::<CpuSet>() {
            Ok(vcpus) => vcpus,
            Err(error) => {
                let hint = "the key says which vCPUs: \"0-1\" = \"8,72\"";
                table.report.error(loc, format!("`vcpu.pin`: {error}"), Some(hint.to_owned()));
                continue;
            }
        };
        let beyond: CpuSet = vcpus.iter().filter(|vcpu| *vcpu >= count).collect();
        if !beyond.is_empty() {
            let message =
                format!("there is no {}: the machine has {}", beyond.counted("vCPU"), up_to(count));
            table.report.error(loc, message, None);
        }
        let twice = vcpus.intersection(&pinned);
        if !twice.is_empty() {
            table.report.error(loc, format!("{} pinned twice", twice.counted("vCPU")), None);
        }
        for vcpu in vcpus.iter().filter(|vcpu| *vcpu < count) {
            cpus[vcpu as usize].clone_from(&target);
        }
        pinned.extend(vcpus.iter());
    }
    cpus.into_iter().map(|cpus| Vcpu { cpus, sched }).collect()
}

/// "0 to 3", or "only 0".
pub(super) fn up_to(count: u32) -> String {
    if count == 1 { "only 0".to_owned() } else { format!("0 to {}", count - 1) }
}

fn affinities(value: &Value<'_>, count: u32) -> Vec<Option<CpuSet>> {
    let none = vec![None; count as usize];
    let parsed = value.parse(
        |text| match text.split_once('@') {
            _ if text == "none" => Ok(none.clone()),
            Some((form, cpus)) if form.trim() == "1:1" => {
                let cpus: CpuSet = cpus.parse().map_err(|error| format!("{error}"))?;
                if cpus.len() < count as usize {
                    let have = cpus.len();
                    return Err(format!("{cpus} has {have} CPUs, {count} vCPUs need one each"));
                }
                let one = |cpu| Some(CpuSet::from_iter([cpu]));
                Ok(cpus.iter().take(count as usize).map(one).collect())
            }
            _ => {
                let cpus: CpuSet = text.parse().map_err(|error| format!("{error}"))?;
                Ok(vec![Some(cpus); count as usize])
            }
        },
        |_| Some("write \"none\", a set of CPUs like \"0-3\", or \"1:1@0-3\"".to_owned()),
    );
    parsed.unwrap_or(none)
}

/// All event loops, `main` first.
pub(super) fn threads(root: &Reader<'_>) -> Vec<Thread> {
    let main = Thread {
        name: "main".to_owned(),
        cpus: None,
        sched: Sched::default(),
        poll: Poll { max: Duration::from_micros(32), grow: 2, shrink: 0, share: 100 },
    };
    let mut threads = vec![main];
    for (name, table) in root.named("thread") {
        let thread = thread(name, &table);
        match thread.name.as_str() {
            "main" => threads[0] = thread,
            "vcpu" => table.error(
                "`vcpu` is no event loop: it stands for the vCPU that submits",
                Some("configure the vCPU threads in [vcpu], or choose another name".to_owned()),
            ),
            _ => threads.push(thread),
        }
    }
    threads
}

fn thread(name: String, table: &Reader<'_>) -> Thread {
    let cpus = table.value("cpus").and_then(|value| value.cpus());
    let sched = sched(&table.table("sched"), LOOP_RUNAWAY);
    let poll = poll(&table.table("poll"));
    if let Sched::Fifo { runaway: Some(runaway), .. } | Sched::Rr { runaway: Some(runaway), .. } =
        sched
        && poll.max >= runaway
    {
        let (poll, runaway) = (format_time(poll.max), format_time(runaway));
        let message = format!("polling for {poll} is running away after {runaway}");
        let hint = "poll for less, or let sched.runaway be more, or \"off\"".to_owned();
        table.error(message, Some(hint));
    }
    Thread { name, cpus, sched, poll }
}

fn poll(table: &Reader<'_>) -> Poll {
    let max = table.value("max").and_then(|value| {
        let read = |text: &str| match text {
            "off" => Ok(Duration::ZERO),
            _ => parse_time(text),
        };
        let time = value.parse(read, |error| match error {
            UnitError::NoUnit(number) => Some(format!("add a unit: \"{}us\"", number.trim())),
            _ => Some("write \"off\", or a time like \"32us\"".to_owned()),
        })?;
        if time > LONGEST_POLL {
            let hint = "a poll of some 10 to 100us is usual".to_owned();
            value.error("the longest poll is 1s", Some(hint));
        }
        Some(time)
    });
    let number = |key| table.value(key).and_then(|value| value.int()).unwrap_or_default();
    Poll {
        max: max.unwrap_or_default(),
        grow: number("grow"),
        shrink: number("shrink"),
        share: number("share"),
    }
}

fn runaway(table: &Reader<'_>, default: Option<Duration>) -> Option<Duration> {
    let Some(value) = table.value("runaway") else { return default };
    let read = |text: &str| match text {
        "off" => Ok(None),
        _ => parse_time(text).map(Some),
    };
    let time = value.parse(read, |error| match error {
        UnitError::NoUnit(number) => Some(format!("add a unit: \"{}ms\"", number.trim())),
        _ => Some("write \"off\", or a time like \"200ms\"".to_owned()),
    })?;
    if time.is_some_and(|time| !(SHORTEST_RUNAWAY..=LONGEST_RUNAWAY).contains(&time)) {
        value.error("must be from 10ms to 10s, or \"off\"", None);
    }
    time
}

/// `runaway`: its default here.
fn sched(table: &Reader<'_>, default: Option<Duration>) -> Sched {
    let policy = table.value("policy").and_then(|value| value.word());
    let nice = table.value("nice").and_then(|value| value.int());
    let priority = table.value("priority").and_then(|value| value.int());
    // What a policy that is no policy takes, nobody knows: that is reported already.
    let runaway = runaway(table, default);
    let Some(policy) = policy else { return Sched::default() };
    let takes: &[&str] = match policy {
        "other" | "batch" => &["nice"],
        "fifo" | "rr" => &["priority", "runaway"],
        _ => &[],
    };
    let real_time = "fifo and rr";
    for (key, policies) in
        [("nice", "other and batch"), ("priority", real_time), ("runaway", real_time)]
    {
        if !takes.contains(&key) && table.has(key) {
            let message = format!("`{key}` goes with the policies {policies}, this is {policy}");
            table.report.error(table.loc_of(key), message, None);
        }
    }
    let need = || {
        if !table.has("priority") {
            let hint = "add priority = 1 (the lowest) to 99".to_owned();
            table.error(format!("the policy {policy} needs a `priority`"), Some(hint));
        }
        1
    };
    match policy {
        "batch" => Sched::Batch { nice: nice.unwrap_or(0) },
        "idle" => Sched::Idle,
        "fifo" => Sched::Fifo { priority: priority.unwrap_or_else(need), runaway },
        "rr" => Sched::Rr { priority: priority.unwrap_or_else(need), runaway },
        _ => Sched::Other { nice: nice.unwrap_or(0) },
    }
}
