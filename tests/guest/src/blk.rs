//! virtio-blk: every vCPU writes and reads its own part of the disk through its own queue.

use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;
use core::sync::atomic::Ordering;

use crate::apic::{Clock, now};
use crate::cpu::Cpu;
use crate::mem;
use crate::options::Options;
use crate::pattern::{self, SECTOR, Stamp};
use crate::plan::{PHASES, Phase, Plan};
use crate::virtio::{self, Desc, Found, Place, Ring, Segment, Transport};
use crate::wait::Waiter;

pub const DEVICE: u16 = virtio::MODERN + 2;

const F_SIZE_MAX: u64 = 1 << 1;
const F_SEG_MAX: u64 = 1 << 2;
const F_RO: u64 = 1 << 5;
const F_BLK_SIZE: u64 = 1 << 6;
const F_FLUSH: u64 = 1 << 9;
const F_MQ: u64 = 1 << 12;

const T_IN: u32 = 0;
const T_OUT: u32 = 1;
const T_FLUSH: u32 = 4;
const T_GET_ID: u32 = 8;
const ID_BYTES: usize = 20;

/// Rings are at most this large.
const RING: u16 = 256;
/// No more requests are in flight than this; most take two descriptors and more.
pub const MAX_DEPTH: u16 = RING / 2;
/// What a buffer holds before the device fills it.
const POISON: u8 = 0xa5;
/// A status no device answers.
const NO_STATUS: u8 = 0xee;

/// A disk as all CPUs see it.
pub struct Disk {
    pub index: u32,
    pub place: Place,
    transport: Transport,
    pub features: u64,
    pub sectors: u64,
    pub queues: u16,
    pub queue_size: u16,
    /// Sectors of a request.
    pub chunk: u64,
    pub depth: u16,
    one_segment: bool,
}

/// One vCPU's queue of one disk, and what came of it.
pub struct Lane {
    ring: Ring,
    /// The vector of its interrupts on its CPU.
    vector: u8,
    pub plan: Plan,
    pub id: String,
    /// Whether all phases went well.
    pub complete: bool,
    pub requests: u64,
    pub bytes: u64,
    pub interrupts: u64,
    pub phases: [PhaseResult; 4],
}

#[derive(Clone, Copy, Default)]
pub struct PhaseResult {
    pub requests: u64,
    pub kicks: u64,
    pub interrupts: u64,
    pub ticks: u64,
}

impl Lane {
    pub fn queue(&self) -> u16 {
        self.ring.queue()
    }

    pub fn kicks(&self) -> u64 {
        self.ring.kicks()
    }
}

impl Disk {
    pub fn has(&self, feature: u64) -> bool {
        self.features & feature != 0
    }

    pub fn read_only(&self) -> bool {
        self.has(F_RO)
    }

    /// The features in words.
    pub fn feature_names(&self) -> Vec<&'static str> {
        [
            (F_MQ, "mq"),
            (F_FLUSH, "flush"),
            (F_RO, "read-only"),
            (virtio::F_EVENT_IDX, "event-idx"),
            (virtio::F_INDIRECT, "indirect"),
        ]
        .into_iter()
        .filter_map(|(bit, name)| self.has(bit).then_some(name))
        .collect()
    }

    /// Sets a disk up with a queue for each of the first CPUs, as many as it has queues.
    pub fn start(
        found: &Found,
        index: u32,
        vector: u8,
        cpus: &[Cpu],
        options: &Options,
    ) -> Result<(Disk, Vec<Lane>), String> {
        let transport = Transport::open(found)?;
        let mut wanted = F_SIZE_MAX | F_SEG_MAX | F_RO | F_BLK_SIZE | F_FLUSH | F_MQ;
        if options.event_idx {
            wanted |= virtio::F_EVENT_IDX;
        }
        if options.indirect {
            wanted |= virtio::F_INDIRECT;
        }
        let features = transport.negotiate(wanted)?;
        let has = |feature| features & feature != 0;
        let (sectors, size_max, seg_max, block, queues) = transport.config(|c| {
            let capacity = u64::from(c.read32(0)) | u64::from(c.read32(4)) << 32;
            (
                capacity,
                if has(F_SIZE_MAX) { c.read32(8) } else { u32::MAX },
                if has(F_SEG_MAX) { c.read32(12) } else { 1 },
                if has(F_BLK_SIZE) { c.read32(20) } else { 512 },
                if has(F_MQ) { c.read16(34) } else { 1 },
            )
        })?;
        if queues == 0 || queues > transport.num_queues() {
            return Err(format!("{queues} queues, of {} there", transport.num_queues()));
        }
        let block = u64::from(block).max(512) / 512;
        let mut chunk = u64::from(options.size.min(size_max)) / 512;
        chunk = (1 << chunk.max(1).ilog2()).max(block);
        let lanes = u64::from(queues).min(cpus.len() as u64).min(sectors / block);
        while chunk > block && sectors / lanes.max(1) < chunk {
            chunk /= 2;
        }
        let queue_size = transport.queue_size(0).min(RING);
        if queue_size < 4 {
            return Err(format!("queues of {queue_size} entries"));
        }
        let depth = options.depth.min(queue_size);
        let disk = Disk {
            index,
            place: found.place(),
            transport,
            features,
            sectors,
            queues,
            queue_size,
            chunk,
            depth,
            one_segment: seg_max < 3 || queue_size < 8,
        };
        let lanes = disk.start_queues(&cpus[..lanes as usize], vector, options)?;
        disk.transport.driver_ok();
        Ok((disk, lanes))
    }

    fn start_queues(
        &self,
        cpus: &[Cpu],
        vector: u8,
        options: &Options,
    ) -> Result<Vec<Lane>, String> {
        if let Some(home) = cpus.first() {
            self.transport.route_config(home)?;
        }
        let mut lanes = Vec::with_capacity(cpus.len());
        for (queue, cpu) in cpus.iter().enumerate() {
            let number = queue as u16;
            let vector = self.transport.route_queue(number, cpu, vector)?;
            let event_idx = self.has(virtio::F_EVENT_IDX);
            let ring = self.transport.start_queue(number, self.queue_size, event_idx);
            lanes.push(Lane {
                ring,
                vector,
                plan: Plan::new(
                    self.sectors,
                    cpus.len() as u64,
                    queue as u64,
                    self.chunk,
                    options.requests,
                    options.span,
                ),
                id: String::new(),
                complete: false,
                requests: 0,
                bytes: 0,
                interrupts: 0,
                phases: [PhaseResult::default(); 4],
            });
        }
        Ok(lanes)
    }

    /// After all work: is the device well, and does it stop?
    pub fn stop(&self) -> Result<(), String> {
        self.transport.check()?;
        self.transport.reset()
    }
}

/// What one request keeps in memory beside its data.
#[repr(C, align(128))]
struct Slot {
    kind: u32,
    reserved: u32,
    sector: u64,
    table: [Desc; 6],
    status: u8,
}

/// Memory for the requests of one vCPU; its lanes take turns.
pub struct Buffers {
    slots: *mut Slot,
    data: *mut u8,
    count: u16,
    /// Bytes of data per slot.
    bytes: usize,
}

// SAFETY: the memory belongs to this value alone (and to devices it is lent to).
unsafe impl Send for Buffers {}

impl Buffers {
    /// Memory one vCPU needs.
    pub fn bytes(count: u16, chunk: u64) -> u64 {
        u64::from(count) * (size_of::<Slot>() as u64 + chunk * SECTOR as u64)
    }

    /// Takes the memory without touching it; whoever uses it pays for that, in parallel.
    pub fn new(count: u16, chunk: u64) -> Self {
        let bytes = chunk as usize * SECTOR;
        Buffers {
            slots: mem::pages(usize::from(count) * size_of::<Slot>()).as_mut_ptr().cast(),
            data: mem::pages(usize::from(count) * bytes).as_mut_ptr(),
            count,
            bytes,
        }
    }

    fn slot(&self, slot: u16) -> *mut Slot {
        assert!(slot < self.count);
        self.slots.wrapping_add(slot.into())
    }

    /// The data of a slot that is not in flight.
    fn data(&mut self, slot: u16, bytes: usize) -> &mut [u8] {
        assert!(slot < self.count && bytes <= self.bytes);
        // SAFETY: within our memory, and the device is not writing there: the slot is not in
        // flight, or its completion was seen with acquire order.
        unsafe {
            core::slice::from_raw_parts_mut(self.data.add(usize::from(slot) * self.bytes), bytes)
        }
    }
}

/// A request in a slot.
#[derive(Clone, Copy)]
struct Request {
    kind: u32,
    bytes: usize,
    stamp: Stamp,
}

/// One vCPU at work on one disk.
pub struct Driver<'a> {
    pub cpu: &'a Cpu,
    pub clock: Clock,
    pub options: &'a Options,
    pub disk: &'a Disk,
    pub buffers: &'a mut Buffers,
}

/// A driver with a lane in hand.
struct Run<'a, 'b> {
    driver: &'a mut Driver<'b>,
    lane: &'a mut Lane,
    waiter: Waiter<'a>,
    free: Vec<u16>,
    requests: Vec<Request>,
    /// The vector to sleep for, `None` to poll.
    interrupts: Option<u8>,
    /// Counts submissions, to vary their shape.
    turn: u32,
}

impl Driver<'_> {
    /// All phases, with get-id before and a flush after them.
    pub fn run(&mut self, lane: &mut Lane) -> Result<(), String> {
        let vector = lane.vector;
        let before = self.cpu.count(vector);
        let waiter = Waiter::new(self.cpu, self.clock, self.options.watchdog);
        let depth = self.disk.depth.min(self.buffers.count);
        let nothing = Stamp { disk: 0, vcpu: 0, generation: 0, lba: 0 };
        let mut run = Run {
            free: (0..depth).rev().collect(),
            requests: (0..depth).map(|_| Request { kind: 0, bytes: 0, stamp: nothing }).collect(),
            driver: self,
            lane,
            waiter,
            interrupts: None,
            turn: 0,
        };
        let result = run.all();
        lane.complete = result.is_ok();
        lane.interrupts = self.cpu.count(vector) - before;
        result
    }
}

impl Run<'_, '_> {
    fn all(&mut self) -> Result<(), String> {
        self.at(PHASES.len());
        self.one(T_GET_ID, ID_BYTES)?;
        for (phase, Phase { name, .. }) in PHASES.iter().enumerate() {
            self.at(phase);
            self.phase(phase).map_err(|e| format!("{name}: {e}"))?;
        }
        self.at(PHASES.len());
        if self.driver.disk.has(F_FLUSH) {
            self.one(T_FLUSH, 0)?;
        }
        Ok(())
    }

    /// Leaves a note for the watchdog.
    fn at(&self, phase: usize) {
        let at = (self.driver.disk.index + 1) << 16 | phase as u32;
        self.driver.cpu.at.store(at, Ordering::Relaxed);
    }

    fn phase(&mut self, phase: usize) -> Result<(), String> {
        let (cpu, vector) = (self.driver.cpu, self.lane.vector);
        let begin = now();
        let before = (self.lane.requests, self.lane.kicks(), cpu.count(vector));
        self.interrupts = PHASES[phase].interrupts.then_some(vector);
        let depth = if PHASES[phase].full { self.requests.len() } else { 1 };
        let first = if self.driver.disk.read_only() { T_IN } else { T_OUT };
        for round in 0..self.lane.plan.rounds {
            self.pass(first, phase, round, depth)?;
            self.pass(T_IN, phase, round, depth)?;
        }
        if self.interrupts.is_some() {
            self.waiter.expect_interrupt(vector, before.2)?;
        }
        self.lane.phases[phase] = PhaseResult {
            requests: self.lane.requests - before.0,
            kicks: self.lane.kicks() - before.1,
            interrupts: cpu.count(vector) - before.2,
            ticks: now() - begin,
        };
        Ok(())
    }

    /// One request for every chunk of the window, `depth` of them in flight at most.
    fn pass(&mut self, kind: u32, phase: usize, round: u32, depth: usize) -> Result<(), String> {
        let window = self.lane.plan.window;
        let bytes = self.driver.disk.chunk as usize * SECTOR;
        let (mut next, mut done) = (0, 0);
        while done < window {
            while next < window && next - done < depth as u64 {
                let stamp = Stamp {
                    disk: self.driver.disk.index,
                    vcpu: self.driver.cpu.index.load(Ordering::Relaxed),
                    generation: self.lane.plan.generation(phase, round),
                    lba: self.lane.plan.sector(phase, next),
                };
                if !self.submit(Request { kind, bytes, stamp }) {
                    break;
                }
                next += 1;
            }
            done += self.reap()?;
        }
        Ok(())
    }

    /// A single request, for what is not data.
    fn one(&mut self, kind: u32, bytes: usize) -> Result<(), String> {
        let stamp = Stamp { disk: 0, vcpu: 0, generation: 0, lba: 0 };
        self.interrupts = None;
        self.submit(Request { kind, bytes, stamp });
        self.reap().map(|_| ())
    }

    /// Puts a request into the ring; false if there is no room.
    fn submit(&mut self, request: Request) -> bool {
        let Some(&slot) = self.free.last() else { return false };
        let (segments, count) = self.segments(slot, &request);
        let segments = &segments[..count];
        // Half of the requests are chains, half are indirect; what does not fit as a chain may
        // still fit as one descriptor.
        let can_indirect = self.driver.disk.has(virtio::F_INDIRECT);
        let chain = !(can_indirect && self.turn % 2 == 1) && self.lane.ring.fits(count);
        let indirect = !chain && can_indirect && self.lane.ring.fits(1);
        if !chain && !indirect {
            return false;
        }
        self.free.pop();
        self.turn = self.turn.wrapping_add(1);
        self.prepare(slot, &request);
        self.requests[usize::from(slot)] = request;
        if chain {
            self.lane.ring.add(segments, slot);
        } else {
            let memory = self.driver.buffers.slot(slot);
            // SAFETY: the slot's table has room for all segments there can be, and is left alone
            // until the slot is free again.
            unsafe {
                self.lane.ring.add_indirect(segments, slot, (&raw mut (*memory).table).cast());
            }
        }
        true
    }

    /// Header, one to three pieces of data, status.
    fn segments(&self, slot: u16, request: &Request) -> ([Segment; 5], usize) {
        let memory = self.driver.buffers.slot(slot);
        let data =
            self.driver.buffers.data as u64 + u64::from(slot) * self.driver.buffers.bytes as u64;
        let device_writes = request.kind != T_OUT;
        let header = Segment { address: memory as u64, bytes: 16, device_writes: false };
        let mut segments = [header; 5];
        let mut count = 1;
        let mut piece = |from: usize, to: usize| {
            if from < to {
                let bytes = (to - from) as u32;
                segments[count] = Segment { address: data + from as u64, bytes, device_writes };
                count += 1;
            }
        };
        let n = request.bytes;
        let plain = self.driver.disk.one_segment || n < SECTOR;
        match self.turn % 16 {
            _ if plain => piece(0, n),
            // Pieces that end in the middle of a sector are unusual and allowed.
            13 => {
                piece(0, (n / 3) & !3);
                piece((n / 3) & !3, n);
            }
            turn if turn % 3 == 1 && n >= 2 * SECTOR => {
                piece(0, SECTOR);
                piece(SECTOR, n);
            }
            turn if turn % 3 == 2 && n >= 4 * SECTOR => {
                piece(0, n / 2);
                piece(n / 2, n - SECTOR);
                piece(n - SECTOR, n);
            }
            _ => piece(0, n),
        }
        // SAFETY: only the address of a field of our memory is taken.
        let status = unsafe { &raw const (*memory).status } as u64;
        segments[count] = Segment { address: status, bytes: 1, device_writes: true };
        (segments, count + 1)
    }

    /// Fills the slot's memory for a request.
    fn prepare(&mut self, slot: u16, request: &Request) {
        let memory = self.driver.buffers.slot(slot);
        // SAFETY: the slot is free, so no device uses its memory.
        unsafe {
            (*memory).kind = request.kind;
            (*memory).reserved = 0;
            (*memory).sector = request.stamp.lba;
            (*memory).status = NO_STATUS;
        }
        let data = self.driver.buffers.data(slot, request.bytes);
        if request.kind != T_OUT {
            data.fill(POISON);
            return;
        }
        let mut stamp = request.stamp;
        for sector in data.as_chunks_mut::<SECTOR>().0 {
            pattern::expected(&stamp, sector);
            stamp.lba += 1;
        }
    }

    /// Kicks, waits for completions, and takes them all. Returns how many there were.
    fn reap(&mut self) -> Result<u64, String> {
        self.waiter.prepare(&mut self.lane.ring, self.interrupts);
        self.lane.ring.kick();
        let disk = self.driver.disk;
        self.waiter.wait(&mut self.lane.ring, &disk.transport, self.interrupts)?;
        let mut count = 0;
        while let Some(used) = self.lane.ring.pop()? {
            self.complete(used.token, used.bytes)?;
            count += 1;
        }
        self.driver.cpu.progress.fetch_add(count, Ordering::Relaxed);
        Ok(count)
    }

    /// Checks one completion: status, length and every byte.
    fn complete(&mut self, slot: u16, written: u32) -> Result<(), String> {
        let request = self.requests[usize::from(slot)];
        let what = match request.kind {
            T_IN => "read",
            T_OUT => "write",
            T_FLUSH => "flush",
            _ => "get-id",
        };
        let lba = request.stamp.lba;
        // SAFETY: the request is complete, the device is done with the slot.
        let status =
            unsafe { (&raw const (*self.driver.buffers.slot(slot)).status).read_volatile() };
        match status {
            0 => {}
            1 => return Err(format!("{what} at sector {lba}: I/O error")),
            2 => return Err(format!("{what} at sector {lba}: not supported")),
            NO_STATUS => return Err(format!("{what} at sector {lba}: no status written")),
            other => return Err(format!("{what} at sector {lba}: status {other}")),
        }
        let device_wrote = if request.kind == T_OUT { 0 } else { request.bytes };
        if written as usize != device_wrote + 1 {
            return Err(format!(
                "{what} at sector {lba}: {written} bytes reported as written, not {}",
                device_wrote + 1
            ));
        }
        let read_only = self.driver.disk.read_only();
        let data = self.driver.buffers.data(slot, request.bytes);
        match request.kind {
            T_IN if !read_only => verify(request.stamp, data)?,
            T_IN if data.iter().all(|&b| b == POISON) => {
                return Err(format!("read at sector {lba}: the buffer was left as it was"));
            }
            T_GET_ID => {
                let end = data.iter().position(|&b| b == 0).unwrap_or(data.len());
                self.lane.id = String::from_utf8_lossy(&data[..end]).trim().into();
            }
            _ => {}
        }
        if matches!(request.kind, T_IN | T_OUT) {
            self.lane.bytes += request.bytes as u64;
        }
        self.lane.requests += 1;
        self.free.push(slot);
        Ok(())
    }
}

/// Compares what was read with what the stamp says, and tells what it is instead.
fn verify(mut stamp: Stamp, data: &[u8]) -> Result<(), String> {
    for sector in data.as_chunks::<SECTOR>().0 {
        if let Err(offset) = pattern::check(&stamp, sector) {
            let found = match Stamp::read(sector) {
                Some(found) if found != stamp => format!("it holds {found:?}"),
                _ => format!("byte {offset} is {:#04x}", sector[offset]),
            };
            return Err(format!("read of {stamp:?}: {found}"));
        }
        stamp.lba += 1;
    }
    Ok(())
}
