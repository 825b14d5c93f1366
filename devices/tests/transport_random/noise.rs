//! What no driver would do, or any might.

use super::*;

impl Guest<'_> {
    pub fn make_noise(&mut self) {
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
                let offset = odd(&mut self.dice) as u16;
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
                let (address, value) = (odd(&mut self.dice), odd(&mut self.dice));
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
                let value = odd(&mut self.dice).to_le_bytes();
                let exit = &mut self.vcpu.exit();
                let mut back = [0; 8];
                let width = width.min(4);
                self.board.write_port(port, &value[..width], exit);
                self.board.read_port(port, &mut back[..width], exit);
                self.look_for_bars(device);
            }
        }
    }

    pub fn random_register(&mut self, device: usize, width: usize) {
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
        let value = odd(&mut self.dice);
        let anywhere = self.dice.below(0x1000);
        match self.dice.below(8) {
            0 => self.set(device, field, value, width),
            1 => self.set(device, anywhere, value, width),
            2 => self.set(device, CONFIG + anywhere % 64, value, width),
            _ => self.set(device, field, value, len),
        }
    }

    /// To somewhere absurd, or onto another one.
    pub fn move_a_bar(&mut self, device: usize) {
        let target = match self.dice.below(4) {
            0 => odd(&mut self.dice),
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

    pub fn random_memory(&mut self, device: usize) {
        let queue = self.dice.below(self.devices[device].queues.into()) as usize;
        let ring = self.devices[device].rings[queue].clone();
        let value = odd(&mut self.dice);
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
            _ => (odd(&mut self.dice), 8),
        };
        self.store(address, &value.to_le_bytes()[..len]);
    }
}

/// A number that somebody may not have thought of.
pub fn odd(dice: &mut Dice) -> u64 {
    match dice.below(10) {
        0 => 0,
        1 => u64::MAX,
        2 => dice.below(8),
        3 => 1 << dice.below(64),
        4 => (1u64 << dice.below(64)).wrapping_sub(1),
        5 => dice.of(&[PIECE, SECOND, SECOND + PIECE]).wrapping_add(dice.below(64)) - 32,
        6 => RINGS + dice.below(4 * RING),
        7 => DATA + dice.below(0x1_0000),
        8 => u64::MAX - dice.below(64),
        _ => dice.roll(),
    }
}
