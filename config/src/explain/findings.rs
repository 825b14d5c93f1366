//! What is doubtful about a plan on a host.

use super::{Problem, Work, pins};
use crate::cpuset::CpuSet;
use crate::diagnostics::Severity;
use crate::plan::{Engine, Placement, Plan, Sched, Thread, ThreadId, Verdict};
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
            Sched::Fifo { priority } | Sched::Rr { priority }
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
