//! What is doubtful about a plan on a host.

use std::collections::BTreeMap;

use super::{Problem, Work, pins};
use crate::cpuset::CpuSet;
use crate::diagnostics::Severity;
use crate::plan::{Engine, GuestNode, Placement, Plan, Sched, Thread, ThreadId, Verdict};
use crate::prealloc;
use crate::topology::Host;
use crate::units::format_size;

/// So many queues on one loop, with another loop idle, look like a mistake.
const PILE: u64 = 4;

/// Everything doubtful, by code.
pub(super) fn all(plan: &Plan, host: &Host, work: &Work<'_>) -> Vec<Problem> {
    let mut found = Vec::new();
    overlaps(&mut found, plan, host);
    crowded_vcpus(&mut found, plan);
    idle_and_piled_up(&mut found, plan, work);
    forced_experiments(&mut found, plan, work);
    foreign_cpus(&mut found, plan, host);
    priorities(&mut found, plan, host);
    memory(&mut found, plan, host);
    overcommitment(&mut found, plan, host);
    host_nodes(&mut found, plan, host);
    remote_vcpus(&mut found, plan, host);
    remote_queues(&mut found, plan, host);
    near_without_cpus(&mut found, plan, host);
    cut_dies(&mut found, plan);
    found.sort_by_key(|problem| problem.code);
    found
}

/// The severity the file gives a doubt; `None`: it is allowed.
fn by(verdict: Verdict) -> Option<Severity> {
    match verdict {
        Verdict::Allow => None,
        Verdict::Warn => Some(Severity::Warning),
        Verdict::Error => Some(Severity::Error),
    }
}

/// W01: a thread on a pinned vCPU's CPU. W02: a thread on the other half of its core.
fn overlaps(found: &mut Vec<Problem>, plan: &Plan, host: &Host) {
    let Some(severity) = by(plan.policy.overlap) else {
        return;
    };
    let pins = pins(plan);
    let pinned: CpuSet = pins.iter().flat_map(|(cpus, _)| cpus.iter()).collect();
    let vcpus_on = |shared: &CpuSet| -> CpuSet {
        let on = pins.iter().filter(|(cpus, _)| cpus.intersects(shared));
        on.flat_map(|(_, vcpus)| vcpus.iter()).collect()
    };
    let free = host.usable().difference(&pinned);
    let apart = host.usable().difference(&host.with_siblings(&pinned));
    let advice = |free: &CpuSet, otherwise: &str| match free.is_empty() {
        true => otherwise.to_owned(),
        false => format!("CPUs without a pinned vCPU: {free}"),
    };
    for thread in &plan.threads {
        let name = &thread.name;
        let cpus = thread.cpus.clone().unwrap_or_else(|| host.usable());
        let shared = cpus.intersection(&pinned);
        if !shared.is_empty() {
            let (vcpus, shared) = (vcpus_on(&shared).counted("pinned vCPU"), shared.counted("CPU"));
            let message = match thread.cpus {
                Some(_) => format!("{name} is on {shared} of the {vcpus}"),
                None => format!("{name} has no `cpus`, so it may run on {shared} of the {vcpus}"),
            };
            let hint = advice(&free, "no CPU is left for it; pin the vCPUs to fewer CPUs");
            found.push(Problem { severity, ..Problem::warning("W01", message, &hint) });
            continue;
        }
        let siblings = host.with_siblings(&cpus).intersection(&pinned);
        if !siblings.is_empty() {
            let vcpus = vcpus_on(&siblings).counted("pinned vCPU");
            let (cpus, siblings) = (cpus.counted("CPU"), siblings.counted("CPU"));
            let message = format!("{name} on {cpus} shares cores with the {vcpus} on {siblings}");
            let hint = advice(&apart, "no core is left for it; accept it, or pin fewer vCPUs");
            found.push(Problem::warning("W02", message, &hint));
        }
    }
}

/// W03: more vCPUs on a set of CPUs than it has.
fn crowded_vcpus(found: &mut Vec<Problem>, plan: &Plan) {
    for (cpus, vcpus) in pins(plan) {
        if vcpus.len() > cpus.len() {
            let (many, few) = (vcpus.len(), cpus.counted("CPU"));
            let message = format!("the {many} vCPUs {vcpus} are pinned to {few}");
            let hint = "give each vCPU a CPU, for instance affinity = \"1:1@CPUS\"";
            found.push(Problem::warning("W03", message, hint));
        }
    }
}

/// W04: a queue map that piles up. W06: threads without work.
fn idle_and_piled_up(found: &mut Vec<Problem>, plan: &Plan, work: &Work<'_>) {
    let iothreads = (1..plan.threads.len()).map(ThreadId);
    let idle: Vec<&str> = iothreads
        .filter(|id| work.queues(|queue| queue.place.home() == *id) == 0)
        .map(|id| plan.threads[id.0].name.as_str())
        .collect();
    if idle.is_empty() {
        return;
    }
    let idle = idle.join(", ");
    for (id, thread) in plan.threads.iter().enumerate() {
        let queues = work.queues(|queue| queue.place == Placement::Loop(ThreadId(id)));
        if queues >= PILE {
            let message =
                format!("{} serves {queues} queues while nothing is placed on {idle}", thread.name);
            let hint = "spread them: [[disk.NAME.place]] queues = \"...\", on = \"...\"";
            found.push(Problem::warning("W04", message, hint));
        }
    }
    let message = format!("threads without work: {idle}");
    found.push(Problem::warning(
        "W06",
        message,
        "place a queue there, or take them out of the file",
    ));
}

/// W05: the synchronous engine where waiting hurts others.
fn forced_experiments(found: &mut Vec<Problem>, plan: &Plan, work: &Work<'_>) {
    for disk in plan.disks.iter().filter(|disk| disk.engine == Engine::Sync) {
        let name = &disk.name;
        let is_ours = |queue: &super::Queue<'_>| queue.engine.is_some() && queue.name == name;
        let on_vcpu =
            work.names(|queue| is_ours(queue) && matches!(queue.place, Placement::Vcpu { .. }));
        for queues in on_vcpu {
            let message = format!(
                "{queues} with engine = \"sync\" stops the vCPU until the disk has answered"
            );
            let hint = "an experiment; engine = \"io_uring\" lets the guest run on";
            found.push(Problem::warning("W05", message, hint));
        }
        for (id, thread) in plan.threads.iter().enumerate() {
            let here = |queue: &super::Queue<'_>| queue.place.home() == ThreadId(id);
            let ours =
                work.names(|queue| is_ours(queue) && queue.place == Placement::Loop(ThreadId(id)));
            let others = work.names(|queue| here(queue) && !is_ours(queue));
            if let ([ours], false) = (ours.as_slice(), others.is_empty()) {
                let thread = &thread.name;
                let others = others.join(", ");
                let message =
                    format!("{ours} with engine = \"sync\" keeps {thread} from serving {others}");
                let hint = "give it a thread of its own, or engine = \"io_uring\"";
                found.push(Problem::warning("W05", message, hint));
            }
        }
    }
}

/// W07: CPUs the host does not have. W08: CPUs this process may not use.
fn foreign_cpus(found: &mut Vec<Problem>, plan: &Plan, host: &Host) {
    let online = host.online();
    let mut wishes: Vec<(String, CpuSet)> = Vec::new();
    for Thread { name, cpus, .. } in &plan.threads {
        wishes.extend(cpus.clone().map(|cpus| (format!("thread {name} wants"), cpus)));
    }
    // All vCPUs in one complaint: pinned one by one, they would make as many.
    let stray = |cpus: &CpuSet| !cpus.difference(&host.usable()).is_empty();
    let pins: Vec<_> = pins(plan).into_iter().filter(|(cpus, _)| stray(cpus)).collect();
    if !pins.is_empty() {
        let vcpus: CpuSet = pins.iter().flat_map(|(_, vcpus)| vcpus.iter()).collect();
        let cpus = pins.iter().flat_map(|(cpus, _)| cpus.iter()).collect();
        wishes.push((format!("the pinning of {} wants", vcpus.counted("vCPU")), cpus));
    }
    for (who, cpus) in wishes {
        let missing = cpus.difference(&online);
        if !missing.is_empty() {
            let message = format!("{who} {}, which the host does not have", missing.counted("CPU"));
            let hint = format!("its CPUs are {online}");
            found.push(Problem::warning("W07", message, &hint));
        }
        if let Some(allowed) = &host.allowed {
            let forbidden = cpus.intersection(&online).difference(allowed);
            if !forbidden.is_empty() {
                let message =
                    format!("{who} {}, which heddle may not use", forbidden.counted("CPU"));
                let hint = format!("allowed are {allowed}; see taskset and the cgroup's cpuset");
                found.push(Problem::warning("W08", message, &hint));
            }
        }
    }
}

/// W09: priorities that the limits do not permit.
fn priorities(found: &mut Vec<Problem>, plan: &Plan, host: &Host) {
    let (Some(severity), Some(limits)) = (by(plan.policy.fallback), host.limits) else {
        return;
    };
    if limits.sys_nice {
        return;
    }
    let mut check = |who: &str, sched: Sched| {
        let (wish, limit) = match sched {
            Sched::Fifo { priority, .. } | Sched::Rr { priority, .. }
                if u64::from(priority) > limits.rtprio =>
            {
                (
                    format!("real-time priority {priority}"),
                    format!("the limit is {}", limits.rtprio),
                )
            }
            Sched::Other { nice } | Sched::Batch { nice } if nice < limits.nice => {
                (format!("nice {nice}"), format!("the lowest allowed is {}", limits.nice))
            }
            _ => return,
        };
        let message = format!("{who} wants {wish}, but {limit}");
        let hint = "raise it with ulimit (-r, -e) or limits.conf, or grant CAP_SYS_NICE";
        found.push(Problem { severity, ..Problem::warning("W09", message, hint) });
    };
    for Thread { name, sched, .. } in &plan.threads {
        check(&format!("thread {name}"), *sched);
    }
    // All vCPUs have the same.
    if let Some(vcpu) = plan.vcpus.first() {
        check("every vCPU", vcpu.sched);
    }
}

/// W10: more memory than the host has. W11: fewer huge pages than needed.
fn memory(found: &mut Vec<Problem>, plan: &Plan, host: &Host) {
    let size = plan.machine.memory;
    if let Some(have) = host.memory.filter(|have| size > *have) {
        let message = format!(
            "the guest's memory of {} is more than the host's {}",
            format_size(size),
            format_size(have >> 20 << 20)
        );
        found.push(Problem::warning("W10", message, "lower machine.memory"));
    }
    if let Some(page) = plan.machine.hugepages {
        let free = host.free_hugepages(page);
        if free < size {
            let (page_text, need) = (format_size(page), size / page);
            let message =
                format!("{need} huge pages of {page_text} are needed, {} are free", free / page);
            let kib = page / 1024;
            let hint = format!(
                "echo {need} > /sys/kernel/mm/hugepages/hugepages-{kib}kB/nr_hugepages, or leave `hugepages` out"
            );
            found.push(Problem::warning("W11", message, &hint));
        }
    }
}

/// W12: more vCPUs than CPUs.
fn overcommitment(found: &mut Vec<Problem>, plan: &Plan, host: &Host) {
    let (vcpus, cpus) = (plan.vcpus.len(), host.usable().len());
    if vcpus > cpus {
        let message = format!("{vcpus} vCPUs share {cpus} host CPUs");
        let hint = "fine for tests; a vCPU that waits for a CPU holds up the guest's locks";
        found.push(Problem::warning("W12", message, hint));
    }
}

/// The guest nodes whose memory is to come from a host node, with that node.
fn bound(plan: &Plan) -> impl Iterator<Item = (usize, &GuestNode, u32)> {
    plan.numa.iter().enumerate().filter_map(|(nth, node)| Some((nth, node, node.host_node?)))
}

/// W20: a host node that is not there. W21: one with less memory, or fewer huge pages, than is to
/// come from it. W22: one with less memory free now.
fn host_nodes(found: &mut Vec<Problem>, plan: &Plan, host: &Host) {
    let mut wanted: BTreeMap<u32, u64> = BTreeMap::new();
    for (nth, node, host_node) in bound(plan) {
        if host.has_node(host_node) {
            // The plan's memory is bounded as a whole.
            *wanted.entry(host_node).or_default() += node.memory;
            continue;
        }
        let message = format!(
            "guest node {nth} wants memory of host node {host_node}, which the host does not have"
        );
        let there: CpuSet = host.nodes.keys().copied().filter(|n| *n <= CpuSet::MAX).collect();
        let hint = match there.is_empty() {
            true => "it has no nodes: leave `host-node` out".to_owned(),
            false => format!("its nodes are {there}"),
        };
        found.push(Problem::warning("W20", message, &hint));
    }
    for (node, wanted) in wanted {
        let memory = host.nodes.get(&node).copied().unwrap_or_default();
        let size = format_size(wanted);
        let mib = |bytes: u64| format_size(bytes >> 20 << 20);
        if let Some(page) = plan.machine.hugepages {
            let (free, page_text) = (host.free_hugepages_on(node, page), format_size(page));
            if free < wanted {
                let (need, have, kib) = (wanted / page, free / page, page / 1024);
                let message = format!(
                    "{need} huge pages of {page_text} are needed on host node {node}, {have} are free"
                );
                let hint = format!(
                    "echo {need} > /sys/devices/system/node/node{node}/hugepages/hugepages-{kib}kB/nr_hugepages"
                );
                found.push(Problem::warning("W21", message, &hint));
            }
        } else if let Some(total) = memory.total.filter(|total| wanted > *total) {
            let message =
                format!("{size} are to come from host node {node}, which has {}", mib(total));
            let hint = "move memory to another node, or leave `host-node` out";
            found.push(Problem::warning("W21", message, hint));
        } else if let Some(free) = memory.available.filter(|free| wanted > *free) {
            let message = format!(
                "{size} are to come from host node {node}, which has {} free now",
                mib(free)
            );
            let hint = "numastat -m shows what takes it; other machines may be bound there";
            found.push(Problem::warning("W22", message, hint));
        }
    }
}

/// W23: vCPUs pinned away from their memory.
fn remote_vcpus(found: &mut Vec<Problem>, plan: &Plan, host: &Host) {
    for (nth, node, host_node) in bound(plan).filter(|(_, _, node)| host.has_node(*node)) {
        let remote: CpuSet = node
            .vcpus
            .iter()
            .filter(|vcpu| {
                let cpus = plan.vcpus.get(*vcpu as usize).and_then(|vcpu| vcpu.cpus.as_ref());
                cpus.is_some_and(|cpus| host.nodes_of(cpus).iter().any(|node| node != host_node))
            })
            .collect();
        if !remote.is_empty() {
            let message = format!(
                "{} of guest node {nth} may run away from its memory on host node {host_node}",
                remote.counted("pinned vCPU")
            );
            found.push(Problem::warning("W23", message, &cpus_of(host, host_node)));
        }
    }
}

/// W24: a thread away from the memory of the vCPUs whose queues it serves. A disk with a queue for
/// each vCPU is meant: there, drivers let each vCPU use its own.
fn remote_queues(found: &mut Vec<Problem>, plan: &Plan, host: &Host) {
    for (nth, node, host_node) in bound(plan).filter(|(_, _, node)| host.has_node(*node)) {
        for (id, thread) in plan.threads.iter().enumerate() {
            let Some(cpus) = &thread.cpus else { continue };
            let nodes = host.nodes_of(cpus);
            if nodes.is_empty() || nodes.contains(host_node) {
                continue;
            }
            let mut remote = Vec::new();
            for disk in plan.disks.iter().filter(|disk| disk.queues.len() == plan.vcpus.len()) {
                let is_here = |queue: &u32| {
                    disk.queues.get(*queue as usize).is_some_and(|q| q.home() == ThreadId(id))
                };
                let queues: CpuSet = node.vcpus.iter().filter(is_here).collect();
                if !queues.is_empty() {
                    remote.push(format!("disk.{}:q{queues}", disk.name));
                }
            }
            if !remote.is_empty() {
                let message = format!(
                    "{} serves {} of guest node {nth}, whose memory is on host node {host_node}, from node {nodes}",
                    thread.name,
                    remote.join(", ")
                );
                found.push(Problem::warning("W24", message, &cpus_of(host, host_node)));
            }
        }
    }
}

/// W25: `near`, but no CPU of the node may be used.
fn near_without_cpus(found: &mut Vec<Problem>, plan: &Plan, host: &Host) {
    let mut nodes: Vec<u32> = prealloc::touchers(plan, host)
        .into_iter()
        .filter(|toucher| toucher.cpus.is_none())
        .filter_map(|toucher| toucher.node)
        .filter(|node| host.has_node(*node))
        .collect();
    nodes.dedup();
    for node in nodes {
        let message = format!("no CPU near the memory of host node {node} may be used");
        let hint = "its memory is touched from other nodes, which takes longer";
        found.push(Problem::warning("W25", message, hint));
    }
}

/// W26: guest nodes that share a die. The guest is told that a die shares its last level cache.
fn cut_dies(found: &mut Vec<Problem>, plan: &Plan) {
    let topology = plan.machine.topology;
    let per_die = topology.cores.saturating_mul(topology.threads).max(1) as usize;
    let numbers: Vec<u32> = (0..).take(plan.vcpus.len()).collect();
    for die in numbers.chunks(per_die) {
        let is_in = |node: &GuestNode| die.iter().any(|vcpu| node.vcpus.contains(*vcpu));
        let nodes: CpuSet =
            (0..).zip(&plan.numa).filter(|(_, node)| is_in(node)).map(|(nth, _)| nth).collect();
        if nodes.len() > 1 {
            let vcpus = die.iter().copied().collect::<CpuSet>().counted("vCPU");
            let message = format!("{vcpus} share a die, but are in the guest's nodes {nodes}");
            let hint = "Linux takes such nodes for broken: give each node sockets or dies of its own in machine.cpus.topology";
            // One is enough to see what is wrong.
            return found.push(Problem::warning("W26", message, hint));
        }
    }
}

fn cpus_of(host: &Host, node: u32) -> String {
    let cpus = host.usable_on(node);
    match cpus.is_empty() {
        true => format!("host node {node} has no CPU that may be used"),
        false => format!("host node {node} has {}", cpus.counted("CPU")),
    }
}
