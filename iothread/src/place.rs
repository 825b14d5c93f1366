//! Where a strand lives: its present home, and how things get there.

#![expect(unsafe_code, reason = "the present home is read through a pointer, without a lock")]

use std::sync::Arc;
use std::sync::atomic::Ordering::*;

use crate::activity::Owner;
use crate::class::Class;
use crate::event_loop::EventLoop;
use crate::handle::{LoopHandle, Task};
use crate::inbox::Node;
use crate::sync::AtomicPtr;

/// The home of one strand and of everything that fires its events.
///
/// It keeps every home that there ever was (there are as many as loops, at most), so that a
/// pointer to the present one is enough: reading it takes no lock and counts no reference.
#[derive(Debug)]
pub(crate) struct Place {
    pub(crate) owner: Owner,
    pub(crate) class: Class,
    current: AtomicPtr<LoopHandle>,
    #[expect(clippy::disallowed_types, reason = "taken by a move, and nowhere else")]
    known: std::sync::Mutex<Vec<Arc<LoopHandle>>>,
}

impl Place {
    pub(crate) fn new(name: &str, class: Class, home: &LoopHandle) -> Arc<Self> {
        let home = Arc::new(home.clone());
        let current = AtomicPtr::new(Arc::as_ptr(&home).cast_mut());
        Arc::new(Self { owner: Owner::named(name), class, current, known: vec![home].into() })
    }

    /// The present home.
    pub(crate) fn home(&self) -> &LoopHandle {
        // SAFETY: points into an Arc that `known` keeps until the place itself goes.
        unsafe { &*self.current.load(Acquire) }
    }

    /// Runs `f` on the home loop, wherever that is by the time it runs.
    pub(crate) fn on_home(self: &Arc<Self>, f: impl FnOnce(&mut EventLoop) + Send + 'static) {
        let place = Arc::clone(self);
        self.home().admin(move |event_loop| match event_loop.is(place.home()) {
            true => f(event_loop),
            false => place.on_home(f),
        });
    }

    /// Queues `node` for when the home loop has nothing else to do.
    pub(crate) fn post_idle(&self, node: &Arc<Node<Task>>) {
        let home = self.home();
        home.post_idle(node);
        // It is no home any more, and may not have seen the node before it went to sleep: then it
        // has to pass it on. (The fence of `post_idle` comes before this look.)
        if self.home() != home {
            home.wake();
        }
    }

    /// Moves everything to `to`, and goes on there with `then` when it has arrived. Things that fire
    /// meanwhile are passed on by the old home, in their order.
    pub(crate) fn relocate(
        self: &Arc<Self>,
        to: &LoopHandle,
        then: impl FnOnce(&mut EventLoop) + Send + 'static,
    ) {
        let (place, to) = (Arc::clone(self), to.clone());
        self.on_home(move |from| {
            if from.is(&to) {
                return then(from);
            }
            let sources = from.detach(&place);
            let arrive = move |event_loop: &mut EventLoop| {
                event_loop.attach(sources);
                then(event_loop);
            };
            #[cfg(loom)]
            if crate::models::asks_for("answer, then set the home") {
                to.admin(arrive);
                return place.set(&to);
            }
            place.set(&to);
            #[cfg(loom)]
            if crate::models::asks_for("sources stay where they were sent") {
                return to.admin(arrive);
            }
            // They follow the strand: its next move may have begun there before they arrive.
            place.on_home(arrive);
        });
    }

    fn set(&self, to: &LoopHandle) {
        let mut known = self.known.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let home = match known.iter().find(|home| ***home == *to) {
            Some(home) => home,
            None => known.push_mut(Arc::new(to.clone())),
        };
        self.current.store(Arc::as_ptr(home).cast_mut(), Release);
    }
}
