//! Virtio 1.x: devices over PCI or MMIO, and the driver's side of a split ring.

use alloc::boxed::Box;
use alloc::format;
use alloc::string::String;
use alloc::vec;
use core::fmt;
use core::sync::atomic::{AtomicU16, Ordering, fence};

use crate::cpu::{Cpu, VECTOR_CONFIG};
use crate::mem::{self, Mmio};
use crate::mmio;
use crate::pci::{Address, Function, MsixTable};

pub const VENDOR: u16 = 0x1af4;
/// Device ids of virtio 1.x devices start here.
pub const MODERN: u16 = 0x1040;

const ACKNOWLEDGE: u8 = 1;
const DRIVER: u8 = 2;
const DRIVER_OK: u8 = 4;
const FEATURES_OK: u8 = 8;
const NEEDS_RESET: u8 = 64;

pub const F_INDIRECT: u64 = 1 << 28;
pub const F_EVENT_IDX: u64 = 1 << 29;
pub const F_VERSION_1: u64 = 1 << 32;
pub const F_ACCESS_PLATFORM: u64 = 1 << 33;

/// Offsets in the common configuration.
mod common {
    pub const DEVICE_FEATURE_SELECT: usize = 0;
    pub const DEVICE_FEATURE: usize = 4;
    pub const DRIVER_FEATURE_SELECT: usize = 8;
    pub const DRIVER_FEATURE: usize = 12;
    pub const CONFIG_VECTOR: usize = 16;
    pub const NUM_QUEUES: usize = 18;
    pub const STATUS: usize = 20;
    pub const GENERATION: usize = 21;
    pub const QUEUE_SELECT: usize = 22;
    pub const QUEUE_SIZE: usize = 24;
    pub const QUEUE_VECTOR: usize = 26;
    pub const QUEUE_ENABLE: usize = 28;
    pub const QUEUE_NOTIFY_OFF: usize = 30;
    pub const QUEUE_DESC: usize = 32;
    pub const QUEUE_DRIVER: usize = 40;
    pub const QUEUE_DEVICE: usize = 48;
}

/// Where a device is.
#[derive(Clone, Copy)]
pub enum Place {
    Pci(Address),
    Mmio(u64),
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Place::Pci(address) => address.fmt(f),
            Place::Mmio(address) => write!(f, "mmio@{address:x}"),
        }
    }
}

/// A device that was found.
pub enum Found<'a> {
    Pci(&'a Function),
    Mmio(&'a mmio::Device),
}

impl Found<'_> {
    pub fn place(&self) -> Place {
        match self {
            Found::Pci(function) => Place::Pci(function.address),
            Found::Mmio(device) => Place::Mmio(device.slot.address),
        }
    }

    /// The kind of device, as PCI's device ids say it.
    pub fn device(&self) -> u16 {
        match self {
            Found::Pci(function) => function.device,
            Found::Mmio(device) => MODERN + device.id(),
        }
    }
}

/// The addresses of a ring.
pub struct RingAddresses {
    pub desc: u64,
    pub driver: u64,
    pub device: u64,
}

/// The registers of a device, which each transport has elsewhere.
pub trait Registers: Send + Sync {
    fn status(&self) -> u8;
    fn set_status(&self, status: u8);
    /// The features on offer, by halves.
    fn offered(&self, half: u32) -> u32;
    fn accept(&self, half: u32, features: u32);
    /// Device configuration, and a number that changes when that does.
    fn config(&self) -> Option<Mmio>;
    fn generation(&self) -> u32;
    fn num_queues(&self) -> u16;
    /// The largest size of a queue, 0 if it does not exist.
    fn queue_size(&self, queue: u16) -> u16;
    /// Says where configuration changes shall be told.
    fn route_config(&self, cpu: &Cpu) -> Result<(), String>;
    /// Says on which CPU a queue shall interrupt, if possible with this vector. Returns the vector
    /// that this CPU will see.
    fn route_queue(&self, queue: u16, cpu: &Cpu, vector: u8) -> Result<u8, String>;
    fn enable_queue(&self, queue: u16, size: u16, at: RingAddresses);
    fn notify(&self, queue: u16) -> Notify;
    /// Takes note of an interrupt; its causes as virtio 1.2, 4.2.2 numbers them, where the
    /// transport tells them.
    fn acknowledge(&self) -> Option<u32>;
}

/// The registers of a PCI function.
struct PciRegisters {
    common: Mmio,
    notify: Mmio,
    notify_multiplier: u32,
    config: Option<Mmio>,
    msix: MsixTable,
}

impl PciRegisters {
    /// Finds the register blocks.
    fn open(function: &Function) -> Result<Self, String> {
        function.enable();
        let (mut common, mut notify, mut config) = (None, None, None);
        for cap in function.vendor_capabilities() {
            let kind = function.address.read8(cap + 3);
            let bar = function.address.read8(cap + 4);
            let offset = function.address.read32(cap + 8);
            let bytes = function.address.read32(cap + 12);
            let block = || function.registers(bar, offset, bytes);
            match kind {
                1 if common.is_none() => common = Some(block()?),
                2 if notify.is_none() => {
                    notify = Some((block()?, function.address.read32(cap + 16)));
                }
                4 if config.is_none() => config = Some(block()?),
                _ => {}
            }
        }
        let common = common.ok_or("no common configuration")?;
        let (notify, notify_multiplier) = notify.ok_or("no notify registers")?;
        let msix = function.enable_msix()?;
        Ok(PciRegisters { common, notify, notify_multiplier, config, msix })
    }

    /// The MSI-X entry of a queue: the first is that of the configuration, if there are more.
    fn entry(&self, queue: u16) -> Result<u16, String> {
        match (queue, self.msix.vectors()) {
            (0, 1) => Ok(0),
            (queue, vectors) if queue + 1 < vectors => Ok(queue + 1),
            (queue, vectors) => Err(format!("{vectors} MSI-X vectors, none for queue {queue}")),
        }
    }
}

impl Registers for PciRegisters {
    fn status(&self) -> u8 {
        self.common.read8(common::STATUS)
    }

    fn set_status(&self, status: u8) {
        self.common.write8(common::STATUS, status);
    }

    fn offered(&self, half: u32) -> u32 {
        self.common.write32(common::DEVICE_FEATURE_SELECT, half);
        self.common.read32(common::DEVICE_FEATURE)
    }

    fn accept(&self, half: u32, features: u32) {
        self.common.write32(common::DRIVER_FEATURE_SELECT, half);
        self.common.write32(common::DRIVER_FEATURE, features);
    }

    fn config(&self) -> Option<Mmio> {
        self.config
    }

    fn generation(&self) -> u32 {
        self.common.read8(common::GENERATION).into()
    }

    fn num_queues(&self) -> u16 {
        self.common.read16(common::NUM_QUEUES)
    }

    fn queue_size(&self, queue: u16) -> u16 {
        self.common.write16(common::QUEUE_SELECT, queue);
        self.common.read16(common::QUEUE_SIZE)
    }

    fn route_config(&self, cpu: &Cpu) -> Result<(), String> {
        if self.msix.vectors() < 2 {
            return Err("no MSI-X vector for the configuration".into());
        }
        self.msix.route(0, cpu.apic_id.load(Ordering::Relaxed), VECTOR_CONFIG)?;
        self.common.write16(common::CONFIG_VECTOR, 0);
        let took = self.common.read16(common::CONFIG_VECTOR) == 0;
        took.then_some(()).ok_or_else(|| "the device refuses the configuration vector".into())
    }

    fn route_queue(&self, queue: u16, cpu: &Cpu, vector: u8) -> Result<u8, String> {
        let entry = self.entry(queue)?;
        self.msix.route(entry, cpu.apic_id.load(Ordering::Relaxed), vector)?;
        self.common.write16(common::QUEUE_SELECT, queue);
        self.common.write16(common::QUEUE_VECTOR, entry);
        if self.common.read16(common::QUEUE_VECTOR) != entry {
            return Err(format!("queue {queue} refuses MSI-X vector {entry}"));
        }
        Ok(vector)
    }

    fn enable_queue(&self, queue: u16, size: u16, at: RingAddresses) {
        let c = &self.common;
        c.write16(common::QUEUE_SELECT, queue);
        c.write16(common::QUEUE_SIZE, size);
        c.write64(common::QUEUE_DESC, at.desc);
        c.write64(common::QUEUE_DRIVER, at.driver);
        c.write64(common::QUEUE_DEVICE, at.device);
        c.write16(common::QUEUE_ENABLE, 1);
    }

    fn notify(&self, queue: u16) -> Notify {
        self.common.write16(common::QUEUE_SELECT, queue);
        let offset = usize::from(self.common.read16(common::QUEUE_NOTIFY_OFF));
        let offset = offset * self.notify_multiplier as usize;
        Notify { registers: self.notify, offset, wide: false }
    }

    fn acknowledge(&self) -> Option<u32> {
        None
    }
}

/// One device, whatever it hangs on.
pub struct Transport {
    registers: Box<dyn Registers>,
}

impl Transport {
    /// Resets the device and says hello.
    pub fn open(found: &Found) -> Result<Self, String> {
        let registers: Box<dyn Registers> = match found {
            Found::Pci(function) => Box::new(PciRegisters::open(function)?),
            Found::Mmio(device) => Box::new(device.open()),
        };
        let transport = Transport { registers };
        transport.reset()?;
        transport.registers.set_status(ACKNOWLEDGE);
        transport.registers.set_status(ACKNOWLEDGE | DRIVER);
        Ok(transport)
    }

    /// Resets the device and waits for it to say so.
    pub fn reset(&self) -> Result<(), String> {
        self.registers.set_status(0);
        let done = (0..1_000_000).any(|_| {
            core::hint::spin_loop();
            self.registers.status() == 0
        });
        done.then_some(()).ok_or_else(|| "the device does not finish its reset".into())
    }

    /// Accepts the features both sides know.
    pub fn negotiate(&self, wanted: u64) -> Result<u64, String> {
        let r = &self.registers;
        let offered = u64::from(r.offered(0)) | u64::from(r.offered(1)) << 32;
        if offered & F_VERSION_1 == 0 {
            return Err("no virtio 1 device".into());
        }
        let accepted = offered & (wanted | F_VERSION_1 | F_ACCESS_PLATFORM);
        r.accept(0, accepted as u32);
        r.accept(1, (accepted >> 32) as u32);
        r.set_status(ACKNOWLEDGE | DRIVER | FEATURES_OK);
        if r.status() & FEATURES_OK == 0 {
            return Err(format!("the device refuses features {accepted:#x}"));
        }
        Ok(accepted)
    }

    pub fn num_queues(&self) -> u16 {
        self.registers.num_queues()
    }

    /// Reads device configuration consistently.
    pub fn config<T>(&self, read: impl Fn(&Mmio) -> T) -> Result<T, String> {
        let config = self.registers.config().ok_or("no device configuration")?;
        loop {
            let before = self.registers.generation();
            let value = read(&config);
            if self.registers.generation() == before {
                return Ok(value);
            }
        }
    }

    /// Has configuration changes told to this CPU.
    pub fn route_config(&self, cpu: &Cpu) -> Result<(), String> {
        self.registers.route_config(cpu)
    }

    /// Has a queue interrupt this CPU; returns with which vector.
    pub fn route_queue(&self, queue: u16, cpu: &Cpu, vector: u8) -> Result<u8, String> {
        self.registers.route_queue(queue, cpu, vector)
    }

    /// The largest size of a queue, 0 if it does not exist.
    pub fn queue_size(&self, queue: u16) -> u16 {
        self.registers.queue_size(queue)
    }

    /// Makes a ring of `size` entries and enables it.
    pub fn start_queue(&self, queue: u16, size: u16, event_idx: bool) -> Ring {
        let ring = Ring::new(queue, size, event_idx, self.registers.notify(queue));
        let at = RingAddresses {
            desc: ring.desc as u64,
            driver: ring.avail as u64,
            device: ring.used as u64,
        };
        self.registers.enable_queue(queue, size, at);
        ring
    }

    pub fn driver_ok(&self) {
        self.registers.set_status(ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
    }

    /// Takes note of an interrupt, before the rings are looked at.
    pub fn acknowledge(&self) -> Option<u32> {
        self.registers.acknowledge()
    }

    /// Whether the device still works.
    pub fn check(&self) -> Result<(), String> {
        let status = self.registers.status();
        if status & NEEDS_RESET != 0 {
            return Err(format!("the device needs a reset (status {status:#x})"));
        }
        Ok(())
    }
}

/// Where a queue is kicked.
pub struct Notify {
    pub registers: Mmio,
    pub offset: usize,
    /// The register has 32 bits, not 16.
    pub wide: bool,
}

impl Notify {
    fn kick(&self, queue: u16) {
        if self.wide {
            self.registers.write32(self.offset, queue.into());
        } else {
            self.registers.write16(self.offset, queue);
        }
    }
}

/// A descriptor as the device reads it.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Desc {
    pub address: u64,
    pub bytes: u32,
    pub flags: u16,
    pub next: u16,
}

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;
const NO_INTERRUPT: u16 = 1;
const NO_NOTIFY: u16 = 1;

/// A piece of memory in a request.
#[derive(Clone, Copy)]
pub struct Segment {
    pub address: u64,
    pub bytes: u32,
    pub device_writes: bool,
}

/// One completed request.
pub struct Used {
    pub token: u16,
    pub bytes: u32,
}

const NO_TOKEN: u16 = u16::MAX;

/// The driver's side of a split ring. One CPU owns it.
pub struct Ring {
    queue: u16,
    size: u16,
    event_idx: bool,
    desc: *mut Desc,
    avail: *mut u16,
    used: *mut u16,
    notify: Notify,
    /// First free descriptor, and how many there are; linked through `next`.
    free: u16,
    free_count: u16,
    /// What the caller calls the request whose chain starts at a descriptor.
    tokens: Box<[u16]>,
    next_avail: u16,
    kicked_avail: u16,
    last_used: u16,
    kicks: u64,
}

// SAFETY: the memory behind the pointers belongs to this value alone (and to the device).
unsafe impl Send for Ring {}

impl Ring {
    fn new(queue: u16, size: u16, event_idx: bool, notify: Notify) -> Self {
        let n = usize::from(size);
        // Descriptors, available ring, and the used ring at the next multiple of 4.
        let avail = 16 * n;
        let used = (avail + 6 + 2 * n).next_multiple_of(4);
        let memory = mem::pages(used + 6 + 8 * n);
        memory.fill(0);
        let base = memory.as_mut_ptr();
        let desc = base.cast::<Desc>();
        for i in 0..n {
            // SAFETY: descriptor `i` of `n`, in zeroed memory of ours.
            unsafe { (*desc.add(i)).next = i as u16 + 1 };
        }
        Ring {
            queue,
            size,
            event_idx,
            desc,
            avail: base.wrapping_add(avail).cast(),
            used: base.wrapping_add(used).cast(),
            notify,
            free: 0,
            free_count: size,
            tokens: vec![NO_TOKEN; n].into_boxed_slice(),
            next_avail: 0,
            kicked_avail: 0,
            last_used: 0,
            kicks: 0,
        }
    }

    pub fn queue(&self) -> u16 {
        self.queue
    }

    /// Writes to the notify register so far.
    pub fn kicks(&self) -> u64 {
        self.kicks
    }

    fn word(&self, base: *mut u16, index: usize) -> &AtomicU16 {
        // SAFETY: `base` is one of the two rings and `index` one of its words, see the callers;
        // the device writes concurrently, hence the atomic.
        unsafe { AtomicU16::from_ptr(base.add(index)) }
    }

    fn avail_flags(&self) -> &AtomicU16 {
        self.word(self.avail, 0)
    }

    fn avail_idx(&self) -> &AtomicU16 {
        self.word(self.avail, 1)
    }

    fn used_event(&self) -> &AtomicU16 {
        self.word(self.avail, 2 + usize::from(self.size))
    }

    fn used_flags(&self) -> &AtomicU16 {
        self.word(self.used, 0)
    }

    fn used_idx(&self) -> &AtomicU16 {
        self.word(self.used, 1)
    }

    fn avail_event(&self) -> &AtomicU16 {
        self.word(self.used, 2 + 4 * usize::from(self.size))
    }

    /// Whether this many segments fit as a chain of descriptors.
    pub fn fits(&self, segments: usize) -> bool {
        usize::from(self.free_count) >= segments
    }

    fn take_descriptor(&mut self) -> u16 {
        let index = self.free;
        // SAFETY: the free list holds indices of the table; the device does not use free ones.
        self.free = unsafe { (*self.desc.add(index.into())).next };
        self.free_count -= 1;
        index
    }

    /// Adds a request of chained descriptors. The caller asked `fits` before.
    pub fn add(&mut self, segments: &[Segment], token: u16) {
        assert!(self.fits(segments.len()) && !segments.is_empty());
        let head = self.free;
        let mut left = segments.len();
        for segment in segments {
            let index = self.take_descriptor();
            left -= 1;
            // SAFETY: a descriptor just taken from the free list.
            unsafe {
                *self.desc.add(index.into()) = describe(segment, left > 0, self.free);
            }
        }
        self.publish(head, token);
    }

    /// Adds a request through an indirect table, which takes one descriptor.
    ///
    /// # Safety
    /// `table` must have room for the segments and stay untouched until the request is back.
    pub unsafe fn add_indirect(&mut self, segments: &[Segment], token: u16, table: *mut Desc) {
        assert!(self.fits(1) && !segments.is_empty());
        for (i, segment) in segments.iter().enumerate() {
            let more = i + 1 < segments.len();
            // SAFETY: by the caller.
            unsafe { *table.add(i) = describe(segment, more, i as u16 + 1) };
        }
        let head = self.take_descriptor();
        let bytes = segments.len() * size_of::<Desc>();
        // SAFETY: a descriptor just taken from the free list.
        unsafe {
            *self.desc.add(head.into()) =
                Desc { address: table as u64, bytes: bytes as u32, flags: INDIRECT, next: 0 };
        }
        self.publish(head, token);
    }

    fn publish(&mut self, head: u16, token: u16) {
        self.tokens[usize::from(head)] = token;
        let slot = self.next_avail % self.size;
        self.word(self.avail, 2 + usize::from(slot)).store(head, Ordering::Relaxed);
        self.next_avail = self.next_avail.wrapping_add(1);
        self.avail_idx().store(self.next_avail, Ordering::Release);
    }

    /// Tells the device about new requests, if it wants to hear.
    pub fn kick(&mut self) {
        let (old, new) = (self.kicked_avail, self.next_avail);
        if old == new {
            return;
        }
        self.kicked_avail = new;
        fence(Ordering::SeqCst);
        let wanted = if self.event_idx {
            let event = self.avail_event().load(Ordering::Relaxed);
            new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
        } else {
            self.used_flags().load(Ordering::Relaxed) & NO_NOTIFY == 0
        };
        if wanted {
            self.kicks += 1;
            self.notify.kick(self.queue);
        }
    }

    /// Asks for an interrupt at the next completion. Whoever halts afterwards must look once more
    /// with interrupts off, which `gate::halt_unless_changed` does.
    pub fn want_interrupt(&mut self) {
        if self.event_idx {
            self.used_event().store(self.last_used, Ordering::Relaxed);
        } else {
            self.avail_flags().store(0, Ordering::Relaxed);
        }
        fence(Ordering::SeqCst);
    }

    /// Asks for no interrupts.
    pub fn want_quiet(&mut self) {
        if self.event_idx {
            // An index the device has passed already.
            self.used_event().store(self.last_used.wrapping_sub(1), Ordering::Relaxed);
        } else {
            self.avail_flags().store(NO_INTERRUPT, Ordering::Relaxed);
        }
        fence(Ordering::SeqCst);
    }

    /// Whether a completion is there.
    pub fn has_used(&self) -> bool {
        self.used_idx().load(Ordering::Acquire) != self.last_used
    }

    /// The counter that moves when requests complete, and its value when last seen.
    pub fn counter(&self) -> (*const u16, u16) {
        (self.used_idx().as_ptr(), self.last_used)
    }

    /// Takes the next completion.
    pub fn pop(&mut self) -> Result<Option<Used>, String> {
        if !self.has_used() {
            return Ok(None);
        }
        let slot = 2 + 4 * usize::from(self.last_used % self.size);
        let half = |i: usize| u32::from(self.word(self.used, slot + i).load(Ordering::Relaxed));
        let (id, bytes) = (half(0) | half(1) << 16, half(2) | half(3) << 16);
        let token = self.tokens.get(id as usize).copied().unwrap_or(NO_TOKEN);
        if token == NO_TOKEN {
            return Err(format!("the used ring names descriptor {id}, which is not in flight"));
        }
        self.tokens[id as usize] = NO_TOKEN;
        self.last_used = self.last_used.wrapping_add(1);
        self.release(id as u16);
        Ok(Some(Used { token, bytes }))
    }

    /// Puts a chain back on the free list.
    fn release(&mut self, head: u16) {
        let mut last = head;
        let mut count = 1;
        // SAFETY: the chain was built by `add` from indices of the table; the device only reads
        // descriptors, and it is done with these.
        unsafe {
            while (*self.desc.add(last.into())).flags & NEXT != 0 {
                last = (*self.desc.add(last.into())).next;
                count += 1;
            }
            (*self.desc.add(last.into())).next = self.free;
        }
        self.free = head;
        self.free_count += count;
    }

    /// For messages: how far each side is.
    pub fn position(&self) -> String {
        format!(
            "{} made available, {} used",
            self.next_avail,
            self.used_idx().load(Ordering::Relaxed)
        )
    }
}

fn describe(segment: &Segment, more: bool, next: u16) -> Desc {
    let write = if segment.device_writes { WRITE } else { 0 };
    Desc {
        address: segment.address,
        bytes: segment.bytes,
        flags: write | if more { NEXT } else { 0 },
        next: if more { next } else { 0 },
    }
}
