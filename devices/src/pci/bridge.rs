//! A PCI-to-PCI bridge: which bus is behind it, and which memory it forwards there (PCI-to-PCI
//! Bridge 1.2 §3.2, PCI Express 3.0 §7.5.3).
//!
//! The guest may write any numbers in any order. A bridge whose secondary bus is 0 or beyond its
//! subordinate bus leads nowhere, and a window whose limit is below its base is closed.

use std::ops::{Range, RangeInclusive};
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};

use super::config::Config;
use super::function::Upstream;

/// Primary, secondary and subordinate bus, from the lowest byte.
const BUSES: u16 = 0x18 / 4;
/// Base and limit of the windows: bits 31 to 20 of an address each.
const MEMORY: u16 = 0x20 / 4;
const PREFETCHABLE: u16 = 0x24 / 4;
/// The upper halves of base and limit of the prefetchable window.
const PREFETCHABLE_BASE: u16 = 0x28 / 4;
const PREFETCHABLE_LIMIT: u16 = 0x2c / 4;
/// The last register that moves a window.
pub(super) const LAST_WINDOW: u16 = PREFETCHABLE_LIMIT;

/// Base and limit of the prefetchable window have 64 bits.
const WIDE: u32 = 0x0001_0001;

/// Windows begin and end at multiples of this.
pub const WINDOW_UNIT: u64 = 1 << 20;

/// What firmware gives a bridge before the guest starts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Room {
    /// The bus behind it, the only one; not 0.
    pub secondary: u8,
    /// Addresses for BARs, below 4 GiB; whole multiples of [`WINDOW_UNIT`]. Empty: none.
    pub memory: Range<u64>,
    /// Addresses for prefetchable BARs; whole multiples of [`WINDOW_UNIT`]. Empty: none.
    pub prefetchable: Range<u64>,
}

/// The registers of a bridge, and whether its link is up.
#[derive(Debug)]
pub(super) struct Bridge {
    pub(super) config: Config,
    link: AtomicBool,
}

/// Base and limit as they are in a register. A closed window has its limit below its base.
fn window(range: &Range<u64>) -> (u64, u64) {
    assert!(
        range.start.is_multiple_of(WINDOW_UNIT) && range.end.is_multiple_of(WINDOW_UNIT),
        "{range:#x?} is no window of a bridge"
    );
    if range.is_empty() { (WINDOW_UNIT, 0) } else { (range.start, range.end - WINDOW_UNIT) }
}

fn bits(base: u64, limit: u64) -> u32 {
    (base as u32 >> 16) & 0xfff0 | limit as u32 & 0xfff0_0000
}

/// The header's bus numbers and windows. There is no window for ports: its register cannot be
/// written, which says so (PCI Express 3.0 §7.5.3.3 leaves it out for those who need none).
///
/// # Panics
/// If `room` is none that a bridge can have.
pub(super) fn define(config: &mut Config, room: &Room) {
    assert!(room.secondary != 0, "bus 0 is behind no bridge");
    assert!(room.memory.end <= 1 << 32, "{:#x?} is not below 4 GiB", room.memory);
    let secondary = u32::from(room.secondary);
    config.define(BUSES, secondary << 16 | secondary << 8, 0x00ff_ffff);
    let (base, limit) = window(&room.memory);
    config.define(MEMORY, bits(base, limit), 0xfff0_fff0);
    let (base, limit) = window(&room.prefetchable);
    config.define(PREFETCHABLE, bits(base, limit) | WIDE, 0xfff0_fff0);
    config.define(PREFETCHABLE_BASE, (base >> 32) as u32, u32::MAX);
    config.define(PREFETCHABLE_LIMIT, (limit >> 32) as u32, u32::MAX);
}

impl Bridge {
    /// A bridge with the registers of `config`, whose link is down.
    pub(super) fn new(config: Config) -> Self {
        Self { config, link: AtomicBool::new(false) }
    }

    /// Is `bus` right behind it?
    pub(super) fn leads_to(&self, bus: u8) -> bool {
        let [_, secondary, subordinate, _] = self.config.read(BUSES).to_le_bytes();
        bus != 0 && bus == secondary && bus <= subordinate
    }

    /// Is something at the other end?
    pub(super) fn link(&self) -> bool {
        self.link.load(SeqCst)
    }

    /// Takes the link up or down; true: it was not so before.
    pub(super) fn set_link(&self, up: bool) -> bool {
        self.link.swap(up, SeqCst) != up
    }

    /// The window for BARs that are not prefetchable.
    pub(super) fn memory(&self) -> RangeInclusive<u64> {
        let bits = self.config.read(MEMORY);
        u64::from(bits & 0xfff0) << 16..=u64::from(bits | 0xf_ffff)
    }

    fn prefetchable(&self) -> RangeInclusive<u64> {
        let bits = self.config.read(PREFETCHABLE);
        let upper = |register| u64::from(self.config.read(register)) << 32;
        let base = upper(PREFETCHABLE_BASE) | u64::from(bits & 0xfff0) << 16;
        base..=upper(PREFETCHABLE_LIMIT) | u64::from(bits | 0xf_ffff)
    }
}

impl Upstream for Bridge {
    fn forwards(&self, base: u64, size: u64) -> bool {
        let Some(last) = size.checked_sub(1).and_then(|more| base.checked_add(more)) else {
            return false;
        };
        let open = |window: RangeInclusive<u64>| window.contains(&base) && window.contains(&last);
        self.link()
            && self.config.decodes_memory()
            && (open(self.memory()) || open(self.prefetchable()))
    }
}

#[cfg(test)]
#[path = "bridge_tests.rs"]
mod tests;
