//! Memory: the map from the loader, a heap that only grows, the page tables beyond 4 GiB, and
//! device registers.

use core::alloc::{GlobalAlloc, Layout};
use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crate::boot::{self, address};
use crate::gate;

const PAGE: u64 = 4096;
const LARGE: u64 = 2 << 20;
const HUGE: u64 = 1 << 30;
/// Entries of a page table.
const TABLE: u64 = 512;
/// Ring 3 has the addresses below.
const LOWER_HALF: u64 = 1 << 47;
/// Page table bits: present, writable, open to ring 3; a large page; where the next table is.
const OPEN: u64 = 7;
const LEAF: u64 = 0x80;
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

/// Whether there are pages of 1 GiB.
static HUGE_PAGES: AtomicBool = AtomicBool::new(false);

/// A piece of RAM.
#[derive(Clone, Copy, Default)]
pub struct Region {
    pub start: u64,
    pub end: u64,
}

impl Region {
    pub fn size(&self) -> u64 {
        self.end - self.start
    }
}

/// Hands out the largest region from its start; nothing is given back.
struct Heap {
    next: AtomicU64,
    end: AtomicU64,
}

#[global_allocator]
static HEAP: Heap = Heap { next: AtomicU64::new(0), end: AtomicU64::new(0) };

// SAFETY: each address range is handed out once, aligned, and lies in RAM that is mapped.
unsafe impl GlobalAlloc for Heap {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let (size, align) = (layout.size() as u64, layout.align() as u64);
        let mut start = 0;
        let taken = self.next.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |next| {
            start = next.next_multiple_of(align);
            let end = start.checked_add(size)?;
            (end <= self.end.load(Ordering::Relaxed)).then_some(end)
        });
        if taken.is_ok() { start as *mut u8 } else { core::ptr::null_mut() }
    }

    unsafe fn dealloc(&self, _: *mut u8, _: Layout) {}
}

/// Bytes the heap still has.
pub fn free() -> u64 {
    HEAP.end.load(Ordering::Relaxed).saturating_sub(HEAP.next.load(Ordering::Relaxed))
}

/// Memory for good, in whole pages, with whatever it holds.
pub fn pages(bytes: usize) -> &'static mut [u8] {
    let bytes = bytes.next_multiple_of(PAGE as usize).max(PAGE as usize);
    let layout = Layout::from_size_align(bytes, PAGE as usize).expect("a size that fits");
    // SAFETY: the size is not 0.
    let start = unsafe { alloc::alloc::alloc(layout) };
    assert!(!start.is_null(), "out of memory: {bytes} bytes wanted, {} free", free());
    // SAFETY: just allocated, never freed, and any byte is a valid `u8`.
    unsafe { core::slice::from_raw_parts_mut(start, bytes) }
}

/// Takes the largest piece of RAM above the image as the heap. Without pages of 1 GiB it must be
/// in the 4 GiB the image maps: other page tables come from the heap.
pub fn init(ram: &[Region]) {
    // SAFETY: only the address is taken.
    let image_end = unsafe { address(&boot::image_end) };
    let huge = gate::cpuid(0x8000_0000, 0)[0] >= 0x8000_0001
        && gate::cpuid(0x8000_0001, 0)[3] & 1 << 26 != 0;
    HUGE_PAGES.store(huge, Ordering::Relaxed);
    let reach = if huge { TABLE * HUGE } else { 4 * HUGE };
    let best = ram
        .iter()
        .map(|r| Region { start: r.start.max(image_end), end: r.end.min(reach) })
        .filter(|r| r.start < r.end)
        .max_by_key(Region::size)
        .unwrap_or_default();
    let mapped = map(best.start, best.end - best.start);
    HEAP.next.store(best.start.next_multiple_of(PAGE), Ordering::Relaxed);
    HEAP.end.store(if mapped { best.end } else { 0 }, Ordering::Relaxed);
}

/// Entry `index` of a page table.
fn entry(table: u64, index: u64) -> &'static AtomicU64 {
    assert!(index < TABLE);
    // SAFETY: `table` is one of our page tables, which stay for good; the processor reads them
    // concurrently, and writes only the bits that say an entry was used.
    unsafe { AtomicU64::from_ptr((table + 8 * index) as *mut u64) }
}

/// Sees to it that an address range is mapped, in the processor's lower half. False if it cannot
/// be. Only entries that were empty change, so no CPU has to be told.
#[must_use]
pub fn map(start: u64, bytes: u64) -> bool {
    let Some(end) = start.checked_add(bytes).filter(|&end| end <= LOWER_HALF) else { return false };
    // SAFETY: only the address is taken.
    let top = unsafe { address(&boot::boot_pml4) };
    for slot in start / HUGE..end.div_ceil(HUGE) {
        let upper = entry(top, slot / TABLE);
        if upper.load(Ordering::Relaxed) & 1 == 0 {
            let table = pages(PAGE as usize);
            table.fill(0);
            upper.store(table.as_ptr() as u64 | OPEN, Ordering::Relaxed);
        }
        let middle = entry(upper.load(Ordering::Relaxed) & ADDRESS, slot % TABLE);
        if middle.load(Ordering::Relaxed) & 1 != 0 {
            continue;
        }
        if HUGE_PAGES.load(Ordering::Relaxed) {
            middle.store((slot * HUGE) | OPEN | LEAF, Ordering::Relaxed);
            continue;
        }
        let table = pages(PAGE as usize).as_ptr() as u64;
        for i in 0..TABLE {
            entry(table, i).store((slot * HUGE + i * LARGE) | OPEN | LEAF, Ordering::Relaxed);
        }
        middle.store(table | OPEN, Ordering::Relaxed);
    }
    true
}

/// Reads a value the loader or the firmware left in memory.
///
/// # Safety
/// The address must be mapped, and `T` valid for any bytes.
pub unsafe fn read<T: Copy>(address: u64) -> T {
    // SAFETY: by the caller.
    unsafe { (address as *const T).read_unaligned() }
}

/// Registers of a device.
#[derive(Clone, Copy)]
pub struct Mmio {
    base: usize,
    bytes: usize,
}

impl Mmio {
    /// # Safety
    /// The range must be mapped and belong to a device, for as long as the value lives.
    pub const unsafe fn new(base: u64, bytes: usize) -> Self {
        Mmio { base: base as usize, bytes }
    }

    /// The registers from `offset` on.
    pub fn part(&self, offset: usize) -> Self {
        assert!(offset <= self.bytes);
        Mmio { base: self.base + offset, bytes: self.bytes - offset }
    }

    fn at<T>(&self, offset: usize) -> *mut T {
        assert!(offset + size_of::<T>() <= self.bytes, "register {offset:#x} is not there");
        (self.base + offset) as *mut T
    }

    pub fn read8(&self, offset: usize) -> u8 {
        // SAFETY: within the range; see `new`.
        unsafe { self.at::<u8>(offset).read_volatile() }
    }

    pub fn read16(&self, offset: usize) -> u16 {
        // SAFETY: as above.
        unsafe { self.at::<u16>(offset).read_volatile() }
    }

    pub fn read32(&self, offset: usize) -> u32 {
        // SAFETY: as above.
        unsafe { self.at::<u32>(offset).read_volatile() }
    }

    pub fn write8(&self, offset: usize, value: u8) {
        // SAFETY: as above.
        unsafe { self.at::<u8>(offset).write_volatile(value) };
    }

    pub fn write16(&self, offset: usize, value: u16) {
        // SAFETY: as above.
        unsafe { self.at::<u16>(offset).write_volatile(value) };
    }

    pub fn write32(&self, offset: usize, value: u32) {
        // SAFETY: as above.
        unsafe { self.at::<u32>(offset).write_volatile(value) };
    }

    /// A 64-bit register of two halves.
    pub fn write64(&self, offset: usize, value: u64) {
        self.write32(offset, value as u32);
        self.write32(offset + 4, (value >> 32) as u32);
    }
}
