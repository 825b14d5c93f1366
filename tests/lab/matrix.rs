//! Guests of all kinds: CPUs, places of the queues, transports, kernels, ends.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use clap::{Args, ValueEnum};
use serde_json::json;

use crate::guest::{self, INITRD, VMLINUX, VMLINUZ};
use crate::job::{self, Expect, Job, Outcome, Place};
use crate::kit::{self, Kit};
use crate::l1::L1;
use crate::{At, Result, With};

/// What a job may be limited to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Kind {
    Pci,
    Mmio,
    Elf,
    Bzimage,
}

/// `--only`.
#[derive(Args)]
pub struct Only {
    /// Only these transports and kernels, for example pci,elf
    #[arg(long, value_delimiter = ',', value_name = "KIND")]
    only: Vec<Kind>,
}

impl Only {
    /// May the first of two be? Neither named: both.
    fn allows(&self, one: Kind, other: Kind) -> bool {
        self.only.contains(&one) || !self.only.contains(&other)
    }

    pub fn transports(&self) -> Vec<Transport> {
        let all =
            [(Transport::Pci, Kind::Pci, Kind::Mmio), (Transport::Mmio, Kind::Mmio, Kind::Pci)];
        all.iter().filter(|(_, one, other)| self.allows(*one, *other)).map(|all| all.0).collect()
    }

    pub fn kernels(&self) -> Vec<Kernel> {
        let all =
            [(Kernel::Elf, Kind::Elf, Kind::Bzimage), (Kernel::BzImage, Kind::Bzimage, Kind::Elf)];
        all.iter().filter(|(_, one, other)| self.allows(*one, *other)).map(|all| all.0).collect()
    }
}

/// Which jobs, and how.
#[derive(Args)]
pub struct Choice {
    #[command(flatten)]
    only: Only,
    /// Only jobs with this in their names, for example 16-vcpu
    #[arg(long, value_name = "TEXT")]
    filter: Option<String>,
    /// MiB that each guest copies and reads back; default: 8 for ci, 64 for matrix
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=1024))]
    mib: Option<u32>,
    /// How many machines to emulate at once
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=64))]
    l1s: u32,
    /// Try a job again so often if it fails; each time is said and counted
    #[arg(long, default_value_t = 0)]
    retries: u32,
    /// Seconds for one job
    #[arg(long, default_value_t = 150)]
    limit: u64,
}

/// How many of all combinations.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Extent {
    /// Sixteen, in which each pair of properties occurs.
    Pairs,
    All,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Transport {
    Pci,
    Mmio,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kernel {
    Elf,
    BzImage,
}

const CPUS: [u32; 4] = [1, 2, 4, 16];
const PLACES: [Place; 4] = [Place::Main, Place::One, Place::PerQueue, Place::Vcpu];

/// One guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Guest {
    pub cpus: u32,
    pub place: Place,
    pub transport: Transport,
    pub kernel: Kernel,
    pub reboots: bool,
}

impl Guest {
    /// Like `16-vcpu-pci-elf-reboot`.
    pub fn name(&self) -> String {
        let [place, transport, kernel, end] = self.words();
        format!("{}-{place}-{transport}-{kernel}-{end}", self.cpus)
    }

    fn words(&self) -> [&'static str; 4] {
        let place = match self.place {
            Place::Main => "main",
            Place::One => "iothread",
            Place::PerQueue => "iothreads",
            Place::Vcpu => "vcpu",
        };
        let transport = match self.transport {
            Transport::Pci => "pci",
            Transport::Mmio => "mmio",
        };
        let kernel = match self.kernel {
            Kernel::Elf => "elf",
            Kernel::BzImage => "bzimage",
        };
        [place, transport, kernel, if self.reboots { "reboot" } else { "poweroff" }]
    }

    /// Its machine file. It does `what` with its disk; `more` goes on its command line.
    pub fn toml(&self, what: &str, memory: &str, more: &str) -> String {
        let [place, _, _, end] = self.words();
        let transport = match self.transport {
            Transport::Pci => "",
            Transport::Mmio => "transport = \"mmio\"\n",
        };
        let kernel = match self.kernel {
            Kernel::Elf => VMLINUX,
            Kernel::BzImage => VMLINUZ,
        };
        let cmdline = guest::cmdline(what, end, more);
        let mut toml = format!(
            "[machine]\nmemory = \"{memory}\"\ncpus = {}\n{transport}\n\
             [boot]\nkernel = \"{kernel}\"\ninitrd = \"{INITRD}\"\ncmdline = \"{cmdline}\"\n\n",
            self.cpus
        );
        let disk = "[disk.data]\npath = \"disk.img\"\n";
        match self.place {
            Place::Main | Place::Vcpu => toml += &format!("{disk}place = \"{place}\"\n"),
            Place::One => toml += &format!("[thread.io]\n{disk}place = \"io\"\n"),
            Place::PerQueue => {
                (0..self.cpus).for_each(|nth| toml += &format!("[thread.io{nth}]\n"));
                toml += disk;
                for nth in 0..self.cpus {
                    toml += &format!("[[disk.data.place]]\nqueues = \"{nth}\"\non = \"io{nth}\"\n");
                }
            }
        }
        toml
    }
}

/// Which guests there are.
pub fn guests(only: &Only, extent: Extent) -> Vec<Guest> {
    let (transports, kernels) = (only.transports(), only.kernels());
    let mut guests = Vec::new();
    for (v, cpus) in CPUS.into_iter().enumerate() {
        for (p, place) in PLACES.into_iter().enumerate() {
            let mut add = |transport: usize, kernel: usize, end: usize| {
                let transport = transports[transport % transports.len()];
                let kernel = kernels[kernel % kernels.len()];
                let guest = Guest { cpus, place, transport, kernel, reboots: end == 1 };
                if !guests.contains(&guest) {
                    guests.push(guest);
                }
            };
            match extent {
                // Columns of an orthogonal array over the field of four elements: v + p, v + 2p,
                // v + 3p. Half of the elements each for the properties that have but two values.
                Extent::Pairs => add((v ^ p) / 2, (v ^ TWICE[p]) / 2, (v ^ THRICE[p]) / 2),
                Extent::All => (0..8).for_each(|nth| add(nth & 1, nth >> 1 & 1, nth >> 2)),
            }
        }
    }
    guests
}

/// Products in the field of four elements.
const TWICE: [usize; 4] = [0, 2, 3, 1];
const THRICE: [usize; 4] = [0, 3, 1, 2];

/// A guest, and what came of it.
struct Row {
    guest: Guest,
    job: Job,
    expect: Expect,
    faults: Vec<String>,
    seconds: u64,
    retries: u32,
    said: String,
}

/// Runs the guests, and says how each did. True: all as they should.
pub fn run(with: &With, choice: &Choice, extent: Extent) -> Result<bool> {
    let began = Instant::now();
    let kit = Kit::get()?;
    let heddle = kit::heddle(with)?;
    let mib = choice.mib.unwrap_or(if extent == Extent::Pairs { 8 } else { 64 });
    let scratch = tempfile::tempdir().at("temporary directory")?;
    let image = scratch.path().join("disk.img");
    let md5 = guest::make_disk(&image, mib, 1)?;
    let mut rows: Vec<Row> = guests(&choice.only, extent)
        .into_iter()
        .filter(|guest| choice.filter.as_ref().is_none_or(|text| guest.name().contains(text)))
        .map(|guest| {
            let toml = guest.toml("check", "256M", &with.append);
            let limit = Duration::from_secs(choice.limit);
            let job = Job::heddle(&guest.name(), toml, Some(image.clone()), limit);
            let expect = Expect {
                cpus: guest.cpus,
                place: guest.place,
                msix: guest.transport == Transport::Pci,
                reboots: guest.reboots,
                md5: md5.clone(),
            };
            let (faults, said) = (vec!["not run".to_owned()], String::new());
            Row { guest, job, expect, faults, seconds: 0, retries: 0, said }
        })
        .collect();
    if rows.is_empty() {
        return Err("no job has such a name".into());
    }
    kit::say(&format!("{}; {} guests, {mib} MiB each", kit.release, rows.len()));
    for round in 0..=choice.retries {
        let mut left: Vec<&mut Row> =
            rows.iter_mut().filter(|row| !row.faults.is_empty()).collect();
        if left.is_empty() {
            break;
        }
        if round > 0 {
            for row in &mut left {
                row.retries = round;
                kit::say(&format!(
                    "retry {round} of {}: {}",
                    row.guest.name(),
                    row.faults.join("; ")
                ));
            }
        }
        at_once(with, &kit, &heddle, left, choice.l1s as usize)?;
    }
    report(with, &kit, &rows, began.elapsed());
    Ok(rows.iter().all(|row| row.faults.is_empty()))
}

/// Deals the jobs out to several L1.
fn at_once(with: &With, kit: &Kit, heddle: &Path, rows: Vec<&mut Row>, l1s: usize) -> Result<()> {
    let mut hands: Vec<Vec<&mut Row>> = Vec::new();
    hands.resize_with(l1s.min(rows.len()), Vec::new);
    let count = hands.len();
    // The order is by CPUs, so each gets as many of the large ones.
    rows.into_iter().enumerate().for_each(|(nth, row)| hands[nth % count].push(row));
    std::thread::scope(|scope| {
        let mut workers = Vec::new();
        for hand in hands {
            workers.push(scope.spawn(move || in_batches(with, kit, heddle, hand)));
        }
        let join = |worker: std::thread::ScopedJoinHandle<'_, Result<()>>| {
            worker.join().unwrap_or_else(|_| Err("a thread of this tool panicked".into()))
        };
        // All of them, before the first error is told.
        workers.into_iter().map(join).collect::<Vec<_>>().into_iter().collect()
    })
}

/// Jobs in one boot of L1, which has a disk with the images of all of them.
const BATCH: usize = 16;

fn in_batches(with: &With, kit: &Kit, heddle: &Path, mut rows: Vec<&mut Row>) -> Result<()> {
    let l1 = L1::new(with, kit, heddle);
    for batch in rows.chunks_mut(BATCH) {
        let jobs: Vec<&Job> = batch.iter().map(|row| &row.job).collect();
        let mut results = Vec::new();
        l1.run(&jobs, with.keep.as_deref(), |nth, outcome| {
            let row = &batch[nth];
            let faults = job::faults(&row.expect, &outcome);
            if !faults.is_empty() {
                // Now, and in the report: a long run may be cut off.
                kit::say(&format!("{} failed: {}", row.guest.name(), faults.join("; ")));
            }
            results.push((nth, faults, outcome.seconds, said(&outcome)));
        })?;
        for (nth, faults, seconds, said) in results {
            let row = &mut batch[nth];
            (row.faults, row.seconds, row.said) = (faults, seconds, said);
        }
    }
    Ok(())
}

/// What there is to read when something went wrong.
fn said(outcome: &Outcome) -> String {
    let mut text = outcome.text("console.txt");
    if let Ok(report) = outcome.report() {
        text += &format!("\nheddle: {} ({})", report["reason"], report["message"]);
    }
    text + &outcome.text("run.log")
}

fn report(with: &With, kit: &Kit, rows: &[Row], took: Duration) {
    for row in rows.iter().filter(|row| !row.faults.is_empty()) {
        eprintln!("\n== {} failed", row.guest.name());
        row.faults.iter().for_each(|fault| eprintln!("   {fault}"));
        let lines: Vec<&str> = row.said.lines().collect();
        let from = lines.len().saturating_sub(60);
        lines[from..].iter().for_each(|line| eprintln!("   | {line}"));
    }
    let failed = rows.iter().filter(|row| !row.faults.is_empty()).count();
    let retries: u32 = rows.iter().map(|row| row.retries).sum();
    let retried = rows.iter().filter(|row| row.retries > 0).count();
    if with.json {
        let row = |row: &Row| {
            json!({
                "name": row.guest.name(),
                "ok": row.faults.is_empty(),
                "faults": row.faults,
                "seconds": row.seconds,
                "retries": row.retries,
            })
        };
        let report = json!({
            "kernel": kit.release,
            "jobs": rows.iter().map(row).collect::<Vec<_>>(),
            "failed": failed,
            "retries": retries,
            "seconds": took.as_secs(),
        });
        println!("{report}");
        return;
    }
    let mut table = format!(
        "{:<5} {:<10} {:<10} {:<8} {:<9} {:>7} {:>7}  result\n",
        "vcpus", "queues on", "transport", "kernel", "end", "seconds", "retries"
    );
    for row in rows {
        let [place, transport, kernel, end] = row.guest.words();
        let result = if row.faults.is_empty() { "ok" } else { "FAILED" };
        table += &format!(
            "{:<5} {place:<10} {transport:<10} {kernel:<8} {end:<9} {:>7} {:>7}  {result}\n",
            row.guest.cpus, row.seconds, row.retries
        );
    }
    let all = rows.len();
    print!("{table}");
    println!(
        "{} of {all} guests ok, {failed} failed, {retries} retries of {retried} guests, {} s",
        all - failed,
        took.as_secs()
    );
    let left_out: BTreeSet<&str> = [(Transport::Mmio, "mmio"), (Transport::Pci, "pci")]
        .into_iter()
        .filter(|(transport, _)| rows.iter().all(|row| row.guest.transport != *transport))
        .map(|(_, name)| name)
        .chain(
            [(Kernel::BzImage, "bzimage"), (Kernel::Elf, "elf")]
                .into_iter()
                .filter(|(kernel, _)| rows.iter().all(|row| row.guest.kernel != *kernel))
                .map(|(_, name)| name),
        )
        .collect();
    if !left_out.is_empty() {
        println!("not run at all: {}", left_out.into_iter().collect::<Vec<_>>().join(", "));
    }
    if let Some(directory) = &with.keep {
        println!("files: {}", fs::canonicalize(directory).unwrap_or_default().display());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all() -> Only {
        Only { only: Vec::new() }
    }

    #[test]
    fn every_pair_of_properties_occurs_in_the_small_set() {
        let properties = |guest: &Guest| {
            let [place, transport, kernel, end] = guest.words();
            [guest.cpus.to_string(), place.into(), transport.into(), kernel.into(), end.into()]
        };
        let pairs = |extent| {
            let mut pairs = BTreeSet::new();
            for guest in guests(&all(), extent) {
                let properties = properties(&guest);
                for (nth, one) in properties.iter().enumerate() {
                    pairs.extend(properties[..nth].iter().map(|two| (one.clone(), two.clone())));
                }
            }
            pairs
        };
        assert_eq!(guests(&all(), Extent::Pairs).len(), 16);
        assert_eq!(guests(&all(), Extent::All).len(), 128);
        assert_eq!(pairs(Extent::Pairs), pairs(Extent::All));
    }

    #[test]
    fn only_leaves_nothing_else() {
        let only = Only { only: vec![Kind::Pci, Kind::Elf] };
        let guests = guests(&only, Extent::All);
        assert_eq!(guests.len(), 32);
        let few = |guest: &Guest| guest.transport == Transport::Pci && guest.kernel == Kernel::Elf;
        assert!(guests.iter().all(few));
        assert_eq!(Only { only: vec![Kind::Mmio] }.transports(), [Transport::Mmio]);
        assert_eq!(Only { only: vec![Kind::Mmio] }.kernels().len(), 2);
    }

    #[test]
    fn heddle_understands_the_machine_files() {
        let only = Only { only: vec![Kind::Pci, Kind::Elf] };
        for guest in guests(&only, Extent::All) {
            let toml = guest.toml("check", "256M", "");
            let loaded = config::load_str("vm.toml", &toml, Path::new("."), &[])
                .map_err(|bad| bad.render(false));
            assert_eq!(loaded.unwrap().plan.vcpus.len(), guest.cpus as usize, "{toml}");
        }
    }
}
