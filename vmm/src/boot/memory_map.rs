//! Which guest memory there is, what a guest is told of it, and what has been put where.

use std::ops::Range;

use config::units::format_size;
use devices::pci::Ecam;
use vm_memory::{GuestMemoryBackend, GuestMemoryMmap};

use crate::memory::{BOOT_DATA, ECAM, HIGH_RAM, LOW_RAM_END, ONE_MIB};

/// RAM for a guest's first programs ends here; then come the holes of the first MiB.
pub(super) const FIRST_RAM_END: u64 = 0xa_0000;

/// What an area of the memory map is, with the number that E820, PVH and Multiboot have for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub(super) enum Use {
    /// The guest's to use.
    Ram = 1,
    /// Not the guest's to use: boot data, PCI's configuration space.
    Reserved = 2,
}

/// The memory of a machine.
#[derive(Debug, Clone, Copy)]
pub(super) struct Ram {
    /// Behind the last byte.
    end: u64,
}

impl Ram {
    pub(super) fn of(memory: &GuestMemoryMmap) -> Self {
        Self { end: memory.last_addr().0.saturating_add(1) }
    }

    /// That of a machine with so many bytes.
    pub(super) fn with_size(bytes: u64) -> Self {
        let above = bytes.saturating_sub(LOW_RAM_END);
        Self { end: if above == 0 { bytes } else { HIGH_RAM.saturating_add(above) } }
    }

    /// Behind the last byte below the holes.
    pub(super) fn low_end(self) -> u64 {
        self.end.min(LOW_RAM_END)
    }

    fn size(self) -> u64 {
        if self.end <= LOW_RAM_END { self.end } else { self.end - HIGH_RAM + LOW_RAM_END }
    }

    /// The memory map of a machine with so many PCI buses, in ascending order.
    pub(super) fn map(self, pci_buses: u8) -> Vec<(Range<u64>, Use)> {
        // Bus 0 is there even if no table tells of it.
        let ecam_end = ECAM + Ecam::size(pci_buses.max(1));
        let mut map = vec![
            (0..FIRST_RAM_END, Use::Ram),
            (BOOT_DATA..ONE_MIB, Use::Reserved),
            (ONE_MIB..self.low_end(), Use::Ram),
            (ECAM..ecam_end, Use::Reserved),
        ];
        if self.end > HIGH_RAM {
            map.push((HIGH_RAM..self.end, Use::Ram));
        }
        map
    }

    /// Can a kernel have `len` bytes at `at`? If not, why, or how much memory that needs.
    pub(super) fn check(self, at: u64, len: u64) -> Result<(), String> {
        let Some(end) = at.checked_add(len) else {
            return Err("is beyond any address".to_owned());
        };
        let is_in = |area: Range<u64>| area.start <= at && end <= area.end;
        let in_low = is_in(ONE_MIB..LOW_RAM_END);
        if is_in(0..FIRST_RAM_END) || (in_low || is_in(HIGH_RAM..u64::MAX)) && end <= self.end {
            return Ok(());
        }
        // No host has more.
        if in_low || is_in(HIGH_RAM..1 << 52) {
            let need = Self { end: end.next_multiple_of(2 << 20) }.size();
            let (need, has) = (format_size(need), format_size(self.size()));
            return Err(format!(
                "needs machine.memory = \"{need}\" or more, this machine has {has}"
            ));
        }
        if at < ONE_MIB {
            return Err(format!(
                "meets what is not the kernel's at {FIRST_RAM_END:#x} to {:#x}",
                ONE_MIB - 1
            ));
        }
        Err("is where no memory can be".to_owned())
    }
}

/// Low memory that is still free, to put modules into.
#[derive(Debug)]
pub(super) struct Space {
    end: u64,
    taken: Vec<Range<u64>>,
}

impl Space {
    /// All of it from 1 MiB to the holes, or to `below`.
    pub(super) fn new(ram: Ram, below: u64) -> Self {
        Self { end: ram.low_end().min(below), taken: Vec::new() }
    }

    pub(super) fn take(&mut self, area: Range<u64>) {
        self.taken.push(area);
    }

    /// Takes the highest `len` bytes in a row that begin at a page. Nothing has a place, too.
    pub(super) fn take_highest(&mut self, len: u64) -> Option<u64> {
        let len = len.max(1);
        let mut end = self.end;
        loop {
            let at = end.checked_sub(len)? & !0xfff;
            if at < ONE_MIB {
                return None;
            }
            let meets = |area: &&Range<u64>| area.start < at + len && at < area.end;
            match self.taken.iter().filter(meets).map(|area| area.start).min() {
                Some(start) => end = start,
                None => {
                    self.take(at..at + len);
                    return Some(at);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn what_does_not_fit_says_how_much_memory_does() {
        let small = Ram::with_size(64 * MIB);
        assert_eq!(small.check(MIB, 63 * MIB), Ok(()));
        assert_eq!(small.check(0, 0xa_0000), Ok(()));
        for (at, len, why) in [
            (MIB, 64 * MIB, "\"66M\" or more, this machine has 64M"),
            (HIGH_RAM, 1, "\"3074M\""),
            (0, 0xa_0001, "0xa0000 to 0xfffff"),
            (0xf_ffff, 2, "0xa0000 to 0xfffff"),
            (LOW_RAM_END - 1, 2, "no memory can be"),
            (1 << 60, 1, "no memory can be"),
            (u64::MAX, 2, "beyond any address"),
        ] {
            let said = small.check(at, len).unwrap_err();
            assert!(said.contains(why), "{at:#x}: {said}");
        }
        let large = Ram::with_size(LOW_RAM_END + 64 * MIB);
        assert_eq!(large.check(HIGH_RAM, 64 * MIB), Ok(()));
        assert!(large.check(HIGH_RAM, 64 * MIB + 1).unwrap_err().contains("3138M"));
        assert_eq!(large.size(), LOW_RAM_END + 64 * MIB);
    }

    #[test]
    fn the_plan_and_the_memory_itself_say_the_same() {
        for size in [2 * MIB, LOW_RAM_END, LOW_RAM_END + 2 * MIB] {
            let memory = crate::memory::allocate(size, crate::memory::Backing::Shared).unwrap();
            assert_eq!(Ram::of(&memory).end, Ram::with_size(size).end);
        }
    }

    #[test]
    fn the_map_ascends_and_covers_all_ram() {
        for size in [2 * MIB, 256 * MIB, LOW_RAM_END, LOW_RAM_END + 2 * MIB] {
            let map = Ram::with_size(size).map(32);
            assert!(map.contains(&(ECAM..ECAM + 32 * MIB, Use::Reserved)));
            assert!(map.windows(2).all(|two| two[0].0.end <= two[1].0.start), "{map:?}");
            let ram = map.iter().filter(|(_, kind)| *kind == Use::Ram);
            let ram: u64 = ram.map(|(area, _)| area.end - area.start).sum();
            assert_eq!(ram, size - (ONE_MIB - FIRST_RAM_END));
        }
    }

    #[test]
    fn modules_go_high_and_round_what_is_taken() {
        let mut space = Space::new(Ram::with_size(16 * MIB), u64::MAX);
        space.take(14 * MIB..15 * MIB);
        space.take(15 * MIB - 1..15 * MIB + 1);
        assert_eq!(space.take_highest(5), Some(16 * MIB - 4096));
        assert_eq!(space.take_highest(MIB), Some(13 * MIB));
        assert_eq!(space.take_highest(4096), Some(16 * MIB - 8192));
        assert_eq!(space.take_highest(13 * MIB), None);
        assert_eq!(space.take_highest(12 * MIB), Some(MIB));
        assert_eq!(space.take_highest(u64::MAX), None);
        assert_eq!(space.take_highest(0), Some(16 * MIB - 3 * 4096));
        let mut low = Space::new(Ram::with_size(16 * MIB), 4 * MIB + 1);
        assert_eq!(low.take_highest(1), Some(4 * MIB));
    }
}
