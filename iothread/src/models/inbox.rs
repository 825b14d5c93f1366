//! What is pushed is taken, once, with all that happened before; also by a push that finds its
//! node queued already.

#![expect(unsafe_code, reason = "a cell that loom watches")]

use std::sync::Arc;

use loom::cell::UnsafeCell;
use loom::sync::atomic::{AtomicBool, Ordering::Relaxed};
use loom::thread;

use super::check::{fails, holds, unordered};
use crate::inbox::{Inbox, Node};

const PREEMPTIONS: usize = 3;

/// Written when it is made and read when it is taken.
struct Value(UnsafeCell<u32>);

// SAFETY: nobody writes to it once it is shared, and loom finds who reads it too early.
unsafe impl Sync for Value {}

impl Value {
    fn get(&self) -> u32 {
        // SAFETY: as above.
        self.0.with(|value| unsafe { *value })
    }
}

/// Two threads push two nodes each, which they have just made, while a third takes.
fn two_push() {
    let inbox = Arc::new(Inbox::new());
    let pushers = [1, 2].map(|who| {
        let inbox = Arc::clone(&inbox);
        thread::spawn(move || {
            for n in [10 * who, 10 * who + 1] {
                inbox.push(&Arc::new(Node::new(Value(UnsafeCell::new(n)))));
            }
        })
    });
    let mut taken = Vec::new();
    let mut take = || {
        for node in inbox.take() {
            taken.push(node.value.get());
        }
    };
    take();
    take();
    pushers.into_iter().for_each(|pusher| pusher.join().unwrap());
    take();
    assert!(inbox.is_empty());
    for who in [1, 2] {
        let mut of = taken.clone();
        of.retain(|n| n / 10 == who);
        assert_eq!(of, [10 * who, 10 * who + 1], "of {taken:?}");
    }
}

/// Two threads each do something and push the same node; a third takes it.
fn one_node() {
    let inbox = Arc::new(Inbox::new());
    let node: Arc<Node<[AtomicBool; 2]>> = Arc::new(Node::new(Default::default()));
    let pushers = [0, 1].map(|n| {
        let (inbox, node) = (Arc::clone(&inbox), Arc::clone(&node));
        thread::spawn(move || {
            node.value[n].store(true, Relaxed);
            inbox.push(&node);
        })
    });
    let mut seen = [false; 2];
    let mut take = || {
        for node in inbox.take() {
            for (seen, done) in seen.iter_mut().zip(&node.value) {
                *seen |= done.load(Relaxed);
            }
        }
    };
    take();
    pushers.into_iter().for_each(|pusher| pusher.join().unwrap());
    // What was not seen must be in the inbox: a look after the joins would see it anyway.
    assert!(seen == [true; 2] || !inbox.is_empty(), "seen: {seen:?}, and no node queued");
    drop(inbox);
    assert_eq!(Arc::strong_count(&node), 1);
}

#[test]
fn every_push_is_taken_once_and_in_order() {
    holds(PREEMPTIONS, two_push);
}

#[test]
fn a_push_of_a_queued_node_is_seen_by_whoever_takes_it() {
    holds(PREEMPTIONS, one_node);
}

#[test]
fn a_push_that_releases_nothing_shows_half_a_node() {
    let fault = unordered("inbox", "compare_exchange_weak");
    fails(PREEMPTIONS, two_push, fault, "Causality violation");
}

#[test]
fn a_take_that_acquires_nothing_sees_half_a_node() {
    let fault = unordered("inbox", "self.newest.swap");
    fails(PREEMPTIONS, two_push, fault, "Causality violation");
}

#[test]
fn a_push_of_a_queued_node_that_releases_nothing_is_not_seen() {
    fails(PREEMPTIONS, one_node, unordered("inbox", "node.queued.swap(true"), "no node queued");
}

#[test]
fn a_take_that_acquires_nothing_does_not_see_such_a_push() {
    fails(PREEMPTIONS, one_node, unordered("inbox", "node.queued.swap(false"), "no node queued");
}
