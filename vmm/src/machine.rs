//! From a plan to a running machine, and back to nothing.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::*};
use std::sync::mpsc::{Sender, channel};
use std::time::{Duration, Instant};

use config::CpuSet;
use config::plan::{self, Disk, DiskSource, Plan, SerialOut};
use devices::block::Backend;
use devices::block::raw::{Engine, Options, RawImage};
use devices::bus::Bus;
use devices::device::{Device, Lifecycle, Paused};
use devices::legacy::{DebugExit, I8042, PowerPorts, Serial};
use devices::pci::{BarSpace, ConfigPorts, Ecam, Function, PciRoot};
use devices::power::Power;
use devices::virtio::blk::Blk;
use devices::virtio::pci::{Slots, VirtioPci};
use devices::virtio::rng::Rng;
use devices::virtio::seat::Placement;
use devices::virtio::{Mem, VirtioDevice};
use iothread::{
    Blocking, Counters, Granted, LoopHandle, PollPolicy, Ring, Sched, Thread, ThreadSpec,
};
use kvm_bindings::{
    KVM_CAP_X2APIC_API, KVM_MAX_CPUID_ENTRIES, KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK,
    KVM_X2APIC_API_USE_32BIT_IDS, kvm_enable_cap, kvm_pit_config,
};
use kvm_ioctls::{Kvm, VmFd};

use crate::boot::{self, Boot, BootError, Kernel};
use crate::console::{Line, Sink};
use crate::cpuid::{self, Topology};
use crate::ending::Ending;
use crate::irq::{KvmIrq, KvmLine};
use crate::limits;
use crate::memory::{self, BARS, ECAM, KVM_PAGES};
use crate::terminal::output;
use crate::timing::Timing;
use crate::vcpu::{self, Vcpu};
use crate::verdict;

/// The guest that runs when the file names no kernel.
pub const BUILT_IN_GUEST: &[u8] = include_bytes!(env!("HEDDLE_GUEST"));

/// How long the devices may take to finish what is in flight, at the end.
const REST_LIMIT: Duration = Duration::from_secs(5);

/// What this host, or this file on this host, cannot do.
#[derive(Debug, thiserror::Error)]
#[error("{what}: {why}")]
pub struct HostError {
    what: String,
    why: String,
}

impl HostError {
    /// `what` cannot be done, and why.
    pub fn new(what: impl Into<String>, why: impl ToString) -> Self {
        Self { what: what.into(), why: why.to_string() }
    }
}

impl From<BootError> for HostError {
    fn from(error: BootError) -> Self {
        HostError::new("boot", error)
    }
}

/// A wish of the file that this host did not grant, and what there is instead.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fallback {
    /// Whose wish: `thread.io0`, `vcpu3`, `disk.data`.
    pub whose: String,
    /// What was wanted, what there is, why.
    pub what: String,
}

/// What a thread of the machine was asked to be, is, and has done.
#[derive(Debug, Clone)]
pub struct ThreadInfo {
    /// Read back from the kernel.
    pub granted: Granted,
    /// What it has done so far.
    pub counters: Arc<Counters>,
}

/// A built machine. Its guest runs from [`Machine::start`] to [`Machine::stop`].
pub struct Machine {
    /// Wishes that this host did not grant.
    pub fallbacks: Vec<Fallback>,
    /// Where its end is announced.
    pub ending: Ending,
    /// By disk: a handle on its image, to look at it after the run.
    pub images: Vec<(String, File)>,
    shared: Arc<vcpu::Shared>,
    loops: Vec<(LoopHandle, Thread)>,
    vcpus: Vec<Vcpu>,
    /// Dropped to let each vCPU run.
    start: Vec<Sender<()>>,
    devices: Vec<Arc<dyn Lifecycle>>,
    /// After everything that may use it.
    _memory: Mem,
}

/// What is put together while a machine is built.
struct Parts {
    vm: Arc<VmFd>,
    ports: Arc<Bus>,
    mmio: Arc<Bus>,
    root: Arc<PciRoot>,
    slots: Slots,
    space: BarSpace,
    loops: Vec<(LoopHandle, Thread)>,
    devices: Vec<Arc<dyn Lifecycle>>,
    fallbacks: Vec<Fallback>,
    images: Vec<(String, File)>,
    ending: Ending,
}

impl Machine {
    /// Builds the machine and its threads; nothing of the guest runs yet. The second result are
    /// its serial ports.
    ///
    /// `to_stderr`: a serial port on stdio writes to standard error.
    pub fn build(
        plan: &Plan,
        to_stderr: bool,
        timing: &mut Timing,
    ) -> Result<(Self, Vec<Line>), HostError> {
        let kvm = open_kvm()?;
        let topology = topology(plan);
        let apic_ids = topology.apic_ids(plan.vcpus.len());
        limits::check(&kvm, &apic_ids)?;
        let ending = Ending::new().map_err(|e| HostError::new("eventfd", e))?;
        let vm = create_vm(&kvm)?;
        timing.lap("KVM");
        let memory = memory::allocate(plan.machine.memory, plan.machine.hugepages)
            .map_err(|e| HostError::new("machine.memory", e))?;
        memory::attach(&vm, &memory).map_err(|e| HostError::new("machine.memory", e))?;
        timing.lap("guest memory");
        let mut parts = Parts::new(vm, Arc::clone(&memory), ending);
        parts.spawn_loops(plan)?;
        timing.lap("loops");
        let lines = parts.add_legacy(plan, to_stderr)?;
        parts.add_disks(plan)?;
        parts.add_rngs(plan)?;
        timing.lap("devices");
        let entry = load(plan, &memory, &apic_ids)?;
        timing.lap("kernel");
        let shared = Arc::new(vcpu::Shared {
            ports: Arc::clone(&parts.ports),
            mmio: Arc::clone(&parts.mmio),
            ending: parts.ending.clone(),
            stop: AtomicBool::new(false),
        });
        let (start, vcpus) = parts.spawn_vcpus(plan, &kvm, topology, &apic_ids, entry, &shared)?;
        timing.lap("vCPUs");
        let Parts { loops, devices, fallbacks, images, ending, .. } = parts;
        let machine = Self {
            fallbacks,
            ending,
            images,
            shared,
            loops,
            vcpus,
            start,
            devices,
            _memory: memory,
        };
        Ok((machine, lines))
    }

    /// Lets the guest run.
    pub fn start(&mut self) {
        self.start.clear();
    }

    /// Every thread that heddle made, the loops first.
    pub fn threads(&self) -> Vec<ThreadInfo> {
        let loops = self.loops.iter().map(|(handle, thread)| ThreadInfo {
            granted: thread.granted.clone(),
            counters: Arc::clone(handle.counters()),
        });
        let vcpus = self.vcpus.iter().map(|vcpu| ThreadInfo {
            granted: vcpu.thread.granted.clone(),
            counters: Arc::clone(&vcpu.counters),
        });
        loops.chain(vcpus).collect()
    }

    /// Ends the guest, lets the devices finish what is in flight, and ends the threads. What does
    /// not come to rest within five seconds is named and left behind.
    pub fn stop(self, blocking: &Blocking) -> Result<(), String> {
        let Self { shared, vcpus, start, devices, loops, .. } = self;
        shared.stop.store(true, Release);
        drop(start);
        let stopped = stop_vcpus(vcpus);
        let paused = Paused::pause(&devices, blocking, REST_LIMIT).map_err(|e| e.to_string());
        if let Err(why) = stopped.and(paused.map(drop)) {
            // The process ends with requests in flight: nothing they use may be freed.
            std::mem::forget((shared, devices, loops));
            return Err(why);
        }
        loops.into_iter().try_for_each(|(handle, thread)| {
            handle.stop();
            join(thread)
        })
    }
}

/// Makes all vCPUs leave the guest, and waits for their threads.
fn stop_vcpus(vcpus: Vec<Vcpu>) -> Result<(), String> {
    vcpus.iter().for_each(Vcpu::kick);
    let deadline = Instant::now() + REST_LIMIT;
    for vcpu in vcpus {
        if !vcpu.ends_by(deadline) {
            let name = &vcpu.thread.granted.name;
            return Err(format!("thread {name} is still serving an exit after {REST_LIMIT:?}"));
        }
        join(vcpu.thread)?;
    }
    Ok(())
}

fn join(thread: Thread) -> Result<(), String> {
    let name = thread.granted.name.clone();
    thread.join().map_err(|_| format!("thread {name} panicked"))
}

/// Opens /dev/kvm.
pub fn open_kvm() -> Result<Kvm, HostError> {
    let kvm = Kvm::new().map_err(|error| {
        let advice = match error.errno() {
            libc::ENOENT => "this host has no KVM, or its module is not loaded",
            libc::EACCES => "not permitted: become a member of the group that owns it (kvm)",
            _ => "it cannot be used",
        };
        HostError::new("/dev/kvm", format!("{advice} ({error})"))
    })?;
    match kvm.get_api_version() {
        12 => Ok(kvm),
        other => Err(HostError::new("/dev/kvm", format!("API version {other}, not 12"))),
    }
}

/// What the guest is told about its CPUs.
pub fn topology(plan: &Plan) -> Topology {
    let plan::Topology { dies, cores, threads, .. } = plan.machine.topology;
    Topology { dies, cores, threads }
}

fn create_vm(kvm: &Kvm) -> Result<Arc<VmFd>, HostError> {
    let step = |what: &'static str| move |error| HostError::new(format!("KVM: {what}"), error);
    let vm = kvm.create_vm().map_err(step("KVM_CREATE_VM"))?;
    vm.set_identity_map_address(KVM_PAGES).map_err(step("KVM_SET_IDENTITY_MAP_ADDR"))?;
    vm.set_tss_address(KVM_PAGES as usize + 0x1000).map_err(step("KVM_SET_TSS_ADDR"))?;
    // Destinations of interrupts have 32 bits, and 255 of them is a CPU like any other.
    let wide_ids = kvm_enable_cap {
        cap: KVM_CAP_X2APIC_API,
        args: [
            (KVM_X2APIC_API_USE_32BIT_IDS | KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK).into(),
            0,
            0,
            0,
        ],
        ..kvm_enable_cap::default()
    };
    vm.enable_cap(&wide_ids).map_err(step("KVM_CAP_X2APIC_API"))?;
    vm.create_irq_chip().map_err(step("KVM_CREATE_IRQCHIP"))?;
    let pit = kvm_pit_config { flags: kvm_bindings::KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
    vm.create_pit2(pit).map_err(step("KVM_CREATE_PIT2"))?;
    Ok(Arc::new(vm))
}

fn load(plan: &Plan, memory: &Mem, apic_ids: &[u32]) -> Result<boot::Entry, HostError> {
    let plan::Boot { kernel, initrd, cmdline } = &plan.boot;
    let mut cmdline = cmdline.clone();
    let kernel = match kernel {
        Some(path) => Kernel::File(path),
        None => {
            if plan.machine.debug_exit {
                cmdline += " debug-exit";
            }
            Kernel::Bytes(BUILT_IN_GUEST)
        }
    };
    let boot = Boot { kernel, initrd: initrd.as_deref(), cmdline: &cmdline };
    Ok(boot::load(memory, boot, apic_ids)?)
}

fn cpu_ids(cpus: &CpuSet) -> Vec<usize> {
    cpus.iter().map(|cpu| cpu as usize).collect()
}

fn sched(sched: plan::Sched) -> Sched {
    match sched {
        plan::Sched::Other { nice } => Sched::Other(nice),
        plan::Sched::Batch { nice } => Sched::Batch(nice),
        plan::Sched::Idle => Sched::Idle,
        plan::Sched::Fifo { priority } => Sched::Fifo(priority),
        plan::Sched::Rr { priority } => Sched::Rr(priority),
    }
}

impl Parts {
    fn new(vm: Arc<VmFd>, mem: Mem, ending: Ending) -> Self {
        let mmio = Arc::new(Bus::default());
        let irq = Arc::new(KvmIrq(Arc::clone(&vm)));
        let slots =
            Slots { bus: Arc::clone(&mmio), msi: Arc::clone(&irq) as _, doorbells: irq, mem };
        Self {
            vm,
            ports: Arc::new(Bus::default()),
            mmio,
            root: Arc::new(PciRoot::default()),
            slots,
            space: BarSpace::new(BARS.start, BARS.end),
            loops: Vec::new(),
            devices: Vec::new(),
            fallbacks: Vec::new(),
            images: Vec::new(),
            ending,
        }
    }

    fn note_refused(&mut self, whose: String, granted: &Granted) {
        let refused = granted.refused.iter();
        let fallbacks = refused.map(|it| Fallback { whose: whose.clone(), what: it.to_string() });
        self.fallbacks.extend(fallbacks);
    }

    fn spawn_loops(&mut self, plan: &Plan) -> Result<(), HostError> {
        for thread in &plan.threads {
            let spec = ThreadSpec {
                name: thread.name.clone(),
                cpus: thread.cpus.as_ref().map(cpu_ids),
                sched: sched(thread.sched),
            };
            let poll = PollPolicy {
                max: thread.poll.max,
                grow: thread.poll.grow,
                shrink: thread.poll.shrink,
            };
            let whose = format!("thread.{}", thread.name);
            let (handle, thread) =
                iothread::spawn_loop(spec, poll).map_err(|e| HostError::new(&whose, e))?;
            self.note_refused(whose, &thread.granted);
            self.loops.push((handle, thread));
        }
        Ok(())
    }

    fn place(&self, placement: plan::Placement) -> Placement<LoopHandle> {
        let handle = |id: plan::ThreadId| self.loops[id.0].0.clone();
        match placement {
            plan::Placement::Loop(id) => Placement::Loop(handle(id)),
            plan::Placement::Vcpu { home } => Placement::Vcpu { home: handle(home) },
        }
    }

    fn put(bus: &Bus, base: u64, size: u64, device: Arc<dyn Device>) -> Result<(), HostError> {
        bus.insert(base, size, device).map_err(|error| HostError::new("address map", error))
    }

    /// Serial ports, PCI's own ports, power and debug-exit.
    fn add_legacy(&mut self, plan: &Plan, to_stderr: bool) -> Result<Vec<Line>, HostError> {
        let power = Arc::new(self.ending.clone()) as Arc<dyn Power>;
        let mut lines = Vec::new();
        for serial in &plan.serials {
            lines.push(self.add_serial(serial, to_stderr)?);
        }
        let config = ConfigPorts::new(Arc::clone(&self.root), Arc::clone(&power));
        Self::put(&self.ports, ConfigPorts::PORT, ConfigPorts::SIZE, Arc::new(config))?;
        let ecam = Ecam::new(Arc::clone(&self.root));
        Self::put(&self.mmio, ECAM, Ecam::BUS_SIZE, Arc::new(ecam))?;
        let switch = PowerPorts::new(Arc::clone(&power));
        Self::put(&self.ports, PowerPorts::PORT, PowerPorts::SIZE, Arc::new(switch))?;
        let keyboard = I8042::new(Arc::clone(&power));
        Self::put(&self.ports, I8042::PORT, I8042::SIZE, Arc::new(keyboard))?;
        if plan.machine.debug_exit {
            let device = Arc::new(DebugExit::new(power));
            Self::put(&self.ports, DebugExit::PORT, DebugExit::SIZE, device)?;
        }
        Ok(lines)
    }

    fn add_serial(&mut self, serial: &plan::Serial, to_stderr: bool) -> Result<Line, HostError> {
        let whose = format!("serial.{}", serial.name);
        let nth = match serial.name.as_str() {
            "com2" => 1,
            "com3" => 2,
            "com4" => 3,
            _ => 0,
        };
        let line = Arc::new(KvmLine { vm: Arc::clone(&self.vm), gsi: Serial::IRQS[nth] });
        let ending = self.ending.clone();
        let device = Arc::new(Serial::new(&whose, line, move || ending.wake()));
        Self::put(&self.ports, Serial::PORTS[nth], Serial::SIZE, Arc::clone(&device) as _)?;
        self.devices.push(Arc::clone(&device) as _);
        let sink = match &serial.out {
            SerialOut::Null => Sink::Null,
            SerialOut::Stdio => {
                Sink::Stdio(output(to_stderr).map_err(|e| HostError::new(&whose, e))?)
            }
            SerialOut::File(path) => {
                let file = File::options()
                    .write(true)
                    .create(true)
                    .truncate(true)
                    .custom_flags(libc::O_NONBLOCK)
                    .open(path)
                    .map_err(|e| HostError::new(format!("{whose}: {}", path.display()), e))?;
                Sink::File(file)
            }
        };
        Ok(Line::new(device, sink))
    }

    fn add_disks(&mut self, plan: &Plan) -> Result<(), HostError> {
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
            self.images.push((disk.name.clone(), handle));
            let queues = disk.queues.len() as u16;
            let blk =
                Blk::new(Arc::new(image) as Arc<dyn Backend>, &disk.name, queues, disk.queue_size);
            self.plug(&whose, Arc::new(blk), &disk.queues)?;
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

    fn add_rngs(&mut self, plan: &Plan) -> Result<(), HostError> {
        for rng in &plan.rngs {
            self.plug(&format!("rng.{}", rng.name), Arc::new(Rng), &[rng.place])?;
        }
        Ok(())
    }

    fn plug(
        &mut self,
        name: &str,
        device: Arc<dyn VirtioDevice>,
        placements: &[plan::Placement],
    ) -> Result<(), HostError> {
        let placements: Vec<_> = placements.iter().map(|place| self.place(*place)).collect();
        let device = VirtioPci::new(name, device, &placements, &self.slots, &mut self.space)
            .map_err(|error| HostError::new(name, error))?;
        let device = Arc::new(device);
        let function = Arc::clone(&device) as Arc<dyn Function>;
        self.root.add(&function).map_err(|error| HostError::new(name, error))?;
        self.devices.push(device);
        Ok(())
    }

    fn spawn_vcpus(
        &mut self,
        plan: &Plan,
        kvm: &Kvm,
        topology: Topology,
        apic_ids: &[u32],
        entry: boot::Entry,
        shared: &Arc<vcpu::Shared>,
    ) -> Result<(Vec<Sender<()>>, Vec<Vcpu>), HostError> {
        let step = |what: &'static str| move |error| HostError::new(format!("KVM: {what}"), error);
        vcpu::install_kick().map_err(|error| HostError::new("signal handler", error))?;
        let supported = kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(step("KVM_GET_SUPPORTED_CPUID"))?;
        let supported = Arc::new(supported);
        let mut starts: Vec<Sender<()>> = Vec::new();
        let mut start = |nth: usize| {
            let (vcpu, apic_id) = (&plan.vcpus[nth], apic_ids[nth]);
            let (start, wait) = channel();
            starts.push(start);
            let spec = ThreadSpec {
                name: format!("vcpu{nth}"),
                cpus: vcpu.cpus.as_ref().map(cpu_ids),
                sched: sched(vcpu.sched),
            };
            let (vm, supported) = (Arc::clone(&self.vm), Arc::clone(&supported));
            let make = move || {
                let fd = vm.create_vcpu(apic_id.into()).map_err(ioctl("KVM_CREATE_VCPU"))?;
                let cpuid = cpuid::for_vcpu(&supported, topology, apic_id);
                fd.set_cpuid2(&cpuid).map_err(ioctl("KVM_SET_CPUID2"))?;
                if nth == 0 {
                    boot::enter(&fd, entry).map_err(ioctl("KVM_SET_SREGS"))?;
                }
                Ok(fd)
            };
            Vcpu::start(spec, make, Arc::clone(shared), wait).map_err(|error| {
                let limits = "see ulimit -u, and pids.max of its cgroup";
                io::Error::other(format!("its thread cannot be started: {error}; {limits}"))
            })
        };
        // Until a CPU is in x2APIC mode, KVM knows it by the low 8 bits of its id, and of several
        // with the same bits by the first that was made: those with small ids are made first.
        let small = apic_ids.partition_point(|&id| id <= 0xff);
        let mut made: Vec<io::Result<Vcpu>> = Vec::new();
        for batch in [0..small, small..apic_ids.len()] {
            let starting: Vec<_> = batch.map(&mut start).collect();
            made.extend(starting.into_iter().map(|it| it.and_then(vcpu::Starting::wait)));
        }
        let mut vcpus = Vec::new();
        let mut failed = None;
        for (nth, made) in made.into_iter().enumerate() {
            match made {
                Ok(vcpu) => {
                    self.note_refused(format!("vcpu{nth}"), &vcpu.thread.granted);
                    vcpus.push(vcpu);
                }
                Err(error) => failed = failed.or(Some(HostError::new(format!("vcpu{nth}"), error))),
            }
        }
        match failed {
            None => Ok((starts, vcpus)),
            Some(error) => {
                // What starts now must not run.
                shared.stop.store(true, Release);
                drop(starts);
                let _ = stop_vcpus(vcpus);
                Err(error)
            }
        }
    }
}

/// Says which request to KVM failed.
fn ioctl(what: &'static str) -> impl Fn(kvm_ioctls::Error) -> io::Error {
    move |error| io::Error::other(format!("{what}: {error}"))
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
