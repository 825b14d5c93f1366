//! What a plan comes to on a host: every thread, its work, and why.

mod findings;
mod text;

use serde::Serialize;

use crate::cpuset::CpuSet;
use crate::diagnostics::Severity;
use crate::effective::groups;
use crate::plan::{Engine, MAIN, Placement, Plan, Poll, Sched, ThreadId};
use crate::prealloc;
use crate::topology::Host;
use crate::units::format_time;

/// What a plan comes to on a host.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Explanation {
    /// The machine's name.
    pub name: String,
    /// Every thread: the process's first one and those heddle makes, which are `main`, the
    /// iothreads and the vCPUs. The kernel adds its own.
    pub threads: Vec<ThreadReport>,
    /// The guest's NUMA nodes; empty: it is told of none.
    pub nodes: Vec<NodeReport>,
    /// Hot-plug slots, empty at the start.
    pub hotplug_slots: u8,
    /// What is doubtful.
    pub warnings: Vec<Problem>,
    /// Bytes of guest memory.
    pub memory: u64,
    /// CPUs of the host that its threads may use.
    pub host_cpus: usize,
    /// How many such machines the totals are for.
    pub vms: u32,
}

/// One thread.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct ThreadReport {
    /// `heddle`, `main`, the name in the file, or `vcpu0`.
    pub name: String,
    /// What it is for.
    pub role: Role,
    /// Host CPUs; `None`: those heddle was started with.
    pub cpus: Option<CpuSet>,
    /// NUMA nodes of these CPUs.
    pub nodes: CpuSet,
    /// Scheduling: `other`, `other, nice 5`, `fifo 10`.
    pub policy: String,
    /// Longest polling before a sleep; `None`: it never polls.
    pub poll: Option<String>,
    /// Queues whose requests it takes: `disk.data:q0-3`. On vCPUs: if this vCPU submits them.
    pub queues: Vec<String>,
    /// Why it is there and has this work.
    pub reasons: Vec<String>,
    /// File descriptors it needs.
    pub fds: u64,
    /// io_uring instances it needs.
    pub rings: u64,
}

/// A NUMA node of the guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct NodeReport {
    /// Its number.
    pub node: u32,
    /// Its vCPUs.
    pub vcpus: CpuSet,
    /// Bytes of its memory.
    pub memory: u64,
    /// Where the memory comes from; `None`: any node of the host.
    pub host_node: Option<u32>,
}

/// What a thread is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Role {
    /// The process's first thread: it waits for the end and carries the console.
    Process,
    /// The main loop.
    Main,
    /// An event loop of the file.
    Iothread,
    /// A CPU of the guest.
    Vcpu,
    /// Touches guest memory, and ends before the guest starts.
    Prealloc,
}

/// Something doubtful or impossible about a plan on a host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Problem {
    /// Always the same for the same kind of problem: `W01`.
    pub code: &'static str,
    /// Does it keep the plan from running as it is?
    pub severity: Severity,
    /// What it is.
    pub message: String,
    /// What to do.
    pub hint: Option<String>,
}

impl Problem {
    pub(crate) fn error(code: &'static str, message: String, hint: &str) -> Self {
        let hint = Some(hint.to_owned());
        Self { code, severity: Severity::Error, message, hint }
    }

    pub(crate) fn warning(code: &'static str, message: String, hint: &str) -> Self {
        Self { severity: Severity::Warning, ..Self::error(code, message, hint) }
    }
}

/// Says what `plan` comes to on `host`.
pub fn explain(plan: &Plan, host: &Host) -> Explanation {
    let work = Work::of(plan);
    let nodes = |cpus: &Option<CpuSet>| match cpus {
        Some(cpus) => host.nodes_of(cpus),
        None => host.nodes_of(&host.usable()),
    };
    let mut threads = vec![ThreadReport {
        name: "heddle".to_owned(),
        role: Role::Process,
        cpus: None,
        nodes: nodes(&None),
        policy: policy(Sched::default()),
        poll: None,
        queues: Vec::new(),
        reasons: vec![process(plan)],
        fds: PROCESS_FDS + plan.disks.iter().map(|disk| 2 + u64::from(disk.direct)).sum::<u64>(),
        rings: 0,
    }];
    for (id, thread) in plan.threads.iter().enumerate().map(|(id, thread)| (ThreadId(id), thread)) {
        let is_main = id == MAIN;
        threads.push(ThreadReport {
            name: thread.name.clone(),
            role: if is_main { Role::Main } else { Role::Iothread },
            nodes: nodes(&thread.cpus),
            cpus: thread.cpus.clone(),
            policy: policy(thread.sched),
            poll: poll(thread.poll),
            queues: work.served(Placement::Loop(id)),
            reasons: reasons(&work, id).into_iter().chain(guard(thread.sched)).collect(),
            fds: LOOP_FDS
                + work.queues(|queue| queue.place == Placement::Loop(id))
                + RING_FDS * u64::from(work.needs_ring(id)),
            rings: u64::from(work.needs_ring(id)),
        });
    }
    let here: Vec<String> = work.on_vcpus();
    for (index, vcpu) in plan.vcpus.iter().enumerate() {
        let mut reasons = vec!["runs a CPU of the guest".to_owned()];
        if !here.is_empty() {
            reasons.push(format!("serves {} when this vCPU submits", here.join(", ")));
        }
        reasons.extend(guard(vcpu.sched));
        threads.push(ThreadReport {
            name: format!("vcpu{index}"),
            role: Role::Vcpu,
            nodes: nodes(&vcpu.cpus),
            cpus: vcpu.cpus.clone(),
            policy: policy(vcpu.sched),
            poll: None,
            queues: here.clone(),
            reasons,
            fds: 1,
            rings: 0,
        });
    }
    threads.extend(prealloc::touchers(plan, host).into_iter().map(|toucher| {
        let mut reasons = vec![match toucher.node {
            Some(node) => format!("touches the guest's memory on host node {node}"),
            None => "touches the guest's memory".to_owned(),
        }];
        if plan.machine.prealloc.is_none() {
            reasons.push(
                "not asked for: only touching shows whether a node has its huge pages".to_owned(),
            );
        }
        ThreadReport {
            name: toucher.name,
            role: Role::Prealloc,
            nodes: nodes(&toucher.cpus),
            cpus: toucher.cpus,
            policy: policy(Sched::default()),
            poll: None,
            queues: Vec::new(),
            reasons,
            fds: 0,
            rings: 0,
        }
    }));
    let guest_nodes = (0..).zip(&plan.numa).map(|(node, of_plan)| NodeReport {
        node,
        vcpus: of_plan.vcpus.clone(),
        memory: of_plan.memory,
        host_node: of_plan.host_node,
    });
    Explanation {
        name: plan.name.clone(),
        threads,
        nodes: guest_nodes.collect(),
        hotplug_slots: plan.machine.hotplug_slots,
        warnings: findings::all(plan, host, &work),
        memory: plan.machine.memory,
        host_cpus: host.usable().len(),
        vms: 1,
    }
}

impl Explanation {
    /// The totals for so many machines of this kind.
    #[must_use]
    pub fn for_vms(self, vms: u32) -> Self {
        Self { vms, ..self }
    }

    /// For people, at most `width` columns wide, or 80 if `width` is less.
    pub fn render(&self, width: usize) -> String {
        text::render(self, width)
    }

    /// For programs: the fields of this type, and the totals.
    pub fn to_json(&self) -> serde_json::Value {
        let vms = u64::from(self.vms);
        let mut json = serde_json::json!(self);
        json["totals"] = serde_json::json!({
            "threads": self.lasting() as u64 * vms,
            "vcpus": self.count(Role::Vcpu) as u64 * vms,
            "kernel-workers": self.workers() * vms,
            "fds": self.fds() * vms,
            "memory": u128::from(self.memory) * u128::from(vms),
        });
        json
    }

    /// File descriptors of one machine.
    pub fn fds(&self) -> u64 {
        self.threads.iter().map(|thread| thread.fds).sum()
    }

    /// Threads that the kernel may make for its rings, beside those of the machine.
    pub fn workers(&self) -> u64 {
        self.threads.iter().map(|thread| thread.rings * WORKERS_OF_A_RING).sum()
    }

    /// Threads that are there while the guest runs.
    fn lasting(&self) -> usize {
        self.threads.len() - self.count(Role::Prealloc)
    }

    fn count(&self, role: Role) -> usize {
        self.threads.iter().filter(|thread| thread.role == role).count()
    }
}

/// epoll, timerfd, eventfd.
const LOOP_FDS: u64 = 3;
/// The io_uring, and the eventfd that tells of its completions.
const RING_FDS: u64 = 2;
/// The most threads that the kernel makes for an io_uring (`iou-wrk-*`), for what would block.
pub const WORKERS_OF_A_RING: u64 = 8;
/// stdio and a copy of it, the machine, memory, signals, the end, and some in passing.
const PROCESS_FDS: u64 = 16;

/// One queue of one device.
struct Queue<'p> {
    device: String,
    index: u32,
    place: Placement,
    /// `None`: the device needs no engine.
    engine: Option<Engine>,
    name: &'p str,
}

/// All queues of a plan.
struct Work<'p>(Vec<Queue<'p>>);

impl<'p> Work<'p> {
    fn of(plan: &'p Plan) -> Self {
        let disks = plan.disks.iter().flat_map(|disk| {
            (0..).zip(&disk.queues).map(|(index, place)| Queue {
                device: format!("disk.{}", disk.name),
                index,
                place: *place,
                engine: Some(disk.engine),
                name: &disk.name,
            })
        });
        let rngs = plan.rngs.iter().map(|rng| Queue {
            device: format!("rng.{}", rng.name),
            index: 0,
            place: rng.place,
            engine: None,
            name: &rng.name,
        });
        Self(disks.chain(rngs).collect())
    }

    fn queues(&self, which: impl Fn(&Queue<'_>) -> bool) -> u64 {
        self.0.iter().filter(|queue| which(queue)).count() as u64
    }

    /// `disk.data:q0-3` for each device with such queues.
    fn names(&self, which: impl Fn(&Queue<'_>) -> bool) -> Vec<String> {
        let mut names: Vec<(&str, CpuSet)> = Vec::new();
        for queue in self.0.iter().filter(|queue| which(queue)) {
            match names.last_mut().filter(|(device, _)| *device == queue.device) {
                Some((_, queues)) => queues.insert(queue.index),
                None => names.push((&queue.device, CpuSet::from_iter([queue.index]))),
            }
        }
        names.into_iter().map(|(device, queues)| format!("{device}:q{queues}")).collect()
    }

    fn served(&self, place: Placement) -> Vec<String> {
        self.names(|queue| queue.place == place)
    }

    fn on_vcpus(&self) -> Vec<String> {
        self.names(|queue| matches!(queue.place, Placement::Vcpu { .. }))
    }

    fn needs_ring(&self, id: ThreadId) -> bool {
        self.0.iter().any(|queue| queue.engine == Some(Engine::IoUring) && queue.place.home() == id)
    }
}

/// What the process's first thread is for.
fn process(plan: &Plan) -> String {
    let serials = plan.serials.iter().map(|serial| format!(", serial.{}", serial.name));
    format!("the process's own thread: start, end, signals{}", serials.collect::<String>())
}

fn reasons(work: &Work<'_>, id: ThreadId) -> Vec<String> {
    let mut reasons = Vec::new();
    if id == MAIN {
        reasons.push("every machine has it, for what is placed nowhere else".to_owned());
    }
    let served = work.served(Placement::Loop(id));
    if !served.is_empty() {
        let served = served.join(", ");
        reasons.push(match id {
            MAIN => format!("{served}: placed here, which is the default"),
            _ => format!("the file places {served} here"),
        });
    }
    let homes = work.served(Placement::Vcpu { home: id });
    if !homes.is_empty() {
        let homes = homes.join(", ");
        reasons.push(format!("home of {homes}, run on the submitting vCPU"));
    }
    if reasons.is_empty() {
        reasons.push("the file declares it, but gives it no work".to_owned());
    }
    reasons
}

fn policy(sched: Sched) -> String {
    let nice = |policy: &str, nice: i8| match nice {
        0 => policy.to_owned(),
        nice => format!("{policy}, nice {nice}"),
    };
    match sched {
        Sched::Other { nice: n } => nice("other", n),
        Sched::Batch { nice: n } => nice("batch", n),
        Sched::Idle => "idle".to_owned(),
        Sched::Fifo { priority, .. } => format!("fifo {priority}"),
        Sched::Rr { priority, .. } => format!("rr {priority}"),
    }
}

/// What keeps a real-time thread from taking its CPU for good.
fn guard(sched: Sched) -> Option<String> {
    match sched {
        Sched::Fifo { runaway, .. } | Sched::Rr { runaway, .. } => Some(match runaway {
            Some(time) => {
                format!("becomes other after {} of CPU time without a pause", format_time(time))
            }
            None => "keeps its priority even if it never pauses".to_owned(),
        }),
        _ => None,
    }
}

fn poll(poll: Poll) -> Option<String> {
    (!poll.max.is_zero()).then(|| format_time(poll.max))
}

/// The vCPUs by the CPUs they are pinned to.
fn pins(plan: &Plan) -> Vec<(&CpuSet, CpuSet)> {
    groups(plan.vcpus.iter().map(|vcpu| vcpu.cpus.as_ref()))
        .into_iter()
        .filter_map(|(cpus, vcpus)| Some((cpus?, vcpus)))
        .collect()
}
