//! Many more threads than CPUs, all of which would rather poll than sleep: the work goes on, and
//! polling gives way.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::*};
use std::sync::mpsc::channel;
use std::time::Duration;

use iothread::{
    Counters, Event, LoopHandle, PollPolicy, Progress, Strand, ThreadSpec, available_cpus,
    spawn_loop,
};

/// All on one CPU.
const LOOPS: usize = 8;
const HOPS: u64 = 20_000;

/// So long may the whole take on a machine that has other things to do.
const PATIENCE: Duration = Duration::from_secs(120);

/// Passes the token on.
struct Post {
    next: Option<Event<Post>>,
}

fn pass(post: &mut Post, hops: &AtomicU64) -> bool {
    let done = hops.fetch_add(1, Relaxed) + 1 >= HOPS;
    if let (Some(next), false) = (&post.next, done) {
        next.schedule();
    }
    done
}

#[test]
fn loops_that_poll_on_one_cpu_do_not_keep_each_other_from_it() {
    let cpu = available_cpus()[0];
    let poll = PollPolicy { max: Duration::from_millis(1), ..PollPolicy::default() };
    let spec = |n| ThreadSpec { cpus: Some(vec![cpu]), ..ThreadSpec::new(format!("loop{n}")) };
    let loops: Vec<_> = (0..LOOPS).map(|n| spawn_loop(spec(n), poll).unwrap()).collect();
    let (sender, finished) = channel();
    let hops = Arc::new(AtomicU64::new(0));
    let strand = |home: &LoopHandle| Strand::new("post", home, Post { next: None });
    let strands: Vec<Strand<Post>> = loops.iter().map(|(home, _)| strand(home)).collect();
    let event = |strand: &Strand<Post>| {
        let (hops, sender) = (Arc::clone(&hops), sender.clone());
        strand.event(move |post, _| {
            if pass(post, &hops) {
                sender.send(()).unwrap();
            }
            Progress::Idle
        })
    };
    let events: Vec<_> = strands.iter().map(event).collect();
    for (nth, strand) in strands.iter().enumerate() {
        let next = events[(nth + 1) % LOOPS].clone();
        drop(strand.call(move |post, _| post.next = Some(next)));
    }
    for (home, _) in &loops {
        home.barrier().wait(&iothread::Blocking::on_this_thread().unwrap()).unwrap();
    }
    events[0].schedule();
    let in_time = finished.recv_timeout(PATIENCE);
    assert!(in_time.is_ok(), "{} of {HOPS} hops", hops.load(Relaxed));
    let polls = |counters: &Counters| counters.poll_hits.get() + counters.poll_misses.get();
    let polls: u64 = loops.iter().map(|(home, _)| polls(home.counters())).sum();
    // Most of them, if nobody gave way: the one that polls has the CPU that the others need.
    assert!(polls < HOPS / 4, "{polls} polls for {HOPS} hops");
    for (home, thread) in loops {
        home.stop();
        thread.join().unwrap();
    }
}
