//! What the vCPUs see when they leave the guest: buses, and devices plugged into them.

use std::sync::Arc;

use config::plan::{self, Plan};
use devices::block::Backend;
use devices::bus::Bus;
use devices::device::{Device, Lifecycle};
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
use iothread::LoopHandle;
use kvm_ioctls::VmFd;

use crate::ending::Ending;
use crate::host_error::HostError;
use crate::hotplug;
use crate::irq::{KvmEdge, KvmIrq, KvmLine};
use crate::memory::{BARS, ECAM};
use crate::mmio_slots::MmioSlot;
use crate::resources::Resources;

/// Buses and devices.
pub struct Board {
    /// Port I/O.
    pub ports: Arc<Bus>,
    /// Memory-mapped I/O.
    pub mmio: Arc<Bus>,
    /// All devices that can be paused, in the order of the plan.
    pub devices: Vec<Arc<dyn Lifecycle>>,
    /// The serial ports.
    pub serials: Vec<Arc<Serial>>,
    /// Its hot-plug slots.
    pub hotplug_slots: Vec<Arc<RootPort>>,
    /// The power button.
    pub power_button: Arc<PowerPorts>,
    /// With virtio-mmio: where the virtio devices are, instead of on the PCI bus.
    pub mmio_slots: Option<Vec<MmioSlot>>,
    vm: Arc<VmFd>,
    ending: Ending,
    slots: Slots,
    root: Arc<PciRoot>,
    space: BarSpace,
    /// The wires of the interrupt pins, [`PciRoot::LINES`].
    wires: Vec<Arc<SharedLine>>,
}

/// Which of the four serial ports this is, 0 for COM1.
pub fn port_number(serial: &plan::Serial) -> usize {
    ["com1", "com2", "com3", "com4"].iter().position(|name| serial.name == *name).unwrap_or(0)
}

impl Board {
    /// Makes all devices of the plan. What they do to the machine as a whole goes to `ending`.
    pub fn new(
        plan: &Plan,
        resources: &Resources,
        vm: &Arc<VmFd>,
        mem: Mem,
        ending: &Ending,
    ) -> Result<Self, HostError> {
        let mut board = Self::empty(Arc::clone(vm), mem, ending);
        board.mmio_slots = (plan.machine.transport == plan::Transport::Mmio).then(Vec::new);
        board.add_legacy(plan)?;
        board.add_disks(plan, resources)?;
        board.add_rngs(plan, resources)?;
        board.add_hotplug_slots(plan)?;
        Ok(board)
    }

    fn empty(vm: Arc<VmFd>, mem: Mem, ending: &Ending) -> Self {
        let mmio = Arc::new(Bus::default());
        let irq = Arc::new(KvmIrq(Arc::clone(&vm)));
        let slots =
            Slots { bus: Arc::clone(&mmio), msi: Arc::clone(&irq) as _, doorbells: irq, mem };
        let line = |gsi| SharedLine::new(Arc::new(KvmLine { vm: Arc::clone(&vm), gsi }));
        let sci = Arc::new(KvmLine { vm: Arc::clone(&vm), gsi: PowerPorts::SCI });
        let power_button = Arc::new(PowerPorts::new(Arc::new(ending.clone()), sci));
        let wires = PciRoot::LINES.map(line).map(Arc::new).collect();
        Self {
            wires,
            serials: Vec::new(),
            hotplug_slots: Vec::new(),
            vm,
            ports: Arc::new(Bus::default()),
            mmio,
            root: Arc::new(PciRoot::default()),
            slots,
            space: BarSpace::new(BARS.start, BARS.end),
            mmio_slots: None,
            devices: Vec::new(),
            power_button,
            ending: ending.clone(),
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

    fn add_disks(&mut self, plan: &Plan, resources: &Resources) -> Result<(), HostError> {
        for (disk, image) in plan.disks.iter().zip(&resources.images) {
            let queues = disk.queues.len() as u16;
            let backend = Arc::clone(image) as Arc<dyn Backend>;
            let blk = Blk::new(backend, &disk.name, queues, disk.queue_size);
            self.plug(
                &format!("disk.{}", disk.name),
                Arc::new(blk),
                &resources.places(&disk.queues),
            )?;
        }
        Ok(())
    }

    fn add_rngs(&mut self, plan: &Plan, resources: &Resources) -> Result<(), HostError> {
        for rng in &plan.rngs {
            self.plug(
                &format!("rng.{}", rng.name),
                Arc::new(Rng),
                &resources.places(&[rng.place]),
            )?;
        }
        Ok(())
    }

    fn add_hotplug_slots(&mut self, plan: &Plan) -> Result<(), HostError> {
        let (count, msi) = (plan.machine.hotplug_slots, &self.slots.msi);
        let ports = hotplug::ports(count, &self.root, &mut self.space, msi, &self.wires)?;
        self.devices.extend(ports.iter().map(|port| Arc::clone(port) as Arc<dyn Lifecycle>));
        self.hotplug_slots = ports;
        Ok(())
    }

    fn plug(
        &mut self,
        name: &str,
        device: Arc<dyn VirtioDevice>,
        placements: &[Placement<LoopHandle>],
    ) -> Result<(), HostError> {
        if let Some(slots) = &mut self.mmio_slots {
            let slot = MmioSlot::new(slots.len(), name)
                .map_err(|error| HostError::new("machine.transport", error))?;
            let line =
                KvmEdge::new(&self.vm, slot.gsi).map_err(|error| HostError::new(name, error))?;
            let socket = Socket { base: slot.base, line: Arc::new(line) };
            let device = VirtioMmio::new(name, device, placements, &self.slots, socket)
                .map_err(|error| HostError::new(name, error))?;
            slots.push(slot);
            self.devices.push(Arc::new(device));
            return Ok(());
        }
        let device = VirtioPci::new(name, device, placements, &self.slots, &mut self.space)
            .map_err(|error| HostError::new(name, error))?;
        let device = Arc::new(device);
        let function = Arc::clone(&device) as Arc<dyn Function>;
        let place = self.root.add(&function).map_err(|error| HostError::new(name, error))?;
        device.connect_pin(self.wires[PciRoot::wire_of(place.slot())].pin());
        self.devices.push(device);
        Ok(())
    }
}
