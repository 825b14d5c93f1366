//! The loop's side of each comparison.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::*};
use std::time::{Duration, Instant};

use iothread::{Event, EventLoop, PollPolicy, Progress, Strand, Timer, Trigger, VcpuLoop};

use super::common::{LoopThread, await_count, eventfds, lost, owned, strand, together, typical};
use super::{STRETCH, Tally};
use crate::bench::host::Witness;

fn counting(strand: &Strand<u64>) -> Event<u64> {
    strand.event(|count, _| {
        *count += 1;
        Progress::Idle
    })
}

/// Has the object been called so often, no more and no less?
fn check(event_loop: &mut EventLoop, strand: &Strand<u64>, calls: u64) -> io::Result<()> {
    let mut count = strand.call(|count, _| *count);
    event_loop.turn();
    if count.poll() == Ok(Some(calls)) { Ok(()) } else { Err(lost()) }
}

/// `at_once` eventfds written, then one turn; `rounds` times.
pub(super) fn fd_events(at_once: usize, rounds: u32, tally: &mut Tally) -> io::Result<Duration> {
    let mut event_loop = EventLoop::new("bench", PollPolicy::OFF)?;
    let strand = strand(&event_loop.handle(), 0);
    let fds = eventfds(at_once)?;
    let mut sources = Vec::new();
    for fd in &fds {
        sources.push(counting(&strand).on_fd(owned(fd.try_clone()?), Trigger::Edge));
    }
    event_loop.turn(); // takes them on
    let turns = event_loop.handle().counters().turns.get();
    let spent = typical(rounds, STRETCH / at_once as u32, || {
        for fd in &fds {
            fd.write(1)?;
        }
        event_loop.turn();
        Ok(())
    })?;
    tally.add("turns", event_loop.handle().counters().turns.get() - turns);
    check(&mut event_loop, &strand, at_once as u64 * u64::from(rounds))?;
    Ok(spent)
}

/// A timer that each expiry arms again, due at once.
pub(super) fn timers(rounds: u32, tally: &mut Tally) -> io::Result<Duration> {
    let mut event_loop = EventLoop::new("bench", PollPolicy::OFF)?;
    let strand = strand(&event_loop.handle(), (0u32, None::<Timer>));
    let ran = Arc::<AtomicU64>::default();
    let count = Arc::clone(&ran);
    let fire = strand.event(move |(_, timer), _| {
        count.store(count.load(Relaxed) + 1, Relaxed);
        if let Some(timer) = timer {
            timer.arm_at(Instant::now());
        }
        Progress::Idle
    });
    let timer = fire.timer();
    let _armed = strand.call(move |(_, slot), _| {
        timer.arm_at(Instant::now());
        *slot = Some(timer);
    });
    event_loop.turn();
    let counters = Arc::clone(event_loop.handle().counters());
    let (turns, sleeps) = (counters.turns.get(), counters.sleeps.get());
    let mut target = 0;
    let spent = typical(rounds, STRETCH, || {
        target += 1;
        while ran.load(Relaxed) < target {
            event_loop.turn();
        }
        Ok(())
    })?;
    tally.add("turns", counters.turns.get() - turns);
    tally.add("sleeps", counters.sleeps.get() - sleeps);
    Ok(spent)
}

/// `at_once` bottom halves scheduled, then one turn; `rounds` times.
pub(super) fn bottom_halves(
    at_once: usize,
    rounds: u32,
    tally: &mut Tally,
) -> io::Result<Duration> {
    let mut event_loop = EventLoop::new("bench", PollPolicy::OFF)?;
    let strand = strand(&event_loop.handle(), 0);
    let events: Vec<_> = (0..at_once).map(|_| counting(&strand)).collect();
    let counters = Arc::clone(event_loop.handle().counters());
    let before = Witness::of_this_thread();
    let spent = typical(rounds, STRETCH.div_ceil(at_once as u32), || {
        events.iter().for_each(Event::schedule);
        event_loop.turn();
        Ok(())
    })?;
    tally.add("turns", counters.turns.get());
    tally.add("sleeps", counters.sleeps.get());
    tally.maybe("writes", Witness::of_this_thread().writes_since(before));
    check(&mut event_loop, &strand, at_once as u64 * u64::from(rounds))?;
    Ok(spent)
}

/// A loop on a thread of its own and what is posted to it.
pub(super) struct PostedTo {
    pub(super) home: LoopThread,
    events: Vec<Event<()>>,
    _strand: Strand<()>,
    ran: Arc<AtomicU64>,
}

impl PostedTo {
    pub(super) fn new(poll: PollPolicy, events: usize) -> io::Result<Self> {
        let home = LoopThread::new(poll)?;
        let strand = strand(&home.handle, ());
        let ran = Arc::<AtomicU64>::default();
        let event = |_| {
            let ran = Arc::clone(&ran);
            strand.event(move |(), _| {
                ran.fetch_add(1, Release);
                Progress::Idle
            })
        };
        let events = (0..events).map(event).collect();
        Ok(Self { home, events, _strand: strand, ran })
    }

    /// Schedules every event and waits until all have run; gives the time that took.
    pub(super) fn post_all(&self) -> io::Result<Duration> {
        let target = self.ran.load(Relaxed) + self.events.len() as u64;
        let began = Instant::now();
        self.events.iter().for_each(Event::schedule);
        await_count(&self.ran, target)?;
        Ok(began.elapsed())
    }
}

/// `threads` vCPU threads that each kick one strand `rounds` times.
pub(super) fn kicks(threads: usize, rounds: u32, tally: &mut Tally) -> io::Result<Duration> {
    struct Object {
        /// Work announced by kickers, as in a ring: one kick may serve several announcements.
        announced: Arc<AtomicU64>,
        taken: u64,
    }
    let home = LoopThread::new(PollPolicy::default())?;
    home.barrier()?;
    let announced = Arc::<AtomicU64>::default();
    let object = Object { announced: Arc::clone(&announced), taken: 0 };
    let strand = strand(&home.handle, object);
    let (left, handed) = (Arc::<AtomicU64>::default(), Arc::<AtomicU64>::default());
    let writes = Arc::<AtomicU64>::default();
    let alone = threads == 1;
    let spent = together(threads, |_| {
        let event = strand.event(|object: &mut Object, _| {
            object.taken = object.announced.load(Acquire);
            Progress::Idle
        });
        let announced = Arc::clone(&announced);
        let (left, handed, writes) = (Arc::clone(&left), Arc::clone(&handed), Arc::clone(&writes));
        move |start: &dyn Fn()| {
            let mut vcpu = VcpuLoop::enter();
            let before = Witness::of_this_thread();
            start();
            for _ in 0..rounds {
                match alone {
                    // What a locked add costs is no part of the kick.
                    true => announced.store(announced.load(Relaxed) + 1, Relaxed),
                    false => drop(announced.fetch_add(1, AcqRel)),
                }
                event.run_here(&mut vcpu.exit());
            }
            left.fetch_add(vcpu.counters().left.get(), AcqRel);
            handed.fetch_add(vcpu.counters().handed_over.get(), AcqRel);
            let written = Witness::of_this_thread().writes_since(before);
            writes.fetch_add(written.unwrap_or(0), AcqRel);
        }
    })?;
    tally.add("left with the holder", left.load(Acquire));
    tally.add("handed over", handed.load(Acquire));
    let here = Witness::of_this_thread();
    tally.maybe("writes", here.writes_since(here).map(|_| writes.load(Acquire)));
    home.barrier()?;
    let blocking = iothread::Blocking::on_this_thread().ok_or_else(lost)?;
    let taken = strand.call(|object, _| object.taken).wait(&blocking).map_err(io::Error::other)?;
    if taken == threads as u64 * u64::from(rounds) { Ok(spent) } else { Err(lost()) }
}
