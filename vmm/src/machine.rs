//! From a plan to a running machine, and back to nothing.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::*};
use std::sync::mpsc::{Sender, channel};
use std::time::{Duration, Instant};

use config::plan::{self, Plan};
use devices::block::Backend;
use devices::bus::Bus;
use devices::device::{Device, Lifecycle, Paused};
use devices::irq::SharedLine;
use devices::legacy::{DebugExit, I8042, PanicPort, PowerPorts, Rtc, Serial};
use devices::pci::{BarSpace, ConfigPorts, Ecam, Function, PciRoot, RootPort};
use devices::power::Power;
use devices::virtio::blk::Blk;
use devices::virtio::mmio::{Socket, VirtioMmio};
use devices::virtio::pci::{Slots, VirtioPci};
use devices::virtio::rng::Rng;
use devices::virtio::seat::Placement;
use devices::virtio::{Mem, VirtioDevice};
use iothread::{Blocking, Counters, Granted, LoopHandle, ThreadSpec};
use kvm_bindings::{
    KVM_CAP_X2APIC_API, KVM_MAX_CPUID_ENTRIES, KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK,
    KVM_X2APIC_API_USE_32BIT_IDS, kvm_enable_cap, kvm_pit_config,
};
use kvm_ioctls::{Kvm, VmFd};

use crate::acpi::Description;
use crate::boot::{self, Boot, BootError};
use crate::cpuid::{self, Topology};
use crate::ending::Ending;
use crate::hotplug;
use crate::irq::{KvmEdge, KvmIrq, KvmLine};
use crate::limits;
use crate::memory::{self, BARS, Backing, ECAM, GuestMemory, KVM_PAGES};
use crate::mmio_slots::{self, MmioSlot};
use crate::prealloc;
use crate::resources::{Fallback, Resources, cpu_ids, join, refusals, sched, worker_cpus};
use crate::timing::Timing;
use crate::vcpu::{self, Vcpu};

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

/// What a thread of the machine was asked to be, is, and has done.
#[derive(Debug, Clone)]
pub struct ThreadInfo {
    /// Read back from the kernel.
    pub granted: Granted,
    /// What it has done so far.
    pub counters: Arc<Counters>,
}

/// A built machine on its [`Resources`]. Its guest runs from [`Machine::start`] to [`Machine::stop`].
pub struct Machine {
    /// Wishes that this host did not grant.
    pub fallbacks: Vec<Fallback>,
    /// The power button.
    pub power_button: Arc<PowerPorts>,
    /// Its serial ports, in the order of the plan.
    pub serials: Vec<Arc<Serial>>,
    /// Its hot-plug slots, empty at the start.
    pub hotplug_slots: Vec<Arc<RootPort>>,
    /// The threads that touched its memory, which have ended.
    pub prealloc: Vec<Granted>,
    shared: Arc<vcpu::Shared>,
    vcpus: Vec<Vcpu>,
    /// Dropped to let each vCPU run.
    start: Vec<Sender<()>>,
    devices: Vec<Arc<dyn Lifecycle>>,
    /// After everything that may use it.
    memory: GuestMemory,
}

/// What is put together while a machine is built.
struct Parts<'a> {
    resources: &'a Resources,
    vm: Arc<VmFd>,
    ports: Arc<Bus>,
    mmio: Arc<Bus>,
    root: Arc<PciRoot>,
    slots: Slots,
    space: BarSpace,
    /// The wires of the interrupt pins, by [`PciRoot::line_of`].
    pci_lines: Vec<Arc<SharedLine>>,
    serials: Vec<Arc<Serial>>,
    /// The virtio devices are plugged in as these, instead of as PCI functions.
    mmio_slots: Option<Vec<MmioSlot>>,
    devices: Vec<Arc<dyn Lifecycle>>,
    fallbacks: Vec<Fallback>,
    power_button: Arc<PowerPorts>,
    ending: Ending,
}

impl Machine {
    /// Builds the machine and its vCPU threads; nothing of the guest runs yet. Its end will be
    /// announced at `ending`.
    pub fn build(
        plan: &Plan,
        resources: &Resources,
        ending: &Ending,
        timing: &mut Timing,
    ) -> Result<Self, HostError> {
        let kvm = open_kvm()?;
        let topology = topology(plan);
        let apic_ids = topology.apic_ids(plan.vcpus.len());
        limits::check(&kvm, &apic_ids)?;
        let vm = create_vm(&kvm)?;
        timing.lap("KVM");
        let guest_memory = memory::allocate(plan.machine.memory, Backing::of(&plan.machine))?;
        let memory = guest_memory.mem();
        let mut memory_fallbacks = memory::bind(memory, plan);
        timing.lap("guest memory");
        let touched = prealloc::touch(memory, plan)?;
        if !touched.threads.is_empty() {
            timing.lap("prealloc");
        }
        memory_fallbacks.extend(touched.fallbacks);
        memory::attach(&vm, memory).map_err(|e| HostError::new("machine.memory", e))?;
        let mut parts = Parts::new(resources, vm, Arc::clone(memory), ending);
        parts.fallbacks = memory_fallbacks;
        parts.add_legacy(plan)?;
        parts.mmio_slots = (plan.machine.transport == plan::Transport::Mmio).then(Vec::new);
        parts.add_disks(plan)?;
        parts.add_rngs(plan)?;
        let hotplug_slots = parts.add_hotplug_slots(plan)?;
        timing.lap("devices");
        let serials: Vec<usize> = plan.serials.iter().map(port_number).collect();
        let mmio = parts.mmio_slots.as_deref();
        let description = Description {
            apic_ids: &apic_ids,
            rtc: plan.machine.rtc,
            serials: &serials,
            pci_buses: if mmio.is_none() { 1 + plan.machine.hotplug_slots } else { 0 },
            mmio: mmio.unwrap_or_default(),
            nodes: &memory::nodes(plan),
        };
        let mut boot = Boot::of(plan);
        if let Some(slots @ [_, ..]) = mmio
            && plan.boot.kernel.is_none()
        {
            // It reads no AML.
            boot.cmdline = format!("{} {}", boot.cmdline, mmio_slots::cmdline(slots)).into();
        }
        let entry = boot.load(memory, &description)?;
        timing.lap("kernel");
        let shared = Arc::new(vcpu::Shared {
            ports: Arc::clone(&parts.ports),
            mmio: Arc::clone(&parts.mmio),
            ending: parts.ending.clone(),
            stop: AtomicBool::new(false),
        });
        let (start, vcpus) = parts.spawn_vcpus(plan, &kvm, topology, &apic_ids, entry, &shared)?;
        timing.lap("vCPUs");
        let Parts { devices, fallbacks, serials, power_button, .. } = parts;
        Ok(Self {
            fallbacks,
            power_button,
            serials,
            hotplug_slots,
            prealloc: touched.threads,
            shared,
            vcpus,
            start,
            devices,
            memory: guest_memory,
        })
    }

    /// Lets the guest run.
    pub fn start(&mut self) {
        self.start.clear();
    }

    /// Where guest memory is in this process.
    pub fn memory_addresses(&self) -> Vec<std::ops::Range<usize>> {
        self.memory.addresses()
    }

    /// The vCPU threads.
    pub fn threads(&self) -> impl Iterator<Item = ThreadInfo> {
        self.vcpus.iter().map(|vcpu| ThreadInfo {
            granted: vcpu.thread.granted.clone(),
            counters: Arc::clone(&vcpu.counters),
        })
    }

    /// Ends the guest and its vCPU threads and lets the devices finish what is in flight. What does
    /// not come to rest within five seconds is named and left behind; then `resources` are still
    /// in use and must not be freed.
    pub fn stop(self, resources: &Resources, blocking: &Blocking) -> Result<(), String> {
        let Self { shared, vcpus, start, devices, hotplug_slots, memory, .. } = self;
        shared.stop.store(true, Release);
        drop(start);
        let stopped = stop_vcpus(vcpus);
        let paused = Paused::pause(&devices, blocking, REST_LIMIT).map_err(|e| e.to_string());
        if let Err(why) = stopped.and(paused.map(drop)) {
            // Requests are in flight: nothing they use may be freed.
            std::mem::forget((shared, devices, hotplug_slots, memory));
            return Err(why);
        }
        drop((shared, devices, hotplug_slots));
        resources.let_go(blocking);
        drop(memory);
        Ok(())
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
    // Work that the kernel has left for this thread (of a ring that was closed, say) interrupts it.
    let vm = loop {
        match kvm.create_vm() {
            Err(error) if error.errno() == libc::EINTR => {}
            other => break other.map_err(step("KVM_CREATE_VM"))?,
        }
    };
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

/// Which of the four serial ports this is, 0 for COM1.
fn port_number(serial: &plan::Serial) -> usize {
    ["com1", "com2", "com3", "com4"].iter().position(|name| serial.name == *name).unwrap_or(0)
}

impl<'a> Parts<'a> {
    fn new(resources: &'a Resources, vm: Arc<VmFd>, mem: Mem, ending: &Ending) -> Self {
        let mmio = Arc::new(Bus::default());
        let irq = Arc::new(KvmIrq(Arc::clone(&vm)));
        let slots =
            Slots { bus: Arc::clone(&mmio), msi: Arc::clone(&irq) as _, doorbells: irq, mem };
        let line = |gsi| SharedLine::new(Arc::new(KvmLine { vm: Arc::clone(&vm), gsi }));
        let sci = Arc::new(KvmLine { vm: Arc::clone(&vm), gsi: PowerPorts::SCI });
        let power_button = Arc::new(PowerPorts::new(Arc::new(ending.clone()), sci));
        let pci_lines = (16..24).map(line).map(Arc::new).collect();
        Self {
            resources,
            pci_lines,
            serials: Vec::new(),
            vm,
            ports: Arc::new(Bus::default()),
            mmio,
            root: Arc::new(PciRoot::default()),
            slots,
            space: BarSpace::new(BARS.start, BARS.end),
            mmio_slots: None,
            devices: Vec::new(),
            fallbacks: Vec::new(),
            power_button,
            ending: ending.clone(),
        }
    }

    fn place(&self, placement: plan::Placement) -> Placement<LoopHandle> {
        let handle = |id: plan::ThreadId| self.resources.loops[id.0].0.clone();
        match placement {
            plan::Placement::Loop(id) => Placement::Loop(handle(id)),
            plan::Placement::Vcpu { home } => Placement::Vcpu { home: handle(home) },
        }
    }

    fn put(bus: &Bus, base: u64, size: u64, device: Arc<dyn Device>) -> Result<(), HostError> {
        bus.insert(base, size, device).map_err(|error| HostError::new("address map", error))
    }

    /// Serial ports, PCI's own ports, power and debug-exit.
    fn add_legacy(&mut self, plan: &Plan) -> Result<(), HostError> {
        let power = Arc::new(self.ending.clone()) as Arc<dyn Power>;
        for serial in &plan.serials {
            self.add_serial(serial)?;
        }
        let config = ConfigPorts::new(Arc::clone(&self.root), Arc::clone(&power));
        Self::put(&self.ports, ConfigPorts::PORT, ConfigPorts::SIZE, Arc::new(config))?;
        let ecam = Ecam::new(Arc::clone(&self.root));
        let buses = 1 + plan.machine.hotplug_slots;
        Self::put(&self.mmio, ECAM, Ecam::size(buses), Arc::new(ecam))?;
        let switch = Arc::clone(&self.power_button);
        Self::put(&self.ports, PowerPorts::PORT, PowerPorts::SIZE, switch)?;
        if plan.machine.rtc {
            Self::put(&self.ports, Rtc::PORT, Rtc::SIZE, Arc::new(Rtc::default()))?;
        }
        let panic = Arc::new(PanicPort::new(Arc::clone(&power)));
        Self::put(&self.ports, PanicPort::PORT, PanicPort::SIZE, panic)?;
        let keyboard = Arc::new(I8042::new(Arc::clone(&power)));
        Self::put(&self.ports, I8042::PORT, I8042::SIZE, keyboard)?;
        if plan.machine.debug_exit {
            let device = Arc::new(DebugExit::new(power));
            Self::put(&self.ports, DebugExit::PORT, DebugExit::SIZE, device)?;
        }
        Ok(())
    }

    fn add_serial(&mut self, serial: &plan::Serial) -> Result<(), HostError> {
        let whose = format!("serial.{}", serial.name);
        let nth = port_number(serial);
        let line = Arc::new(KvmLine { vm: Arc::clone(&self.vm), gsi: Serial::IRQS[nth] });
        let ending = self.ending.clone();
        let device = Arc::new(Serial::new(&whose, line, move || ending.wake()));
        Self::put(&self.ports, Serial::PORTS[nth], Serial::SIZE, Arc::clone(&device) as _)?;
        self.devices.push(Arc::clone(&device) as _);
        self.serials.push(device);
        Ok(())
    }

    fn add_disks(&mut self, plan: &Plan) -> Result<(), HostError> {
        for (disk, image) in plan.disks.iter().zip(&self.resources.images) {
            let queues = disk.queues.len() as u16;
            let backend = Arc::clone(image) as Arc<dyn Backend>;
            let blk = Blk::new(backend, &disk.name, queues, disk.queue_size);
            self.plug(&format!("disk.{}", disk.name), Arc::new(blk), &disk.queues)?;
        }
        Ok(())
    }

    fn add_rngs(&mut self, plan: &Plan) -> Result<(), HostError> {
        for rng in &plan.rngs {
            self.plug(&format!("rng.{}", rng.name), Arc::new(Rng), &[rng.place])?;
        }
        Ok(())
    }

    fn add_hotplug_slots(&mut self, plan: &Plan) -> Result<Vec<Arc<RootPort>>, HostError> {
        let (count, msi) = (plan.machine.hotplug_slots, &self.slots.msi);
        let ports = hotplug::ports(count, &self.root, &mut self.space, msi, &self.pci_lines)?;
        self.devices.extend(ports.iter().map(|port| Arc::clone(port) as Arc<dyn Lifecycle>));
        Ok(ports)
    }

    fn plug(
        &mut self,
        name: &str,
        device: Arc<dyn VirtioDevice>,
        placements: &[plan::Placement],
    ) -> Result<(), HostError> {
        let placements: Vec<_> = placements.iter().map(|place| self.place(*place)).collect();
        if let Some(slots) = &mut self.mmio_slots {
            let slot = MmioSlot::new(slots.len(), name)
                .map_err(|error| HostError::new("machine.transport", error))?;
            let line =
                KvmEdge::new(&self.vm, slot.gsi).map_err(|error| HostError::new(name, error))?;
            let socket = Socket { base: slot.base, line: Arc::new(line) };
            let device = VirtioMmio::new(name, device, &placements, &self.slots, socket)
                .map_err(|error| HostError::new(name, error))?;
            slots.push(slot);
            self.devices.push(Arc::new(device));
            return Ok(());
        }
        let device = VirtioPci::new(name, device, &placements, &self.slots, &mut self.space)
            .map_err(|error| HostError::new(name, error))?;
        let device = Arc::new(device);
        let function = Arc::clone(&device) as Arc<dyn Function>;
        let place = self.root.add(&function).map_err(|error| HostError::new(name, error))?;
        device.connect_pin(self.pci_lines[PciRoot::line_of(place.slot()) as usize % 8].pin());
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
            let cpus = vcpu.cpus.as_ref().map(cpu_ids);
            let (sched, runaway) = sched(vcpu.sched);
            let spec = ThreadSpec { cpus, sched, runaway, ..ThreadSpec::new(format!("vcpu{nth}")) };
            let (vm, supported) = (Arc::clone(&self.vm), Arc::clone(&supported));
            let elsewhere = vcpu.cpus.is_some().then(|| worker_cpus(None, &plan.vcpus));
            let make = move || {
                let mut fd = vm.create_vcpu(apic_id.into()).map_err(ioctl("KVM_CREATE_VCPU"))?;
                let cpuid = cpuid::for_vcpu(&supported, topology, apic_id);
                fd.set_cpuid2(&cpuid).map_err(ioctl("KVM_SET_CPUID2"))?;
                if nth == 0 {
                    entry.enter(&fd).map_err(ioctl("KVM_SET_SREGS"))?;
                    elsewhere.iter().for_each(|cpus| vcpu::make_threads_of_kvm(&mut fd, cpus));
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
                    self.fallbacks.extend(refusals(&format!("vcpu{nth}"), &vcpu.thread.granted));
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
