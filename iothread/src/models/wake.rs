//! A loop is not left asleep with something in its inbox, nor is anything left in the inbox of a
//! loop that has ended.

use std::sync::Arc;

use loom::sync::atomic::{AtomicBool, Ordering::Relaxed};
use loom::thread;

use super::Fault::Swapped;
use super::check::{fails, holds, left_out};
use crate::{EventLoop, Gone, PollPolicy, Progress, Strand};

const PREEMPTIONS: usize = 3;

/// For the largest model.
const FEWER: usize = 2;

pub(super) fn event_loop() -> EventLoop {
    EventLoop::new("model", PollPolicy::OFF).unwrap()
}

/// Each of two threads does something and schedules the same event, which ends the loop once it
/// has seen what both did.
fn two_post() {
    let event_loop = event_loop();
    let home = event_loop.handle();
    let done: Arc<[AtomicBool; 2]> = Arc::default();
    let strand = Strand::new("model", &home, ());
    let seen = Arc::clone(&done);
    let event = strand.event(move |(), _| {
        if seen.iter().all(|done| done.load(Relaxed)) {
            home.stop();
        }
        Progress::Idle
    });
    let posters = [0, 1].map(|n| {
        let (done, event) = (Arc::clone(&done), event.clone());
        thread::spawn(move || {
            done[n].store(true, Relaxed);
            event.schedule();
        })
    });
    event_loop.run();
    posters.into_iter().for_each(|poster| poster.join().unwrap());
}

/// The loop is told to end by another thread.
fn one_stops() {
    let event_loop = event_loop();
    let home = event_loop.handle();
    let stopper = thread::spawn(move || home.stop());
    event_loop.run();
    stopper.join().unwrap();
}

/// Two threads ask while the loop ends.
fn the_loop_ends() {
    let event_loop = event_loop();
    let strand = Strand::new("model", &event_loop.handle(), ());
    let askers = [0, 1].map(|_| {
        let strand = strand.clone();
        thread::spawn(move || strand.call(|(), _| ()))
    });
    drop(event_loop);
    // One of them may be about to remove what the other has asked.
    for mut reply in askers.map(|asker| asker.join().unwrap()) {
        assert_eq!(reply.poll(), Err(Gone), "a message is left in the inbox");
    }
}

#[test]
fn no_wake_up_is_lost() {
    holds(FEWER, two_post);
}

#[test]
fn a_loop_that_sleeps_can_be_stopped() {
    holds(PREEMPTIONS, one_stops);
}

#[test]
fn nothing_stays_in_the_inbox_of_a_loop_that_has_ended() {
    holds(PREEMPTIONS, the_loop_ends);
}

/// No thread can go on: the loop sleeps, and all others have ended.
const LEFT_ASLEEP: &str = "deadlock";

#[test]
fn without_the_fence_of_the_loop_a_wake_up_is_lost() {
    let fault = left_out("announce", "fence(SeqCst)");
    fails(FEWER, two_post, fault, LEFT_ASLEEP);
    fails(PREEMPTIONS, one_stops, fault, LEFT_ASLEEP);
    // Not so at the end: there the last look is an exchange, which is never too early.
}

#[test]
fn without_the_fence_of_the_poster_a_wake_up_is_lost() {
    let fault = left_out("wake", "fence(SeqCst)");
    fails(FEWER, two_post, fault, LEFT_ASLEEP);
    fails(PREEMPTIONS, one_stops, fault, LEFT_ASLEEP);
    fails(PREEMPTIONS, the_loop_ends, fault, "left in the inbox");
}

#[test]
fn a_loop_that_looks_before_it_says_that_it_sleeps_loses_a_wake_up() {
    let fault = Swapped("look, then announce");
    fails(FEWER, two_post, fault, LEFT_ASLEEP);
    fails(PREEMPTIONS, one_stops, fault, LEFT_ASLEEP);
    fails(PREEMPTIONS, the_loop_ends, fault, "left in the inbox");
}
