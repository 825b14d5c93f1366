//! What sits in a slot, and how accesses of any width become registers.

use std::sync::Weak;

use iothread::ExitCx;

/// A PCI function, seen through its configuration space.
///
/// Any vCPU may be in any method at any time.
pub trait Function: Send + Sync {
    /// Reads register `register`, counted in units of 4 bytes: below 64 in the space of PCI 3.0
    /// §6.1, below 1024 in the extended space of PCI Express.
    fn read_config(&self, register: u16, exit: &mut ExitCx<'_>) -> u32;

    /// Writes those bits of `value` whose bit in `lanes` is set. `lanes` selects whole bytes.
    fn write_config(&self, register: u16, value: u32, lanes: u32, exit: &mut ExitCx<'_>);

    /// Another function has given up an address: if this one could not be decoded because of
    /// that, it can be now.
    fn settle(&self) {}

    /// From now on the function is behind `upstream`, and is decoded only where that forwards
    /// accesses. Takes effect with the next [`settle`](Self::settle). Functions that nobody has
    /// told this are on the root bus.
    fn move_behind(&self, _upstream: Weak<dyn Upstream>) {}
}

/// The way from the memory bus to a function behind a bridge.
pub trait Upstream: Send + Sync {
    /// Do accesses to all of `size` bytes from `base` come through? May be called by any thread, and
    /// must take no lock: a function calls it while it holds its own.
    fn forwards(&self, base: u64, size: u64) -> bool;
}

/// Reads `data.len()` bytes at `offset` out of registers of 4 bytes, each of them once.
pub(super) fn read_registers(offset: u64, data: &mut [u8], mut read: impl FnMut(u64) -> u32) {
    let mut at = offset;
    let mut rest = data;
    while !rest.is_empty() {
        let skip = (at % 4) as usize;
        let (now, later) = rest.split_at_mut(rest.len().min(4 - skip));
        now.copy_from_slice(&read(at / 4).to_le_bytes()[skip..skip + now.len()]);
        at += now.len() as u64;
        rest = later;
    }
}

/// Writes `data` at `offset` into registers of 4 bytes, each of them once: `write` gets the
/// register, its value, and which bits of it are meant.
pub(super) fn write_registers(offset: u64, data: &[u8], mut write: impl FnMut(u64, u32, u32)) {
    let mut at = offset;
    let mut rest = data;
    while !rest.is_empty() {
        let skip = (at % 4) as usize;
        let (now, later) = rest.split_at(rest.len().min(4 - skip));
        let (mut value, mut lanes) = ([0; 4], [0; 4]);
        value[skip..skip + now.len()].copy_from_slice(now);
        lanes[skip..skip + now.len()].fill(0xff);
        write(at / 4, u32::from_le_bytes(value), u32::from_le_bytes(lanes));
        at += now.len() as u64;
        rest = later;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_read_takes_its_bytes_out_of_each_register_it_touches() {
        let registers = [0x0302_0100, 0x0706_0504, 0x0b0a_0908];
        for offset in 0..4 {
            for len in 1..=8 {
                let mut data = vec![0xff; len];
                read_registers(offset, &mut data, |register| registers[register as usize]);
                let expected: Vec<_> = (offset as u8..).take(len).collect();
                assert_eq!(data, expected, "{len} bytes at {offset}");
            }
        }
    }

    #[test]
    fn a_write_names_the_bits_it_means() {
        let mut seen = Vec::new();
        write_registers(3, &[1, 2, 3], |register, value, lanes| {
            seen.push((register, value, lanes));
        });
        assert_eq!(seen, [(0, 0x0100_0000, 0xff00_0000), (1, 0x0000_0302, 0x0000_ffff)]);
    }
}
