//! What threads are, as the kernel tells it: nothing inherited, guarded, and with workers of the
//! kernel where they belong. Real-time policies are tried where this process may have them.
#![cfg(not(loom))]
#![expect(unsafe_code, reason = "asks the kernel about threads")]

use std::fs;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::sync::Arc;
use std::sync::mpsc::{channel, sync_channel};
use std::time::{Duration, Instant};

use iothread::{
    Blocking, Operation, PollPolicy, Port, Progress, Sched, Strand, ThreadSpec, available_cpus,
    spawn, spawn_loop,
};

/// No wait of these tests takes so long, however busy the host.
const LIMIT: Duration = Duration::from_secs(60);

/// The kernel's `struct sched_attr`, as far as all versions have it.
#[repr(C)]
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
struct Attributes {
    size: u32,
    policy: u32,
    flags: u64,
    nice: i32,
    priority: u32,
    times: [u64; 3],
}

/// sched_getattr(2) of a thread.
fn attributes(tid: u32) -> Attributes {
    let mut attributes = Attributes::default();
    let size = size_of::<Attributes>();
    // SAFETY: the kernel writes `size` bytes at the most.
    let result = unsafe {
        libc::syscall(libc::SYS_sched_getattr, tid, &raw mut attributes, size as libc::c_uint, 0)
    };
    assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
    attributes
}

fn policy(tid: u32) -> i32 {
    attributes(tid).policy as i32
}

/// The id of the calling thread.
fn me() -> u32 {
    // SAFETY: gettid has no preconditions.
    unsafe { libc::gettid() as u32 }
}

fn slack(tid: u32) -> String {
    fs::read_to_string(format!("/proc/{tid}/timerslack_ns")).unwrap().trim().to_owned()
}

fn allowed(tid: u32) -> String {
    let status = fs::read_to_string(format!("/proc/self/task/{tid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"));
    line.unwrap().trim().to_owned()
}

/// CPU time of the calling thread.
fn cpu_time() -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `time` is valid.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut time) };
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

/// May this process have real-time threads? Says so if not.
fn real_time_is_permitted() -> bool {
    let spec = ThreadSpec { sched: Sched::Fifo(1), ..ThreadSpec::new("probe") };
    let thread = spawn(spec, || {}).unwrap();
    let permitted = thread.granted.refused.is_empty();
    if !permitted {
        eprintln!("not tried, needs CAP_SYS_NICE or RLIMIT_RTPRIO: {:?}", thread.granted.refused);
    }
    thread.join().unwrap();
    permitted
}

fn block_all_signals() {
    // SAFETY: zeros are a valid set, and both pointers are valid during the calls.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigfillset(&raw mut set);
        libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut());
    }
}

/// What the thread should be, whoever makes it, checked while it lives.
fn check_born_of(maker: ThreadSpec, disturb: impl FnOnce() + Send + 'static) {
    let (sender, receiver) = sync_channel(1);
    let maker = spawn(maker, move || {
        disturb();
        let (release, wait) = channel::<()>();
        let child = spawn(ThreadSpec::new("child"), move || wait.recv().unwrap_or(())).unwrap();
        let tid = child.granted.tid;
        let seen = (attributes(tid), slack(tid), child.granted.cpus.clone());
        drop(release);
        child.join().unwrap();
        sender.send(seen).unwrap();
    });
    let (attributes, slack, cpus) = receiver.recv().unwrap();
    maker.unwrap().join().unwrap();
    assert_eq!((attributes.policy, attributes.nice, attributes.priority), (0, 0, 0));
    assert_eq!(attributes.flags & 1, 1, "SCHED_FLAG_RESET_ON_FORK");
    assert_eq!(slack, "1");
    assert_eq!(cpus, available_cpus());
}

#[test]
fn a_thread_inherits_nothing_from_the_one_that_made_it() {
    let first = available_cpus()[0];
    let maker = |sched| ThreadSpec { cpus: Some(vec![first]), sched, ..ThreadSpec::new("maker") };
    let odd_slack = || {
        // SAFETY: PR_SET_TIMERSLACK takes a plain number.
        unsafe { libc::prctl(libc::PR_SET_TIMERSLACK, 123_456usize, 0usize, 0usize, 0usize) };
    };
    check_born_of(maker(Sched::Idle), odd_slack);
    let permitted = real_time_is_permitted();
    if permitted {
        check_born_of(maker(Sched::Fifo(7)), || {});
        check_born_of(maker(Sched::Batch(9)), odd_slack);
        // As somebody else's library would leave a thread: without the flag that resets.
        check_born_of(maker(Sched::Other(0)), || {
            let param = libc::sched_param { sched_priority: 3 };
            // SAFETY: `param` is valid; 0 is the calling thread.
            let done = unsafe { libc::sched_setscheduler(0, libc::SCHED_RR, &raw const param) };
            assert_eq!(done, 0);
        });
    }
}

#[test]
fn a_real_time_thread_that_never_blocks_is_demoted_and_no_other_is_touched() {
    if !real_time_is_permitted() {
        return;
    }
    block_all_signals(); // as a program might that starts threads; they inherit that
    let limit = Duration::from_millis(100);
    let spec = |name: &str, sched, runaway| ThreadSpec { sched, runaway, ..ThreadSpec::new(name) };
    // One waits, and one works as much as it can between short pauses.
    let (release, wait) = channel::<()>();
    let waits =
        spawn(spec("waits", Sched::Rr(2), Some(limit)), move || wait.recv().unwrap_or(())).unwrap();
    let busy = spawn(spec("pauses", Sched::Fifo(2), Some(limit)), move || {
        while cpu_time() < 5 * limit {
            let until = cpu_time() + limit / 20;
            while cpu_time() < until {}
            std::thread::sleep(Duration::from_micros(50)); // its work, not the test's
        }
    })
    .unwrap();
    for sched in [Sched::Fifo(1), Sched::Rr(1)] {
        let thread = spawn(spec("spins", sched, Some(limit)), move || {
            let began = Instant::now();
            while policy(me()) != libc::SCHED_OTHER {
                assert!(began.elapsed() < LIMIT, "it still is {sched}");
                std::thread::yield_now(); // no pause
            }
            let took = cpu_time();
            assert!(took >= limit, "demoted after {took:?}");
            assert!(took < 4 * limit, "demoted only after {took:?}");
            assert_eq!((attributes(me()).nice, slack(me()).as_str()), (0, "1"));
        })
        .unwrap();
        let guard = Arc::clone(thread.granted.guard.as_ref().unwrap());
        assert_eq!(guard.limit(), limit);
        thread.join().unwrap();
        assert!(guard.demoted());
    }
    assert_eq!(policy(waits.granted.tid), libc::SCHED_RR);
    for (thread, release) in [(busy, None), (waits, Some(release))] {
        let guard = Arc::clone(thread.granted.guard.as_ref().unwrap());
        drop(release);
        thread.join().unwrap();
        assert!(!guard.demoted());
    }
}

/// Takes CAP_SYS_NICE away from the calling thread, and from no other.
fn drop_the_right_to_priorities() {
    const VERSION_3: u32 = 0x2008_0522;
    const CAP_SYS_NICE: u32 = 23;
    let mut header = [VERSION_3, 0]; // 0: the calling thread
    // Effective, permitted and inheritable, of capabilities 0 to 31 and of 32 to 63.
    let mut sets = [[0u32; 3]; 2];
    // SAFETY: version 3 has a header of two words and two times three sets, which the first call
    // fills and the second only reads.
    unsafe {
        let (header, sets) = (header.as_mut_ptr(), sets.as_mut_ptr());
        assert_eq!(libc::syscall(libc::SYS_capget, header, sets), 0);
        (*sets).iter_mut().for_each(|set| *set &= !(1 << CAP_SYS_NICE));
        assert_eq!(libc::syscall(libc::SYS_capset, header, sets), 0);
    }
}

#[test]
fn losing_a_policy_needs_no_rights() {
    if !real_time_is_permitted() {
        return;
    }
    let (sched, runaway) = (Sched::Fifo(1), Some(Duration::from_millis(20)));
    let thread = spawn(ThreadSpec { sched, runaway, ..ThreadSpec::new("spins") }, move || {
        drop_the_right_to_priorities();
        let began = Instant::now();
        while policy(me()) != libc::SCHED_OTHER {
            assert!(began.elapsed() < LIMIT, "it still is {sched}");
        }
        // And there is no way back.
        let child = ThreadSpec { sched, ..ThreadSpec::new("child") };
        let child = spawn(child, || {}).unwrap();
        // SAFETY: getrlimit fills the limit it is given.
        let limit = unsafe {
            let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
            libc::getrlimit(libc::RLIMIT_RTPRIO, &raw mut limit);
            limit.rlim_cur
        };
        if limit == 0 {
            assert_eq!(child.granted.sched, Sched::Other(0));
            assert!(child.granted.refused[0].why.contains("CAP_SYS_NICE"));
            assert!(child.granted.guard.is_none());
        }
        child.join().unwrap();
    });
    thread.unwrap().join().unwrap();
}

#[test]
fn a_thread_without_a_guard_keeps_its_policy() {
    if !real_time_is_permitted() {
        return;
    }
    let sched = Sched::Fifo(1);
    let thread = spawn(ThreadSpec { sched, ..ThreadSpec::new("free") }, || {
        while cpu_time() < Duration::from_millis(300) {}
        assert_eq!(policy(me()), libc::SCHED_FIFO);
    })
    .unwrap();
    assert!(thread.granted.guard.is_none());
    thread.join().unwrap();
    // Nor does a thread that has no such policy have a guard.
    let runaway = Some(Duration::from_millis(10));
    let thread = spawn(ThreadSpec { runaway, ..ThreadSpec::new("other") }, || {}).unwrap();
    assert!(thread.granted.guard.is_none());
    thread.join().unwrap();
}

#[test]
fn a_loop_goes_on_after_it_was_demoted() {
    if !real_time_is_permitted() {
        return;
    }
    let (sched, runaway) = (Sched::Fifo(1), Some(Duration::from_millis(20)));
    let spec = ThreadSpec { sched, runaway, ..ThreadSpec::new("loop") };
    let (handle, thread) = spawn_loop(spec, PollPolicy::OFF).unwrap();
    let blocking = Blocking::on_this_thread().unwrap();
    let guard = Arc::clone(thread.granted.guard.as_ref().unwrap());
    let strand = Strand::new("test", &handle, ());
    let watched = Arc::clone(&guard);
    let long = strand.call(move |(), _| while !watched.demoted() {});
    long.wait(&blocking).unwrap();
    assert_eq!(strand.call(|(), _| policy(me())).wait(&blocking), Ok(libc::SCHED_OTHER));
    drop(strand);
    handle.stop();
    thread.join().unwrap();
}

/// The workers that the kernel has made for the ring of a thread.
fn workers(tid: u32) -> Vec<u32> {
    let name = format!("iou-wrk-{tid}");
    let tasks = fs::read_dir("/proc/self/task").unwrap();
    let id = |task: fs::DirEntry| task.file_name().to_str()?.parse().ok();
    let is_one = |task: &u32| {
        let comm = fs::read_to_string(format!("/proc/self/task/{task}/comm"));
        comm.is_ok_and(|comm| comm.trim() == name)
    };
    tasks.filter_map(|task| id(task.ok()?)).filter(is_one).collect()
}

/// Has a ring on a thread flush a file, which only a worker can do, and checks the worker.
fn check_worker(spec: ThreadSpec, cpus: &str) {
    let sched = spec.sched;
    let file = fs::OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_TMPFILE)
        .open(std::env::temp_dir())
        .unwrap();
    let fd = file.as_raw_fd();
    let (handle, thread) = spawn_loop(spec, PollPolicy::OFF).unwrap();
    let blocking = Blocking::on_this_thread().unwrap();
    let (sender, results) = channel();
    let strand = Strand::new("test", &handle, None::<Arc<Port>>);
    let completed = strand.event(move |port: &mut Option<Arc<Port>>, _| {
        port.as_ref().unwrap().take(|_, result| sender.send(result).unwrap());
        Progress::Idle
    });
    let port = Port::new(16, &completed);
    let submit = strand.call(move |kept, cx| {
        let ring = cx.ring().expect("an io_uring");
        for slot in 0..16 {
            // SAFETY: the file is open until all results have come, and there is no buffer.
            unsafe { ring.submit(Operation::Sync { fd }, &port, slot) }.unwrap();
        }
        *kept = Some(port);
    });
    submit.wait(&blocking).unwrap();
    for _ in 0..16 {
        assert_eq!(results.recv_timeout(LIMIT), Ok(0));
    }
    // The first one stays, in case there is more to do.
    let workers = workers(thread.granted.tid);
    assert!((1..=4).contains(&workers.len()), "{workers:?}");
    for worker in workers {
        assert_eq!(allowed(worker), cpus);
        if sched.is_real_time() {
            assert_eq!(policy(worker), libc::SCHED_OTHER, "{sched}");
        }
    }
    drop(strand);
    handle.stop();
    thread.join().unwrap();
}

#[test]
fn workers_of_a_ring_are_on_the_cpus_of_its_thread_or_on_those_given() {
    let (first, last) = (available_cpus()[0], *available_cpus().last().unwrap());
    let on = |cpu| Some(vec![cpu]);
    let pinned = ThreadSpec { cpus: on(last), ..ThreadSpec::new("loop") };
    check_worker(pinned.clone(), &last.to_string());
    let given = ThreadSpec { worker_cpus: on(first), ..pinned.clone() };
    check_worker(given, &first.to_string());
    check_worker(
        ThreadSpec { worker_cpus: on(last), ..ThreadSpec::new("loop") },
        &last.to_string(),
    );
    if real_time_is_permitted() {
        check_worker(ThreadSpec { sched: Sched::Fifo(1), ..pinned }, &last.to_string());
    }
}
