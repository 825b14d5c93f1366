//! What each thing a loop does costs, against the matching baseline.

use std::io;
use std::time::Duration;

use iothread::PollPolicy;

use super::bare::{self, BareThread};
use super::common::{median, nanos, on_thread};
use super::ours::{self, PostedTo};
use super::{Claimed, Cost, Tally};
use crate::bench::host::Witness;
use crate::bench::progress;
use crate::bench::ratio::{Claim, Verdict, compare};

const ROUNDS: u32 = 4_000;
const BATCHES: u32 = 320;
const WAKE_UPS: u32 = 200;
const KICKS: u32 = 50_000;

/// Between two wake-ups, so that the other thread is polling or asleep again.
const PAUSE: Duration = Duration::from_micros(60);

/// Polls from the second wait on, for longer than any measurement.
const ALWAYS_POLLS: PollPolicy =
    PollPolicy { max: Duration::from_secs(10), grow: u32::MAX, shrink: 0, share: 100 };

pub(super) fn all(pairs: usize) -> io::Result<Vec<Cost>> {
    let rows: [fn(usize) -> io::Result<Cost>; 10] = [
        fd_event,
        fd_events,
        timer,
        bottom_half,
        bottom_halves,
        posts,
        wake_polling,
        wake_sleeping,
        kick_alone,
        kick_contended,
    ];
    let count = rows.len();
    let mut costs = Vec::new();
    for (nth, row) in rows.iter().enumerate() {
        progress(&format!("costs: {} of {count}", nth + 1));
        costs.push(row(pairs)?);
    }
    Ok(costs)
}

/// Compares `operations` operations of the loop with as many of the baseline.
fn cost(
    (what, baseline): (&'static str, &'static str),
    pairs: usize,
    operations: u64,
    mut ours: impl FnMut(&mut Tally) -> io::Result<Duration>,
    mut theirs: impl FnMut() -> io::Result<Duration>,
) -> io::Result<(Cost, Tally)> {
    let mut tally = Tally::default();
    let each = |spent: Duration| nanos(spent) / operations as f64;
    let times = compare(pairs, || ours(&mut tally).map(each), || theirs().map(each))?;
    let counts = tally.per(times.pairs as u64 * operations);
    Ok((Cost { what, baseline, times, claims: Vec::new(), counts }, tally))
}

impl Cost {
    fn at_most(mut self, limit: f64) -> Self {
        let verdict = Claim::AtMost(limit).verdict(self.times.ratio);
        self.claims.push(Claimed { claim: format!("ratio <= {limit}"), verdict });
        self
    }

    fn counted(self, claim: &str, right: bool) -> Self {
        self.judged(claim, Verdict::counted(right))
    }

    fn judged(mut self, claim: &str, verdict: Verdict) -> Self {
        self.claims.push(Claimed { claim: claim.to_owned(), verdict });
        self
    }
}

/// Runs what makes its thread a loop on a thread of its own.
fn apart(
    tally: &mut Tally,
    body: impl FnOnce(&mut Tally) -> io::Result<Duration> + Send + 'static,
) -> io::Result<Duration> {
    let (spent, counts) = on_thread(move || {
        let mut counts = Tally::default();
        Ok((body(&mut counts)?, counts))
    })?;
    counts.0.into_iter().for_each(|(what, count)| tally.add(what, count));
    Ok(spent)
}

fn fd_event(pairs: usize) -> io::Result<Cost> {
    let names = ("fd event, one each turn", "bare epoll: write, epoll_wait, callback");
    let ours = |tally: &mut Tally| apart(tally, |tally| ours::fd_events(1, ROUNDS, tally));
    let theirs = || on_thread(|| bare::fd_events(1, ROUNDS));
    Ok(cost(names, pairs, u64::from(ROUNDS), ours, theirs)?.0.at_most(1.15))
}

fn fd_events(pairs: usize) -> io::Result<Cost> {
    let names = ("fd event, 16 ready at once", "bare epoll: 16 writes, epoll_wait, 16 callbacks");
    let ours = |tally: &mut Tally| apart(tally, |tally| ours::fd_events(16, BATCHES, tally));
    let theirs = || on_thread(|| bare::fd_events(16, BATCHES));
    Ok(cost(names, pairs, 16 * u64::from(BATCHES), ours, theirs)?.0.at_most(1.15))
}

fn timer(pairs: usize) -> io::Result<Cost> {
    let names =
        ("timer due at once, armed and fired", "bare epoll: timerfd_settime, epoll_wait, callback");
    let ours = |tally: &mut Tally| apart(tally, |tally| ours::timers(ROUNDS, tally));
    let theirs = || on_thread(|| bare::timers(ROUNDS));
    Ok(cost(names, pairs, u64::from(ROUNDS), ours, theirs)?.0)
}

const ROUND_TRIP: &str = "raw eventfd on one thread: write, epoll_wait, read";

fn bottom_half(pairs: usize) -> io::Result<Cost> {
    let ours = |tally: &mut Tally| apart(tally, |tally| ours::bottom_halves(1, ROUNDS, tally));
    let theirs = || on_thread(|| bare::eventfd_round_trips(ROUNDS));
    let names = ("bottom half, one each turn", ROUND_TRIP);
    Ok(cost(names, pairs, u64::from(ROUNDS), ours, theirs)?.0.at_most(0.2))
}

fn bottom_halves(pairs: usize) -> io::Result<Cost> {
    const OPERATIONS: u32 = 64 * BATCHES;
    let ours = |tally: &mut Tally| apart(tally, |tally| ours::bottom_halves(64, BATCHES, tally));
    let theirs = || on_thread(|| bare::eventfd_round_trips(OPERATIONS));
    let names = ("bottom half, 64 at once", ROUND_TRIP);
    Ok(cost(names, pairs, u64::from(OPERATIONS), ours, theirs)?.0.at_most(0.2))
}

/// What `once` measures after a pause, `rounds` times: `rounds` times the median.
fn paused(rounds: u32, mut once: impl FnMut() -> io::Result<Duration>) -> io::Result<Duration> {
    let mut times = Vec::new();
    for _ in 0..rounds {
        std::thread::sleep(PAUSE);
        times.push(once()?);
    }
    Ok(median(times) * rounds)
}

fn posts(pairs: usize) -> io::Result<Cost> {
    const ROUNDS: u32 = 100;
    let names = ("post from another thread, 64 at once", "bare epoll on another thread: 64 writes");
    let ours = |tally: &mut Tally| {
        let target = PostedTo::new(PollPolicy::default(), 64)?;
        target.post_all()?;
        let sleeps = target.home.handle.counters().sleeps.get();
        let before = Witness::of_this_thread();
        let spent = paused(ROUNDS, || target.post_all())?;
        tally.maybe("writes", Witness::of_this_thread().writes_since(before));
        tally.add("sleeps", target.home.handle.counters().sleeps.get() - sleeps);
        Ok(spent)
    };
    let theirs = || {
        let target = BareThread::new(64)?;
        target.signal_all()?;
        paused(ROUNDS, || target.signal_all())
    };
    Ok(cost(names, pairs, 64 * u64::from(ROUNDS), ours, theirs)?.0)
}

fn wake_up(
    what: &'static str,
    pairs: usize,
    poll: PollPolicy,
    warm_up: fn(&PostedTo) -> io::Result<()>,
) -> io::Result<(Cost, Tally)> {
    let names = (what, "eventfd to a thread asleep in bare epoll");
    let ours = |tally: &mut Tally| {
        let target = PostedTo::new(poll, 1)?;
        warm_up(&target)?;
        let sleeps = target.home.handle.counters().sleeps.get();
        let before = Witness::of_this_thread();
        let spent = paused(WAKE_UPS, || target.post_all())?;
        tally.maybe("writes", Witness::of_this_thread().writes_since(before));
        tally.add("sleeps", target.home.handle.counters().sleeps.get() - sleeps);
        Ok(spent)
    };
    let theirs = || {
        let target = BareThread::new(1)?;
        target.signal_all()?;
        paused(WAKE_UPS, || target.signal_all())
    };
    cost(names, pairs, u64::from(WAKE_UPS), ours, theirs)
}

fn wake_polling(pairs: usize) -> io::Result<Cost> {
    let (cost, tally) = wake_up("wake-up of a loop that polls", pairs, ALWAYS_POLLS, |target| {
        // It learns to poll by having slept twice, for however short a time.
        let counters = target.home.handle.counters();
        loop {
            let sleeps = counters.sleeps.get();
            for _ in 0..3 {
                std::thread::sleep(Duration::from_millis(1));
                target.post_all()?;
            }
            if counters.sleeps.get() == sleeps {
                return Ok(());
            }
        }
    })?;
    // A loop whose CPU others want polls no more for a while: then there is nothing to see.
    let verdict = match (tally.get("writes"), tally.get("sleeps")) {
        (Some(0), Some(0)) => Verdict::Holds,
        (Some(writes), Some(sleeps)) if writes > sleeps => Verdict::Fails,
        _ => Verdict::CannotTell,
    };
    Ok(cost.judged("no eventfd is written to a loop that polls", verdict))
}

fn wake_sleeping(pairs: usize) -> io::Result<Cost> {
    let row = wake_up("wake-up of a loop that sleeps", pairs, PollPolicy::OFF, |target| {
        target.post_all().map(drop)
    });
    Ok(row?.0)
}

fn kick_alone(pairs: usize) -> io::Result<Cost> {
    let names = ("kick of a strand, by one thread", "a Mutex around the object");
    let ours = |tally: &mut Tally| ours::kicks(1, KICKS, tally);
    let (cost, tally) = cost(names, pairs, u64::from(KICKS), ours, || bare::locked(1, KICKS))?;
    let right = tally.none_of(&["writes", "left with the holder", "handed over"]);
    Ok(cost.counted("no write, nothing left to others", right))
}

fn kick_contended(pairs: usize) -> io::Result<Cost> {
    let names = ("kick of a strand, by two threads at once", "a Mutex, by two threads at once");
    let ours = |tally: &mut Tally| ours::kicks(2, KICKS, tally);
    Ok(cost(names, pairs, 2 * u64::from(KICKS), ours, || bare::locked(2, KICKS))?.0)
}
