//! One thread at a time is in the object, no event is lost, and a callback sees all that happened
//! before it was fired.

use std::ops::Range;
use std::sync::Arc;

use loom::cell::UnsafeCell;
use loom::sync::atomic::{AtomicBool, Ordering::Relaxed};
use loom::thread;

use super::Fault::Swapped;
use super::check::{fails, holds, left_out, unordered};
use super::wake::event_loop;
use crate::{Event, EventLoop, Progress, Strand, VcpuLoop};

/// For models of vCPUs alone.
const PREEMPTIONS: usize = 3;

/// For models in which the home loop turns too.
const WITH_LOOP: usize = 2;

/// The object: which firings its callbacks have seen, each only those of its own event.
#[derive(Default)]
struct Object {
    /// Loom reports two threads in here, and one that does not see what the one before it did.
    inside: UnsafeCell<()>,
    seen: Seen,
}

/// Not a part of what is modelled: these atomics are not loom's and order nothing.
type Seen = Arc<[std::sync::atomic::AtomicBool; 3]>;

fn all(seen: &Seen, count: usize) -> bool {
    seen[..count].iter().all(|seen| seen.load(Relaxed))
}

/// A strand and the loop that is its home.
struct Model {
    event_loop: EventLoop,
    strand: Strand<Object>,
    fired: Arc<[AtomicBool; 3]>,
    seen: Seen,
    /// Events that a vCPU serves for others before it hands the strand over.
    budget: u32,
}

impl Model {
    fn new(budget: u32) -> Self {
        let event_loop = event_loop();
        let object = Object::default();
        let seen = Arc::clone(&object.seen);
        let strand = Strand::new("model", &event_loop.handle(), object);
        Self { event_loop, strand, fired: Arc::default(), seen, budget }
    }

    /// An event that sees those of these firings that have been, then calls `then`. On a vCPU that
    /// is to answer something else than `Idle`, it only does that.
    fn event(
        &self,
        of: Range<usize>,
        on_vcpu: Progress,
        then: impl Fn(&Object) + Send + Sync + 'static,
    ) -> Event<Object> {
        let fired = Arc::clone(&self.fired);
        self.strand.event(move |object, cx| {
            object.inside.with_mut(|_| ());
            if cx.on_vcpu() && on_vcpu != Progress::Idle {
                return on_vcpu;
            }
            for n in of.clone() {
                if fired[n].load(Relaxed) {
                    object.seen[n].store(true, Relaxed);
                }
            }
            then(object);
            Progress::Idle
        })
    }

    /// The firing `n` of `event`, on a vCPU thread of its own.
    fn fire(&self, n: usize, event: &Event<Object>) -> thread::JoinHandle<()> {
        let (fired, event, budget) = (Arc::clone(&self.fired), event.clone(), self.budget);
        thread::spawn(move || {
            fired[n].store(true, Relaxed);
            event.run_here(&mut VcpuLoop::with_budget(budget).exit());
        })
    }
}

/// So many vCPUs fire, each an event of its own or all the same. They serve all there is, and the
/// home loop does not turn.
fn at_once(count: usize, same: bool) {
    let model = Model::new(u32::MAX);
    let event = |of| model.event(of, Progress::Idle, |_| ());
    let events: Vec<_> = match same {
        true => vec![event(0..count); count],
        false => (0..count).map(|n| event(n..n + 1)).collect(),
    };
    let vcpus: Vec<_> = (0..count).map(|n| model.fire(n, &events[n])).collect();
    vcpus.into_iter().for_each(|vcpu| vcpu.join().unwrap());
    // No callback has run after the joins.
    assert!(all(&model.seen, count), "an event is lost");
}

fn two_events() {
    at_once(2, false);
}

fn three_events() {
    at_once(3, false);
}

fn one_event_twice() {
    at_once(2, true);
}

fn one_event_three_times() {
    at_once(3, true);
}

/// Something is left for the home loop, which ends when all firings have been seen.
fn at_home(count: usize, budget: u32, on_vcpu: Progress) {
    let model = Model::new(budget);
    let events: Vec<_> = (0..count)
        .map(|n| {
            let home = model.event_loop.handle();
            model.event(n..n + 1, on_vcpu, move |object| {
                if all(&object.seen, count) {
                    home.stop();
                }
            })
        })
        .collect();
    let vcpus: Vec<_> = (0..count).map(|n| model.fire(n, &events[n])).collect();
    model.event_loop.run();
    vcpus.into_iter().for_each(|vcpu| vcpu.join().unwrap());
}

fn not_here() {
    at_home(2, u32::MAX, Progress::Home);
}

fn more() {
    at_home(2, u32::MAX, Progress::More);
}

fn too_much() {
    at_home(3, 1, Progress::Idle);
}

#[test]
fn an_event_left_with_the_holder_is_run() {
    holds(PREEMPTIONS, two_events);
    holds(PREEMPTIONS, three_events);
}

#[test]
fn an_event_fired_by_several_threads_sees_them_all() {
    holds(PREEMPTIONS, one_event_twice);
    holds(PREEMPTIONS, one_event_three_times);
}

#[test]
fn a_strand_handed_over_while_held_goes_on_at_home() {
    holds(WITH_LOOP, not_here);
}

#[test]
fn a_strand_with_too_much_mail_goes_on_at_home() {
    holds(WITH_LOOP, too_much);
}

#[test]
fn an_event_that_wants_more_runs_again_at_home() {
    holds(WITH_LOOP, more);
}

const LOST: &str = "an event is lost";
const TWO_INSIDE: &str = "Causality violation";
/// No thread can go on: the home loop waits for what will not come.
const NOT_RUN_AT_HOME: &str = "deadlock";

#[test]
fn mail_before_the_letter_loses_an_event() {
    fails(PREEMPTIONS, two_events, Swapped("MAIL, then the letter"), LOST);
}

#[test]
fn letters_taken_before_mail_is_cleared_lose_an_event() {
    fails(PREEMPTIONS, three_events, Swapped("take the letters, then clear MAIL"), LOST);
}

#[test]
fn a_holder_that_does_not_tell_itself_of_a_letter_loses_it() {
    let fault = left_out("hold", "self.0.fetch_or(MAIL, Relaxed)");
    fails(WITH_LOOP, not_here, fault, NOT_RUN_AT_HOME);
}

#[test]
fn a_hold_taken_without_acquire_lets_two_in() {
    fails(PREEMPTIONS, two_events, unordered("hold", "compare_exchange(FREE, HELD"), TWO_INSIDE);
    fails(PREEMPTIONS, two_events, unordered("hold", "fetch_or(HELD | MAIL"), TWO_INSIDE);
}

#[test]
fn a_hold_let_go_without_release_lets_two_in() {
    fails(PREEMPTIONS, two_events, unordered("hold", "compare_exchange(HELD, FREE"), TWO_INSIDE);
}

#[test]
fn a_firing_that_finds_its_event_queued_must_release() {
    let fault = unordered("inbox", "node.queued.swap(true");
    fails(PREEMPTIONS, one_event_three_times, fault, LOST);
}
