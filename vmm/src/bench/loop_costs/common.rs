//! What the measurements of the loop share: threads, file descriptors, strands, waiting.

use std::io;
use std::os::fd::{FromRawFd, IntoRawFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering::*};
use std::sync::mpsc::sync_channel;
use std::sync::{Arc, Barrier};
use std::time::{Duration, Instant};

use iothread::{Blocking, LoopHandle, PollPolicy, Sched, Strand, Thread, ThreadSpec};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// Longer than this nothing here takes, on any machine: then something was lost.
const LIMIT: Duration = Duration::from_secs(30);

pub(super) fn lost() -> io::Error {
    io::Error::other("an event was lost, or served twice")
}

pub(super) fn nanos(time: Duration) -> f64 {
    time.as_nanos() as f64
}

pub(super) fn eventfds(count: usize) -> io::Result<Vec<EventFd>> {
    (0..count).map(|_| EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)).collect()
}

pub(super) fn owned(eventfd: EventFd) -> OwnedFd {
    #[expect(unsafe_code, reason = "an EventFd gives its fd only raw")]
    // SAFETY: into_raw_fd passed the ownership on.
    unsafe {
        OwnedFd::from_raw_fd(eventfd.into_raw_fd())
    }
}

/// The object of a measurement, in a strand.
pub(super) fn strand<T: Send + 'static>(home: &LoopHandle, object: T) -> Strand<T> {
    Strand::new("bench", home, object)
}

fn spec(name: &str) -> ThreadSpec {
    ThreadSpec::new(name)
}

pub(super) fn start(name: &str, body: impl FnOnce() + Send + 'static) -> io::Result<Thread> {
    iothread::spawn(spec(name), body)
}

/// Runs `body` on a thread of its own, which may become a loop.
pub(super) fn on_thread<R: Send + 'static>(
    body: impl FnOnce() -> io::Result<R> + Send + 'static,
) -> io::Result<R> {
    let (sender, receiver) = sync_channel(1);
    let thread = start("measured", move || drop(sender.send(body())))?;
    let result = receiver.recv().map_err(|_| io::Error::other("a measuring thread died"));
    // A panic there has been printed already.
    let _ = thread.join();
    result?
}

/// Runs what `make` makes on so many threads, from one moment on; gives the time until the last
/// is done. A thread calls what it is given when it is ready to start.
pub(super) fn together<F: FnOnce(&dyn Fn()) + Send + 'static>(
    threads: usize,
    make: impl Fn(usize) -> F,
) -> io::Result<Duration> {
    let line = Arc::new(Barrier::new(threads));
    let (sender, receiver) = sync_channel(threads);
    let mut running = Vec::new();
    for nth in 0..threads {
        let (body, line, sender) = (make(nth), Arc::clone(&line), sender.clone());
        running.push(start("kicker", move || {
            let began = std::cell::Cell::new(Instant::now());
            body(&|| {
                line.wait();
                began.set(Instant::now());
            });
            let _ = sender.send((began.get(), Instant::now()));
        })?);
    }
    drop(sender);
    let times: Vec<(Instant, Instant)> = receiver.iter().collect();
    for thread in running {
        thread.join().map_err(|_| io::Error::other("a measuring thread panicked"))?;
    }
    let first = times.iter().map(|(began, _)| *began).min();
    let last = times.iter().map(|(_, ended)| *ended).max();
    first.zip(last).map(|(first, last)| last - first).ok_or_else(lost)
}

/// What `once` takes, `rounds` times: `rounds` times what the median stretch of `stretch` took, as
/// one pre-emption is longer than all the others together.
pub(super) fn typical(
    rounds: u32,
    stretch: u32,
    mut once: impl FnMut() -> io::Result<()>,
) -> io::Result<Duration> {
    let mut times = Vec::with_capacity((rounds / stretch) as usize);
    for _ in 0..rounds / stretch {
        let began = Instant::now();
        for _ in 0..stretch {
            once()?;
        }
        times.push(began.elapsed());
    }
    Ok(median(times) * (rounds / stretch))
}

pub(super) fn median(mut times: Vec<Duration>) -> Duration {
    times.sort_unstable();
    times.get(times.len() / 2).copied().unwrap_or_default()
}

/// Waits for a counter without sleeping. Gives the CPU away soon: who counts may have been woken on
/// this very one, and would else be measured with the wait for it.
pub(super) fn await_count(count: &AtomicU64, target: u64) -> io::Result<()> {
    let began = Instant::now();
    while count.load(Acquire) < target {
        for _ in 0..50 {
            if count.load(Acquire) >= target {
                return Ok(());
            }
            std::hint::spin_loop();
        }
        if began.elapsed() > LIMIT {
            return Err(lost());
        }
        std::thread::yield_now();
    }
    Ok(())
}

/// A thread with a loop, which ends with this.
pub(super) struct LoopThread {
    pub(super) handle: LoopHandle,
    thread: Option<Thread>,
}

impl LoopThread {
    pub(super) fn new(poll: PollPolicy) -> io::Result<Self> {
        Self::placed(None, Sched::Other(0), poll)
    }

    pub(super) fn placed(
        cpus: Option<Vec<usize>>,
        sched: Sched,
        poll: PollPolicy,
    ) -> io::Result<Self> {
        let spec = ThreadSpec { cpus, sched, ..ThreadSpec::new("loop") };
        let (handle, thread) = iothread::spawn_loop(spec, poll)?;
        let refused = thread.granted.refused.first().map(ToString::to_string);
        let this = Self { handle, thread: Some(thread) };
        refused.map_or(Ok(this), |why| Err(io::Error::other(why)))
    }

    pub(super) fn tid(&self) -> u32 {
        self.thread.as_ref().map_or(0, |thread| thread.granted.tid)
    }

    /// Waits until all that was sent to the loop has been run.
    pub(super) fn barrier(&self) -> io::Result<()> {
        let blocking = Blocking::on_this_thread().ok_or_else(|| io::Error::other("on a loop"))?;
        self.handle.barrier().wait(&blocking).map_err(io::Error::other)
    }
}

impl Drop for LoopThread {
    fn drop(&mut self) {
        self.handle.stop();
        drop(self.handle.barrier()); // a loop that polls sees nothing but work
        if let Some(thread) = self.thread.take() {
            // A panic there has been printed already.
            let _ = thread.join();
        }
    }
}
