//! A loop, seen from outside: where to send work.

use std::fmt;
use std::io;
use std::sync::atomic::compiler_fence;
use std::sync::{Arc, OnceLock};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK};

use crate::class::Class;
use crate::counters::Counters;
use crate::cx::Cx;
use crate::event_loop::EventLoop;
use crate::inbox::{Batch, Inbox, Node};
use crate::reply::Reply;
use crate::sync::{AtomicBool, EventFd, Ordering::*};
use crate::wake::{Owed, Wake};

/// Something a loop can be asked to do.
pub(crate) enum Task {
    /// Work; every thread can run it.
    Run(Box<dyn Fn(&mut Cx<'_>) + Send + Sync>),
    /// Work that was put down elsewhere, with what to do if nobody will ever come for it.
    Visit { serve: Box<dyn Fn(&mut Cx<'_>) + Send + Sync>, let_go: Box<dyn Fn() + Send + Sync> },
    /// A change to the loop itself.
    Admin(Box<dyn Fn(&mut EventLoop) + Send + Sync>),
    /// The same, but only a timer: after it, the loop is as idle as before.
    Arm(Box<dyn Fn(&mut EventLoop) + Send + Sync>),
}

impl Task {
    pub(crate) fn run(f: impl Fn(&mut Cx<'_>) + Send + Sync + 'static) -> Self {
        Self::Run(Box::new(f))
    }

    /// It will never be run.
    pub(crate) fn let_go(&self) {
        if let Self::Visit { let_go, .. } = self {
            let_go();
        }
    }
}

pub(crate) struct Shared {
    name: String,
    /// By class.
    inboxes: [Inbox<Task>; 3],
    /// What is to run when there is nothing else.
    idle: Inbox<Task>,
    pub(crate) state: Wake,
    pub(crate) wake: EventFd,
    pub(crate) stop: AtomicBool,
    pub(crate) counters: Arc<Counters>,
    bell: Bell,
}

/// Somebody who wants to know when a loop sleeps no more, and how to tell him.
struct Bell {
    wanted: AtomicBool,
    ring: OnceLock<Box<dyn Fn() + Send + Sync>>,
}

/// A loop, seen from outside: where to send work. Cheap to clone.
#[derive(Clone)]
pub struct LoopHandle(pub(crate) Arc<Shared>);

/// As if each thread of this process had a full fence right now (membarrier(2)). False: this kernel
/// does not do that.
fn every_thread_orders_its_memory() -> bool {
    const PRIVATE_EXPEDITED: libc::c_long = 1 << 3;
    const REGISTER_PRIVATE_EXPEDITED: libc::c_long = 1 << 4;
    #[expect(unsafe_code, reason = "membarrier takes plain numbers")]
    // SAFETY: it touches no memory.
    let call =
        |command: libc::c_long| unsafe { libc::syscall(libc::SYS_membarrier, command, 0, 0) } == 0;
    static REGISTERED: OnceLock<bool> = OnceLock::new();
    *REGISTERED.get_or_init(|| call(REGISTER_PRIVATE_EXPEDITED)) && call(PRIVATE_EXPEDITED)
}

impl fmt::Debug for LoopHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("LoopHandle").field(&self.0.name).finish()
    }
}

impl PartialEq for LoopHandle {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl Eq for LoopHandle {}

impl LoopHandle {
    pub(crate) fn new(name: &str) -> io::Result<Self> {
        Ok(Self(Arc::new(Shared {
            name: name.to_owned(),
            inboxes: [Inbox::new(), Inbox::new(), Inbox::new()],
            idle: Inbox::new(),
            state: Wake::awake(),
            wake: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
            stop: AtomicBool::new(false),
            counters: Arc::default(),
            bell: Bell { wanted: AtomicBool::new(false), ring: OnceLock::new() },
        })))
    }

    /// The loop's name.
    pub fn name(&self) -> &str {
        &self.0.name
    }

    /// The counters of the loop's thread.
    pub fn counters(&self) -> &Arc<Counters> {
        &self.0.counters
    }

    /// Ends the loop after the turn it is in.
    pub fn stop(&self) {
        self.0.stop.store(true, Release);
        self.wake();
    }

    /// What is to be done, on the loop's thread, when it wakes up after
    /// [`all_sleep`](Self::all_sleep) has said that it sleeps. It must not wait. Only the first one
    /// counts.
    pub fn on_bell(&self, ring: impl Fn() + Send + Sync + 'static) {
        let _ = self.0.bell.ring.set(Box::new(ring));
    }

    /// Do all of these loops sleep? Then each rings its bell once when it sleeps no more, so that
    /// who watches them can sleep as long as they do. (If not, one that wakes up meanwhile may ring
    /// for nothing.)
    pub fn all_sleep(loops: &[Self]) -> bool {
        let wanted = |handle: &Self| handle.0.bell.wanted.load(Acquire);
        if loops.iter().all(wanted) {
            return true; // they did when they were asked, and none has rung
        }
        loops.iter().for_each(|handle| handle.0.bell.wanted.store(true, Release));
        let asleep = every_thread_orders_its_memory()
            && loops.iter().all(|handle| handle.0.state.is_asleep());
        if !asleep {
            loops.iter().for_each(|handle| handle.0.bell.wanted.store(false, Release));
        }
        asleep
    }

    /// The loop sleeps no more.
    pub(crate) fn woke_up(&self) {
        let Shared { bell, state, .. } = &*self.0;
        state.woke_up();
        // Pairs with the call in `all_sleep`, which costs the loop nothing.
        compiler_fence(SeqCst);
        if bell.wanted.load(Relaxed) && bell.wanted.swap(false, AcqRel) {
            bell.ring.get().inspect(|ring| ring());
        }
    }

    /// Answers when all that was sent to the loop before has been run.
    pub fn barrier(&self) -> Reply<()> {
        let (answer, reply) = Reply::pair();
        // Through one class after the other: what waits in each was there before.
        let last = move |event_loop: &mut EventLoop| {
            event_loop.handle().admin_as(Class::Service, move |_| answer.give(()));
        };
        let second = move |event_loop: &mut EventLoop| {
            event_loop.handle().admin_as(Class::Normal, last);
        };
        self.admin_as(Class::Realtime, second);
        reply
    }

    /// Queues a node; wakes the loop only if it sleeps.
    pub(crate) fn post(&self, node: &Arc<Node<Task>>, class: Class) {
        self.0.inboxes[class as usize].push(node);
        self.wake();
    }

    /// Queues a node for when the loop has nothing else to do. That alone wakes no loop.
    pub(crate) fn post_idle(&self, node: &Arc<Node<Task>>) {
        self.0.idle.push(node);
        if self.0.state.posted_to_nobody() {
            self.clear();
        }
    }

    /// Sees to it that the loop notices what this thread did before.
    pub(crate) fn wake(&self) {
        match self.0.state.posted() {
            Owed::Nothing => {}
            Owed::Signal => {
                // An eventfd refuses only when 2^64 - 2 wake-ups are pending: it is readable then.
                let _ = self.0.wake.write(1);
            }
            Owed::Removal => self.clear(),
        }
    }

    pub(crate) fn admin(&self, f: impl FnOnce(&mut EventLoop) + Send + 'static) {
        self.admin_as(Class::Normal, f);
    }

    fn admin_as(&self, class: Class, f: impl FnOnce(&mut EventLoop) + Send + 'static) {
        let once = crate::strand::Once::new(f);
        let task = Task::Admin(Box::new(move |event_loop| {
            if let Some(f) = once.take() {
                f(event_loop);
            }
        }));
        self.post(&Arc::new(Node::new(task)), class);
    }

    pub(crate) fn is_to_stop(&self) -> bool {
        self.0.stop.load(Acquire)
    }

    /// Has anything been posted, but for idle times?
    pub(crate) fn has_mail(&self) -> bool {
        self.0.inboxes.iter().any(|inbox| !inbox.is_empty())
    }

    pub(crate) fn has_urgent_mail(&self) -> bool {
        !self.0.inboxes[Class::Realtime as usize].is_empty()
    }

    pub(crate) fn take(&self, class: Class) -> Batch<Task> {
        let inbox = &self.0.inboxes[class as usize];
        // An exchange costs more than a look.
        if inbox.is_empty() { Batch::empty() } else { inbox.take() }
    }

    pub(crate) fn take_idle(&self) -> Batch<Task> {
        if self.0.idle.is_empty() { Batch::empty() } else { self.0.idle.take() }
    }

    /// The loop's last look before it sleeps; true: nothing has come, nor is it to end.
    pub(crate) fn falls_asleep(&self) -> bool {
        self.0.state.falls_asleep(|| !self.has_mail() && !self.is_to_stop())
    }

    /// There is no loop any more.
    pub(crate) fn ends(&self) {
        self.0.state.ends(|| self.clear());
    }

    /// Lets go of all that was posted.
    fn clear(&self) {
        for node in self.0.inboxes.iter().chain([&self.0.idle]).flat_map(Inbox::take) {
            node.value.let_go();
        }
    }
}
