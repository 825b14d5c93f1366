//! Bottom halves and messages of one object run in the order in which they were scheduled, however
//! it moves about.

mod common;

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::*};

use common::{LIMIT, Loops, Lot, policy};
use iothread::{Blocking, Event, EventLoop, PollPolicy, Progress, Reply, Strand};

/// The last two do more than to note that they ran.
const EVENTS: usize = 6;
const WANTS_MORE: usize = 4;
const SCHEDULES_OTHERS: usize = 5;

/// Does the event ask to run again, having run as the nth of all?
fn wants_more(nth: usize) -> bool {
    nth.is_multiple_of(3)
}

/// What should happen: one list.
#[derive(Default)]
struct Oracle {
    queued: VecDeque<usize>,
    ran: usize,
}

impl Oracle {
    fn schedule(&mut self, event: usize, ahead: &[usize]) {
        if !self.queued.contains(&event) && !ahead.contains(&event) {
            self.queued.push_back(event);
        }
    }

    /// The object was visited and has run these, in one visit or several.
    fn check(&mut self, mut ran: &[usize]) {
        while !ran.is_empty() {
            let batch: Vec<_> = self.queued.drain(..).collect();
            assert!(batch.len() <= ran.len(), "a visit ends early: {batch:?}, {ran:?}");
            for (nth, &event) in batch.iter().enumerate() {
                assert_eq!(ran[nth], event, "of {batch:?}, {ran:?}");
                match event {
                    WANTS_MORE if wants_more(self.ran) => self.schedule(event, &batch[nth + 1..]),
                    SCHEDULES_OTHERS => {
                        self.schedule(1, &batch[nth + 1..]);
                        self.schedule(0, &batch[nth + 1..]);
                    }
                    _ => {}
                }
                self.ran += 1;
            }
            assert!(!batch.is_empty(), "nothing was scheduled: {ran:?}");
            ran = &ran[batch.len()..];
        }
    }
}

/// The object: what ran.
type Log = Vec<usize>;

fn events(strand: &Strand<Log>, peek: &Arc<std::sync::mpsc::Sender<usize>>) -> Vec<Event<Log>> {
    let mut events: Vec<Event<Log>> = Vec::new();
    for event in 0..EVENTS {
        let (peek, others) = (Arc::clone(peek), events.clone());
        events.push(strand.event(move |log, _| {
            log.push(event);
            peek.send(event).unwrap();
            match event {
                WANTS_MORE if wants_more(log.len() - 1) => return Progress::More,
                SCHEDULES_OTHERS => [1, 0].iter().for_each(|&n| others[n].schedule()),
                _ => {}
            }
            Progress::Idle
        }));
    }
    events
}

fn as_the_oracle_says(seed: u64) {
    let mut lot = Lot::new(seed);
    let mut loops: Vec<_> = (0..3)
        .map(|_| EventLoop::in_virtual_time("test", policy(PollPolicy::OFF)).unwrap())
        .collect();
    let strand = Strand::new("test", &loops[0].handle(), Log::new());
    let (sender, ran) = std::sync::mpsc::channel();
    let events = events(&strand, &Arc::new(sender));
    let (mut oracle, mut moves) = (Oracle::default(), Vec::new());
    for _ in 0..400 {
        match lot.below(8) {
            0..4 => {
                let event = lot.below(EVENTS as u64) as usize;
                events[event].schedule();
                oracle.schedule(event, &[]);
            }
            4 => moves.push(strand.move_to(&loops[lot.below(3) as usize].handle())),
            _ => loops[lot.below(3) as usize].turn(),
        }
        oracle.check(&ran.try_iter().collect::<Vec<_>>());
    }
    // Those that want more always come to an end, because others run in between, unless it is
    // their number again and again.
    let mut turns_left = 2000;
    while turns_left > 0 {
        loops.iter_mut().for_each(EventLoop::turn);
        oracle.check(&ran.try_iter().collect::<Vec<_>>());
        turns_left = if oracle.queued.is_empty() { turns_left.min(1000) } else { turns_left } - 1;
    }
    assert!(oracle.queued.is_empty(), "lost: {:?}", oracle.queued);
    assert!(moves.into_iter().all(|mut moved| moved.poll() == Ok(Some(()))), "an answer is lost");
}

#[test]
fn an_object_that_moves_runs_what_one_list_would() {
    (0..300).for_each(as_the_oracle_says);
}

/// What the object has seen of each scheduling thread.
#[derive(Default)]
struct Seen {
    messages: [u64; SCHEDULERS],
    /// After so many messages its bottom half was scheduled for the last time.
    marked: [Arc<AtomicU64>; SCHEDULERS],
    marks: u64,
}

const SCHEDULERS: usize = 3;
const MESSAGES: u64 = 3_000;
const MOVERS: usize = 2;

fn messages_stay_in_order(seed: u64) {
    let loops = Loops::start(3, PollPolicy::default());
    let blocking = Blocking::on_this_thread().unwrap();
    let strand = Strand::new("test", &loops.handles[0], Seen::default());
    let over = AtomicBool::new(false);
    let moves: u64 = std::thread::scope(|scope| {
        let schedulers: Vec<_> = (0..SCHEDULERS)
            .map(|me| {
                let strand = &strand;
                let (mut lot, marked) = (Lot::new(seed * 100 + me as u64), Arc::default());
                scope.spawn(move || {
                    let blocking = Blocking::on_this_thread().unwrap();
                    let shared = Arc::clone(&marked);
                    strand.call(move |seen, _| seen.marked[me] = shared).wait(&blocking).unwrap();
                    let mark = strand.event(move |seen, _| {
                        // Not scheduled again before this has been taken away.
                        let (sent, run) = (seen.marked[me].swap(0, AcqRel), seen.messages[me]);
                        assert!(run >= sent, "a bottom half passes messages: {run} of {sent}");
                        seen.marks += 1;
                        Progress::Idle
                    });
                    let mut last: Option<Reply<()>> = None;
                    for n in 0..MESSAGES {
                        last = Some(strand.call(move |seen, _| {
                            assert_eq!(seen.messages[me], n, "messages pass each other");
                            seen.messages[me] += 1;
                        }));
                        if lot.below(4) == 0 && marked.load(Acquire) == 0 {
                            marked.store(n + 1, Release);
                            mark.schedule();
                        }
                        if lot.below(16) == 0 {
                            lot.dawdle();
                        }
                    }
                    let answer = last.unwrap().wait_for(&blocking, LIMIT).unwrap();
                    assert!(answer.is_some(), "thread {me} has lost a message");
                })
            })
            .collect();
        let movers: Vec<_> = (0..MOVERS)
            .map(|me| {
                let (strand, loops, over) = (&strand, &loops, &over);
                let mut lot = Lot::new(seed * 100 + 50 + me as u64);
                scope.spawn(move || {
                    let blocking = Blocking::on_this_thread().unwrap();
                    let mut moves = 0;
                    while !over.load(Acquire) {
                        // Up to three at once from each.
                        let under_way: Vec<_> = (0..1 + lot.below(3))
                            .map(|_| strand.move_to(&loops.handles[lot.below(3) as usize]))
                            .collect();
                        moves += under_way.len() as u64;
                        for moved in under_way {
                            assert!(moved.wait_for(&blocking, LIMIT).unwrap().is_some());
                        }
                    }
                    moves
                })
            })
            .collect();
        let failed = schedulers.into_iter().any(|scheduler| scheduler.join().is_err());
        over.store(true, Release);
        let moves = movers.into_iter().map(|mover| mover.join().unwrap()).sum();
        assert!(!failed);
        moves
    });
    let seen = strand.call(|seen, _| (seen.messages, seen.marks));
    let (messages, marks) = seen.wait_for(&blocking, LIMIT).unwrap().unwrap();
    assert_eq!(messages, [MESSAGES; SCHEDULERS]);
    assert!(marks > 0 && moves > 0);
    println!("{moves} moves, {marks} bottom halves between the messages");
}

#[test]
fn what_one_thread_schedules_stays_in_order_while_others_move_the_object() {
    (0..8).for_each(messages_stay_in_order);
}
