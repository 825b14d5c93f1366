//! `heddle bench loop`: what the loop costs, how much it takes, and who delays whom.

mod bare;
mod common;
mod costs;
mod interference;
mod ours;
mod render;
mod saturation;

use std::collections::BTreeMap;
use std::io;

use serde::Serialize;

use super::host::Machine;
use super::ratio::{Comparison, Verdict};

/// Operations that are timed together: few enough to be done before this thread is pre-empted.
const STRETCH: u32 = 32;

/// All that was measured.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) struct Report {
    machine: Machine,
    settings: BTreeMap<&'static str, String>,
    costs: Vec<Cost>,
    saturation: Vec<saturation::Saturation>,
    interference: Vec<interference::Case>,
}

/// One thing the loop does, against its baseline. Times are nanoseconds.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct Cost {
    what: &'static str,
    baseline: &'static str,
    #[serde(flatten)]
    times: Comparison,
    claims: Vec<Claimed>,
    /// How often it happened for each operation, by the loop's counters and by the kernel's.
    counts: BTreeMap<&'static str, f64>,
}

/// What is said, and what came of it.
#[derive(Debug, Serialize)]
struct Claimed {
    claim: String,
    verdict: Verdict,
}

/// Sums of counts.
#[derive(Debug, Default)]
struct Tally(BTreeMap<&'static str, u64>);

impl Tally {
    fn add(&mut self, what: &'static str, count: u64) {
        *self.0.entry(what).or_default() += count;
    }

    /// As [`add`](Self::add), if the kernel counts it at all.
    fn maybe(&mut self, what: &'static str, count: Option<u64>) {
        if let Some(count) = count {
            self.add(what, count);
        }
    }

    /// Was each of these counted, and none seen?
    fn none_of(&self, what: &[&str]) -> bool {
        what.iter().all(|what| self.0.get(what) == Some(&0))
    }

    /// How many, if they could be counted.
    fn get(&self, what: &str) -> Option<u64> {
        self.0.get(what).copied()
    }

    fn per(&self, operations: u64) -> BTreeMap<&'static str, f64> {
        self.0.iter().map(|(what, count)| (*what, *count as f64 / operations as f64)).collect()
    }
}

/// Measures everything.
pub(super) fn measure(pairs: usize) -> Result<Report, String> {
    run(pairs).map_err(|error| error.to_string())
}

fn run(pairs: usize) -> io::Result<Report> {
    let policy = iothread::PollPolicy::default();
    let settings = BTreeMap::from([
        ("pairs", pairs.to_string()),
        ("poll", format!("max {:?}, grow {}, shrink {}", policy.max, policy.grow, policy.shrink)),
        ("threads", "not pinned, SCHED_OTHER, except where a line says so".to_owned()),
        (
            "interval",
            "95%, of the median ratio of the pairs, from their order statistics".to_owned(),
        ),
    ]);
    Ok(Report {
        machine: Machine::this(),
        settings,
        costs: costs::all(pairs)?,
        saturation: saturation::all(pairs)?,
        interference: interference::all()?,
    })
}

#[cfg(test)]
mod tests {
    use iothread::PollPolicy;

    use super::*;

    /// What is measured also counts itself, and an event too many or too few is an error.
    #[test]
    fn what_is_measured_loses_nothing() {
        let own = common::on_thread(|| {
            let mut tally = Tally::default();
            ours::fd_events(16, STRETCH, &mut tally)?;
            ours::timers(STRETCH, &mut tally)?;
            ours::bottom_halves(64, STRETCH, &mut tally)?;
            Ok(tally)
        });
        assert!(own.unwrap().0["turns"] >= 3 * u64::from(STRETCH));
        let mut tally = Tally::default();
        ours::kicks(3, 1000, &mut tally).unwrap();
        ours::PostedTo::new(PollPolicy::default(), 64).unwrap().post_all().unwrap();
    }

    #[test]
    fn the_baselines_lose_nothing_either() {
        bare::fd_events(16, STRETCH).unwrap();
        bare::eventfd_round_trips(STRETCH).unwrap();
        bare::timers(STRETCH).unwrap();
        bare::locked(3, 1000).unwrap();
        bare::BareThread::new(64).unwrap().signal_all().unwrap();
    }

    #[test]
    fn what_was_not_counted_was_not_none() {
        let mut tally = Tally::default();
        tally.add("sleeps", 0);
        tally.maybe("writes", None);
        assert!(tally.none_of(&["sleeps"]) && !tally.none_of(&["sleeps", "writes"]));
    }
}
