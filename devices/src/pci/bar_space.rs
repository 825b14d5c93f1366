//! Where BARs are put before the guest starts, as firmware would.

/// A window of addresses for BARs, given out from the bottom up.
#[derive(Debug, Clone)]
pub struct BarSpace {
    next: u64,
    end: u64,
}

impl BarSpace {
    /// The addresses from `base` up to, not including, `end`.
    pub fn new(base: u64, end: u64) -> Self {
        Self { next: base, end }
    }

    /// An address for a BAR of `size` bytes, a power of two, aligned to its size (PCI 3.0
    /// §6.2.5.1). `None`: the window is too small.
    pub fn allocate(&mut self, size: u64) -> Option<u64> {
        let base = self.next.checked_next_multiple_of(size)?;
        let next = base.checked_add(size)?;
        (next <= self.end).then(|| {
            self.next = next;
            base
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_aligned_to_their_size_and_do_not_meet() {
        let mut space = BarSpace::new(0x1000, 0x9000);
        assert_eq!(space.allocate(0x1000), Some(0x1000));
        assert_eq!(space.allocate(0x4000), Some(0x4000));
        assert_eq!(space.allocate(0x1000), Some(0x8000));
        assert_eq!(space.allocate(0x10), None);
    }

    #[test]
    fn a_window_that_is_too_small_gives_nothing_and_stays_as_it_was() {
        let mut space = BarSpace::new(0x1000, 0x2000);
        assert_eq!(space.allocate(1 << 63), None);
        assert_eq!(space.allocate(0), None);
        assert_eq!(space.allocate(0x1000), Some(0x1000));
    }
}
