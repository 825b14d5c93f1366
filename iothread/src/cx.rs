//! What a callback may use of the thread it happens to run on.

use std::marker::PhantomData;
use std::sync::Arc;
use std::time::Instant;

use crate::activity::Owner;
use crate::clock::{self, Clock};
use crate::counters::Counters;
use crate::handle::LoopHandle;
use crate::reply;
use crate::ring::Ring;

/// What belongs to a thread: its counters, its ring, and how it treats strands.
#[derive(Debug)]
pub(crate) struct Local {
    /// The loop, on threads that have one.
    pub(crate) here: Option<LoopHandle>,
    pub(crate) clock: Clock,
    /// When this thread last looked at the clock.
    pub(crate) now: u64,
    /// The longest callback of this turn and the one before.
    pub(crate) longest: [Longest; 2],
    pub(crate) counters: Arc<Counters>,
    pub(crate) ring: Option<Ring>,
    /// May a ring be made here on first use?
    pub(crate) ring_allowed: bool,
    /// Is this a vCPU thread?
    pub(crate) on_vcpu: bool,
    /// Does this thread poll before it sleeps?
    pub(crate) polls: bool,
    /// Events that others left with a strand held here, served before it is handed to its home.
    pub(crate) budget: u32,
}

/// A callback and the nanoseconds it took.
pub(crate) type Longest = Option<(Owner, u64)>;

impl Local {
    /// Is this the thread of that loop?
    pub(crate) fn is_at(&self, home: &LoopHandle) -> bool {
        self.here.as_ref() == Some(home)
    }

    /// Looks at the clock.
    pub(crate) fn look(&mut self) -> u64 {
        self.now = self.clock.now();
        self.now
    }

    /// Runs one callback of `owner`, and takes the time.
    pub(crate) fn timed<R>(&mut self, owner: Owner, callback: impl FnOnce(&mut Cx<'_>) -> R) -> R {
        // A loop has looked at the clock just before, a vCPU has been in the guest.
        let began = if self.on_vcpu { self.look() } else { self.now };
        self.counters.activity.begin(owner, began);
        let result = callback(&mut Cx::new(self));
        let took = self.look() - began;
        self.counters.activity.end(owner, took);
        if self.longest[0].is_none_or(|(_, longest)| took > longest) {
            self.longest[0] = Some((owner, took));
        }
        result
    }
}

/// The thread a callback runs on. It exists only while the callback runs and cannot leave the
/// thread; it gives no access to the loop, so nothing can run a loop inside a callback.
#[derive(Debug)]
pub struct Cx<'a> {
    pub(crate) local: &'a mut Local,
    _not_send: PhantomData<*mut ()>,
}

impl<'a> Cx<'a> {
    pub(crate) fn new(local: &'a mut Local) -> Self {
        Self { local, _not_send: PhantomData }
    }

    /// The io_uring of this thread, made on first use.
    ///
    /// `None` on a thread that has none (a vCPU): answer [`Progress::Home`](crate::Progress) and
    /// be run again on the home loop. `None` also where the kernel refuses to make one.
    pub fn ring(&mut self) -> Option<&mut Ring> {
        if self.local.ring.is_none() && self.local.ring_allowed {
            match Ring::new(&self.local.counters) {
                Ok(ring) => self.local.ring = Some(ring),
                Err(error) => {
                    self.local.ring_allowed = false;
                    let thread = std::thread::current();
                    let name = thread.name().unwrap_or("?");
                    eprintln!("heddle: thread {name}: no io_uring, I/O blocks it: {error}");
                }
            }
        }
        self.local.ring.as_mut()
    }

    /// The counters of this thread.
    pub fn counters(&self) -> &Counters {
        &self.local.counters
    }

    /// The time on this thread, as it was when the callback began.
    pub fn now(&self) -> Instant {
        clock::instant(self.local.now)
    }

    /// Is this a vCPU thread, whose time is the guest's?
    pub fn on_vcpu(&self) -> bool {
        self.local.on_vcpu
    }

    /// Will this thread look at its [`Poller`](crate::Poller)s before it sleeps?
    pub fn polls(&self) -> bool {
        self.local.polls
    }
}

/// A vCPU thread, seen as a place to run callbacks. Its park is `KVM_RUN`.
#[derive(Debug)]
pub struct VcpuLoop {
    local: Local,
}

impl VcpuLoop {
    /// Makes the calling thread a vCPU thread: it may run callbacks and may no longer block.
    pub fn enter() -> Self {
        reply::forbid_blocking();
        Self {
            local: Local {
                here: None,
                clock: Clock::Real,
                now: 0,
                longest: [None; 2],
                counters: Arc::default(),
                ring: None,
                ring_allowed: false,
                on_vcpu: true,
                polls: false,
                budget: 2,
            },
        }
    }

    /// As [`enter`](Self::enter), with another budget.
    #[cfg(all(test, loom))]
    pub(crate) fn with_budget(budget: u32) -> Self {
        let mut vcpu = Self::enter();
        vcpu.local.budget = budget;
        vcpu
    }

    /// The counters of this thread.
    pub fn counters(&self) -> &Arc<Counters> {
        &self.local.counters
    }

    /// The right to run a callback here; taken once per exit from the guest.
    pub fn exit(&mut self) -> ExitCx<'_> {
        ExitCx { cx: Cx::new(&mut self.local) }
    }
}

/// An exit of a vCPU that is being handled: the right to run callbacks *here*, on this thread.
#[derive(Debug)]
pub struct ExitCx<'a> {
    pub(crate) cx: Cx<'a>,
}

impl ExitCx<'_> {
    /// The counters of this thread.
    pub fn counters(&self) -> &Counters {
        self.cx.counters()
    }
}
