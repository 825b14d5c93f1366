//! File descriptors: which are ready. Built on event-manager, which owns the epoll.

use std::io;
use std::os::fd::RawFd;
use std::sync::Arc;

use event_manager::{
    EventManager, EventOps, EventSet, Events, MutEventSubscriber, SubscriberId, SubscriberOps,
};

use crate::event_loop::Task;
use crate::inbox::Node;

/// Fds reported by one look.
const CAPACITY: usize = 256;

/// How an fd reports that it is readable.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Trigger {
    /// Once per write: for eventfds, which then need not be read.
    Edge,
    /// As long as it is readable: the callback must read it dry.
    Level,
}

/// Names a watched fd.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Token(pub(crate) u32);

/// The token of fds that only end a wait.
const WAKE_UP: Token = Token(u32::MAX);

/// The only subscriber of the event manager: it notes what is ready and runs nothing, because
/// callbacks run in the phase of the turn that is theirs.
struct Noted(Vec<Token>);

impl MutEventSubscriber for Noted {
    fn process(&mut self, events: Events, _: &mut EventOps<'_>) {
        self.0.push(Token(events.data()));
    }

    fn init(&mut self, _: &mut EventOps<'_>) {}
}

/// The watched fds of one loop.
pub(crate) struct Readiness {
    manager: EventManager<Noted>,
    id: SubscriberId,
    tasks: Vec<Option<Arc<Node<Task>>>>,
}

impl Readiness {
    pub(crate) fn new() -> io::Result<Self> {
        let mut manager = EventManager::new_with_capacity(CAPACITY)
            .map_err(|e| io::Error::other(e.to_string()))?;
        let id = manager.add_subscriber(Noted(Vec::with_capacity(CAPACITY)));
        Ok(Self { manager, id, tasks: Vec::new() })
    }

    /// Fires `task` when `fd` is readable, until [`Self::remove`].
    pub(crate) fn add(
        &mut self,
        fd: RawFd,
        trigger: Trigger,
        task: Arc<Node<Task>>,
    ) -> io::Result<Token> {
        let free = self.tasks.iter().position(Option::is_none).unwrap_or(self.tasks.len());
        let token = Token(u32::try_from(free).map_err(io::Error::other)?);
        self.register(fd, trigger, token)?;
        if free == self.tasks.len() {
            self.tasks.push(Some(task));
        } else {
            self.tasks[free] = Some(task);
        }
        Ok(token)
    }

    /// Lets `fd` end a wait, no more. Its readable state is somebody else's business.
    pub(crate) fn watch_wakeups(&mut self, fd: RawFd) -> io::Result<()> {
        self.register(fd, Trigger::Edge, WAKE_UP)
    }

    fn register(&mut self, fd: RawFd, trigger: Trigger, token: Token) -> io::Result<()> {
        let mut set = EventSet::IN;
        if trigger == Trigger::Edge {
            set |= EventSet::EDGE_TRIGGERED;
        }
        self.manager
            .event_ops(self.id)
            .and_then(|mut ops| ops.add(Events::with_data_raw(fd, token.0, set)))
            .map_err(|e| io::Error::other(format!("{e:?}")))
    }

    /// Stops watching. Must come before the fd is closed: event-manager panics on an event of an
    /// fd it does not know.
    pub(crate) fn remove(&mut self, fd: RawFd, token: Token) {
        if let Ok(mut ops) = self.manager.event_ops(self.id) {
            // Fails only for an fd that was never added.
            let _ = ops.remove(Events::with_data_raw(fd, token.0, EventSet::IN));
        }
        if let Some(task) = self.tasks.get_mut(token.0 as usize) {
            *task = None;
        }
    }

    /// Looks without waiting; true: something is ready.
    pub(crate) fn look(&mut self) -> bool {
        self.collect(0)
    }

    /// Waits until something is ready.
    pub(crate) fn wait(&mut self) {
        self.collect(-1);
    }

    fn collect(&mut self, timeout_ms: i32) -> bool {
        // Only EINTR and a closed epoll can fail here; the first is `Ok`, the second cannot be.
        self.manager.run_with_timeout(timeout_ms).is_ok_and(|count| count > 0)
    }

    /// Moves the tasks of all ready fds to `into`.
    pub(crate) fn take_ready(&mut self, into: &mut Vec<Arc<Node<Task>>>) {
        let Ok(noted) = self.manager.subscriber_mut(self.id) else { return };
        for token in noted.0.drain(..) {
            if let Some(Some(task)) = self.tasks.get(token.0 as usize) {
                into.push(Arc::clone(task));
            }
        }
    }
}
