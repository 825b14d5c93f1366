//! What fires events on a loop: file descriptors, and memory that is looked at while polling.

use std::fmt;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use crate::handle::Task;
use crate::inbox::Node;
use crate::place::Place;
use crate::sync::{AtomicBool, Ordering::*};

/// How an fd reports that it is readable.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Trigger {
    /// Once per write: for eventfds, which then need not be read.
    Edge,
    /// As long as it is readable: the callback must read it dry.
    Level,
}

/// A file descriptor that fires a task.
pub(crate) struct Watched {
    pub(crate) fd: OwnedFd,
    pub(crate) trigger: Trigger,
    pub(crate) task: Arc<Node<Task>>,
    pub(crate) place: Arc<Place>,
    /// Nobody wants it any more.
    gone: AtomicBool,
}

/// A file descriptor that a loop watches until this is dropped.
pub struct FdSource(Arc<Watched>);

impl fmt::Debug for FdSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("FdSource").field(&self.0.fd).finish()
    }
}

impl AsFd for FdSource {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.fd.as_fd()
    }
}

impl FdSource {
    pub(crate) fn new(
        fd: OwnedFd,
        trigger: Trigger,
        task: &Arc<Node<Task>>,
        place: &Arc<Place>,
    ) -> Self {
        let gone = AtomicBool::new(false);
        let (task, place) = (Arc::clone(task), Arc::clone(place));
        let watched = Arc::new(Watched { fd, trigger, task, place, gone });
        let new = Arc::clone(&watched);
        watched.place.on_home(move |event_loop| event_loop.watch(&new));
        Self(watched)
    }
}

impl Drop for FdSource {
    fn drop(&mut self) {
        self.0.gone.store(true, Release);
        // The loop closes the fd only after it has stopped watching it.
        let watched = Arc::clone(&self.0);
        self.0.place.on_home(move |event_loop| event_loop.readiness.remove(&watched));
    }
}

impl Watched {
    pub(crate) fn is_gone(&self) -> bool {
        self.gone.load(Acquire)
    }
}

/// Something that is looked at while polling.
pub(crate) struct Peeked {
    ready: Box<dyn Fn() -> bool + Send + Sync>,
    watching: AtomicBool,
    gone: AtomicBool,
    pub(crate) found: Arc<Node<Task>>,
    pub(crate) settle: Arc<Node<Task>>,
    pub(crate) place: Arc<Place>,
}

impl Peeked {
    pub(crate) fn is_watched(&self) -> bool {
        self.watching.load(Acquire)
    }

    pub(crate) fn is_ready(&self) -> bool {
        self.is_watched() && (self.ready)()
    }

    pub(crate) fn is_gone(&self) -> bool {
        self.gone.load(Acquire)
    }
}

/// Something a loop looks at while it polls, so that whoever produces work need not wake it.
///
/// While it is watched, the loop calls `ready` again and again before it sleeps and fires the
/// event when it says yes. If polling ends in vain, the loop fires the `settle` event instead:
/// the object must then ask its producer for wake-ups again and look once more.
pub struct Poller(Arc<Peeked>);

impl fmt::Debug for Poller {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Poller").field(&self.0.watching).finish()
    }
}

impl Poller {
    pub(crate) fn new(
        ready: Box<dyn Fn() -> bool + Send + Sync>,
        found: &Arc<Node<Task>>,
        settle: &Arc<Node<Task>>,
        place: &Arc<Place>,
    ) -> Self {
        let peeked = Arc::new(Peeked {
            ready,
            watching: AtomicBool::new(false),
            gone: AtomicBool::new(false),
            found: Arc::clone(found),
            settle: Arc::clone(settle),
            place: Arc::clone(place),
        });
        let new = Arc::clone(&peeked);
        place.on_home(move |event_loop| event_loop.look_at(&new));
        Self(peeked)
    }

    /// Says whether the loop should look. Called with the strand held.
    pub fn watch(&self, on: bool) {
        self.0.watching.store(on, Release);
    }
}

impl Drop for Poller {
    fn drop(&mut self) {
        self.watch(false);
        self.0.gone.store(true, Release);
        let peeked = Arc::clone(&self.0);
        self.0.place.on_home(move |event_loop| event_loop.look_away_from(&peeked));
    }
}
