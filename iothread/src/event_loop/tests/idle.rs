//! Callbacks for idle times.

use super::*;
use crate::Idle;

type Runs = Arc<AtomicU64>;

fn idle(strand: &Strand<()>, longest: Option<Duration>) -> (Idle, Runs) {
    let runs = Runs::default();
    let count = Arc::clone(&runs);
    let idle = strand.idle(longest, move |(), _| {
        count.fetch_add(1, AcqRel);
    });
    (idle, runs)
}

#[test]
fn it_runs_once_and_only_when_there_is_nothing_else_to_do() {
    let mut event_loop = in_virtual_time();
    let strand = Strand::new("test", &event_loop.handle(), ());
    let left = AtomicU64::new(1000);
    let busy = strand.event(move |(), _| match left.fetch_sub(1, AcqRel) {
        1 => Progress::Idle,
        _ => Progress::More,
    });
    let (idle, runs) = idle(&strand, None);
    busy.schedule();
    (0..3).for_each(|_| idle.schedule());
    let counters = Arc::clone(event_loop.handle().counters());
    while runs.load(Acquire) == 0 {
        let before = counters.bottom_halves.get();
        event_loop.turn();
        assert!(runs.load(Acquire) == 0 || before == 1000, "{before} done before");
    }
    (0..10).for_each(|_| event_loop.turn());
    assert_eq!(runs.load(Acquire), 1);
    assert_eq!(counters.idle_callbacks.get(), 1);
    idle.schedule();
    drop(idle);
    (0..10).for_each(|_| event_loop.turn());
    assert_eq!(runs.load(Acquire), 1, "it was taken back");
}

/// An idle callback that always wants to run again, and how often it did.
fn restless(strand: &Strand<()>, longest: Option<Duration>) -> Runs {
    let runs = Runs::default();
    let itself: Arc<std::sync::OnceLock<Idle>> = Arc::default();
    let (count, again) = (Arc::clone(&runs), Arc::clone(&itself));
    let idle = strand.idle(longest, move |(), _| {
        count.fetch_add(1, AcqRel);
        again.get().unwrap().schedule();
    });
    itself.set(idle).unwrap();
    itself.get().unwrap().schedule();
    runs
}

/// Has the loop said that it sleeps?
fn asleep(handle: &LoopHandle) -> bool {
    handle.0.state.is_asleep()
}

#[test]
fn one_that_schedules_itself_runs_before_each_sleep_and_keeps_no_loop_awake() {
    for longest in [None, Some(Duration::from_secs(3600))] {
        with_loop(PollPolicy::OFF, |handle, blocking| {
            let strand = Strand::new("test", handle, ());
            let runs = restless(&strand, longest);
            for _ in 0..50 {
                handle.barrier().wait(blocking).unwrap();
                eventually("the loop sleeps", || asleep(handle));
            }
            let (runs, sleeps) = (runs.load(Acquire), handle.counters().sleeps.get());
            assert!(runs >= 45, "{runs} runs");
            assert!(runs <= sleeps + 2, "{runs} runs, {sleeps} sleeps");
        });
    }
}

#[test]
fn it_wakes_no_loop_and_takes_no_wake_up_from_one() {
    with_loop(PollPolicy::OFF, |handle, blocking| {
        let counters = handle.counters();
        let strand = Strand::new("test", handle, ());
        let (idle, runs) = idle(&strand, None);
        for nth in 1..=50 {
            handle.barrier().wait(blocking).unwrap();
            eventually("the loop sleeps", || asleep(handle));
            let turns = counters.turns.get();
            idle.schedule();
            assert_eq!(counters.turns.get(), turns, "it wakes the loop");
            assert!(asleep(handle), "who comes next will not wake the loop");
            handle.barrier().wait(blocking).unwrap();
            eventually("it runs", || runs.load(Acquire) == nth);
        }
    });
}

#[test]
fn the_longest_delay_holds_on_a_loop_that_is_never_idle_and_on_one_that_sleeps() {
    const LONGEST: Duration = Duration::from_millis(20);
    for is_busy in [true, false] {
        with_loop(PollPolicy::OFF, |handle, _| {
            let strand = Strand::new("test", handle, ());
            let busy = strand.event(|(), _| Progress::More);
            if is_busy {
                busy.schedule();
            }
            let (idle, runs) = idle(&strand, Some(LONGEST));
            let began = Instant::now();
            idle.schedule();
            eventually("it runs", || runs.load(Acquire) == 1);
            // With time for a host that has other things to do.
            assert!(began.elapsed() < LONGEST + Duration::from_secs(5));
            assert!(!is_busy || began.elapsed() >= LONGEST, "the loop was never idle");
        });
    }
}

#[test]
fn the_longest_delay_of_one_that_has_run_wakes_no_loop() {
    let mut event_loop = in_virtual_time();
    let strand = Strand::new("test", &event_loop.handle(), ());
    let (idle, runs) = idle(&strand, Some(Duration::from_secs(3600)));
    idle.schedule();
    drain(&mut event_loop);
    (0..20).for_each(|_| event_loop.turn());
    assert_eq!(runs.load(Acquire), 1);
    assert_eq!(event_loop.timers.next(), None);
    assert_eq!(event_loop.handle().counters().timers.get(), 0);
}
