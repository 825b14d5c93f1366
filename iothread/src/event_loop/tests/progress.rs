//! Loops that spin, loops that sleep, and where the time goes.

use super::*;

/// Two objects whose bottom halves schedule each other for ever.
fn circle(home: &LoopHandle) -> (Event<()>, [Strand<()>; 2], Arc<AtomicBool>) {
    let on = Arc::new(AtomicBool::new(true));
    let strands = ["there", "and back"].map(|name| Strand::new(name, home, ()));
    let next: Arc<std::sync::OnceLock<Event<()>>> = Arc::default();
    let (there, goes_on) = (Arc::clone(&next), Arc::clone(&on));
    let back = strands[1].event(move |(), _| {
        if goes_on.load(Acquire) {
            there.get().unwrap().schedule();
        }
        Progress::Idle
    });
    let there = strands[0].event(move |(), _| {
        back.schedule();
        Progress::Idle
    });
    next.set(there.clone()).unwrap();
    (there, strands, on)
}

#[test]
fn bottom_halves_that_schedule_each_other_hold_up_nobody_and_are_named() {
    let mut event_loop = event_loop();
    let home = event_loop.handle();
    let (circle, _strands, on) = circle(&home);
    let strand = Strand::new("test", &home, Vec::new());
    let (eventfd, timer) = (EventFd::new(EFD_NONBLOCK).unwrap(), log_event(&strand, 2).timer());
    let writer = eventfd.try_clone().unwrap();
    let _source = log_event(&strand, 1).on_fd(owned(eventfd), Trigger::Edge);
    drain(&mut event_loop);
    circle.schedule();
    (0..10).for_each(|_| event_loop.turn());
    let counters = Arc::clone(home.counters());
    for _ in 0..10 {
        writer.write(1).unwrap();
        let (fds, timers) = (counters.fd_events.get(), counters.timers.get());
        while event_loop.local.clock.now() - event_loop.looked < LOOK_PERIOD_NS {
            std::hint::spin_loop();
        }
        // In the first one the loop learns how late it is.
        (0..2).for_each(|_| event_loop.turn());
        assert_eq!(counters.fd_events.get(), fds + 1, "the fd waits for longer than promised");
        timer.arm_at(Instant::now());
        while event_loop.timers.len() == 0 {
            event_loop.turn();
        }
        event_loop.turn();
        assert_eq!(counters.timers.get(), timers + 1, "the timer waits for more than a turn");
    }
    assert_eq!(counters.activity.spinning(), None);
    (0..=VAIN_TURNS).for_each(|_| event_loop.turn());
    let named = counters.activity.spinning().expect("the loop spins");
    assert!(["there", "and back"].contains(&named), "{named}");
    on.store(false, Release);
    // The loop will sleep now, until somebody wakes it.
    let waker = home.clone();
    let watcher = std::thread::spawn(move || {
        eventually("the loop sleeps", || waker.0.state.is_asleep());
        let named = waker.counters().activity.spinning();
        waker.wake();
        named
    });
    while counters.sleeps.get() == 0 {
        event_loop.turn();
    }
    assert_eq!(watcher.join().unwrap(), None, "a loop that sleeps does not spin");
}

/// How often the thread gave up the CPU to wait.
fn voluntary_switches(tid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/self/task/{tid}/status")).unwrap();
    let count = status.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"));
    count.unwrap().trim().parse().unwrap()
}

fn no_wake_up_in(time: Duration) {
    let spec = crate::ThreadSpec::new("idle");
    let (handle, thread) = crate::spawn_loop(spec, policy(PollPolicy::default())).unwrap();
    let blocking = Blocking::on_this_thread().unwrap();
    // It has had a timer, an fd and an idle callback, and has none of them any more.
    let strand = Strand::new("test", &handle, ());
    let event = strand.event(|(), _| Progress::Idle);
    let timer = event.timer();
    timer.arm_at(Instant::now() + time / 2);
    let idle = strand.idle(Some(time / 2), |(), _| ());
    idle.schedule();
    drop(event.on_fd(owned(EventFd::new(EFD_NONBLOCK).unwrap()), Trigger::Edge));
    timer.cancel();
    handle.barrier().wait(&blocking).unwrap();
    eventually("the loop sleeps", || handle.0.state.is_asleep());
    // It has said so; the kernel has it when its count stands still.
    let tid = thread.granted.tid;
    let mut switches = voluntary_switches(tid);
    eventually("the loop sleeps in the kernel", || {
        std::thread::sleep(Duration::from_millis(20));
        let before = std::mem::replace(&mut switches, voluntary_switches(tid));
        before == switches
    });
    let turns = handle.counters().turns.get();
    std::thread::sleep(time); // this is what is measured
    assert_eq!(voluntary_switches(tid) - switches, 0, "the loop wakes up for nothing");
    assert_eq!(handle.counters().turns.get(), turns);
    handle.stop();
    thread.join().unwrap();
}

#[test]
fn an_idle_loop_makes_no_wake_up() {
    no_wake_up_in(Duration::from_secs(2));
}

#[test]
#[ignore = "takes a minute"]
fn an_idle_loop_makes_no_wake_up_in_a_minute() {
    no_wake_up_in(Duration::from_secs(60));
}

fn spin_for(time: Duration) {
    let until = Instant::now() + time;
    while Instant::now() < until {
        std::hint::spin_loop();
    }
}

#[test]
fn the_times_of_a_loop_add_up_to_the_time_that_passed() {
    with_loop(PollPolicy::default(), |handle, blocking| {
        let counters = handle.counters();
        let strand = Strand::new("test", handle, ());
        let read = || {
            let counters = Arc::clone(counters);
            let sum = move |(): &mut (), _: &mut Cx<'_>| {
                let times = [&counters.busy_ns, &counters.poll_ns, &counters.sleep_ns];
                (times.map(Counter::get).iter().sum::<u64>(), Instant::now())
            };
            strand.call(sum).wait(blocking).unwrap()
        };
        let (before, began) = read();
        let mut round = 0;
        while began.elapsed() < Duration::from_millis(1200) {
            round += 1;
            let work = move |(): &mut (), _: &mut Cx<'_>| {
                spin_for(Duration::from_micros(round % 300));
            };
            strand.call(work).wait(blocking).unwrap();
            // Waits of all lengths: some are polled through, some are slept through.
            spin_for(Duration::from_micros(round * 7 % 200));
        }
        let (after, ended) = read();
        let (sum, passed) = ((after - before) as f64, (ended - began).as_nanos() as f64);
        assert!((sum / passed - 1.0).abs() < 0.01, "{sum} of {passed}");
        assert!(counters.busy_ns.get() > 0 && counters.sleep_ns.get() > 0);
    });
}

#[test]
fn a_loop_that_is_said_to_sleep_rings_when_it_wakes_up() {
    with_loop(PollPolicy::OFF, |home, _| {
        let (ring, rings) = channel();
        home.on_bell(move || ring.send(()).unwrap());
        let loops = [home.clone()];
        let asleep = || eventually("the loop sleeps", || LoopHandle::all_sleep(&loops));
        for _ in 0..1_000 {
            asleep();
            assert!(LoopHandle::all_sleep(&loops), "nothing has woken it");
            home.wake();
            rings.recv().unwrap();
        }
    });
}
