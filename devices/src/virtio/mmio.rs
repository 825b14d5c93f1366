//! Virtio over MMIO (virtio 1.2 §4.2), version 2: a page of registers and an interrupt line.
//!
//! ```text
//! 0x000 control registers: 32 bits each, and only as such
//! 0x100 device configuration: any width
//! ```
//!
//! One register kicks all queues, so a queue's doorbell is a value written there; and one line
//! interrupts for all of them, by edges. Nothing here is locked.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering::*};
use std::time::{Duration, Instant};

use iothread::{ExitCx, LoopHandle, Reply};
use serde::{Deserialize, Serialize};

use super::VirtioDevice;
use super::doorbells::DoorbellRow;
use super::pci::Slots;
use super::queue::RingAddresses;
use super::seat::Placement;
use super::transport::{self, InterruptSink, Transport};
use crate::bus::{Bus, Occupied};
use crate::device::{Body, Device, Lifecycle, Paused, RestoreError, State};
use crate::irq::{Doorbell, IrqEdge};

/// Bytes of address space that a device takes.
pub const SIZE: u64 = 0x1000;

/// §4.2.2, table 4.1.
mod register {
    pub const MAGIC_VALUE: u64 = 0x000;
    pub const VERSION: u64 = 0x004;
    pub const DEVICE_ID: u64 = 0x008;
    pub const VENDOR_ID: u64 = 0x00c;
    pub const DEVICE_FEATURES: u64 = 0x010;
    pub const DEVICE_FEATURES_SEL: u64 = 0x014;
    pub const DRIVER_FEATURES: u64 = 0x020;
    pub const DRIVER_FEATURES_SEL: u64 = 0x024;
    pub const QUEUE_SEL: u64 = 0x030;
    pub const QUEUE_NUM_MAX: u64 = 0x034;
    pub const QUEUE_NUM: u64 = 0x038;
    pub const QUEUE_READY: u64 = 0x044;
    pub const QUEUE_NOTIFY: u64 = 0x050;
    pub const INTERRUPT_STATUS: u64 = 0x060;
    pub const INTERRUPT_ACK: u64 = 0x064;
    pub const STATUS: u64 = 0x070;
    pub const QUEUE_DESC_LOW: u64 = 0x080;
    pub const QUEUE_DESC_HIGH: u64 = 0x084;
    pub const QUEUE_DRIVER_LOW: u64 = 0x090;
    pub const QUEUE_DRIVER_HIGH: u64 = 0x094;
    pub const QUEUE_DEVICE_LOW: u64 = 0x0a0;
    pub const QUEUE_DEVICE_HIGH: u64 = 0x0a4;
    pub const SHM_LEN_LOW: u64 = 0x0b0;
    pub const SHM_BASE_HIGH: u64 = 0x0bc;
    pub const CONFIG: u64 = 0x100;
}

/// "virt"
const MAGIC: u32 = 0x7472_6976;
const VERSION_2: u32 = 2;
const RED_HAT: u32 = 0x1af4;

/// §4.2.2 bits of the interrupt status.
const USED_BUFFER: u32 = 1;
const CONFIG_CHANGE: u32 = 2;

/// How long the exit of a reset waits for requests in flight. The driver should look whether a
/// reset is over (§2.4.2), but that of Linux goes on at once (drivers/virtio/virtio_mmio.c). A
/// request that takes longer than this is left to drivers that look.
const RESET_WAIT: Duration = Duration::from_millis(200);

/// The device cannot be built.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// Something else answers at its address.
    #[error("its registers: {0}")]
    Occupied(#[from] Occupied),
    /// An eventfd could not be made.
    #[error("a doorbell: {0}")]
    Doorbell(#[from] std::io::Error),
}

/// The interrupt line, and what it was raised for.
struct Interrupt {
    status: AtomicU32,
    line: Arc<dyn IrqEdge>,
}

impl Interrupt {
    fn raise(&self, event: u32) {
        self.status.fetch_or(event, AcqRel);
        // Each time, also if the driver has not acknowledged the last one: a line that was masked
        // meanwhile has lost its edge.
        self.line.pulse();
    }
}

impl InterruptSink for Interrupt {
    fn queue(&self, _: u16) {
        self.raise(USED_BUFFER);
    }

    fn config(&self) {
        self.raise(CONFIG_CHANGE);
    }

    fn reset(&self) {
        self.status.store(0, Release);
    }
}

/// What the selecting registers select.
#[derive(Default)]
struct Selected {
    device_features: AtomicU32,
    driver_features: AtomicU32,
    queue: AtomicU32,
}

/// The page of registers.
struct Registers {
    transport: Arc<Transport>,
    interrupt: Arc<Interrupt>,
    selected: Selected,
}

impl Registers {
    /// `None`: the driver has selected what no device has.
    fn queue(&self) -> Option<u16> {
        self.selected.queue.load(Acquire).try_into().ok()
    }

    fn read_register(&self, offset: u64) -> u32 {
        let transport = &self.transport;
        match offset {
            register::MAGIC_VALUE => MAGIC,
            register::VERSION => VERSION_2,
            register::DEVICE_ID => transport.device().device_id().into(),
            register::VENDOR_ID => RED_HAT,
            register::DEVICE_FEATURES => match self.selected.device_features.load(Acquire) {
                0 => transport.features() as u32,
                1 => (transport.features() >> 32) as u32,
                _ => 0,
            },
            register::QUEUE_NUM_MAX => {
                let sizes = transport.device().queue_sizes();
                let size = self.queue().and_then(|queue| sizes.get(usize::from(queue)));
                size.map_or(0, |size| u32::from(*size))
            }
            register::QUEUE_READY => {
                let queue = self.queue().and_then(|queue| transport.queue(queue));
                queue.is_some_and(|(_, enabled)| enabled).into()
            }
            register::INTERRUPT_STATUS => self.interrupt.status.load(Acquire),
            register::STATUS => transport.status().into(),
            // No shared memory has this length and this base.
            register::SHM_LEN_LOW..=register::SHM_BASE_HIGH => u32::MAX,
            // Among them the generation of the configuration, which does not change.
            _ => 0,
        }
    }

    fn write_register(&self, offset: u64, value: u32, exit: &mut ExitCx<'_>) {
        let transport = &self.transport;
        match offset {
            register::QUEUE_NOTIFY => {
                if let Ok(queue) = value.try_into() {
                    transport.notify(queue, exit);
                }
            }
            register::INTERRUPT_ACK => {
                self.interrupt.status.fetch_and(!value, AcqRel);
            }
            register::DEVICE_FEATURES_SEL => self.selected.device_features.store(value, Release),
            register::DRIVER_FEATURES_SEL => self.selected.driver_features.store(value, Release),
            register::DRIVER_FEATURES => {
                let taken = transport.driver_features();
                match self.selected.driver_features.load(Acquire) {
                    0 => transport.set_driver_features(low(taken, value)),
                    1 => transport.set_driver_features(high(taken, value)),
                    _ => {}
                }
            }
            register::QUEUE_SEL => self.selected.queue.store(value, Release),
            register::STATUS => match value.try_into() {
                Ok(0) => self.reset(),
                Ok(status) => transport.set_status(status),
                Err(_) => {}
            },
            _ => {
                if let Some(queue) = self.queue() {
                    self.write_queue(queue, offset, value);
                }
            }
        }
    }

    fn write_queue(&self, queue: u16, offset: u64, value: u32) {
        let transport = &self.transport;
        type Field = fn(&mut RingAddresses) -> &mut u64;
        let set = |field: Field, half: fn(u64, u32) -> u64| {
            transport.set_rings(queue, |rings| {
                let field = field(rings);
                *field = half(*field, value);
            });
        };
        match offset {
            // More than there can be is refused when the device starts.
            register::QUEUE_NUM => transport
                .set_rings(queue, |rings| rings.size = value.try_into().unwrap_or(u16::MAX)),
            register::QUEUE_READY => match value {
                0 => transport.disable_queue(queue),
                1 => transport.enable_queue(queue),
                _ => {}
            },
            register::QUEUE_DESC_LOW => set(|rings| &mut rings.descriptors, low),
            register::QUEUE_DESC_HIGH => set(|rings| &mut rings.descriptors, high),
            register::QUEUE_DRIVER_LOW => set(|rings| &mut rings.available, low),
            register::QUEUE_DRIVER_HIGH => set(|rings| &mut rings.available, high),
            register::QUEUE_DEVICE_LOW => set(|rings| &mut rings.used, low),
            register::QUEUE_DEVICE_HIGH => set(|rings| &mut rings.used, high),
            _ => {}
        }
    }

    /// Resets the device, see [`RESET_WAIT`]. Loops do not wait for vCPUs, so this ends.
    fn reset(&self) {
        self.transport.set_status(0);
        let began = Instant::now();
        while self.transport.status() != 0 && began.elapsed() < RESET_WAIT {
            std::thread::sleep(Duration::from_micros(20));
        }
    }
}

/// `wide` with another lower half.
fn low(wide: u64, half: u32) -> u64 {
    wide >> 32 << 32 | u64::from(half)
}

/// `wide` with another upper half.
fn high(wide: u64, half: u32) -> u64 {
    wide & 0xffff_ffff | u64::from(half) << 32
}

impl Device for Registers {
    fn read(&self, offset: u64, data: &mut [u8], _: &mut ExitCx<'_>) {
        data.fill(0);
        if let Some(offset) = offset.checked_sub(register::CONFIG) {
            self.transport.device().read_config(offset, data);
        } else if let Ok(word) = <&mut [u8; 4]>::try_from(data) {
            *word = self.read_register(offset).to_le_bytes();
        }
    }

    fn write(&self, offset: u64, data: &[u8], exit: &mut ExitCx<'_>) {
        if let Some(offset) = offset.checked_sub(register::CONFIG) {
            self.transport.device().write_config(offset, data);
        } else if let Ok(word) = data.try_into() {
            self.write_register(offset, u32::from_le_bytes(word), exit);
        }
    }
}

/// Where a device is plugged in.
pub struct Socket {
    /// The first address of its registers, [`SIZE`] bytes.
    pub base: u64,
    /// Its interrupt line, which it shares with nobody.
    pub line: Arc<dyn IrqEdge>,
}

impl std::fmt::Debug for Socket {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Socket").field("base", &self.base).finish_non_exhaustive()
    }
}

/// A virtio device on the memory bus.
pub struct VirtioMmio {
    transport: Arc<Transport>,
    registers: Arc<Registers>,
    doorbells: DoorbellRow,
    bus: Arc<Bus>,
    base: u64,
}

impl std::fmt::Debug for VirtioMmio {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("VirtioMmio")
            .field("transport", &self.transport)
            .field("base", &self.base)
            .finish_non_exhaustive()
    }
}

/// What [`VirtioMmio`] remembers.
#[derive(Serialize, Deserialize)]
struct Saved {
    transport: transport::Saved,
    interrupt_status: u32,
    device_features: u32,
    driver_features: u32,
    queue: u32,
}

impl Body for Saved {
    const KIND: &'static str = "virtio-mmio";
    const VERSION: u32 = 1;
}

impl VirtioMmio {
    /// Makes the device; it answers at its socket until it is dropped.
    pub fn new(
        name: &str,
        device: Arc<dyn VirtioDevice>,
        placements: &[Placement<LoopHandle>],
        slots: &Slots,
        socket: Socket,
    ) -> Result<Self, BuildError> {
        let Socket { base, line } = socket;
        let interrupt = Arc::new(Interrupt { status: AtomicU32::new(0), line });
        let sink = Arc::clone(&interrupt) as Arc<dyn InterruptSink>;
        let mem = Arc::clone(&slots.mem);
        let transport = Arc::new(Transport::new(name, device, placements, mem, sink));
        let doorbells = DoorbellRow::new(&transport, Arc::clone(&slots.doorbells))?;
        let registers = Arc::new(Registers {
            transport: Arc::clone(&transport),
            interrupt,
            selected: Selected::default(),
        });
        let bus = Arc::clone(&slots.bus);
        bus.insert(base, SIZE, Arc::clone(&registers) as Arc<dyn Device>)?;
        doorbells.connect(|queue| doorbell(base, queue));
        Ok(Self { transport, registers, doorbells, bus, base })
    }

    fn refuse(&self, why: impl ToString) -> RestoreError {
        RestoreError { device: self.name().to_owned(), why: why.to_string() }
    }
}

/// §4.2.3.3: the value written is the queue.
fn doorbell(base: u64, queue: u16) -> Doorbell {
    Doorbell { address: base + register::QUEUE_NOTIFY, value: Some(queue.into()) }
}

impl Drop for VirtioMmio {
    fn drop(&mut self) {
        self.doorbells.disconnect(|queue| doorbell(self.base, queue));
        self.bus.remove(self.base);
    }
}

impl Lifecycle for VirtioMmio {
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
        let selected = &self.registers.selected;
        State::of(&Saved {
            transport: self.transport.save(proof),
            interrupt_status: self.registers.interrupt.status.load(Acquire),
            device_features: selected.device_features.load(Acquire),
            driver_features: selected.driver_features.load(Acquire),
            queue: selected.queue.load(Acquire),
        })
    }

    fn restore(&self, proof: &Paused<'_>, state: &State) -> Result<(), RestoreError> {
        let saved: Saved = state.body().map_err(|why| self.refuse(why))?;
        self.transport.restore(proof, &saved.transport)?;
        let selected = &self.registers.selected;
        selected.device_features.store(saved.device_features, Release);
        selected.driver_features.store(saved.driver_features, Release);
        selected.queue.store(saved.queue, Release);
        // Its edge may not have reached the interrupt controllers before they were saved; one too
        // many is harmless.
        if let events @ 1.. = saved.interrupt_status & (USED_BUFFER | CONFIG_CHANGE) {
            self.registers.interrupt.raise(events);
        }
        Ok(())
    }
}
