//! Which device answers at which address.
//!
//! The map is an immutable sorted list, and a change (a BAR that moves) publishes a new one. A vCPU
//! has a [`View`]: the list as it was at its last exit, and one look at a pointer tells whether it
//! still is. So finding a device takes no lock and counts no reference to the list.

use std::fmt;
use std::sync::Arc;

use arc_swap::Cache;
use iothread::ExitCx;

use crate::device::Device;
use crate::snapshot::Snapshot;

#[derive(Clone)]
struct Range {
    base: u64,
    /// The last address, so that a range may end at the very top.
    last: u64,
    device: Arc<dyn Device>,
}

/// The range is empty, wraps round, or meets one that is taken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("no room for {size:#x} bytes at {base:#x}")]
pub struct Occupied {
    /// Start of the range that was asked for.
    pub base: u64,
    /// Its size in bytes.
    pub size: u64,
}

/// An address space: ports or memory-mapped registers.
pub struct Bus {
    ranges: Arc<Snapshot<Vec<Range>>>,
}

/// A bus, for one thread that accesses it again and again.
///
/// It keeps the devices of the list it saw last; those that were removed go with the next access.
pub struct View(Cache<Arc<Snapshot<Vec<Range>>>, Arc<Vec<Range>>>);

impl fmt::Debug for View {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("View").finish_non_exhaustive()
    }
}

impl fmt::Debug for Bus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ranges = self.ranges.load();
        f.debug_list().entries(ranges.iter().map(|range| range.base..=range.last)).finish()
    }
}

impl Default for Bus {
    fn default() -> Self {
        Self { ranges: Arc::new(Snapshot::from_pointee(Vec::new())) }
    }
}

impl Bus {
    /// Lets `device` answer on `size` bytes from `base`.
    pub fn insert(&self, base: u64, size: u64, device: Arc<dyn Device>) -> Result<(), Occupied> {
        let occupied = Occupied { base, size };
        let last = size.checked_sub(1).and_then(|n| base.checked_add(n)).ok_or(occupied.clone())?;
        let new = Range { base, last, device };
        let mut free = true;
        self.ranges.rcu(|ranges| {
            let at = ranges.partition_point(|range| range.base < base);
            free = at.checked_sub(1).is_none_or(|before| ranges[before].last < base)
                && ranges.get(at).is_none_or(|after| last < after.base);
            if !free {
                return Arc::clone(ranges);
            }
            let mut ranges = Vec::clone(ranges);
            ranges.insert(at, new.clone());
            Arc::new(ranges)
        });
        free.then_some(()).ok_or(occupied)
    }

    /// Nothing answers any more on the range that starts at `base`.
    pub fn remove(&self, base: u64) {
        self.ranges.rcu(|ranges| {
            ranges.iter().filter(|range| range.base != base).cloned().collect::<Vec<_>>()
        });
    }

    /// The bus for the calling thread.
    pub fn view(&self) -> View {
        View(Cache::new(Arc::clone(&self.ranges)))
    }

    /// Reads; where no device answers, all bits are set and the result is false.
    pub fn read(&self, address: u64, data: &mut [u8], exit: &mut ExitCx<'_>) -> bool {
        read(find(&self.ranges.load(), address, data.len()), data, exit)
    }

    /// Writes; false: no device answers there.
    pub fn write(&self, address: u64, data: &[u8], exit: &mut ExitCx<'_>) -> bool {
        write(find(&self.ranges.load(), address, data.len()), data, exit)
    }
}

impl View {
    /// As [`Bus::read`].
    pub fn read(&mut self, address: u64, data: &mut [u8], exit: &mut ExitCx<'_>) -> bool {
        read(find(self.0.load(), address, data.len()), data, exit)
    }

    /// As [`Bus::write`].
    pub fn write(&mut self, address: u64, data: &[u8], exit: &mut ExitCx<'_>) -> bool {
        write(find(self.0.load(), address, data.len()), data, exit)
    }
}

type Found = Option<(Arc<dyn Device>, u64)>;

/// The device that answers for all of `len` bytes at `address`. It is cloned out, so that a device
/// may change the map it is found in.
fn find(ranges: &[Range], address: u64, len: usize) -> Found {
    let at = ranges.partition_point(|range| range.base <= address).checked_sub(1)?;
    let range = &ranges[at];
    let end = address.checked_add((len as u64).checked_sub(1)?)?;
    (end <= range.last).then(|| (Arc::clone(&range.device), address - range.base))
}

fn read(found: Found, data: &mut [u8], exit: &mut ExitCx<'_>) -> bool {
    let Some((device, offset)) = found else {
        data.fill(0xff);
        return false;
    };
    device.read(offset, data, exit);
    true
}

fn write(found: Found, data: &[u8], exit: &mut ExitCx<'_>) -> bool {
    let Some((device, offset)) = found else { return false };
    device.write(offset, data, exit);
    true
}

#[cfg(test)]
mod tests {
    use super::*;
    use iothread::VcpuLoop;

    struct Tag(u8);

    impl Device for Tag {
        fn read(&self, offset: u64, data: &mut [u8], _: &mut ExitCx<'_>) {
            data.fill(self.0 + offset as u8);
        }
        fn write(&self, _: u64, _: &[u8], _: &mut ExitCx<'_>) {}
    }

    fn read(bus: &Bus, address: u64, len: usize) -> Vec<u8> {
        let mut data = vec![0; len];
        bus.read(address, &mut data, &mut VcpuLoop::enter().exit());
        data
    }

    #[test]
    fn each_address_finds_its_device_and_the_gaps_find_none() {
        let bus = Bus::default();
        bus.insert(0x10, 0x10, Arc::new(Tag(0))).unwrap();
        bus.insert(0x30, 0x10, Arc::new(Tag(0x80))).unwrap();
        assert_eq!(read(&bus, 0x1f, 1), [0x0f]);
        assert_eq!(read(&bus, 0x30, 2), [0x80, 0x80]);
        assert_eq!(read(&bus, 0x20, 4), [0xff; 4]);
        assert_eq!(read(&bus, 0x1e, 4), [0xff; 4], "an access that leaves the range finds nothing");
        bus.remove(0x10);
        assert_eq!(read(&bus, 0x1f, 1), [0xff]);
    }

    #[test]
    fn ranges_that_meet_wrap_or_are_empty_are_refused() {
        let bus = Bus::default();
        bus.insert(0x10, 0x10, Arc::new(Tag(0))).unwrap();
        for (base, size) in [(0x10, 1), (0x1f, 1), (0, 0x11), (0, 0x100), (0x40, 0), (u64::MAX, 2)]
        {
            assert_eq!(bus.insert(base, size, Arc::new(Tag(1))), Err(Occupied { base, size }));
        }
        bus.insert(u64::MAX, 1, Arc::new(Tag(1))).unwrap();
        assert_eq!(read(&bus, u64::MAX, 1), [1]);
    }

    #[test]
    fn a_view_sees_what_has_come_and_gone_since() {
        let (bus, mut vcpu) = (Bus::default(), VcpuLoop::enter());
        let mut view = bus.view();
        let mut sees = |view: &mut View, base: u64| view.read(base, &mut [0], &mut vcpu.exit());
        assert!(!sees(&mut view, 0x1000));
        let device = Arc::new(Tag(0));
        bus.insert(0x1000, 0x10, Arc::clone(&device) as Arc<dyn Device>).unwrap();
        assert!(sees(&mut view, 0x1000));
        bus.remove(0x1000);
        bus.insert(0x2000, 0x10, device).unwrap();
        assert!(!sees(&mut view, 0x1000) && sees(&mut view, 0x2000));
    }
}
