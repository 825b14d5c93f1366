//! Strands: an object, and the rule that one thread at a time is in it.
//!
//! The [`Hold`] is never waited for. A thread that finds it taken pushes its event to the strand's
//! inbox and leaves word; the holder cannot let go without looking there.

#![expect(unsafe_code, reason = "the hold, not the borrow checker, makes the object exclusive")]

use std::cell::UnsafeCell;
use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering::AcqRel};
use std::sync::{Arc, Weak};

use crate::cx::{Cx, ExitCx};
use crate::event_loop::{FdSource, LoopHandle, Poller, Task, Trigger};
use crate::hold::Hold;
use crate::inbox::{Batch, Inbox, Node};
use crate::reply::Reply;
use crate::timer::Timer;

/// What a callback leaves behind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use]
pub enum Progress {
    /// Done for now.
    Idle,
    /// The budget is used up: run me again, after the others.
    More,
    /// What is left needs something that only the home loop has: run me again, there.
    Home,
}

type Callback<T> = Box<dyn Fn(&mut T, &mut Cx<'_>) -> Progress + Send + Sync>;

struct Letter<T> {
    callback: Callback<T>,
    /// The same event as something the home loop can run: for [`Progress::More`].
    posted: Weak<Node<Task>>,
}

struct Held<T> {
    object: T,
    /// Events taken from the inbox that this hold has yet to serve.
    backlog: Batch<Letter<T>>,
}

struct Core<T> {
    hold: Hold,
    inbox: Inbox<Letter<T>>,
    held: UnsafeCell<Held<T>>,
    home: LoopHandle,
    /// Goes on serving on the home loop a strand that stays held on the way there.
    resume: Arc<Node<Task>>,
}

// SAFETY: `held` is only touched by the thread that took `hold`, or that was handed the held
// strand through `resume`; either sees all that the holder before it did.
unsafe impl<T: Send> Sync for Core<T> {}
// SAFETY: all fields are `Send` when `T` is; the inbox holds `Arc`s of callbacks that are `Sync`.
unsafe impl<T: Send> Send for Core<T> {}

impl<T: Send + 'static> Core<T> {
    /// Runs `letter` here, or leaves it with the holder.
    fn enter(&self, letter: &Arc<Node<Letter<T>>>, cx: &mut Cx<'_>) {
        if self.hold.try_enter() {
            // SAFETY: that made this thread the holder.
            let held = unsafe { &mut *self.held.get() };
            if !self.run(held, letter, cx) {
                return self.hand_over(cx);
            }
        } else {
            self.inbox.push(letter);
            if !self.hold.leave_mail() {
                cx.counters().left.add(1);
                return;
            }
        }
        self.serve(cx);
    }

    /// Serves what others left, then lets go. The caller holds the strand.
    fn serve(&self, cx: &mut Cx<'_>) {
        // SAFETY: the caller is the holder, by `enter` or by `resume`.
        let held = unsafe { &mut *self.held.get() };
        let mut budget = cx.local.budget;
        loop {
            while let Some(letter) = held.backlog.next() {
                if !self.run(held, &letter, cx) {
                    return self.hand_over(cx);
                }
                budget = budget.saturating_sub(1);
                if budget == 0 && self.has_mail(held) {
                    self.hand_over(cx);
                    return;
                }
            }
            if self.hold.release() {
                return;
            }
            self.hold.open_mail();
            held.backlog = self.inbox.take();
        }
    }

    fn has_mail(&self, held: &Held<T>) -> bool {
        !held.backlog.is_empty() || self.hold.has_mail()
    }

    /// Runs one callback; false: the strand, still held, has to go to the home loop. That is the
    /// caller's to do: `held` must not be borrowed any more when another thread may be in it.
    fn run(&self, held: &mut Held<T>, letter: &Arc<Node<Letter<T>>>, cx: &mut Cx<'_>) -> bool {
        match (letter.value.callback)(&mut held.object, cx) {
            Progress::Idle => {}
            Progress::More => {
                if let Some(posted) = letter.value.posted.upgrade() {
                    self.home.post(&posted);
                }
            }
            Progress::Home => {
                self.inbox.push(letter);
                self.hold.keep_mail();
                return false;
            }
        }
        true
    }

    /// Gives the held strand to the home loop, which goes on serving it.
    fn hand_over(&self, cx: &Cx<'_>) {
        cx.counters().handed_over.add(1);
        self.home.post(&self.resume);
    }
}

/// An object that one thread at a time may enter, with the loop that is its home.
pub struct Strand<T> {
    core: Arc<Core<T>>,
}

impl<T> Clone for Strand<T> {
    fn clone(&self) -> Self {
        Self { core: Arc::clone(&self.core) }
    }
}

impl<T> fmt::Debug for Strand<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Strand").field("home", &self.core.home).finish_non_exhaustive()
    }
}

impl<T: Send + 'static> Strand<T> {
    /// Puts `object` into a strand whose fds, timers and bottom halves are served by `home`.
    pub fn new(home: &LoopHandle, object: T) -> Self {
        let core = Arc::new_cyclic(|core: &Weak<Core<T>>| {
            let core = core.clone();
            let resume = Task::run(move |cx| {
                if let Some(core) = core.upgrade() {
                    core.serve(cx);
                }
            });
            Core {
                hold: Hold::free(),
                inbox: Inbox::new(),
                held: UnsafeCell::new(Held { object, backlog: Batch::empty() }),
                home: home.clone(),
                resume: Arc::new(Node::new(resume)),
            }
        });
        Self { core }
    }

    /// The loop that serves this strand's fds, timers and bottom halves.
    pub fn home(&self) -> &LoopHandle {
        &self.core.home
    }

    /// A callback of the object, to be fired in any of the ways an [`Event`] offers.
    ///
    /// The event does not keep the strand alive; without it, firing does nothing.
    pub fn event(
        &self,
        callback: impl Fn(&mut T, &mut Cx<'_>) -> Progress + Send + Sync + 'static,
    ) -> Event<T> {
        let core = Arc::downgrade(&self.core);
        let mut made = None;
        let posted = Arc::new_cyclic(|posted: &Weak<Node<Task>>| {
            let letter = Arc::new(Node::new(Letter {
                callback: Box::new(callback),
                posted: posted.clone(),
            }));
            made = Some(Arc::clone(&letter));
            let core = core.clone();
            Node::new(Task::run(move |cx| {
                if let Some(core) = core.upgrade() {
                    core.enter(&letter, cx);
                }
            }))
        });
        let letter = made.expect("new_cyclic calls its closure");
        Event { core, letter, posted, home: self.core.home.clone() }
    }

    /// Runs `f` once, through the home loop and therefore in order with other messages.
    pub fn call<R: Send + 'static>(
        &self,
        f: impl FnOnce(&mut T, &mut Cx<'_>) -> R + Send + 'static,
    ) -> Reply<R> {
        let (answer, reply) = Reply::pair();
        let once = Once::new((f, answer));
        let event = self.event(move |object, cx| {
            if let Some((f, answer)) = once.take() {
                answer.give(f(object, cx));
            }
            Progress::Idle
        });
        event.schedule();
        reply
    }
}

/// A closure that is called once through a shared reference. Cold: only for messages.
pub(crate) struct Once<F> {
    taken: AtomicBool,
    value: UnsafeCell<Option<F>>,
}

// SAFETY: `value` is only touched by the one thread that moved `taken` from false to true.
unsafe impl<F: Send> Sync for Once<F> {}

impl<F> Once<F> {
    pub(crate) fn new(value: F) -> Self {
        Self { taken: false.into(), value: UnsafeCell::new(Some(value)) }
    }

    pub(crate) fn take(&self) -> Option<F> {
        if self.taken.swap(true, AcqRel) {
            return None;
        }
        // SAFETY: the swap succeeds once, so nobody else is or will be here.
        unsafe { (*self.value.get()).take() }
    }
}

/// A callback of a strand's object.
pub struct Event<T> {
    core: Weak<Core<T>>,
    letter: Arc<Node<Letter<T>>>,
    posted: Arc<Node<Task>>,
    home: LoopHandle,
}

impl<T> Clone for Event<T> {
    fn clone(&self) -> Self {
        Self {
            core: self.core.clone(),
            letter: Arc::clone(&self.letter),
            posted: Arc::clone(&self.posted),
            home: self.home.clone(),
        }
    }
}

impl<T> fmt::Debug for Event<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Event").field("home", &self.home).finish_non_exhaustive()
    }
}

impl<T: Send + 'static> Event<T> {
    /// As a bottom half: runs on the home loop, once however often it is scheduled before it
    /// runs, after those scheduled earlier. Any thread may call this.
    pub fn schedule(&self) {
        self.home.post(&self.posted);
    }

    /// Runs the callback on this vCPU thread, or leaves it with the thread that holds the strand.
    pub fn run_here(&self, exit: &mut ExitCx<'_>) {
        if let Some(core) = self.core.upgrade() {
            core.enter(&self.letter, &mut exit.cx);
        }
    }

    /// Fires whenever `fd` is readable; served by the home loop until the source is dropped.
    pub fn on_fd(&self, fd: impl Into<std::os::fd::OwnedFd>, trigger: Trigger) -> FdSource {
        self.home.add_fd(fd.into(), trigger, &self.posted)
    }

    /// A timer, not armed, that fires this event on the home loop.
    pub fn timer(&self) -> Timer {
        Timer::new(&self.home, &self.posted)
    }

    /// Fires when `ready` says so while the home loop polls before sleeping, see [`Poller`].
    pub fn on_poll(
        &self,
        ready: impl Fn() -> bool + Send + Sync + 'static,
        settle: &Event<T>,
    ) -> Poller {
        self.home.add_poller(Box::new(ready), &self.posted, &settle.posted)
    }

    pub(crate) fn home(&self) -> &LoopHandle {
        &self.home
    }

    /// The event as the completion target of a [`Port`](crate::Port).
    pub(crate) fn posted(&self) -> &Arc<Node<Task>> {
        &self.posted
    }
}
