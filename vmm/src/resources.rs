//! What a machine is made on and what outlives a reset of its guest: event loops with their
//! threads, and opened images.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use config::CpuSet;
use config::plan::{self, Disk, DiskSource, Plan};
use devices::block::raw::{Engine, Options, RawImage};
use devices::virtio::seat::Placement;
use iothread::{
    Blocking, Granted, LoopHandle, LoopPolicy, PollPolicy, Ring, Sched, Thread, ThreadSpec,
};

use crate::host_error::HostError;
use crate::machine::ThreadInfo;
use crate::stall::Stall;
use crate::verdict;

/// A wish of the file that this host did not grant, and what there is instead.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fallback {
    /// Whose wish: `thread.io0`, `vcpu3`, `disk.data`.
    pub whose: String,
    /// What was wanted, what there is, why.
    pub what: String,
}

/// Loops and images, in the order of the plan.
#[derive(Debug, Default)]
pub struct Resources {
    /// Wishes that this host did not grant.
    pub fallbacks: Vec<Fallback>,
    pub(crate) loops: Vec<(LoopHandle, Thread)>,
    pub(crate) images: Vec<Arc<RawImage>>,
    stalls: Vec<Stall>,
}

impl Resources {
    /// Starts the loops' threads and opens the images.
    pub fn take(plan: &Plan) -> Result<Self, HostError> {
        let mut resources = Self::default();
        resources.spawn_loops(plan)?;
        resources.open_images(plan)?;
        let stalls = plan.test.stalls.iter();
        let home = |stall: &plan::Stall| &resources.loops[stall.thread.0].0;
        resources.stalls = stalls.map(|it| Stall::new(home(it), it.time, it.every)).collect();
        Ok(resources)
    }

    /// By disk: a handle on its image, to look at it after the run.
    pub fn handles(&self, plan: &Plan) -> Result<Vec<(String, File)>, HostError> {
        let disks = plan.disks.iter().zip(&self.images);
        disks
            .map(|(disk, image)| {
                let file = image.try_clone_file();
                let file = file.map_err(|e| HostError::new(format!("disk.{}", disk.name), e))?;
                Ok((disk.name.clone(), file))
            })
            .collect()
    }

    /// The loops' threads.
    pub fn threads(&self) -> impl Iterator<Item = ThreadInfo> {
        self.loops.iter().map(|(handle, thread)| ThreadInfo {
            granted: thread.granted.clone(),
            counters: Arc::clone(handle.counters()),
        })
    }

    /// The threads that these placements name.
    pub(crate) fn places(&self, placements: &[plan::Placement]) -> Vec<Placement<LoopHandle>> {
        let handle = |id: plan::ThreadId| self.loops[id.0].0.clone();
        let place = |placement: &plan::Placement| match *placement {
            plan::Placement::Loop(id) => Placement::Loop(handle(id)),
            plan::Placement::Vcpu { home } => Placement::Vcpu { home: handle(home) },
        };
        placements.iter().map(place).collect()
    }

    /// The loops.
    pub fn loop_handles(&self) -> impl Iterator<Item = LoopHandle> {
        self.loops.iter().map(|(handle, _)| handle.clone())
    }

    /// Waits until the loops have let go of a machine that was dropped just before.
    pub(crate) fn let_go(&self, blocking: &Blocking) {
        let barriers: Vec<_> = self.loops.iter().map(|(handle, _)| handle.barrier()).collect();
        // A loop that has ended holds nothing either.
        for barrier in barriers {
            let _ = barrier.wait(blocking);
        }
    }

    /// Ends the loops' threads. No machine may use them any more.
    pub fn release(self) -> Result<(), String> {
        drop(self.stalls);
        self.loops.into_iter().try_for_each(|(handle, thread)| {
            handle.stop();
            join(thread)
        })
    }

    fn spawn_loops(&mut self, plan: &Plan) -> Result<(), HostError> {
        for thread in &plan.threads {
            let cpus = thread.cpus.as_ref().map(cpu_ids);
            let (sched, runaway) = sched(thread.sched);
            let worker_cpus = Some(worker_cpus(cpus.as_deref(), &plan.vcpus));
            let name = thread.name.clone();
            let spec = ThreadSpec { name, cpus, sched, runaway, worker_cpus };
            let poll = PollPolicy {
                max: thread.poll.max,
                grow: thread.poll.grow,
                shrink: thread.poll.shrink,
                share: thread.poll.share,
            };
            let policy = LoopPolicy { poll, shuffle: plan.test.shuffle };
            let whose = format!("thread.{}", thread.name);
            let (handle, thread) =
                iothread::spawn_loop(spec, policy).map_err(|e| HostError::new(&whose, e))?;
            self.fallbacks.extend(refusals(&whose, &thread.granted));
            self.loops.push((handle, thread));
        }
        Ok(())
    }

    fn open_images(&mut self, plan: &Plan) -> Result<(), HostError> {
        let mut inodes = BTreeMap::new();
        for disk in &plan.disks {
            let whose = format!("disk.{}", disk.name);
            let mut engine = match disk.engine {
                plan::Engine::IoUring => Engine::IoUring,
                plan::Engine::Sync => Engine::Sync,
            };
            if engine == Engine::IoUring
                && let Err(error) = Ring::probe()
            {
                let what = format!("wanted engine io_uring, got sync: {error}");
                self.fallbacks.push(Fallback { whose: whose.clone(), what });
                engine = Engine::Sync;
            }
            let options = Options { engine, read_only: disk.read_only, direct: disk.direct };
            let image = open_image(disk, options)
                .map_err(|(path, error)| HostError::new(format!("{whose}: {path}"), error))?;
            let handle = image.try_clone_file().map_err(|e| HostError::new(&whose, e))?;
            self.note_other_size(&whose, disk, &handle)?;
            open_once(&mut inodes, &whose, &handle, disk.read_only)?;
            if plan.boot.kernel.is_none() && !disk.read_only {
                spare_what_is_somebodys(&whose, &handle)?;
            }
            self.images.push(Arc::new(image));
        }
        Ok(())
    }

    /// `size` is for an image that is to be made; one that exists keeps its own.
    fn note_other_size(&mut self, whose: &str, disk: &Disk, image: &File) -> Result<(), HostError> {
        let DiskSource::FileOrCreate(path, wanted) = &disk.source else { return Ok(()) };
        let metadata = image.metadata().map_err(|error| HostError::new(whose, error))?;
        if metadata.is_file() && metadata.len() != *wanted {
            let (path, has) = (path.display(), metadata.len());
            let what = format!("wanted {wanted} bytes, but {path} exists and has {has}");
            self.fallbacks.push(Fallback { whose: whose.to_owned(), what });
        }
        Ok(())
    }
}

/// What the host refused a thread.
pub(crate) fn refusals(whose: &str, granted: &Granted) -> impl Iterator<Item = Fallback> {
    let refused = granted.refused.iter();
    refused.map(move |it| Fallback { whose: whose.to_owned(), what: it.to_string() })
}

pub(crate) fn join(thread: Thread) -> Result<(), String> {
    let name = thread.granted.name.clone();
    thread.join().map_err(|_| format!("thread {name} panicked"))
}

pub(crate) fn cpu_ids(cpus: &CpuSet) -> Vec<usize> {
    cpus.iter().map(|cpu| cpu as usize).collect()
}

/// The policy, and the CPU time after which a thread that never blocks loses it.
pub(crate) fn sched(sched: plan::Sched) -> (Sched, Option<Duration>) {
    match sched {
        plan::Sched::Other { nice } => (Sched::Other(nice), None),
        plan::Sched::Batch { nice } => (Sched::Batch(nice), None),
        plan::Sched::Idle => (Sched::Idle, None),
        plan::Sched::Fifo { priority, runaway } => (Sched::Fifo(priority), runaway),
        plan::Sched::Rr { priority, runaway } => (Sched::Rr(priority), runaway),
    }
}

/// Where threads that the kernel makes for a loop may run: on the CPUs of the loop, or on all if it
/// is none that asks for some; but not where a vCPU is pinned, unless there are no others.
pub(crate) fn worker_cpus(of_loop: Option<&[usize]>, vcpus: &[plan::Vcpu]) -> Vec<usize> {
    let pins = vcpus.iter().filter_map(|vcpu| vcpu.cpus.as_ref());
    let pinned: CpuSet = pins.flat_map(CpuSet::iter).collect();
    let all = of_loop.unwrap_or_else(|| iothread::available_cpus());
    let is_free = |cpu: &usize| !u32::try_from(*cpu).is_ok_and(|cpu| pinned.contains(cpu));
    let free: Vec<_> = all.iter().copied().filter(is_free).collect();
    if free.is_empty() { all.to_vec() } else { free }
}

/// Refuses an image that another disk has under whatever path, unless both only read.
fn open_once(
    inodes: &mut BTreeMap<(u64, u64), (String, bool)>,
    whose: &str,
    image: &File,
    read_only: bool,
) -> Result<(), HostError> {
    let metadata = image.metadata().map_err(|error| HostError::new(whose, error))?;
    // A block device is the device behind its node.
    let inode = match metadata.file_type().is_block_device() {
        true => (u64::MAX, metadata.rdev()),
        false => (metadata.dev(), metadata.ino()),
    };
    let (first, only_reads) = inodes.entry(inode).or_insert_with(|| (whose.to_owned(), true));
    if first != whose && !(*only_reads && read_only) {
        let why = format!(
            "its image is the same file as that of {first}: only disks that are all read-only may \
             share one"
        );
        return Err(HostError::new(whose, why));
    }
    *only_reads &= read_only;
    Ok(())
}

/// Refuses to give the built-in guest an image with something on it.
fn spare_what_is_somebodys(whose: &str, image: &File) -> Result<(), HostError> {
    match verdict::may_overwrite(image) {
        Ok(true) => Ok(()),
        Ok(false) => Err(HostError::new(
            whose,
            "the built-in guest would overwrite this image, and there is something on it: name a \
             kernel in [boot], set read-only, or leave `path` out for a scratch disk",
        )),
        Err(error) => Err(HostError::new(whose, error)),
    }
}

fn open_image(disk: &Disk, options: Options) -> Result<RawImage, (String, io::Error)> {
    let at = |path: &Path| path.display().to_string();
    match &disk.source {
        DiskSource::File(path) => RawImage::open(path, options).map_err(|error| (at(path), error)),
        DiskSource::FileOrCreate(path, size) => {
            create_sparse(path, *size).map_err(|error| (at(path), error))?;
            RawImage::open(path, options).map_err(|error| (at(path), error))
        }
        DiskSource::Scratch(size) => {
            let directory = std::env::temp_dir();
            let open = || {
                let file = File::options()
                    .read(true)
                    .write(true)
                    .custom_flags(libc::O_TMPFILE)
                    .open(&directory)?;
                file.set_len(*size)?;
                RawImage::from_file(file, Options { direct: false, ..options })
            };
            open().map_err(|error| (format!("a scratch file in {}", at(&directory)), error))
        }
    }
}

/// Makes a sparse file of this size, unless there is one already.
fn create_sparse(path: &Path, size: u64) -> io::Result<()> {
    match File::options().write(true).create_new(true).open(path) {
        Ok(file) => file.set_len(size),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn workers_stay_away_from_pinned_vcpus_if_they_can() {
        let pinned = |cpu| plan::Vcpu {
            cpus: Some(CpuSet::from_iter([cpu])),
            sched: plan::Sched::default(),
        };
        let free = plan::Vcpu { cpus: None, sched: plan::Sched::default() };
        let vcpus = [pinned(2), free, pinned(5)];
        assert_eq!(worker_cpus(Some(&[1, 2, 3]), &vcpus), [1, 3]);
        assert_eq!(worker_cpus(Some(&[2]), &vcpus), [2], "it has no others");
        assert_eq!(worker_cpus(Some(&[8191]), &vcpus), [8191]);
        assert_eq!(worker_cpus(None, &vcpus[1..2]), iothread::available_cpus());
    }

    #[test]
    fn explain_knows_how_many_workers_a_ring_may_have() {
        assert_eq!(config::WORKERS_OF_A_RING, u64::from(Ring::MOST_WORKERS));
    }
}
