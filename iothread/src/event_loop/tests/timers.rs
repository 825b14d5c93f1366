//! Timers: their order, how late they are and why, and arms from other threads.

use super::*;

#[test]
fn timers_fire_in_the_order_of_their_deadlines_whatever_the_order_of_arming() {
    let mut event_loop = in_virtual_time();
    let strand = Strand::new("test", &event_loop.handle(), Vec::new());
    let began = event_loop.now();
    let arm = |&n: &u32| {
        let timer = log_event(&strand, n).timer();
        timer.arm_at(began + Duration::from_secs(n.into()));
        timer
    };
    let timers: Vec<_> = [5, 1, 4, 2, 3, 0].iter().map(arm).collect();
    while event_loop.handle().counters().timers.get() < timers.len() as u64 {
        event_loop.turn();
    }
    let mut log = strand.call(|log, _| log.clone());
    drain(&mut event_loop);
    assert_eq!(log.poll(), Ok(Some((0..6).collect())));
    assert_eq!(event_loop.handle().counters().timer_late_ns.get(), 0);
}

#[test]
fn a_late_timer_says_how_late_and_who_was_in_the_way() {
    const LONG: Duration = Duration::from_millis(20);
    let mut event_loop = event_loop();
    let home = event_loop.handle();
    let (quick, slow) = (Strand::new("quick", &home, ()), Strand::new("slow", &home, ()));
    let timer = quick.event(|(), _| Progress::Idle).timer();
    let harmless = quick.event(|(), _| Progress::Idle);
    let in_the_way = slow.event(|(), _| {
        let began = Instant::now();
        while began.elapsed() < LONG {}
        Progress::Idle
    });
    timer.arm_at(Instant::now() + LONG / 2);
    while event_loop.timers.len() == 0 {
        event_loop.turn();
    }
    harmless.schedule();
    in_the_way.schedule();
    while home.counters().timers.get() == 0 {
        event_loop.turn();
    }
    let late = home.counters().activity.latest_timer().expect("it was late");
    // A loop that was held up elsewhere may have been late before it came to the callback.
    if home.counters().activity.longest().is_some_and(|it| it.owner == "slow") {
        assert_eq!(late.owner, "slow");
    }
    assert_eq!(home.counters().timer_late_ns.get(), late.time.as_nanos() as u64);
}

/// Arms from another thread, each of which must have fired before the next is made.
fn arms_from_another_thread(arms: u64) {
    with_loop(PollPolicy::default(), |handle, _| {
        let fired = Arc::new(AtomicU64::new(0));
        let strand = Strand::new("test", handle, Arc::clone(&fired));
        let event = strand.event(|fired: &mut Arc<AtomicU64>, _| {
            fired.fetch_add(1, AcqRel);
            Progress::Idle
        });
        let timer = event.timer();
        // In every phase: something is ready, due or queued most of the time.
        let noise = strand.event(|_, _| Progress::Idle);
        let (eventfd, other) = (EventFd::new(EFD_NONBLOCK).unwrap(), noise.timer());
        let writer = eventfd.try_clone().unwrap();
        let _source = noise.on_fd(owned(eventfd), Trigger::Edge);
        for n in 1..=arms {
            match n % 8 {
                0 => writer.write(1).unwrap(),
                1 => other.arm_at(Instant::now()),
                2 => noise.schedule(),
                // The loop is on its way to sleep, sooner or later.
                _ => (0..n % 700).for_each(|_| std::hint::spin_loop()),
            }
            // Now and then for a later moment first.
            if n % 5 == 0 {
                timer.arm_at(Instant::now() + Duration::from_secs(3600));
            }
            timer.arm_at(Instant::now() + Duration::from_nanos(n * 31 % 20_000));
            eventually("an arming is lost", || fired.load(Acquire) == n);
        }
    });
}

#[test]
fn no_arming_from_another_thread_is_lost() {
    arms_from_another_thread(20_000);
}

#[test]
#[ignore = "takes a minute or more"]
fn no_arming_of_a_million_is_lost() {
    arms_from_another_thread(1_000_000);
}

#[test]
fn a_timer_that_is_armed_again_and_again_is_one_timer() {
    let mut event_loop = in_virtual_time();
    let strand = Strand::new("test", &event_loop.handle(), Vec::new());
    let (moved, kept) = (log_event(&strand, 1).timer(), log_event(&strand, 2).timer());
    let (began, hour) = (event_loop.now(), Duration::from_secs(3600));
    kept.arm_at(began + hour);
    for n in 0..10_000 {
        moved.arm_at(began + hour + Duration::from_nanos(n));
        event_loop.readiness.look();
        event_loop.dispatch_bottom_halves();
        assert!(event_loop.timers.len() <= 130, "{} entries", event_loop.timers.len());
    }
    while event_loop.handle().counters().timers.get() < 2 {
        event_loop.turn();
    }
    let mut log = strand.call(|log, _| log.clone());
    drain(&mut event_loop);
    assert_eq!(log.poll(), Ok(Some(vec![2, 1])));
}
