//! File descriptors: which are ready. Built on event-manager, which owns the epoll.

use std::cell::RefCell;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::rc::Rc;
use std::sync::Arc;

use event_manager::{
    EventManager, EventOps, EventSet, Events, MutEventSubscriber, SubscriberId, SubscriberOps,
};

use crate::place::Place;
use crate::source::{Trigger, Watched};

/// Fds reported by one look.
const CAPACITY: usize = 256;

/// The token of fds that only end a wait.
const WAKE_UP: u32 = u32::MAX;

/// The only subscriber of the event manager: it notes what is ready and runs nothing, because
/// callbacks run in the phase of the turn that is theirs.
struct Noted(Rc<RefCell<Vec<u32>>>);

impl MutEventSubscriber for Noted {
    fn process(&mut self, events: Events, _: &mut EventOps<'_>) {
        self.0.borrow_mut().push(events.data());
    }

    fn init(&mut self, _: &mut EventOps<'_>) {}
}

/// The watched fds of one loop.
pub(crate) struct Readiness {
    manager: EventManager<Noted>,
    id: SubscriberId,
    /// Tokens of ready fds: what the subscriber has noted.
    noted: Rc<RefCell<Vec<u32>>>,
    /// By token.
    watched: Vec<Option<Arc<Watched>>>,
}

impl Readiness {
    pub(crate) fn new() -> io::Result<Self> {
        let mut manager = EventManager::new_with_capacity(CAPACITY)
            .map_err(|e| io::Error::other(e.to_string()))?;
        let noted = Rc::new(RefCell::new(Vec::with_capacity(CAPACITY)));
        let id = manager.add_subscriber(Noted(Rc::clone(&noted)));
        Ok(Self { manager, id, noted, watched: Vec::new() })
    }

    /// Reports an fd when it is readable, until [`Self::remove`].
    pub(crate) fn add(&mut self, watched: &Arc<Watched>) -> io::Result<()> {
        let free = self.watched.iter().position(Option::is_none).unwrap_or(self.watched.len());
        let token = u32::try_from(free).map_err(io::Error::other)?;
        self.register(watched.fd.as_raw_fd(), watched.trigger, token)?;
        if free == self.watched.len() {
            self.watched.push(None);
        }
        self.watched[free] = Some(Arc::clone(watched));
        Ok(())
    }

    /// Lets `fd` end a wait, no more. Its readable state is somebody else's business.
    pub(crate) fn watch_wakeups(&mut self, fd: RawFd) -> io::Result<()> {
        self.register(fd, Trigger::Edge, WAKE_UP)
    }

    fn register(&mut self, fd: RawFd, trigger: Trigger, token: u32) -> io::Result<()> {
        let mut set = EventSet::IN;
        if trigger == Trigger::Edge {
            set |= EventSet::EDGE_TRIGGERED;
        }
        self.manager
            .event_ops(self.id)
            .and_then(|mut ops| ops.add(Events::with_data_raw(fd, token, set)))
            .map_err(|e| io::Error::other(format!("{e:?}")))
    }

    /// Stops watching. Must come before the fd is closed: event-manager panics on an event of an
    /// fd it does not know.
    pub(crate) fn remove(&mut self, watched: &Arc<Watched>) {
        let is_it =
            |it: &Option<Arc<Watched>>| it.as_ref().is_some_and(|it| Arc::ptr_eq(it, watched));
        if let Some(token) = self.watched.iter().position(is_it) {
            self.watched[token] = None;
            if let Ok(mut ops) = self.manager.event_ops(self.id) {
                let fd = watched.fd.as_raw_fd();
                // Fails only for an fd that was never added.
                let _ = ops.remove(Events::with_data_raw(fd, token as u32, EventSet::IN));
            }
        }
    }

    /// Stops watching the fds of a place that is moving away.
    pub(crate) fn detach(&mut self, place: &Arc<Place>) -> Vec<Arc<Watched>> {
        let all = self.watched.iter().flatten();
        let moving: Vec<_> =
            all.filter(|it| Arc::ptr_eq(&it.place, place)).map(Arc::clone).collect();
        moving.iter().for_each(|watched| self.remove(watched));
        moving
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

    /// Moves the tokens of all ready fds to the end of `into`.
    pub(crate) fn take_ready(&mut self, into: &mut Vec<u32>) {
        into.append(&mut self.noted.borrow_mut());
        into.retain(|token| self.watched(*token).is_some());
    }

    /// Who has this token, if anybody has.
    pub(crate) fn watched(&self, token: u32) -> Option<&Watched> {
        self.watched.get(token as usize)?.as_deref()
    }
}
