//! A job: what one run of heddle in L1 is to do, and whether it did.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{Value, json};

use crate::guest::Disk;
use crate::{At, Result};

/// One run of heddle, or of something beside it, in L1.
pub struct Job {
    /// Its name, which is that of its directory, too.
    pub name: String,
    /// Its files, in its directory in L1. There must be a script `run`.
    pub files: Vec<(&'static str, Content)>,
    /// It is killed after this time.
    pub limit: Duration,
}

/// What is in a file.
pub enum Content {
    Text(String),
    /// A copy of this file.
    Copy(PathBuf),
}

impl Job {
    /// A job that runs the machine file `toml` with `image` for the file `disk.img`.
    pub fn heddle(name: &str, toml: String, image: Option<PathBuf>, limit: Duration) -> Self {
        let seconds = limit.as_secs();
        let run = format!(
            "exec timeout -s KILL {} /lab/heddle run vm.toml --json --timeout {seconds}s \
             >report.json 2>console.txt </dev/null\n",
            seconds + 20
        );
        let mut files = vec![("vm.toml", Content::Text(toml)), ("run", Content::Text(run))];
        files.extend(image.map(|image| ("disk.img", Content::Copy(image))));
        Self { name: name.to_owned(), files, limit: limit + Duration::from_secs(20) }
    }
}

/// How a job ended.
pub struct Outcome {
    /// Exit status of its script; `None`: L1 did not come to its end.
    pub code: Option<i32>,
    /// Seconds of L1.
    pub seconds: u64,
    /// A copy of its directory.
    pub files: PathBuf,
}

impl Outcome {
    /// A file it left, as text.
    pub fn text(&self, name: &str) -> String {
        let bytes = fs::read(self.files.join(name)).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    pub fn image(&self) -> PathBuf {
        self.files.join("disk.img")
    }

    /// heddle's own report.
    pub fn report(&self) -> Result<Value> {
        let text = self.text("report.json");
        serde_json::from_str(&text).at("heddle's --json")
    }
}

/// Where the queues of a disk are served.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    Main,
    One,
    PerQueue,
    Vcpu,
}

/// What a guest that checks its disk must have done.
pub struct Expect {
    pub cpus: u32,
    pub place: Place,
    /// The interrupts are messages, one vector for each queue.
    pub msix: bool,
    /// It reboots once before it powers off.
    pub reboots: bool,
    /// MD5 of what was on the disk.
    pub md5: String,
}

/// What is wrong with a job; empty: nothing.
pub fn faults(expect: &Expect, outcome: &Outcome) -> Vec<String> {
    let mut faults = Vec::new();
    let console = outcome.text("console.txt");
    match outcome.code {
        Some(0) => {}
        Some(code) => faults.push(format!("exit code {code}, not 0")),
        None => faults.push("L1 did not come to its end".to_owned()),
    }
    let bad = ["LAB failed", "Kernel panic", "BUG:", "Oops", "heddle: ", "panicked at"];
    // A warning about L1's single CPU is in its place.
    let lines = console.lines().filter(|line| !line.contains("heddle: warning"));
    let lines = lines.filter(|line| bad.iter().any(|word| line.contains(word)));
    faults.extend(lines.map(|line| format!("it says: {}", line.trim())));
    let said = |what: &str| {
        let lines = console.lines().filter_map(|line| line.trim().strip_prefix("LAB "));
        lines.filter_map(|line| line.strip_prefix(what)).next_back().map(str::trim)
    };
    faults.extend(differs("CPUs", said("cpus "), &expect.cpus.to_string()));
    faults.extend(differs("MD5 the guest read", said("sum "), &expect.md5));
    if expect.reboots {
        faults.extend(differs("MD5 after the reboot", said("again "), &expect.md5));
    }
    match disk_faults(expect, &Disk(&outcome.image())) {
        Ok(found) => faults.extend(found),
        Err(error) => faults.push(error),
    }
    match outcome.report() {
        Ok(report) => faults.extend(placement_faults(expect, &report)),
        Err(error) => faults.push(error),
    }
    faults
}

fn differs(what: &str, is: Option<&str>, should: &str) -> Option<String> {
    let is = is.unwrap_or("nothing");
    (is != should).then(|| format!("{what}: {is}, not {should}"))
}

/// What is wrong with the disk, or with what the guest left on it.
fn disk_faults(expect: &Expect, disk: &Disk<'_>) -> Result<Vec<String>> {
    disk.check()?;
    let mut faults = Vec::new();
    faults.extend(differs("MD5 on the disk", Some(&disk.md5("/copy")?), &expect.md5));
    let log = disk.text("/out/dmesg")?;
    faults.extend(log.lines().filter(|line| trouble(line)).map(|line| format!("Linux: {line}")));
    let queues = disk.text("/out/mq")?.lines().count().to_string();
    faults.extend(differs("/sys/block/vda/mq", Some(&queues), &expect.cpus.to_string()));
    faults.extend(interrupt_faults(expect, &disk.text("/out/interrupts")?));
    Ok(faults)
}

/// Is this line of the kernel's log about something that broke?
fn trouble(line: &str) -> bool {
    let signs = ["Call Trace", "I/O error", "BUG:", "WARNING:", "Oops", "irq 9: nobody cared"];
    signs.iter().any(|sign| line.contains(sign))
}

/// The queues' vectors must have come to the CPUs whose queues they are.
fn interrupt_faults(expect: &Expect, interrupts: &str) -> Vec<String> {
    let mut faults = Vec::new();
    let counts = |line: &str| -> Vec<u64> {
        let columns = line.split_whitespace().skip(1).take(expect.cpus as usize);
        columns.map_while(|column| column.parse().ok()).collect()
    };
    if !expect.msix {
        let lines = interrupts.lines().filter(|line| line.contains("virtio"));
        if lines.map(|line| counts(line).iter().sum::<u64>()).sum::<u64>() == 0 {
            faults.push("no interrupt of a virtio device".to_owned());
        }
        return faults;
    }
    for queue in 0..expect.cpus {
        let suffix = format!("-req.{queue}");
        match interrupts.lines().find(|line| line.ends_with(&suffix)) {
            None => faults.push(format!("no vector virtio{suffix}")),
            Some(line) if !line.contains("MSI") => {
                faults.push(format!("virtio{suffix} is no MSI-X: {line}"));
            }
            // The kernel chooses which queue belongs to which CPU; each has one.
            Some(line) => {
                let on = counts(line).iter().filter(|count| **count > 0).count();
                if on != 1 {
                    faults.push(format!("virtio{suffix} came to {on} CPUs: {line}"));
                }
            }
        }
    }
    let cpu_of = |line: &str| counts(line).iter().position(|count| *count > 0);
    let lines = interrupts.lines().filter(|line| line.contains("-req."));
    let mut cpus: Vec<_> = lines.filter_map(cpu_of).collect();
    cpus.sort_unstable();
    cpus.dedup();
    if cpus.len() != expect.cpus as usize {
        faults.push(format!("the queues' vectors came to {} CPUs", cpus.len()));
    }
    faults
}

/// The requests must have been served on the threads that the file names.
fn placement_faults(expect: &Expect, report: &Value) -> Vec<String> {
    let mut faults = Vec::new();
    if report["resets"] != u64::from(expect.reboots) {
        faults.push(format!("{} resets", report["resets"]));
    }
    if report["not-granted"] != json!([]) {
        faults.push(format!("not granted: {}", report["not-granted"]));
    }
    let Some(threads) = report["threads"].as_array() else {
        return vec!["heddle's --json has no threads".to_owned()];
    };
    for thread in threads {
        let name = thread["name"].as_str().unwrap_or_default();
        let requests = thread["counters"]["requests"].as_u64().unwrap_or(0);
        let should = match expect.place {
            Place::Main => name == "main",
            Place::One | Place::PerQueue => name.starts_with("io"),
            Place::Vcpu => name.starts_with("vcpu"),
        };
        // A request that comes while the home loop has the strand is served there.
        let may = should || expect.place == Place::Vcpu;
        if should && requests == 0 {
            faults.push(format!("thread {name} served no request"));
        } else if !may && requests > 0 {
            faults.push(format!("thread {name} served {requests} requests"));
        }
    }
    faults
}

/// Writes the files of a job.
pub fn write(job: &Job, directory: &Path) -> Result<()> {
    fs::create_dir_all(directory).at(directory.display())?;
    for (name, content) in &job.files {
        let path = directory.join(name);
        match content {
            Content::Text(text) => fs::write(&path, text),
            // Keeps holes, on file systems that can share what is equal at no cost.
            Content::Copy(from) => fs::copy(from, &path).map(drop),
        }
        .at(path.display())?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn expect(place: Place) -> Expect {
        Expect { cpus: 2, place, msix: true, reboots: false, md5: String::new() }
    }

    #[test]
    fn each_queue_has_a_vector_on_a_cpu_of_its_own() {
        let good = "  24:  0  0  PCI-MSIX-0000:00:01.0  0-edge  virtio0-config\n\
                    \x20 25:  9  0  PCI-MSIX-0000:00:01.0  1-edge  virtio0-req.0\n\
                    \x20 26:  0  7  PCI-MSIX-0000:00:01.0  2-edge  virtio0-req.1\n";
        assert_eq!(interrupt_faults(&expect(Place::Main), good), [""; 0]);
        let bad = [
            (good.replace("  0  7", "  7  0"), "came to 1 CPUs"),
            (good.replace("  0  7", "  1  7"), "came to 2 CPUs"),
            (good.replace("  0  7", "  0  0"), "came to 0 CPUs"),
            (good.replace("req.1", "req.2"), "no vector"),
            (good.replace("MSIX", "xAPIC"), "no MSI-X"),
        ];
        for (text, fault) in bad {
            let faults = interrupt_faults(&expect(Place::Main), &text);
            assert!(faults.iter().any(|said| said.contains(fault)), "{fault}: {faults:?}");
        }
    }

    #[test]
    fn without_messages_one_interrupt_is_for_all_queues() {
        let expect = Expect { msix: false, ..expect(Place::Main) };
        assert_eq!(interrupt_faults(&expect, "  5:  4  0  IO-APIC  5-edge  virtio0"), [""; 0]);
        assert_eq!(interrupt_faults(&expect, "  5:  0  0  IO-APIC  5-edge  virtio0").len(), 1);
    }

    #[test]
    fn requests_are_served_where_the_file_says() {
        let report = |main: u64, vcpu: u64| {
            json!({ "not-granted": [], "resets": 0, "threads": [
                { "name": "main", "counters": { "requests": main } },
                { "name": "vcpu0", "counters": { "requests": vcpu } },
            ]})
        };
        assert_eq!(placement_faults(&expect(Place::Main), &report(5, 0)), [""; 0]);
        assert_eq!(placement_faults(&expect(Place::Main), &report(5, 1)).len(), 1);
        assert_eq!(placement_faults(&expect(Place::Main), &report(0, 0)).len(), 1);
        assert_eq!(placement_faults(&expect(Place::Vcpu), &report(5, 1)), [""; 0]);
        assert_eq!(placement_faults(&expect(Place::Vcpu), &report(5, 0)).len(), 1);
        let refused = json!({ "not-granted": ["x"], "resets": 0, "threads": [] });
        assert_eq!(placement_faults(&expect(Place::Main), &refused).len(), 1);
    }
}
