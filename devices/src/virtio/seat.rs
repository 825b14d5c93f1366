//! Where a queue handler sits: a strand that outlives it.
//!
//! The seat exists as long as the device. The handler comes when the driver is ready and leaves
//! at a reset, so a notification reads only immutable data: an event of an empty seat does
//! nothing, and taking a seat always kicks once, for whatever was announced before.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use iothread::{Answer, Cx, Event, ExitCx, FdSource, LoopHandle, Port, Progress, Reply, Strand};

use super::QueueHandler;
use super::queue::RingIndices;

/// Which thread serves a group of queues. `L` names a loop.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Placement<L> {
    /// This loop.
    Loop(L),
    /// The vCPU thread that submits; completions and timers are this loop's.
    Vcpu {
        /// The loop of completions and timers.
        home: L,
    },
}

impl<L> Placement<L> {
    /// The loop that owns fds, timers and completions.
    pub fn home(&self) -> &L {
        match self {
            Self::Loop(id) | Self::Vcpu { home: id } => id,
        }
    }
}

/// The indices of queues at rest, published for whoever saves them.
#[derive(Debug)]
struct AtRest(Box<[AtomicU64]>);

impl AtRest {
    fn publish(&self, at: usize, indices: RingIndices) {
        let packed = u64::from(indices.next_available) << 16 | u64::from(indices.next_used);
        self.0[at].store(packed, Ordering::Release);
    }

    fn read(&self, at: usize) -> RingIndices {
        let packed = self.0[at].load(Ordering::Acquire);
        RingIndices { next_available: (packed >> 16) as u16, next_used: packed as u16 }
    }
}

struct Body {
    handler: Option<Box<dyn QueueHandler>>,
    /// Take no new work.
    rest: bool,
    /// Take no new work, and leave when nothing is in flight.
    leave: bool,
    /// Who wants to know when nothing is in flight.
    waiting: Vec<Answer<()>>,
    /// The kick that is running again on the home loop has been counted.
    counted: bool,
    at_rest: Arc<AtRest>,
    first_queue: u16,
}

impl Body {
    fn kick(&mut self, cx: &mut Cx<'_>) -> Progress {
        if !std::mem::take(&mut self.counted) {
            cx.counters().kicks.add(1);
        }
        let progress = self.work(cx, |handler, cx| handler.kick(cx));
        self.counted = progress != Progress::Idle;
        progress
    }

    fn work(
        &mut self,
        cx: &mut Cx<'_>,
        f: impl FnOnce(&mut dyn QueueHandler, &mut Cx<'_>) -> Progress,
    ) -> Progress {
        let Some(handler) = self.handler.as_deref_mut() else { return Progress::Idle };
        let progress = f(handler, cx);
        self.settle();
        progress
    }

    /// Polling ended in vain: ask the driver to kick again. True: it should have, already.
    fn rearm(&mut self) -> bool {
        let Some(handler) = self.handler.as_deref_mut() else { return false };
        handler.queues().iter_mut().fold(false, |found, queue| queue.rearm() | found)
    }

    fn is_held(&self) -> bool {
        self.rest || self.leave
    }

    fn set_rest(&mut self, rest: bool) {
        self.rest = rest;
        self.hold();
    }

    fn set_leave(&mut self) {
        self.leave = true;
        self.hold();
    }

    fn hold(&mut self) {
        let held = self.is_held();
        if let Some(handler) = self.handler.as_deref_mut() {
            handler.queues().iter_mut().for_each(|queue| queue.hold(held));
        }
        self.settle();
    }

    /// If nothing is in flight any more: tells those who wait for it.
    fn settle(&mut self) {
        if !self.is_held() {
            return;
        }
        if let Some(handler) = self.handler.as_deref_mut() {
            if handler.in_flight() > 0 {
                return;
            }
            for queue in handler.queues() {
                self.at_rest
                    .publish(usize::from(queue.index() - self.first_queue), queue.indices());
            }
        }
        if std::mem::take(&mut self.leave) {
            self.handler = None;
        }
        self.waiting.drain(..).for_each(|answer| answer.give(()));
    }
}

/// The strand of one group of queues, with the events that enter it.
pub struct Seat {
    strand: Strand<Body>,
    kick: Event<Body>,
    rearm: Event<Body>,
    port: Arc<Port>,
    at_rest: Arc<AtRest>,
    placement: Placement<LoopHandle>,
}

impl fmt::Debug for Seat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Seat").field("placement", &self.placement).finish_non_exhaustive()
    }
}

impl Seat {
    /// An empty seat, named as its part of the device, for the queues from `first_queue`, `queues` of them, that have `slots`
    /// requests in flight at the most.
    pub fn new(
        name: &str,
        placement: Placement<LoopHandle>,
        first_queue: u16,
        queues: usize,
        slots: u16,
    ) -> Self {
        let at_rest = Arc::new(AtRest((0..queues).map(|_| AtomicU64::new(0)).collect()));
        let body = Body {
            handler: None,
            rest: false,
            leave: false,
            waiting: Vec::new(),
            counted: false,
            at_rest: Arc::clone(&at_rest),
            first_queue,
        };
        let strand = Strand::new(name, placement.home(), body);
        let kick = strand.event(Body::kick);
        let found = kick.clone();
        let rearm = strand.event(move |body: &mut Body, _| {
            // Not right here: what a kick leaves to do is done by running the kick again.
            if body.rearm() {
                found.schedule();
            }
            Progress::Idle
        });
        let completed =
            strand.event(|body: &mut Body, cx| body.work(cx, |handler, cx| handler.completed(cx)));
        let port = Port::new(slots, &completed);
        Self { strand, kick, rearm, port, at_rest, placement }
    }

    /// Which thread serves it.
    pub fn placement(&self) -> &Placement<LoopHandle> {
        &self.placement
    }

    /// The driver kicked, and this thread has the exit: serve it here, or on the seat's loop.
    pub fn notify(&self, exit: &mut ExitCx<'_>) {
        match self.placement {
            Placement::Vcpu { .. } => self.kick.run_here(exit),
            Placement::Loop(_) => self.kick.schedule(),
        }
    }

    /// Lets `doorbell` kick, without an exit to user space.
    pub fn watch(&self, doorbell: std::os::fd::OwnedFd) -> FdSource {
        self.kick.on_fd(doorbell, iothread::Trigger::Edge)
    }

    /// Takes in the handler that `make` gives, on the home loop, and kicks it once.
    pub fn start(&self, make: impl FnOnce(Arc<Port>) -> Box<dyn QueueHandler> + Send + 'static) {
        let port = Arc::clone(&self.port);
        let polled = matches!(self.placement, Placement::Loop(_));
        let (kick, rearm) = (self.kick.clone(), self.rearm.clone());
        drop(self.strand.call(move |body, cx| {
            let mut handler = make(port);
            for queue in handler.queues() {
                queue.hold(body.is_held());
                if polled && cx.polls() {
                    queue.set_poller(kick.on_poll(queue.peeker(), &rearm));
                }
            }
            body.handler = Some(handler);
            kick.schedule();
        }));
    }

    /// Takes no new work; answers when nothing is in flight.
    pub fn pause(&self) -> Reply<()> {
        self.ask(|body| body.set_rest(true))
    }

    /// Takes work again, beginning with what has arrived.
    pub fn resume(&self) {
        let kick = self.kick.clone();
        drop(self.strand.call(move |body, _| {
            body.set_rest(false);
            kick.schedule(); // not before: one that is queued already comes too early
        }));
    }

    /// Takes no new work; the handler leaves when nothing is in flight, then this answers.
    pub fn stop(&self) -> Reply<()> {
        self.ask(Body::set_leave)
    }

    fn ask(&self, wish: impl FnOnce(&mut Body) + Send + 'static) -> Reply<()> {
        let (answer, reply) = Reply::pair();
        drop(self.strand.call(move |body, _| {
            body.waiting.push(answer);
            wish(body);
        }));
        reply
    }

    /// How far queue `nth` of the group had come when it was last at rest.
    pub fn indices_at_rest(&self, nth: usize) -> RingIndices {
        self.at_rest.read(nth)
    }
}
