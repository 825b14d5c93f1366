//! Fds, timers, pollers and idle callbacks that come, fire and go while their object moves.

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::*};
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use common::{LIMIT, Loops, Lot, eventfd, eventually, policy};
use iothread::{Blocking, Event, EventLoop, PollPolicy, Progress, Reply, Strand, Trigger};

const LOOPS: usize = 3;

/// Something that moves among some loops, and counts what fires.
struct Traveller {
    loops: Loops,
    blocking: Blocking,
    strand: Strand<()>,
    fired: Arc<AtomicU64>,
    event: Event<()>,
    under_way: Vec<Reply<()>>,
    lot: Lot,
}

impl Traveller {
    fn new(seed: u64, poll: PollPolicy) -> Self {
        let loops = Loops::start(LOOPS, poll);
        let strand = Strand::new("test", &loops.handles[0], ());
        let fired: Arc<AtomicU64> = Arc::default();
        let count = Arc::clone(&fired);
        let event = strand.event(move |(), _| {
            count.fetch_add(1, SeqCst);
            Progress::Idle
        });
        let (blocking, lot) = (Blocking::on_this_thread().unwrap(), Lot::new(seed));
        Self { loops, blocking, strand, fired, event, under_way: Vec::new(), lot }
    }

    /// Sets out for somewhere, and now and then lets some time pass.
    fn set_out(&mut self) {
        let to = self.lot.below(LOOPS as u64) as usize;
        self.under_way.push(self.strand.move_to(&self.loops.handles[to]));
        self.lot.dawdle();
    }

    /// Waits until it is there and all is done.
    fn arrive(&mut self) {
        for moved in self.under_way.drain(..) {
            assert!(moved.wait_for(&self.blocking, LIMIT).unwrap().is_some(), "a move is lost");
        }
        self.loops.settle(&self.blocking);
    }

    fn fired(&self) -> u64 {
        self.fired.load(SeqCst)
    }
}

/// How many files this process has open; those who count must be alone.
fn open_files() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

/// Also of timers: their loop is the only one that has fds of its own.
fn fds(rounds: u64) {
    let mut it = Traveller::new(1, PollPolicy::default());
    let before = open_files();
    for round in 0..rounds {
        let (writer, watched) = eventfd();
        let early = it.lot.below(2) == 0;
        it.set_out();
        let seen = it.fired();
        if early {
            writer.write(1).unwrap();
        }
        let source = it.event.on_fd(watched, Trigger::Edge);
        it.set_out();
        if !early {
            writer.write(1).unwrap();
        }
        it.set_out();
        if round % 2 == 0 {
            eventually("an fd that was written to fires", || it.fired() > seen);
        }
        drop(source);
        it.set_out();
        it.arrive();
        let seen = it.fired();
        writer.write(1).unwrap();
        it.loops.settle(&it.blocking);
        assert_eq!(it.fired(), seen, "an fd fires that nobody wants any more");
    }
    assert_eq!(open_files(), before, "fds are left open");
}

fn timers(rounds: u64) {
    let mut it = Traveller::new(2, PollPolicy::OFF);
    let (sentinel, rang) = channel();
    let ring = it.strand.event(move |(), _| {
        sentinel.send(()).unwrap();
        Progress::Idle
    });
    for round in 0..rounds {
        let timer = it.event.timer();
        let at = || Instant::now() + Duration::from_nanos(round * 977 % 400_000);
        it.set_out();
        let seen = it.fired();
        timer.arm_at(at());
        it.set_out();
        if round % 3 != 0 {
            timer.arm_at(at());
            it.set_out();
        }
        if round % 2 == 0 {
            eventually("a timer fires", || it.fired() > seen);
        } else if round % 4 == 1 {
            timer.cancel();
        }
        drop(timer);
        it.set_out();
        it.arrive();
        let now = it.fired();
        assert!(now - seen <= if round % 3 != 0 { 2 } else { 1 }, "a timer fires too often");
        if round % 8 == 0 {
            let sentinel = ring.timer();
            sentinel.arm_at(Instant::now() + Duration::from_millis(1));
            rang.recv_timeout(LIMIT).unwrap();
            assert_eq!(it.fired(), now, "a timer fires that is gone");
        }
    }
}

fn pollers(rounds: u64) {
    let mut it = Traveller::new(3, PollPolicy::default());
    let settle = it.event.clone();
    for round in 0..rounds {
        let token = Arc::new(AtomicU64::new(0));
        let looks = Arc::clone(&token);
        it.set_out();
        let seen = it.fired();
        let poller = it.event.on_poll(move || looks.fetch_add(1, SeqCst) == 0, &settle);
        it.set_out();
        let watched = it.strand.call(move |(), _| {
            poller.watch(true);
            poller
        });
        it.set_out();
        let poller = watched.wait_for(&it.blocking, LIMIT).unwrap().unwrap();
        if round % 2 == 0 {
            eventually("what is watched is seen", || it.fired() > seen);
        }
        it.set_out();
        drop(poller);
        it.arrive();
        assert_eq!(Arc::strong_count(&token), 1, "a loop still has a poller that is gone");
    }
}

fn idles(rounds: u64) {
    let mut it = Traveller::new(4, PollPolicy::OFF);
    let ran: Arc<AtomicU64> = Arc::default();
    let count = Arc::clone(&ran);
    let idle = it.strand.idle(None, move |(), _| {
        count.fetch_add(1, SeqCst);
    });
    for _ in 0..rounds {
        let seen = ran.load(SeqCst);
        it.set_out();
        idle.schedule();
        it.strand.call(|(), _| ()).wait_for(&it.blocking, LIMIT).unwrap().unwrap();
        for moved in it.under_way.drain(..) {
            moved.wait_for(&it.blocking, LIMIT).unwrap().unwrap();
        }
        // It wakes no loop; but when the home wakes up, it must be there, or come.
        eventually("an idle callback runs", || {
            it.strand.home().barrier().wait_for(&it.blocking, LIMIT).unwrap().unwrap();
            ran.load(SeqCst) > seen
        });
        assert_eq!(ran.load(SeqCst), seen + 1, "it runs once");
    }
    let seen = ran.load(SeqCst);
    for _ in 0..rounds {
        let idle = it.strand.idle(None, |(), _| ());
        it.set_out();
        idle.schedule();
        it.set_out();
        drop(idle);
    }
    it.arrive();
    assert_eq!(ran.load(SeqCst), seen);
}

/// One after the other, because one of them counts the open files.
#[test]
fn sources_come_and_go_while_their_object_moves() {
    fds(1_000);
    timers(1_000);
    pollers(1_000);
    idles(3_000);
    let before = open_files();
    drop(Traveller::new(5, PollPolicy::OFF));
    assert_eq!(open_files(), before, "loops leave fds open");
}

/// When timers fire, in the order in which they do.
type Firings = Vec<(u32, Instant)>;

fn alarms(strand: &Strand<Firings>, count: u32) -> Vec<iothread::Timer> {
    let event = |n| {
        strand.event(move |log: &mut Firings, cx| {
            log.push((n, cx.now()));
            Progress::Idle
        })
    };
    (0..count).map(|n| event(n).timer()).collect()
}

/// Turns until all has been done that waits now: so long time stands still.
fn drain(event_loop: &mut EventLoop) {
    let mut all = event_loop.handle().barrier();
    while all.poll() == Ok(None) {
        event_loop.turn();
    }
}

#[test]
fn timers_armed_before_during_and_after_a_move_fire_once_when_they_should() {
    const HOUR: Duration = Duration::from_secs(3600);
    let new = || EventLoop::in_virtual_time("test", policy(PollPolicy::OFF)).unwrap();
    let (mut from, mut to) = (new(), new());
    let strand = Strand::new("test", &from.handle(), Firings::new());
    let timers = alarms(&strand, 6);
    let began = to.now();
    let arm = |n: usize, hours: u32| timers[n].arm_at(began + hours * HOUR);
    arm(0, 6);
    arm(4, 2);
    arm(5, 9);
    drain(&mut from); // they are set
    let mut moved = strand.move_to(&to.handle());
    arm(1, 5); // behind the move, where it will be no more
    arm(4, 4); // once more
    drain(&mut from); // there it goes
    arm(2, 3);
    timers[5].cancel();
    while moved.poll() == Ok(None) {
        to.turn();
    }
    arm(3, 1);
    (0..40).for_each(|_| {
        to.turn();
        from.turn();
    });
    let mut log = strand.call(|log, _| log.clone());
    drain(&mut to);
    let log = log.poll().unwrap().unwrap();
    let expected = [(3, 1), (2, 3), (4, 4), (1, 5), (0, 6)];
    assert_eq!(log, expected.map(|(n, hours)| (n, began + hours * HOUR)));
    assert_eq!(from.handle().counters().timers.get(), 0);
}
