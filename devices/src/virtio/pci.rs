//! Virtio over PCI (virtio 1.2 §4.1): BAR 0 has the registers, BAR 2 the MSI-X table.
//!
//! ```text
//! BAR 0  0x0000 common configuration
//!        0x1000 interrupt status
//!        0x2000 device configuration
//!        0x3000 doorbells, 4 bytes per queue
//! ```

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU16, Ordering::*};
use std::sync::{Arc, OnceLock, Weak};

use iothread::{ExitCx, LoopHandle, Reply};
use serde::{Deserialize, Serialize};

use super::doorbells::DoorbellRow;
use super::seat::Placement;
use super::transport::{self, InterruptSink, Transport};
use super::{Mem, VirtioDevice};
use crate::bus::Bus;
use crate::device::{Body, Device, Lifecycle, Paused, RestoreError, State};
use crate::irq::{self, Doorbell, Doorbells, MsiSender, Pin};
use crate::pci::{
    Bar, BarSpace, Capability, Endpoint, Function, Ids, Msix, Placed, Upstream, endpoint,
};

const COMMON: u64 = 0x0000;
const ISR: u64 = 0x1000;
const CONFIG: u64 = 0x2000;
const NOTIFY: u64 = 0x3000;
const BAR_SIZE: u64 = 0x4000;
/// The most queues whose doorbells fit.
const MAX_QUEUES: u16 = 0x400;
const DOORBELL: u64 = 4;

/// §4.1.5.1.2: no vector is assigned.
const NO_VECTOR: u16 = 0xffff;

/// §4.1.4.5 bits of the interrupt status.
const ISR_QUEUE: u8 = 1;
const ISR_CONFIG: u8 = 2;

/// What a device needs of the machine it is plugged into. Shared by all devices of a machine.
#[derive(Clone)]
pub struct Slots {
    /// Where BARs are decoded.
    pub bus: Arc<Bus>,
    /// Who delivers interrupts.
    pub msi: Arc<dyn MsiSender>,
    /// Who turns kicks into eventfds.
    pub doorbells: Arc<dyn Doorbells>,
    /// Guest memory.
    pub mem: Mem,
}

impl std::fmt::Debug for Slots {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Slots").field("bus", &self.bus).finish_non_exhaustive()
    }
}

/// The device cannot be built.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// No addresses are left.
    #[error("no room for its BARs")]
    NoRoom,
    /// More queues than doorbells.
    #[error("{0} queues are more than {MAX_QUEUES}")]
    TooManyQueues(u16),
    /// An eventfd could not be made.
    #[error("a doorbell: {0}")]
    Doorbell(#[from] std::io::Error),
}

/// Which vector interrupts for what, and the interrupt status.
struct Vectors {
    msix: Arc<Msix>,
    config: AtomicU16,
    queues: Box<[AtomicU16]>,
    status: AtomicU8,
    /// Pulled while MSI-X is off and the status has not been read (virtio 1.2 §4.1.4.5).
    pin: OnceLock<Pin>,
    pin_enabled: AtomicBool,
}

impl Vectors {
    fn new(queues: u16, msi: Arc<dyn MsiSender>) -> Self {
        Self {
            msix: Arc::new(Msix::new(queues + 1, msi)),
            config: AtomicU16::new(NO_VECTOR),
            queues: (0..queues).map(|_| AtomicU16::new(NO_VECTOR)).collect(),
            status: AtomicU8::new(0),
            pin: OnceLock::new(),
            pin_enabled: AtomicBool::new(true),
        }
    }

    /// Reads the status, which clears it.
    fn take_status(&self) -> u8 {
        let status = self.status.swap(0, SeqCst);
        self.settle_pin();
        status
    }

    fn raise(&self, status: u8) {
        self.status.fetch_or(status, SeqCst);
        if !self.msix.is_enabled() {
            self.settle_pin();
        }
    }

    /// Pulls the pin or lets go. Whoever changes what that depends on calls this afterwards.
    fn settle_pin(&self) {
        let Some(pin) = self.pin.get() else { return };
        let wanted = || {
            !self.msix.is_enabled()
                && self.pin_enabled.load(SeqCst)
                && self.status.load(SeqCst) != 0
        };
        irq::settle(pin, wanted);
    }

    fn assign(&self, to: &AtomicU16, vector: u16) {
        let exists = vector < self.msix.vectors();
        to.store(if exists { vector } else { NO_VECTOR }, Release);
    }
}

impl InterruptSink for Vectors {
    fn queue(&self, queue: u16) {
        self.raise(ISR_QUEUE);
        if let Some(vector) = self.queues.get(usize::from(queue)) {
            self.msix.trigger(vector.load(Acquire));
        }
    }

    fn config(&self) {
        self.raise(ISR_CONFIG);
        self.msix.trigger(self.config.load(Acquire));
    }

    fn reset(&self) {
        self.config.store(NO_VECTOR, Release);
        self.queues.iter().for_each(|vector| vector.store(NO_VECTOR, Release));
        self.take_status();
    }
}

/// Selectors of the common configuration.
#[derive(Debug, Default, Clone, Copy, Serialize, Deserialize)]
struct Selected {
    device_features: u32,
    driver_features: u32,
    queue: u16,
}

/// BAR 0.
struct Registers {
    transport: Arc<Transport>,
    vectors: Arc<Vectors>,
    #[expect(clippy::disallowed_types, reason = "selectors: no doorbell comes here")]
    selected: std::sync::Mutex<Selected>,
}

impl Registers {
    fn selected(&self) -> std::sync::MutexGuard<'_, Selected> {
        self.selected.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// The common configuration as it reads, §4.1.4.3.
    fn common(&self) -> [u8; 64] {
        let selected = *self.selected();
        let half = |features: u64, select: u32| match select {
            0 => features as u32,
            1 => (features >> 32) as u32,
            _ => 0,
        };
        let transport = &self.transport;
        let offered = half(transport.features(), selected.device_features);
        let taken = half(transport.driver_features(), selected.driver_features);
        let vector = self.vectors.queues.get(usize::from(selected.queue));
        let mut image = [0; 64];
        let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &selected.device_features.to_le_bytes());
        put(4, &offered.to_le_bytes());
        put(8, &selected.driver_features.to_le_bytes());
        put(12, &taken.to_le_bytes());
        put(16, &self.vectors.config.load(Acquire).to_le_bytes());
        put(18, &transport.queue_count().to_le_bytes());
        put(20, &[transport.status(), 0]);
        put(22, &selected.queue.to_le_bytes());
        if let (Some((rings, enabled)), Some(vector)) = (transport.queue(selected.queue), vector) {
            put(24, &rings.size.to_le_bytes());
            put(26, &vector.load(Acquire).to_le_bytes());
            put(28, &u16::from(enabled).to_le_bytes());
            put(30, &selected.queue.to_le_bytes());
            put(32, &rings.descriptors.to_le_bytes());
            put(40, &rings.available.to_le_bytes());
            put(48, &rings.used.to_le_bytes());
        }
        image
    }

    /// A write to the common configuration: whole fields, or halves of those of 64 bits.
    fn write_common(&self, offset: u64, data: &[u8]) {
        let mut bytes = [0; 8];
        bytes[..data.len()].copy_from_slice(data);
        let value = u64::from_le_bytes(bytes);
        let (word, half) = (value as u32, value as u16);
        let mut selected = self.selected();
        let transport = &self.transport;
        match (offset, data.len()) {
            (0, 4) => selected.device_features = word,
            (8, 4) => selected.driver_features = word,
            (12, 4) => {
                let taken = transport.driver_features();
                let (low, high) = (taken & 0xffff_ffff, taken >> 32 << 32);
                match selected.driver_features {
                    0 => transport.set_driver_features(high | u64::from(word)),
                    1 => transport.set_driver_features(low | u64::from(word) << 32),
                    _ => {}
                }
            }
            (16, 2) => self.vectors.assign(&self.vectors.config, half),
            (20, 1) => transport.set_status(value as u8),
            (22, 2) => selected.queue = half,
            (24, 2) => transport.set_rings(selected.queue, |rings| rings.size = half),
            (26, 2) => {
                if let Some(vector) = self.vectors.queues.get(usize::from(selected.queue)) {
                    self.vectors.assign(vector, half);
                }
            }
            (28, 2) if half == 1 => transport.enable_queue(selected.queue),
            (32..56, 4 | 8) if offset.is_multiple_of(4) => {
                transport.set_rings(selected.queue, |rings| {
                    let field = match offset {
                        32..40 => &mut rings.descriptors,
                        40..48 => &mut rings.available,
                        _ => &mut rings.used,
                    };
                    *field = match (offset % 8, data.len()) {
                        (0, 8) => value,
                        (0, _) => *field >> 32 << 32 | value,
                        (_, 4) => *field & 0xffff_ffff | value << 32,
                        _ => *field,
                    };
                });
            }
            _ => {}
        }
    }
}

impl Device for Registers {
    fn read(&self, offset: u64, data: &mut [u8], _: &mut ExitCx<'_>) {
        data.fill(0);
        match offset {
            COMMON..ISR => {
                let image = self.common();
                let from = image.get(offset as usize..).unwrap_or(&[]);
                data.iter_mut().zip(from).for_each(|(to, from)| *to = *from);
            }
            ISR => data[0] = self.vectors.take_status(),
            CONFIG..NOTIFY => self.transport.device().read_config(offset - CONFIG, data),
            _ => {}
        }
    }

    fn write(&self, offset: u64, data: &[u8], exit: &mut ExitCx<'_>) {
        match offset {
            COMMON..ISR => self.write_common(offset, data),
            CONFIG..NOTIFY => self.transport.device().write_config(offset - CONFIG, data),
            NOTIFY.. => self.transport.notify(((offset - NOTIFY) / DOORBELL) as u16, exit),
            _ => {}
        }
    }
}

/// The doorbells, while BAR 0 is decoded.
struct PlacedDoorbells(DoorbellRow);

impl Placed for PlacedDoorbells {
    fn mapped(&self, base: u64) {
        self.0.connect(|queue| doorbell(base, queue));
    }

    fn unmapped(&self, base: u64) {
        self.0.disconnect(|queue| doorbell(base, queue));
    }
}

/// §4.1.4.4: each queue has an address of its own, so any write there is for it.
fn doorbell(base: u64, queue: u16) -> Doorbell {
    Doorbell { address: base + NOTIFY + u64::from(queue) * DOORBELL, value: None }
}

/// A virtio device as a PCI function.
#[derive(Debug)]
pub struct VirtioPci {
    transport: Arc<Transport>,
    registers: Arc<Registers>,
    endpoint: Endpoint,
}

impl std::fmt::Debug for Registers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Registers").finish_non_exhaustive()
    }
}

/// What [`VirtioPci`] remembers.
#[derive(Serialize, Deserialize)]
struct Saved {
    transport: transport::Saved,
    endpoint: endpoint::Saved,
    config_vector: u16,
    queue_vectors: Vec<u16>,
    interrupt_status: u8,
    selected: Selected,
}

impl Body for Saved {
    const KIND: &'static str = "virtio-pci";
    const VERSION: u32 = 1;
}

impl VirtioPci {
    /// Makes the function; its BARs are put where `space` has room, decoded.
    pub fn new(
        name: &str,
        device: Arc<dyn VirtioDevice>,
        placements: &[Placement<LoopHandle>],
        slots: &Slots,
        space: &mut BarSpace,
    ) -> Result<Self, BuildError> {
        let queues = device.queue_sizes().len() as u16;
        if queues > MAX_QUEUES {
            return Err(BuildError::TooManyQueues(queues));
        }
        let ids = ids(device.device_id());
        let vectors = Arc::new(Vectors::new(queues, Arc::clone(&slots.msi)));
        let sink = Arc::clone(&vectors) as Arc<dyn InterruptSink>;
        let mem = Arc::clone(&slots.mem);
        let transport = Arc::new(Transport::new(name, device, placements, mem, sink));
        let registers = Arc::new(Registers {
            transport: Arc::clone(&transport),
            vectors: Arc::clone(&vectors),
            selected: Selected::default().into(),
        });
        let doorbells = DoorbellRow::new(&transport, Arc::clone(&slots.doorbells))?;
        let msix = Arc::clone(&vectors.msix);
        let bars = vec![
            Bar {
                index: 0,
                address: space.allocate(BAR_SIZE).ok_or(BuildError::NoRoom)?,
                size: BAR_SIZE,
                device: Arc::clone(&registers) as Arc<dyn Device>,
                placed: Some(Arc::new(PlacedDoorbells(doorbells))),
            },
            Bar {
                index: 2,
                address: space.allocate(msix.bar_size()).ok_or(BuildError::NoRoom)?,
                size: msix.bar_size(),
                device: Arc::clone(&msix) as Arc<dyn Device>,
                placed: None,
            },
        ];
        let endpoint = Endpoint::new(&ids, bars, capabilities(queues, msix), &slots.bus);
        Ok(Self { transport, registers, endpoint })
    }

    /// Wires the interrupt pin, once; until then a guest without MSI-X gets no interrupts.
    pub fn connect_pin(&self, pin: Pin) {
        let _ = self.registers.vectors.pin.set(pin);
    }

    /// After anything that may have changed the command register or MSI-X.
    fn settle_pin(&self) {
        let vectors = &self.registers.vectors;
        vectors.pin_enabled.store(self.endpoint.pin_enabled(), SeqCst);
        vectors.settle_pin();
    }

    fn refuse(&self, why: impl ToString) -> RestoreError {
        RestoreError { device: self.name().to_owned(), why: why.to_string() }
    }
}

/// §4.1.2, with the classes that other machines show for these devices.
fn ids(device: u16) -> Ids {
    const RED_HAT: u16 = 0x1af4;
    let class = match device {
        1 => 0x02_0000, // network, Ethernet
        2 => 0x01_0000, // storage
        _ => 0xff_0000, // unclassified
    };
    Ids {
        vendor: RED_HAT,
        device: 0x1040 + device,
        class,
        revision: 1,
        subsystem_vendor: RED_HAT,
        subsystem: 0x40 + device,
    }
}

/// §4.1.4: where the driver finds what.
fn capabilities(queues: u16, msix: Arc<Msix>) -> Vec<Capability> {
    let structure = |kind: u8, offset: u64, length: u64, extra: Option<u32>| {
        let len = if extra.is_some() { 20 } else { 16 };
        let mut body = vec![len, kind, 0, 0, 0, 0];
        body.extend((offset as u32).to_le_bytes());
        body.extend((length as u32).to_le_bytes());
        extra.iter().for_each(|extra| body.extend(extra.to_le_bytes()));
        Capability::new(crate::pci::capability::VENDOR_SPECIFIC, body)
    };
    let doorbells = u64::from(queues) * DOORBELL;
    vec![
        structure(1, COMMON, 56, None),
        structure(2, NOTIFY, doorbells, Some(DOORBELL as u32)),
        structure(3, ISR, 1, None),
        structure(4, CONFIG, NOTIFY - CONFIG, None),
        Capability::window(),
        Capability::msix(2, msix),
    ]
}

impl Function for VirtioPci {
    fn read_config(&self, register: u16, exit: &mut ExitCx<'_>) -> u32 {
        self.endpoint.read_config(register, exit)
    }

    fn write_config(&self, register: u16, value: u32, lanes: u32, exit: &mut ExitCx<'_>) {
        self.endpoint.write_config(register, value, lanes, exit);
        self.settle_pin();
    }

    fn settle(&self) {
        self.endpoint.settle();
    }

    fn move_behind(&self, upstream: Weak<dyn Upstream>) {
        self.endpoint.move_behind(upstream);
    }
}

impl Lifecycle for VirtioPci {
    fn name(&self) -> &str {
        self.transport.name()
    }

    fn pause(&self) -> Vec<(String, Reply<()>)> {
        self.transport.pause()
    }

    fn resume(&self) {
        self.transport.resume();
    }

    fn save(&self, proof: &Paused<'_>) -> State {
        let vectors = &self.registers.vectors;
        State::of(&Saved {
            transport: self.transport.save(proof),
            endpoint: self.endpoint.save(),
            config_vector: vectors.config.load(Acquire),
            queue_vectors: vectors.queues.iter().map(|vector| vector.load(Acquire)).collect(),
            interrupt_status: vectors.status.load(Acquire),
            selected: *self.registers.selected(),
        })
    }

    fn restore(&self, proof: &Paused<'_>, state: &State) -> Result<(), RestoreError> {
        let saved: Saved = state.body().map_err(|why| self.refuse(why))?;
        self.endpoint.accepts(&saved.endpoint).map_err(|why| self.refuse(why))?;
        let vectors = &self.registers.vectors;
        if saved.queue_vectors.len() != vectors.queues.len() {
            return Err(self.refuse("the number of queues differs"));
        }
        self.transport.restore(proof, &saved.transport)?;
        for (vector, saved) in vectors.queues.iter().zip(&saved.queue_vectors) {
            vectors.assign(vector, *saved);
        }
        vectors.assign(&vectors.config, saved.config_vector);
        vectors.status.store(saved.interrupt_status, Release);
        *self.registers.selected() = saved.selected;
        self.endpoint.restore(&saved.endpoint);
        self.settle_pin();
        Ok(())
    }
}
