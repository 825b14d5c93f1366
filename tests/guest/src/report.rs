//! What the guest says: to a person first, then one line of JSON to a program.

use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;
use core::cell::UnsafeCell;
use core::fmt::{self, Write};
use core::sync::atomic::{AtomicUsize, Ordering};

use crate::apic::{Apic, Clock};
use crate::blk::{self, Disk, Lane};
use crate::console::Console;
use crate::cpu::{Cpu, VECTOR_CONFIG};
use crate::json::Json;
use crate::loader::Loader;
use crate::options::Options;
use crate::pci::{Ecam, Function};
use crate::plan::PHASES;
use crate::rng::{self, Rng};
use crate::virtio::{self, Place};

/// With more vCPUs than this a table shows three rows instead of one for each.
const ROWS: usize = 8;

macro_rules! say {
    ($console:expr, $($text:tt)*) => {
        // The console cannot fail.
        writeln!($console, $($text)*).ok()
    };
}

/// Bytes as a person says it.
struct Size(u64);

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let units = ["bytes", "KiB", "MiB", "GiB", "TiB"];
        let unit = (self.0.max(1).ilog2() / 10).min(4) as usize;
        let tenths = ((u128::from(self.0) * 10) >> (10 * unit)) as u64;
        match tenths % 10 {
            0 => write!(f, "{} {}", tenths / 10, units[unit]),
            rest => write!(f, "{}.{rest} {}", tenths / 10, units[unit]),
        }
    }
}

/// What there is before anything was driven.
pub struct Machine<'a> {
    pub loader: &'a Loader,
    pub cpus: usize,
    pub apic: &'a Apic,
    pub clock: Clock,
    pub ecam: Option<Ecam>,
    pub functions: &'a [Function],
}

pub fn machine(console: &mut Console, machine: &Machine, options: &Options) {
    let ram: u64 = machine.loader.ram.iter().map(|r| r.size()).sum();
    let apic = if machine.apic.x2apic() { "x2APIC" } else { "xAPIC" };
    let mhz = machine.clock.tsc_hz / 1_000_000;
    say!(console, "heddle: the built-in guest");
    say!(console, "  cpus     {}, {apic}, time stamp counter at {mhz} MHz", machine.cpus);
    say!(console, "  memory   {} in {} pieces", Size(ram), machine.loader.ram.len());
    if !machine.loader.cmdline.is_empty() {
        say!(console, "  command  {}", machine.loader.cmdline);
    }
    for word in &options.unknown {
        say!(console, "           '{word}' means nothing here");
    }
    if let Some(e) = machine.ecam {
        say!(console, "  ecam     {:#x}, buses {} to {}", e.base, e.first_bus, e.last_bus);
    }
    for f in machine.functions {
        let name = match (f.vendor, f.device) {
            (virtio::VENDOR, blk::DEVICE) => "virtio-blk",
            (virtio::VENDOR, rng::DEVICE) => "virtio-rng",
            (virtio::VENDOR, _) => "virtio",
            _ => class_name(f.class),
        };
        write!(console, "  {}  {:04x}:{:04x} {name:12}", f.address, f.vendor, f.device).ok();
        for bar in &f.bars {
            let kind = if bar.io { "port" } else { "mem" };
            write!(console, " bar{} {kind} {:#x}", bar.index, bar.address).ok();
        }
        match f.msix_vectors() {
            0 => say!(console, ""),
            n => say!(console, " msi-x {n}"),
        };
    }
    for slot in &options.mmio {
        say!(console, "  mmio     {:#x}, line {}", slot.address, slot.line);
    }
    console.flush();
}

fn class_name(class: u32) -> &'static str {
    match class >> 8 {
        0x0600 => "host bridge",
        0x0601 => "isa bridge",
        0x0604 => "pci bridge",
        0x0106 => "sata",
        0x0200 => "ethernet",
        0x0300 => "vga",
        0x0c05 => "smbus",
        _ => "other",
    }
}

/// Everything there is to tell in the end.
pub struct Outcome<'a> {
    pub cpus: &'a [Cpu],
    pub x2apic: bool,
    pub ecam: Option<Ecam>,
    pub clock: Clock,
    pub options: &'a Options,
    pub cmdline: &'a str,
    pub memory: u64,
    /// Disks with the queues that were driven, by vCPU.
    pub disks: Vec<(&'a Disk, Vec<(usize, &'a Lane)>)>,
    pub rngs: &'a [Rng],
    pub failures: &'a [String],
    /// Ticks of setting up, and of all disk work.
    pub setup: u64,
    pub work: u64,
}

impl Outcome<'_> {
    /// How many CPUs have APIC ids above 255, and how many of those a device has interrupted.
    fn far_cpus(&self) -> (usize, usize) {
        let far = || self.cpus.iter().filter(|cpu| cpu.is_far());
        (far().count(), far().filter(|cpu| cpu.got_message()).count())
    }
}

pub fn outcome(console: &mut Console, outcome: &Outcome) {
    if !outcome.options.quiet {
        for (disk, lanes) in &outcome.disks {
            disk_table(console, disk, lanes, outcome.clock);
        }
        for rng in outcome.rngs {
            say!(
                console,
                "rng {}: {} bytes in {} requests, {} of 256 values, {} kicks, {} interrupts",
                rng.place,
                rng.bytes,
                rng.requests,
                rng.distinct,
                rng.kicks,
                rng.interrupts
            );
        }
        if outcome.disks.is_empty() && outcome.rngs.is_empty() {
            say!(console, "no virtio disk and no rng: only the CPUs were tried");
        }
        let (far, interrupted) = outcome.far_cpus();
        if far > 0 {
            say!(console, "{far} CPUs have APIC ids above 255, devices interrupted {interrupted}");
        }
        let millis = |ticks| outcome.clock.micros(ticks) / 1000;
        let (setup, work) = (millis(outcome.setup), millis(outcome.work));
        say!(console, "set up in {setup} ms, worked for {work} ms");
        for failure in outcome.failures.iter().take(ROWS) {
            say!(console, "failed: {failure}");
        }
    }
    let reason = outcome.failures.first().map(|first| match outcome.failures.len() {
        1 => first.clone(),
        n => format!("{first} (and {} more)", n - 1),
    });
    verdict(console, reason.as_deref());
    json(console, outcome, reason.as_deref());
    say!(console, "");
    console.flush();
}

fn verdict(console: &mut Console, reason: Option<&str>) {
    match reason {
        None => say!(console, "verdict: ok"),
        Some(reason) => say!(console, "verdict: FAILED ({reason})"),
    };
}

/// Columns of the table of a disk: counts, then tenths of microseconds per request and phase.
fn row(lane: &Lane, clock: Clock) -> [u64; 8] {
    let tenths = |phase: usize| {
        let p = &lane.phases[phase];
        clock.micros(p.ticks * 10) / p.requests.max(1)
    };
    let mib = (lane.bytes * 10) >> 20;
    let counts = [lane.requests, lane.kicks(), lane.interrupts, mib];
    let times = [tenths(0), tenths(1), tenths(2), tenths(3)];
    core::array::from_fn(|i| if i < 4 { counts[i] } else { times[i - 4] })
}

fn print_row(console: &mut Console, name: &str, row: &[u64; 8]) {
    write!(console, "  {name:>8}").ok();
    for (i, value) in row.iter().enumerate() {
        match i {
            0..3 => write!(console, "{value:>10}").ok(),
            _ => write!(console, "{:>10}.{}", value / 10, value % 10).ok(),
        };
    }
    say!(console, "");
}

fn disk_table(console: &mut Console, disk: &Disk, lanes: &[(usize, &Lane)], clock: Clock) {
    let id = lanes.first().map_or("", |(_, lane)| lane.id.as_str());
    say!(
        console,
        "disk {} \"{id}\": {}, {} queues of {}, {} driven, requests of {} with up to {} in flight; {}",
        disk.place,
        Size(disk.sectors * 512),
        disk.queues,
        disk.queue_size,
        lanes.len(),
        Size(disk.chunk * 512),
        disk.depth,
        disk.feature_names().join(" ")
    );
    write!(console, "  {:>8}{:>10}{:>10}{:>10}{:>12}", "vCPU", "requests", "kicks", "irqs", "MiB")
        .ok();
    for phase in &PHASES {
        write!(console, "{:>12}", phase.title).ok();
    }
    say!(console, "   us each");
    if lanes.len() <= ROWS {
        for (vcpu, lane) in lanes {
            print_row(console, &format!("{vcpu}"), &row(lane, clock));
        }
    } else {
        let rows: Vec<[u64; 8]> = lanes.iter().map(|(_, lane)| row(lane, clock)).collect();
        let mut sorted = [const { Vec::new() }; 8];
        for (column, values) in sorted.iter_mut().enumerate() {
            values.extend(rows.iter().map(|row| row[column]));
            values.sort_unstable();
        }
        let last = rows.len() - 1;
        for (name, place) in [("least", 0), ("median", last / 2), ("most", last)] {
            print_row(console, name, &sorted.each_ref().map(|values: &Vec<u64>| values[place]));
        }
    }
    console.flush();
}

fn json(console: &mut Console, outcome: &Outcome, reason: Option<&str>) {
    let clock = outcome.clock;
    Json::new(console).object(|json| {
        opening(json, reason);
        json.key("vcpus").number(outcome.cpus.len() as u64);
        json.key("x2apic").bool(outcome.x2apic);
        let (far, interrupted) = outcome.far_cpus();
        json.key("cpus_above_255").number(far as u64);
        json.key("cpus_above_255_interrupted").number(interrupted as u64);
        match outcome.ecam {
            Some(ecam) => json.key("ecam").number(ecam.base),
            None => json.key("ecam").null(),
        }
        json.key("memory").number(outcome.memory);
        json.key("cmdline").string(outcome.cmdline);
        json.key("tsc_hz").number(clock.tsc_hz);
        json.key("setup_us").number(clock.micros(outcome.setup));
        json.key("work_us").number(clock.micros(outcome.work));
        json.key("config_changes").number(outcome.cpus[0].count(VECTOR_CONFIG));
        json.key("phases").strings(&PHASES.each_ref().map(|p| p.name));
        json.key("disks").array(|json| {
            for (disk, lanes) in &outcome.disks {
                json.object(|json| disk_json(json, disk, lanes, clock));
            }
        });
        json.key("rng").array(|json| {
            for rng in outcome.rngs {
                json.object(|json| {
                    place(json, rng.place);
                    json.key("bytes").number(rng.bytes);
                    json.key("distinct").number(rng.distinct);
                    json.key("requests").number(rng.requests);
                    json.key("kicks").number(rng.kicks);
                    json.key("interrupts").number(rng.interrupts);
                });
            }
        });
    });
}

fn opening(json: &mut Json<Console>, reason: Option<&str>) {
    json.key("guest").string("heddle-builtin");
    json.key("version").number(1u32);
    json.key("verdict").string(if reason.is_none() { "ok" } else { "failed" });
    match reason {
        Some(reason) => json.key("reason").string(reason),
        None => json.key("reason").null(),
    }
}

fn place(json: &mut Json<Console>, place: Place) {
    let key = match place {
        Place::Pci(_) => "pci",
        Place::Mmio(_) => "mmio",
    };
    json.key(key).string(&format!("{place}"));
}

fn disk_json(json: &mut Json<Console>, disk: &Disk, lanes: &[(usize, &Lane)], clock: Clock) {
    json.key("disk").number(disk.index);
    place(json, disk.place);
    json.key("id").string(lanes.first().map_or("", |(_, lane)| lane.id.as_str()));
    json.key("sectors").number(disk.sectors);
    json.key("queues").number(disk.queues);
    json.key("queue_size").number(disk.queue_size);
    json.key("depth").number(disk.depth);
    json.key("request_sectors").number(disk.chunk);
    json.key("event_idx").bool(disk.has(virtio::F_EVENT_IDX));
    json.key("indirect").bool(disk.has(virtio::F_INDIRECT));
    json.key("read_only").bool(disk.read_only());
    json.key("columns").strings(&["vcpu", "queue", "requests", "kicks", "interrupts", "bytes"]);
    json.key("phase_columns").strings(&["requests", "kicks", "interrupts", "us"]);
    json.key("per_vcpu").array(|json| {
        for (vcpu, lane) in lanes {
            json.array(|json| {
                json.number(*vcpu as u64);
                json.number(lane.queue());
                json.number(lane.requests);
                json.number(lane.kicks());
                json.number(lane.interrupts);
                json.number(lane.bytes);
                for p in &lane.phases {
                    json.numbers(&[p.requests, p.kicks, p.interrupts, clock.micros(p.ticks)]);
                }
            });
        }
    });
    json.key("written_columns").strings(&["vcpu", "generation", "start", "sectors"]);
    json.key("written").array(|json| {
        if disk.read_only() {
            return;
        }
        for (vcpu, lane) in lanes.iter().filter(|(_, lane)| lane.complete) {
            for w in lane.plan.written() {
                json.numbers(&[*vcpu as u64, w.generation.into(), w.start, w.sectors]);
            }
        }
    });
}

/// A verdict without results, for a guest that did not get far.
pub fn failure(console: &mut Console, reason: fmt::Arguments) {
    let mut text = Fixed::<256>::new();
    text.write_fmt(reason).ok();
    console.write_str("\n").ok();
    verdict(console, Some(text.as_str()));
    Json::new(console).object(|json| opening(json, Some(text.as_str())));
    say!(console, "");
}

/// Text of limited length that needs no heap.
struct Fixed<const N: usize> {
    bytes: [u8; N],
    length: usize,
}

impl<const N: usize> Fixed<N> {
    const fn new() -> Self {
        Fixed { bytes: [0; N], length: 0 }
    }

    fn as_str(&self) -> &str {
        str::from_utf8(&self.bytes[..self.length]).unwrap_or("(not text)")
    }
}

impl<const N: usize> Write for Fixed<N> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for c in text.chars().filter(char::is_ascii) {
            if self.length == N {
                break;
            }
            self.bytes[self.length] = if c.is_control() { b' ' } else { c as u8 };
            self.length += 1;
        }
        Ok(())
    }
}

/// The words of the first panic.
struct PanicText {
    /// 0: none, 1: being written, 2: there.
    state: AtomicUsize,
    text: UnsafeCell<Fixed<256>>,
}

// SAFETY: the text is written by the one CPU that moves the state from 0 to 1, and read by others
// only in state 2.
unsafe impl Sync for PanicText {}

static PANIC: PanicText =
    PanicText { state: AtomicUsize::new(0), text: UnsafeCell::new(Fixed::new()) };

/// Keeps the words of a panic, if it is the first.
pub fn keep_panic(write: impl FnOnce(&mut dyn Write) -> fmt::Result) {
    if PANIC.state.compare_exchange(0, 1, Ordering::AcqRel, Ordering::Acquire).is_ok() {
        // SAFETY: see `PanicText`.
        write(unsafe { &mut *PANIC.text.get() }).ok();
        PANIC.state.store(2, Ordering::Release);
    }
}

pub fn panic_text() -> &'static str {
    if PANIC.state.load(Ordering::Acquire) == 2 {
        // SAFETY: see `PanicText`.
        unsafe { (*PANIC.text.get()).as_str() }
    } else {
        "a panic within a panic"
    }
}
