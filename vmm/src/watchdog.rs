//! Notices threads that get nothing done, and says whose fault it is.
//!
//! It looks once a second while a loop is awake, and not at all while all of them sleep.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use iothread::{Counters, LoopHandle};

use crate::ending::Ending;
use crate::machine::ThreadInfo;

/// From one look to the next.
const PERIOD: Duration = Duration::from_secs(1);

/// A callback that has not ended after so long is worth a word.
const LONG: Duration = Duration::from_secs(1);

/// Watches the threads of a machine.
#[derive(Debug, Default)]
pub struct Watchdog {
    loops: Vec<LoopHandle>,
    threads: Vec<(String, Arc<Counters>)>,
    next: Option<Instant>,
    /// What has been said, once is enough.
    said: BTreeSet<(String, &'static str, &'static str)>,
}

impl Watchdog {
    /// Watches these loops, which tell it by `ending` that they are awake again, and these threads.
    pub fn watch(
        &mut self,
        loops: impl Iterator<Item = LoopHandle>,
        threads: impl Iterator<Item = ThreadInfo>,
        ending: &Ending,
    ) {
        self.loops = loops.collect();
        self.threads = threads.map(|it| (it.granted.name, it.counters)).collect();
        for handle in &self.loops {
            let ending = ending.clone();
            handle.on_bell(move || ending.wake());
        }
        self.next = Some(Instant::now() + PERIOD);
    }

    /// How long until it wants to look; `None`: all loops sleep, and one that wakes up will say so.
    pub fn wait(&mut self, now: Instant) -> Option<Duration> {
        if self.next.is_none() && !LoopHandle::all_sleep(&self.loops) {
            self.next = Some(now + PERIOD);
        }
        self.next.map(|next| next.saturating_duration_since(now))
    }

    /// Looks, if it is time, and gives what is to be said.
    pub fn look(&mut self, now: Instant) -> Vec<String> {
        if self.next.is_none_or(|next| now < next) {
            return Vec::new();
        }
        // The next look is arranged by `wait`.
        self.next = None;
        let mut complaints = Vec::new();
        for (name, counters) in &self.threads {
            let activity = &counters.activity;
            if let Some(spell) = activity.running()
                && spell.time >= LONG
                && self.said.insert((name.clone(), "long", spell.owner))
            {
                let (owner, time) = (spell.owner, spell.time.as_secs_f64());
                complaints.push(format!(
                    "thread {name} has been in a callback of {owner} for {time:.1} s: nothing else \
                     is served there"
                ));
            }
            if let Some(owner) = activity.spinning()
                && self.said.insert((name.clone(), "spins", owner))
            {
                complaints.push(format!(
                    "thread {name} turns and turns for {owner} and gets nothing done"
                ));
            }
        }
        complaints
    }
}
