//! A driver that mostly knows what it does.

use super::*;
use crate::noise::odd;

/// A function as its driver knows it.
#[derive(Clone)]
pub struct Device {
    pub slot: u8,
    pub queues: u16,
    pub blk: bool,
    /// Where the BARs were at first, and where they are now.
    pub home: [u64; 2],
    pub bars: [u64; 2],
    pub msix: u16,
    pub rings: Vec<Ring>,
    pub event_idx: bool,
    pub indirect: bool,
    /// Its status when it was last read.
    pub status: u8,
}

#[derive(Clone)]
pub struct Ring {
    pub base: u64,
    pub size: u16,
    pub added: u16,
    pub used: u16,
}

impl Ring {
    pub fn descriptor(&self, at: u16) -> u64 {
        self.base + 16 * u64::from(at)
    }
    pub fn available(&self) -> u64 {
        self.base + 0x1000
    }
    pub fn used(&self) -> u64 {
        self.base + 0x2000
    }
    pub fn table(&self, slot: u16) -> u64 {
        self.base + 0x3000 + 64 * u64::from(slot)
    }
}

/// A vCPU with a driver on it.
pub struct Guest<'a> {
    pub board: &'a Board,
    pub seen: &'a Seen,
    pub vcpu: VcpuLoop,
    pub dice: Dice,
    pub devices: Vec<Device>,
    /// One step in this many is followed by noise; 0: none.
    pub noise: u64,
    /// The noise is over: what the driver asks for has to happen.
    pub orderly: bool,
}

impl<'a> Guest<'a> {
    pub fn new(board: &'a Board, seen: &'a Seen, devices: Vec<Device>, seed: u64) -> Self {
        let (vcpu, dice) = (VcpuLoop::enter(), Dice::new(seed));
        Self { board, seen, vcpu, dice, devices, noise: 0, orderly: false }
    }

    // Single accesses.

    pub fn step(&mut self) {
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

    pub fn store(&mut self, address: u64, data: &[u8]) {
        // The driver's own addresses are good; those of the noise need not be.
        let _ = self.board.mem.write_slice(data, GuestAddress(address));
        self.step();
    }

    pub fn load_u16(&mut self, address: u64) -> u16 {
        self.step();
        self.board.mem.load(GuestAddress(address), Acquire).unwrap_or(0)
    }

    pub fn write(&mut self, address: u64, data: &[u8]) {
        self.board.write(address, data, &mut self.vcpu.exit());
        self.step();
    }

    pub fn read(&mut self, address: u64, len: usize) -> u64 {
        let mut data = [0; 8];
        self.board.read(address, &mut data[..len], &mut self.vcpu.exit());
        self.step();
        u64::from_le_bytes(data)
    }

    pub fn set(&mut self, device: usize, register: u64, value: u64, len: usize) {
        self.write(self.devices[device].bars[0] + register, &value.to_le_bytes()[..len]);
    }

    pub fn get(&mut self, device: usize, register: u64, len: usize) -> u64 {
        self.read(self.devices[device].bars[0] + register, len)
    }

    /// Writes configuration space in one of the two ways.
    pub fn configure(&mut self, device: usize, offset: u16, value: u32) {
        let slot = self.devices[device].slot;
        let exit = &mut self.vcpu.exit();
        if self.dice.one_in(2) {
            let address = Board::ECAM + (u64::from(slot) << 15) + u64::from(offset);
            self.board.write(address, &value.to_le_bytes(), exit);
        } else {
            let address = 1 << 31 | u32::from(slot) << 11 | u32::from(offset & 0xfc);
            self.board.write_port(0xcf8, &address.to_le_bytes(), exit);
            self.board.write_port(0xcfc, &value.to_le_bytes(), exit);
        }
        self.step();
    }

    pub fn configuration(&mut self, device: usize, offset: u16) -> u32 {
        let slot = self.devices[device].slot;
        self.read(Board::ECAM + (u64::from(slot) << 15) + u64::from(offset & 0xffc), 4) as u32
    }

    // A driver that mostly knows what it does.

    /// Finds the BARs and the capability of MSI-X.
    pub fn find(&mut self, device: usize) {
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

    pub fn look_for_bars(&mut self, device: usize) {
        for (nth, bar) in BARS.into_iter().enumerate() {
            let low = self.configuration(device, bar) & !0xf;
            let high = self.configuration(device, bar + 4);
            self.devices[device].bars[nth] = u64::from(high) << 32 | u64::from(low);
        }
    }

    /// Brings all BARs back to where they were.
    pub fn tidy_bars(&mut self) {
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

    pub fn status(&mut self, device: usize) -> u8 {
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
    pub fn reset(&mut self, device: usize) -> bool {
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
    pub fn bring_up(&mut self, device: usize) -> bool {
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

    pub fn set_up_vectors(&mut self, device: usize) {
        let table = self.devices[device].bars[1];
        for vector in 0..=u64::from(self.devices[device].queues) {
            self.write(table + 16 * vector, &0xfee0_0000u64.to_le_bytes());
            self.write(table + 16 * vector + 8, &(0x30 + vector).to_le_bytes());
        }
        self.configure(device, self.devices[device].msix, 0x8000_0000);
        self.set(device, 16, 0, 2);
    }

    pub fn set_up_queue(&mut self, device: usize, queue: u16) {
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

    pub fn descriptor(&mut self, at: u64, address: u64, len: u32, flags: u16, next: u16) {
        let mut raw = [0; 16];
        raw[..8].copy_from_slice(&address.to_le_bytes());
        raw[8..12].copy_from_slice(&len.to_le_bytes());
        raw[12..14].copy_from_slice(&flags.to_le_bytes());
        raw[14..].copy_from_slice(&next.to_le_bytes());
        self.store(at, &raw);
    }

    /// Adds one request and kicks; the slot it took, or `None` if the ring is full.
    pub fn request(&mut self, device: usize, queue: u16, kind: u32, sector: u64) -> Option<u16> {
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

    pub fn offer(&mut self, device: usize, queue: u16, head: u16) {
        let ring = &mut self.devices[device].rings[usize::from(queue)];
        let at = ring.available() + 4 + 2 * u64::from(ring.added % ring.size);
        ring.added = ring.added.wrapping_add(1);
        let (index, added) = (ring.available() + 2, ring.added);
        self.store(at, &head.to_le_bytes());
        let _ = self.board.mem.store(added, GuestAddress(index), Release);
        self.step();
    }

    /// Kicks as the device has asked for.
    pub fn kick(&mut self, device: usize, queue: u16) {
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
    pub fn drain(&mut self, device: usize, queue: u16) -> bool {
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
    pub fn live(&mut self) {
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
    pub fn wrong_chain(&mut self, device: usize, queue: u16) {
        let ring = self.devices[device].rings[usize::from(queue)].clone();
        let indirect = self.dice.one_in(3);
        let length = 1 + self.dice.below(8) as u16;
        for nth in 0..length {
            let table = if indirect { ring.table(0) } else { ring.base };
            self.random_descriptor(table + 16 * u64::from(nth), nth, length);
        }
        let head = if self.dice.one_in(4) { odd(&mut self.dice) as u16 } else { 0 };
        if indirect {
            let len = match self.dice.below(4) {
                0 => odd(&mut self.dice) as u32,
                1 => 16 * 0xffff,
                _ => 16 * u32::from(length),
            };
            let flags = INDIRECT | self.dice.of(&[0, 0, 0, NEXT, WRITE]);
            self.descriptor(ring.descriptor(head % QUEUE_SIZE), ring.table(0), len, flags, 0);
        }
        self.offer(device, queue, head);
        self.kick(device, queue);
    }

    pub fn random_descriptor(&mut self, at: u64, nth: u16, length: u16) {
        let address = match self.dice.below(4) {
            0 => odd(&mut self.dice),
            1 => HEADERS + 16 * self.dice.below(64),
            _ => DATA + self.dice.below(0x1_0000),
        };
        let len = match self.dice.below(8) {
            0 => odd(&mut self.dice) as u32,
            1..4 => 16,
            4 => 0,
            _ => self.dice.of(&[1, 17, 511, 512, 513, 4096]),
        };
        let more = if nth + 1 < length { NEXT } else { 0 };
        let flags = match self.dice.below(12) {
            0 => odd(&mut self.dice) as u16,
            1 => INDIRECT,
            _ => more | if nth > 0 && self.dice.one_in(2) { WRITE } else { 0 },
        };
        let next = if self.dice.one_in(8) { odd(&mut self.dice) as u16 } else { nth + 1 };
        self.descriptor(at, address, len, flags, next);
    }

    // Afterwards.

    /// An orderly driver finds orderly devices, whatever has happened before.
    pub fn verify(&mut self, image: &File) {
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

    pub fn verify_disk(&mut self, device: usize, queue: u16, image: &File) {
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

    pub fn verify_rng(&mut self, device: usize, queue: u16) {
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
pub fn buffer(ring: &Ring, slot: u16) -> u64 {
    DATA + (ring.base - RINGS) + BUFFER * u64::from(slot % (QUEUE_SIZE / CHAIN))
}
