//! Where the time of a start goes, and what memory heddle itself takes.

use std::fs;
use std::ops::Range;
use std::time::{Duration, Instant};

use serde::Serialize;

/// A stopwatch with named laps.
#[derive(Debug)]
pub struct Timing {
    last: Instant,
    laps: Vec<(&'static str, Duration)>,
}

impl Default for Timing {
    fn default() -> Self {
        Self { last: Instant::now(), laps: Vec::new() }
    }
}

impl Timing {
    /// What came since the last lap was `what`.
    pub fn lap(&mut self, what: &'static str) {
        let now = Instant::now();
        self.laps.push((what, now - self.last));
        self.last = now;
    }

    /// The result so far. Guest memory, at these addresses, does not count as heddle's.
    pub fn report(&self, guest: &[Range<usize>]) -> TimingReport {
        let ms = |time: Duration| time.as_secs_f64() * 1000.0;
        TimingReport {
            laps_ms: self.laps.iter().map(|(what, time)| (*what, ms(*time))).collect(),
            total_ms: ms(self.laps.iter().map(|(_, time)| *time).sum()),
            private_kib: private_memory(guest).unwrap_or(0) / 1024,
        }
    }
}

/// What a start took, from the first line of `main` to the first `KVM_RUN`.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct TimingReport {
    /// The steps, in milliseconds.
    pub laps_ms: Vec<(&'static str, f64)>,
    /// Their sum.
    pub total_ms: f64,
    /// Private memory of the process beyond the guest's, in KiB.
    pub private_kib: u64,
}

impl TimingReport {
    /// For people.
    pub fn render(&self) -> String {
        let mut text = String::from("start-up, heddle's own part:\n");
        for (what, ms) in &self.laps_ms {
            text += &format!("  {what:<24} {ms:>8.3} ms\n");
        }
        text += &format!("  {:<24} {:>8.3} ms\n", "total", self.total_ms);
        text += &format!("  {:<24} {:>8} KiB\n", "private memory", self.private_kib);
        text
    }
}

/// Private bytes of this process, without the mappings at `guest`, which are guest memory.
fn private_memory(guest: &[Range<usize>]) -> Option<u64> {
    let maps = fs::read_to_string("/proc/self/smaps").ok()?;
    let mut counts = true;
    let mut kib = 0;
    for line in maps.lines() {
        let mut words = line.split_whitespace();
        let first = words.next()?;
        if !first.ends_with(':') {
            let start = first.split('-').next().and_then(|hex| usize::from_str_radix(hex, 16).ok());
            counts = !start.is_some_and(|start| guest.iter().any(|range| range.contains(&start)));
        } else if counts && first.starts_with("Private_") {
            kib += words.next()?.parse::<u64>().ok()?;
        }
    }
    Some(kib * 1024)
}
