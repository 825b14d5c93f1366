//! A guest in this process: the driver's side of virtio, on real rings in real guest memory.

mod dice;
mod plugged;

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use iothread::{
    Cx, ExitCx, LoopHandle, LoopPolicy, PollPolicy, Port, Thread, ThreadSpec, VcpuLoop,
};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

pub use dice::Dice;
use plugged::Raised;
pub use plugged::{Interrupt, Interrupts, Plugged, Via};

use super::pci::{Slots, VirtioPci};
use super::queue::RingAddresses;
use super::seat::Placement;
use super::transport::status;
use super::{F_EVENT_IDX, F_INDIRECT_DESC, Mem, VirtioDevice};
use crate::block::{Access, Backend, BlockIo, Geometry, Submitted};
use crate::bus::Bus;
use crate::irq::{Doorbell, Doorbells, Msi, MsiSender};
use crate::pci::{Address, BarSpace, ConfigPorts, Ecam, Function, PciRoot};
use crate::power::{Power, PowerRequest};
use crate::snapshot::Snapshot;

/// Descriptor flags, virtio 1.2 §2.7.5.
const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// How long a test waits for something that must happen.
const PATIENCE: Duration = Duration::from_secs(30);

/// `bytes` of guest memory from address 0.
pub fn memory(bytes: usize) -> Mem {
    let regions = [(GuestAddress(0), bytes)];
    Arc::new(GuestMemoryMmap::from_ranges(&regions).expect("memory for a test"))
}

/// The seed in `HEDDLE_SHUFFLE`: with one, loops draw lots for the order of all that has none by
/// promise.
pub fn shuffle() -> Option<u64> {
    std::env::var("HEDDLE_SHUFFLE").ok().map(|seed| seed.parse().expect("HEDDLE_SHUFFLE: a number"))
}

/// A loop on a thread of its own; ends when dropped.
#[derive(Debug)]
pub struct TestLoop {
    /// Where to send work.
    pub handle: LoopHandle,
    thread: Option<Thread>,
}

impl TestLoop {
    /// Starts it.
    pub fn new(name: &str, poll: PollPolicy) -> Self {
        Self::with(name, LoopPolicy { poll, shuffle: shuffle() })
    }

    /// Starts it; it draws no lots, which costs allocations.
    pub fn in_order(name: &str, poll: PollPolicy) -> Self {
        Self::with(name, poll.into())
    }

    fn with(name: &str, policy: LoopPolicy) -> Self {
        let spec = ThreadSpec::new(name);
        let (handle, thread) = iothread::spawn_loop(spec, policy).expect("a loop for a test");
        Self { handle, thread: Some(thread) }
    }
}

impl TestLoop {
    /// Has the loop ended, by a panic for example?
    pub fn is_finished(&self) -> bool {
        self.thread.as_ref().is_none_or(Thread::is_finished)
    }
}

impl Drop for TestLoop {
    fn drop(&mut self) {
        self.handle.stop();
        if let Some(thread) = self.thread.take() {
            let ended = thread.join();
            assert!(ended.is_ok() || std::thread::panicking(), "the loop panicked");
        }
    }
}

/// A device behind its transport, with a driver.
#[derive(Debug)]
pub struct Rig {
    /// Guest memory.
    pub mem: Mem,
    /// The device.
    pub transport: Plugged,
    /// What it has interrupted for.
    pub interrupts: Arc<Interrupts>,
    events: Receiver<Raised>,
    /// The features the driver took.
    pub features: u64,
    /// The driver's side of each queue.
    pub queues: Vec<Ring>,
}

impl Rig {
    /// A device at rest with all its queues served by `placement`.
    pub fn new(
        via: Via,
        device: impl VirtioDevice,
        placement: Placement<LoopHandle>,
        mem: Mem,
    ) -> Self {
        let (interrupts, events) = Interrupts::new();
        let transport =
            Plugged::new(via, Arc::new(device), placement, Arc::clone(&mem), &interrupts);
        Self { mem, transport, interrupts, events, features: 0, queues: Vec::new() }
    }

    /// Brings the device up with rings of `size` entries, taking of the offered features those
    /// in `wanted`. Rings lie from address 0x1000, 0x8000 apart.
    pub fn start(&mut self, size: u16, wanted: u64) {
        self.features = self.transport.features() & wanted;
        self.transport.set_status(1);
        self.transport.set_status(3);
        self.transport.set_driver_features(self.features);
        self.transport.set_status(3 | status::FEATURES_OK);
        assert_ne!(self.transport.status() & status::FEATURES_OK, 0, "features refused");
        self.queues = (0..self.transport.queue_count())
            .map(|queue| {
                let ring = Ring::new(&self.mem, 0x1000 + 0x8000 * u64::from(queue), size, wanted);
                self.transport.set_rings(queue, |rings| *rings = ring.addresses());
                self.transport.enable_queue(queue);
                ring
            })
            .collect();
        self.transport.set_status(3 | status::FEATURES_OK | status::DRIVER_OK);
    }

    /// Resets the device and waits until it has.
    pub fn reset(&self) {
        self.transport.set_status(0);
        let began = std::time::Instant::now();
        while self.transport.status() != 0 {
            assert!(began.elapsed() < PATIENCE, "the reset never ends");
            std::thread::yield_now();
        }
    }

    /// Kicks a queue if the device wants it, on a vCPU thread of its own; true: it did.
    pub fn kick(&mut self, queue: u16) -> bool {
        if !self.queues[usize::from(queue)].wants_kick() {
            return false;
        }
        let transport = &self.transport;
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let mut vcpu = VcpuLoop::enter();
                transport.ring(queue, &mut vcpu.exit());
            });
        });
        true
    }

    /// Kicks several queues, one right after the other.
    pub fn kick_all(&mut self, queues: std::ops::Range<u16>) {
        let wanted: Vec<u16> =
            queues.filter(|queue| self.queues[usize::from(*queue)].wants_kick()).collect();
        let transport = &self.transport;
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let mut vcpu = VcpuLoop::enter();
                for queue in wanted {
                    transport.ring(queue, &mut vcpu.exit());
                }
            });
        });
    }

    /// Waits for the next interrupt.
    pub fn interrupt(&self) -> Interrupt {
        loop {
            let raised = self.events.recv_timeout(PATIENCE);
            match raised.expect("an interrupt that never came") {
                Raised::Message(0) => return Interrupt::Config,
                Raised::Message(_) => return Interrupt::Queue,
                Raised::Edge => {
                    if let Some(interrupt) = self.transport.acknowledge() {
                        return interrupt;
                    }
                }
            }
        }
    }

    /// Waits for the next used entry of a queue: head and written bytes.
    pub fn used(&mut self, queue: u16) -> (u16, u32) {
        loop {
            if let Some(used) = self.queues[usize::from(queue)].take_used() {
                return used;
            }
            self.queues[usize::from(queue)].want_interrupt();
            if let Some(used) = self.queues[usize::from(queue)].take_used() {
                return used;
            }
            self.interrupt();
        }
    }
}

/// What a backend answers to an access.
type Answer = dyn Fn(&Arc<Port>, u16) -> Submitted + Send + Sync;

/// A backend of 4 MiB that moves no bytes and answers as it is told.
pub struct Scripted(Arc<Answer>);

impl std::fmt::Debug for Scripted {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Scripted").finish_non_exhaustive()
    }
}

impl Scripted {
    /// A backend that answers with `answer`, given the port and slot of the access.
    pub fn new(answer: impl Fn(&Arc<Port>, u16) -> Submitted + Send + Sync + 'static) -> Self {
        Self(Arc::new(answer))
    }

    /// A backend that answers nothing by itself; what is submitted arrives at the receiver.
    pub fn pending() -> (Self, Receiver<(Arc<Port>, u16)>) {
        let (sender, submitted) = channel();
        let backend = Self::new(move |port, slot| {
            sender.send((Arc::clone(port), slot)).expect("the test is still there");
            Submitted::Pending
        });
        (backend, submitted)
    }
}

impl Backend for Scripted {
    fn geometry(&self) -> Geometry {
        Geometry { sectors: 8192, block_size: 512, read_only: false }
    }
    fn open_queue(&self) -> io::Result<Box<dyn BlockIo>> {
        Ok(Box::new(Self(Arc::clone(&self.0))))
    }
}

#[expect(unsafe_code, reason = "the trait's method is unsafe")]
impl BlockIo for Scripted {
    unsafe fn submit(
        &mut self,
        _: Access<'_>,
        port: &Arc<Port>,
        slot: u16,
        _: &mut Cx<'_>,
    ) -> Submitted {
        (self.0)(port, slot)
    }
}

/// A buffer of a chain: address, length, and whether the device writes it.
pub type Buffer = (u64, u32, bool);

/// The driver's side of a split ring.
#[derive(Debug)]
pub struct Ring {
    mem: Mem,
    at: RingAddresses,
    event_idx: bool,
    indirect: bool,
    free: Vec<u16>,
    heads: Vec<Vec<u16>>,
    next_available: u16,
    kicked_at: u16,
    next_used: u16,
}

impl Ring {
    /// An empty ring of `size` entries (at most 256) at `base`.
    pub fn new(mem: &Mem, base: u64, size: u16, features: u64) -> Self {
        let at = RingAddresses {
            size,
            descriptors: base,
            available: base + 0x1000,
            used: base + 0x2000,
        };
        mem.write_slice(&[0; 0x8000], GuestAddress(base)).expect("room for the rings");
        Self {
            mem: Arc::clone(mem),
            at,
            event_idx: features & F_EVENT_IDX != 0,
            indirect: features & F_INDIRECT_DESC != 0,
            free: (0..size).rev().collect(),
            heads: vec![Vec::new(); usize::from(size)],
            next_available: 0,
            kicked_at: 0,
            next_used: 0,
        }
    }

    /// Where it lies.
    pub fn addresses(&self) -> RingAddresses {
        self.at
    }

    /// Makes a chain of `buffers` available and gives its head, or `None` if the ring is full.
    /// Every second chain is indirect, if that was agreed on.
    pub fn add(&mut self, buffers: &[Buffer]) -> Option<u16> {
        let indirect = self.indirect && self.next_available % 2 == 1;
        let needed = if indirect { 1 } else { buffers.len() };
        if self.free.len() < needed {
            return None;
        }
        let taken: Vec<u16> = (0..needed).filter_map(|_| self.free.pop()).collect();
        let head = taken[0];
        if indirect {
            let table = self.at.descriptors + 0x3000 + u64::from(head) * 16 * 4;
            let count = buffers.len() as u16;
            for (nth, buffer) in (0..).zip(buffers) {
                self.descriptor(table, nth, *buffer, (nth + 1 < count).then_some(nth + 1), 0);
            }
            let whole = (table, u32::from(count) * 16, false);
            self.descriptor(self.at.descriptors, head, whole, None, INDIRECT);
        } else {
            for (nth, buffer) in buffers.iter().enumerate() {
                let next = taken.get(nth + 1).copied();
                self.descriptor(self.at.descriptors, taken[nth], *buffer, next, 0);
            }
        }
        self.heads[usize::from(head)] = taken;
        self.offer(head);
        Some(head)
    }

    /// Writes one descriptor, right or wrong.
    pub fn descriptor(&self, table: u64, at: u16, buffer: Buffer, next: Option<u16>, flags: u16) {
        let (address, len, writable) = buffer;
        let flags =
            flags | if next.is_some() { NEXT } else { 0 } | if writable { WRITE } else { 0 };
        let mut raw = [0; 16];
        raw[..8].copy_from_slice(&address.to_le_bytes());
        raw[8..12].copy_from_slice(&len.to_le_bytes());
        raw[12..14].copy_from_slice(&flags.to_le_bytes());
        raw[14..].copy_from_slice(&next.unwrap_or(0).to_le_bytes());
        self.put(table + u64::from(at) * 16, &raw);
    }

    /// Puts a head into the available ring.
    pub fn offer(&mut self, head: u16) {
        let slot = u64::from(self.next_available % self.at.size);
        self.put(self.at.available + 4 + 2 * slot, &head.to_le_bytes());
        self.next_available = self.next_available.wrapping_add(1);
        let index = self.next_available.to_le();
        self.mem
            .store(index, GuestAddress(self.at.available + 2), Ordering::Release)
            .expect("the ring lies in memory");
    }

    /// Does the device want to be kicked for what was added since the last time it did?
    pub fn wants_kick(&mut self) -> bool {
        std::sync::atomic::fence(Ordering::SeqCst);
        let (old, new) = (self.kicked_at, self.next_available);
        let wants = if self.event_idx {
            let event = self.get(self.at.used + 4 + 8 * u64::from(self.at.size));
            new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
        } else {
            self.get(self.at.used) & 1 == 0
        };
        self.kicked_at = new;
        wants
    }

    /// Takes the next used entry: head and written bytes.
    pub fn take_used(&mut self) -> Option<(u16, u32)> {
        if self.get(self.at.used + 2) == self.next_used {
            return None;
        }
        let entry = self.at.used + 4 + 8 * u64::from(self.next_used % self.at.size);
        let head: u32 = self.mem.read_obj(GuestAddress(entry)).expect("in memory");
        let written: u32 = self.mem.read_obj(GuestAddress(entry + 4)).expect("in memory");
        self.next_used = self.next_used.wrapping_add(1);
        let head = u16::try_from(u32::from_le(head)).expect("a head");
        let taken = std::mem::take(&mut self.heads[usize::from(head)]);
        assert!(!taken.is_empty(), "a chain came back that was not out");
        self.free.extend(taken);
        Some((head, u32::from_le(written)))
    }

    /// Asks for an interrupt at the next used entry.
    pub fn want_interrupt(&self) {
        if self.event_idx {
            let at = self.at.available + 4 + 2 * u64::from(self.at.size);
            self.put(at, &self.next_used.to_le_bytes());
        }
        std::sync::atomic::fence(Ordering::SeqCst);
    }

    fn put(&self, at: u64, bytes: &[u8]) {
        self.mem.write_slice(bytes, GuestAddress(at)).expect("in memory");
    }

    fn get(&self, at: u64) -> u16 {
        let raw: u16 =
            self.mem.load(GuestAddress(at), Ordering::Acquire).expect("the ring lies in memory");
        u16::from_le(raw)
    }
}

/// Counts messages and requests to end the machine, and does nothing else with them.
#[derive(Debug, Default)]
pub struct Count(AtomicU64);

impl Count {
    /// How many there were so far.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Acquire)
    }
}

impl MsiSender for Count {
    fn send(&self, _: Msi) {
        self.0.fetch_add(1, Ordering::AcqRel);
    }
}

impl Power for Count {
    fn request(&self, _: PowerRequest) {
        self.0.fetch_add(1, Ordering::AcqRel);
    }
}

/// Does for doorbells what KVM does: a write that rings one signals and goes no further.
#[derive(Debug, Default)]
struct DoorbellMap(Snapshot<BTreeMap<Doorbell, Arc<File>>>);

impl DoorbellMap {
    /// True: the write has rung a doorbell.
    fn ring(&self, address: u64, data: &[u8]) -> bool {
        let map = self.0.load();
        let value = data.try_into().ok().map(u32::from_le_bytes);
        let exact = value.and_then(|value| map.get(&Doorbell { address, value: Some(value) }));
        let any = || map.get(&Doorbell { address, value: None });
        let Some(eventfd) = exact.or_else(any) else { return false };
        (&**eventfd).write_all(&1u64.to_ne_bytes()).expect("an eventfd takes a signal");
        true
    }
}

/// Two doorbells in one place, or one that is disconnected twice, would be a bug: KVM refuses.
impl Doorbells for DoorbellMap {
    fn connect(&self, doorbell: Doorbell, fd: BorrowedFd<'_>) -> io::Result<()> {
        let eventfd = Arc::new(File::from(fd.try_clone_to_owned()?));
        let before = self.0.rcu(|map| {
            let mut map = BTreeMap::clone(map);
            map.insert(doorbell, Arc::clone(&eventfd));
            map
        });
        assert!(!before.contains_key(&doorbell), "two doorbells: {doorbell:x?}");
        Ok(())
    }

    fn disconnect(&self, doorbell: Doorbell, _: BorrowedFd<'_>) -> io::Result<()> {
        let before = self.0.rcu(|map| {
            let mut map = BTreeMap::clone(map);
            map.remove(&doorbell);
            map
        });
        assert!(before.contains_key(&doorbell), "no doorbell: {doorbell:x?}");
        Ok(())
    }
}

/// A machine for PCI devices, as a guest's accesses see it.
pub struct Board {
    /// Guest memory.
    pub mem: Mem,
    /// Interrupts so far.
    pub messages: Arc<Count>,
    memory: Arc<Bus>,
    ports: Bus,
    root: Arc<PciRoot>,
    doorbells: Arc<DoorbellMap>,
    space: BarSpace,
}

impl std::fmt::Debug for Board {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Board").field("root", &self.root).finish_non_exhaustive()
    }
}

impl Board {
    /// Where configuration space lies in memory.
    pub const ECAM: u64 = 0xe000_0000;

    /// A machine without devices; BARs come to lie from 0xd0000000.
    pub fn new(mem: Mem) -> Self {
        let (memory, ports, root) = (Arc::<Bus>::default(), Bus::default(), Arc::default());
        let ecam = Arc::new(Ecam::new(Arc::clone(&root)));
        memory.insert(Self::ECAM, Ecam::BUS_SIZE, ecam).expect("the bus is empty");
        let config_ports = ConfigPorts::new(Arc::clone(&root), Arc::<Count>::default());
        ports
            .insert(ConfigPorts::PORT, ConfigPorts::SIZE, Arc::new(config_ports))
            .expect("the bus is empty");
        Self {
            mem,
            messages: Arc::default(),
            memory,
            ports,
            root,
            doorbells: Arc::default(),
            space: BarSpace::new(0xd000_0000, Self::ECAM),
        }
    }

    /// Plugs a device in, with all its queues served by `placement`.
    pub fn add(
        &mut self,
        name: &str,
        device: impl VirtioDevice,
        placement: Placement<LoopHandle>,
    ) -> Address {
        let slots = Slots {
            bus: Arc::clone(&self.memory),
            msi: Arc::clone(&self.messages) as Arc<dyn MsiSender>,
            doorbells: Arc::clone(&self.doorbells) as Arc<dyn Doorbells>,
            mem: Arc::clone(&self.mem),
        };
        let placements = vec![placement; device.groups().len()];
        let function = VirtioPci::new(name, Arc::new(device), &placements, &slots, &mut self.space)
            .expect("a device for a test");
        let function = Arc::new(function) as Arc<dyn Function>;
        self.root.add(&function).expect("a free slot")
    }

    /// The guest reads memory that is not RAM.
    pub fn read(&self, address: u64, data: &mut [u8], exit: &mut ExitCx<'_>) {
        self.memory.read(address, data, exit);
    }

    /// The guest writes memory that is not RAM. A connected doorbell takes no exit.
    pub fn write(&self, address: u64, data: &[u8], exit: &mut ExitCx<'_>) {
        if !self.doorbells.ring(address, data) {
            self.memory.write(address, data, exit);
        }
    }

    /// The guest reads a port.
    pub fn read_port(&self, port: u64, data: &mut [u8], exit: &mut ExitCx<'_>) {
        self.ports.read(port, data, exit);
    }

    /// The guest writes a port.
    pub fn write_port(&self, port: u64, data: &[u8], exit: &mut ExitCx<'_>) {
        self.ports.write(port, data, exit);
    }
}
