//! Objects that move from loop to loop while many threads kick them in every way there is.
//!
//! Ten million kicks, or as many as `HEDDLE_KICKS` says.

mod common;

use std::io::Write;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering::*, fence};
use std::time::{Duration, Instant};

use common::{LIMIT, Loops, Lot, comes, eventfd};
use iothread::{
    Blocking, Event, FdSource, Operation, PollPolicy, Poller, Port, Progress, Strand, Trigger,
    VcpuLoop,
};

const LOOPS: usize = 4;
const OBJECTS: usize = 2;

/// How kicks come, by number of the producer.
const WAYS: [&str; 8] =
    ["bottom half", "bottom half 2", "vcpu", "vcpu 2", "eventfd", "timer", "poller", "ring"];
const VCPUS: std::ops::Range<usize> = 2..4;
const EVENTFD: usize = 4;
const TIMER: usize = 5;
const POLLER: usize = 6;
const RING: usize = 7;

/// Kicks between two looks whether the last one has arrived.
const BURST: u64 = 64;

/// Moves from each loop to each other, while kicks of each way are under way.
const MOVES_EACH: u64 = 20;

/// What the producers of an object and the object itself have counted.
#[derive(Default)]
struct Tally {
    /// Raised before the kick.
    fired: [AtomicU64; WAYS.len()],
    /// Raised by the object to what it found in `fired`.
    seen: [AtomicU64; WAYS.len()],
    entered: AtomicBool,
    /// Does the poller's producer have to kick?
    asks: AtomicBool,
    /// Operations handed to a ring.
    submitted: AtomicU64,
    /// When the timer is due.
    due: AtomicU64,
    /// The strand itself.
    strand: OnceLock<Strand<Object>>,
}

impl Tally {
    fn read(counts: &[AtomicU64; WAYS.len()]) -> [u64; WAYS.len()] {
        std::array::from_fn(|way| counts[way].load(SeqCst))
    }

    fn is_served(&self, way: usize) -> bool {
        self.seen[way].load(SeqCst) == self.fired[way].load(SeqCst)
    }
}

struct Object {
    tally: Arc<Tally>,
    poller: Option<Poller>,
    port: Option<Arc<Port>>,
    /// Where the ring's operation reads from and to.
    pipe: OwnedFd,
    byte: Box<[u8; 1]>,
    iovec: Box<[libc::iovec; 1]>,
}

#[expect(unsafe_code, reason = "the iovec points into the object itself")]
// SAFETY: the pointer is only used by the kernel, and only while an operation is in flight, which
// the test waits for before it lets go of the object.
unsafe impl Send for Object {}

impl Object {
    fn new(pipe: OwnedFd, tally: &Arc<Tally>) -> Self {
        let mut byte = Box::new([0]);
        let iovec = Box::new([libc::iovec { iov_base: byte.as_mut_ptr().cast(), iov_len: 1 }]);
        Self { tally: Arc::clone(tally), poller: None, port: None, pipe, byte, iovec }
    }

    /// What every callback does: says which kicks it has seen, and looks that nobody else is here
    /// and that it runs where it should.
    fn visit(&mut self, way: usize, on_vcpu: bool) {
        assert!(!self.tally.entered.swap(true, SeqCst), "two threads in one object");
        let fired = self.tally.fired[way].load(SeqCst);
        let before = self.tally.seen[way].swap(fired, SeqCst);
        assert!(before <= fired, "{} seen of {} kicks by {}", before, fired, WAYS[way]);
        if !on_vcpu && let Some(strand) = self.tally.strand.get() {
            assert_eq!(Some(strand.home().name()), std::thread::current().name(), "not at home");
        }
        assert!(self.tally.entered.swap(false, SeqCst), "two threads in one object");
    }
}

struct Model {
    tally: Arc<Tally>,
    strand: Strand<Object>,
    kicks: Vec<Event<Object>>,
    submit: Event<Object>,
    eventfd: vmm_sys_util::eventfd::EventFd,
    _source: FdSource,
    pipe: std::io::PipeWriter,
}

impl Model {
    fn new(home: &iothread::LoopHandle, blocking: &Blocking) -> Self {
        let tally: Arc<Tally> = Arc::default();
        let (reader, pipe) = std::io::pipe().unwrap();
        let strand = Strand::new("object", home, Object::new(reader.into(), &tally));
        assert!(tally.strand.set(strand.clone()).is_ok());
        let kick = |way| {
            strand.event(move |object: &mut Object, cx| {
                if way == TIMER {
                    // It is armed again as soon as this has been seen.
                    let due = object.tally.due.load(SeqCst);
                    assert!(now() >= due, "a timer fires too early");
                }
                object.visit(way, cx.on_vcpu());
                if way == POLLER {
                    object.tally.asks.store(!cx.polls(), SeqCst);
                    object.poller.as_ref().unwrap().watch(cx.polls());
                    fence(SeqCst);
                    object.visit(way, cx.on_vcpu());
                }
                Progress::Idle
            })
        };
        let kicks: Vec<_> = (0..RING).map(kick).collect();
        // Polling ends: the producer is asked to kick from now on.
        let settle = strand.event(|object: &mut Object, cx| {
            object.poller.as_ref().unwrap().watch(false);
            object.tally.asks.store(true, SeqCst);
            fence(SeqCst);
            object.visit(POLLER, cx.on_vcpu());
            Progress::Idle
        });
        let completed = strand.event(|object: &mut Object, cx| {
            let (port, mut results) = (object.port.clone().unwrap(), 0);
            port.take(|slot, result| {
                assert_eq!((slot, result), (0, 1), "one byte is read");
                results += 1;
            });
            // A vCPU that served the result has left the event behind.
            assert!(results <= 1);
            if results == 1 {
                assert_eq!(object.byte[0], 7);
                object.visit(RING, cx.on_vcpu());
            }
            Progress::Idle
        });
        let submit = strand.event(|object: &mut Object, cx| {
            let Some(ring) = cx.ring() else { return Progress::Home };
            let (fd, buffers) = (object.pipe.as_raw_fd(), object.iovec.as_ptr());
            let read = Operation::Read { fd, buffers, count: 1, offset: u64::MAX };
            #[expect(unsafe_code, reason = "a ring reads to where it is told")]
            // SAFETY: fd, iovec and buffer are the object's, which outlives the operation.
            unsafe { ring.submit(read, object.port.as_ref().unwrap(), 0) }.unwrap();
            object.tally.submitted.fetch_add(1, SeqCst);
            Progress::Idle
        });
        let (eventfd, watched) = eventfd();
        let source = kicks[EVENTFD].on_fd(watched, Trigger::Edge);
        let looked_at = Arc::clone(&tally);
        let poller = kicks[POLLER].on_poll(move || !looked_at.is_served(POLLER), &settle);
        let port = Port::new(1, &completed);
        tally.asks.store(true, SeqCst);
        strand
            .call(move |object, _| (object.poller, object.port) = (Some(poller), Some(port)))
            .wait(blocking)
            .unwrap();
        Self { tally, strand, kicks, submit, eventfd, _source: source, pipe }
    }

    /// Kicks in one way until there is nothing left to do, then once more.
    fn produce(&self, way: usize, loops: &Loops, left: &AtomicI64, over: &AtomicBool) {
        let mut vcpu = VCPUS.contains(&way).then(VcpuLoop::enter);
        let mut lot = Lot::new(way as u64);
        let timer = self.kicks.get(way).unwrap_or(&self.kicks[0]).timer();
        loop {
            let burst = match way {
                TIMER | POLLER | RING => 1,
                _ => 1 + lot.below(BURST),
            };
            for _ in 0..burst {
                let nth = self.tally.fired[way].load(Relaxed) + 1;
                if way == TIMER {
                    let at = Instant::now() + Duration::from_nanos(lot.below(60_000));
                    self.tally.due.store(nanos(at), SeqCst);
                    self.tally.fired[way].store(nth, SeqCst);
                    timer.arm_at(at);
                    continue;
                }
                self.tally.fired[way].store(nth, SeqCst);
                match (way, &mut vcpu) {
                    (_, Some(vcpu)) => self.kicks[way].run_here(&mut vcpu.exit()),
                    (EVENTFD, _) => self.eventfd.write(1).unwrap(),
                    (POLLER, _) => {
                        fence(SeqCst);
                        if self.tally.asks.swap(false, SeqCst) {
                            self.kicks[way].schedule();
                        }
                    }
                    (RING, _) => {
                        self.submit.schedule();
                        let came = comes(|| self.tally.submitted.load(SeqCst) == nth);
                        self.check(loops, came, "an operation is submitted");
                        (0..lot.below(8)).for_each(|_| std::thread::yield_now());
                        (&self.pipe).write_all(&[7]).unwrap();
                    }
                    _ => self.kicks[way].schedule(),
                }
            }
            let enough = left.fetch_sub(burst as i64, SeqCst) < 0 && over.load(SeqCst);
            if enough && way < TIMER {
                return; // a barrier must do
            }
            let came = comes(|| self.tally.is_served(way));
            self.check(loops, came, WAYS[way]);
            if enough {
                return;
            }
            lot.dawdle();
        }
    }

    fn is_quiet_after_yield(&self) -> bool {
        let quiet = (0..WAYS.len()).all(|way| self.tally.is_served(way));
        if quiet {
            std::thread::yield_now();
        }
        quiet
    }

    fn check(&self, loops: &Loops, came: bool, what: &str) {
        if came {
            return;
        }
        let (fired, seen) = (Tally::read(&self.tally.fired), Tally::read(&self.tally.seen));
        say(&format!("never: {what}; home {:?}", self.strand.home()));
        for (way, name) in WAYS.iter().enumerate() {
            say(&format!("  {name}: {} fired, {} seen", fired[way], seen[way]));
        }
        let (asks, submitted) = (&self.tally.asks, &self.tally.submitted);
        say(&format!("  poller asks: {asks:?}, submitted: {submitted:?}"));
        for handle in &loops.handles {
            let counters = handle.counters();
            say(&format!("  {}: {:?}", handle.name(), counters));
        }
        std::process::abort();
    }

    /// Moves the object about.
    fn travel(&self, nth: usize, loops: &Loops, over: &AtomicBool, left: &AtomicI64) -> Moves {
        let blocking = Blocking::on_this_thread().unwrap();
        let (mut moves, mut lot) = (Moves::default(), Lot::new(100 + nth as u64));
        let began = Instant::now();
        loop {
            let from = loops.index(&self.strand.home());
            let to = (from + 1 + lot.below(LOOPS as u64 - 1) as usize) % LOOPS;
            // Most kicks are served at once: one is awaited that is not.
            (0..1000).find(|_| !self.is_quiet_after_yield());
            let seen = Tally::read(&self.tally.seen);
            let answer = self.strand.move_to(&loops.handles[to]);
            let answer = answer.wait_for(&blocking, LIMIT).unwrap();
            self.check(loops, answer.is_some(), "a move");
            assert_eq!(self.strand.home(), loops.handles[to], "it has not moved");
            let fired = Tally::read(&self.tally.fired);
            moves.note(from, to, std::array::from_fn(|way| fired[way] > seen[way]));
            lot.dawdle();
            if left.load(SeqCst) < 0 && (moves.suffice() || began.elapsed() > 2 * LIMIT) {
                over.store(true, SeqCst);
                return moves;
            }
        }
    }
}

/// At once: the test harness would keep it until an end that does not come.
fn say(words: &str) {
    let _ = writeln!(std::io::stderr(), "{words}");
}

#[derive(Default)]
struct Moves {
    all: u64,
    under_way: u64,
    /// With kicks of a way under way, from a loop to another.
    each: [[[u64; WAYS.len()]; LOOPS]; LOOPS],
}

impl Moves {
    fn note(&mut self, from: usize, to: usize, ways: [bool; WAYS.len()]) {
        self.all += 1;
        self.under_way += u64::from(ways.contains(&true));
        for (count, under_way) in self.each[from][to].iter_mut().zip(ways) {
            *count += u64::from(under_way);
        }
    }

    fn rarest(&self) -> u64 {
        let pairs = (0..LOOPS).flat_map(|from| (0..LOOPS).map(move |to| (from, to)));
        let pairs = pairs.filter(|(from, to)| from != to);
        pairs.flat_map(|(from, to)| self.each[from][to]).min().unwrap()
    }

    fn suffice(&self) -> bool {
        self.rarest() >= MOVES_EACH
    }
}

fn nanos(at: Instant) -> u64 {
    static START: OnceLock<Instant> = OnceLock::new();
    at.saturating_duration_since(*START.get_or_init(Instant::now)).as_nanos() as u64
}

fn now() -> u64 {
    nanos(Instant::now())
}

fn stress(kicks: i64) {
    now();
    // The others would wait for a thread that has failed.
    std::panic::set_hook(Box::new(|panic| {
        say(&panic.to_string());
        std::process::abort();
    }));
    let blocking = Blocking::on_this_thread().unwrap();
    let loops = Loops::start(LOOPS, PollPolicy::default());
    let models: Vec<_> =
        (0..OBJECTS).map(|n| Model::new(&loops.handles[n % LOOPS], &blocking)).collect();
    let left = AtomicI64::new(kicks);
    let began = Instant::now();
    let all: Vec<Moves> = std::thread::scope(|scope| {
        let travels: Vec<_> = models
            .iter()
            .enumerate()
            .map(|(nth, model)| {
                let over: &AtomicBool = Box::leak(Box::default());
                let (loops, left) = (&loops, &left);
                for way in 0..WAYS.len() {
                    scope.spawn(move || model.produce(way, loops, left, over));
                }
                scope.spawn(move || model.travel(nth, loops, over, left))
            })
            .collect();
        travels.into_iter().map(|travel| travel.join().unwrap()).collect()
    });
    loops.settle(&blocking);
    let mut total = 0;
    for model in &models {
        let (fired, seen) = (Tally::read(&model.tally.fired), Tally::read(&model.tally.seen));
        model.check(&loops, fired == seen, "the last kick");
        total += fired.iter().sum::<u64>();
        println!("kicks: {fired:?}");
    }
    for handle in &loops.handles {
        let counters = handle.counters();
        let rings = (counters.ring_submits.get(), counters.ring_completions.get());
        assert_eq!(rings.0, rings.1, "operations complete where they were submitted");
        println!("{}: {} operations, {} sleeps", handle.name(), rings.0, counters.sleeps.get());
    }
    for moves in &all {
        let share = moves.under_way as f64 / moves.all as f64;
        println!("{} moves, {share:.4} with kicks under way", moves.all);
        println!("the rarest (from, to, way): {} times", moves.rarest());
        assert!(share >= 0.95, "{share}");
        assert!(moves.suffice(), "{:?}", moves.each);
    }
    assert!(total >= kicks as u64);
    println!("{total} kicks in {:?}", began.elapsed());
}

#[test]
fn nothing_is_lost_of_ten_million_kicks_while_objects_move() {
    let kicks = std::env::var("HEDDLE_KICKS").map(|kicks| kicks.parse().unwrap());
    stress(kicks.unwrap_or(10_000_000));
}
