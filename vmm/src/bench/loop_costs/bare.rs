//! The baselines: the epoll loop anybody would write, and a lock around an object.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::*};
use std::time::{Duration, Instant};

use iothread::Thread;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};
use vmm_sys_util::timerfd::TimerFd;

use super::STRETCH;
use super::common::{await_count, eventfds, lost, start, together, typical};

/// epoll, edge-triggered, and a boxed closure for each file descriptor.
struct Bare {
    epoll: Epoll,
    handlers: Vec<Box<dyn FnMut()>>,
    ready: Vec<EpollEvent>,
}

impl Bare {
    fn new() -> io::Result<Self> {
        Ok(Self {
            epoll: Epoll::new()?,
            handlers: Vec::new(),
            ready: vec![EpollEvent::default(); 256],
        })
    }

    fn watch(&mut self, fd: RawFd, handler: impl FnMut() + 'static) -> io::Result<()> {
        let data = self.handlers.len() as u64;
        let event = EpollEvent::new(EventSet::IN | EventSet::EDGE_TRIGGERED, data);
        self.epoll.ctl(ControlOperation::Add, fd, event)?;
        self.handlers.push(Box::new(handler));
        Ok(())
    }

    fn turn(&mut self) {
        // An error can only be an interruption.
        let count = self.epoll.wait(-1, &mut self.ready).unwrap_or(0);
        for event in &self.ready[..count] {
            self.handlers[event.data() as usize]();
        }
    }
}

fn counter() -> (Arc<AtomicU64>, impl FnMut() + 'static) {
    let count = Arc::<AtomicU64>::default();
    let counted = Arc::clone(&count);
    (count, move || counted.store(counted.load(Relaxed) + 1, Relaxed))
}

/// `at_once` eventfds written, then one `epoll_wait`; `rounds` times.
pub(super) fn fd_events(at_once: usize, rounds: u32) -> io::Result<Duration> {
    let mut bare = Bare::new()?;
    let fds = eventfds(at_once)?;
    let mut counts = Vec::new();
    for fd in &fds {
        let (count, handler) = counter();
        bare.watch(fd.as_raw_fd(), handler)?;
        counts.push(count);
    }
    let spent = typical(rounds, STRETCH / at_once as u32, || {
        for fd in &fds {
            fd.write(1)?;
        }
        bare.turn();
        Ok(())
    })?;
    let all = counts.iter().all(|count| count.load(Relaxed) == u64::from(rounds));
    if all { Ok(spent) } else { Err(lost()) }
}

/// An eventfd as a message to oneself: written, waited for, read.
pub(super) fn eventfd_round_trips(rounds: u32) -> io::Result<Duration> {
    let mut bare = Bare::new()?;
    let fd = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
    let (reader, (count, mut handler)) = (fd.try_clone()?, counter());
    bare.watch(fd.as_raw_fd(), move || {
        if reader.read().is_ok() {
            handler();
        }
    })?;
    let spent = typical(rounds, STRETCH, || {
        fd.write(1)?;
        bare.turn();
        Ok(())
    })?;
    if count.load(Relaxed) == u64::from(rounds) { Ok(spent) } else { Err(lost()) }
}

/// A timerfd that each expiry sets again, due at once.
pub(super) fn timers(rounds: u32) -> io::Result<Duration> {
    const AT_ONCE: Duration = Duration::from_nanos(1);
    let mut bare = Bare::new()?;
    let mut timer = TimerFd::new().map_err(errno)?;
    timer.reset(AT_ONCE, None).map_err(errno)?;
    let (fd, (count, mut handler)) = (timer.as_raw_fd(), counter());
    bare.watch(fd, move || {
        handler();
        // Valid arguments: it does not fail; if it did, the count would never be reached.
        let _ = timer.reset(AT_ONCE, None);
    })?;
    let mut target = 0;
    typical(rounds, STRETCH, || {
        target += 1;
        while count.load(Relaxed) < target {
            bare.turn();
        }
        Ok(())
    })
}

fn errno(error: vmm_sys_util::errno::Error) -> io::Error {
    io::Error::from_raw_os_error(error.errno())
}

/// A thread in a bare epoll loop.
pub(super) struct BareThread {
    fds: Vec<EventFd>,
    ran: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
    thread: Option<Thread>,
}

impl BareThread {
    pub(super) fn new(fds: usize) -> io::Result<Self> {
        let fds = eventfds(fds)?;
        let (ran, stop) = (Arc::<AtomicU64>::default(), Arc::<AtomicBool>::default());
        let watched = fds.iter().map(EventFd::try_clone).collect::<io::Result<Vec<_>>>()?;
        let (count, stopped) = (Arc::clone(&ran), Arc::clone(&stop));
        let thread = start("bare", move || {
            let Ok(mut bare) = Bare::new() else { return };
            for fd in &watched {
                let count = Arc::clone(&count);
                let added = bare.watch(fd.as_raw_fd(), move || {
                    count.fetch_add(1, Release);
                });
                if added.is_err() {
                    return;
                }
            }
            while !stopped.load(Acquire) {
                bare.turn();
            }
        })?;
        Ok(Self { fds, ran, stop, thread: Some(thread) })
    }

    /// Signals every fd and waits until all have been served; gives the time that took.
    pub(super) fn signal_all(&self) -> io::Result<Duration> {
        let target = self.ran.load(Relaxed) + self.fds.len() as u64;
        let began = Instant::now();
        for fd in &self.fds {
            fd.write(1)?;
        }
        await_count(&self.ran, target)?;
        Ok(began.elapsed())
    }
}

impl Drop for BareThread {
    fn drop(&mut self) {
        self.stop.store(true, Release);
        let _ = self.fds[0].write(1);
        if let Some(thread) = self.thread.take() {
            // A panic there has been printed already.
            let _ = thread.join();
        }
    }
}

/// `threads` threads that each enter one object `rounds` times, by a lock.
#[expect(clippy::disallowed_types, reason = "this is what strands are held against")]
pub(super) fn locked(threads: usize, rounds: u32) -> io::Result<Duration> {
    use std::sync::Mutex;
    type Callback = Box<dyn Fn(&mut u64) + Send + Sync>;
    let object = Arc::new(Mutex::new(0u64));
    let spent = together(threads, |_| {
        let object = Arc::clone(&object);
        let callback: Callback = Box::new(|count| *count += 1);
        move |start: &dyn Fn()| {
            start();
            for _ in 0..rounds {
                if let Ok(mut object) = object.lock() {
                    callback(&mut object);
                }
            }
        }
    })?;
    let count = object.lock().map_or(0, |count| *count);
    if count == threads as u64 * u64::from(rounds) { Ok(spent) } else { Err(lost()) }
}
