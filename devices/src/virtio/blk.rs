//! virtio-blk (virtio 1.2 §5.2): requests in, accesses to a backend out.

#![expect(unsafe_code, reason = "guest memory is handed to the kernel as iovecs")]

use std::collections::VecDeque;
use std::sync::Arc;

use iothread::{Cx, Port, Progress};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use super::queue::{Chain, Segment, VirtQueue};
use super::{Mem, QueueHandler, VirtioDevice};
use crate::block::{Access, Backend, BlockIo, Geometry, Op, SECTOR, Submitted};

/// §5.2.3 feature bits.
const F_SEG_MAX: u64 = 1 << 2;
const F_RO: u64 = 1 << 5;
const F_BLK_SIZE: u64 = 1 << 6;
const F_FLUSH: u64 = 1 << 9;
const F_MQ: u64 = 1 << 12;

/// §5.2.6 request types.
const T_IN: u32 = 0;
const T_OUT: u32 = 1;
const T_FLUSH: u32 = 4;
const T_GET_ID: u32 = 8;

/// §5.2.6 status bytes.
const S_OK: u8 = 0;
const S_IOERR: u8 = 1;
const S_UNSUPP: u8 = 2;

const HEADER: usize = 16;
const ID: usize = 20;

/// Data segments in a request. The chain has two more, for the header and the status.
const SEG_MAX: usize = 126;

/// Requests, and bytes, started in one go before other work of the thread gets its turn.
const BUDGET: u32 = 256;
const BYTES_BUDGET: u64 = 16 << 20;

/// The shared half: one disk.
pub struct Blk {
    backend: Arc<dyn Backend>,
    id: [u8; ID],
    queue_sizes: Box<[u16]>,
    geometry: Geometry,
}

impl std::fmt::Debug for Blk {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Blk").field("geometry", &self.geometry).finish_non_exhaustive()
    }
}

impl Blk {
    /// A disk with `queues` queues of `queue_size` entries. The guest reads the first 20 bytes of
    /// `id` as the disk's id.
    pub fn new(backend: Arc<dyn Backend>, id: &str, queues: u16, queue_size: u16) -> Self {
        let mut padded = [0; ID];
        for (to, from) in padded.iter_mut().zip(id.bytes()) {
            *to = from;
        }
        let geometry = backend.geometry();
        let queue_sizes = vec![queue_size; usize::from(queues)].into();
        Self { backend, id: padded, queue_sizes, geometry }
    }

    /// §5.2.4, all fields up to `num_queues`.
    fn config(&self) -> [u8; 36] {
        let mut config = [0; 36];
        config[0..8].copy_from_slice(&self.geometry.sectors.to_le_bytes());
        config[12..16].copy_from_slice(&(SEG_MAX as u32).to_le_bytes());
        config[20..24].copy_from_slice(&self.geometry.block_size.to_le_bytes());
        config[34..36].copy_from_slice(&(self.queue_sizes.len() as u16).to_le_bytes());
        config
    }
}

impl VirtioDevice for Blk {
    fn device_id(&self) -> u16 {
        2
    }

    fn features(&self) -> u64 {
        let ro = if self.geometry.read_only { F_RO } else { 0 };
        let mq = if self.queue_sizes.len() > 1 { F_MQ } else { 0 };
        F_SEG_MAX | F_BLK_SIZE | F_FLUSH | ro | mq
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let config = self.config();
        for (at, byte) in (offset..).zip(data) {
            *byte = usize::try_from(at).ok().and_then(|at| config.get(at)).copied().unwrap_or(0);
        }
    }

    fn start(
        &self,
        queues: Vec<Option<VirtQueue>>,
        features: u64,
        port: Arc<Port>,
    ) -> Box<dyn QueueHandler> {
        Box::new(BlkQueue::new(self, queues, features, port))
    }
}

/// A request taken from the ring: what it wants and where its answer goes.
struct Request {
    chain: Chain,
    op: Op,
    offset: u64,
    status: GuestAddress,
    /// Its data: first and end index in the slot's buffers, and bytes moved so far.
    first: usize,
    end: usize,
    moved: u32,
    reads: bool,
}

/// What a chain asks for.
enum Parsed {
    Access { op: Op, offset: u64 },
    Answer { status: u8, written: u32 },
}

/// The exclusive half: one queue and its requests in flight.
struct BlkQueue {
    /// Exactly one, or none if the driver left it disabled.
    queues: Vec<VirtQueue>,
    requests: Box<[Option<Request>]>,
    /// `SEG_MAX` per slot. Written before an access and not touched until it is done.
    buffers: Box<[libc::iovec]>,
    segments: Vec<Segment>,
    io: Option<Box<dyn BlockIo>>,
    port: Arc<Port>,
    /// Slots that wait for a ring.
    backlog: VecDeque<u16>,
    in_flight: usize,
    /// Bytes asked for since the thread came here.
    asked: u64,
    geometry: Geometry,
    id: [u8; ID],
    write_through: bool,
}

// SAFETY: the iovecs point into guest memory, which is shared by all threads anyway and which the
// queue keeps alive.
unsafe impl Send for BlkQueue {}

impl BlkQueue {
    fn new(blk: &Blk, queues: Vec<Option<VirtQueue>>, features: u64, port: Arc<Port>) -> Self {
        let mut queues: Vec<VirtQueue> = queues.into_iter().flatten().collect();
        let slots = queues.first().map_or(0, |queue| usize::from(queue.size()));
        let io = match blk.backend.open_queue() {
            Ok(io) => Some(io),
            Err(error) => {
                queues.iter_mut().for_each(|queue| queue.retire(&format!("backend: {error}")));
                None
            }
        };
        // SAFETY: an iovec of zeros is valid: a null pointer and length 0.
        let buffers = unsafe { Box::new_zeroed_slice(slots * SEG_MAX).assume_init() };
        Self {
            queues,
            requests: (0..slots).map(|_| None).collect(),
            buffers,
            segments: Vec::with_capacity(SEG_MAX + 2),
            io,
            port,
            backlog: VecDeque::with_capacity(slots),
            in_flight: 0,
            asked: 0,
            geometry: blk.geometry,
            id: blk.id,
            write_through: features & F_FLUSH == 0,
        }
    }

    /// Takes requests until the ring is empty and re-armed.
    fn look(&mut self, cx: &mut Cx<'_>) -> Progress {
        let mut budget = BUDGET;
        self.asked = 0;
        let progress = loop {
            let Some(queue) = self.queues.first_mut() else { return Progress::Idle };
            queue.begin();
            if let Some(wait) = self.submit_backlog(cx) {
                break wait;
            }
            while budget > 0 && self.take_one(cx) {
                budget = if self.asked < BYTES_BUDGET { budget - 1 } else { 0 };
            }
            if !self.backlog.is_empty() {
                continue;
            }
            if budget == 0 {
                break Progress::More;
            }
            if !self.queues[0].end(cx) {
                break Progress::Idle;
            }
        };
        self.queues[0].signal(cx);
        progress
    }

    /// Takes one request; false: there is none.
    fn take_one(&mut self, cx: &mut Cx<'_>) -> bool {
        let Some(chain) = self.queues[0].pop(&mut self.segments) else { return false };
        cx.counters().requests.add(1);
        let mem = Arc::clone(self.queues[0].mem());
        let Some((header, status)) = carve(&mem, &mut self.segments) else {
            // There is no status byte to say it in.
            self.queues[0].retire("a request has no room for its header or its status");
            self.queues[0].complete(chain, 0);
            return true;
        };
        let slot = usize::from(chain.slot());
        let parsed = self.parse(&mem, header, slot);
        match parsed {
            Parsed::Answer { status: code, written } => {
                self.answer(cx, chain, status, code, written);
            }
            Parsed::Access { op, offset } => {
                let first = slot * SEG_MAX;
                let end = first + self.segments.len();
                let reads = op == Op::Read;
                let request = Request { chain, op, offset, status, first, end, moved: 0, reads };
                self.requests[slot] = Some(request);
                self.in_flight += 1;
                self.submit(slot as u16, cx);
            }
        }
        true
    }

    /// Understands a header; fills the slot's buffers if it asks for data to be moved.
    fn parse(&mut self, mem: &Mem, header: [u8; HEADER], slot: usize) -> Parsed {
        let [t0, t1, t2, t3, _, _, _, _, sector @ ..] = header;
        let sector = u64::from_le_bytes(sector);
        let (op, writes_memory) = match u32::from_le_bytes([t0, t1, t2, t3]) {
            T_IN => (Op::Read, true),
            T_OUT => (Op::Write { durable: self.write_through }, false),
            T_FLUSH => {
                self.segments.clear();
                return Parsed::Access { op: Op::Flush, offset: 0 };
            }
            T_GET_ID => return self.get_id(mem),
            _ => return Parsed::Answer { status: S_UNSUPP, written: 0 },
        };
        let failed = Parsed::Answer { status: S_IOERR, written: 0 };
        self.segments.retain(|segment| segment.writable == writes_memory);
        let bytes: u64 = self.segments.iter().map(|segment| u64::from(segment.len)).sum();
        let inside =
            sector.checked_add(bytes / SECTOR).is_some_and(|end| end <= self.geometry.sectors);
        let refused = matches!(op, Op::Write { .. }) && self.geometry.read_only;
        // Chains are limited to 4 GiB by their descriptors' total, results to 31 bits here.
        if !bytes.is_multiple_of(SECTOR) || bytes > i32::MAX as u64 || !inside || refused {
            return failed;
        }
        if self.segments.len() > SEG_MAX {
            return failed;
        }
        self.asked += bytes;
        if bytes == 0 {
            return Parsed::Answer { status: S_OK, written: 0 };
        }
        for (buffer, segment) in self.buffers[slot * SEG_MAX..].iter_mut().zip(&self.segments) {
            let len = segment.len as usize;
            let Ok(memory) = mem.get_slice(segment.address, len) else { return failed };
            let base = memory.ptr_guard_mut().as_ptr();
            *buffer = libc::iovec { iov_base: base.cast(), iov_len: len };
        }
        Parsed::Access { op, offset: sector * SECTOR }
    }

    fn get_id(&self, mem: &Mem) -> Parsed {
        let mut id = &self.id[..];
        for segment in self.segments.iter().filter(|segment| segment.writable) {
            let len = id.len().min(segment.len as usize);
            let (now, rest) = id.split_at(len);
            if mem.write_slice(now, segment.address).is_err() {
                return Parsed::Answer { status: S_IOERR, written: 0 };
            }
            id = rest;
        }
        Parsed::Answer { status: S_OK, written: (ID - id.len()) as u32 }
    }

    /// Starts the access of a slot, or puts it into the backlog.
    fn submit(&mut self, slot: u16, cx: &mut Cx<'_>) {
        loop {
            let (Some(request), Some(io)) = (&self.requests[usize::from(slot)], self.io.as_mut())
            else {
                return;
            };
            let access = Access {
                op: request.op,
                offset: request.offset,
                buffers: &self.buffers[request.first..request.end],
            };
            // SAFETY: the buffers are the slot's own and not touched until its result is there;
            // they name guest memory, which the queue keeps alive. See `Drop` for the rest.
            match unsafe { io.submit(access, &self.port, slot, cx) } {
                Submitted::Pending => return,
                Submitted::NeedsHome | Submitted::NeedsTurn => {
                    return self.backlog.push_back(slot);
                }
                Submitted::Done(result) => {
                    if !self.moved(slot, result, cx) {
                        return;
                    }
                }
            }
        }
    }

    /// Submits what waited for a ring; what that has to wait for, if anything still waits.
    fn submit_backlog(&mut self, cx: &mut Cx<'_>) -> Option<Progress> {
        for _ in 0..self.backlog.len() {
            if let Some(slot) = self.backlog.pop_front() {
                self.submit(slot, cx);
            }
        }
        if self.backlog.is_empty() {
            return None;
        }
        Some(if cx.on_vcpu() { Progress::Home } else { Progress::More })
    }

    /// Takes in a result; true: the access was shorter than asked for and goes on.
    fn moved(&mut self, slot: u16, result: i32, cx: &mut Cx<'_>) -> bool {
        let Some(request) = self.requests[usize::from(slot)].as_mut() else { return false };
        let mut status = S_OK;
        if request.op != Op::Flush {
            match u32::try_from(result) {
                Err(_) if result == -libc::EINTR || result == -libc::EAGAIN => return true,
                // Nothing moved: the image has become shorter than the disk.
                Err(_) | Ok(0) => status = S_IOERR,
                Ok(count) => {
                    request.moved += count;
                    request.offset += u64::from(count);
                    if advance(&mut self.buffers, request, count as usize) {
                        return true;
                    }
                }
            }
        } else if result < 0 {
            status = S_IOERR;
        }
        if let Some(request) = self.requests[usize::from(slot)].take() {
            self.in_flight -= 1;
            let written = if request.reads { request.moved } else { 0 };
            self.answer(cx, request.chain, request.status, status, written);
        }
        false
    }

    /// Writes the status and gives the chain back. `written` counts the data alone.
    fn answer(&mut self, cx: &Cx<'_>, chain: Chain, at: GuestAddress, status: u8, written: u32) {
        let queue = &mut self.queues[0];
        // `carve` has seen that the status byte lies in memory.
        let _ = queue.mem().write_obj(status, at);
        cx.counters().completions.add(1);
        queue.complete(chain, written + 1);
    }
}

/// Skips `count` bytes of a request's buffers; true: there are more.
fn advance(buffers: &mut [libc::iovec], request: &mut Request, mut count: usize) -> bool {
    while let Some(buffer) = buffers[request.first..request.end].first_mut() {
        if count < buffer.iov_len {
            buffer.iov_base = buffer.iov_base.cast::<u8>().wrapping_add(count).cast();
            buffer.iov_len -= count;
            return true;
        }
        count -= buffer.iov_len;
        request.first += 1;
    }
    false
}

/// Cuts the header off the front of the readable part and the status byte off the end of the
/// writable part, however the driver has split them over descriptors (§2.7.4).
fn carve(mem: &Mem, segments: &mut Vec<Segment>) -> Option<([u8; HEADER], GuestAddress)> {
    let status = segments.last_mut().filter(|last| last.writable)?;
    status.len -= 1;
    let status = status.address.0.checked_add(u64::from(status.len)).map(GuestAddress)?;
    if !mem.address_in_range(status) {
        return None;
    }
    let mut header = [0; HEADER];
    let mut got = 0;
    for segment in segments.iter_mut().take_while(|segment| !segment.writable) {
        let len = (HEADER - got).min(segment.len as usize);
        mem.read_slice(&mut header[got..got + len], segment.address).ok()?;
        segment.address = GuestAddress(segment.address.0.checked_add(len as u64)?);
        segment.len -= len as u32;
        got += len;
        if got == HEADER {
            break;
        }
    }
    segments.retain(|segment| segment.len > 0);
    (got == HEADER).then_some((header, status))
}

impl QueueHandler for BlkQueue {
    fn kick(&mut self, cx: &mut Cx<'_>) -> Progress {
        self.look(cx)
    }

    fn completed(&mut self, cx: &mut Cx<'_>) -> Progress {
        let port = Arc::clone(&self.port);
        port.take(|slot, result| {
            if self.moved(slot, result, cx) {
                self.submit(slot, cx);
            }
        });
        self.look(cx)
    }

    fn in_flight(&self) -> usize {
        self.in_flight
    }

    fn queues(&mut self) -> &mut [VirtQueue] {
        &mut self.queues
    }
}

impl Drop for BlkQueue {
    fn drop(&mut self) {
        if self.in_flight > 0 {
            // Only when the process is about to end with a backend that never answered: the
            // kernel may still use the buffers and the file, so they must outlive this.
            std::mem::forget(std::mem::take(&mut self.buffers));
            std::mem::forget(self.io.take());
            self.queues.first().inspect(|queue| std::mem::forget(Arc::clone(queue.mem())));
        }
    }
}
