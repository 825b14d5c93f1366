//! What a thread is doing right now, and what it has done for longest: to be read by others.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use crate::clock;

/// Whose callback it is: the name of a strand. Small enough to be kept in one word.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Owner(u32);

/// No owner.
const NOBODY: u32 = 0;

#[derive(Default)]
struct Names {
    by_number: Vec<&'static str>,
    by_name: HashMap<&'static str, u32>,
}

#[expect(clippy::disallowed_types, reason = "taken when a strand is made, and to print a name")]
static NAMES: std::sync::LazyLock<std::sync::Mutex<Names>> =
    std::sync::LazyLock::new(Default::default);

fn names() -> std::sync::MutexGuard<'static, Names> {
    NAMES.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

impl Owner {
    /// The same for the same name. Names are never forgotten: those of a machine are few.
    pub(crate) fn named(name: &str) -> Self {
        let mut names = names();
        if let Some(&number) = names.by_name.get(name) {
            return Self(number);
        }
        let name: &'static str = Box::leak(name.into());
        names.by_number.push(name);
        let number = names.by_number.len() as u32;
        names.by_name.insert(name, number);
        Self(number)
    }

    fn name(number: u32) -> Option<&'static str> {
        names().by_number.get((number as usize).checked_sub(1)?).copied()
    }
}

/// A callback and how long it took, or has been taking.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Spell {
    /// The name of the strand whose callback it is.
    pub owner: &'static str,
    /// How long.
    pub time: Duration,
}

/// The callbacks of one thread. Only that thread writes.
#[derive(Debug, Default)]
pub struct Activity {
    running: AtomicU32,
    since: AtomicU64,
    longest: Record,
    latest_timer: Record,
    spinning: AtomicU32,
}

/// The largest of some times, and whose it was.
#[derive(Debug, Default)]
struct Record {
    nanos: AtomicU64,
    owner: AtomicU32,
}

impl Record {
    fn raise(&self, nanos: u64, owner: u32) {
        if nanos > self.nanos.load(Relaxed) {
            self.nanos.store(nanos, Relaxed);
            self.owner.store(owner, Relaxed);
        }
    }

    fn read(&self) -> Option<Spell> {
        let owner = Owner::name(self.owner.load(Relaxed))?;
        Some(Spell { owner, time: Duration::from_nanos(self.nanos.load(Relaxed)) })
    }
}

impl Activity {
    pub(crate) fn begin(&self, owner: Owner, now: u64) {
        self.since.store(now, Relaxed);
        self.running.store(owner.0, Relaxed);
    }

    pub(crate) fn end(&self, owner: Owner, took: u64) {
        self.longest.raise(took, owner.0);
        self.running.store(NOBODY, Relaxed);
    }

    /// A timer fired so much too late, most likely because of `blamed`.
    pub(crate) fn timer_was_late(&self, nanos: u64, blamed: Option<Owner>) {
        self.latest_timer.raise(nanos, blamed.map_or(NOBODY, |owner| owner.0));
    }

    /// The loop turns again and again for bottom halves that get nothing done; `None`: no longer.
    pub(crate) fn spins(&self, owner: Option<Owner>) {
        self.spinning.store(owner.map_or(NOBODY, |owner| owner.0), Relaxed);
    }

    /// The callback that is running, and for how long it has been.
    pub fn running(&self) -> Option<Spell> {
        let (running, since) = (self.running.load(Relaxed), self.since.load(Relaxed));
        let owner = Owner::name(running)?;
        let now = clock::Clock::Real.now();
        Some(Spell { owner, time: Duration::from_nanos(now.saturating_sub(since)) })
    }

    /// The longest callback so far.
    pub fn longest(&self) -> Option<Spell> {
        self.longest.read()
    }

    /// How late a timer has fired at the most, and the longest callback that was in its way.
    pub fn latest_timer(&self) -> Option<Spell> {
        self.latest_timer.read()
    }

    /// The strand for whose bottom halves the loop turns without getting anything done.
    pub fn spinning(&self) -> Option<&'static str> {
        Owner::name(self.spinning.load(Relaxed))
    }
}
