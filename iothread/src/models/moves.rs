//! While a strand moves from one loop to another, no event is lost, those of one thread keep their
//! order, one thread at a time is in the object, and what it is watched by comes along.

use std::sync::Arc;
use std::sync::atomic::AtomicUsize;

use loom::cell::UnsafeCell;
use loom::sync::atomic::{AtomicBool, Ordering::*};
use loom::thread;

use super::Fault::Swapped;
use super::check::{fails, holds};
use super::wake::event_loop;
use crate::{Event, EventLoop, LoopHandle, Progress, Strand, VcpuLoop};

const PREEMPTIONS: usize = 1;

/// The object: how many of its events have run.
#[derive(Default)]
struct Object {
    inside: UnsafeCell<()>,
    ran: usize,
}

struct Model {
    from: EventLoop,
    to: EventLoop,
    strand: Strand<Object>,
}

impl Model {
    fn new() -> Self {
        let (from, to) = (event_loop(), event_loop());
        let strand = Strand::new("model", &from.handle(), Object::default());
        Self { from, to, strand }
    }

    fn stop(&self) -> impl Fn() + Send + Sync + use<> {
        let loops = [self.from.handle(), self.to.handle()];
        move || loops.iter().for_each(LoopHandle::stop)
    }

    /// The event that has to run as the nth; the `last` one ends the loops.
    fn event(&self, nth: usize, last: usize, on_vcpu: Progress) -> Event<Object> {
        let stop = self.stop();
        self.strand.event(move |object, cx| {
            object.inside.with_mut(|_| ());
            if cx.on_vcpu() && on_vcpu != Progress::Idle {
                return on_vcpu;
            }
            assert_eq!(object.ran, nth, "out of order");
            object.ran += 1;
            if nth == last {
                stop();
            }
            Progress::Idle
        })
    }

    /// Both loops turn until they are stopped.
    fn run(self, others: impl FnOnce(&Strand<Object>)) {
        let Self { from, to, strand } = self;
        let other = thread::spawn(move || to.run());
        others(&strand);
        from.run();
        other.join().unwrap();
    }
}

/// One thread schedules two events, while the strand moves.
fn scheduled() {
    let model = Model::new();
    let events = [0, 1].map(|nth| model.event(nth, 1, Progress::Idle));
    let to = model.to.handle();
    model.run(|strand| {
        drop(strand.move_to(&to));
        thread::spawn(move || events.iter().for_each(Event::schedule));
    });
}

/// A vCPU runs an event, which has to go on at home, while the strand moves.
fn run_here() {
    let model = Model::new();
    let event = model.event(0, 0, Progress::Home);
    let to = model.to.handle();
    model.run(|strand| {
        drop(strand.move_to(&to));
        thread::spawn(move || event.run_here(&mut VcpuLoop::enter().exit()));
    });
}

/// As soon as a move is answered, everybody sees the new home.
fn answered() {
    let model = Model::new();
    let (stop, to) = (model.stop(), model.to.handle());
    let place = Arc::clone(model.event(0, 0, Progress::Idle).place());
    // In the place of the answer's channel, of which loom does not know what it orders.
    let given = Arc::new(AtomicBool::new(false));
    model.run(|_| {
        let answer = Arc::clone(&given);
        place.relocate(&to, move |_| answer.store(true, Release));
        thread::spawn(move || {
            if given.load(Acquire) {
                assert!(*place.home() == to, "the answer comes before the move");
            }
            stop();
        });
    });
}

/// The strand goes and comes back, asked by two threads; its poller comes along.
fn there_and_back() {
    let model = Model::new();
    let (from, to) = (model.from.handle(), model.to.handle());
    let event = model.event(0, 0, Progress::Idle);
    // Not dropped when the model fails: that would ask loom for something.
    let poller = std::mem::ManuallyDrop::new(event.on_poll(|| false, &event));
    let place = Arc::clone(event.place());
    let (stop, left) = (Arc::new(model.stop()), Arc::new(AtomicUsize::new(2)));
    // Where a move ends is looked at once both have been answered.
    let look = move || {
        let (stop, left, place) = (Arc::clone(&stop), Arc::clone(&left), Arc::clone(&place));
        move |_: &mut EventLoop| {
            if left.fetch_sub(1, Relaxed) == 1 {
                place.on_home(move |home| {
                    // Without it nobody ends the loops.
                    if home.count_pollers() == 1 {
                        stop();
                    }
                });
            }
        }
    };
    let place = Arc::clone(event.place());
    let (first, second) = (look(), look());
    model.run(|_| {
        place.relocate(&to, first);
        thread::spawn(move || place.relocate(&from, second));
    });
    drop(std::mem::ManuallyDrop::into_inner(poller));
}

#[test]
fn events_scheduled_during_a_move_run_once_and_in_order() {
    holds(PREEMPTIONS, scheduled);
}

#[test]
fn an_event_that_a_vcpu_runs_during_a_move_goes_on_at_the_new_home() {
    holds(PREEMPTIONS, run_here);
}

#[test]
fn a_move_is_answered_when_it_is_over() {
    holds(PREEMPTIONS, answered);
}

#[test]
fn what_watches_for_a_strand_follows_it_there_and_back() {
    holds(PREEMPTIONS, there_and_back);
}

/// No thread can go on: the loops wait for what will not come.
const LOST: &str = "deadlock";

#[test]
fn a_visit_that_is_not_passed_on_is_lost() {
    fails(PREEMPTIONS, scheduled, Swapped("a visit is not passed on"), LOST);
    fails(PREEMPTIONS, run_here, Swapped("a visit is not passed on"), LOST);
}

#[test]
fn sources_that_stay_where_they_were_sent_are_left_behind() {
    let fault = Swapped("sources stay where they were sent");
    fails(PREEMPTIONS, there_and_back, fault, LOST);
}

#[test]
fn an_answer_before_the_new_home_is_set_comes_too_early() {
    fails(PREEMPTIONS, answered, Swapped("answer, then set the home"), "before the move");
}
