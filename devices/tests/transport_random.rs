//! Millions of random accesses to virtio-pci devices: nothing panics, nothing hangs, and after a
//! reset the devices serve an orderly driver.
//!
//! Noise alone would never get past the feature bits, so a driver that mostly knows what it does
//! brings the devices up and uses them, and noise comes between its steps. The seed is printed on
//! failure; `HEDDLE_SEED` sets it.

use std::fs::File;
use std::hash::{BuildHasher, RandomState};
use std::os::unix::fs::FileExt;
use std::panic::resume_unwind;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::*};
use std::time::Duration;

use devices::block::raw::{Engine, Options, RawImage};
use devices::virtio::blk::Blk;
use devices::virtio::rng::Rng;
use devices::virtio::seat::Placement;
use devices::virtio::testing::{Board, TestLoop};
use devices::virtio::{F_EVENT_IDX, F_INDIRECT_DESC, F_VERSION_1, Mem};
use iothread::{PollPolicy, VcpuLoop};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

/// Accesses of one machine; every test has one for each of [`RUNS`].
const STEPS: u64 = 1_000_000;

/// Do loops poll, and is there a second vCPU?
const RUNS: [(bool, bool); 4] = [(false, false), (true, false), (false, true), (true, true)];

/// How long nothing may happen.
const PATIENCE: Duration = Duration::from_secs(30);

/// Guest memory: two pieces with a hole between them.
const PIECE: u64 = 1 << 20;
const SECOND: u64 = 4 << 20;

/// Where the driver has what.
const RINGS: u64 = 0x1_0000;
const RING: u64 = 0x4000;
const HEADERS: u64 = 0x7_0000;
const DATA: u64 = 0x8_0000;

/// The status byte and the buffers of slot `n`; a chain of the driver has 4 descriptors at most.
const CHAIN: u16 = 4;
const HEADER: u64 = 32;
const BUFFER: u64 = 1024;

const QUEUE_SIZE: u16 = 64;
/// What the driver's memory has room for.
const MOST: u16 = 256;
const SECTORS: u64 = 512;

/// Offsets in BAR 0.
const STATUS: u64 = 20;
const ISR: u64 = 0x1000;
const CONFIG: u64 = 0x2000;
const NOTIFY: u64 = 0x3000;

const DRIVER_OK: u8 = 4;
const FEATURES_OK: u8 = 8;
const NEEDS_RESET: u8 = 64;

/// Offsets in configuration space.
const COMMAND: u16 = 4;
const BARS: [u16; 2] = [0x10, 0x18];

/// Descriptor flags.
const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// A small fast generator (xorshift64*).
struct Dice(u64);

impl Dice {
    fn roll(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, limit: u64) -> u64 {
        ((u128::from(self.roll()) * u128::from(limit)) >> 64) as u64
    }

    fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }

    fn of<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.below(choices.len() as u64) as usize]
    }

    /// A number that somebody may not have thought of.
    fn odd(&mut self) -> u64 {
        match self.below(10) {
            0 => 0,
            1 => u64::MAX,
            2 => self.below(8),
            3 => 1 << self.below(64),
            4 => (1u64 << self.below(64)).wrapping_sub(1),
            5 => self.of(&[PIECE, SECOND, SECOND + PIECE]).wrapping_add(self.below(64)) - 32,
            6 => RINGS + self.below(4 * RING),
            7 => DATA + self.below(0x1_0000),
            8 => u64::MAX - self.below(64),
            _ => self.roll(),
        }
    }
}

/// What one test has seen, over all its machines.
#[derive(Default)]
struct Seen {
    steps: AtomicU64,
    running: AtomicU64,
    needs_reset: AtomicU64,
    completions: AtomicU64,
}

/// A function as its driver knows it.
#[derive(Clone)]
struct Device {
    slot: u8,
    queues: u16,
    blk: bool,
    /// Where the BARs were at first, and where they are now.
    home: [u64; 2],
    bars: [u64; 2],
    msix: u16,
    rings: Vec<Ring>,
    event_idx: bool,
    indirect: bool,
    /// Its status when it was last read.
    status: u8,
}

#[derive(Clone)]
struct Ring {
    base: u64,
    size: u16,
    added: u16,
    used: u16,
}

impl Ring {
    fn descriptor(&self, at: u16) -> u64 {
        self.base + 16 * u64::from(at)
    }
    fn available(&self) -> u64 {
        self.base + 0x1000
    }
    fn used(&self) -> u64 {
        self.base + 0x2000
    }
    fn table(&self, slot: u16) -> u64 {
        self.base + 0x3000 + 64 * u64::from(slot)
    }
}

/// A vCPU with a driver on it.
struct Guest<'a> {
    board: &'a Board,
    seen: &'a Seen,
    vcpu: VcpuLoop,
    dice: Dice,
    devices: Vec<Device>,
    /// One step in this many is followed by noise; 0: none.
    noise: u64,
    /// The noise is over: what the driver asks for has to happen.
    orderly: bool,
}

impl<'a> Guest<'a> {
    fn new(board: &'a Board, seen: &'a Seen, devices: Vec<Device>, seed: u64) -> Self {
        let (vcpu, dice) = (VcpuLoop::enter(), Dice(seed | 1));
        Self { board, seen, vcpu, dice, devices, noise: 0, orderly: false }
    }

    // Single accesses.

    fn step(&mut self) {
        if self.orderly {
            return; // the watchdog shall see a wait without end
        }
        self.seen.steps.fetch_add(1, Relaxed);
        if self.noise != 0 && self.dice.one_in(self.noise) {
            let noise = std::mem::take(&mut self.noise);
            for _ in 0..self.dice.below(3) {
                self.make_noise();
            }
            self.noise = noise;
        }
    }

    fn store(&mut self, address: u64, data: &[u8]) {
        // The driver's own addresses are good; those of the noise need not be.
        let _ = self.board.mem.write_slice(data, GuestAddress(address));
        self.step();
    }

    fn load_u16(&mut self, address: u64) -> u16 {
        self.step();
        self.board.mem.load(GuestAddress(address), Acquire).unwrap_or(0)
    }

    fn write(&mut self, address: u64, data: &[u8]) {
        self.board.write(address, data, &mut self.vcpu.exit());
        self.step();
    }

    fn read(&mut self, address: u64, len: usize) -> u64 {
        let mut data = [0; 8];
        self.board.read(address, &mut data[..len], &mut self.vcpu.exit());
        self.step();
        u64::from_le_bytes(data)
    }

    fn set(&mut self, device: usize, register: u64, value: u64, len: usize) {
        self.write(self.devices[device].bars[0] + register, &value.to_le_bytes()[..len]);
    }

    fn get(&mut self, device: usize, register: u64, len: usize) -> u64 {
        self.read(self.devices[device].bars[0] + register, len)
    }

    /// Writes configuration space in one of the two ways.
    fn configure(&mut self, device: usize, offset: u16, value: u32) {
        let slot = self.devices[device].slot;
        let exit = &mut self.vcpu.exit();
        if self.dice.0 & 1 == 0 {
            let address = Board::ECAM + (u64::from(slot) << 15) + u64::from(offset);
            self.board.write(address, &value.to_le_bytes(), exit);
        } else {
            let address = 1 << 31 | u32::from(slot) << 11 | u32::from(offset & 0xfc);
            self.board.write_port(0xcf8, &address.to_le_bytes(), exit);
            self.board.write_port(0xcfc, &value.to_le_bytes(), exit);
        }
        self.step();
    }

    fn configuration(&mut self, device: usize, offset: u16) -> u32 {
        let slot = self.devices[device].slot;
        self.read(Board::ECAM + (u64::from(slot) << 15) + u64::from(offset & 0xffc), 4) as u32
    }

    // A driver that mostly knows what it does.

    /// Finds the BARs and the capability of MSI-X.
    fn find(&mut self, device: usize) {
        self.look_for_bars(device);
        self.devices[device].home = self.devices[device].bars;
        let mut at = self.configuration(device, 0x34) as u16;
        loop {
            let capability = self.configuration(device, at);
            if capability as u8 == 0x11 {
                self.devices[device].msix = at;
                return;
            }
            at = capability as u16 >> 8;
            assert_ne!(at, 0, "a device without MSI-X");
        }
    }

    fn look_for_bars(&mut self, device: usize) {
        for (nth, bar) in BARS.into_iter().enumerate() {
            let low = self.configuration(device, bar) & !0xf;
            let high = self.configuration(device, bar + 4);
            self.devices[device].bars[nth] = u64::from(high) << 32 | u64::from(low);
        }
    }

    /// Brings all BARs back to where they were.
    fn tidy_bars(&mut self) {
        for device in 0..self.devices.len() {
            self.configure(device, COMMAND, 0);
        }
        for device in 0..self.devices.len() {
            for (nth, bar) in BARS.into_iter().enumerate() {
                let home = self.devices[device].home[nth];
                self.configure(device, bar, home as u32);
                self.configure(device, bar + 4, (home >> 32) as u32);
            }
            self.configure(device, COMMAND, 6);
            self.devices[device].bars = self.devices[device].home;
        }
    }

    fn status(&mut self, device: usize) -> u8 {
        let status = self.get(device, STATUS, 1) as u8;
        // Once per life: bits that are new, where the device answers at all.
        let known = &mut self.devices[device].status;
        let new = if status == 0xff { 0 } else { status & !*known };
        *known = if status == 0xff { *known } else { status };
        self.seen.running.fetch_add(u64::from(new & DRIVER_OK != 0), Relaxed);
        self.seen.needs_reset.fetch_add(u64::from(new & NEEDS_RESET != 0), Relaxed);
        status
    }

    /// Resets a device; false: it did not answer in time, because noise has moved it.
    fn reset(&mut self, device: usize) -> bool {
        self.set(device, STATUS, 0, 1);
        for _ in 0..if self.orderly { u64::MAX } else { 200 } {
            if self.status(device) == 0 {
                return true;
            }
            std::thread::yield_now();
        }
        false
    }

    /// Brings a device up with rings of its own. Without noise, this works.
    fn bring_up(&mut self, device: usize) -> bool {
        if !self.reset(device) {
            return false;
        }
        let offered = {
            self.set(device, 0, 0, 4);
            let low = self.get(device, 4, 4);
            self.set(device, 0, 1, 4);
            self.get(device, 4, 4) << 32 | low
        };
        let mut features = offered;
        for feature in [F_EVENT_IDX, F_INDIRECT_DESC] {
            if self.dice.one_in(2) {
                features &= !feature;
            }
        }
        self.devices[device].event_idx = features & F_EVENT_IDX != 0;
        self.devices[device].indirect = features & F_INDIRECT_DESC != 0;
        self.set(device, STATUS, 1, 1);
        self.set(device, STATUS, 3, 1);
        for half in 0..2 {
            self.set(device, 8, half, 4);
            self.set(device, 12, features >> (32 * half) & 0xffff_ffff, 4);
        }
        self.set(device, STATUS, (3 | FEATURES_OK).into(), 1);
        if self.orderly {
            assert_ne!(offered & F_VERSION_1, 0);
            assert_ne!(self.status(device) & FEATURES_OK, 0, "the features were refused");
        }
        self.set_up_vectors(device);
        for queue in 0..self.devices[device].queues {
            self.set_up_queue(device, queue);
        }
        self.set(device, STATUS, (3 | FEATURES_OK | DRIVER_OK).into(), 1);
        let status = self.status(device);
        status & (DRIVER_OK | NEEDS_RESET) == DRIVER_OK
    }

    fn set_up_vectors(&mut self, device: usize) {
        let table = self.devices[device].bars[1];
        for vector in 0..=u64::from(self.devices[device].queues) {
            self.write(table + 16 * vector, &0xfee0_0000u64.to_le_bytes());
            self.write(table + 16 * vector + 8, &(0x30 + vector).to_le_bytes());
        }
        self.configure(device, self.devices[device].msix, 0x8000_0000);
        self.set(device, 16, 0, 2);
    }

    fn set_up_queue(&mut self, device: usize, queue: u16) {
        // With noise, sometimes more than there may be.
        let sizes = [QUEUE_SIZE, QUEUE_SIZE, QUEUE_SIZE, QUEUE_SIZE / 2, MOST / 2, MOST];
        let size = if self.orderly { QUEUE_SIZE } else { self.dice.of(&sizes) };
        let ring = &mut self.devices[device].rings[usize::from(queue)];
        (ring.size, ring.added, ring.used) = (size, 0, 0);
        let ring = ring.clone();
        self.store(ring.available(), &[0; 4 + 2 * MOST as usize + 2]);
        self.store(ring.used(), &[0; 4 + 8 * MOST as usize + 2]);
        self.set(device, 22, queue.into(), 2);
        self.set(device, 24, size.into(), 2);
        self.set(device, 26, u64::from(queue) + 1, 2);
        for (register, address) in [(32, ring.base), (40, ring.available()), (48, ring.used())] {
            if self.dice.one_in(2) {
                self.set(device, register, address, 8);
            } else {
                self.set(device, register, address & 0xffff_ffff, 4);
                self.set(device, register + 4, address >> 32, 4);
            }
        }
        self.set(device, 28, 1, 2);
    }

    fn descriptor(&mut self, at: u64, address: u64, len: u32, flags: u16, next: u16) {
        let mut raw = [0; 16];
        raw[..8].copy_from_slice(&address.to_le_bytes());
        raw[8..12].copy_from_slice(&len.to_le_bytes());
        raw[12..14].copy_from_slice(&flags.to_le_bytes());
        raw[14..].copy_from_slice(&next.to_le_bytes());
        self.store(at, &raw);
    }

    /// Adds one request and kicks; the slot it took, or `None` if the ring is full.
    fn request(&mut self, device: usize, queue: u16, kind: u32, sector: u64) -> Option<u16> {
        let Device { blk, indirect, ref rings, .. } = self.devices[device];
        let ring = rings[usize::from(queue)].clone();
        if ring.added.wrapping_sub(ring.used) >= ring.size / CHAIN {
            return None;
        }
        let slot = ring.added % (ring.size / CHAIN);
        let (head, header) = (CHAIN * slot, HEADERS + ring.base - RINGS + HEADER * u64::from(slot));
        let data = buffer(&ring, slot);
        let indirect = indirect && self.dice.one_in(2);
        let (table, first) = if indirect { (ring.table(slot), 0) } else { (ring.base, head) };
        let entry = |nth: u16| table + 16 * u64::from(first + nth);
        if blk {
            let mut bytes = [0; 17];
            bytes[..4].copy_from_slice(&kind.to_le_bytes());
            bytes[8..16].copy_from_slice(&sector.to_le_bytes());
            bytes[16] = 0xaa;
            self.store(header, &bytes);
            let writes = if kind == 1 { 0 } else { WRITE };
            self.descriptor(entry(0), header, 16, NEXT, first + 1);
            self.descriptor(entry(1), data, 200, NEXT | writes, first + 2);
            self.descriptor(entry(2), data + 200, 312, NEXT | writes, first + 3);
            self.descriptor(entry(3), header + 16, 1, WRITE, 0);
        } else {
            self.descriptor(entry(0), data, 100, NEXT | WRITE, first + 1);
            self.descriptor(entry(1), data + 100, 412, WRITE, 0);
        }
        if indirect {
            let len = if blk { 64 } else { 32 };
            self.descriptor(ring.descriptor(head), table, len, INDIRECT, 0);
        }
        self.offer(device, queue, head);
        self.kick(device, queue);
        Some(slot)
    }

    fn offer(&mut self, device: usize, queue: u16, head: u16) {
        let ring = &mut self.devices[device].rings[usize::from(queue)];
        let at = ring.available() + 4 + 2 * u64::from(ring.added % ring.size);
        ring.added = ring.added.wrapping_add(1);
        let (index, added) = (ring.available() + 2, ring.added);
        self.store(at, &head.to_le_bytes());
        let _ = self.board.mem.store(added, GuestAddress(index), Release);
        self.step();
    }

    /// Kicks as the device has asked for.
    fn kick(&mut self, device: usize, queue: u16) {
        let Device { event_idx, ref rings, .. } = self.devices[device];
        let ring = rings[usize::from(queue)].clone();
        std::sync::atomic::fence(SeqCst);
        let wanted = if event_idx {
            let event = self.load_u16(ring.used() + 4 + 8 * u64::from(ring.size));
            ring.added.wrapping_sub(event) == 1
        } else {
            self.load_u16(ring.used()) & 1 == 0
        };
        if wanted {
            self.set(device, NOTIFY + 4 * u64::from(queue), queue.into(), 2);
        }
    }

    /// Waits for what was added, with noise not for ever; true: it is all done.
    fn drain(&mut self, device: usize, queue: u16) -> bool {
        for _ in 0..if self.orderly { u64::MAX } else { 30 } {
            let ring = &self.devices[device].rings[usize::from(queue)];
            let (index, added) = (ring.used() + 2, ring.added);
            let event = ring.available() + 4 + 2 * u64::from(ring.size);
            let used = self.load_u16(index);
            self.devices[device].rings[usize::from(queue)].used = used;
            if used == added {
                return true;
            }
            // With EVENT_IDX: interrupt for the next one.
            self.store(event, &used.to_le_bytes());
            std::thread::yield_now();
        }
        false
    }

    /// A life of one device, with noise.
    fn live(&mut self) {
        self.tidy_bars();
        let device = self.dice.below(self.devices.len() as u64) as usize;
        self.bring_up(device);
        for _ in 0..self.dice.below(30) {
            let queue = self.dice.below(self.devices[device].queues.into()) as u16;
            if self.dice.one_in(12) {
                self.wrong_chain(device, queue);
            } else {
                let (kind, sector) = (self.dice.below(3) as u32, self.dice.below(SECTORS));
                self.request(device, queue, kind, sector);
            }
            if self.dice.one_in(3) {
                self.drain(device, queue);
            }
            if self.dice.one_in(8) {
                self.status(device);
            }
        }
    }

    /// A chain that is wrong somewhere, or perhaps everywhere.
    fn wrong_chain(&mut self, device: usize, queue: u16) {
        let ring = self.devices[device].rings[usize::from(queue)].clone();
        let indirect = self.dice.one_in(3);
        let length = 1 + self.dice.below(8) as u16;
        for nth in 0..length {
            let table = if indirect { ring.table(0) } else { ring.base };
            self.random_descriptor(table + 16 * u64::from(nth), nth, length);
        }
        let head = if self.dice.one_in(4) { self.dice.odd() as u16 } else { 0 };
        if indirect {
            let len = match self.dice.below(4) {
                0 => self.dice.odd() as u32,
                1 => 16 * 0xffff,
                _ => 16 * u32::from(length),
            };
            let flags = INDIRECT | self.dice.of(&[0, 0, 0, NEXT, WRITE]);
            self.descriptor(ring.descriptor(head % QUEUE_SIZE), ring.table(0), len, flags, 0);
        }
        self.offer(device, queue, head);
        self.kick(device, queue);
    }

    fn random_descriptor(&mut self, at: u64, nth: u16, length: u16) {
        let address = match self.dice.below(4) {
            0 => self.dice.odd(),
            1 => HEADERS + 16 * self.dice.below(64),
            _ => DATA + self.dice.below(0x1_0000),
        };
        let len = match self.dice.below(8) {
            0 => self.dice.odd() as u32,
            1..4 => 16,
            4 => 0,
            _ => self.dice.of(&[1, 17, 511, 512, 513, 4096]),
        };
        let more = if nth + 1 < length { NEXT } else { 0 };
        let flags = match self.dice.below(12) {
            0 => self.dice.odd() as u16,
            1 => INDIRECT,
            _ => more | if nth > 0 && self.dice.one_in(2) { WRITE } else { 0 },
        };
        let next = if self.dice.one_in(8) { self.dice.odd() as u16 } else { nth + 1 };
        self.descriptor(at, address, len, flags, next);
    }

    // Noise.

    fn make_noise(&mut self) {
        let device = self.dice.below(self.devices.len() as u64) as usize;
        let width = self.dice.of(&[1, 2, 4, 8]);
        match self.dice.below(100) {
            0..20 => self.random_register(device, width),
            20..28 => {
                let queue = self.dice.of(&[0, 0, 1, 2, 0x3ff]);
                let width = self.dice.of(&[2, 2, 4, 1]);
                self.set(device, NOTIFY + 4 * queue, queue, width);
            }
            28..33 => {
                let start = self.dice.of(&[0, 0, ISR, CONFIG, NOTIFY]);
                let register = start + self.dice.below(80);
                self.get(device, register, width);
            }
            33..43 => {
                let table = self.devices[device].bars[1];
                let at = table + self.dice.below(16) * 4 + self.dice.of(&[0, 0, 0, 0, 1, 0x800]);
                if self.dice.one_in(4) {
                    self.read(at, width);
                } else {
                    let value = self.dice.of(&[0, 1, u64::MAX, 0xfee0_0000]);
                    let width = self.dice.of(&[4, 4, 8, 2]);
                    self.write(at, &value.to_le_bytes()[..width]);
                }
            }
            43..52 => {
                // The window into the BARs among them.
                let offset = 0x40 + 4 * self.dice.below(48) as u16;
                let value = self.dice.of(&[0, 1, 2, 4, 20, 0x3000, u32::MAX, 0x8000_0000]);
                self.configure(device, offset, value);
            }
            52..56 => {
                let offset = self.dice.odd() as u16;
                self.configuration(device, offset & 0xfff);
            }
            56..59 => self.move_a_bar(device),
            59 => {
                let command = self.dice.roll() as u32;
                self.configure(device, COMMAND, command);
            }
            60..86 => self.random_memory(device),
            86..92 => {
                let value = self.dice.of(&[0, 1, 3, 4, 8, 11, 15, 15, 64, 79, 128, 255]);
                self.set(device, STATUS, value, 1);
            }
            92..96 => {
                let (address, value) = (self.dice.odd(), self.dice.odd());
                let address = match self.dice.below(3) {
                    0 => Board::ECAM + address % (1 << 20),
                    1 => self.devices[device].bars[0].wrapping_add(address % 0x4000),
                    _ => address,
                };
                // A guest's access does not wrap round.
                if address.checked_add(width as u64).is_some() {
                    if self.dice.one_in(2) {
                        self.write(address, &value.to_le_bytes()[..width]);
                        self.look_for_bars(device);
                    } else {
                        self.read(address, width);
                    }
                }
            }
            _ => {
                let port = 0xcf8 + self.dice.below(10);
                let value = self.dice.odd().to_le_bytes();
                let exit = &mut self.vcpu.exit();
                let mut back = [0; 8];
                let width = width.min(4);
                self.board.write_port(port, &value[..width], exit);
                self.board.read_port(port, &mut back[..width], exit);
                self.look_for_bars(device);
            }
        }
    }

    fn random_register(&mut self, device: usize, width: usize) {
        const FIELDS: [(u64, usize); 16] = [
            (0, 4),
            (8, 4),
            (12, 4),
            (16, 2),
            (22, 2),
            (22, 2),
            (24, 2),
            (26, 2),
            (28, 2),
            (28, 2),
            (32, 8),
            (36, 4),
            (40, 8),
            (44, 4),
            (48, 8),
            (52, 4),
        ];
        let (field, len) = self.dice.of(&FIELDS);
        let value = self.dice.odd();
        match self.dice.below(8) {
            0 => self.set(device, field, value, width),
            1 => self.set(device, self.dice.0 % 0x1000, value, width),
            2 => self.set(device, CONFIG + self.dice.0 % 64, value, width),
            _ => self.set(device, field, value, len),
        }
    }

    /// To somewhere absurd, or onto another one.
    fn move_a_bar(&mut self, device: usize) {
        let target = match self.dice.below(4) {
            0 => self.dice.odd(),
            1 => Board::ECAM,
            _ => {
                let other = self.dice.below(self.devices.len() as u64) as usize;
                self.devices[other].bars[self.dice.below(2) as usize]
            }
        };
        let bar = self.dice.of(&BARS);
        self.configure(device, bar, target as u32);
        if self.dice.one_in(2) {
            self.configure(device, bar + 4, (target >> 32) as u32);
        }
        self.look_for_bars(device);
    }

    fn random_memory(&mut self, device: usize) {
        let queue = self.dice.below(self.devices[device].queues.into()) as usize;
        let ring = self.devices[device].rings[queue].clone();
        let value = self.dice.odd();
        let (address, len) = match self.dice.below(12) {
            0..3 => {
                let nth = self.dice.below(QUEUE_SIZE.into()) as u16;
                return self.random_descriptor(ring.descriptor(nth), nth, QUEUE_SIZE);
            }
            3 => (ring.available() + 2, 2),
            4 => (ring.available(), 2),
            5 => (ring.available() + 4 + 2 * self.dice.below(QUEUE_SIZE.into()), 2),
            6 => (ring.available() + 4 + 2 * u64::from(QUEUE_SIZE), 2),
            7 => (ring.used() + 2, 2),
            8 => (ring.used() + 4 + 8 * u64::from(QUEUE_SIZE), 2),
            9 => (HEADERS + self.dice.below(0x1_0000), 8),
            10 => (ring.table(0) + self.dice.below(0x1000), 8),
            _ => (self.dice.odd(), 8),
        };
        self.store(address, &value.to_le_bytes()[..len]);
    }

    // Afterwards.

    /// An orderly driver finds orderly devices, whatever has happened before.
    fn verify(&mut self, image: &File) {
        self.tidy_bars();
        for device in 0..self.devices.len() {
            assert!(self.reset(device));
        }
        for device in 0..self.devices.len() {
            assert!(self.bring_up(device), "the device comes up");
            let messages = self.board.messages.get();
            for queue in 0..self.devices[device].queues {
                if self.devices[device].blk {
                    self.verify_disk(device, queue, image);
                } else {
                    self.verify_rng(device, queue);
                }
            }
            while self.board.messages.get() == messages {
                std::thread::yield_now(); // the interrupt follows the used ring
            }
            assert_eq!(self.status(device) & NEEDS_RESET, 0);
            assert!(self.reset(device));
        }
    }

    fn verify_disk(&mut self, device: usize, queue: u16, image: &File) {
        for _ in 0..40 {
            let sector = self.dice.below(SECTORS);
            let fill = self.dice.roll() as u8;
            let ring = self.devices[device].rings[usize::from(queue)].clone();
            let slot = ring.added % (QUEUE_SIZE / CHAIN);
            self.store(buffer(&ring, slot), &[fill; 512]);
            assert_eq!(self.request(device, queue, 1, sector), Some(slot));
            assert!(self.drain(device, queue));
            let mut stored = [!fill; 512];
            image.read_exact_at(&mut stored, sector * 512).unwrap();
            assert_eq!(stored, [fill; 512]);
            let slot = (slot + 1) % (QUEUE_SIZE / CHAIN);
            self.store(buffer(&ring, slot), &[!fill; 512]);
            assert_eq!(self.request(device, queue, 0, sector), Some(slot));
            assert!(self.drain(device, queue));
            let mem: &Mem = &self.board.mem;
            let read: [u8; 512] = {
                let mut read = [0; 512];
                mem.read_slice(&mut read, GuestAddress(buffer(&ring, slot))).unwrap();
                read
            };
            assert_eq!(read, [fill; 512]);
        }
    }

    fn verify_rng(&mut self, device: usize, queue: u16) {
        let ring = self.devices[device].rings[usize::from(queue)].clone();
        self.store(buffer(&ring, 0), &[0; 512]);
        assert_eq!(self.request(device, queue, 0, 0), Some(0));
        assert!(self.drain(device, queue));
        let mut bytes = [0; 512];
        self.board.mem.read_slice(&mut bytes, GuestAddress(buffer(&ring, 0))).unwrap();
        assert!(bytes.iter().filter(|&&byte| byte == 0).count() < 50, "512 random bytes");
    }
}

/// Every ring has buffers of its own, 1 KiB for each slot it should have.
fn buffer(ring: &Ring, slot: u16) -> u64 {
    DATA + (ring.base - RINGS) + BUFFER * u64::from(slot % (QUEUE_SIZE / CHAIN))
}

/// One machine: noise for a while, then an orderly driver.
fn machine(seen: &Seen, seed: u64, on_vcpu: bool, engine: Engine, polls: bool, racing: bool) {
    let poll = if polls { PollPolicy::default() } else { PollPolicy::OFF };
    let home = TestLoop::new("noise", poll);
    let placement = || match on_vcpu {
        true => Placement::Vcpu { home: home.handle.clone() },
        false => Placement::Loop(home.handle.clone()),
    };
    let pieces = [(GuestAddress(0), PIECE as usize), (GuestAddress(SECOND), PIECE as usize)];
    let mem = Arc::new(GuestMemoryMmap::from_ranges(&pieces).unwrap());
    let file = tempfile::tempfile().unwrap();
    file.set_len(SECTORS * 512).unwrap();
    let options = Options { engine, read_only: false, direct: false };
    let image = RawImage::from_file(file.try_clone().unwrap(), options).unwrap();
    let mut board = Board::new(mem);
    let blk = Blk::new(Arc::new(image), "noise", 2, QUEUE_SIZE);
    let slots = [
        (board.add("disk.noise", blk, placement()), 2, true),
        (board.add("rng", Rng, placement()), 1, false),
    ];
    let mut bases = (RINGS..).step_by(RING as usize);
    let devices = slots.map(|(address, queues, blk)| Device {
        slot: address.slot(),
        queues,
        blk,
        home: [0; 2],
        bars: [0; 2],
        msix: 0,
        rings: bases
            .by_ref()
            .take(queues.into())
            .map(|base| Ring { base, size: QUEUE_SIZE, added: 0, used: 0 })
            .collect(),
        event_idx: false,
        indirect: false,
        status: 0,
    });
    let until = seen.steps.load(Relaxed) + STEPS;
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let board = &board;
        let vcpu = scope.spawn(|| {
            let mut guest = Guest::new(board, seen, devices.to_vec(), seed);
            (0..devices.len()).for_each(|device| guest.find(device));
            let known = guest.devices.clone();
            let second = racing.then(|| {
                scope.spawn(|| {
                    let mut guest = Guest::new(board, seen, known, !seed);
                    while !done.load(Relaxed) {
                        guest.make_noise();
                    }
                    guest.vcpu.counters().completions.get()
                })
            });
            while seen.steps.load(Relaxed) < until {
                assert!(!home.is_finished(), "the loop has died");
                guest.noise = guest.dice.of(&[5, 20, 100, 500]);
                guest.live();
            }
            done.store(true, Relaxed);
            let others =
                second.map_or(0, |second| second.join().unwrap_or_else(|e| resume_unwind(e)));
            let counters = [guest.vcpu.counters(), home.handle.counters()];
            let completions: u64 = counters.iter().map(|counters| counters.completions.get()).sum();
            seen.completions.fetch_add(completions + others, Relaxed);
            (guest.noise, guest.orderly) = (0, true);
            guest.verify(&file);
        });
        if let Err(panic) = vcpu.join() {
            done.store(true, Relaxed);
            resume_unwind(panic);
        }
    });
}

fn seed() -> u64 {
    match std::env::var("HEDDLE_SEED") {
        Ok(seed) => seed.parse().expect("HEDDLE_SEED is a number"),
        Err(_) => RandomState::new().hash_one(0),
    }
}

/// Runs the machines on a thread of their own and sees to it that they get on.
fn survive(on_vcpu: bool, engine: Engine) {
    let seed = seed();
    let seen = Arc::new(Seen::default());
    let shared = Arc::clone(&seen);
    let worker = std::thread::spawn(move || {
        for (nth, (polls, racing)) in (0..).zip(RUNS) {
            machine(&shared, seed.wrapping_add(nth), on_vcpu, engine, polls, racing);
        }
    });
    let began = std::time::Instant::now();
    let (mut steps, mut moved) = (0, began);
    while !worker.is_finished() {
        std::thread::sleep(Duration::from_millis(20));
        let now = seen.steps.load(Relaxed);
        if now != steps {
            (steps, moved) = (now, std::time::Instant::now());
        }
        assert!(moved.elapsed() < PATIENCE, "hangs after {steps} steps: HEDDLE_SEED={seed}");
    }
    if let Err(panic) = worker.join() {
        eprintln!("after {steps} steps: HEDDLE_SEED={seed}");
        resume_unwind(panic);
    }
    let [steps, running, broken, completions] =
        [&seen.steps, &seen.running, &seen.needs_reset, &seen.completions].map(|n| n.load(Relaxed));
    println!(
        "{steps} steps in {:?}, running {running}, needs reset {broken}, completions {completions}",
        began.elapsed()
    );
    assert!(steps >= STEPS * RUNS.len() as u64);
    assert!(running > 1000, "seen running {running} times");
    assert!(broken > 500, "seen in need of a reset {broken} times");
    assert!(completions > 10_000, "{completions} completions");
}

#[test]
fn noise_at_loops_with_io_uring_is_survived() {
    survive(false, Engine::IoUring);
}

#[test]
fn noise_at_loops_with_system_calls_is_survived() {
    survive(false, Engine::Sync);
}

#[test]
fn noise_at_vcpus_with_io_uring_is_survived() {
    survive(true, Engine::IoUring);
}

#[test]
fn noise_at_vcpus_with_system_calls_is_survived() {
    survive(true, Engine::Sync);
}
