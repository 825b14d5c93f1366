//! Who delays whom: a 20 ms callback every 100 ms, and 1 ms timers and kicks beside it.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::*};
use std::time::{Duration, Instant};

use iothread::{Blocking, Event, PollPolicy, Progress, Sched, Strand, Timer};
use serde::Serialize;

use super::common::{LoopThread, lost, start, strand};
use crate::bench::progress;
use crate::bench::ratio::Verdict;

const LONG: Duration = Duration::from_millis(20);
const EVERY: Duration = Duration::from_millis(100);
const PERIOD: Duration = Duration::from_millis(1);
const EVENTS: u64 = 2_000;
const LIMIT: Duration = Duration::from_millis(1);

/// Lateness beside one long callback.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) struct Case {
    pub(super) what: String,
    pub(super) timers_us: Lateness,
    pub(super) kicks_us: Lateness,
    /// Is p99 of both below 1 ms? Not asked of the thread of the long callback itself.
    pub(super) on_time: Option<Verdict>,
}

/// How late something was, in microseconds.
#[derive(Debug, Clone, Copy, Serialize)]
pub(super) struct Lateness {
    pub(super) p50: f64,
    pub(super) p99: f64,
    pub(super) max: f64,
}

impl Lateness {
    fn of(mut times: Vec<Duration>) -> io::Result<Self> {
        times.sort_unstable();
        let last = times.len().checked_sub(1).ok_or_else(lost)?;
        let at = |share: usize| times[last * share / 100].as_secs_f64() * 1e6;
        Ok(Self { p50: at(50), p99: at(99), max: at(100) })
    }

    fn on_time(self) -> bool {
        self.p99 < LIMIT.as_secs_f64() * 1e6
    }
}

/// Where the long callback runs, seen from those it may delay.
enum Place {
    Nowhere,
    SameThread,
    OtherThread,
    /// Another thread on the same CPU.
    SameCpu(Sched),
}

/// Fires again and again at moments that do not depend on how late it was.
struct Ticker {
    timer: Option<Timer>,
    due: Instant,
    late: Vec<Duration>,
    enough: Arc<AtomicBool>,
}

fn ticks(strand: &Strand<Ticker>) -> io::Result<()> {
    let tick = strand.event(|ticker: &mut Ticker, _| {
        ticker.late.push(Instant::now().saturating_duration_since(ticker.due));
        ticker.due += PERIOD;
        match &ticker.timer {
            Some(timer) if (ticker.late.len() as u64) < EVENTS => timer.arm_at(ticker.due),
            _ => ticker.enough.store(true, Release),
        }
        Progress::Idle
    });
    let timer = tick.timer();
    let begun = strand.call(move |ticker, _| {
        ticker.due = Instant::now() + PERIOD;
        timer.arm_at(ticker.due);
        ticker.timer = Some(timer);
    });
    begun.wait(&blocking()?).map_err(io::Error::other)
}

/// The 20 ms callback, until its strand is gone.
fn inject(strand: &Strand<Option<Timer>>) -> io::Result<()> {
    let long = strand.event(|timer: &mut Option<Timer>, _| {
        let began = Instant::now();
        while began.elapsed() < LONG {
            std::hint::spin_loop();
        }
        if let Some(timer) = timer {
            timer.arm_at(began + EVERY);
        }
        Progress::Idle
    });
    let timer = long.timer();
    let begun = strand.call(move |slot, _| {
        timer.arm_at(Instant::now() + PERIOD);
        *slot = Some(timer);
    });
    begun.wait(&blocking()?).map_err(io::Error::other)
}

/// Moments of kicks, written by the kicker before it kicks, and how many there are.
struct Kicks {
    began: Instant,
    at: Vec<AtomicU64>,
    made: AtomicU64,
}

impl Kicks {
    fn kick(&self, event: &Event<Kicked>) {
        for nth in 0..EVENTS {
            let next = self.began + PERIOD * nth as u32;
            std::thread::sleep(next.saturating_duration_since(Instant::now()));
            self.at[nth as usize].store(self.now(), Relaxed);
            self.made.store(nth + 1, Release);
            event.schedule();
        }
    }

    fn now(&self) -> u64 {
        self.began.elapsed().as_nanos() as u64
    }
}

struct Kicked {
    kicks: Arc<Kicks>,
    late: Vec<Duration>,
}

fn blocking() -> io::Result<Blocking> {
    Blocking::on_this_thread().ok_or_else(|| io::Error::other("on a loop"))
}

fn case(what: &str, place: Place) -> io::Result<Case> {
    progress(&format!("lateness, with the long callback {what}"));
    let cpus = match place {
        Place::SameCpu(_) => Some(vec![iothread::available_cpus()[0]]),
        _ => None,
    };
    let delayed = LoopThread::placed(cpus.clone(), Sched::Other(0), PollPolicy::default())?;
    let other = match place {
        Place::Nowhere | Place::SameThread => None,
        Place::OtherThread => {
            Some(LoopThread::placed(None, Sched::Other(0), PollPolicy::default())?)
        }
        Place::SameCpu(sched) => Some(LoopThread::placed(cpus, sched, PollPolicy::default())?),
    };
    let enough = Arc::<AtomicBool>::default();
    let ticker = Ticker {
        timer: None,
        due: Instant::now(),
        late: Vec::with_capacity(EVENTS as usize),
        enough: Arc::clone(&enough),
    };
    let ticker = strand(&delayed.handle, ticker);
    let kicks = Arc::new(Kicks {
        began: Instant::now() + PERIOD,
        at: (0..EVENTS).map(|_| AtomicU64::new(0)).collect(),
        made: AtomicU64::new(0),
    });
    let kicked = Kicked { kicks: Arc::clone(&kicks), late: Vec::with_capacity(EVENTS as usize) };
    let kicked = strand(&delayed.handle, kicked);
    let event = kicked.event(|kicked: &mut Kicked, _| {
        let now = kicked.kicks.now();
        // A kick that finds the one before not yet served shares its callback.
        let seen = kicked.late.len();
        for at in &kicked.kicks.at[seen..kicked.kicks.made.load(Acquire) as usize] {
            kicked.late.push(Duration::from_nanos(now.saturating_sub(at.load(Relaxed))));
        }
        Progress::Idle
    });
    let injector = strand(&other.as_ref().unwrap_or(&delayed).handle, None);
    if !matches!(place, Place::Nowhere) {
        inject(&injector)?;
    }
    ticks(&ticker)?;
    let kicker = start("kicker", move || kicks.kick(&event))?;
    kicker.join().map_err(|_| io::Error::other("the kicker panicked"))?;
    let waiting = Instant::now();
    while !enough.load(Acquire) {
        if waiting.elapsed() > Duration::from_secs(30) {
            return Err(lost());
        }
        std::thread::sleep(PERIOD);
    }
    delayed.barrier()?;
    let timers = ticker.call(|ticker, _| std::mem::take(&mut ticker.late)).wait(&blocking()?);
    let kicks = kicked.call(|kicked, _| std::mem::take(&mut kicked.late)).wait(&blocking()?);
    let (timers, kicks) = (timers.map_err(io::Error::other)?, kicks.map_err(io::Error::other)?);
    if kicks.len() as u64 != EVENTS {
        return Err(lost());
    }
    let (timers, kicks) = (Lateness::of(timers)?, Lateness::of(kicks)?);
    let asked = !matches!(place, Place::SameThread);
    let on_time = asked.then(|| Verdict::counted(timers.on_time() && kicks.on_time()));
    Ok(Case { what: what.to_owned(), timers_us: timers, kicks_us: kicks, on_time })
}

pub(super) fn all() -> io::Result<Vec<Case>> {
    let mut cases = vec![
        case("nowhere", Place::Nowhere)?,
        case("on the same thread", Place::SameThread)?,
        case("on another thread", Place::OtherThread)?,
    ];
    for sched in [Sched::Other(0), Sched::Other(19), Sched::Batch(0), Sched::Idle] {
        let what = match sched {
            Sched::Other(0) => "on the same CPU, nice 0".to_owned(),
            other => format!("on the same CPU, {other}"),
        };
        cases.push(case(&what, Place::SameCpu(sched))?);
    }
    let idle = cases[0].on_time == Some(Verdict::Holds);
    for case in cases.iter_mut().filter(|case| case.on_time == Some(Verdict::Fails)) {
        if !idle {
            case.on_time = Some(Verdict::CannotTell); // others are to blame
        }
    }
    Ok(cases)
}
