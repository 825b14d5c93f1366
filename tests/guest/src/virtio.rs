//! Virtio 1.x over PCI: the transport, and the driver's side of a split ring.

use alloc::boxed::Box;
use alloc::format;
use alloc::string::String;
use alloc::vec;
use core::sync::atomic::{AtomicU16, Ordering, fence};

use crate::mem::{self, Mmio};
use crate::pci::{Function, MsixTable};

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

/// The registers of one device.
pub struct Transport {
    common: Mmio,
    notify: Mmio,
    notify_multiplier: u32,
    config: Option<Mmio>,
    msix: MsixTable,
}

impl Transport {
    /// Finds the register blocks, resets the device and says hello.
    pub fn open(function: &Function) -> Result<Self, String> {
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
        let transport = Transport { common, notify, notify_multiplier, config, msix };
        transport.reset()?;
        transport.common.write8(common::STATUS, ACKNOWLEDGE);
        transport.common.write8(common::STATUS, ACKNOWLEDGE | DRIVER);
        Ok(transport)
    }

    /// Resets the device and waits for it to say so.
    pub fn reset(&self) -> Result<(), String> {
        self.common.write8(common::STATUS, 0);
        let done = (0..1_000_000).any(|_| {
            core::hint::spin_loop();
            self.common.read8(common::STATUS) == 0
        });
        done.then_some(()).ok_or_else(|| "the device does not finish its reset".into())
    }

    /// Accepts the features both sides know.
    pub fn negotiate(&self, wanted: u64) -> Result<u64, String> {
        let c = &self.common;
        let mut offered = 0;
        for half in 0..2 {
            c.write32(common::DEVICE_FEATURE_SELECT, half);
            offered |= u64::from(c.read32(common::DEVICE_FEATURE)) << (32 * half);
        }
        if offered & F_VERSION_1 == 0 {
            return Err("no virtio 1 device".into());
        }
        let accepted = offered & (wanted | F_VERSION_1 | F_ACCESS_PLATFORM);
        for half in 0..2 {
            c.write32(common::DRIVER_FEATURE_SELECT, half);
            c.write32(common::DRIVER_FEATURE, (accepted >> (32 * half)) as u32);
        }
        c.write8(common::STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK);
        if c.read8(common::STATUS) & FEATURES_OK == 0 {
            return Err(format!("the device refuses features {accepted:#x}"));
        }
        Ok(accepted)
    }

    pub fn num_queues(&self) -> u16 {
        self.common.read16(common::NUM_QUEUES)
    }

    /// Reads device configuration consistently.
    pub fn config<T>(&self, read: impl Fn(&Mmio) -> T) -> Result<T, String> {
        let config = self.config.as_ref().ok_or("no device configuration")?;
        loop {
            let before = self.common.read8(common::GENERATION);
            let value = read(config);
            if self.common.read8(common::GENERATION) == before {
                return Ok(value);
            }
        }
    }

    pub fn msix(&self) -> &MsixTable {
        &self.msix
    }

    /// Uses MSI-X entry `entry` for configuration changes.
    pub fn set_config_entry(&self, entry: u16) -> Result<(), String> {
        self.common.write16(common::CONFIG_VECTOR, entry);
        let took = self.common.read16(common::CONFIG_VECTOR) == entry;
        took.then_some(()).ok_or_else(|| "the device refuses the configuration vector".into())
    }

    /// The largest size of a queue, 0 if it does not exist.
    pub fn queue_size(&self, queue: u16) -> u16 {
        self.common.write16(common::QUEUE_SELECT, queue);
        self.common.read16(common::QUEUE_SIZE)
    }

    /// Makes a ring of `size` entries and enables it, with its interrupts on MSI-X `entry`.
    pub fn start_queue(
        &self,
        queue: u16,
        size: u16,
        entry: u16,
        event_idx: bool,
    ) -> Result<Ring, String> {
        let c = &self.common;
        c.write16(common::QUEUE_SELECT, queue);
        c.write16(common::QUEUE_SIZE, size);
        c.write16(common::QUEUE_VECTOR, entry);
        if c.read16(common::QUEUE_VECTOR) != entry {
            return Err(format!("queue {queue} refuses MSI-X vector {entry}"));
        }
        let offset = usize::from(c.read16(common::QUEUE_NOTIFY_OFF));
        let offset = offset * self.notify_multiplier as usize;
        let ring = Ring::new(queue, size, event_idx, Notify { registers: self.notify, offset });
        c.write64(common::QUEUE_DESC, ring.desc as u64);
        c.write64(common::QUEUE_DRIVER, ring.avail as u64);
        c.write64(common::QUEUE_DEVICE, ring.used as u64);
        c.write16(common::QUEUE_ENABLE, 1);
        Ok(ring)
    }

    pub fn driver_ok(&self) {
        self.common.write8(common::STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
    }

    /// Whether the device still works.
    pub fn check(&self) -> Result<(), String> {
        let status = self.common.read8(common::STATUS);
        if status & NEEDS_RESET != 0 {
            return Err(format!("the device needs a reset (status {status:#x})"));
        }
        Ok(())
    }
}

/// Where a queue is kicked.
struct Notify {
    registers: Mmio,
    offset: usize,
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
            self.notify.registers.write16(self.notify.offset, self.queue);
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
