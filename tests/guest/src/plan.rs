//! Which part of a disk a vCPU writes, in which order.

use crate::pattern::SECTOR;

/// The four phases: one request at a time, then a full queue; each polled, then with interrupts.
pub const PHASES: [Phase; 4] = [
    Phase { name: "depth1-polled", title: "1 polled", full: false, interrupts: false },
    Phase { name: "depth1-irq", title: "1 irq", full: false, interrupts: true },
    Phase { name: "full-polled", title: "full polled", full: true, interrupts: false },
    Phase { name: "full-irq", title: "full irq", full: true, interrupts: true },
];

pub struct Phase {
    pub name: &'static str,
    pub title: &'static str,
    pub full: bool,
    pub interrupts: bool,
}

/// A vCPU's range of a disk is cut into chunks of one request each. A phase works on a window of
/// them: a round writes all its chunks, then reads them all back. Windows of later phases lie
/// further up and overlap the earlier ones; that of the last phase ends with the range.
pub struct Plan {
    /// First sector of the range.
    start: u64,
    /// Sectors of a chunk.
    chunk: u64,
    /// Chunks of a window.
    pub window: u64,
    /// First chunk of each phase's window.
    first: [u64; 4],
    /// Rounds of each phase.
    pub rounds: u32,
}

/// Sectors that must hold one generation in the end.
pub struct Written {
    pub generation: u32,
    pub start: u64,
    pub sectors: u64,
}

impl Plan {
    /// The plan of lane `lane` of `lanes` that share a disk of `sectors`.
    pub fn new(sectors: u64, lanes: u64, lane: u64, chunk: u64, requests: u32, span: u64) -> Self {
        let range = sectors / lanes / chunk * chunk;
        let chunks = (range / chunk).min((span / SECTOR as u64 / chunk).max(1));
        let writes = u64::from(requests).div_ceil(8);
        let window = writes.min(chunks);
        let room = chunks - window;
        let step = if room >= window / 4 * 2 { window / 4 } else { 0 };
        Plan {
            start: lane * range,
            chunk,
            window,
            first: [0, step, 2 * step, room],
            rounds: writes.div_ceil(window) as u32,
        }
    }

    /// Sector of a chunk of a phase's window.
    pub fn sector(&self, phase: usize, chunk: u64) -> u64 {
        self.start + (self.first[phase] + chunk) * self.chunk
    }

    /// The generation a round writes, from 1.
    pub fn generation(&self, phase: usize, round: u32) -> u32 {
        phase as u32 * self.rounds + round + 1
    }

    /// What must be on the disk after all phases: of each window the part the next one left.
    pub fn written(&self) -> impl Iterator<Item = Written> {
        (0..4).filter_map(|phase| {
            let start = self.first[phase];
            let end = match self.first.get(phase + 1) {
                Some(&next) => next.min(start + self.window),
                None => start + self.window,
            };
            (start < end).then(|| Written {
                generation: self.generation(phase, self.rounds - 1),
                start: self.sector(phase, 0),
                sectors: (end - start) * self.chunk,
            })
        })
    }
}
