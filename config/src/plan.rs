//! The validated plan: what a VM file says, with every name resolved.
//!
//! After loading, a name that does not exist cannot occur: threads are indices ([`ThreadId`]),
//! queues have exactly one [`Placement`] each, sizes are bytes and times are [`Duration`]s.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Serialize;

use crate::cpuset::CpuSet;

/// One virtual machine, ready to be built.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Plan {
    /// `name`, default: the stem of the file's name.
    pub name: String,
    /// `[machine]`.
    pub machine: Machine,
    /// `[[numa]]`: the guest's nodes, index = node number; empty: it is told of none. Their
    /// memory is that of the machine, and every vCPU is in exactly one.
    pub numa: Vec<GuestNode>,
    /// `[boot]`.
    pub boot: Boot,
    /// One entry per vCPU, index = vCPU number.
    pub vcpus: Vec<Vcpu>,
    /// Event loops; index 0 is always `main`.
    pub threads: Vec<Thread>,
    /// `[disk.NAME]`, in the order of the file.
    pub disks: Vec<Disk>,
    /// `[rng.NAME]`, in the order of the file.
    pub rngs: Vec<Rng>,
    /// `[serial.NAME]`; one serial port on stdio when the file names none.
    pub serials: Vec<Serial>,
    /// `[policy]`.
    pub policy: Policy,
    /// `[test]`.
    pub test: Test,
}

/// `[machine]`.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Machine {
    /// Guest memory in bytes, a multiple of 2 MiB, or of 1 GiB with `hugepages = "1G"`.
    pub memory: u64,
    /// Size of the huge pages that back guest memory; `None`: ordinary pages.
    pub hugepages: Option<u64>,
    /// Has it a real-time clock?
    pub rtc: bool,
    /// In a memfd, which can be given to others; huge pages always are.
    pub shared: bool,
    /// Touch all of it before the guest starts?
    pub prealloc: Option<Prealloc>,
    /// What the guest is told about its CPUs. `sockets * dies * cores * threads == vcpus.len()`.
    pub topology: Topology,
    /// How the guest reaches its virtio devices.
    pub transport: Transport,
    /// PCIe root ports to plug devices into while the guest runs, 0 to 31; 0 without PCI.
    pub hotplug_slots: u8,
    /// Is there a debug-exit port at 0xf4?
    pub debug_exit: bool,
}

/// `transport = "pci" | "mmio"`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Transport {
    /// As PCI functions, with a message for each queue.
    Pci,
    /// As registers at fixed addresses, with an interrupt line for each device.
    Mmio,
}

/// `prealloc = true | { threads, near }`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Prealloc {
    /// How many threads; `None`: as the host's CPUs make it, see [`crate::prealloc`].
    pub threads: Option<u32>,
    /// Each on the CPUs of the host node whose memory it touches.
    pub near: bool,
}

/// `[[numa]]`: a node of the guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct GuestNode {
    /// Its vCPUs; may be empty.
    pub vcpus: CpuSet,
    /// Bytes, a multiple of the pages that back them (at least 2 MiB). The nodes' memory follows
    /// one after the other, from guest-physical address 0.
    pub memory: u64,
    /// The host node that its memory is taken from; `None`: any.
    pub host_node: Option<u32>,
    /// Distances to all nodes, itself included, as in ACPI's SLIT: 10 is local. `None`: 20.
    pub distances: Option<Vec<u8>>,
}

/// The guest's CPU topology, counts per level.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Topology {
    /// Sockets in the machine.
    pub sockets: u32,
    /// Dies in a socket.
    pub dies: u32,
    /// Cores in a die.
    pub cores: u32,
    /// Hardware threads in a core.
    pub threads: u32,
}

/// `[boot]`.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Boot {
    /// `None`: the built-in guest.
    pub kernel: Option<Kernel>,
    /// What the kernel finds in memory; `initrd` is the first. None for the built-in guest.
    pub modules: Vec<Module>,
    /// The kernel's command line, at most 4095 bytes without a NUL.
    pub cmdline: String,
}

/// `kernel` or `multiboot`: the file, and by which protocol it starts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kernel {
    /// A Linux bzImage or an ELF with a PVH note; its content says which.
    Native(PathBuf),
    /// A Multiboot 1 kernel.
    Multiboot(PathBuf),
}

impl Kernel {
    /// The file.
    pub fn path(&self) -> &Path {
        match self {
            Self::Native(path) | Self::Multiboot(path) => path,
        }
    }
}

/// `initrd`, or one of `modules`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Module {
    /// The file.
    pub path: PathBuf,
    /// Its command line, at most 4095 bytes without a NUL.
    pub cmdline: String,
}

impl Boot {
    /// Every file that booting reads.
    pub fn files(&self) -> impl Iterator<Item = &Path> {
        let modules = self.modules.iter().map(|module| module.path.as_path());
        self.kernel.iter().map(Kernel::path).chain(modules)
    }
}

/// One vCPU thread.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Vcpu {
    /// Host CPUs its thread may use; `None`: those heddle itself was started with.
    pub cpus: Option<CpuSet>,
    /// Host scheduling of its thread.
    pub sched: Sched,
}

/// Index into [`Plan::threads`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub struct ThreadId(pub usize);

/// The main loop's id.
pub const MAIN: ThreadId = ThreadId(0);

/// `[thread.NAME]`: an event loop with a thread of its own.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Thread {
    /// The name in the file; the operating system shows it as the thread's name.
    pub name: String,
    /// Host CPUs; `None`: those heddle itself was started with.
    pub cpus: Option<CpuSet>,
    /// Host scheduling.
    pub sched: Sched,
    /// Polling before sleep.
    pub poll: Poll,
}

/// `sched = { policy, nice, priority, runaway }`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case", tag = "policy")]
pub enum Sched {
    /// SCHED_OTHER.
    Other {
        /// -20 (first) to 19 (last).
        nice: i8,
    },
    /// SCHED_BATCH.
    Batch {
        /// -20 (first) to 19 (last).
        nice: i8,
    },
    /// SCHED_IDLE.
    Idle,
    /// SCHED_FIFO.
    Fifo {
        /// 1 to 99, higher runs first.
        priority: u8,
        /// It becomes `other` after so much CPU time without a pause; `None`: never.
        #[serde(serialize_with = "crate::units::as_time_or_off")]
        runaway: Option<Duration>,
    },
    /// SCHED_RR.
    Rr {
        /// 1 to 99, higher runs first.
        priority: u8,
        /// It becomes `other` after so much CPU time without a pause; `None`: never.
        #[serde(serialize_with = "crate::units::as_time_or_off")]
        runaway: Option<Duration>,
    },
}

impl Default for Sched {
    fn default() -> Self {
        Self::Other { nice: 0 }
    }
}

/// `poll = "off" | "32us" | { max, grow, shrink, share }`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Poll {
    /// Longest time to poll before sleeping; zero: never poll.
    #[serde(serialize_with = "crate::units::as_time")]
    pub max: Duration,
    /// Factor by which the polling time grows (at least 2).
    pub grow: u32,
    /// Divisor by which it shrinks; 0 or 1: to zero at once.
    pub shrink: u32,
    /// The share of a CPU's time that polling may take, in percent.
    pub share: u32,
}

/// Where the work of one queue is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Placement {
    /// On this event loop: KVM signals an eventfd there.
    Loop(ThreadId),
    /// On the vCPU thread that submitted: the exit is handled right there.
    Vcpu {
        /// The loop of the queue's completions and timers.
        home: ThreadId,
    },
}

impl Placement {
    /// The loop that owns the queue's fds, timers and completions.
    pub fn home(self) -> ThreadId {
        match self {
            Self::Loop(id) | Self::Vcpu { home: id } => id,
        }
    }
}

/// `[disk.NAME]`: a virtio-blk device.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Disk {
    /// The name in the file; `disk.NAME` addresses it, and the guest reads NAME as its id.
    pub name: String,
    /// Where the bytes are.
    pub source: DiskSource,
    /// How the bytes are moved.
    pub engine: Engine,
    /// The guest may only read.
    pub read_only: bool,
    /// Bypass the host's page cache (O_DIRECT).
    pub direct: bool,
    /// Descriptors per queue: a power of two, 2 to 1024.
    pub queue_size: u16,
    /// One entry per queue, index = queue number.
    pub queues: Vec<Placement>,
}

/// Where a disk's bytes are.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum DiskSource {
    /// `path`: a raw file or block device, taken as it is.
    File(PathBuf),
    /// `path` and `size`: a raw file, made with this size (sparse) when it does not exist.
    FileOrCreate(PathBuf, u64),
    /// `size` alone: an unnamed temporary file, gone after the run.
    Scratch(u64),
}

/// `engine = "io_uring" | "sync"`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub enum Engine {
    /// Asynchronous, through the ring of the loop that submits.
    #[serde(rename = "io_uring")]
    IoUring,
    /// `preadv`/`pwritev` right where the request was popped.
    #[serde(rename = "sync")]
    Sync,
}

/// `[rng.NAME]`: a virtio-rng device.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Rng {
    /// The name in the file.
    pub name: String,
    /// Its only queue.
    pub place: Placement,
}

/// `[serial.NAME]`: a 16550.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Serial {
    /// The name in the file: `com1` to `com4` choose the port.
    pub name: String,
    /// Where its output goes.
    pub out: SerialOut,
}

/// `out = "stdio" | "null" | { file = "..." }`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum SerialOut {
    /// The terminal heddle runs in, both ways. At most one port.
    Stdio,
    /// Nowhere.
    Null,
    /// This file, truncated at the start.
    File(PathBuf),
}

/// `[policy]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Policy {
    /// The guest resets.
    pub on_reset: OnReset,
    /// A thread shares a CPU with a pinned vCPU.
    pub overlap: Verdict,
    /// A wish of the file (engine, affinity, scheduling) cannot be had on this host.
    pub fallback: Verdict,
}

/// `[test]`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Default)]
#[serde(rename_all = "kebab-case")]
pub struct Test {
    /// Seed for the order of what has none by promise.
    pub shuffle: Option<u64>,
    /// Callbacks that take too long.
    pub stalls: Vec<Stall>,
}

/// `[[test.stall]]`: a callback that keeps a thread busy.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Stall {
    /// The thread.
    pub thread: ThreadId,
    /// How long each time.
    #[serde(serialize_with = "crate::units::as_time")]
    pub time: Duration,
    /// From one begin to the next.
    #[serde(serialize_with = "crate::units::as_time")]
    pub every: Duration,
}

/// What a guest's reset does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum OnReset {
    /// Starts it anew, on the same threads and images.
    Restart,
    /// Ends the run.
    Exit,
}

/// What to do about a doubtful plan.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// Say nothing.
    Allow,
    /// Say it and go on.
    Warn,
    /// Refuse to start.
    Error,
}
