//! Timers with nanosecond deadlines, served by one timerfd per loop.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicU64, Ordering::*};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use vmm_sys_util::timerfd::TimerFd;

use crate::event_loop::{LoopHandle, Task};
use crate::inbox::Node;

/// No deadline.
const OFF: u64 = 0;

/// Deadlines are nanoseconds after this moment, so that they fit an atomic.
fn since_start(at: Instant) -> u64 {
    static START: OnceLock<Instant> = OnceLock::new();
    let start = *START.get_or_init(Instant::now);
    let elapsed = at.saturating_duration_since(start).as_nanos();
    u64::try_from(elapsed).unwrap_or(u64::MAX).max(1)
}

struct Alarm {
    deadline: AtomicU64,
    fire: Arc<Node<Task>>,
}

/// Fires an event at a moment. Arming it again moves the moment; dropping it cancels.
pub struct Timer {
    alarm: Arc<Alarm>,
    rearm: Arc<Node<Task>>,
    home: LoopHandle,
}

impl std::fmt::Debug for Timer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Timer").field("home", &self.home).finish_non_exhaustive()
    }
}

impl Timer {
    pub(crate) fn new(home: &LoopHandle, fire: &Arc<Node<Task>>) -> Self {
        let alarm = Arc::new(Alarm { deadline: AtomicU64::new(OFF), fire: Arc::clone(fire) });
        let armed = Arc::clone(&alarm);
        let rearm = Task::Admin(Box::new(move |event_loop| event_loop.timers.insert(&armed)));
        Self { alarm, rearm: Arc::new(Node::new(rearm)), home: home.clone() }
    }

    /// Fires once, at `at` or as soon after it as the loop can. Any thread may call this.
    pub fn arm_at(&self, at: Instant) {
        self.alarm.deadline.store(since_start(at), Release);
        self.home.post(&self.rearm);
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
    fd: TimerFd,
    /// What the timerfd is set to.
    alarm: u64,
}

impl Timers {
    pub(crate) fn new() -> io::Result<Self> {
        let fd = TimerFd::new().map_err(|e| io::Error::from_raw_os_error(e.errno()))?;
        Ok(Self { heap: BinaryHeap::new(), sequence: 0, fd, alarm: OFF })
    }

    fn insert(&mut self, alarm: &Arc<Alarm>) {
        let deadline = alarm.deadline.load(Acquire);
        if deadline != OFF {
            self.sequence += 1;
            let (sequence, alarm) = (self.sequence, Arc::clone(alarm));
            self.heap.push(Reverse(Entry { deadline, sequence, alarm }));
        }
    }

    /// The next deadline, without those that were cancelled or moved.
    fn next(&mut self) -> Option<u64> {
        while let Some(Reverse(entry)) = self.heap.peek() {
            if entry.is_current() {
                return Some(entry.deadline);
            }
            self.heap.pop();
        }
        None
    }

    pub(crate) fn due(&mut self, now: Instant) -> bool {
        !self.heap.is_empty() && self.next().is_some_and(|deadline| deadline <= since_start(now))
    }

    /// The event of the next timer due at `now`; the timer is off afterwards.
    pub(crate) fn pop_due(&mut self, now: Instant) -> Option<Arc<Node<Task>>> {
        if !self.due(now) {
            return None;
        }
        let Reverse(entry) = self.heap.pop()?;
        // Another thread may be arming it again right now: then this deadline is void.
        entry
            .alarm
            .deadline
            .compare_exchange(entry.deadline, OFF, AcqRel, Acquire)
            .ok()
            .map(|_| Arc::clone(&entry.alarm.fire))
            .or_else(|| self.pop_due(now))
    }

    /// Sets the timerfd so that a sleep ends at the next deadline.
    pub(crate) fn set_alarm(&mut self, now: Instant) {
        let next = self.next().unwrap_or(OFF);
        if next == self.alarm && next > since_start(now) {
            return;
        }
        if next == OFF && self.alarm == OFF {
            return;
        }
        let delay = match next {
            OFF => Duration::ZERO, // disarms
            at => Duration::from_nanos(at.saturating_sub(since_start(now)).max(1)),
        };
        // Can only fail for a bad fd or an absurd delay; then the loop still runs its other work.
        let _ = self.fd.reset(delay, None);
        self.alarm = next;
    }
}

impl AsRawFd for Timers {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}
