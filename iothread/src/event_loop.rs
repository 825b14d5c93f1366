//! The loop: one type for every thread that is not a vCPU.
//!
//! One turn is: park (not at all if work is queued, else poll, then run what waits for an idle
//! moment, then sleep); ready fds; ring completions; timers due at one `now`; the objects that had
//! bottom halves when their phase began; one `io_uring_enter` for all that was submitted. In each
//! phase the classes come one after the other. Each phase works on a snapshot of limited size, so
//! nothing can starve another phase, and no callback can run a loop. docs/loop.md has the
//! guarantees.

use std::fmt;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::activity::Owner;
use crate::class::Class;
use crate::clock::{self, Clock};
use crate::counters::{Counter, Counters};
use crate::cx::{Cx, Local};
use crate::handle::{LoopHandle, Task};
use crate::inbox::{Batch, Node};
use crate::place::Place;
use crate::poll::{PollPolicy, Polling};
use crate::readiness::Readiness;
use crate::reply;
use crate::shuffle::Shuffle;
use crate::source::{Peeked, Watched};
use crate::timer::{Alarm, Due, Timers};

/// Peeks between two looks at the file descriptors while polling.
const SPINS_PER_LOOK: u32 = 64;

/// While there is other work, the file descriptors are looked at once in so many nanoseconds: a
/// look is a system call, and a bottom half costs a tenth of one.
const LOOK_PERIOD_NS: u64 = 10_000;

/// Events that others left with a strand served in one go, before other work of the loop.
const SERVE_BUDGET: u32 = 64;

/// Objects of one class served in one phase of bottom halves; the others wait for the next turn.
const PHASE_BUDGET: u32 = 256;

/// The same for [`Class::Service`] while others have work.
const SERVICE_BUDGET: u32 = 16;

/// Urgent objects served between two that are not.
const URGENT_BUDGET: u32 = 16;

/// Turns in a row with nothing but bottom halves, none of which gets anything done, until the loop
/// is said to spin.
const VAIN_TURNS: u32 = 10_000;

/// How a loop goes about its work.
#[derive(Debug, Clone, Copy, Default)]
pub struct LoopPolicy {
    /// Polling before sleep.
    pub poll: PollPolicy,
    /// With a seed, the order of all that has none by promise is drawn by lot: for tests.
    pub shuffle: Option<u64>,
}

impl From<PollPolicy> for LoopPolicy {
    fn from(poll: PollPolicy) -> Self {
        Self { poll, shuffle: None }
    }
}

/// The loop itself; it lives and dies on one thread.
pub struct EventLoop {
    handle: LoopHandle,
    local: Local,
    pub(crate) readiness: Readiness,
    pub(crate) timers: Timers,
    pollers: Vec<Arc<Peeked>>,
    polling: Polling,
    shuffle: Option<Shuffle>,
    /// Tokens of ready fds.
    ready: Vec<u32>,
    due: Vec<Due>,
    /// By class: bottom halves taken from the inbox, whose turn has not come yet.
    queued: [Batch<Task>; 3],
    ring_watched: bool,
    /// Has there been something to do since idle callbacks ran?
    worked: bool,
    /// Until when the time of this thread has been accounted for.
    accounted: u64,
    /// When the file descriptors were last looked at.
    looked: u64,
    vain_turns: u32,
    /// What had been done when the vain turns began.
    done: u64,
}

impl fmt::Debug for EventLoop {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("EventLoop").field(&self.handle.name()).finish()
    }
}

/// What moves from one loop to another with its strand.
#[derive(Default)]
pub(crate) struct Sources {
    watched: Vec<Arc<Watched>>,
    alarms: Vec<Arc<Alarm>>,
    pollers: Vec<Arc<Peeked>>,
}

impl EventLoop {
    /// Makes the calling thread a loop: it may no longer block.
    pub fn new(name: &str, policy: impl Into<LoopPolicy>) -> io::Result<Self> {
        let policy = policy.into();
        reply::forbid_blocking();
        let handle = LoopHandle::new(name)?;
        let mut readiness = Readiness::new()?;
        readiness.watch_wakeups(handle.0.wake.as_raw_fd())?;
        let timers = Timers::new()?;
        readiness.watch_wakeups(timers.as_raw_fd())?;
        let now = Clock::Real.now();
        let local = Local {
            here: Some(handle.clone()),
            clock: Clock::Real,
            now,
            longest: [None; 2],
            counters: Arc::clone(handle.counters()),
            ring: None,
            ring_allowed: true,
            on_vcpu: false,
            polls: !policy.poll.max.is_zero(),
            budget: SERVE_BUDGET,
        };
        Ok(Self {
            handle,
            local,
            readiness,
            timers,
            pollers: Vec::new(),
            polling: Polling::new(policy.poll),
            shuffle: policy.shuffle.map(Shuffle::new),
            ready: Vec::with_capacity(64),
            due: Vec::new(),
            queued: [Batch::empty(), Batch::empty(), Batch::empty()],
            ring_watched: false,
            worked: true,
            accounted: now,
            looked: 0,
            vain_turns: 0,
            done: 0,
        })
    }

    /// A loop whose time stands still while it works and jumps to the next timer when it has
    /// nothing to do: a test of hours takes no time and always goes the same way. It never sleeps.
    pub fn in_virtual_time(name: &str, policy: impl Into<LoopPolicy>) -> io::Result<Self> {
        let mut event_loop = Self::new(name, policy)?;
        event_loop.local.clock = Clock::Virtual(event_loop.local.now);
        Ok(event_loop)
    }

    /// The time of this loop.
    pub fn now(&self) -> Instant {
        clock::instant(self.local.clock.now())
    }

    /// Where to send work.
    pub fn handle(&self) -> LoopHandle {
        self.handle.clone()
    }

    pub(crate) fn is(&self, handle: &LoopHandle) -> bool {
        self.handle == *handle
    }

    /// Turns until [`LoopHandle::stop`].
    pub fn run(mut self) {
        while !self.handle.is_to_stop() {
            self.turn();
        }
    }

    /// One turn.
    pub fn turn(&mut self) {
        self.park();
        self.local.counters.turns.add(1);
        self.local.longest = [None, self.local.longest[0]];
        self.readiness.take_ready(&mut self.ready);
        if let Some(shuffle) = &mut self.shuffle {
            shuffle.order(&mut self.ready);
            shuffle.dawdle();
        }
        self.dispatch_ready();
        self.dispatch_completions();
        self.dispatch_timers();
        self.dispatch_bottom_halves();
        self.submit();
        self.note_progress();
    }

    // Sources.

    pub(crate) fn watch(&mut self, watched: &Arc<Watched>) {
        if watched.is_gone() {
            return;
        }
        if let Err(error) = self.readiness.add(watched) {
            let name = self.handle.name();
            eprintln!("heddle: thread {name}: cannot watch a file descriptor: {error}");
        }
    }

    pub(crate) fn look_at(&mut self, peeked: &Arc<Peeked>) {
        if !peeked.is_gone() {
            self.pollers.push(Arc::clone(peeked));
        }
    }

    pub(crate) fn look_away_from(&mut self, peeked: &Arc<Peeked>) {
        self.pollers.retain(|it| !Arc::ptr_eq(it, peeked));
    }

    #[cfg(all(test, loom))]
    pub(crate) fn count_pollers(&self) -> usize {
        self.pollers.len()
    }

    /// Lets go of what belongs to `place`, which is moving away.
    pub(crate) fn detach(&mut self, place: &Arc<Place>) -> Sources {
        let is_its = |it: &mut Arc<Peeked>| Arc::ptr_eq(&it.place, place);
        Sources {
            watched: self.readiness.detach(place),
            alarms: self.timers.detach(place),
            pollers: self.pollers.extract_if(.., is_its).collect(),
        }
    }

    /// Takes on what another loop let go of. Each fd that is readable now fires once.
    pub(crate) fn attach(&mut self, sources: Sources) {
        sources.watched.iter().for_each(|watched| self.watch(watched));
        sources.alarms.iter().for_each(|alarm| self.timers.insert(alarm));
        sources.pollers.iter().for_each(|peeked| self.look_at(peeked));
    }

    // Parking.

    fn park(&mut self) {
        // After a callback the time is known, but not after a system call.
        let began = if self.local.ring.is_some() { self.local.look() } else { self.local.now };
        self.account(began, |counters| &counters.busy_ns);
        // Watched objects first and always: they have asked nobody to wake this loop.
        if self.peek() || self.timers.due(began) {
            if began - self.looked >= LOOK_PERIOD_NS || self.is_virtual() {
                self.readiness.look();
                self.looked = began;
            }
            return;
        }
        if self.poll(began) {
            return;
        }
        let settled = self.settle();
        self.run_idle();
        if settled && !self.has_work() {
            self.sleep(began);
        }
    }

    fn is_virtual(&self) -> bool {
        matches!(self.local.clock, Clock::Virtual(_))
    }

    fn has_work(&self) -> bool {
        self.handle.has_mail()
            || self.handle.is_to_stop()
            || self.queued.iter().any(|batch| !batch.is_empty())
            || self.local.ring.as_ref().is_some_and(|ring| ring.has_work())
    }

    /// Polls for as long as the policy says; true: there is work.
    fn poll(&mut self, began: u64) -> bool {
        let limit = self.polling.limit(began);
        self.local.counters.poll_pauses.add(self.polling.take_pauses());
        if limit.is_zero() || self.is_virtual() {
            return false;
        }
        let found = loop {
            let spin = |_| {
                std::hint::spin_loop();
                self.peek()
            };
            if (0..SPINS_PER_LOOK).any(spin) {
                self.readiness.look();
                break true;
            }
            if self.readiness.look() {
                break true;
            }
            let now = self.local.look();
            if self.timers.due(now) {
                break true;
            }
            if now - began >= limit.as_nanos() as u64 {
                break false;
            }
        };
        let counters = &self.local.counters;
        let outcome = if found { &counters.poll_hits } else { &counters.poll_misses };
        outcome.add(1);
        let now = self.local.look();
        self.polling.polled(Duration::from_nanos(now - began));
        self.account(now, |counters| &counters.poll_ns);
        found
    }

    /// Looks at all that lies in memory.
    fn peek(&self) -> bool {
        let mut found = self.has_work();
        for peeked in &self.pollers {
            if peeked.is_ready() {
                self.handle.post(&peeked.found, peeked.place.class);
                found = true;
            }
        }
        found
    }

    /// Lets every watched object ask for wake-ups again, before the loop sleeps. False: one of
    /// them found work instead and wants to be watched on.
    fn settle(&mut self) -> bool {
        let mut settled = true;
        for peeked in &self.pollers {
            if peeked.is_watched() {
                run(&peeked.settle, &mut self.local);
                settled &= !peeked.is_watched();
            }
        }
        self.submit();
        settled
    }

    /// Runs what waits for an idle moment, and not what that asks for in its turn.
    fn run_idle(&mut self) {
        // One that schedules itself again, with a longest delay, keeps the loop from its sleep, but
        // only to set a timer.
        if !std::mem::take(&mut self.worked) {
            return;
        }
        for node in self.handle.take_idle() {
            self.local.counters.idle_callbacks.add(1);
            run(&node, &mut self.local);
        }
        self.submit();
    }

    fn sleep(&mut self, began: u64) {
        self.worked = true;
        if let Clock::Virtual(now) = &mut self.local.clock {
            self.readiness.look();
            *now = self.timers.next().unwrap_or(*now).max(*now);
            self.local.look();
            return;
        }
        // What came after the last look at the clock did not take long.
        let now = self.local.now;
        self.account(now, |counters| &counters.busy_ns);
        self.spins_no_more();
        self.timers.set_alarm(now);
        if self.handle.falls_asleep() {
            self.local.counters.sleeps.add(1);
            self.readiness.wait();
        } else {
            self.readiness.look();
        }
        self.handle.woke_up();
        let woke = self.local.look();
        self.looked = woke;
        self.account(woke, |counters| &counters.sleep_ns);
        self.polling.waited(Duration::from_nanos(woke - began));
    }

    fn account(&mut self, now: u64, to: impl Fn(&Counters) -> &Counter) {
        to(&self.local.counters).add(now - self.accounted);
        self.accounted = now;
    }

    // The phases.

    fn dispatch_ready(&mut self) {
        if self.ready.is_empty() {
            return;
        }
        self.local.counters.fd_events.add(self.ready.len() as u64);
        let mut ready = std::mem::take(&mut self.ready);
        let class = |token: &u32| self.readiness.watched(*token).map(|it| it.place.class);
        ready.sort_by_key(class);
        for token in ready.drain(..) {
            if let Some(class) = self.readiness.watched(token).map(|it| it.place.class) {
                self.run_urgent(class);
            }
            if let Some(watched) = self.readiness.watched(token) {
                run(&watched.task, &mut self.local);
            }
        }
        self.ready = ready;
    }

    fn dispatch_completions(&mut self) {
        let Some(ring) = self.local.ring.as_mut() else { return };
        ring.reap();
        let mut fired = ring.take_fired();
        if let Some(shuffle) = &mut self.shuffle {
            shuffle.order(&mut fired);
        }
        for port in fired.drain(..) {
            run(port.event(), &mut self.local);
        }
        if let Some(ring) = self.local.ring.as_mut() {
            ring.give_back(fired);
        }
    }

    fn dispatch_timers(&mut self) {
        if self.timers.next().is_none() {
            return;
        }
        let now = self.local.now;
        let mut due = std::mem::take(&mut self.due);
        due.extend(std::iter::from_fn(|| self.timers.pop_due(now)));
        due.sort_by_key(|due| due.class);
        for Due { deadline, class, fire } in due.drain(..) {
            self.run_urgent(class);
            let counters = &self.local.counters;
            let late = self.local.now.saturating_sub(deadline);
            counters.timers.add(1);
            counters.timer_late_ns.add(late);
            counters.activity.timer_was_late(late, self.culprit());
            run(&fire, &mut self.local);
        }
        self.due = due;
    }

    /// Whose callback was most in the way of others, lately.
    fn culprit(&self) -> Option<Owner> {
        let recent = self.local.longest.iter().flatten();
        recent.max_by_key(|(_, took)| *took).map(|(owner, _)| *owner)
    }

    fn dispatch_bottom_halves(&mut self) {
        for class in Class::ALL {
            self.fetch(class);
        }
        let others = self.queued[..Class::Service as usize].iter().any(|batch| !batch.is_empty());
        for class in Class::ALL {
            let budget = match class {
                Class::Service if others => SERVICE_BUDGET,
                _ => PHASE_BUDGET,
            };
            let budget = self.shuffle.as_mut().map_or(budget, |it| it.below(budget));
            for _ in 0..budget {
                let Some(node) = self.queued[class as usize].next() else { break };
                self.run_urgent(class);
                self.run_bottom_half(&node);
            }
        }
    }

    /// Takes new mail, unless there is some left that came before.
    fn fetch(&mut self, class: Class) {
        let queued = &mut self.queued[class as usize];
        if queued.is_empty() {
            *queued = self.handle.take(class);
            if let Some(shuffle) = &mut self.shuffle {
                *queued = shuffle.batch(std::mem::take(queued));
            }
        }
    }

    /// Before something of a class that is not urgent: whatever is.
    fn run_urgent(&mut self, before: Class) {
        let waits =
            || !self.queued[Class::Realtime as usize].is_empty() || self.handle.has_urgent_mail();
        if before == Class::Realtime || !waits() {
            return;
        }
        for _ in 0..URGENT_BUDGET {
            self.fetch(Class::Realtime);
            let Some(node) = self.queued[Class::Realtime as usize].next() else { return };
            self.run_bottom_half(&node);
        }
    }

    fn run_bottom_half(&mut self, node: &Arc<Node<Task>>) {
        self.local.counters.bottom_halves.add(1);
        if let Task::Arm(f) = &node.value {
            return f(self);
        }
        self.worked = true;
        match &node.value {
            Task::Admin(f) => {
                f(self);
                self.local.look();
            }
            _ => run(node, &mut self.local),
        }
    }

    fn submit(&mut self) {
        let Some(ring) = self.local.ring.as_mut() else { return };
        ring.enter();
        if !self.ring_watched {
            // A ring that cannot be watched would lose completions while the loop sleeps.
            self.readiness
                .watch_wakeups(ring.as_raw_fd())
                .expect("an io_uring can be added to an epoll that has room for it");
            self.ring_watched = true;
        }
    }

    fn spins_no_more(&mut self) {
        if std::mem::take(&mut self.vain_turns) >= VAIN_TURNS {
            self.local.counters.activity.spins(None);
        }
    }

    /// Notices when the loop turns in circles.
    fn note_progress(&mut self) {
        let counters = &self.local.counters;
        let Counters { fd_events, timers, ring_completions, requests, completions, .. } =
            &**counters;
        let done = [fd_events, timers, ring_completions, requests, completions];
        let done = done.iter().fold(0, |sum: u64, counter| sum.wrapping_add(counter.get()));
        if done != self.done {
            self.worked = true;
            self.done = done;
            return self.spins_no_more();
        }
        self.vain_turns = self.vain_turns.saturating_add(1);
        if self.vain_turns == VAIN_TURNS {
            counters.activity.spins(self.culprit());
        }
    }
}

impl Drop for EventLoop {
    /// What is still queued may hold handles of this very loop, and answers that will never come
    /// now: lets go of it. Who posts from here on lets go of it himself.
    fn drop(&mut self) {
        self.handle.ends();
        self.queued.iter_mut().flatten().for_each(|node| node.value.let_go());
    }
}

fn run(node: &Arc<Node<Task>>, local: &mut Local) {
    if let Task::Run(serve) | Task::Visit { serve, .. } = &node.value {
        serve(&mut Cx::new(local));
    }
}

#[cfg(all(test, not(loom)))]
mod tests;
