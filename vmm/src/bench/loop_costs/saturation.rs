//! 64 producers and one loop: at 5,000 events a second each, and as fast as they can.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::*};
use std::time::{Duration, Instant};

use iothread::{Blocking, Event, PollPolicy, Progress, Strand};
use serde::Serialize;

use super::Claimed;
use super::common::{LoopThread, lost, nanos, start, strand};
use crate::bench::host::Witness;
use crate::bench::progress;
use crate::bench::ratio::{Claim, Interval, Verdict};

const PRODUCERS: usize = 64;
const RATE: u32 = 5_000;
const PACED_SLICE: Duration = Duration::from_millis(200);
/// A loop that is busy less than this share of the time could take more.
const SATURATED: f64 = 0.9;
const FREE_SLICE: Duration = Duration::from_millis(100);

/// What 64 producers did to one loop.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) struct Saturation {
    pub(super) what: &'static str,
    /// Threads that stand for the producers, each for as many.
    pub(super) threads: usize,
    /// Events made, and events that callbacks have seen: to be the same.
    pub(super) made: u64,
    pub(super) served: u64,
    /// Callbacks run; an event made before the one before was served shares its callback.
    pub(super) callbacks: u64,
    pub(super) events_per_second: Interval,
    /// What it would be if the loop were busy all the time.
    pub(super) events_per_busy_second: Interval,
    /// Shares of wall time by the loop's own account.
    pub(super) busy: Interval,
    pub(super) poll: Interval,
    pub(super) sleep: Interval,
    /// By how much the sum of the three differs from wall time.
    pub(super) unaccounted: f64,
    /// Time on a CPU by the kernel's account, as a share of wall time.
    pub(super) on_cpu: Option<f64>,
    pub(super) claims: Vec<Claimed>,
}

/// A producer's object: what was announced, and what of it has been seen.
struct Object {
    made: Arc<AtomicU64>,
    seen: Arc<AtomicU64>,
    /// Callbacks of all objects together; only their loop counts here.
    callbacks: Arc<AtomicU64>,
}

struct Producer {
    made: Arc<AtomicU64>,
    seen: Arc<AtomicU64>,
    event: Event<Object>,
}

impl Producer {
    fn announce(&self, count: u64) {
        self.made.store(self.made.load(Relaxed) + count, Release);
        self.event.schedule();
    }
}

/// One moment of the loop, noted on its own thread, where its accounts are in order.
#[derive(Clone, Copy)]
struct Moment {
    at: Instant,
    busy: u64,
    poll: u64,
    sleep: u64,
}

fn moment(probe: &Strand<()>) -> io::Result<Moment> {
    let blocking = Blocking::on_this_thread().ok_or_else(lost)?;
    let noted = probe.call(|(), cx| {
        let counters = cx.counters();
        Moment {
            at: Instant::now(),
            busy: counters.busy_ns.get(),
            poll: counters.poll_ns.get(),
            sleep: counters.sleep_ns.get(),
        }
    });
    noted.wait(&blocking).map_err(io::Error::other)
}

/// Each producer announces `RATE` times a second: a thread goes through its producers every
/// period, and one that comes late announces for every producer all that is due.
fn paced(producers: &[Producer], stop: &AtomicBool) {
    let period = Duration::from_secs(1) / RATE;
    let began = Instant::now();
    let mut periods = 0;
    while !stop.load(Acquire) {
        let due = (nanos(began.elapsed()) / nanos(period)) as u64;
        if due > periods {
            producers.iter().for_each(|producer| producer.announce(due - periods));
            periods = due;
        }
        let next = began + period * u32::try_from(periods + 1).unwrap_or(u32::MAX);
        std::thread::sleep(next.saturating_duration_since(Instant::now()));
    }
}

/// Each producer announces as soon as its last event has been seen: every event is a callback.
fn free(producers: &[Producer], stop: &AtomicBool) {
    while !stop.load(Acquire) {
        let mut idle = true;
        for producer in producers {
            if producer.seen.load(Acquire) == producer.made.load(Relaxed) {
                producer.announce(1);
                idle = false;
            }
        }
        if idle {
            std::thread::yield_now();
        }
    }
}

fn drive(
    what: &'static str,
    produce: fn(&[Producer], &AtomicBool),
    slices: usize,
    slice: Duration,
) -> io::Result<Saturation> {
    let home = LoopThread::new(PollPolicy::default())?;
    let probe = strand(&home.handle, ());
    let mut strands = Vec::new();
    let mut counts = Vec::new();
    let stop = Arc::<AtomicBool>::default();
    let callbacks = Arc::<AtomicU64>::default();
    let mut threads = Vec::new();
    // The loop shall have a CPU for itself.
    let count = iothread::available_cpus().len().saturating_sub(1).clamp(1, 2);
    for _ in 0..count {
        let mut producers = Vec::new();
        for _ in 0..PRODUCERS / count {
            let (made, seen) = (Arc::<AtomicU64>::default(), Arc::<AtomicU64>::default());
            let object = Object {
                made: Arc::clone(&made),
                seen: Arc::clone(&seen),
                callbacks: Arc::clone(&callbacks),
            };
            let strand = strand(&home.handle, object);
            let event = strand.event(|object, _| {
                object.callbacks.store(object.callbacks.load(Relaxed) + 1, Relaxed);
                object.seen.store(object.made.load(Acquire), Release);
                Progress::Idle
            });
            counts.push((Arc::clone(&made), Arc::clone(&seen)));
            producers.push(Producer { made, seen, event });
            strands.push(strand);
        }
        let stop = Arc::clone(&stop);
        threads.push(start("producer", move || produce(&producers, &stop))?);
    }
    std::thread::sleep(slice); // under way
    let served = || counts.iter().map(|(_, seen)| seen.load(Acquire)).sum::<u64>();
    let witness = Witness::of(home.tid());
    let (first, mut before, mut seen) = (moment(&probe)?, moment(&probe)?, served());
    let mut slices_taken = Slices::default();
    for _ in 0..slices {
        std::thread::sleep(slice);
        let (now, seen_now) = (moment(&probe)?, served());
        slices_taken.add(before, now, seen_now - seen);
        (before, seen) = (now, seen_now);
    }
    let on_cpu = Witness::of(home.tid()).cpu_since(witness);
    stop.store(true, Release);
    for thread in threads {
        thread.join().map_err(|_| io::Error::other("a producer panicked"))?;
    }
    home.barrier()?;
    let made = counts.iter().map(|(made, _)| made.load(Acquire)).sum();
    let equal = counts.iter().all(|(made, seen)| made.load(Acquire) == seen.load(Acquire));
    let wall = before.at - first.at;
    let counted = |at: Moment| at.busy + at.poll + at.sleep;
    // Over the whole run: within a turn the account lags behind, and a turn can be pre-empted.
    let unaccounted = (1.0 - (counted(before) - counted(first)) as f64 / nanos(wall)).abs();
    Ok(Saturation {
        what,
        threads: count,
        made,
        served: served(),
        callbacks: callbacks.load(Acquire),
        events_per_second: Interval::of(&slices_taken.rates),
        events_per_busy_second: Interval::of(&slices_taken.busy_rates),
        busy: Interval::of(&slices_taken.busy),
        poll: Interval::of(&slices_taken.poll),
        sleep: Interval::of(&slices_taken.sleep),
        unaccounted,
        on_cpu: on_cpu.map(|time| time.as_secs_f64() / wall.as_secs_f64()),
        claims: vec![
            Claimed {
                claim: "every producer's events were served, each once".to_owned(),
                verdict: Verdict::counted(equal),
            },
            Claimed {
                claim: "busy, poll and sleep are wall time within 1%".to_owned(),
                verdict: Verdict::counted(unaccounted <= 0.01),
            },
        ],
    })
}

#[derive(Default)]
struct Slices {
    rates: Vec<f64>,
    busy_rates: Vec<f64>,
    busy: Vec<f64>,
    poll: Vec<f64>,
    sleep: Vec<f64>,
}

impl Slices {
    fn add(&mut self, before: Moment, now: Moment, events: u64) {
        let wall = nanos(now.at - before.at);
        let share = |before: u64, now: u64| (now - before) as f64 / wall;
        let (busy, poll, sleep) = (
            share(before.busy, now.busy),
            share(before.poll, now.poll),
            share(before.sleep, now.sleep),
        );
        self.rates.push(events as f64 / wall * 1e9);
        self.busy_rates.push(events as f64 / (now.busy - before.busy).max(1) as f64 * 1e9);
        self.busy.push(busy);
        self.poll.push(poll);
        self.sleep.push(sleep);
    }
}

pub(super) fn all(slices: usize) -> io::Result<Vec<Saturation>> {
    progress("64 producers at 5,000 a second each");
    let mut seed = drive("64 producers, 5,000/s each", paced, slices, PACED_SLICE)?;
    let verdict = Claim::AtMost(0.5).verdict(seed.busy);
    seed.claims.push(Claimed { claim: "busy less than half of a CPU".to_owned(), verdict });
    progress("64 producers without a limit");
    let mut limit = drive("64 producers, no limit", free, slices, FREE_SLICE)?;
    limit.claims.push(Claimed {
        claim: "every event had a callback of its own".to_owned(),
        verdict: Verdict::counted(limit.callbacks == limit.made),
    });
    let mut verdict = Claim::AtLeast(1e6).verdict(limit.events_per_second);
    if verdict == Verdict::Fails && limit.busy.high < SATURATED {
        verdict = Verdict::CannotTell; // the producers could not keep it busy
    }
    limit.claims.push(Claimed { claim: "more than 1,000,000 events/s".to_owned(), verdict });
    Ok(vec![seed, limit])
}
