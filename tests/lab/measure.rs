//! What a guest's start, its reads, and heddle itself cost, counted and not timed.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use clap::Args;
use serde_json::json;

use crate::guest;
use crate::job::{Content, Job, Outcome, Place};
use crate::kit::{self, Kit};
use crate::l1::L1;
use crate::matrix::{Guest, Kernel, Only};
use crate::{At, Result, With};

/// `lab measure`.
#[derive(Args)]
pub struct Measure {
    #[command(flatten)]
    only: Only,
    /// Leave out memory and reads: only what is counted with -icount
    #[arg(long)]
    start_only: bool,
    /// So many lines on where the exits come from
    #[arg(long, default_value_t = 12)]
    top: usize,
}

/// One line of the table; what is not known is absent.
#[derive(Default)]
struct Row {
    name: String,
    /// From the start of the monitor to the first program of its guest, in 10^9.
    instructions: Option<f64>,
    /// Until the guest has mounted its disk.
    exits: Option<f64>,
    returns: Option<f64>,
    /// The same in real time, as the others were counted: the slower the emulation, the more timer
    /// interrupts of L1 and of the guest there are.
    real_exits: Option<f64>,
    real_returns: Option<f64>,
    /// While the guest does nothing, without the guest's memory.
    private_kib: Option<f64>,
    exits_per_read: Option<f64>,
    returns_per_read: Option<f64>,
    /// Returns of `KVM_RUN` for one read. What is above, `host_state_reload`, is what the others were
    /// counted by; it also counts a vCPU that sleeps in the kernel.
    handled_per_read: Option<f64>,
}

/// What others took with the same kernel, 512 MiB, one virtio-blk disk and one vCPU.
const OTHERS: [(&str, [f64; 6]); 7] = [
    ("firecracker 1.17 (ELF, mmio)", [1.60, 3620., 516., 6192., 5.0, 2.2]),
    ("cloud-hypervisor 53 (ELF, PCI)", [1.62, 4378., 1840., 6608., 2.3, 0.4]),
    ("cloud-hypervisor 53 (bzImage)", [1.79, 4517., 1856., 8812., 2.4, 0.4]),
    ("crosvm (ELF)", [1.81, 29_541., 7220., 11_520., 2.4, 0.1]),
    ("kvmtool (bzImage)", [1.83, 40_667., 4451., 5588., 3.8, 0.1]),
    ("QEMU 10 microvm (ELF)", [2.91, 46_924., 41_489., 91_972., 7.2, 4.1]),
    ("QEMU 10 q35 (bzImage)", [4.17, 25_142., 19_799., 57_720., 2.7, 1.1]),
];
/// What heddle is to stay below; returns per read are to be none on a loop.
const TARGET: (&str, [Option<f64>; 7]) =
    ("target: below", [Some(1.55), Some(3000.), Some(400.), None, None, Some(4096.), Some(2.3)]);

const MIB: u32 = 16;
/// Blocks of 4 KiB in the guest's two series, see `l2.sh`.
const FEW: f64 = 1.;
const MANY: f64 = 2001.;
const LIMIT: Duration = Duration::from_secs(450);

fn job(name: &str, toml: String, image: &Path, stop: &str, trace: bool) -> Job {
    let trace = if trace { "yes" } else { "no" };
    let run = format!("STOP={stop}\nTRACE={trace}\n{}", include_str!("measure.sh"));
    let files = vec![
        ("vm.toml", Content::Text(toml)),
        ("run", Content::Text(run)),
        ("disk.img", Content::Copy(image.to_owned())),
    ];
    Job { name: name.to_owned(), files, limit: LIMIT }
}

/// What L1 has read: (when, what) to value.
struct Counts(BTreeMap<(String, String), f64>);

impl Counts {
    fn parse(text: &str) -> Self {
        let entry = |line: &str| {
            let mut words = line.split_whitespace().map(str::to_owned);
            Some(((words.next()?, words.next()?), words.next()?.parse().ok()?))
        };
        Self(text.lines().filter_map(entry).collect())
    }

    fn get(&self, when: &str, what: &str) -> Option<f64> {
        self.0.get(&(when.to_owned(), what.to_owned())).copied()
    }

    fn between(&self, from: &str, to: &str, what: &str) -> Option<f64> {
        Some(self.get(to, what)? - self.get(from, what)?)
    }

    /// For one read, without what a program costs that reads.
    fn per_read(&self, what: &str) -> Option<f64> {
        let many = self.between("many-begin", "many-end", what)?;
        let few = self.between("few-begin", "few-end", what)?;
        Some((many - few) / (MANY - FEW))
    }
}

/// Lines of a histogram of the kernel's (Documentation/trace/histogram.rst), most frequent first.
fn histogram(text: &str) -> Vec<(String, u64)> {
    let line = |line: &str| {
        let (key, count) = line.trim().strip_prefix('{')?.split_once("} hitcount:")?;
        let key = key.split_whitespace().collect::<Vec<_>>().join(" ");
        Some((key, count.split_whitespace().next()?.parse().ok()?))
    };
    let mut lines: Vec<(String, u64)> = text.lines().filter_map(line).collect();
    lines.sort_by_key(|(_, count)| std::cmp::Reverse(*count));
    lines
}

const EVENTS: [(&str, &str); 5] = [
    ("kvm_exit", "all exits by reason (AMD APM vol. 2, appendix C)"),
    ("kvm_userspace_exit", "returns to user space by reason (KVM_EXIT_...: 2 port, 6 MMIO)"),
    ("kvm_pio", "port accesses (rw 1: out)"),
    ("kvm_mmio", "MMIO accesses (type 0: read, to be answered; 1: its answer; 2: write)"),
    ("kvm_msr", "MSR accesses"),
];

/// Measures, and says how it compares.
pub fn run(with: &With, options: &Measure) -> Result<bool> {
    let kit = Kit::get()?;
    let heddle = kit::heddle(with)?;
    let scratch = tempfile::tempdir().at("temporary directory")?;
    let image = scratch.path().join("disk.img");
    guest::make_disk(&image, MIB, 3)?;
    let mut guests = Vec::new();
    for transport in options.only.transports() {
        for kernel in options.only.kernels() {
            let places = [Place::Main, Place::One, Place::Vcpu];
            // Where queues are served is not a matter of the kernel's form.
            let places = &places[..if kernel == Kernel::Elf { 3 } else { 1 }];
            for place in places {
                guests.push(Guest { cpus: 1, place: *place, transport, kernel, reboots: false });
            }
        }
    }
    let toml = |guest: &Guest| guest.toml("measure", "512M", &with.append);
    let mut l1 = L1::new(with, &kit, &heddle);
    let mut served = BTreeMap::new();
    if !options.start_only {
        kit::say("counting reads and memory");
        let job = |guest: &Guest| job(&guest.name(), toml(guest), &image, "", false);
        let jobs: Vec<Job> = guests.iter().map(job).collect();
        l1.run(&jobs.iter().collect::<Vec<_>>(), with.keep.as_deref(), |nth, outcome| {
            let counts = judge(&jobs[nth], &outcome);
            served.insert(jobs[nth].name.clone(), (counts, outcome.text("smaps")));
        })?;
    }
    kit::say("counting the start, with instructions for time");
    (l1.icount, l1.smp) = (true, 1);
    let mut started = BTreeMap::new();
    let mut details = Vec::new();
    // Where queues are served makes no difference to a start.
    let on_main = guests.iter().filter(|guest| guest.place == Place::Main);
    let starts = on_main.flat_map(|guest| {
        [false, true].map(|trace| job(&guest.name(), toml(guest), &image, "ready", trace))
    });
    let starts: Vec<Job> = starts.collect();
    for job in &starts {
        // Each in an L1 of its own: after one that was traced, the next may hang with -icount.
        l1.run(&[job], None, |_, outcome| {
            let text = |name: &str| histogram(&outcome.text(name));
            let events: Vec<_> = EVENTS.map(|(name, what)| (what, text(name))).into();
            if events.iter().any(|(_, lines)| !lines.is_empty()) {
                details.push((job.name.clone(), events));
            } else {
                started.insert(job.name.clone(), judge(job, &outcome));
            }
        })?;
    }
    let mut rows = Vec::new();
    let mut mappings = Vec::new();
    for guest in &guests {
        let name = format!("heddle {}", guest.name().trim_end_matches("-poweroff"));
        let mut row = Row { name, ..Row::default() };
        if let Some(counts) = started.remove(&guest.name()) {
            let counts = counts?;
            let [idle, ns] = ["idle-s", "ns"].map(|what| counts.between("start", "init", what));
            let idle = idle.unwrap_or(0.);
            if idle > 0.01 {
                kit::say(&format!("{}: {idle:.2} of it are L1's waiting", row.name));
            }
            row.instructions = ns.map(|ns| ns / 1e9);
            row.exits = counts.get("ready", "exits");
            row.returns = counts.get("ready", "host_state_reload");
        }
        if let Some((counts, smaps)) = served.remove(&guest.name()) {
            let counts = counts?;
            row.real_exits = counts.get("ready", "exits");
            row.real_returns = counts.get("ready", "host_state_reload");
            row.private_kib = counts.get("idle", "private-kib");
            row.exits_per_read = counts.per_read("exits");
            row.returns_per_read = counts.per_read("host_state_reload");
            row.handled_per_read = counts.per_read("userspace");
            mappings.push((row.name.clone(), smaps));
        }
        rows.push(row);
    }
    report(with, options, &rows, &details, &mappings);
    Ok(true)
}

/// The counts of a job that came to its end.
fn judge(job: &Job, outcome: &Outcome) -> Result<Counts> {
    match outcome.code {
        Some(0) => Ok(Counts::parse(&outcome.text("counts"))),
        code => Err(format!(
            "{}: exit code {code:?}: {}{}{}",
            job.name,
            outcome.text("console.txt"),
            outcome.text("stderr.txt"),
            outcome.text("run.log"),
        )),
    }
}

type Details = (String, Vec<(&'static str, Vec<(String, u64)>)>);

fn report(
    with: &With,
    options: &Measure,
    rows: &[Row],
    details: &[Details],
    mappings: &[(String, String)],
) {
    let values = |row: &Row| {
        [
            row.instructions,
            row.exits,
            row.returns,
            row.real_exits,
            row.real_returns,
            row.private_kib,
            row.exits_per_read,
            row.returns_per_read,
            row.handled_per_read,
        ]
    };
    if with.json {
        let row = |row: &Row| {
            json!({
                "name": row.name,
                "instructions-1e9": row.instructions,
                "exits": row.exits,
                "returns": row.returns,
                "real-time-exits": row.real_exits,
                "real-time-returns": row.real_returns,
                "private-kib": row.private_kib,
                "exits-per-read": row.exits_per_read,
                "returns-per-read": row.returns_per_read,
                "kvm-run-returns-per-read": row.handled_per_read,
            })
        };
        let histograms = |(name, events): &Details| json!({ "name": name, "events": events });
        let report = json!({
            "rows": rows.iter().map(row).collect::<Vec<_>>(),
            "histograms": details.iter().map(histograms).collect::<Vec<_>>(),
        });
        println!("{report}");
        return;
    }
    for (name, events) in details {
        for (what, lines) in events.iter().filter(|(_, lines)| !lines.is_empty()) {
            let all: u64 = lines.iter().map(|(_, count)| count).sum();
            println!("{name} until ready, {what}: {all}");
            lines.iter().take(options.top).for_each(|(key, count)| println!("{count:>9}  {key}"));
        }
    }
    for (name, smaps) in mappings {
        println!("{name}, largest private mappings while idle (KiB):");
        smaps.lines().take(options.top).for_each(|line| println!("    {line}"));
    }
    println!(
        "{:<32} {:>9} {:>8} {:>8} {:>8} {:>8} {:>9} {:>10} {:>12} {:>12}",
        "",
        "10^9 ins",
        "exits",
        "returns",
        "exits",
        "returns",
        "private",
        "exits per",
        "returns per",
        "KVM_RUN per"
    );
    println!(
        "{:<32} {:>9} {:>8} {:>8} {:>8} {:>8} {:>9} {:>10} {:>12} {:>12}",
        "1 vCPU, 512 MiB",
        "to init",
        "to ready",
        "to ready",
        "in real",
        "time",
        "KiB",
        "4 KiB read",
        "4 KiB read",
        "4 KiB read"
    );
    let print = |name: &str, values: &[Option<f64>]| {
        print!("{name:<32}");
        let widths = [9, 8, 8, 8, 8, 9, 10, 12, 12];
        for (nth, (value, width)) in values.iter().zip(widths).enumerate() {
            let digits = if matches!(nth, 1..=5) { 0 } else { 2 };
            match value {
                Some(value) => print!(" {value:>width$.digits$}"),
                None => print!(" {:>width$}", "-"),
            }
        }
        println!();
    };
    rows.iter().for_each(|row| print(&row.name, &values(row)));
    print(TARGET.0, &TARGET.1);
    OTHERS.iter().for_each(|(name, [instructions, rest @ ..])| {
        let in_real_time = rest.iter().copied().map(Some);
        let values: Vec<_> =
            [Some(*instructions), None, None].into_iter().chain(in_real_time).collect();
        print(name, &values);
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_read_costs_what_many_take_more_than_few() {
        let counts = Counts::parse(
            "few-begin exits 100\nfew-end exits 150\nmany-begin exits 200\nmany-end exits 4250\n\
             start ns 5\nnonsense\ninit ns 1005\n",
        );
        assert_eq!(counts.per_read("exits"), Some(2.0));
        assert_eq!(counts.per_read("io_exits"), None);
        assert_eq!(counts.between("start", "init", "ns"), Some(1000.));
    }

    #[test]
    fn histograms_are_read_and_sorted() {
        let text = "# event histogram\n#\n\n{ rw:          1, port:  cf8 } hitcount:          3\n\
                    { rw:          0, port:  3fd } hitcount:         40\n\nTotals:\n    Hits: 43\n";
        let expected = [("rw: 0, port: 3fd".to_owned(), 40), ("rw: 1, port: cf8".to_owned(), 3)];
        assert_eq!(histogram(text), expected);
    }
}
