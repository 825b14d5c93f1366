//! The machine a measurement was taken on, and what its kernel says of a thread.

use std::fs;
use std::time::Duration;

use serde::Serialize;

/// The machine, as far as it matters to a measurement.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) struct Machine {
    /// CPUs this process may use.
    cpus: usize,
    model: String,
    kernel: String,
    clock_source: String,
    /// Runnable threads, on average over the last minute.
    load: String,
}

impl Machine {
    pub(super) fn this() -> Self {
        let line = |path: &str| fs::read_to_string(path).unwrap_or_default().trim().to_owned();
        let model = line("/proc/cpuinfo")
            .lines()
            .find_map(|line| line.strip_prefix("model name")?.split_once(": "))
            .map_or_else(String::new, |(_, model)| model.to_owned());
        Self {
            cpus: iothread::available_cpus().len(),
            model,
            kernel: line("/proc/sys/kernel/osrelease"),
            clock_source: line("/sys/devices/system/clocksource/clocksource0/current_clocksource"),
            load: line("/proc/loadavg").split(' ').next().unwrap_or_default().to_owned(),
        }
    }

    pub(super) fn render(&self) -> String {
        let Self { cpus, model, kernel, clock_source, load } = self;
        format!("{cpus} CPUs ({model}), Linux {kernel}, clock source {clock_source}, load {load}")
    }
}

/// What the kernel has counted of a thread of this process: a witness besides our own counters.
#[derive(Debug, Clone, Copy)]
pub(super) struct Witness {
    /// Write system calls, where the kernel counts them.
    writes: Option<u64>,
    /// Nanoseconds on a CPU, where the kernel counts them.
    cpu_ns: Option<u64>,
}

impl Witness {
    pub(super) fn of(tid: u32) -> Self {
        Self::at(&format!("/proc/self/task/{tid}"))
    }

    pub(super) fn of_this_thread() -> Self {
        Self::at("/proc/thread-self")
    }

    fn at(directory: &str) -> Self {
        let file = |name| fs::read_to_string(format!("{directory}/{name}")).unwrap_or_default();
        let writes = file("io").lines().find_map(|line| line.strip_prefix("syscw: ")?.parse().ok());
        let cpu_ns = file("schedstat").split(' ').next().and_then(|ns| ns.parse().ok());
        Self { writes, cpu_ns }
    }

    /// Writes since `before`.
    pub(super) fn writes_since(self, before: Self) -> Option<u64> {
        Some(self.writes?.wrapping_sub(before.writes?))
    }

    /// Time on a CPU since `before`.
    pub(super) fn cpu_since(self, before: Self) -> Option<Duration> {
        Some(Duration::from_nanos(self.cpu_ns?.saturating_sub(before.cpu_ns?)))
    }
}
