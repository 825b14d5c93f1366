//! A device behind its transport's registers, as a driver reaches it, and its interrupts.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};

use iothread::{ExitCx, LoopHandle, Reply, VcpuLoop};

use super::DoorbellMap;
use crate::bus::Bus;
use crate::device::{Lifecycle, Paused, RestoreError, State};
use crate::irq::{IrqEdge, Msi, MsiSender};
use crate::pci::{BarSpace, Function};
use crate::virtio::mmio::{Socket, VirtioMmio};
use crate::virtio::pci::{Slots, VirtioPci};
use crate::virtio::queue::RingAddresses;
use crate::virtio::seat::Placement;
use crate::virtio::{Mem, VirtioDevice};

/// Which transport a test runs over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Via {
    /// Virtio over PCI.
    Pci,
    /// Virtio over MMIO.
    Mmio,
}

/// Interrupts as a test sees them: messages, and edges of a line.
#[derive(Debug)]
pub struct Interrupts {
    events: Sender<Raised>,
    count: AtomicU64,
}

#[derive(Debug, Clone, Copy)]
pub(super) enum Raised {
    Message(u32),
    Edge,
}

impl Interrupts {
    pub(super) fn new() -> (Arc<Self>, Receiver<Raised>) {
        let (events, receiver) = channel();
        (Arc::new(Self { events, count: 0.into() }), receiver)
    }

    /// How many there were so far.
    pub fn count(&self) -> u64 {
        self.count.load(Ordering::Acquire)
    }

    fn raise(&self, raised: Raised) {
        self.count.fetch_add(1, Ordering::AcqRel);
        let _ = self.events.send(raised);
    }
}

impl MsiSender for Interrupts {
    fn send(&self, msi: Msi) {
        self.raise(Raised::Message(msi.data));
    }
}

impl IrqEdge for Interrupts {
    fn pulse(&self) {
        self.raise(Raised::Edge);
    }
}

/// What an interrupt is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Interrupt {
    /// A used ring has news.
    Queue,
    /// The configuration or the status has changed.
    Config,
}

/// A device plugged into a machine of its own, as its driver reaches it: through registers.
pub struct Plugged {
    via: Via,
    /// Where its registers are.
    base: u64,
    device: Arc<dyn Lifecycle>,
    bus: Arc<Bus>,
    doorbells: Arc<DoorbellMap>,
    #[expect(clippy::disallowed_types, reason = "the vCPU of all accesses but kicks")]
    vcpu: std::sync::Mutex<VcpuLoop>,
}

impl std::fmt::Debug for Plugged {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Plugged").field("via", &self.via).finish_non_exhaustive()
    }
}

/// Registers of BAR 0 over PCI, virtio 1.2 §4.1.4.
mod pci_registers {
    pub const DEVICE_FEATURES_SEL: u64 = 0;
    pub const DEVICE_FEATURES: u64 = 4;
    pub const DRIVER_FEATURES_SEL: u64 = 8;
    pub const DRIVER_FEATURES: u64 = 12;
    pub const CONFIG_VECTOR: u64 = 16;
    pub const QUEUES: u64 = 18;
    pub const STATUS: u64 = 20;
    pub const QUEUE_SEL: u64 = 22;
    pub const QUEUE_SIZE: u64 = 24;
    pub const QUEUE_VECTOR: u64 = 26;
    pub const QUEUE_ENABLE: u64 = 28;
    pub const RINGS: [u64; 3] = [32, 40, 48];
    pub const NOTIFY: u64 = 0x3000;
}

/// Registers over MMIO, virtio 1.2 §4.2.2.
mod mmio_registers {
    pub const DEVICE_FEATURES: u64 = 0x10;
    pub const DEVICE_FEATURES_SEL: u64 = 0x14;
    pub const DRIVER_FEATURES: u64 = 0x20;
    pub const DRIVER_FEATURES_SEL: u64 = 0x24;
    pub const QUEUE_SEL: u64 = 0x30;
    pub const QUEUE_NUM_MAX: u64 = 0x34;
    pub const QUEUE_NUM: u64 = 0x38;
    pub const QUEUE_READY: u64 = 0x44;
    pub const NOTIFY: u64 = 0x50;
    pub const INTERRUPT_STATUS: u64 = 0x60;
    pub const INTERRUPT_ACK: u64 = 0x64;
    pub const STATUS: u64 = 0x70;
    pub const RINGS: [u64; 3] = [0x80, 0x90, 0xa0];
}

impl Plugged {
    /// Where registers come to lie.
    pub const BASE: u64 = 0xd000_0000;

    pub(super) fn new(
        via: Via,
        device: Arc<dyn VirtioDevice>,
        placement: Placement<LoopHandle>,
        mem: Mem,
        interrupts: &Arc<Interrupts>,
    ) -> Self {
        let (bus, doorbells) = (Arc::<Bus>::default(), Arc::<DoorbellMap>::default());
        let placements = vec![placement; device.groups().len()];
        let slots = Slots {
            bus: Arc::clone(&bus),
            msi: Arc::clone(interrupts) as _,
            doorbells: Arc::clone(&doorbells) as _,
            mem,
        };
        // On another thread, so that this one may still block between accesses.
        let made = std::thread::spawn(VcpuLoop::enter).join();
        let mut vcpu = made.expect("a vCPU's context");
        let device: Arc<dyn Lifecycle> = match via {
            Via::Pci => {
                let mut space = BarSpace::new(Self::BASE, Self::BASE + (1 << 20));
                let queues = device.queue_sizes().len() as u64;
                let function = VirtioPci::new("disk.test", device, &placements, &slots, &mut space)
                    .expect("a device for a test");
                enable_msix(&function, &bus, queues + 1, &mut vcpu.exit());
                Arc::new(function)
            }
            Via::Mmio => {
                let socket = Socket { base: Self::BASE, line: Arc::clone(interrupts) as _ };
                let device = VirtioMmio::new("disk.test", device, &placements, &slots, socket);
                Arc::new(device.expect("a device for a test"))
            }
        };
        Self { via, base: Self::BASE, device, bus, doorbells, vcpu: vcpu.into() }
    }

    /// Reads the register that this transport has at one of `[PCI, MMIO]`, of `len` bytes over
    /// PCI.
    fn get(&self, at: [u64; 2], len: usize) -> u32 {
        let mut data = [0; 4];
        let len = if self.via == Via::Mmio { 4 } else { len };
        let mut vcpu = self.vcpu.lock().expect("no access panics");
        let found = self.bus.read(self.base + self.pick(at), &mut data[..len], &mut vcpu.exit());
        assert!(found, "nothing answers");
        u32::from_le_bytes(data)
    }

    fn set(&self, at: [u64; 2], value: u32, len: usize) {
        let len = if self.via == Via::Mmio { 4 } else { len };
        let (data, mut vcpu) = (value.to_le_bytes(), self.vcpu.lock().expect("no access panics"));
        let found = self.bus.write(self.base + self.pick(at), &data[..len], &mut vcpu.exit());
        assert!(found, "nothing answers");
    }

    fn pick(&self, [pci, mmio]: [u64; 2]) -> u64 {
        if self.via == Via::Pci { pci } else { mmio }
    }

    /// The device status.
    pub fn status(&self) -> u8 {
        self.get([pci_registers::STATUS, mmio_registers::STATUS], 1) as u8
    }

    /// Writes the device status.
    pub fn set_status(&self, value: u8) {
        self.set([pci_registers::STATUS, mmio_registers::STATUS], value.into(), 1);
    }

    /// All features on offer.
    pub fn features(&self) -> u64 {
        let half = |nth| {
            let select = [pci_registers::DEVICE_FEATURES_SEL, mmio_registers::DEVICE_FEATURES_SEL];
            self.set(select, nth, 4);
            let at = [pci_registers::DEVICE_FEATURES, mmio_registers::DEVICE_FEATURES];
            u64::from(self.get(at, 4))
        };
        half(0) | half(1) << 32
    }

    /// Takes features.
    pub fn set_driver_features(&self, features: u64) {
        for half in 0..2 {
            let select = [pci_registers::DRIVER_FEATURES_SEL, mmio_registers::DRIVER_FEATURES_SEL];
            self.set(select, half, 4);
            let at = [pci_registers::DRIVER_FEATURES, mmio_registers::DRIVER_FEATURES];
            self.set(at, (features >> (32 * half)) as u32, 4);
        }
    }

    fn select(&self, queue: u16) {
        self.set([pci_registers::QUEUE_SEL, mmio_registers::QUEUE_SEL], queue.into(), 2);
    }

    /// The largest size of a queue, 0 if there is no such queue.
    pub fn queue_size(&self, queue: u16) -> u16 {
        self.select(queue);
        self.get([pci_registers::QUEUE_SIZE, mmio_registers::QUEUE_NUM_MAX], 2) as u16
    }

    /// How many queues there are.
    pub fn queue_count(&self) -> u16 {
        match self.via {
            Via::Pci => self.get([pci_registers::QUEUES; 2], 2) as u16,
            Via::Mmio => (0..).take_while(|&queue| self.queue_size(queue) > 0).count() as u16,
        }
    }

    /// Sets up a queue that has been left alone since the reset.
    pub fn set_rings(&self, queue: u16, change: impl FnOnce(&mut RingAddresses)) {
        let mut rings = RingAddresses { size: self.queue_size(queue), ..RingAddresses::default() };
        change(&mut rings);
        let at = [pci_registers::QUEUE_SIZE, mmio_registers::QUEUE_NUM];
        self.set(at, rings.size.into(), 2);
        let addresses = [rings.descriptors, rings.available, rings.used];
        let registers = pci_registers::RINGS.into_iter().zip(mmio_registers::RINGS);
        for ((pci, mmio), address) in registers.zip(addresses) {
            self.set([pci, mmio], address as u32, 4);
            self.set([pci + 4, mmio + 4], (address >> 32) as u32, 4);
        }
    }

    /// Enables a queue, its interrupts, and those for the configuration.
    pub fn enable_queue(&self, queue: u16) {
        self.select(queue);
        if self.via == Via::Pci {
            self.set([pci_registers::CONFIG_VECTOR; 2], 0, 2);
            self.set([pci_registers::QUEUE_VECTOR; 2], u32::from(queue) + 1, 2);
        }
        self.set([pci_registers::QUEUE_ENABLE, mmio_registers::QUEUE_READY], 1, 2);
    }

    /// Reads `data.len()` bytes at `offset` in the registers, whatever is there.
    pub fn peek(&self, offset: u64, data: &mut [u8], exit: &mut ExitCx<'_>) {
        self.bus.read(self.base + offset, data, exit);
    }

    /// Writes `data` at `offset` in the registers, whatever is there.
    pub fn poke(&self, offset: u64, data: &[u8], exit: &mut ExitCx<'_>) {
        if !self.doorbells.ring(self.base + offset, data) {
            self.bus.write(self.base + offset, data, exit);
        }
    }

    /// Where a kick of `queue` goes, and what it says.
    fn kick(&self, queue: u16) -> (u64, [u8; 4]) {
        let pci = pci_registers::NOTIFY + 4 * u64::from(queue);
        let at = self.base + self.pick([pci, mmio_registers::NOTIFY]);
        (at, u32::from(queue).to_le_bytes())
    }

    /// Kicks a queue by an exit of this vCPU, as if it had no doorbell.
    pub fn notify(&self, queue: u16, exit: &mut ExitCx<'_>) {
        let (at, data) = self.kick(queue);
        assert!(self.bus.write(at, &data, exit), "nothing answers");
    }

    /// Kicks a queue; true: a doorbell took it, without an exit.
    pub fn ring(&self, queue: u16, exit: &mut ExitCx<'_>) -> bool {
        let (at, data) = self.kick(queue);
        let rang = self.doorbells.ring(at, &data);
        if !rang {
            self.notify(queue, exit);
        }
        rang
    }

    /// Takes notice of what a line was raised for, and acknowledges it. `None`: for nothing that
    /// was not acknowledged before.
    pub(super) fn acknowledge(&self) -> Option<Interrupt> {
        let status = self.get([mmio_registers::INTERRUPT_STATUS; 2], 4);
        self.set([mmio_registers::INTERRUPT_ACK; 2], status, 4);
        match status {
            0 => None,
            1 => Some(Interrupt::Queue),
            _ => Some(Interrupt::Config),
        }
    }
}

/// Lets vector `n` send a message that says `n`.
fn enable_msix(function: &VirtioPci, bus: &Bus, vectors: u64, exit: &mut ExitCx<'_>) {
    let mut at = function.read_config(0x34 / 4, exit) as u16;
    while function.read_config(at / 4, exit) as u8 != 0x11 {
        at = function.read_config(at / 4, exit) as u16 >> 8;
        assert_ne!(at, 0, "no MSI-X capability");
    }
    function.write_config(at / 4, 0x8000_0000, 0xffff_0000, exit);
    let table = u64::from(function.read_config(0x18 / 4, exit) & !0xf);
    for vector in 0..vectors {
        let entry = table + 16 * vector;
        bus.write(entry, &0xfee0_0000u64.to_le_bytes(), exit);
        bus.write(entry + 8, &vector.to_le_bytes()[..4], exit);
        bus.write(entry + 12, &[0; 4], exit);
    }
}

impl Lifecycle for Plugged {
    fn name(&self) -> &str {
        self.device.name()
    }
    fn pause(&self) -> Vec<(String, Reply<()>)> {
        self.device.pause()
    }
    fn resume(&self) {
        self.device.resume();
    }
    fn save(&self, proof: &Paused<'_>) -> State {
        self.device.save(proof)
    }
    fn restore(&self, proof: &Paused<'_>, state: &State) -> Result<(), RestoreError> {
        self.device.restore(proof, state)
    }
}
