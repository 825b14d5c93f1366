//! The io_uring of a thread: at most one per thread, shared by all queues it serves.
//!
//! A completion carries the [`Port`] of its queue and a slot. The thread that submitted reaps it,
//! leaves the result in the port and fires the port's event; if another thread holds the strand
//! at that moment, the event is left with it and the result is there when it looks.

#![expect(unsafe_code, reason = "operations carry pointers, and completions carry a Port back")]

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, AtomicU64, Ordering::*};

use io_uring::{IoUring, opcode, squeue, types};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::counters::Counters;
use crate::handle::Task;
use crate::inbox::Node;
use crate::place::Place;
use crate::strand::Event;
use crate::thread;

/// Submissions between two `io_uring_enter`s.
const ENTRIES: u32 = 256;

/// Where the kernel's user_data keeps the slot: user-space addresses have at most 47 bits here.
const SLOT_SHIFT: u32 = 48;

/// So many enters in a row that bring nothing prove IORING_SQ_TASKRUN stale. The kernel sets it
/// after it has queued the work: if this thread runs the work in between, the flag stays up with
/// nothing behind it until the next completion. One is not enough: an enter runs 20 pieces of
/// work, and those that only retry an operation bring nothing.
const VAIN_ENTERS: u32 = 16;

/// Workers that the kernel may make for a ring (io-wq, `iou-wrk-*`): of those for regular files and
/// block devices, and of those for all else. It would make up to one per entry, or four per CPU.
/// They do what cannot be done without blocking: flushes, and I/O on file systems that cannot be
/// asked to come back later. Four keep a device busy with these, and a guest that flushes a lot
/// from having hundreds of threads made on the host.
const WORKERS: [u32; 2] = [4, 4];

/// The results of operations in flight of one queue, by slot.
pub struct Port {
    done: Box<[AtomicU64]>,
    results: Box<[AtomicI32]>,
    event: Arc<Node<Task>>,
    place: Arc<Place>,
}

impl std::fmt::Debug for Port {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Port").field("slots", &self.results.len()).finish_non_exhaustive()
    }
}

impl Port {
    /// A port of `slots` slots that fires `event` after results have arrived.
    pub fn new<T: Send + 'static>(slots: u16, event: &Event<T>) -> Arc<Self> {
        let slots = usize::from(slots);
        Arc::new(Self {
            done: (0..slots.div_ceil(64)).map(|_| AtomicU64::new(0)).collect(),
            results: (0..slots).map(|_| AtomicI32::new(0)).collect(),
            event: Arc::clone(event.posted()),
            place: Arc::clone(event.place()),
        })
    }

    /// Calls `f` with the slot and result of every operation completed since the last call.
    ///
    /// A result is what the system call would return: a count, or a negated errno.
    pub fn take(&self, mut f: impl FnMut(u16, i32)) {
        for (word, done) in self.done.iter().enumerate() {
            if done.load(Relaxed) == 0 {
                continue;
            }
            let mut bits = done.swap(0, Acquire);
            while bits != 0 {
                let slot = word * 64 + bits.trailing_zeros() as usize;
                bits &= bits - 1;
                f(slot as u16, self.results[slot].load(Relaxed));
            }
        }
    }

    /// Leaves a result here and fires the event as a bottom half: for backends that complete by
    /// other means than a ring. Any thread may call this, once per operation.
    pub fn post(&self, slot: u16, result: i32) {
        self.put(slot, result);
        self.place.home().post(&self.event, self.place.class);
    }

    fn put(&self, slot: u16, result: i32) {
        let slot = usize::from(slot);
        self.results[slot].store(result, Relaxed);
        self.done[slot / 64].fetch_or(1 << (slot % 64), Release);
    }

    pub(crate) fn event(&self) -> &Arc<Node<Task>> {
        &self.event
    }
}

/// An operation for the kernel. Offsets and lengths are bytes.
#[derive(Debug, Clone, Copy)]
pub enum Operation {
    /// `preadv`.
    Read {
        /// The file.
        fd: RawFd,
        /// The buffers.
        buffers: *const libc::iovec,
        /// How many there are.
        count: u32,
        /// Where to read.
        offset: u64,
    },
    /// `pwritev`.
    Write {
        /// The file.
        fd: RawFd,
        /// The buffers.
        buffers: *const libc::iovec,
        /// How many there are.
        count: u32,
        /// Where to write.
        offset: u64,
        /// Complete only when the data is on stable storage.
        durable: bool,
    },
    /// `fdatasync`.
    Sync {
        /// The file.
        fd: RawFd,
    },
}

impl Operation {
    fn entry(self) -> squeue::Entry {
        match self {
            Self::Read { fd, buffers, count, offset } => {
                opcode::Readv::new(types::Fd(fd), buffers, count).offset(offset).build()
            }
            Self::Write { fd, buffers, count, offset, durable } => {
                let flags = if durable { libc::RWF_DSYNC } else { 0 };
                let write = opcode::Writev::new(types::Fd(fd), buffers, count);
                write.offset(offset).rw_flags(flags).build()
            }
            Self::Sync { fd } => {
                opcode::Fsync::new(types::Fd(fd)).flags(types::FsyncFlags::DATASYNC).build()
            }
        }
    }
}

/// The submission queue is full and the kernel takes nothing from it now: try again later.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the submission queue is full")]
pub struct RingFull;

/// The io_uring of one thread.
pub struct Ring {
    io: IoUring,
    /// Written by the kernel when there is something to reap. Polling the ring's own fd would
    /// not do: with DEFER_TASKRUN nobody completes the work of a thread that sleeps elsewhere.
    news: EventFd,
    counters: Arc<Counters>,
    /// Ports with new results, each once.
    fired: Vec<Arc<Port>>,
    /// Enters in a row that brought nothing although the kernel still announces something.
    vain: u32,
}

impl std::fmt::Debug for Ring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Ring").field(&self.io.as_raw_fd()).finish()
    }
}

impl Ring {
    pub(crate) fn new(counters: &Arc<Counters>) -> io::Result<Self> {
        // Completions then need no interrupt of this thread: it comes by in every turn.
        let io = IoUring::builder()
            .setup_single_issuer()
            .setup_defer_taskrun()
            .setup_taskrun_flag()
            .setup_cqsize(4 * ENTRIES)
            .build(ENTRIES)
            .or_else(|_| IoUring::new(ENTRIES))?;
        bound_workers(&io);
        let news = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        io.submitter().register_eventfd(news.as_raw_fd())?;
        Ok(Self {
            io,
            news,
            counters: Arc::clone(counters),
            fired: Vec::with_capacity(64),
            vain: 0,
        })
    }

    /// So many workers (`iou-wrk-*`) the kernel makes for a ring at the most.
    pub const MOST_WORKERS: u32 = WORKERS[0] + WORKERS[1];

    /// Can this kernel make a ring for this process?
    pub fn probe() -> io::Result<()> {
        Self::new(&Arc::default()).map(drop)
    }

    /// Queues an operation; the loop submits all that was queued at the end of its turn.
    ///
    /// # Safety
    /// The file descriptor, the iovec array and the memory it names must stay valid, and the
    /// memory must not be given to anything else, until the result has come out of `port`.
    ///
    /// # Panics
    /// If `slot` is not a slot of `port`.
    pub unsafe fn submit(
        &mut self,
        operation: Operation,
        port: &Arc<Port>,
        slot: u16,
    ) -> Result<(), RingFull> {
        assert!(usize::from(slot) < port.results.len(), "no such slot");
        if self.io.submission().is_full() {
            self.enter();
            if self.io.submission().is_full() {
                return Err(RingFull);
            }
        }
        let port = Arc::into_raw(Arc::clone(port)) as u64;
        debug_assert_eq!(port >> SLOT_SHIFT, 0);
        let entry = operation.entry().user_data(port | u64::from(slot) << SLOT_SHIFT);
        // SAFETY: there is room, and the caller keeps what the entry points to valid.
        unsafe { self.io.submission().push(&entry) }.expect("there is room");
        self.counters.ring_submits.add(1);
        Ok(())
    }

    /// Is there anything to reap, or left to submit? Only looks at memory.
    ///
    /// A stale announcement does not count. What comes after it is not seen here but by `news`,
    /// which the kernel writes for every first piece of work.
    pub(crate) fn has_work(&self) -> bool {
        // SAFETY: the queues are only used through `&mut self` on this thread, and this borrow of
        // the shared views ends before any of that can happen.
        let (submission, completion) =
            unsafe { (self.io.submission_shared(), self.io.completion_shared()) };
        !completion.is_empty()
            || !submission.is_empty()
            || submission.taskrun() && self.vain < VAIN_ENTERS
    }

    /// Tells the kernel about what was queued, and lets it finish what is done.
    pub(crate) fn enter(&mut self) {
        let submission = self.io.submission();
        let (queued, pending) =
            (submission.len(), submission.taskrun() || submission.cq_overflow());
        drop(submission);
        if queued == 0 && !pending {
            return;
        }
        self.counters.ring_enters.add(1);
        const GETEVENTS: u32 = 1;
        // SAFETY: every queued entry was pushed under the contract of `submit`; no signal mask.
        // An error (EAGAIN, EBUSY, EINTR) leaves the entries queued for the next turn.
        let _ = unsafe {
            self.io.submitter().enter::<libc::sigset_t>(queued as u32, 0, GETEVENTS, None)
        };
        let in_vain = self.io.completion().is_empty() && self.io.submission().taskrun();
        self.vain = if in_vain { self.vain.saturating_add(1) } else { 0 };
    }

    /// Moves the results of completed operations to their ports.
    pub(crate) fn reap(&mut self) {
        let submission = self.io.submission();
        let pending = submission.taskrun() || submission.cq_overflow();
        drop(submission);
        if pending {
            self.enter();
        }
        for entry in self.io.completion() {
            self.counters.ring_completions.add(1);
            let data = entry.user_data();
            let port = (data & ((1 << SLOT_SHIFT) - 1)) as *const Port;
            // SAFETY: the kernel gives back the user_data of `submit`, which holds one reference
            // to a `Port` per operation; it is taken back exactly once, here.
            let port = unsafe { Arc::from_raw(port) };
            port.put((data >> SLOT_SHIFT) as u16, entry.result());
            if !self.fired.iter().any(|known| Arc::ptr_eq(known, &port)) {
                self.fired.push(port);
            }
        }
    }

    pub(crate) fn take_fired(&mut self) -> Vec<Arc<Port>> {
        std::mem::take(&mut self.fired)
    }

    /// Takes the emptied list back, so that its memory is used again.
    pub(crate) fn give_back(&mut self, emptied: Vec<Arc<Port>>) {
        self.fired = emptied;
    }
}

/// Keeps the workers that the kernel makes for this thread's ring few, and on CPUs that they may
/// have: by themselves they go everywhere, also where a vCPU is pinned. Where the kernel refuses
/// (before 5.14 and 5.15) they are as it makes them.
fn bound_workers(io: &IoUring) {
    let _ = io.submitter().register_iowq_max_workers(&mut WORKERS.clone());
    // SAFETY: zeros are a valid, empty set.
    let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    let cpus = thread::worker_cpus();
    let nameable = cpus.into_iter().filter(|&cpu| cpu < libc::CPU_SETSIZE as usize);
    // SAFETY: each is a bit of the set.
    nameable.for_each(|cpu| unsafe { libc::CPU_SET(cpu, &mut set) });
    // The kernel refuses an empty set, and one that goes beyond the cpuset.
    let _ = io.submitter().register_iowq_aff(&set);
}

/// Readable when there is something to reap.
impl AsRawFd for Ring {
    fn as_raw_fd(&self) -> RawFd {
        self.news.as_raw_fd()
    }
}

#[cfg(all(test, not(loom)))]
impl Ring {
    /// Raises IORING_SQ_TASKRUN with nothing behind it, as the kernel does when it loses the race
    /// told at [`VAIN_ENTERS`].
    pub(crate) fn announce_nothing(&self) {
        use std::sync::atomic::AtomicU32;
        const TASKRUN: u32 = 1 << 2;
        const SQ_OFF_FLAGS: usize = 14; // in `struct io_uring_params`, as 32-bit words
        let mut params = [0u32; 30];
        // SAFETY: the kernel fills the 120 bytes of the parameters, tells with them where the flags
        // lie in any ring, and the mapping covers them; both are given back before the end.
        unsafe {
            let fd = libc::syscall(libc::SYS_io_uring_setup, ENTRIES, params.as_mut_ptr());
            assert!(fd >= 0, "{}", io::Error::last_os_error());
            libc::close(fd as i32);
            let (both, shared) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED);
            let at = libc::mmap(std::ptr::null_mut(), 4096, both, shared, self.io.as_raw_fd(), 0);
            assert_ne!(at, libc::MAP_FAILED);
            let flags = at.byte_add(params[SQ_OFF_FLAGS] as usize).cast::<u32>();
            AtomicU32::from_ptr(flags).fetch_or(TASKRUN, SeqCst);
            libc::munmap(at, 4096);
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_knows_how_many_workers_a_ring_may_have() {
        let ring = Ring::new(&Arc::default()).unwrap();
        let mut limits = [0; 2]; // changes nothing, and gives what there is
        ring.io.submitter().register_iowq_max_workers(&mut limits).unwrap();
        assert_eq!(limits, WORKERS);
    }
}
