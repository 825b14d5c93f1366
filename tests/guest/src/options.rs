//! The command line: words that tune the run.

use alloc::string::String;
use alloc::vec::Vec;

use crate::mmio::Slot;

pub struct Options {
    /// Read and write requests per vCPU and disk, over the four phases.
    pub requests: u32,
    /// At most this many requests in flight in the full phases.
    pub depth: u16,
    /// Bytes of a request.
    pub size: u32,
    /// At most this many bytes of a disk per vCPU.
    pub span: u64,
    /// Seconds without progress until the run is a failure.
    pub watchdog: u64,
    /// Only the verdict and the JSON line.
    pub quiet: bool,
    /// End through port 0xf4.
    pub debug_exit: bool,
    pub event_idx: bool,
    pub indirect: bool,
    /// Virtio-mmio devices.
    pub mmio: Vec<Slot>,
    /// Words that mean nothing here.
    pub unknown: Vec<String>,
}

impl Options {
    pub fn parse(line: &str) -> Self {
        let mut options = Options {
            requests: 1000,
            depth: u16::MAX,
            size: 4096,
            span: u64::MAX,
            watchdog: 60,
            quiet: false,
            debug_exit: false,
            event_idx: true,
            indirect: true,
            mmio: Vec::new(),
            unknown: Vec::new(),
        };
        for word in line.split_ascii_whitespace() {
            if !options.take(word) {
                options.unknown.push(word.into());
            }
        }
        options
    }

    fn take(&mut self, word: &str) -> bool {
        let (name, value) = word.split_once('=').unwrap_or((word, ""));
        let number = value.parse::<u64>().ok();
        let at_least = |low: u64| number.filter(|&n| n >= low);
        match name {
            "quiet" => self.quiet = true,
            "debug-exit" => self.debug_exit = true,
            "no-event-idx" => self.event_idx = false,
            "no-indirect" => self.indirect = false,
            "requests" => return set(&mut self.requests, at_least(8)),
            "depth" => return set(&mut self.depth, at_least(1)),
            "size" => return set(&mut self.size, at_least(512).filter(|n| n.is_power_of_two())),
            "span" => return set(&mut self.span, at_least(512)),
            "mmio" => {
                let slots = Slot::parse_all(value);
                let good = slots.is_some();
                self.mmio.extend(slots.into_iter().flatten());
                return good;
            }
            "watchdog" => return set(&mut self.watchdog, at_least(1)),
            _ => return false,
        }
        value.is_empty()
    }
}

fn set<T: TryFrom<u64>>(field: &mut T, value: Option<u64>) -> bool {
    match value.and_then(|v| T::try_from(v).ok()) {
        Some(value) => {
            *field = value;
            true
        }
        None => false,
    }
}
