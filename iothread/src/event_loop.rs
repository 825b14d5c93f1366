//! The loop: one type for every thread that is not a vCPU.
//!
//! One turn is: park (not at all if work is queued, else poll, then sleep); ready fds and ring
//! completions; timers due at one `now`; the bottom halves that were queued when their phase
//! began; one `io_uring_enter` for all that was submitted. Each phase works on a snapshot, so
//! nothing can starve another phase, and no callback can run a loop.

use std::fmt;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::counters::Counters;
use crate::cx::{Cx, Local};
use crate::inbox::{Inbox, Node};
use crate::poll::{PollPolicy, Polling};
use crate::readiness::{Readiness, Token};
use crate::reply::{self, Reply};
use crate::sync::{AtomicBool, Ordering::*};
use crate::timer::Timers;
use crate::wake::{Owed, Wake};

pub use crate::readiness::Trigger;

/// Peeks between two looks at the file descriptors while polling.
const SPINS_PER_LOOK: u32 = 64;

/// Events that others left with a strand served in one go, before other work of the loop.
const SERVE_BUDGET: u32 = 64;

/// Something a loop can be asked to do.
pub(crate) enum Task {
    /// Work; every thread can run it.
    Run(Box<dyn Fn(&mut Cx<'_>) + Send + Sync>),
    /// A change to the loop itself.
    Admin(Box<dyn Fn(&mut EventLoop) + Send + Sync>),
}

impl Task {
    pub(crate) fn run(f: impl Fn(&mut Cx<'_>) + Send + Sync + 'static) -> Self {
        Self::Run(Box::new(f))
    }
}

struct Shared {
    name: String,
    inbox: Inbox<Task>,
    state: Wake,
    wake: EventFd,
    stop: AtomicBool,
    counters: Arc<Counters>,
}

/// A loop, seen from outside: where to send work. Cheap to clone.
#[derive(Clone)]
pub struct LoopHandle(Arc<Shared>);

impl fmt::Debug for LoopHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("LoopHandle").field(&self.0.name).finish()
    }
}

impl LoopHandle {
    /// The loop's name.
    pub fn name(&self) -> &str {
        &self.0.name
    }

    /// The counters of the loop's thread.
    pub fn counters(&self) -> &Arc<Counters> {
        &self.0.counters
    }

    /// Ends the loop after the turn it is in.
    pub fn stop(&self) {
        self.0.stop.store(true, Release);
        self.wake();
    }

    /// Answers when all that was sent to the loop before has been run.
    pub fn barrier(&self) -> Reply<()> {
        let (answer, reply) = Reply::pair();
        self.admin(move |_| answer.give(()));
        reply
    }

    /// Queues a node; wakes the loop only if it sleeps.
    pub(crate) fn post(&self, node: &Arc<Node<Task>>) {
        self.0.inbox.push(node);
        self.wake();
    }

    /// Sees to it that the loop notices what this thread did before.
    fn wake(&self) {
        match self.0.state.posted() {
            Owed::Nothing => {}
            Owed::Signal => {
                // An eventfd refuses only when 2^64 - 2 wake-ups are pending: it is readable then.
                let _ = self.0.wake.write(1);
            }
            Owed::Removal => drop(self.0.inbox.take()),
        }
    }

    fn admin(&self, f: impl FnOnce(&mut EventLoop) + Send + 'static) {
        let once = crate::strand::Once::new(f);
        self.post(&Arc::new(Node::new(Task::Admin(Box::new(move |event_loop| {
            if let Some(f) = once.take() {
                f(event_loop);
            }
        })))));
    }

    pub(crate) fn add_fd(&self, fd: OwnedFd, trigger: Trigger, task: &Arc<Node<Task>>) -> FdSource {
        let fd = Arc::new(fd);
        let registered = Arc::<OnceLock<Token>>::default();
        let (watched, task, slot) = (Arc::clone(&fd), Arc::clone(task), Arc::clone(&registered));
        self.admin(move |event_loop| {
            match event_loop.readiness.add(watched.as_raw_fd(), trigger, task) {
                Ok(token) => drop(slot.set(token)),
                Err(error) => eprintln!(
                    "heddle: thread {}: cannot watch a file descriptor: {error}",
                    event_loop.handle.name()
                ),
            }
        });
        FdSource { fd, registered, home: self.clone() }
    }

    pub(crate) fn add_poller(
        &self,
        ready: Box<dyn Fn() -> bool + Send + Sync>,
        found: &Arc<Node<Task>>,
        settle: &Arc<Node<Task>>,
    ) -> Poller {
        let watching = Arc::new(AtomicBool::new(false));
        let entry = PollEntry {
            ready,
            watching: Arc::clone(&watching),
            found: Arc::clone(found),
            settle: Arc::clone(settle),
        };
        self.admin(move |event_loop| event_loop.pollers.push(entry));
        Poller { watching, home: self.clone() }
    }
}

/// A file descriptor that a loop watches until this is dropped.
#[derive(Debug)]
pub struct FdSource {
    fd: Arc<OwnedFd>,
    /// Set once the loop watches it.
    registered: Arc<OnceLock<Token>>,
    home: LoopHandle,
}

impl AsFd for FdSource {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Drop for FdSource {
    fn drop(&mut self) {
        // The loop closes the fd only after it has stopped watching it.
        let (fd, registered) = (Arc::clone(&self.fd), Arc::clone(&self.registered));
        self.home.admin(move |event_loop| {
            if let Some(token) = registered.get() {
                event_loop.readiness.remove(fd.as_raw_fd(), *token);
            }
        });
    }
}

struct PollEntry {
    ready: Box<dyn Fn() -> bool + Send + Sync>,
    watching: Arc<AtomicBool>,
    found: Arc<Node<Task>>,
    settle: Arc<Node<Task>>,
}

/// Something a loop looks at while it polls, so that whoever produces work need not wake it.
///
/// While it is watched, the loop calls `ready` again and again before it sleeps and fires the
/// event when it says yes. If polling ends in vain, the loop fires the `settle` event instead:
/// the object must then ask its producer for wake-ups again and look once more.
#[derive(Debug)]
pub struct Poller {
    watching: Arc<AtomicBool>,
    home: LoopHandle,
}

impl Poller {
    /// Says whether the loop should look. Called with the strand held.
    pub fn watch(&self, on: bool) {
        self.watching.store(on, Release);
    }
}

impl Drop for Poller {
    fn drop(&mut self) {
        self.watch(false);
        let watching = Arc::clone(&self.watching);
        self.home.admin(move |event_loop| {
            event_loop.pollers.retain(|entry| !Arc::ptr_eq(&entry.watching, &watching));
        });
    }
}

/// The loop itself; it lives and dies on one thread.
pub struct EventLoop {
    handle: LoopHandle,
    local: Local,
    pub(crate) readiness: Readiness,
    pub(crate) timers: Timers,
    pollers: Vec<PollEntry>,
    polling: Polling,
    ready: Vec<Arc<Node<Task>>>,
    ring_watched: bool,
    /// Until when the time of this thread has been accounted for.
    accounted: Instant,
}

impl fmt::Debug for EventLoop {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("EventLoop").field(&self.handle.0.name).finish()
    }
}

impl EventLoop {
    /// Makes the calling thread a loop: it may no longer block.
    pub fn new(name: &str, poll: PollPolicy) -> io::Result<Self> {
        reply::forbid_blocking();
        let counters = Arc::<Counters>::default();
        let wake = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        let mut readiness = Readiness::new()?;
        readiness.watch_wakeups(wake.as_raw_fd())?;
        let timers = Timers::new()?;
        readiness.watch_wakeups(timers.as_raw_fd())?;
        let local = Local {
            counters: Arc::clone(&counters),
            ring: None,
            ring_allowed: true,
            on_vcpu: false,
            polls: !poll.max.is_zero(),
            budget: SERVE_BUDGET,
        };
        let shared = Shared {
            name: name.to_owned(),
            inbox: Inbox::new(),
            state: Wake::awake(),
            wake,
            stop: AtomicBool::new(false),
            counters,
        };
        Ok(Self {
            handle: LoopHandle(Arc::new(shared)),
            local,
            readiness,
            timers,
            pollers: Vec::new(),
            polling: Polling::new(poll),
            ready: Vec::with_capacity(64),
            ring_watched: false,
            accounted: Instant::now(),
        })
    }

    /// Where to send work.
    pub fn handle(&self) -> LoopHandle {
        self.handle.clone()
    }

    /// Turns until [`LoopHandle::stop`].
    pub fn run(mut self) {
        while !self.handle.0.stop.load(Acquire) {
            self.turn();
        }
    }

    /// One turn.
    pub fn turn(&mut self) {
        self.park();
        self.local.counters.turns.add(1);
        self.dispatch_ready();
        self.dispatch_completions();
        self.dispatch_timers();
        self.dispatch_bottom_halves();
        self.submit();
    }

    fn park(&mut self) {
        let began = Instant::now();
        self.account(began, |counters| &counters.busy_ns);
        // Watched objects first and always: they have asked nobody to wake this loop.
        if self.peek() || self.timers.due(began) {
            self.readiness.look();
            return;
        }
        if self.poll(began) {
            return;
        }
        if !self.settle() || self.has_work() {
            self.readiness.look();
            return;
        }
        self.sleep(began);
    }

    fn has_work(&self) -> bool {
        !self.handle.0.inbox.is_empty()
            || self.local.ring.as_ref().is_some_and(|ring| ring.has_work())
    }

    /// Polls for as long as the policy says; true: there is work.
    fn poll(&mut self, began: Instant) -> bool {
        let limit = self.polling.limit();
        if limit.is_zero() {
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
            let now = Instant::now();
            if self.timers.due(now) {
                break true;
            }
            if now.duration_since(began) >= limit {
                break false;
            }
        };
        let counters = &self.local.counters;
        let outcome = if found { &counters.poll_hits } else { &counters.poll_misses };
        outcome.add(1);
        self.account(Instant::now(), |counters| &counters.poll_ns);
        found
    }

    /// Looks at all that lies in memory.
    fn peek(&self) -> bool {
        let mut found = self.has_work();
        for entry in &self.pollers {
            if entry.watching.load(Acquire) && (entry.ready)() {
                self.handle.0.inbox.push(&entry.found);
                found = true;
            }
        }
        found
    }

    /// Lets every watched object ask for wake-ups again, before the loop sleeps. False: one of
    /// them found work instead and wants to be watched on.
    fn settle(&mut self) -> bool {
        let mut settled = true;
        for entry in &self.pollers {
            if entry.watching.load(Acquire) {
                run(&entry.settle, &mut self.local);
                settled &= !entry.watching.load(Acquire);
            }
        }
        self.submit();
        settled
    }

    fn sleep(&mut self, began: Instant) {
        self.account(Instant::now(), |counters| &counters.busy_ns);
        self.timers.set_alarm(Instant::now());
        self.handle.0.state.falls_asleep();
        if self.handle.0.inbox.is_empty() && !self.handle.0.stop.load(Acquire) {
            self.local.counters.sleeps.add(1);
            self.readiness.wait();
        } else {
            self.readiness.look();
        }
        self.handle.0.state.woke_up();
        let woke = Instant::now();
        self.account(woke, |counters| &counters.sleep_ns);
        self.polling.waited(woke.duration_since(began));
    }

    fn account(&mut self, now: Instant, to: impl Fn(&Counters) -> &crate::counters::Counter) {
        let spent = now.saturating_duration_since(self.accounted);
        to(&self.local.counters).add(u64::try_from(spent.as_nanos()).unwrap_or(u64::MAX));
        self.accounted = now;
    }

    fn dispatch_ready(&mut self) {
        self.readiness.take_ready(&mut self.ready);
        self.local.counters.fd_events.add(self.ready.len() as u64);
        for node in self.ready.drain(..) {
            run(&node, &mut self.local);
        }
    }

    fn dispatch_completions(&mut self) {
        let Some(ring) = self.local.ring.as_mut() else { return };
        ring.reap();
        let mut fired = ring.take_fired();
        for port in fired.drain(..) {
            run(port.event(), &mut self.local);
        }
        if let Some(ring) = self.local.ring.as_mut() {
            ring.give_back(fired);
        }
    }

    fn dispatch_timers(&mut self) {
        let now = Instant::now();
        while let Some(node) = self.timers.pop_due(now) {
            self.local.counters.timers.add(1);
            run(&node, &mut self.local);
        }
    }

    fn dispatch_bottom_halves(&mut self) {
        for node in self.handle.clone().0.inbox.take() {
            self.local.counters.bottom_halves.add(1);
            match &node.value {
                Task::Run(f) => f(&mut Cx::new(&mut self.local)),
                Task::Admin(f) => f(self),
            }
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
}

impl Drop for EventLoop {
    /// What is still queued may hold handles of this very loop, and answers that will never come
    /// now: lets go of it. Who posts from here on lets go of it himself.
    fn drop(&mut self) {
        self.handle.0.state.ended();
        drop(self.handle.0.inbox.take());
    }
}

fn run(node: &Arc<Node<Task>>, local: &mut Local) {
    if let Task::Run(f) = &node.value {
        f(&mut Cx::new(local));
    }
}

#[cfg(test)]
mod tests;
