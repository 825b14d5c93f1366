//! What a kick and a post cost in counts: no allocation, no system call.

#![expect(unsafe_code, reason = "a global allocator, and a trap for system calls")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::io;
use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::*};
use std::time::Duration;

use iothread::{Event, LoopHandle, PollPolicy, Progress, Strand, Thread, ThreadSpec, VcpuLoop};

const KICKS: u64 = 10_000;

thread_local! {
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
    static SYSTEM_CALLS: Cell<u64> = const { Cell::new(0) };
    /// Read by the kernel at each system call of a thread that has set the trap.
    static SELECTOR: Cell<u8> = const { Cell::new(ALLOW) };
}

struct Counting;

#[global_allocator]
static ALLOCATOR: Counting = Counting;

// SAFETY: all calls go to the system's allocator as they are.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // A thread that is ending counts no more.
        let _ = ALLOCATIONS.try_with(|count| count.set(count.get() + 1));
        // SAFETY: the caller keeps the contract of this same function.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: as for `alloc`.
        unsafe { System.dealloc(at, layout) }
    }

    unsafe fn realloc(&self, at: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        let _ = ALLOCATIONS.try_with(|count| count.set(count.get() + 1));
        // SAFETY: as for `alloc`.
        unsafe { System.realloc(at, layout, size) }
    }
}

// Syscall User Dispatch (Linux 5.11), from linux/prctl.h.
const PR_SET_SYSCALL_USER_DISPATCH: libc::c_int = 59;
const DISPATCH_OFF: libc::c_ulong = 0;
const DISPATCH_ON: libc::c_ulong = 1;
const ALLOW: u8 = 0;
const BLOCK: u8 = 1;
/// `syscall`, the instruction.
const INSTRUCTION: i64 = 2;

/// Counts a system call and lets the thread make it, and all that come after it.
extern "C" fn caught(_: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    SELECTOR.set(ALLOW);
    SYSTEM_CALLS.set(SYSTEM_CALLS.get() + 1);
    // SAFETY: the kernel gives a handler set with SA_SIGINFO both; of a SIGSYS, the number of the
    // system call follows the address of the call, and `rax` still holds it: the instruction is
    // run again.
    unsafe {
        let context = &mut *context.cast::<libc::ucontext_t>();
        let number = *info.cast::<i32>().byte_add(24);
        context.uc_mcontext.gregs[libc::REG_RIP as usize] -= INSTRUCTION;
        context.uc_mcontext.gregs[libc::REG_RAX as usize] = i64::from(number);
    }
}

/// Runs `f` and says if it made a system call: 1, however many there were, or 0.
fn system_calls(f: impl FnOnce()) -> u64 {
    // SAFETY: `caught` touches nothing but thread-locals without destructors and its arguments;
    // the selector outlives the trap, which ends here.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = caught as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO;
        assert_eq!(libc::sigaction(libc::SIGSYS, &raw const action, ptr::null_mut()), 0);
        let selector = SELECTOR.with(Cell::as_ptr);
        let set = libc::prctl(PR_SET_SYSCALL_USER_DISPATCH, DISPATCH_ON, 0usize, 0usize, selector);
        assert_eq!(set, 0, "needs Linux 5.11: {}", io::Error::last_os_error());
        let before = SYSTEM_CALLS.get();
        SELECTOR.set(BLOCK);
        f();
        SELECTOR.set(ALLOW);
        libc::prctl(PR_SET_SYSCALL_USER_DISPATCH, DISPATCH_OFF, 0usize, 0usize, 0usize);
        SYSTEM_CALLS.get() - before
    }
}

fn allocations(f: impl FnOnce()) -> u64 {
    let before = ALLOCATIONS.get();
    f();
    ALLOCATIONS.get() - before
}

fn start_loop(poll: PollPolicy) -> (LoopHandle, Thread) {
    let spec = ThreadSpec::new("loop");
    iothread::spawn_loop(spec, poll).unwrap()
}

/// A strand that counts, and the event that makes it count.
fn counting(home: &LoopHandle) -> (Strand<()>, Event<()>, Arc<AtomicU64>) {
    let ran = Arc::<AtomicU64>::default();
    let count = Arc::clone(&ran);
    let strand = Strand::new("count", home, ());
    let event = strand.event(move |(), _| {
        count.fetch_add(1, AcqRel);
        Progress::Idle
    });
    (strand, event, ran)
}

/// Waits without a system call: with some clock sources, even the time takes one.
fn await_count(ran: &AtomicU64, count: u64) {
    let seen = (0..5_000_000_000u64).any(|_| {
        std::hint::spin_loop();
        ran.load(Acquire) >= count
    });
    assert!(seen, "a post was lost");
}

#[test]
fn the_trap_and_the_allocator_do_count() {
    assert_eq!(system_calls(std::thread::yield_now), 1);
    assert_eq!(system_calls(|| ()), 0);
    assert_eq!(allocations(|| drop(std::hint::black_box(vec![1]))), 1);
}

#[test]
fn a_kick_that_meets_nobody_makes_no_system_call_and_allocates_nothing() {
    let (home, thread) = start_loop(PollPolicy::OFF);
    let (_strand, event, ran) = counting(&home);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut vcpu = VcpuLoop::enter();
            let mut kick = || (0..KICKS).for_each(|_| event.run_here(&mut vcpu.exit()));
            assert_eq!(allocations(&mut kick), 0);
            assert_eq!(system_calls(&mut kick), 0);
            assert_eq!(vcpu.counters().left.get() + vcpu.counters().handed_over.get(), 0);
        });
    });
    assert_eq!(ran.load(Acquire), 2 * KICKS);
    home.stop();
    thread.join().unwrap();
}

#[test]
fn a_kick_that_meets_another_makes_no_system_call_to_leave_its_event_there() {
    let (home, thread) = start_loop(PollPolicy::OFF);
    let (strand, event, ran) = counting(&home);
    let (inside, leave) = (Arc::<AtomicU64>::default(), Arc::<AtomicU64>::default());
    let (entered, left) = (Arc::clone(&inside), Arc::clone(&leave));
    let holder = strand.event(move |(), _| {
        entered.store(1, Release);
        await_count(&left, 1);
        Progress::Idle
    });
    holder.schedule();
    await_count(&inside, 1);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut vcpu = VcpuLoop::enter();
            let mut kick = || event.run_here(&mut vcpu.exit());
            let (mut calls, mut allocated) = (0, 0);
            calls += system_calls(|| allocated += allocations(&mut kick));
            assert_eq!((calls, allocated), (0, 0));
            assert_eq!(vcpu.counters().left.get(), 1);
        });
    });
    leave.store(1, Release);
    await_count(&ran, 1);
    home.stop();
    thread.join().unwrap();
}

#[test]
fn a_post_to_a_loop_that_does_not_sleep_makes_no_system_call_and_allocates_nothing() {
    const POSTS: u64 = 10_000;
    // Has learned to poll, for longer than this test takes, once it has slept twice.
    let poll = PollPolicy { max: Duration::from_secs(3600), grow: u32::MAX, ..PollPolicy::OFF };
    let (home, thread) = start_loop(poll);
    let (_strand, event, ran) = counting(&home);
    for nth in 1.. {
        assert!(nth < 1000, "there is always a system call, or the loop never learns to poll");
        event.schedule();
        await_count(&ran, nth);
        let sleeps = home.counters().sleeps.get();
        let mut allocated = 0;
        let calls =
            system_calls(|| allocated = allocations(|| (0..POSTS).for_each(|_| event.schedule())));
        // It may have been about to sleep at the first ones.
        if home.counters().sleeps.get() == sleeps && calls == 0 {
            assert_eq!(allocated, 0);
            break;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    home.stop();
    event.schedule(); // a loop that polls does not see that it shall stop
    thread.join().unwrap();
}
