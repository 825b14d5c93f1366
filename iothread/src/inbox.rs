//! A lock-free FIFO that any thread may push to and one thread at a time takes from.
//!
//! Nodes are allocated once, when an event is made; pushing one links it in and holds a
//! reference, so the data path allocates nothing. A node that is already queued is not queued
//! twice: that is how a bottom half scheduled ten times runs once.

#![expect(unsafe_code, reason = "an intrusive list passes Arc references through raw pointers")]

use std::ptr;
use std::sync::Arc;

use crate::sync::{AtomicBool, AtomicPtr, Ordering::*};

/// Something that can wait in one [`Inbox`] at a time.
#[derive(Debug)]
pub(crate) struct Node<T> {
    next: AtomicPtr<Node<T>>,
    queued: AtomicBool,
    pub(crate) value: T,
}

impl<T> Node<T> {
    pub(crate) fn new(value: T) -> Self {
        Self { next: AtomicPtr::new(ptr::null_mut()), queued: AtomicBool::new(false), value }
    }
}

/// The newest node first; [`Inbox::take`] turns the order round.
#[derive(Debug)]
pub(crate) struct Inbox<T> {
    newest: AtomicPtr<Node<T>>,
}

impl<T> Inbox<T> {
    pub(crate) fn new() -> Self {
        Self { newest: AtomicPtr::new(ptr::null_mut()) }
    }

    /// Queues `node`; does nothing if it is queued already and has not been taken out.
    ///
    /// Either way, whoever takes the node out afterwards sees all that happened before this call.
    pub(crate) fn push(&self, node: &Arc<Node<T>>) {
        if node.queued.swap(true, AcqRel) {
            return;
        }
        let raw = Arc::into_raw(Arc::clone(node)).cast_mut();
        let mut newest = self.newest.load(Relaxed);
        loop {
            node.next.store(newest, Relaxed);
            match self.newest.compare_exchange_weak(newest, raw, Release, Relaxed) {
                Ok(_) => return,
                Err(now) => newest = now,
            }
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.newest.load(Acquire).is_null()
    }

    /// All that is queued now, oldest first.
    pub(crate) fn take(&self) -> Batch<T> {
        let mut node = self.newest.swap(ptr::null_mut(), AcqRel);
        let mut oldest = ptr::null_mut();
        while !node.is_null() {
            // SAFETY: `node` came from `Arc::into_raw` in `push`, and the swap above made this
            // thread the only owner of that reference and of the whole chain behind it.
            let next = unsafe { (*node).next.swap(oldest, Relaxed) };
            oldest = node;
            node = next;
        }
        Batch { oldest }
    }
}

impl<T> Drop for Inbox<T> {
    fn drop(&mut self) {
        drop(self.take());
    }
}

/// Nodes taken out of an inbox, in the order they were pushed.
#[derive(Debug)]
pub(crate) struct Batch<T> {
    oldest: *mut Node<T>,
}

// SAFETY: a batch is nothing but owned `Arc<Node<T>>`s, which are `Send` under this bound.
unsafe impl<T: Send + Sync> Send for Batch<T> {}

impl<T> Batch<T> {
    pub(crate) fn empty() -> Self {
        Self { oldest: ptr::null_mut() }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.oldest.is_null()
    }
}

impl<T> Iterator for Batch<T> {
    type Item = Arc<Node<T>>;

    fn next(&mut self) -> Option<Arc<Node<T>>> {
        if self.oldest.is_null() {
            return None;
        }
        // SAFETY: the pointer came from `Arc::into_raw` in `push`, and this batch owns the
        // reference; it is given back exactly once, here.
        let node = unsafe { Arc::from_raw(self.oldest) };
        self.oldest = node.next.load(Relaxed);
        // From here on the node may be pushed again. The swap pairs with the one in `push`: a
        // pusher that found the node queued is seen by whoever runs it now.
        node.queued.swap(false, AcqRel);
        Some(node)
    }
}

impl<T> Drop for Batch<T> {
    fn drop(&mut self) {
        self.for_each(drop);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn order_is_that_of_pushing() {
        let inbox = Inbox::new();
        let nodes: Vec<_> = (0..4).map(|n| Arc::new(Node::new(n))).collect();
        for index in [3, 0, 2, 1] {
            inbox.push(&nodes[index]);
        }
        let order: Vec<i32> = inbox.take().map(|node| node.value).collect();
        assert_eq!(order, [3, 0, 2, 1]);
        assert!(inbox.is_empty());
    }

    #[test]
    fn a_queued_node_is_not_queued_twice_but_again_once_taken() {
        let inbox = Inbox::new();
        let node = Arc::new(Node::new(()));
        inbox.push(&node);
        inbox.push(&node);
        assert_eq!(inbox.take().count(), 1);
        inbox.push(&node);
        assert_eq!(inbox.take().count(), 1);
    }

    #[test]
    fn dropping_a_full_inbox_releases_every_node() {
        let inbox = Inbox::new();
        let node = Arc::new(Node::new(()));
        inbox.push(&node);
        assert_eq!(Arc::strong_count(&node), 2);
        drop(inbox);
        assert_eq!(Arc::strong_count(&node), 1);
    }

    #[test]
    fn nothing_is_lost_between_many_pushers_and_one_taker() {
        const EACH: usize = 20_000;
        let inbox = Arc::new(Inbox::new());
        let pushers: Vec<_> = (0..4)
            .map(|_| {
                let inbox = Arc::clone(&inbox);
                std::thread::spawn(move || {
                    for n in 0..EACH {
                        inbox.push(&Arc::new(Node::new(n)));
                    }
                })
            })
            .collect();
        let mut taken = 0;
        while taken < 4 * EACH {
            taken += inbox.take().count();
            std::thread::yield_now();
        }
        pushers.into_iter().for_each(|pusher| pusher.join().unwrap());
        assert!(inbox.is_empty());
    }
}
