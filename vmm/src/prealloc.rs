//! Touching guest memory before the guest starts: by several threads, near to it, and with an
//! error instead of a SIGBUS where the host has no page to give.

#![expect(unsafe_code, reason = "madvise and fallocate")]

use std::collections::BTreeMap;
use std::io::{self, IsTerminal};
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use config::plan::Plan;
use config::prealloc::{self, Toucher, touchers};
use config::{CpuSet, Host};
use devices::virtio::Mem;
use iothread::{Granted, Thread, ThreadSpec};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use crate::host_error::HostError;
use crate::memory::{guest_ranges, host_slice};
use crate::resources::{Fallback, cpu_ids};
use crate::terminal;

/// So much is touched between two looks at whether to go on; at least a huge page.
const CHUNK: u64 = 64 << 20;
/// Work that takes longer than this shows how far it is.
const PATIENCE: Duration = Duration::from_secs(2);
const TICK: Duration = Duration::from_millis(250);

/// What was done.
#[derive(Debug, Default)]
pub struct Touched {
    /// The threads, which have ended. Empty: nothing was to be touched.
    pub threads: Vec<Granted>,
    /// What they wished for and did not get.
    pub fallbacks: Vec<Fallback>,
}

/// What the threads and the one that waits for them share.
#[derive(Debug, Default)]
struct Shared {
    bytes: AtomicU64,
    stop: AtomicBool,
}

/// A chunk that could not be touched.
#[derive(Debug)]
struct Failed {
    /// Offset into guest memory.
    offset: u64,
    error: io::Error,
}

/// Touches the memory of the plan as it says, after [`crate::memory::bind`].
///
/// # Errors
/// The host has not enough memory or huge pages, a thread cannot be made, or a signal that ends
/// the machine came.
pub fn touch(memory: &Mem, plan: &Plan) -> Result<Touched, HostError> {
    if prealloc::wish(plan).is_none() {
        return Ok(Touched::default());
    }
    let touchers = touchers(plan, &Host::live().unwrap_or_else(|_| unknown_host()));
    let chunk = plan.machine.hugepages.unwrap_or(0).max(CHUNK);
    let shared = Arc::new(Shared::default());
    let (sender, results) = channel();
    let mut touched = Touched::default();
    let mut threads: Vec<Thread> = Vec::new();
    let mut result = Ok(());
    for toucher in touchers {
        let Toucher { name, cpus, node, ranges } = toucher;
        if let (Some(node), None) = (node, &cpus) {
            let what = format!("wanted CPUs of host node {node}, got any: none may be used");
            let fallback = Fallback { whose: "machine.memory.prealloc".to_owned(), what };
            if !touched.fallbacks.contains(&fallback) {
                touched.fallbacks.push(fallback);
            }
        }
        let cpus = cpus.as_ref().map(cpu_ids);
        let spec = ThreadSpec { cpus, ..ThreadSpec::new(&name) };
        let (memory, shared, sender) = (Arc::clone(memory), Arc::clone(&shared), sender.clone());
        let body = move || {
            let result = touch_all(&memory, &ranges, chunk, &shared);
            // Nobody listens after the first failure.
            let _ = sender.send(result);
        };
        match iothread::spawn(spec, body) {
            Ok(thread) => threads.push(thread),
            Err(error) => {
                result = Err(HostError::new(name, error));
                break;
            }
        }
    }
    drop(sender);
    if result.is_ok() {
        result = wait(&results, &shared, plan);
    }
    shared.stop.store(true, Relaxed);
    for thread in threads {
        for refused in &thread.granted.refused {
            let whose = thread.granted.name.clone();
            touched.fallbacks.push(Fallback { whose, what: refused.to_string() });
        }
        let granted = thread.granted.clone();
        if thread.join().is_err() {
            result = result.and(Err(HostError::new(&granted.name, "it panicked")));
        }
        touched.threads.push(granted);
    }
    result.map(|()| touched)
}

/// A host of which nothing is known: one thread, near to nothing.
fn unknown_host() -> Host {
    Host {
        cpus: BTreeMap::new(),
        nodes: BTreeMap::new(),
        memory: None,
        hugepages: Vec::new(),
        allowed: Some(CpuSet::new()),
        limits: None,
    }
}

/// Waits until all threads have said how it went, and meanwhile tells a person how far it is.
fn wait(
    results: &Receiver<Result<(), Failed>>,
    shared: &Shared,
    plan: &Plan,
) -> Result<(), HostError> {
    let began = Instant::now();
    let shows = io::stderr().is_terminal();
    let mut shown = false;
    let result = loop {
        match results.recv_timeout(TICK) {
            Ok(Ok(())) => {}
            Ok(Err(failed)) => break Err(explain(&failed, plan)),
            // All have ended. One that panicked is found when it is joined.
            Err(RecvTimeoutError::Disconnected) => break Ok(()),
            Err(RecvTimeoutError::Timeout) => {}
        }
        if terminal::ending_signal_waits() {
            break Err(HostError::new("machine.memory.prealloc", "a signal ended it"));
        }
        if shows && began.elapsed() > PATIENCE {
            shown = true;
            terminal::say(&progress(shared.bytes.load(Relaxed), plan.machine.memory));
        }
    };
    if shown {
        terminal::say("\r\x1b[K");
    }
    result
}

/// One line that replaces itself.
fn progress(bytes: u64, all: u64) -> String {
    let gib = |bytes: u64| bytes as f64 / (1u64 << 30) as f64;
    let percent = (u128::from(bytes) * 100 / u128::from(all.max(1))).min(100);
    let (done, all) = (gib(bytes), gib(all));
    format!("\rheddle: touching guest memory: {done:.1} of {all:.1} GiB, {percent}%\x1b[K")
}

/// What the kernel's answer means, and what to do.
fn explain(failed: &Failed, plan: &Plan) -> HostError {
    let Failed { offset, error } = failed;
    let mut start = 0;
    let mut node = None;
    for part in &plan.numa {
        if (start..start + part.memory).contains(offset) {
            node = part.host_node;
        }
        start += part.memory;
    }
    let place = node.map_or("this host".to_owned(), |node| format!("host node {node}"));
    let at = format!("{} MiB of {} MiB", offset >> 20, plan.machine.memory >> 20);
    match (error.raw_os_error(), plan.machine.hugepages) {
        (Some(libc::EHWPOISON), _) => HostError::new(
            "machine.memory",
            format!("{place} has damaged memory, found after {at}: see the kernel's log"),
        ),
        (Some(libc::EFAULT | libc::ENOMEM | libc::ENOSPC), Some(page)) => {
            let (mib, kib) = (page >> 20, page >> 10);
            let dir = match node {
                Some(node) => format!("/sys/devices/system/node/node{node}"),
                None => "/sys/kernel/mm".to_owned(),
            };
            HostError::new(
                "machine.memory.hugepages",
                format!(
                    "{place} ran out of huge pages of {mib} MiB after {at}: raise \
                     {dir}/hugepages/hugepages-{kib}kB/nr_hugepages, or the cgroup's limit of them"
                ),
            )
        }
        (Some(libc::EFAULT | libc::ENOMEM | libc::ENOSPC), None) => HostError::new(
            "machine.memory",
            format!("{place} ran out of memory after {at}: lower it, or stop something else"),
        ),
        _ => HostError::new("machine.memory.prealloc", format!("after {at}: {error}")),
    }
}

/// Touches these parts of guest memory.
fn touch_all(
    memory: &Mem,
    ranges: &[Range<u64>],
    chunk: u64,
    shared: &Shared,
) -> Result<(), Failed> {
    for range in ranges {
        let mut offset = range.start;
        while offset < range.end && !shared.stop.load(Relaxed) {
            let end = range.end.min(offset + chunk);
            let parts = guest_ranges(offset..end);
            parts
                .into_iter()
                .try_for_each(|part| populate(memory, part))
                .map_err(|error| Failed { offset, error })?;
            shared.bytes.fetch_add(end - offset, Relaxed);
            offset = end;
        }
    }
    Ok(())
}

/// Has the kernel put pages, ready to be written, behind a guest-physical range. What is in it
/// stays.
fn populate(memory: &Mem, range: Range<u64>) -> io::Result<()> {
    let (address, size) = host_slice(memory, range.clone())?;
    loop {
        // SAFETY: the range is guest memory, which `memory` keeps mapped; contents do not change.
        if unsafe { libc::madvise(address.cast(), size, libc::MADV_POPULATE_WRITE) } == 0 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        match error.raw_os_error() {
            Some(libc::EINTR | libc::EAGAIN) => {}
            // Linux before 5.14.
            Some(libc::EINVAL) => return reserve(memory, range),
            _ => return Err(error),
        }
    }
}

/// Has the kernel put pages behind a guest-physical range, under the memory policy that was set for
/// it. For a file, unlike touching with a store, this cannot end in a SIGBUS; the first access then
/// only maps what is there.
fn reserve(memory: &Mem, range: Range<u64>) -> io::Result<()> {
    let region = memory.find_region(GuestAddress(range.start));
    let region = region.ok_or_else(|| io::Error::other("no memory there"))?;
    let start = region.start_addr().0;
    let Some(file) = region.file_offset() else {
        for page in range.step_by(4096) {
            // A change of nothing, but a write: nothing else runs in this memory yet.
            let at = GuestAddress(page);
            let byte = memory.load::<u8>(at, Relaxed).map_err(io::Error::other)?;
            memory.store(byte, at, Relaxed).map_err(io::Error::other)?;
        }
        return Ok(());
    };
    let offset = file.start() + (range.start - start);
    let size = range.end - range.start;
    loop {
        // SAFETY: works on a descriptor that `memory` keeps open; mode 0 changes no contents.
        let result = unsafe {
            libc::fallocate(file.file().as_raw_fd(), 0, offset as libc::off_t, size as libc::off_t)
        };
        if result == 0 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::tests::{plan, smaps};
    use crate::memory::{Backing, HIGH_RAM, LOW_RAM_END, allocate};

    /// KiB of each region that are there.
    fn resident(memory: &Mem) -> Vec<u64> {
        let rss = |smaps: String| {
            let rss = smaps.lines().find_map(|line| line.strip_prefix("Rss:"));
            rss.and_then(|rss| rss.trim().strip_suffix(" kB")?.parse().ok()).unwrap()
        };
        memory.iter().map(|region| rss(smaps(region).unwrap())).collect()
    }

    #[test]
    fn all_of_it_is_there_after_it_was_touched_by_the_threads_of_the_plan() {
        let plan = plan("[machine.memory]\nsize = \"24M\"\nprealloc = { threads = 3 }");
        let memory = allocate(24 << 20, Backing::Shared).unwrap();
        assert_eq!(resident(memory.mem()), [0]);
        let touched = touch(memory.mem(), &plan).unwrap();
        assert_eq!(resident(memory.mem()), [24 << 10]);
        let names: Vec<_> = touched.threads.iter().map(|thread| thread.name.as_str()).collect();
        assert_eq!(names, ["prealloc0", "prealloc1", "prealloc2"]);
        assert_eq!(touched.fallbacks, []);
        assert_eq!(Arc::strong_count(memory.mem()), 1, "the threads have ended");
    }

    #[test]
    fn nothing_is_touched_unless_it_is_wanted() {
        let memory = allocate(4 << 20, Backing::Shared).unwrap();
        let touched = touch(memory.mem(), &plan("[machine]\nmemory = \"4M\"")).unwrap();
        assert_eq!((touched.threads.len(), resident(memory.mem())), (0, vec![0]));
    }

    #[test]
    fn a_chunk_may_lie_on_both_sides_of_the_hole_and_contents_stay() {
        let memory = allocate(LOW_RAM_END + (8 << 20), Backing::Shared).unwrap();
        let memory = memory.mem();
        memory.write_obj(0x1234_5678u32, GuestAddress(HIGH_RAM + 8)).unwrap();
        let shared = Shared::default();
        let around = LOW_RAM_END - (2 << 20)..LOW_RAM_END + (4 << 20);
        touch_all(memory, &[around], CHUNK, &shared).unwrap();
        assert_eq!(resident(memory), [2 << 10, 4 << 10]);
        assert_eq!(shared.bytes.load(Relaxed), 6 << 20);
        assert_eq!(memory.read_obj::<u32>(GuestAddress(HIGH_RAM + 8)).unwrap(), 0x1234_5678);
        shared.stop.store(true, Relaxed);
        let start = 0..4 << 20;
        touch_all(memory, std::slice::from_ref(&start), CHUNK, &shared).unwrap();
        assert_eq!(resident(memory), [2 << 10, 4 << 10], "it was told to stop");
    }

    #[test]
    fn old_kernels_reserve_the_same_pages() {
        use std::os::unix::fs::MetadataExt;
        let memory = allocate(LOW_RAM_END + (8 << 20), Backing::Shared).unwrap();
        let memory = memory.mem();
        memory.write_obj(7u8, GuestAddress(HIGH_RAM + (2 << 20))).unwrap();
        let blocks = || {
            let region = memory.iter().next().unwrap();
            region.file_offset().unwrap().file().metadata().unwrap().blocks() * 512
        };
        reserve(memory, HIGH_RAM + (2 << 20)..HIGH_RAM + (6 << 20)).unwrap();
        assert_eq!(blocks(), 4 << 20);
        reserve(memory, LOW_RAM_END - (2 << 20)..LOW_RAM_END).unwrap();
        assert_eq!(blocks(), 6 << 20);
        assert_eq!(memory.read_obj::<u8>(GuestAddress(HIGH_RAM + (2 << 20))).unwrap(), 7);
    }

    #[test]
    fn a_huge_page_that_is_missing_is_an_error_and_not_a_signal() {
        let pool = "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages";
        if std::fs::read_to_string(pool).is_ok_and(|text| text.trim() != "0") {
            return; // They are not ours to take.
        }
        let text = "[machine.memory]\nhugepages = \"2M\"\nprealloc = true\n\
            [[numa]]\nvcpus = \"0\"\nmemory = \"2M\"\n\
            [[numa]]\nmemory = \"4M\"\nhost-node = 0";
        let plan = plan(text);
        // As where the kernel promised pages of any node: without that, mapping succeeds.
        let memory =
            crate::memory::map(6 << 20, Backing::Huge(2 << 20), libc::MAP_NORESERVE).unwrap();
        let error = touch(memory.mem(), &plan).unwrap_err().to_string();
        assert!(error.starts_with("machine.memory.hugepages: "), "{error}");
        assert!(error.contains("ran out of huge pages of 2 MiB after "), "{error}");
        let shared = Shared::default();
        let last = [2 << 20..2 << 20, 4 << 20..6 << 20];
        let failed = touch_all(memory.mem(), &last, 2 << 20, &shared).unwrap_err();
        let error = explain(&failed, &plan).to_string();
        assert!(error.contains("host node 0 ran out") && error.contains("4 MiB of 6"), "{error}");
        assert!(error.contains("node/node0/hugepages/hugepages-2048kB/nr_hugepages"), "{error}");
        let error = reserve(memory.mem(), 0..2 << 20).unwrap_err();
        let error = explain(&Failed { offset: 0, error }, &plan).to_string();
        assert!(error.contains("this host ran out of huge pages"), "{error}");
    }

    #[test]
    fn the_progress_is_one_line_that_replaces_itself() {
        assert_eq!(
            progress(24 << 30, 64 << 30),
            "\rheddle: touching guest memory: 24.0 of 64.0 GiB, 37%\x1b[K"
        );
        assert!(progress(u64::MAX, 1).contains("100%"));
    }
}
