//! Threads: name, CPU set, scheduling policy; set by the thread itself and read back.
//!
//! Linux threads inherit affinity, policy, nice value and timer slack of their creator. Here
//! nothing is inherited by accident: [`start_thread`] is the only place where threads are made, and
//! each sets all of these itself. A thread that asks for no CPUs gets those the process was
//! started with. Threads that the kernel makes on behalf of one of ours (io_uring's workers, KVM's)
//! are never real-time threads and have no nice value below 0: all have SCHED_RESET_ON_FORK.
//!
//! What does stay inherited is the cgroup, of the process and of the thread (cgroups(7), "threaded"):
//! a thread is born in its creator's. Ours are all made by the process's first thread, so
//! all are where that one was put; who wants them elsewhere moves them by their ids.

#![expect(unsafe_code, reason = "affinity and scheduling are set by system calls")]

use std::cell::RefCell;
use std::fmt;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::OnceLock;
use std::sync::mpsc::{Receiver, sync_channel};
use std::thread::JoinHandle;
use std::time::Duration;

use crate::event_loop::{EventLoop, LoopPolicy};
use crate::handle::LoopHandle;
use crate::runaway::{Guard, Watch};

/// Host CPUs that this code can name; the kernel's largest NR_CPUS on x86_64.
const MAX_CPUS: usize = 8192;
const WORDS: usize = MAX_CPUS / 64;

/// Host scheduling of a thread.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sched {
    /// SCHED_OTHER with a nice value.
    Other(i8),
    /// SCHED_BATCH with a nice value.
    Batch(i8),
    /// SCHED_IDLE.
    Idle,
    /// SCHED_FIFO with a priority of 1 to 99.
    Fifo(u8),
    /// SCHED_RR with a priority of 1 to 99.
    Rr(u8),
}

impl Sched {
    /// Does it go before all that is not real-time?
    pub fn is_real_time(self) -> bool {
        matches!(self, Self::Fifo(_) | Self::Rr(_))
    }
}

impl fmt::Display for Sched {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Other(0) => write!(f, "other"),
            Self::Other(nice) => write!(f, "other, nice {nice}"),
            Self::Batch(0) => write!(f, "batch"),
            Self::Batch(nice) => write!(f, "batch, nice {nice}"),
            Self::Idle => write!(f, "idle"),
            Self::Fifo(priority) => write!(f, "fifo {priority}"),
            Self::Rr(priority) => write!(f, "rr {priority}"),
        }
    }
}

/// What a thread should be.
#[derive(Debug, Clone)]
pub struct ThreadSpec {
    /// Its name; the kernel keeps the first 15 bytes.
    pub name: String,
    /// The host CPUs it may use; `None`: those the process was started with.
    pub cpus: Option<Vec<usize>>,
    /// Its scheduling.
    pub sched: Sched,
    /// With a real-time policy: the CPU time it may use without blocking before it loses that
    /// policy; `None`: any. See [`Guard`].
    pub runaway: Option<Duration>,
    /// The host CPUs of the workers that the kernel makes for this thread's io_uring; `None`: those
    /// of the thread.
    pub worker_cpus: Option<Vec<usize>>,
}

impl ThreadSpec {
    /// A thread of this name with nothing special.
    pub fn new(name: impl Into<String>) -> Self {
        let (name, sched) = (name.into(), Sched::Other(0));
        Self { name, cpus: None, sched, runaway: None, worker_cpus: None }
    }
}

/// What a thread is, read back from the kernel.
#[derive(Debug, Clone)]
pub struct Granted {
    /// Its name, as asked for.
    pub name: String,
    /// The kernel's thread id.
    pub tid: u32,
    /// The host CPUs it may use.
    pub cpus: Vec<usize>,
    /// Its scheduling.
    pub sched: Sched,
    /// Wishes that could not be had.
    pub refused: Vec<Refused>,
    /// Watches over it, if it has a real-time policy that it can lose.
    pub guard: Option<Arc<Guard>>,
}

/// A wish that the host did not grant.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refused {
    /// What was asked for.
    pub wish: String,
    /// What the thread has instead.
    pub got: String,
    /// Why, and what to do about it.
    pub why: String,
}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "wanted {}, got {}: {}", self.wish, self.got, self.why)
    }
}

/// A running thread.
#[derive(Debug)]
pub struct Thread {
    /// What it is.
    pub granted: Granted,
    handle: JoinHandle<()>,
}

impl Thread {
    /// Waits for its end. `Err`: it panicked.
    pub fn join(self) -> std::thread::Result<()> {
        self.handle.join()
    }

    /// Has it ended?
    pub fn is_finished(&self) -> bool {
        self.handle.is_finished()
    }
}

/// Bytes of a thread's stack. With less than a huge page the kernel never backs it by one, which
/// would cost 2 MiB at the first touch.
const STACK: usize = 512 << 10;

/// A thread that may still be taking on what it should be.
#[derive(Debug)]
pub struct Starting {
    granted: Receiver<Granted>,
    handle: JoinHandle<()>,
}

impl Starting {
    /// Waits until the thread is what it can be.
    pub fn wait(self) -> io::Result<Thread> {
        let granted = self.granted.recv().map_err(|_| io::Error::other("the new thread died"))?;
        Ok(Thread { granted, handle: self.handle })
    }
}

/// Starts a thread, which takes on what `spec` says before it runs `body`, and waits until it has.
///
/// Refused wishes are not errors here: they are in [`Granted::refused`].
pub fn spawn(spec: ThreadSpec, body: impl FnOnce() + Send + 'static) -> io::Result<Thread> {
    start_thread(spec, body)?.wait()
}

/// Like [`spawn`], without the wait: for many threads at once.
pub fn start_thread(
    spec: ThreadSpec,
    body: impl FnOnce() + Send + 'static,
) -> io::Result<Starting> {
    available_cpus(); // before any thread can have narrowed them
    let (sender, receiver) = sync_channel(1);
    let builder = std::thread::Builder::new().name(spec.name.clone()).stack_size(STACK);
    let handle = builder.spawn(move || {
        let (granted, _watch) = take_on(spec);
        if sender.send(granted).is_ok() {
            body();
        }
    })?;
    Ok(Starting { granted: receiver, handle })
}

/// Starts a thread with a loop.
pub fn spawn_loop(
    spec: ThreadSpec,
    policy: impl Into<LoopPolicy>,
) -> io::Result<(LoopHandle, Thread)> {
    let policy = policy.into();
    let (sender, receiver) = sync_channel(1);
    let name = spec.name.clone();
    let thread = spawn(spec, move || match EventLoop::new(&name, policy) {
        Ok(event_loop) => {
            if sender.send(Ok(event_loop.handle())).is_ok() {
                event_loop.run();
            }
        }
        Err(error) => drop(sender.send(Err(error))),
    })?;
    let handle = receiver.recv().map_err(|_| io::Error::other("the new loop died"))??;
    Ok((handle, thread))
}

/// Runs `f` on these CPUs, if they may be had, and comes back to those the calling thread had.
/// Threads that the kernel makes meanwhile on behalf of this one stay there.
pub fn elsewhere<R>(cpus: &[usize], f: impl FnOnce() -> R) -> R {
    let own = affinity().ok().filter(|_| set_affinity(cpus).is_ok());
    let result = f();
    if let Some(own) = own {
        // It had them just before.
        let _ = set_affinity(&own);
    }
    result
}

/// The CPUs the process was started with.
pub fn available_cpus() -> &'static [usize] {
    static CPUS: OnceLock<Vec<usize>> = OnceLock::new();
    CPUS.get_or_init(|| {
        affinity().unwrap_or_else(|_| {
            core_affinity::get_core_ids().unwrap_or_default().iter().map(|core| core.id).collect()
        })
    })
}

/// Raises the soft limit of open files to the hard one and gives the result.
pub fn raise_file_limit() -> io::Result<u64> {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: `limit` is a valid rlimit for both calls.
    unsafe {
        if libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) != 0 {
            return Err(io::Error::last_os_error());
        }
        limit.rlim_cur = limit.rlim_max;
        if libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit) != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(limit.rlim_cur)
}

/// Makes room for `count` open files while the process has one thread. Later the kernel makes room
/// as files are opened, and each time waits until no thread can be using the old table: tens of
/// milliseconds for a thousand files.
pub fn reserve_files(count: u64) {
    let Ok(last) = libc::c_int::try_from(count) else { return };
    let Ok(null) = std::fs::File::open("/dev/null") else { return };
    // SAFETY: a new descriptor, which is nobody else's, is closed again.
    unsafe {
        let highest = libc::fcntl(null.as_raw_fd(), libc::F_DUPFD_CLOEXEC, last);
        if highest >= 0 {
            libc::close(highest);
        }
    }
}

thread_local! {
    /// See [`ThreadSpec::worker_cpus`].
    static WORKER_CPUS: RefCell<Option<Vec<usize>>> = const { RefCell::new(None) };
}

/// The CPUs of the workers that the kernel makes for the calling thread's io_uring.
pub(crate) fn worker_cpus() -> Vec<usize> {
    let told = WORKER_CPUS.with_borrow(Clone::clone);
    told.or_else(|| affinity().ok()).unwrap_or_default()
}

/// How often a thread gave up its CPU.
pub(crate) struct Switches {
    /// To wait for something.
    pub(crate) voluntary: u64,
    /// Because the kernel took it away.
    pub(crate) involuntary: u64,
}

/// Those of the calling thread. May be called in a signal handler.
pub(crate) fn switches() -> Switches {
    let mut usage = std::mem::MaybeUninit::<libc::rusage>::uninit();
    // SAFETY: the kernel fills one rusage, and cannot fail for a valid pointer and RUSAGE_THREAD.
    let usage = unsafe {
        libc::getrusage(libc::RUSAGE_THREAD, usage.as_mut_ptr());
        usage.assume_init()
    };
    Switches { voluntary: usage.ru_nvcsw as u64, involuntary: usage.ru_nivcsw as u64 }
}

/// Timers of the calling thread fire when they are due. A policy that was real-time and is no more
/// brings back the slack of whoever made the thread.
pub(crate) fn set_timer_slack() {
    // SAFETY: PR_SET_TIMERSLACK takes a plain number, of nanoseconds.
    unsafe { libc::prctl(libc::PR_SET_TIMERSLACK, 1usize, 0usize, 0usize, 0usize) };
}

/// Makes the calling thread what `spec` says, as far as the host lets it.
fn take_on(spec: ThreadSpec) -> (Granted, Option<Watch>) {
    let wanted = spec.cpus.as_deref().unwrap_or_else(|| available_cpus());
    let pinned = set_affinity(wanted);
    let scheduled = set_sched(spec.sched);
    set_timer_slack();
    WORKER_CPUS.set(spec.worker_cpus);
    let cpus = affinity().unwrap_or_default();
    let sched = current_sched();
    let mut refused = Vec::new();
    if spec.cpus.is_some() && cpus != wanted {
        let why = match pinned {
            Err(error) => format!("{error}"),
            Ok(()) => "the others are offline or outside this process's cpuset".to_owned(),
        };
        refused.push(Refused { wish: cpu_list(wanted), got: cpu_list(&cpus), why });
    }
    if sched != spec.sched {
        let why = match scheduled {
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                "not permitted: raise RLIMIT_RTPRIO or RLIMIT_NICE, or grant CAP_SYS_NICE".into()
            }
            Err(error) => format!("{error}"),
            Ok(()) => "the kernel changed it".to_owned(),
        };
        refused.push(Refused { wish: spec.sched.to_string(), got: sched.to_string(), why });
    }
    let limit = spec.runaway.filter(|_| sched.is_real_time());
    let watch = limit.and_then(|limit| {
        let refuse = |error| {
            let wish = format!("a guard that ends {sched} after {limit:?} without a pause");
            refused.push(Refused { wish, got: "none".into(), why: format!("{error}") });
        };
        Watch::begin(limit).map_err(refuse).ok()
    });
    let guard = watch.as_ref().map(|watch| Arc::clone(watch.guard()));
    // SAFETY: gettid has no preconditions.
    let tid = unsafe { libc::gettid() } as u32;
    (Granted { name: spec.name, tid, cpus, sched, refused, guard }, watch)
}

fn cpu_list(cpus: &[usize]) -> String {
    let mut list = String::from("CPUs ");
    let mut rest = cpus;
    while let [first, ..] = *rest {
        let run = rest.iter().zip(first..).take_while(|(cpu, expected)| *cpu == expected).count();
        let comma = if list.ends_with(' ') { "" } else { "," };
        match run {
            1 => list += &format!("{comma}{first}"),
            _ => list += &format!("{comma}{first}-{}", first + run - 1),
        }
        rest = &rest[run..];
    }
    list
}

fn set_affinity(cpus: &[usize]) -> io::Result<()> {
    // core_affinity does 1:1 pins, and panics at ids a cpu_set_t has no bit for.
    if let [cpu] = *cpus
        && cpu < libc::CPU_SETSIZE as usize
        && core_affinity::set_for_current(core_affinity::CoreId { id: cpu })
    {
        return Ok(());
    }
    let mut mask = [0u64; WORDS];
    for &cpu in cpus {
        let word = mask.get_mut(cpu / 64).ok_or_else(|| {
            io::Error::other(format!("CPU {cpu} is above the largest possible, {}", MAX_CPUS - 1))
        })?;
        *word |= 1 << (cpu % 64);
    }
    // SAFETY: the mask is as long as the size says, and the kernel only reads it.
    match unsafe { libc::sched_setaffinity(0, size_of_val(&mask), mask.as_ptr().cast()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

fn affinity() -> io::Result<Vec<usize>> {
    let mut mask = [0u64; WORDS];
    // SAFETY: the mask is as long as the size says; the kernel writes at most that.
    if unsafe { libc::sched_getaffinity(0, size_of_val(&mask), mask.as_mut_ptr().cast()) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok((0..MAX_CPUS).filter(|cpu| mask[cpu / 64] >> (cpu % 64) & 1 == 1).collect())
}

fn set_sched(sched: Sched) -> io::Result<()> {
    let (policy, priority, nice) = match sched {
        Sched::Other(nice) => (libc::SCHED_OTHER, 0, nice),
        Sched::Batch(nice) => (libc::SCHED_BATCH, 0, nice),
        Sched::Idle => (libc::SCHED_IDLE, 0, 0),
        Sched::Fifo(priority) => (libc::SCHED_FIFO, priority, 0),
        Sched::Rr(priority) => (libc::SCHED_RR, priority, 0),
    };
    let param = libc::sched_param { sched_priority: i32::from(priority) };
    // SAFETY: `param` is valid; 0 is the calling thread for both calls.
    unsafe {
        if libc::sched_setscheduler(0, policy | libc::SCHED_RESET_ON_FORK, &raw const param) != 0 {
            return Err(io::Error::last_os_error());
        }
        if libc::setpriority(libc::PRIO_PROCESS, 0, i32::from(nice)) != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

fn current_sched() -> Sched {
    let mut param = libc::sched_param { sched_priority: 0 };
    // SAFETY: `param` is valid; 0 is the calling thread for all three calls.
    let (policy, nice) = unsafe {
        libc::sched_getparam(0, &raw mut param);
        (libc::sched_getscheduler(0), libc::getpriority(libc::PRIO_PROCESS, 0) as i8)
    };
    let priority = param.sched_priority as u8;
    match policy & !libc::SCHED_RESET_ON_FORK {
        libc::SCHED_FIFO => Sched::Fifo(priority),
        libc::SCHED_RR => Sched::Rr(priority),
        libc::SCHED_BATCH => Sched::Batch(nice),
        libc::SCHED_IDLE => Sched::Idle,
        _ => Sched::Other(nice),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(cpus: Option<Vec<usize>>, sched: Sched) -> ThreadSpec {
        ThreadSpec { cpus, sched, ..ThreadSpec::new("test") }
    }

    #[test]
    fn what_was_granted_is_what_the_kernel_says() {
        let last = *available_cpus().last().unwrap();
        let thread = spawn(spec(Some(vec![last]), Sched::Batch(3)), || {}).unwrap();
        assert_eq!(thread.granted.cpus, [last]);
        assert_eq!(thread.granted.sched, Sched::Batch(3));
        assert_eq!(thread.granted.refused, []);
        thread.join().unwrap();
    }

    #[test]
    fn room_for_files_is_made_at_once_and_a_wish_beyond_the_limit_does_no_harm() {
        let limit = raise_file_limit().unwrap();
        reserve_files(u64::MAX);
        reserve_files(limit + 1);
        reserve_files(900);
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let size = status.lines().find_map(|line| line.strip_prefix("FDSize:")).unwrap();
        assert!(size.trim().parse::<u64>().unwrap() > 900, "{size}");
    }

    #[test]
    fn affinity_does_not_leak_to_a_thread_that_did_not_ask() {
        let (sender, receiver) = sync_channel(1);
        let first = available_cpus()[0];
        let outer = spawn(spec(Some(vec![first]), Sched::Other(0)), move || {
            let inner = spawn(spec(None, Sched::Other(0)), || {}).unwrap();
            sender.send(inner.granted.cpus.clone()).unwrap();
        })
        .unwrap();
        assert_eq!(receiver.recv().unwrap(), available_cpus());
        outer.join().unwrap();
    }

    #[test]
    fn a_thread_that_was_elsewhere_comes_back() {
        let (first, last) = (available_cpus()[0], *available_cpus().last().unwrap());
        let thread = spawn(spec(Some(vec![first]), Sched::Other(0)), move || {
            assert_eq!(elsewhere(&[last], || affinity().unwrap()), [last]);
            assert_eq!(affinity().unwrap(), [first]);
            assert_eq!(elsewhere(&[8191], || affinity().unwrap()), [first], "it has no other");
            assert_eq!(affinity().unwrap(), [first]);
        });
        thread.unwrap().join().unwrap();
    }

    #[test]
    fn a_cpu_the_host_does_not_have_is_refused_and_said() {
        let thread = spawn(spec(Some(vec![8191]), Sched::Other(0)), || {}).unwrap();
        assert_eq!(thread.granted.cpus, available_cpus());
        assert_eq!(thread.granted.refused[0].wish, "CPUs 8191");
        thread.join().unwrap();
    }

    #[test]
    fn cpu_lists_are_written_as_ranges() {
        assert_eq!(cpu_list(&[0, 1, 2, 5, 7, 8]), "CPUs 0-2,5,7-8");
    }
}
