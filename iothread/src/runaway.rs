//! The guard against real-time threads that run away.
//!
//! A thread with SCHED_FIFO or SCHED_RR that never blocks takes its CPU from all that is less
//! urgent. A guarded thread that uses CPU time for longer than its limit without blocking once
//! is put back to SCHED_OTHER with nice 0, and its [`Guard`] says so.
//!
//! A timer on the thread's own CPU time (timer_create(2), CLOCK_THREAD_CPUTIME_ID) signals that
//! thread alone (SIGEV_THREAD_ID) each time it has used as much as the limit. If it has made no
//! voluntary context switch since the last time (getrusage(2), RUSAGE_THREAD), it has run for
//! that long without blocking. So it is caught after between one and two limits of CPU time. A
//! yield, a page that is there or being preempted is no blocking; time in the guest counts.
//!
//! RLIMIT_RTTIME is made for this, but for the whole process: one limit for all threads, a signal
//! that any thread may take, and a limit that the kernel raises by a second for each signal.

#![expect(unsafe_code, reason = "a signal handler, and a timer of a thread's CPU time")]

use std::cell::Cell;
use std::io;
use std::mem;
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::*};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use vmm_sys_util::eventfd::EventFd;

use crate::thread::{set_timer_slack, switches};

thread_local! {
    /// The guard of this thread, or null.
    static GUARD: Cell<*const Guard> = const { Cell::new(ptr::null()) };
}

/// Told of every demotion.
static BELL: OnceLock<EventFd> = OnceLock::new();

/// Every demotion in this process from now on writes to `bell`. Only the first call counts.
pub fn ring_on_demotion(bell: EventFd) {
    let _ = BELL.set(bell);
}

/// What became of a guarded thread; any thread may look.
#[derive(Debug)]
pub struct Guard {
    limit: Duration,
    demoted: AtomicBool,
    /// Voluntary context switches when its thread looked last.
    blocked: AtomicU64,
}

impl Guard {
    /// The CPU time that its thread may use without blocking.
    pub fn limit(&self) -> Duration {
        self.limit
    }

    /// Has its thread used more, and lost its priority for good?
    pub fn demoted(&self) -> bool {
        self.demoted.load(Acquire)
    }

    /// The calling thread, which is the guarded one, has used `limit` once more. Only system calls
    /// and atomics: this runs in a signal handler.
    fn look(&self) {
        let blocked = switches().voluntary;
        if blocked != self.blocked.swap(blocked, Relaxed) || self.demoted.load(Relaxed) {
            return;
        }
        let param = libc::sched_param { sched_priority: 0 };
        let policy = libc::SCHED_OTHER | libc::SCHED_RESET_ON_FORK;
        // SAFETY: `param` is valid; 0 is the calling thread. Going down needs no rights.
        if unsafe { libc::sched_setscheduler(0, policy, &raw const param) } != 0 {
            return; // it is tried again after the next `limit`
        }
        set_timer_slack();
        self.demoted.store(true, Release);
        if let Some(bell) = BELL.get() {
            // One write(2); an eventfd refuses only when it is readable anyway.
            let _ = bell.write(1);
        }
    }
}

/// The signal of these timers. SIGRTMIN itself makes vCPUs leave the guest.
fn signal() -> libc::c_int {
    libc::SIGRTMIN() + 1
}

extern "C" fn on_timer(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    let guard = GUARD.with(Cell::get);
    if guard.is_null() {
        return;
    }
    // SAFETY: errno is this thread's own; what was interrupted must find it unchanged.
    let errno = unsafe { *libc::__errno_location() };
    // SAFETY: `Watch` keeps the guard alive, and takes the pointer back before it lets go of it.
    unsafe { &*guard }.look();
    // SAFETY: as above.
    unsafe { *libc::__errno_location() = errno };
}

fn install() -> io::Result<()> {
    static INSTALLED: OnceLock<Option<i32>> = OnceLock::new();
    let failed = INSTALLED.get_or_init(|| {
        // SAFETY: zeros are a valid sigaction with an empty mask; the handler has the signature
        // that SA_SIGINFO asks for and does only what a signal handler may.
        let result = unsafe {
            let mut action: libc::sigaction = mem::zeroed();
            action.sa_sigaction = on_timer as *const () as usize;
            // System calls go on. KVM_RUN never does: it returns EINTR and is entered again.
            action.sa_flags = libc::SA_SIGINFO | libc::SA_RESTART;
            libc::sigaction(signal(), &raw const action, ptr::null_mut())
        };
        (result != 0).then(|| io::Error::last_os_error().raw_os_error().unwrap_or(0))
    });
    failed.map_or(Ok(()), |errno| Err(io::Error::from_raw_os_error(errno)))
}

/// The calling thread is guarded as long as this lives.
#[derive(Debug)]
pub(crate) struct Watch {
    guard: Arc<Guard>,
    timer: libc::timer_t,
}

impl Watch {
    /// Guards the calling thread, which is a real-time thread. At most one per thread.
    pub(crate) fn begin(limit: Duration) -> io::Result<Self> {
        install()?;
        let guard = Arc::new(Guard {
            limit,
            demoted: AtomicBool::new(false),
            blocked: AtomicU64::new(switches().voluntary),
        });
        let nanos = libc::c_long::from(limit.subsec_nanos() as i32);
        let period = libc::timespec { tv_sec: limit.as_secs() as libc::time_t, tv_nsec: nanos };
        let times = libc::itimerspec { it_interval: period, it_value: period };
        // SAFETY: zeros are a valid sigevent and a valid set of signals, all pointers are valid
        // during the calls, and the thread id is the calling thread's.
        let timer = unsafe {
            let mut event: libc::sigevent = mem::zeroed();
            event.sigev_notify = libc::SIGEV_THREAD_ID;
            event.sigev_signo = signal();
            event.sigev_notify_thread_id = libc::gettid();
            let mut timer: libc::timer_t = ptr::null_mut();
            let clock = libc::CLOCK_THREAD_CPUTIME_ID;
            if libc::timer_create(clock, &raw mut event, &raw mut timer) != 0 {
                return Err(io::Error::last_os_error());
            }
            timer
        };
        let watch = Self { guard, timer };
        GUARD.with(|cell| cell.set(Arc::as_ptr(&watch.guard)));
        // SAFETY: as above; the timer is this thread's. Whoever made this thread may have had the
        // signal blocked.
        let armed = unsafe {
            let mut set: libc::sigset_t = mem::zeroed();
            libc::sigaddset(&raw mut set, signal());
            libc::pthread_sigmask(libc::SIG_UNBLOCK, &raw const set, ptr::null_mut()) == 0
                && libc::timer_settime(timer, 0, &raw const times, ptr::null_mut()) == 0
        };
        if armed { Ok(watch) } else { Err(io::Error::last_os_error()) }
    }

    pub(crate) fn guard(&self) -> &Arc<Guard> {
        &self.guard
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        GUARD.with(|cell| cell.set(ptr::null()));
        // SAFETY: the timer is ours and is not used again. A signal that is on its way finds null.
        unsafe { libc::timer_delete(self.timer) };
    }
}
