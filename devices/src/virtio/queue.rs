//! A split virtqueue, from the device's side (virtio 1.2 §2.7).
//!
//! The ring arithmetic is that of the `virtio-queue` crate. This type adds what a device must not
//! get wrong: a chain that breaks the rules retires the queue, notifications are re-armed in the
//! one order that loses none, and interrupts are decided once per batch.

use std::borrow::Cow;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering};

use iothread::{Cx, Poller, announce};
use virtio_queue::desc::split::Descriptor;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress};

use super::{F_EVENT_IDX, Mem, QueueEvents};

/// VRING_AVAIL_F_NO_INTERRUPT, virtio 1.2 §2.7.6.
const NO_INTERRUPT: u16 = 1;

/// Where the driver put the rings of a queue, and how big they are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
pub struct RingAddresses {
    /// Entries.
    pub size: u16,
    /// Descriptor table.
    pub descriptors: u64,
    /// Available ring ("driver area").
    pub available: u64,
    /// Used ring ("device area").
    pub used: u64,
}

/// How far the device has come in the rings.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
pub struct RingIndices {
    /// The next entry of the available ring to take.
    pub next_available: u16,
    /// The next entry of the used ring to fill.
    pub next_used: u16,
}

/// A request taken from the ring. It must be given back with [`VirtQueue::complete`]; it cannot be
/// given back twice.
#[derive(Debug)]
#[must_use = "a chain that is not completed is lost to the driver"]
pub struct Chain {
    head: u16,
}

impl Chain {
    /// The index of its first descriptor: less than the queue's size, and unique among the chains
    /// in flight, or [`VirtQueue::pop`] would have retired the queue.
    pub fn slot(&self) -> u16 {
        self.head
    }
}

/// A piece of guest memory that a chain names.
#[derive(Debug, Clone, Copy)]
pub struct Segment {
    /// Guest physical address.
    pub address: GuestAddress,
    /// Length in bytes, not 0.
    pub len: u32,
    /// The device writes it (else it reads it).
    pub writable: bool,
}

/// One virtqueue of a started device.
pub struct VirtQueue {
    index: u16,
    ring: Queue,
    mem: Mem,
    events: Arc<dyn QueueEvents>,
    /// By head: is that chain in flight?
    taken: Box<[bool]>,
    in_flight: u16,
    retired: bool,
    held: bool,
    /// Completions since the last interrupt decision.
    unsignalled: bool,
    peek: Arc<AtomicU16>,
    poller: Option<Poller>,
}

impl std::fmt::Debug for VirtQueue {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("VirtQueue").field("index", &self.index).finish_non_exhaustive()
    }
}

impl VirtQueue {
    /// Takes on the rings the driver has set up. `Err` says what is wrong with them.
    pub fn new(
        index: u16,
        at: RingAddresses,
        indices: RingIndices,
        features: u64,
        mem: Mem,
        events: Arc<dyn QueueEvents>,
    ) -> Result<Self, String> {
        let bad = |what: &str, e: virtio_queue::Error| format!("{what}: {e}");
        let mut ring = Queue::new(at.size).map_err(|e| bad("size", e))?;
        ring.try_set_desc_table_address(GuestAddress(at.descriptors))
            .map_err(|e| bad("descriptor table", e))?;
        ring.try_set_avail_ring_address(GuestAddress(at.available))
            .map_err(|e| bad("available ring", e))?;
        ring.try_set_used_ring_address(GuestAddress(at.used)).map_err(|e| bad("used ring", e))?;
        ring.set_event_idx(features & F_EVENT_IDX != 0);
        ring.set_next_avail(indices.next_available);
        ring.set_next_used(indices.next_used);
        ring.set_ready(true);
        if at.available == 0 || !ring.is_valid(&*mem) {
            return Err(format!("the rings do not lie in guest memory: {at:x?}"));
        }
        Ok(Self {
            index,
            ring,
            mem,
            events,
            taken: vec![false; usize::from(at.size)].into(),
            in_flight: 0,
            retired: false,
            held: false,
            unsignalled: false,
            peek: Arc::new(AtomicU16::new(indices.next_available)),
            poller: None,
        })
    }

    /// The queue's number in its device.
    pub fn index(&self) -> u16 {
        self.index
    }

    /// Entries in the rings.
    pub fn size(&self) -> u16 {
        self.ring.size()
    }

    /// Guest memory.
    pub fn mem(&self) -> &Mem {
        &self.mem
    }

    /// How far the device has come.
    pub fn indices(&self) -> RingIndices {
        RingIndices { next_available: self.ring.next_avail(), next_used: self.ring.next_used() }
    }

    /// Takes the next chain, and its segments into `segments` (cleared first, never grown beyond
    /// its capacity). `None`: the ring is empty, held or retired.
    ///
    /// A chain that loops, leaves memory, is longer than `segments` has room for, or whose head is
    /// still in flight retires the queue.
    pub fn pop(&mut self, segments: &mut Vec<Segment>) -> Option<Chain> {
        segments.clear();
        if self.retired || self.held {
            return None;
        }
        self.take(segments).unwrap_or_else(|why| {
            self.retire(&why);
            None
        })
    }

    fn take(&mut self, segments: &mut Vec<Segment>) -> Result<Option<Chain>, Cow<'static, str>> {
        let mut available = self.ring.iter(&*self.mem).map_err(|error| error.to_string())?;
        let Some(chain) = available.next() else { return Ok(None) };
        let head = chain.head_index();
        let mut last: Option<Descriptor> = None;
        for (nth, descriptor) in chain.enumerate() {
            last = Some(descriptor);
            // Empty ones count: an indirect table of them could be 65535 long.
            if nth == segments.capacity() {
                return Err("a chain is longer than the device said it takes".into());
            }
            if descriptor.len() == 0 {
                continue;
            }
            segments.push(Segment {
                address: descriptor.addr(),
                len: descriptor.len(),
                writable: descriptor.is_write_only(),
            });
        }
        // The iterator ends at a broken link as it ends at a good end: only the flag tells.
        if last.is_none_or(|descriptor| descriptor.has_next()) {
            return Err("a chain leaves its table, loops, or has a bad indirect table".into());
        }
        if !segments.is_sorted_by_key(|segment| segment.writable) {
            return Err("a chain has a readable descriptor after a writable one".into());
        }
        match self.taken.get_mut(usize::from(head)) {
            Some(taken) if !*taken => *taken = true,
            _ => return Err("a descriptor was offered again while in flight".into()),
        }
        self.in_flight += 1;
        Ok(Some(Chain { head }))
    }

    /// Gives a chain back to the driver with `written` bytes of its writable part filled.
    pub fn complete(&mut self, chain: Chain, written: u32) {
        self.taken[usize::from(chain.head)] = false;
        self.in_flight -= 1;
        if self.retired {
            return;
        }
        match self.ring.add_used(&*self.mem, chain.head, written) {
            Ok(()) => self.unsignalled = true,
            Err(error) => self.retire(&error.to_string()),
        }
    }

    /// Interrupts the driver if anything was completed since the last call and it wants to know.
    pub fn signal(&mut self, cx: &Cx<'_>) {
        if !self.unsignalled {
            return;
        }
        self.unsignalled = false;
        let wanted = if self.ring.event_idx_enabled() {
            self.ring.needs_notification(&*self.mem).unwrap_or(true)
        } else {
            std::sync::atomic::fence(Ordering::SeqCst);
            let flags =
                self.mem.load::<u16>(GuestAddress(self.ring.avail_ring()), Ordering::Relaxed);
            u16::from_le(flags.unwrap_or(0)) & NO_INTERRUPT == 0
        };
        if wanted {
            cx.counters().interrupts.add(1);
            self.events.used(self.index);
        }
    }

    /// Asks the driver not to kick: somebody is looking anyway.
    pub fn begin(&mut self) {
        if let Some(poller) = &self.poller {
            poller.watch(false);
        }
        // The flag lies in the used ring, which `new` has checked.
        let _ = self.ring.disable_notification(&*self.mem);
    }

    /// Ends a look at the ring that found it empty; true: it is not empty any more, look again.
    ///
    /// While requests are in flight the driver need not kick, because every completion looks at
    /// the ring (seed of this rule: the virtio-blk `pending` patch of January 2010). A loop that
    /// polls looks for itself before it sleeps. Else: enable, fence, look again, in this order.
    pub fn end(&mut self, cx: &Cx<'_>) -> bool {
        if self.retired || self.held || self.in_flight > 0 {
            return false;
        }
        if let Some(poller) = &self.poller
            && cx.polls()
        {
            self.peek.store(self.ring.next_avail(), Ordering::Relaxed);
            poller.watch(true);
            return false;
        }
        self.rearm()
    }

    /// Asks the driver to kick again; true: there is something in the ring already.
    pub fn rearm(&mut self) -> bool {
        if let Some(poller) = &self.poller {
            poller.watch(false);
        }
        if self.retired || self.held || self.in_flight > 0 {
            return false;
        }
        let now =
            announce(|| self.enable_kicks(), || self.ring.avail_idx(&*self.mem, Ordering::Relaxed));
        match now {
            Ok(available) => available.0 != self.ring.next_avail(),
            Err(error) => {
                self.retire(&error.to_string());
                false
            }
        }
    }

    /// Asks for a kick when the driver offers the entry that is taken next: virtio 1.2 §2.7.7.
    fn enable_kicks(&self) {
        let used = self.ring.used_ring();
        let (event, at) = match self.ring.event_idx_enabled() {
            true => (self.ring.next_avail(), used + 4 + 8 * u64::from(self.ring.size())),
            false => (0, used),
        };
        // Either lies in the used ring, which `new` has checked.
        let _ = self.mem.store(event.to_le(), GuestAddress(at), Ordering::Relaxed);
    }

    /// Stops or allows taking chains.
    pub(crate) fn hold(&mut self, held: bool) {
        self.held = held;
    }

    /// A closure that says whether the driver has added to the available ring since the last
    /// [`end`](Self::end). It only reads memory.
    pub(crate) fn peeker(&self) -> impl Fn() -> bool + Send + Sync + use<> {
        let (mem, seen) = (Arc::clone(&self.mem), Arc::clone(&self.peek));
        let index = GuestAddress(self.ring.avail_ring() + 2);
        move || {
            mem.load::<u16>(index, Ordering::Acquire)
                .is_ok_and(|now| u16::from_le(now) != seen.load(Ordering::Relaxed))
        }
    }

    /// Lets the home loop look at the ring while it polls.
    pub(crate) fn set_poller(&mut self, poller: Poller) {
        self.poller = Some(poller);
    }

    /// Takes no more chains and tells the transport. Chains in flight still come back.
    pub fn retire(&mut self, why: &str) {
        if !self.retired {
            self.retired = true;
            self.events.broken(self.index, why);
        }
    }
}
