//! What all virtio transports have in common: the life of a device (virtio 1.2 §2.1, §3.1).
//!
//! A transport of its own (PCI, MMIO) is a layout of registers over this.
//!
//! ```text
//!            status = 0                FEATURES_OK            DRIVER_OK
//!   ┌───────┐ ◄──────── ┌───────────┐ ──────────► ┌────────┐ ─────────► ┌─────────┐
//!   │ reset │ ────────► │ acknowl'd │             │ agreed │            │ running │
//!   └───────┘           └───────────┘             └────────┘            └────┬────┘
//!       ▲                                                                    │ status = 0
//!       └──────── nothing is in flight any more ◄──── stopping ◄─────────────┘
//! ```

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering::*};

use iothread::{ExitCx, LoopHandle, Reply};
use serde::{Deserialize, Serialize};

use super::queue::{RingAddresses, RingIndices, VirtQueue};
use super::seat::{Placement, Seat};
use super::{F_EVENT_IDX, F_INDIRECT_DESC, F_VERSION_1, Mem, QueueEvents, VirtioDevice};
use crate::device::{Paused, RestoreError};

/// Device status bits, virtio 1.2 §2.1.
pub mod status {
    /// The driver knows how to drive the device.
    pub const DRIVER_OK: u8 = 4;
    /// Driver and device agree on the features.
    pub const FEATURES_OK: u8 = 8;
    /// The device needs a reset.
    pub const NEEDS_RESET: u8 = 64;
}

/// How a transport interrupts the driver. Must not wait.
pub trait InterruptSink: Send + Sync {
    /// The used ring of this queue has news.
    fn queue(&self, queue: u16);
    /// The configuration or the status has changed.
    fn config(&self);
    /// The device was reset: what the driver chose is void.
    fn reset(&self);
}

/// What queue handlers tell the transport, from whatever thread they run on.
struct Events {
    name: String,
    sink: Arc<dyn InterruptSink>,
    needs_reset: AtomicBool,
    complaints: AtomicU32,
}

/// Complaints about one device that are printed: a guest can go on breaking and resetting it.
const MOST_COMPLAINTS: u32 = 8;

impl QueueEvents for Events {
    fn used(&self, queue: u16) {
        self.sink.queue(queue);
    }

    fn broken(&self, queue: u16, why: &str) {
        if self.complaints.fetch_add(1, Relaxed) < MOST_COMPLAINTS {
            let name = &self.name;
            eprintln!("heddle: {name}:q{queue} is retired until the guest resets it: {why}");
        }
        self.needs_reset.store(true, Release);
        self.sink.config();
    }
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
struct QueueRegisters {
    rings: RingAddresses,
    enabled: bool,
}

#[derive(Default)]
struct Registers {
    status: u8,
    driver_features: u64,
    queues: Vec<QueueRegisters>,
    /// Seats that are being left, after the driver asked for a reset.
    stopping: Vec<Reply<()>>,
}

/// What a device and its rings remember.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Saved {
    status: u8,
    driver_features: u64,
    queues: Vec<(QueueRegisters, RingIndices)>,
}

/// One virtio device, with its seats.
pub struct Transport {
    name: String,
    device: Arc<dyn VirtioDevice>,
    mem: Mem,
    seats: Box<[Seat]>,
    /// By queue: the index of its seat.
    seat_of: Box<[usize]>,
    events: Arc<Events>,
    #[expect(clippy::disallowed_types, reason = "registers: no kick or completion comes here")]
    registers: std::sync::Mutex<Registers>,
}

impl fmt::Debug for Transport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Transport").field("name", &self.name).field("seats", &self.seats).finish()
    }
}

impl Transport {
    /// A device at rest. `placements` has one entry per group of queues.
    ///
    /// # Panics
    /// If the number of placements is not that of the groups.
    pub fn new(
        name: &str,
        device: Arc<dyn VirtioDevice>,
        placements: &[Placement<LoopHandle>],
        mem: Mem,
        sink: Arc<dyn InterruptSink>,
    ) -> Self {
        let groups = device.groups();
        assert_eq!(groups.len(), placements.len(), "{name}: one placement per group of queues");
        let sizes = device.queue_sizes();
        let mut seat_of = vec![0; sizes.len()];
        let seats = groups.iter().zip(placements).enumerate().map(|(nth, (group, placement))| {
            let queues = usize::from(group.start)..usize::from(group.end);
            seat_of[queues.clone()].fill(nth);
            let slots = sizes[queues.clone()].iter().sum();
            let name = format!("{name}:q{}", group.start);
            Seat::new(&name, placement.clone(), group.start, queues.len(), slots)
        });
        let seats = seats.collect();
        let registers = Registers { queues: initial_queues(&*device), ..Registers::default() };
        let events = Events {
            name: name.to_owned(),
            sink,
            needs_reset: AtomicBool::new(false),
            complaints: AtomicU32::new(0),
        };
        Self {
            name: name.to_owned(),
            device,
            mem,
            seats,
            seat_of: seat_of.into(),
            events: Arc::new(events),
            registers: registers.into(),
        }
    }

    /// The device's name in the VM file.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The shared half of the device.
    pub fn device(&self) -> &dyn VirtioDevice {
        &*self.device
    }

    /// How many queues the device has.
    pub fn queue_count(&self) -> u16 {
        self.seat_of.len() as u16
    }

    /// The seat that serves a queue.
    pub fn seat(&self, queue: u16) -> Option<&Seat> {
        self.seat_of.get(usize::from(queue)).map(|&nth| &self.seats[nth])
    }

    /// The driver kicked `queue`, by an exit of this vCPU. Takes no lock.
    pub fn notify(&self, queue: u16, exit: &mut ExitCx<'_>) {
        if let Some(seat) = self.seat(queue) {
            seat.notify(exit);
        }
    }

    /// All features on offer.
    pub fn features(&self) -> u64 {
        self.device.features() | F_VERSION_1 | F_INDIRECT_DESC | F_EVENT_IDX
    }

    /// The features the driver took so far.
    pub fn driver_features(&self) -> u64 {
        self.registers().driver_features
    }

    /// The driver takes features; not any more once they are agreed.
    pub fn set_driver_features(&self, features: u64) {
        let mut registers = self.registers();
        if registers.status & status::FEATURES_OK == 0 {
            registers.driver_features = features;
        }
    }

    /// The device status. Not 0 after a reset was asked for until nothing is in flight any more
    /// (virtio 1.2 §4.1.4.3.1).
    pub fn status(&self) -> u8 {
        let mut registers = self.registers();
        self.finish_reset(&mut registers);
        registers.status | if self.needs_reset() { status::NEEDS_RESET } else { 0 }
    }

    /// The driver writes the device status.
    pub fn set_status(&self, value: u8) {
        let mut registers = self.registers();
        self.finish_reset(&mut registers);
        if !registers.stopping.is_empty() {
            return;
        }
        if value == 0 {
            if registers.status & status::DRIVER_OK != 0 {
                registers.stopping = self.seats.iter().map(Seat::stop).collect();
            }
            self.finish_reset(&mut registers);
            if registers.stopping.is_empty() {
                self.clear(&mut registers);
            }
            return;
        }
        let mut new = value & !(registers.status | status::NEEDS_RESET);
        if new & status::FEATURES_OK != 0 && !self.agrees(registers.driver_features) {
            new &= !status::FEATURES_OK;
        }
        registers.status |= new;
        let agreed = registers.status & status::FEATURES_OK != 0;
        if new & status::DRIVER_OK != 0 && agreed {
            self.start(&registers, |_| RingIndices::default());
        }
    }

    /// The rings of a queue as the driver has set them, and whether it is enabled.
    pub fn queue(&self, queue: u16) -> Option<(RingAddresses, bool)> {
        let registers = self.registers();
        registers.queues.get(usize::from(queue)).map(|queue| (queue.rings, queue.enabled))
    }

    /// The driver changes a queue that is not enabled yet.
    pub fn set_rings(&self, queue: u16, change: impl FnOnce(&mut RingAddresses)) {
        let mut registers = self.registers();
        if let Some(queue) = registers.queues.get_mut(usize::from(queue))
            && !queue.enabled
        {
            change(&mut queue.rings);
        }
    }

    /// The driver enables a queue. Once the device runs, only a reset disables it.
    pub fn enable_queue(&self, queue: u16) {
        let mut registers = self.registers();
        if let Some(queue) = registers.queues.get_mut(usize::from(queue)) {
            queue.enabled = true;
        }
    }

    /// The driver takes a queue back, which it can until the device runs.
    pub fn disable_queue(&self, queue: u16) {
        let mut registers = self.registers();
        if registers.status & status::DRIVER_OK == 0
            && let Some(queue) = registers.queues.get_mut(usize::from(queue))
        {
            queue.enabled = false;
        }
    }

    /// Takes no new work; each reply names a part and answers when nothing of it is in flight.
    pub fn pause(&self) -> Vec<(String, Reply<()>)> {
        let parts = self.device.groups().into_iter().zip(&self.seats);
        parts
            .map(|(group, seat)| (format!("{}:q{}", self.name, group.start), seat.pause()))
            .collect()
    }

    /// Takes work again.
    pub fn resume(&self) {
        self.seats.iter().for_each(Seat::resume);
    }

    /// What the device and its rings remember.
    pub fn save(&self, _: &Paused<'_>) -> Saved {
        let mut registers = self.registers();
        self.finish_reset(&mut registers);
        let needs_reset = if self.needs_reset() { status::NEEDS_RESET } else { 0 };
        let running = registers.status & status::DRIVER_OK != 0;
        let queues = registers.queues.iter().enumerate().map(|(index, queue)| {
            let rest = if running { self.at_rest(index) } else { RingIndices::default() };
            (*queue, rest)
        });
        Saved {
            status: registers.status | needs_reset,
            driver_features: registers.driver_features,
            queues: queues.collect(),
        }
    }

    /// Takes on what another instance of this device remembered. The device must not have been
    /// started yet; the handlers take their seats at rest and run at the next
    /// [`resume`](Self::resume).
    pub fn restore(&self, _: &Paused<'_>, saved: &Saved) -> Result<(), RestoreError> {
        let refuse =
            |why: &str| Err(RestoreError { device: self.name.clone(), why: why.to_owned() });
        let mut registers = self.registers();
        if registers.status & status::DRIVER_OK != 0 || !registers.stopping.is_empty() {
            return refuse("it is running");
        }
        if saved.queues.len() != registers.queues.len() {
            return refuse("the number of queues differs");
        }
        let too_big =
            |(saved, own): (&(QueueRegisters, RingIndices), &u16)| saved.0.rings.size > *own;
        if saved.queues.iter().zip(self.device.queue_sizes()).any(too_big) {
            return refuse("a queue is larger than it can be here");
        }
        if saved.status & status::FEATURES_OK != 0 && !self.agrees(saved.driver_features) {
            return refuse("the driver uses features that are not offered here");
        }
        registers.status = saved.status & !status::NEEDS_RESET;
        self.events.needs_reset.store(saved.status & status::NEEDS_RESET != 0, Release);
        registers.driver_features = saved.driver_features;
        registers.queues = saved.queues.iter().map(|(queue, _)| *queue).collect();
        if registers.status & status::DRIVER_OK != 0 {
            self.start(&registers, |index| saved.queues[index].1);
        }
        Ok(())
    }

    fn registers(&self) -> std::sync::MutexGuard<'_, Registers> {
        self.registers.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    fn needs_reset(&self) -> bool {
        self.events.needs_reset.load(Acquire)
    }

    /// Did the driver take version 1, and nothing that was not offered?
    fn agrees(&self, taken: u64) -> bool {
        taken & F_VERSION_1 != 0 && taken & !self.features() == 0
    }

    fn at_rest(&self, queue: usize) -> RingIndices {
        let seat = self.seat_of[queue];
        let first = self.seat_of.partition_point(|&nth| nth < seat);
        self.seats[seat].indices_at_rest(queue - first)
    }

    /// Seats a handler for each group.
    fn start(&self, registers: &Registers, indices: impl Fn(usize) -> RingIndices) {
        let features = registers.driver_features;
        for (group, seat) in self.device.groups().into_iter().zip(&self.seats) {
            let queues = group.map(|index| {
                let queue = registers.queues[usize::from(index)];
                let indices = indices(usize::from(index));
                queue.enabled.then(|| self.take_on(index, queue.rings, indices, features)).flatten()
            });
            let queues: Vec<_> = queues.collect();
            let device = Arc::clone(&self.device);
            seat.start(move |port| device.start(queues, features, port));
        }
    }

    /// One queue as the driver has set it up; `None`: it has set it up wrong, which is said.
    fn take_on(
        &self,
        index: u16,
        rings: RingAddresses,
        indices: RingIndices,
        features: u64,
    ) -> Option<VirtQueue> {
        let most = self.device.queue_sizes()[usize::from(index)];
        let events = Arc::clone(&self.events) as Arc<dyn QueueEvents>;
        let queue = match rings.size {
            size if size > most => Err(format!("{size} entries, the most is {most}")),
            _ => VirtQueue::new(index, rings, indices, features, Arc::clone(&self.mem), events),
        };
        queue.map_err(|why| self.events.broken(index, &why)).ok()
    }

    /// If a reset was asked for and nothing is in flight any more: clears the registers.
    fn finish_reset(&self, registers: &mut Registers) {
        if registers.stopping.is_empty() {
            return;
        }
        // A loop that has ended has nothing in flight.
        registers.stopping.retain_mut(|reply| matches!(reply.poll(), Ok(None)));
        if registers.stopping.is_empty() {
            self.clear(registers);
        }
    }

    fn clear(&self, registers: &mut Registers) {
        *registers = Registers { queues: initial_queues(&*self.device), ..Registers::default() };
        self.events.needs_reset.store(false, Release);
        self.events.sink.reset();
    }
}

fn initial_queues(device: &dyn VirtioDevice) -> Vec<QueueRegisters> {
    let sizes = device.queue_sizes().iter();
    let queue = |&size| QueueRegisters {
        rings: RingAddresses { size, ..RingAddresses::default() },
        enabled: false,
    };
    sizes.map(queue).collect()
}
