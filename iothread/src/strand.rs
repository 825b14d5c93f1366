//! Strands: an object, and the rule that one thread at a time is in it.
//!
//! The [`Hold`] is never waited for. A thread that finds it taken pushes its event to the strand's
//! inbox and leaves word; the holder cannot let go without looking there.

#![expect(unsafe_code, reason = "the hold, not the borrow checker, makes the object exclusive")]

use std::fmt;
use std::sync::{Arc, Weak};
use std::time::Duration;

use crate::class::Class;
use crate::cx::{Cx, ExitCx};
use crate::handle::{LoopHandle, Task};
use crate::hold::Hold;
use crate::idle::Idle;
use crate::inbox::{Batch, Inbox, Node};
use crate::place::Place;
use crate::reply::Reply;
use crate::source::{FdSource, Poller, Trigger};
use crate::sync::{AtomicBool, Ordering::AcqRel, UnsafeCell};
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

struct Action<T> {
    callback: Callback<T>,
    /// The same on the agenda: for [`Progress::More`].
    planned: Weak<Node<Letter<T>>>,
}

/// Something to be done in a strand.
enum Letter<T> {
    /// A callback.
    Call(Arc<Action<T>>),
    /// Whatever is on the agenda.
    Agenda,
}

struct Held<T> {
    object: T,
    /// Bottom halves taken from the agenda that this hold has yet to serve.
    due: Batch<Letter<T>>,
    /// What others left, taken from the mail, likewise.
    backlog: Batch<Letter<T>>,
}

struct Core<T> {
    hold: Hold,
    /// From those who found the strand held.
    mail: Inbox<Letter<T>>,
    /// The bottom halves, in schedule order, whatever thread scheduled them and wherever the
    /// strand was at home then.
    agenda: Inbox<Letter<T>>,
    held: UnsafeCell<Held<T>>,
    place: Arc<Place>,
    /// Has the home loop look at the agenda.
    visit: Arc<Node<Task>>,
    /// Left with a holder, has him look at the agenda.
    agenda_letter: Arc<Node<Letter<T>>>,
    /// Goes on serving on the home loop a strand that stays held on the way there.
    resume: Arc<Node<Task>>,
}

// SAFETY: `held` is only touched by the thread that took `hold`, or that was handed the held
// strand through `resume`; both moves are Acquire/Release pairs.
unsafe impl<T: Send> Sync for Core<T> {}
// SAFETY: all fields are `Send` when `T` is; the inboxes hold `Arc`s of callbacks that are `Sync`.
unsafe impl<T: Send> Send for Core<T> {}

impl<T: Send + 'static> Core<T> {
    /// Runs `letter` here, or leaves it with the holder.
    fn enter(&self, letter: &Arc<Node<Letter<T>>>, cx: &mut Cx<'_>) {
        if self.hold.try_enter() {
            // SAFETY: this thread became the holder.
            let held = unsafe { &mut *self.held.get() };
            if !self.run(held, letter, cx) {
                return self.hand_over(cx);
            }
        } else if !self.hold.leave(|| self.mail.push(letter)) {
            cx.counters().left.add(1);
            return;
        }
        self.serve(cx);
    }

    /// Serves the agenda, if it was opened, and what others left; then lets go. The caller holds
    /// the strand.
    fn serve(&self, cx: &mut Cx<'_>) {
        // SAFETY: the caller is the holder, by `enter` or by `resume`.
        let held = unsafe { &mut *self.held.get() };
        let mut budget = cx.local.budget;
        loop {
            while let Some(letter) = held.due.next().or_else(|| held.backlog.next()) {
                if !self.run(held, &letter, cx) {
                    return self.hand_over(cx);
                }
                budget = budget.saturating_sub(1);
                if budget == 0 && self.has_more(held) {
                    return self.hand_over(cx);
                }
            }
            if self.hold.release() {
                return;
            }
            held.backlog = self.hold.open_mail(|| self.mail.take());
        }
    }

    fn has_more(&self, held: &Held<T>) -> bool {
        !held.due.is_empty() || !held.backlog.is_empty() || self.hold.has_mail()
    }

    /// Runs one callback; false: the strand, still held, has to go to the home loop. That is the
    /// caller's to do: `held` must not be borrowed any more when another thread may be in it.
    fn run(&self, held: &mut Held<T>, letter: &Arc<Node<Letter<T>>>, cx: &mut Cx<'_>) -> bool {
        let action = match &letter.value {
            Letter::Call(action) => action,
            Letter::Agenda => {
                // What is scheduled from here on is for the next visit.
                held.due = self.agenda.take();
                return true;
            }
        };
        let call = |cx: &mut Cx<'_>| (action.callback)(&mut held.object, cx);
        match cx.local.timed(self.place.owner, call) {
            Progress::Idle => {}
            Progress::More => {
                if let Some(planned) = action.planned.upgrade() {
                    self.schedule(&planned);
                }
            }
            Progress::Home => {
                self.mail.push(letter);
                self.hold.keep_mail();
                return false;
            }
        }
        true
    }

    /// Puts a callback on the agenda.
    fn schedule(&self, planned: &Arc<Node<Letter<T>>>) {
        self.agenda.push(planned);
        self.place.home().post(&self.visit, self.place.class);
    }

    /// The home loop has ended, on the way to which the strand is held: nobody will serve it.
    fn abandon(&self) {
        // SAFETY: who has `resume` is the holder.
        let held = unsafe { &mut *self.held.get() };
        (held.due, held.backlog) = (Batch::empty(), Batch::empty());
        drop(self.mail.take());
    }

    /// Gives the held strand to the home loop, which goes on serving it.
    fn hand_over(&self, cx: &Cx<'_>) {
        cx.counters().handed_over.add(1);
        self.place.home().post(&self.resume, self.place.class);
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
        f.debug_struct("Strand").field("home", self.core.place.home()).finish_non_exhaustive()
    }
}

impl<T: Send + 'static> Strand<T> {
    /// Puts `object` into a strand whose fds, timers and bottom halves are served by `home`. The
    /// name tells whose callback it is that takes so long.
    pub fn new(name: &str, home: &LoopHandle, object: T) -> Self {
        Self::of_class(Class::Normal, name, home, object)
    }

    /// The same, in another class than [`Class::Normal`].
    pub fn of_class(class: Class, name: &str, home: &LoopHandle, object: T) -> Self {
        let core = Arc::new_cyclic(|core: &Weak<Core<T>>| {
            let visit = |serve: fn(&Core<T>, &mut Cx<'_>),
                         let_go: fn(&Core<T>),
                         this: fn(&Core<T>) -> &Arc<Node<Task>>| {
                let (at, gone) = (core.clone(), core.clone());
                let serve = move |cx: &mut Cx<'_>| {
                    let Some(core) = at.upgrade() else { return };
                    let home = core.place.home();
                    #[cfg(loom)]
                    if !cx.local.is_at(home) && crate::models::asks_for("a visit is not passed on")
                    {
                        return;
                    }
                    match cx.local.is_at(home) {
                        true => serve(&core, cx),
                        // It has moved meanwhile.
                        false => home.post(this(&core), core.place.class),
                    }
                };
                let let_go = move || gone.upgrade().iter().for_each(|core| let_go(core));
                let (serve, let_go) = (Box::new(serve), Box::new(let_go));
                Arc::new(Node::new(Task::Visit { serve, let_go }))
            };
            let held = Held { object, due: Batch::empty(), backlog: Batch::empty() };
            Core {
                hold: Hold::free(),
                mail: Inbox::new(),
                agenda: Inbox::new(),
                held: UnsafeCell::new(held),
                place: Place::new(name, class, home),
                visit: visit(
                    |core, cx| core.enter(&core.agenda_letter, cx),
                    |core| drop(core.agenda.take()),
                    |core| &core.visit,
                ),
                agenda_letter: Arc::new(Node::new(Letter::Agenda)),
                resume: visit(Core::serve, Core::abandon, |core| &core.resume),
            }
        });
        Self { core }
    }

    /// The loop that serves this strand's fds, timers and bottom halves at present.
    pub fn home(&self) -> LoopHandle {
        self.core.place.home().clone()
    }

    /// Moves the strand to another loop, with its fds, timers, pollers and all that is scheduled,
    /// and answers when they are there. Nothing waits, nothing is lost, and bottom halves keep
    /// their order; an operation in flight completes on the ring it was submitted to and is then
    /// passed on. Each fd that is readable fires once more.
    ///
    /// A loop that has ended is no place to go to: then the answer never comes.
    pub fn move_to(&self, to: &LoopHandle) -> Reply<()> {
        let (answer, reply) = Reply::pair();
        self.core.place.relocate(to, move |_| answer.give(()));
        reply
    }

    /// A callback of the object, to be fired in any of the ways an [`Event`] offers.
    ///
    /// The event does not keep the strand alive; without it, firing does nothing.
    pub fn event(
        &self,
        callback: impl Fn(&mut T, &mut Cx<'_>) -> Progress + Send + Sync + 'static,
    ) -> Event<T> {
        let mut action = None;
        let planned = Arc::new_cyclic(|planned: &Weak<Node<Letter<T>>>| {
            let new = Arc::new(Action { callback: Box::new(callback), planned: planned.clone() });
            action = Some(Arc::clone(&new));
            Node::new(Letter::Call(new))
        });
        let letter =
            Arc::new(Node::new(Letter::Call(action.expect("new_cyclic calls its closure"))));
        let core = Arc::downgrade(&self.core);
        let (at, here, elsewhere) = (core.clone(), Arc::clone(&letter), Arc::clone(&planned));
        let posted = Arc::new(Node::new(Task::run(move |cx| {
            let Some(core) = at.upgrade() else { return };
            match cx.local.is_at(core.place.home()) {
                true => core.enter(&here, cx),
                false => core.schedule(&elsewhere),
            }
        })));
        Event { core, letter, planned, posted, place: Arc::clone(&self.core.place) }
    }

    /// A callback of the object for when the home loop has nothing else to do, see [`Idle`];
    /// `longest`: after so long it runs in any case.
    pub fn idle(
        &self,
        longest: Option<Duration>,
        callback: impl Fn(&mut T, &mut Cx<'_>) + Send + Sync + 'static,
    ) -> Idle {
        Idle::new(self, longest, callback)
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
        Self { taken: AtomicBool::new(false), value: UnsafeCell::new(Some(value)) }
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
    /// For the holder, who finds it in the mail.
    letter: Arc<Node<Letter<T>>>,
    /// For the agenda.
    planned: Arc<Node<Letter<T>>>,
    /// For a loop, which fires the event.
    posted: Arc<Node<Task>>,
    place: Arc<Place>,
}

impl<T> Clone for Event<T> {
    fn clone(&self) -> Self {
        Self {
            core: self.core.clone(),
            letter: Arc::clone(&self.letter),
            planned: Arc::clone(&self.planned),
            posted: Arc::clone(&self.posted),
            place: Arc::clone(&self.place),
        }
    }
}

impl<T> fmt::Debug for Event<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Event").field("home", self.place.home()).finish_non_exhaustive()
    }
}

impl<T: Send + 'static> Event<T> {
    /// As a bottom half: runs on the home loop, once however often it is scheduled before it
    /// runs, after those of its object that were scheduled earlier. Any thread may call this.
    pub fn schedule(&self) {
        if let Some(core) = self.core.upgrade() {
            core.schedule(&self.planned);
        }
    }

    /// Runs the callback on this vCPU thread, or leaves it with the thread that holds the strand.
    pub fn run_here(&self, exit: &mut ExitCx<'_>) {
        if let Some(core) = self.core.upgrade() {
            core.enter(&self.letter, &mut exit.cx);
        }
    }

    /// Fires whenever `fd` is readable; served by the home loop until the source is dropped.
    pub fn on_fd(&self, fd: impl Into<std::os::fd::OwnedFd>, trigger: Trigger) -> FdSource {
        FdSource::new(fd.into(), trigger, &self.posted, &self.place)
    }

    /// A timer, not armed, that fires this event on the home loop.
    pub fn timer(&self) -> Timer {
        Timer::new(&self.posted, &self.place)
    }

    /// Fires when `ready` says so while the home loop polls before sleeping, see [`Poller`].
    pub fn on_poll(
        &self,
        ready: impl Fn() -> bool + Send + Sync + 'static,
        settle: &Event<T>,
    ) -> Poller {
        Poller::new(Box::new(ready), &self.posted, &settle.posted, &self.place)
    }

    pub(crate) fn place(&self) -> &Arc<Place> {
        &self.place
    }

    /// The event as the completion target of a [`Port`](crate::Port).
    pub(crate) fn posted(&self) -> &Arc<Node<Task>> {
        &self.posted
    }
}
