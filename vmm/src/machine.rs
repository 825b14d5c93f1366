//! From a plan to a running machine, and back to nothing.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use config::plan::Plan;
use devices::device::{Lifecycle, Paused};
use devices::legacy::{PowerPorts, Serial};
use devices::pci::RootPort;
use iothread::{Blocking, Counters, Granted};

use crate::acpi::Description;
use crate::board::{self, Board};
use crate::boot::Boot;
use crate::cpuid::Topology;
use crate::ending::Ending;
use crate::host_error::HostError;
use crate::memory::{self, Backing, GuestMemory};
use crate::resources::{Fallback, Resources};
use crate::smp::Smp;
use crate::timing::Timing;
use crate::{kvm, limits, mmio_slots, prealloc, vcpu};

/// The guest that runs when the file names no kernel.
pub const BUILT_IN_GUEST: &[u8] = include_bytes!(env!("HEDDLE_GUEST"));

/// How long the devices may take to finish what is in flight, at the end.
const REST_LIMIT: Duration = Duration::from_secs(5);

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
    vcpus: Smp,
    devices: Vec<Arc<dyn Lifecycle>>,
    /// After everything that may use it.
    memory: GuestMemory,
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
        let kvm = kvm::open()?;
        let apic_ids = Topology::of(plan).apic_ids(plan.vcpus.len());
        limits::check(&kvm, &apic_ids)?;
        let vm = kvm::create_vm(&kvm)?;
        timing.lap("KVM");
        let guest_memory = memory::allocate(plan.machine.memory, Backing::of(&plan.machine))?;
        let memory = guest_memory.mem();
        let mut fallbacks = memory::bind(memory, plan);
        timing.lap("guest memory");
        let touched = prealloc::touch(memory, plan)?;
        if !touched.threads.is_empty() {
            timing.lap("prealloc");
        }
        fallbacks.extend(touched.fallbacks);
        memory::attach(&vm, memory).map_err(|e| HostError::new("machine.memory", e))?;
        let board = Board::new(plan, resources, &vm, Arc::clone(memory), ending)?;
        timing.lap("devices");
        let serials: Vec<usize> = plan.serials.iter().map(board::port_number).collect();
        let mmio = board.mmio_slots.as_deref();
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
        let Board { ports, mmio, devices, serials, hotplug_slots, power_button, .. } = board;
        let stop = AtomicBool::new(false);
        let shared = Arc::new(vcpu::Shared { ports, mmio, ending: ending.clone(), stop });
        let vcpus = Smp::spawn(&kvm, &vm, plan, &apic_ids, entry, shared)?;
        timing.lap("vCPUs");
        fallbacks.extend(vcpus.fallbacks());
        Ok(Self {
            fallbacks,
            power_button,
            serials,
            hotplug_slots,
            prealloc: touched.threads,
            vcpus,
            devices,
            memory: guest_memory,
        })
    }

    /// Lets the guest run.
    pub fn start(&mut self) {
        self.vcpus.start();
    }

    /// Where guest memory is in this process.
    pub fn memory_addresses(&self) -> Vec<Range<usize>> {
        self.memory.addresses()
    }

    /// The vCPU threads.
    pub fn threads(&self) -> impl Iterator<Item = ThreadInfo> {
        self.vcpus.threads()
    }

    /// Ends the guest and its vCPU threads and lets the devices finish what is in flight. What does
    /// not come to rest within five seconds is named and left behind; then `resources` are still
    /// in use and must not be freed.
    pub fn stop(self, resources: &Resources, blocking: &Blocking) -> Result<(), String> {
        let Self { vcpus, devices, hotplug_slots, memory, .. } = self;
        let stopped = vcpus.stop();
        let paused = Paused::pause(&devices, blocking, REST_LIMIT).map_err(|e| e.to_string());
        if let Err(why) = stopped.and(paused.map(drop)) {
            // Requests are in flight: nothing they use may be freed.
            std::mem::forget((devices, hotplug_slots, memory));
            return Err(why);
        }
        drop((devices, hotplug_slots));
        resources.let_go(blocking);
        drop(memory);
        Ok(())
    }
}
