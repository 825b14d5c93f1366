//! The plan written as a file again, every default spelt out.

use std::fmt::Write;
use std::path::Path;
use std::time::Duration;

use crate::cpuset::CpuSet;
use crate::plan::{
    Disk, DiskSource, Engine, GuestNode, Kernel, MAIN, Module, OnReset, Placement, Plan, Prealloc,
    Sched, SerialOut, Thread, ThreadId, Transport, Vcpu, Verdict,
};
use crate::units::{format_size, format_time};

/// The text of a file that loads to `plan`.
pub(crate) fn toml(plan: &Plan) -> String {
    let mut text = String::new();
    write(&mut text, plan).expect("a String takes everything");
    text
}

fn write(out: &mut String, plan: &Plan) -> std::fmt::Result {
    writeln!(out, "schema = 1\nname = {}", quote(&plan.name))?;

    let machine = &plan.machine;
    let hugepages =
        machine.hugepages.map(|size| format!(", hugepages = \"{}\"", format_size(size)));
    let topology = machine.topology;
    writeln!(out, "\n[machine]")?;
    writeln!(
        out,
        "memory = {{ size = \"{}\"{}, shared = {}{} }}",
        format_size(machine.memory),
        hugepages.unwrap_or_default(),
        machine.shared,
        machine.prealloc.map(prealloc).unwrap_or_default()
    )?;
    writeln!(
        out,
        "cpus = {{ count = {}, topology = {{ sockets = {}, dies = {}, cores = {}, threads = {} }} }}",
        plan.vcpus.len(),
        topology.sockets,
        topology.dies,
        topology.cores,
        topology.threads
    )?;
    let transport = match machine.transport {
        Transport::Pci => "pci",
        Transport::Mmio => "mmio",
    };
    writeln!(out, "transport = \"{transport}\"\nhotplug-slots = {}", machine.hotplug_slots)?;
    writeln!(out, "rtc = {}\ndebug-exit = {}", machine.rtc, machine.debug_exit)?;

    plan.numa.iter().try_for_each(|node| write_node(out, node))?;

    writeln!(out, "\n[boot]")?;
    match &plan.boot.kernel {
        Some(Kernel::Native(path)) => writeln!(out, "kernel = {}", quote_path(path))?,
        Some(Kernel::Multiboot(path)) => writeln!(out, "multiboot = {}", quote_path(path))?,
        None => {}
    }
    if !plan.boot.modules.is_empty() {
        writeln!(out, "modules = [")?;
        for Module { path, cmdline } in &plan.boot.modules {
            let (path, cmdline) = (quote_path(path), quote(cmdline));
            writeln!(out, "    {{ path = {path}, cmdline = {cmdline} }},")?;
        }
        writeln!(out, "]")?;
    }
    writeln!(out, "cmdline = {}", quote(&plan.boot.cmdline))?;

    write_vcpus(out, &plan.vcpus)?;
    for thread in &plan.threads {
        writeln!(out, "\n[thread.{}]", thread.name)?;
        if let Some(cpus) = &thread.cpus {
            writeln!(out, "cpus = \"{cpus}\"")?;
        }
        let poll = thread.poll;
        writeln!(out, "sched = {}", sched(thread.sched))?;
        writeln!(
            out,
            "poll = {{ max = \"{}\", grow = {}, shrink = {}, share = {} }}",
            format_time(poll.max),
            poll.grow,
            poll.shrink,
            poll.share
        )?;
    }
    for disk in &plan.disks {
        write_disk(out, disk, &plan.threads)?;
    }
    for rng in &plan.rngs {
        let place = place(rng.place, &plan.threads);
        writeln!(out, "\n[rng.{}]\nplace = \"{place}\"", rng.name)?;
    }
    if plan.serials.is_empty() {
        writeln!(out, "\n[serial]")?;
    }
    for serial in &plan.serials {
        let target = match &serial.out {
            SerialOut::Stdio => quote("stdio"),
            SerialOut::Null => quote("null"),
            SerialOut::File(path) => format!("{{ file = {} }}", quote_path(path)),
        };
        writeln!(out, "\n[serial.{}]\nout = {target}", serial.name)?;
    }
    let verdict = |verdict| match verdict {
        Verdict::Allow => "allow",
        Verdict::Warn => "warn",
        Verdict::Error => "error",
    };
    let policy = plan.policy;
    let on_reset = match policy.on_reset {
        OnReset::Restart => "restart",
        OnReset::Exit => "exit",
    };
    writeln!(out, "\n[policy]\non-reset = \"{on_reset}\"")?;
    writeln!(out, "overlap = \"{}\"", verdict(policy.overlap))?;
    writeln!(out, "fallback = \"{}\"", verdict(policy.fallback))?;
    write_test(out, plan)
}

fn write_test(out: &mut String, plan: &Plan) -> std::fmt::Result {
    if let Some(seed) = plan.test.shuffle {
        writeln!(out, "\n[test]\nshuffle = {seed}")?;
    }
    for stall in &plan.test.stalls {
        let thread = quote(&plan.threads[stall.thread.0].name);
        let (time, every) = (format_time(stall.time), format_time(stall.every));
        writeln!(out, "\n[[test.stall]]\nthread = {thread}")?;
        writeln!(out, "time = \"{time}\"\nevery = \"{every}\"")?;
    }
    Ok(())
}

fn prealloc(Prealloc { threads, near }: Prealloc) -> String {
    let threads = threads.map(|threads| format!("threads = {threads}, ")).unwrap_or_default();
    format!(", prealloc = {{ {threads}near = {near} }}")
}

fn write_node(out: &mut String, node: &GuestNode) -> std::fmt::Result {
    writeln!(out, "\n[[numa]]")?;
    if !node.vcpus.is_empty() {
        writeln!(out, "vcpus = \"{}\"", node.vcpus)?;
    }
    writeln!(out, "memory = \"{}\"", format_size(node.memory))?;
    if let Some(host) = node.host_node {
        writeln!(out, "host-node = {host}")?;
    }
    if let Some(distances) = &node.distances {
        writeln!(out, "distances = {distances:?}")?;
    }
    Ok(())
}

fn write_vcpus(out: &mut String, vcpus: &[Vcpu]) -> std::fmt::Result {
    writeln!(out, "\n[vcpu]\naffinity = \"none\"")?;
    writeln!(out, "sched = {}", sched(vcpus.first().map(|vcpu| vcpu.sched).unwrap_or_default()))?;
    let pins = groups(vcpus.iter().map(|vcpu| &vcpu.cpus));
    if pins.iter().any(|(cpus, _)| cpus.is_some()) {
        writeln!(out, "\n[vcpu.pin]")?;
    }
    for (cpus, vcpus) in pins {
        if let Some(cpus) = cpus {
            writeln!(out, "\"{vcpus}\" = \"{cpus}\"")?;
        }
    }
    Ok(())
}

/// Each different item with the set of its indices, in the order of their first.
pub(crate) fn groups<T: PartialEq>(items: impl Iterator<Item = T>) -> Vec<(T, CpuSet)> {
    let mut groups: Vec<(T, CpuSet)> = Vec::new();
    for (index, item) in (0..).zip(items) {
        match groups.iter_mut().find(|(other, _)| *other == item) {
            Some((_, indices)) => indices.insert(index),
            None => groups.push((item, CpuSet::from_iter([index]))),
        }
    }
    groups
}

fn write_disk(out: &mut String, disk: &Disk, threads: &[Thread]) -> std::fmt::Result {
    writeln!(out, "\n[disk.{}]", disk.name)?;
    match &disk.source {
        DiskSource::File(path) => writeln!(out, "path = {}", quote_path(path))?,
        DiskSource::FileOrCreate(path, size) => {
            writeln!(out, "path = {}\nsize = \"{}\"", quote_path(path), format_size(*size))?;
        }
        DiskSource::Scratch(size) => writeln!(out, "size = \"{}\"", format_size(*size))?,
    }
    writeln!(out, "read-only = {}\ndirect = {}", disk.read_only, disk.direct)?;
    let engine = match disk.engine {
        Engine::IoUring => "io_uring",
        Engine::Sync => "sync",
    };
    writeln!(out, "engine = \"{engine}\"\nqueues = {}", disk.queues.len())?;
    writeln!(out, "queue-size = {}", disk.queue_size)?;
    let places = groups(disk.queues.iter().copied());
    match places.as_slice() {
        [(only @ (Placement::Loop(_) | Placement::Vcpu { home: MAIN }), _)] => {
            writeln!(out, "place = \"{}\"", place(*only, threads))?;
        }
        _ => {
            for (on, queues) in &places {
                writeln!(out, "\n[[disk.{}.place]]\nqueues = \"{queues}\"", disk.name)?;
                writeln!(out, "on = \"{}\"", place(*on, threads))?;
                if let Placement::Vcpu { home } = on {
                    writeln!(out, "home = \"{}\"", name(*home, threads))?;
                }
            }
        }
    }
    Ok(())
}

fn name(id: ThreadId, threads: &[Thread]) -> &str {
    &threads[id.0].name
}

fn place(place: Placement, threads: &[Thread]) -> &str {
    match place {
        Placement::Loop(id) => name(id, threads),
        Placement::Vcpu { .. } => "vcpu",
    }
}

fn sched(sched: Sched) -> String {
    match sched {
        Sched::Other { nice } => format!("{{ policy = \"other\", nice = {nice} }}"),
        Sched::Batch { nice } => format!("{{ policy = \"batch\", nice = {nice} }}"),
        Sched::Idle => "{ policy = \"idle\" }".to_owned(),
        Sched::Fifo { priority, runaway } => real_time("fifo", priority, runaway),
        Sched::Rr { priority, runaway } => real_time("rr", priority, runaway),
    }
}

fn real_time(policy: &str, priority: u8, runaway: Option<Duration>) -> String {
    let runaway = runaway.map_or("off".to_owned(), format_time);
    format!("{{ policy = \"{policy}\", priority = {priority}, runaway = \"{runaway}\" }}")
}

fn quote(text: &str) -> String {
    toml::Value::from(text).to_string()
}

/// Paths of a plan came out of TOML, under a directory with a UTF-8 name.
fn quote_path(path: &Path) -> String {
    quote(&path.to_string_lossy())
}
