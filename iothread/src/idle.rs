//! Callbacks for when a loop "runs out of useful things to do and is about to suspend itself"
//! (seed 000).

use std::fmt;
use std::sync::Arc;
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
pub struct Idle {
    wanted: Arc<AtomicBool>,
    node: Arc<Node<Task>>,
    place: Arc<Place>,
    /// Fires when the loop has found no time for so long.
    at_last: Option<(Duration, Timer)>,
}

impl fmt::Debug for Idle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Idle").field("wanted", &self.wanted).finish_non_exhaustive()
    }
}

impl Idle {
    pub(crate) fn new<T: Send + 'static>(
        strand: &Strand<T>,
        longest: Option<Duration>,
        callback: impl Fn(&mut T, &mut Cx<'_>) + Send + Sync + 'static,
    ) -> Self {
        let wanted = Arc::new(AtomicBool::new(false));
        let asked = Arc::clone(&wanted);
        let event = strand.event(move |object, cx| {
            if asked.swap(false, AcqRel) {
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
        let at_last = longest.map(|longest| (longest, event.timer()));
        Self { wanted, node, place, at_last }
    }

    /// Wants the callback to run, once however often this is called before it runs. With a longest
    /// delay, it runs after that even on a loop that is never idle, and even on one that sleeps.
    pub fn schedule(&self) {
        if self.wanted.swap(true, AcqRel) {
            return;
        }
        self.place.post_idle(&self.node);
        if let Some((longest, timer)) = &self.at_last {
            timer.arm_at(Instant::now() + *longest);
        }
    }
}
