use std::os::fd::{FromRawFd, IntoRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::*};
use std::sync::mpsc::channel;
use std::time::Duration;

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::*;
use crate::{Blocking, Event, Poller, Port, Progress, Strand, Trigger, VcpuLoop};

mod classes;
mod idle;
mod progress;
mod timers;

/// How the loops of a test work: with `HEDDLE_SHUFFLE=SEED`, in an order drawn by lot.
fn policy(poll: PollPolicy) -> LoopPolicy {
    let seed = std::env::var("HEDDLE_SHUFFLE").ok();
    let shuffle = seed.map(|seed| seed.parse().expect("HEDDLE_SHUFFLE is a number"));
    LoopPolicy { poll, shuffle }
}

fn event_loop() -> EventLoop {
    EventLoop::new("test", policy(PollPolicy::OFF)).unwrap()
}

fn in_virtual_time() -> EventLoop {
    EventLoop::in_virtual_time("test", policy(PollPolicy::OFF)).unwrap()
}

/// Turns until all that waits now has been done; with the lot, that may take more than one turn.
fn drain(event_loop: &mut EventLoop) {
    let mut all = event_loop.handle().barrier();
    while all.poll() == Ok(None) {
        event_loop.turn();
    }
}

fn log_event(strand: &Strand<Vec<u32>>, n: u32) -> Event<Vec<u32>> {
    strand.event(move |log, _| {
        log.push(n);
        Progress::Idle
    })
}

/// Runs `f` with a loop on a thread of its own, which ends with it.
fn with_loop<R>(poll: PollPolicy, f: impl FnOnce(&LoopHandle, &Blocking) -> R) -> R {
    let spec = crate::ThreadSpec::new("loop");
    let (handle, thread) = crate::spawn_loop(spec, policy(poll)).unwrap();
    let result = f(&handle, &Blocking::on_this_thread().unwrap());
    handle.stop();
    thread.join().unwrap();
    result
}

#[test]
fn bottom_halves_run_in_schedule_order_and_once() {
    let mut event_loop = event_loop();
    let strand = Strand::new("test", &event_loop.handle(), Vec::new());
    let events: Vec<_> = (0..4).map(|n| log_event(&strand, n)).collect();
    for n in [3, 0, 3, 2, 1, 0] {
        events[n].schedule();
    }
    event_loop.turn();
    let mut log = strand.call(|log, _| log.clone());
    event_loop.turn();
    assert_eq!(log.poll(), Ok(Some(vec![3, 0, 2, 1])));
}

#[test]
fn a_bottom_half_that_reschedules_itself_starves_neither_fds_nor_timers() {
    let mut event_loop = event_loop();
    let strand = Strand::new("test", &event_loop.handle(), (0u32, Vec::new()));
    let again = strand.event(|(runs, _), _| {
        *runs += 1;
        Progress::More
    });
    let note = |what: &'static str| {
        strand.event(move |(runs, seen): &mut (u32, Vec<_>), _| {
            seen.push((what, *runs));
            Progress::Idle
        })
    };
    let eventfd = EventFd::new(EFD_NONBLOCK).unwrap();
    let writer = eventfd.try_clone().unwrap();
    let _source = note("fd").on_fd(owned(eventfd), Trigger::Edge);
    let timer = note("timer").timer();
    again.schedule();
    event_loop.turn(); // registers the fd
    writer.write(1).unwrap();
    timer.arm_at(Instant::now());
    event_loop.turn();
    event_loop.turn();
    let mut seen = strand.call(|(_, seen), _| seen.clone());
    event_loop.turn();
    let seen = seen.poll().unwrap().unwrap();
    assert_eq!(seen, [("fd", 1), ("timer", 2)]);
}

fn owned(eventfd: EventFd) -> OwnedFd {
    #[expect(unsafe_code, reason = "an EventFd gives its fd only raw")]
    // SAFETY: into_raw_fd passed the ownership on.
    unsafe {
        OwnedFd::from_raw_fd(eventfd.into_raw_fd())
    }
}

#[test]
fn phases_come_in_order_fds_then_timers_then_bottom_halves() {
    let mut event_loop = event_loop();
    let strand = Strand::new("test", &event_loop.handle(), Vec::new());
    let eventfd = EventFd::new(EFD_NONBLOCK).unwrap();
    let writer = eventfd.try_clone().unwrap();
    let _source = log_event(&strand, 1).on_fd(owned(eventfd), Trigger::Edge);
    let timer = log_event(&strand, 2).timer();
    timer.arm_at(Instant::now());
    event_loop.turn(); // takes on the fd and the timer
    log_event(&strand, 3).schedule();
    writer.write(1).unwrap();
    event_loop.turn();
    let mut log = strand.call(|log, _| log.clone());
    event_loop.turn();
    assert_eq!(log.poll(), Ok(Some(vec![1, 2, 3])));
}

#[test]
fn a_timer_that_was_moved_or_cancelled_fires_once_or_not_at_all() {
    with_loop(PollPolicy::OFF, |handle, blocking| {
        let (sender, receiver) = channel();
        let strand = Strand::new("test", handle, sender);
        let moved = strand.event(|sender, _| {
            sender.send(Instant::now()).unwrap();
            Progress::Idle
        });
        let timer = moved.timer();
        let due = Instant::now() + Duration::from_millis(5);
        timer.arm_at(Instant::now() + Duration::from_secs(3600));
        timer.arm_at(due);
        assert!(receiver.recv().unwrap() >= due);
        timer.arm_at(Instant::now() + Duration::from_millis(1));
        timer.cancel();
        let sentinel = moved.timer();
        sentinel.arm_at(Instant::now() + Duration::from_millis(3));
        receiver.recv().unwrap();
        handle.barrier().wait(blocking).unwrap();
        assert!(receiver.try_recv().is_err(), "the cancelled timer fired");
    });
}

#[test]
fn an_event_of_a_strand_that_is_gone_does_nothing() {
    // It has nothing to do, and must not sleep for it.
    let mut event_loop = in_virtual_time();
    let strand = Strand::new("test", &event_loop.handle(), Vec::new());
    let event = log_event(&strand, 1);
    drop(strand);
    event.schedule();
    event_loop.turn();
}

#[test]
fn what_a_vcpu_finds_held_is_run_by_the_holder() {
    let mut event_loop = event_loop();
    let strand = Strand::new("test", &event_loop.handle(), Vec::new());
    let (inside, entered) = channel();
    let (release, released) = channel::<()>();
    let released = Arc::new(shared(released));
    let slow = strand.event(move |log: &mut Vec<u32>, _| {
        inside.send(()).unwrap();
        released.recv();
        log.push(1);
        Progress::Idle
    });
    let quick = log_event(&strand, 2);
    slow.schedule();
    let vcpu = std::thread::spawn(move || {
        let mut vcpu = VcpuLoop::enter();
        entered.recv().unwrap();
        quick.run_here(&mut vcpu.exit());
        release.send(()).unwrap();
        vcpu.counters().left.get()
    });
    event_loop.turn();
    assert_eq!(vcpu.join().unwrap(), 1);
    let mut log = strand.call(|log, _| log.clone());
    event_loop.turn();
    assert_eq!(log.poll(), Ok(Some(vec![1, 2])));
}

/// A receiver that several threads may name, though one uses it.
struct SharedReceiver(crate::strand::Once<std::sync::mpsc::Receiver<()>>);

fn shared(receiver: std::sync::mpsc::Receiver<()>) -> SharedReceiver {
    SharedReceiver(crate::strand::Once::new(receiver))
}

impl SharedReceiver {
    fn recv(&self) {
        self.0.take().unwrap().recv().unwrap();
    }
}

#[test]
fn a_callback_that_needs_the_home_loop_is_run_there_with_the_strand_held_on_the_way() {
    let mut event_loop = event_loop();
    let strand = Strand::new("test", &event_loop.handle(), Vec::new());
    let home = std::thread::current().id();
    let event = strand.event(move |log, _| {
        log.push(std::thread::current().id() == home);
        if log.len() == 1 { Progress::Home } else { Progress::Idle }
    });
    std::thread::spawn(move || {
        let mut vcpu = VcpuLoop::enter();
        event.run_here(&mut vcpu.exit());
        event.run_here(&mut vcpu.exit()); // the strand is on its way: left
        assert_eq!(vcpu.counters().handed_over.get(), 1);
    })
    .join()
    .unwrap();
    event_loop.turn();
    let mut log = strand.call(|log, _| log.clone());
    event_loop.turn();
    assert_eq!(log.poll(), Ok(Some(vec![false, true])));
}

/// Waits for something that other threads will do, without asking them.
fn eventually(what: &str, mut done: impl FnMut() -> bool) {
    let began = Instant::now();
    while !done() {
        assert!(began.elapsed() < Duration::from_secs(20), "never: {what}");
        std::thread::yield_now();
    }
}

#[test]
fn many_threads_kicking_one_object_lose_nothing_and_never_meet() {
    const ROUNDS: u64 = 5_000;
    const THREADS: u64 = 3;
    with_loop(PollPolicy::default(), |handle, _| {
        struct Object {
            inside: bool,
            seen: Arc<AtomicU64>,
            work: Arc<AtomicU64>,
        }
        let (work, seen) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
        let object = Object { inside: false, seen: Arc::clone(&seen), work: Arc::clone(&work) };
        let strand = Strand::new("test", handle, object);
        let kick = || {
            strand.event(|object: &mut Object, _| {
                assert!(!object.inside, "two threads in one object");
                object.inside = true;
                let found = object.work.load(Acquire);
                object.seen.store(found, Release);
                object.inside = false;
                Progress::Idle
            })
        };
        let start = std::sync::Barrier::new(THREADS as usize);
        std::thread::scope(|scope| {
            for nth in 0..THREADS {
                let (work, seen, start, kick) = (&work, &seen, &start, kick());
                scope.spawn(move || {
                    let mut vcpu = VcpuLoop::enter();
                    for round in 1..=ROUNDS {
                        start.wait();
                        work.fetch_add(1, AcqRel);
                        match nth {
                            0 => kick.schedule(),
                            _ => kick.run_here(&mut vcpu.exit()),
                        }
                        // Nobody kicks again before everybody's kick has been served.
                        eventually("a kick was lost", || seen.load(Acquire) >= round * THREADS);
                    }
                });
            }
        });
    });
}

#[test]
fn a_message_that_meets_the_loop_on_its_way_to_sleep_wakes_it() {
    with_loop(PollPolicy::OFF, |handle, _| {
        let count = Arc::new(AtomicU64::new(0));
        let strand = Strand::new("test", handle, Arc::clone(&count));
        let event = strand.event(|count: &mut Arc<AtomicU64>, _| {
            count.fetch_add(1, AcqRel);
            Progress::Idle
        });
        for n in 1..=50_000u64 {
            event.schedule();
            // Different delays, so that the next message finds the loop at different places.
            eventually("a message was lost", || count.load(Acquire) == n);
            (0..n % 700).for_each(|_| std::hint::spin_loop());
        }
    });
}

#[test]
fn a_wake_up_that_finds_the_loop_polling_writes_no_eventfd() {
    let poll = PollPolicy { max: Duration::from_secs(3600), ..PollPolicy::OFF };
    let mut event_loop = EventLoop::new("test", policy(poll)).unwrap();
    event_loop.polling = Polling::with_limit(poll, poll.max);
    let strand = Strand::new("test", &event_loop.handle(), Vec::new());
    let event = log_event(&strand, 1);
    let peek = strand.clone();
    std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(2)); // most likely polling by now
        event.schedule();
    });
    event_loop.turn();
    assert_eq!(event_loop.handle().counters().sleeps.get(), 0);
    assert_eq!(event_loop.handle().0.wake.read().unwrap_err().raw_os_error(), Some(libc::EAGAIN));
    let mut log = peek.call(|log, _| log.len());
    event_loop.turn();
    assert_eq!(log.poll(), Ok(Some(1)));
}

#[test]
fn a_watched_poller_is_fired_while_polling_and_settled_before_sleep() {
    with_loop(PollPolicy::default(), |handle, blocking| {
        let (sender, receiver) = channel();
        let ready = Arc::new(AtomicBool::new(false));
        let strand = Strand::new("test", handle, (sender, None::<Poller>));
        let found = strand.event(|(sender, _), _| {
            sender.send("found").unwrap();
            Progress::Idle
        });
        let settle = strand.event(|(sender, poller), _| {
            poller.as_ref().unwrap().watch(false);
            sender.send("settled").unwrap();
            Progress::Idle
        });
        let peek = Arc::clone(&ready);
        let poller = found.on_poll(move || peek.swap(false, AcqRel), &settle);
        strand
            .call(|(_, slot), _| {
                poller.watch(true);
                *slot = Some(poller);
            })
            .wait(blocking)
            .unwrap();
        assert_eq!(receiver.recv().unwrap(), "settled");
    });
}

#[test]
fn a_loop_that_is_never_out_of_work_still_looks_at_what_it_watches() {
    let mut event_loop = event_loop();
    let strand = Strand::new("test", &event_loop.handle(), (0, 0));
    let busy = strand.event(|(runs, _), _| {
        *runs += 1;
        Progress::More
    });
    let found = strand.event(|(_, found), _| {
        *found += 1;
        Progress::Idle
    });
    let settle = strand.event(|_, _| unreachable!("there was always something to do"));
    let poller = found.on_poll(|| true, &settle);
    poller.watch(true);
    busy.schedule();
    (0..5).for_each(|_| event_loop.turn());
    let mut counts = strand.call(|counts, _| *counts);
    event_loop.turn();
    let (runs, found) = counts.poll().unwrap().unwrap();
    assert!(runs >= 5 && found >= 4, "{runs} runs of the busy one, {found} finds");
}

#[test]
fn an_announcement_of_the_ring_with_nothing_behind_it_keeps_no_loop_awake() {
    let file = tempfile();
    let fd = file.as_raw_fd();
    with_loop(PollPolicy::default(), |handle, blocking| {
        let (sender, results) = channel();
        let strand = Strand::new("test", handle, None::<Arc<Port>>);
        let completed = strand.event(move |port: &mut Option<Arc<Port>>, _| {
            port.as_ref().unwrap().take(|_, result| sender.send(result).unwrap());
            Progress::Idle
        });
        for _ in 0..3 {
            strand.call(|_, cx| cx.ring().unwrap().announce_nothing()).wait(blocking).unwrap();
            let before = handle.counters().sleeps.get();
            eventually("the loop never sleeps", || handle.counters().sleeps.get() > before);
            let port = Port::new(1, &completed);
            strand
                .call(move |slot, cx| {
                    let sync = crate::Operation::Sync { fd };
                    #[expect(unsafe_code, reason = "this is what is tested")]
                    // SAFETY: the file is open until all results have come.
                    unsafe { cx.ring().unwrap().submit(sync, &port, 0) }.unwrap();
                    *slot = Some(port);
                })
                .wait(blocking)
                .unwrap();
            assert_eq!(results.recv().unwrap(), 0);
        }
    });
}

#[test]
fn an_operation_completes_on_the_loop_that_submitted() {
    use std::io::Write;
    let mut file = tempfile();
    file.write_all(b"heddle").unwrap();
    let fd = file.as_raw_fd();
    with_loop(PollPolicy::OFF, |handle, _| {
        struct Reader {
            bytes: Box<[u8; 6]>,
            iovec: Box<[libc::iovec; 1]>,
            port: Option<Arc<Port>>,
            done: std::sync::mpsc::Sender<(std::thread::ThreadId, i32, Vec<u8>)>,
        }
        #[expect(unsafe_code, reason = "the iovec points into the reader itself")]
        // SAFETY: the pointer is only used by the kernel while the reader lives.
        unsafe impl Send for Reader {}
        let (done, result) = channel();
        let mut bytes = Box::new([0u8; 6]);
        let iovec = Box::new([libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: 6 }]);
        let strand = Strand::new("test", handle, Reader { bytes, iovec, port: None, done });
        let completed = strand.event(|reader: &mut Reader, _| {
            let port = reader.port.clone().unwrap();
            port.take(|slot, result| {
                assert_eq!(slot, 3);
                let bytes = reader.bytes.to_vec();
                reader.done.send((std::thread::current().id(), result, bytes)).unwrap();
            });
            Progress::Idle
        });
        let start = strand.event(move |reader: &mut Reader, cx| {
            let port = Port::new(4, &completed);
            reader.port = Some(Arc::clone(&port));
            let read =
                crate::Operation::Read { fd, buffers: reader.iovec.as_ptr(), count: 1, offset: 0 };
            #[expect(unsafe_code, reason = "this is what is tested")]
            // SAFETY: the reader lives until the test has seen the result.
            unsafe { cx.ring().unwrap().submit(read, &port, 3) }.unwrap();
            Progress::Idle
        });
        start.schedule();
        let (_, count, bytes) = result.recv().unwrap();
        assert_eq!((count, &bytes[..]), (6, &b"heddle"[..]));
        assert_eq!(handle.counters().ring_submits.get(), 1);
    });
}

fn tempfile() -> std::fs::File {
    use std::os::unix::fs::OpenOptionsExt;
    std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_TMPFILE)
        .open(std::env::temp_dir())
        .unwrap()
}

#[test]
fn a_loop_cannot_have_the_token_to_block() {
    with_loop(PollPolicy::OFF, |handle, blocking| {
        let strand = Strand::new("test", handle, ());
        let token = strand.call(|_, _| Blocking::on_this_thread().is_some());
        assert_eq!(token.wait(blocking), Ok(false));
    });
}

#[test]
fn a_dropped_fd_source_is_no_longer_watched() {
    with_loop(PollPolicy::OFF, |handle, blocking| {
        let (sender, receiver) = channel();
        let strand = Strand::new("test", handle, sender);
        let event = strand.event(|sender, _| {
            sender.send(()).unwrap();
            Progress::Idle
        });
        let eventfd = EventFd::new(EFD_NONBLOCK).unwrap();
        let writer = eventfd.try_clone().unwrap();
        let source = event.on_fd(owned(eventfd), Trigger::Edge);
        writer.write(1).unwrap();
        receiver.recv().unwrap();
        drop(source);
        handle.barrier().wait(blocking).unwrap();
        writer.write(1).unwrap();
        handle.barrier().wait(blocking).unwrap();
        assert!(receiver.try_recv().is_err());
    });
}
