//! `[[test.stall]]`: callbacks that keep their thread busy for far too long, on purpose.

use std::time::{Duration, Instant};

use iothread::{Cx, LoopHandle, Progress, Strand, Timer};

/// Lets nothing else of its thread run, again and again, until it is dropped.
#[derive(Debug)]
pub struct Stall {
    _strand: Strand<Spinner>,
}

#[derive(Debug)]
struct Spinner {
    time: Duration,
    every: Duration,
    timer: Option<Timer>,
}

impl Stall {
    /// A callback on `home` that takes `time`, once in every `every`.
    pub fn new(home: &LoopHandle, time: Duration, every: Duration) -> Self {
        let strand = Strand::new("test.stall", home, Spinner { time, every, timer: None });
        let timer = strand.event(Spinner::spin).timer();
        drop(strand.call(move |spinner, cx| {
            timer.arm_at(cx.now() + spinner.every);
            spinner.timer = Some(timer);
        }));
        Self { _strand: strand }
    }
}

impl Spinner {
    fn spin(&mut self, cx: &mut Cx<'_>) -> Progress {
        let began = cx.now();
        self.timer.iter().for_each(|timer| timer.arm_at(began + self.every));
        let until = Instant::now() + self.time;
        while Instant::now() < until {
            std::hint::spin_loop();
        }
        Progress::Idle
    }
}
