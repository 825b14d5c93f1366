//! Timers with nanosecond deadlines, served by one timerfd per loop.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::fmt;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::*};
use std::time::{Duration, Instant};

use vmm_sys_util::timerfd::TimerFd;

use crate::class::Class;
use crate::clock::nanos;
use crate::event_loop::EventLoop;
use crate::handle::Task;
use crate::inbox::Node;
use crate::place::Place;

/// No deadline.
const OFF: u64 = 0;

/// So few entries need no sweeping.
const LEAST_SWEEP: usize = 64;

pub(crate) struct Alarm {
    /// In nanoseconds, so that it fits an atomic.
    deadline: AtomicU64,
    fire: Arc<Node<Task>>,
    place: Arc<Place>,
}

/// Fires an event at a moment. Arming it again moves the moment; dropping it cancels.
pub struct Timer {
    alarm: Arc<Alarm>,
    rearm: Arc<Node<Task>>,
}

impl fmt::Debug for Timer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Timer").field("home", self.alarm.place.home()).finish_non_exhaustive()
    }
}

impl Timer {
    pub(crate) fn new(fire: &Arc<Node<Task>>, place: &Arc<Place>) -> Self {
        let (fire, place) = (Arc::clone(fire), Arc::clone(place));
        let alarm = Arc::new(Alarm { deadline: AtomicU64::new(OFF), fire, place });
        let armed = Arc::clone(&alarm);
        let rearm = Arc::new_cyclic(|rearm: &std::sync::Weak<Node<Task>>| {
            let rearm = rearm.clone();
            Node::new(Task::Arm(Box::new(move |event_loop: &mut EventLoop| {
                if event_loop.is(armed.place.home()) {
                    event_loop.timers.insert(&armed);
                } else if let Some(rearm) = rearm.upgrade() {
                    armed.place.home().post(&rearm, armed.place.class);
                }
            })))
        });
        Self { alarm, rearm }
    }

    /// Fires once, at `at` or as soon after it as the loop can. Any thread may call this.
    pub fn arm_at(&self, at: Instant) {
        self.alarm.deadline.store(nanos(at), Release);
        let place = &self.alarm.place;
        place.home().post(&self.rearm, place.class);
    }

    /// Fires no more until armed again; an event already fired is not taken back.
    pub fn cancel(&self) {
        self.alarm.deadline.store(OFF, Release);
    }
}

impl Drop for Timer {
    fn drop(&mut self) {
        self.cancel();
    }
}

/// One entry per arming; entries that no longer match their timer's deadline are skipped.
struct Entry {
    deadline: u64,
    sequence: u64,
    alarm: Arc<Alarm>,
}

impl PartialEq for Entry {
    fn eq(&self, other: &Self) -> bool {
        self.key() == other.key()
    }
}
impl Eq for Entry {}
impl PartialOrd for Entry {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Entry {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.key().cmp(&other.key())
    }
}
impl Entry {
    fn key(&self) -> (u64, u64) {
        (self.deadline, self.sequence)
    }

    fn is_current(&self) -> bool {
        self.alarm.deadline.load(Acquire) == self.deadline
    }
}

/// The armed timers of one loop.
pub(crate) struct Timers {
    heap: BinaryHeap<Reverse<Entry>>,
    sequence: u64,
    /// With more entries, those that no longer count are removed.
    sweep_at: usize,
    fd: TimerFd,
    /// What the timerfd is set to.
    alarm: u64,
}

impl Timers {
    pub(crate) fn new() -> io::Result<Self> {
        let fd = TimerFd::new().map_err(|e| io::Error::from_raw_os_error(e.errno()))?;
        Ok(Self { heap: BinaryHeap::new(), sequence: 0, sweep_at: LEAST_SWEEP, fd, alarm: OFF })
    }

    pub(crate) fn insert(&mut self, alarm: &Arc<Alarm>) {
        let deadline = alarm.deadline.load(Acquire);
        if deadline != OFF {
            self.sequence += 1;
            let (sequence, alarm) = (self.sequence, Arc::clone(alarm));
            self.heap.push(Reverse(Entry { deadline, sequence, alarm }));
            // One that is armed again and again leaves its old entries behind.
            if self.heap.len() > self.sweep_at {
                self.heap.retain(|Reverse(entry)| entry.is_current());
                self.sweep_at = LEAST_SWEEP.max(2 * self.heap.len());
            }
        }
    }

    /// The next deadline, without those that were cancelled or moved.
    pub(crate) fn next(&mut self) -> Option<u64> {
        while let Some(Reverse(entry)) = self.heap.peek() {
            if entry.is_current() {
                return Some(entry.deadline);
            }
            self.heap.pop();
        }
        None
    }

    pub(crate) fn due(&mut self, now: u64) -> bool {
        !self.heap.is_empty() && self.next().is_some_and(|deadline| deadline <= now)
    }

    #[cfg(all(test, not(loom)))]
    pub(crate) fn len(&self) -> usize {
        self.heap.len()
    }

    /// The next timer that is due at `now`: its deadline and its task. It is off afterwards.
    pub(crate) fn pop_due(&mut self, now: u64) -> Option<Due> {
        while self.due(now) {
            let Reverse(Entry { deadline, alarm, .. }) = self.heap.pop()?;
            // Another thread may be arming it again right now: then this deadline is void.
            if alarm.deadline.compare_exchange(deadline, OFF, AcqRel, Acquire).is_ok() {
                return Some(Due {
                    deadline,
                    class: alarm.place.class,
                    fire: Arc::clone(&alarm.fire),
                });
            }
        }
        None
    }

    /// The timers of a place that is moving away.
    pub(crate) fn detach(&mut self, place: &Arc<Place>) -> Vec<Arc<Alarm>> {
        let mut moving = Vec::new();
        let all = std::mem::take(&mut self.heap);
        self.heap = all
            .into_iter()
            .filter(|Reverse(entry)| {
                let moves = Arc::ptr_eq(&entry.alarm.place, place);
                if moves && entry.is_current() {
                    moving.push(Arc::clone(&entry.alarm));
                }
                !moves
            })
            .collect();
        moving
    }

    /// Sets the timerfd so that a sleep ends at the next deadline.
    pub(crate) fn set_alarm(&mut self, now: u64) {
        let next = self.next().unwrap_or(OFF);
        if next == self.alarm && next > now {
            return;
        }
        if next == OFF && self.alarm == OFF {
            return;
        }
        let delay = match next {
            OFF => Duration::ZERO, // disarms
            at => Duration::from_nanos(at.saturating_sub(now).max(1)),
        };
        // Can only fail for a bad fd or an absurd delay; then the loop still runs its other work.
        let _ = self.fd.reset(delay, None);
        self.alarm = next;
    }
}

/// A timer that has expired.
pub(crate) struct Due {
    pub(crate) deadline: u64,
    pub(crate) class: Class,
    pub(crate) fire: Arc<Node<Task>>,
}

impl AsRawFd for Timers {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}
