//! Callbacks for when a loop "runs out of useful things to do and is about to suspend itself"
//! (seed 000).

use std::fmt;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use crate::cx::Cx;
use crate::handle::Task;
use crate::inbox::Node;
use crate::place::Place;
use crate::strand::{Progress, Strand};
use crate::sync::{AtomicBool, Ordering::*};
use crate::timer::Timer;

/// A callback that runs once after each [`schedule`](Self::schedule), when its home loop has
/// nothing else to do and is about to sleep. It is no bottom half: it wakes no loop and keeps none
/// awake, and one that schedules itself again runs before the next sleep, not in a circle.
///
/// Dropping it takes it back.
pub struct Idle {
    shared: Arc<Shared>,
    node: Arc<Node<Task>>,
    place: Arc<Place>,
}

struct Shared {
    wanted: AtomicBool,
    /// Fires when the loop has found no time for so long.
    at_last: OnceLock<(Duration, Timer)>,
}

impl fmt::Debug for Idle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Idle").field("wanted", &self.shared.wanted).finish_non_exhaustive()
    }
}

impl Idle {
    pub(crate) fn new<T: Send + 'static>(
        strand: &Strand<T>,
        longest: Option<Duration>,
        callback: impl Fn(&mut T, &mut Cx<'_>) + Send + Sync + 'static,
    ) -> Self {
        let wanted = AtomicBool::new(false);
        let shared = Arc::new(Shared { wanted, at_last: OnceLock::new() });
        let asked = Arc::downgrade(&shared);
        let event = strand.event(move |object, cx| {
            let Some(shared) = asked.upgrade() else { return Progress::Idle };
            // First: who asks after `wanted` has fallen sets it again.
            if let Some((_, timer)) = shared.at_last.get() {
                timer.cancel();
            }
            if shared.wanted.swap(false, AcqRel) {
                callback(object, cx);
            }
            Progress::Idle
        });
        let (fire, place) = (Arc::clone(event.posted()), Arc::clone(event.place()));
        let at = Arc::clone(&place);
        let node = Arc::new_cyclic(|node: &std::sync::Weak<Node<Task>>| {
            let node = node.clone();
            Node::new(Task::run(move |cx| match (&fire.value, node.upgrade()) {
                (Task::Run(fire), _) if cx.local.is_at(at.home()) => fire(cx),
                (_, Some(node)) => at.post_idle(&node),
                _ => {}
            }))
        });
        if let Some(longest) = longest {
            let _ = shared.at_last.set((longest, event.timer()));
        }
        Self { shared, node, place }
    }

    /// Wants the callback to run, once however often this is called before it runs. With a longest
    /// delay, it runs after that even on a loop that is never idle, and even on one that sleeps.
    pub fn schedule(&self) {
        if self.shared.wanted.swap(true, AcqRel) {
            return;
        }
        self.place.post_idle(&self.node);
        if let Some((longest, timer)) = self.shared.at_last.get() {
            timer.arm_at(Instant::now() + *longest);
        }
    }
}
