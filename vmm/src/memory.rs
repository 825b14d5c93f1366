//! Guest memory and the layout of the guest's physical addresses.
//!
//! ```text
//! 0          RAM, with the boot data at BOOT_DATA..1 MiB
//! 0xc0000000 PCI BARs
//! 0xe0000000 PCI configuration space (ECAM), one bus
//! 0xfeb00000 virtio-mmio devices, 4 KiB each
//! 0xfec00000 IOAPIC, 0xfee00000 local APICs, 0xfffbc000 KVM's own pages
//! 4 GiB      the rest of RAM
//! ```

#![expect(unsafe_code, reason = "memfd_create, and memory given to KVM")]

use std::fs::File;
use std::io;
use std::os::fd::FromRawFd;
use std::sync::Arc;

use devices::virtio::Mem;
use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{
    FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion,
    GuestRegionMmap,
};

/// ACPI tables and what the boot protocol hands over; reserved in the guest's memory map.
pub const BOOT_DATA: u64 = 0xe_0000;
/// Where ordinary memory begins again after the first MiB's holes.
pub const ONE_MIB: u64 = 0x10_0000;
/// RAM below 4 GiB ends here at the latest.
pub const LOW_RAM_END: u64 = 0xc000_0000;
/// The window for BARs.
pub const BARS: std::ops::Range<u64> = 0xc000_0000..0xe000_0000;
/// Configuration space of bus 0.
pub const ECAM: u64 = 0xe000_0000;
/// The window for virtio-mmio devices.
pub const MMIO_DEVICES: std::ops::Range<u64> = 0xfeb0_0000..0xfec0_0000;
/// RAM above the holes begins here.
pub const HIGH_RAM: u64 = 1 << 32;
/// KVM keeps an identity map (one page) and a TSS (three pages) here on Intel CPUs.
pub const KVM_PAGES: u64 = 0xfffb_c000;

/// Makes guest memory of `bytes` bytes in a memfd, with huge pages of `hugepages` bytes if given.
pub fn allocate(bytes: u64, hugepages: Option<u64>) -> io::Result<Mem> {
    let flags = match hugepages {
        Some(page) => libc::MFD_HUGETLB | page.trailing_zeros() << libc::MFD_HUGE_SHIFT,
        None => 0,
    };
    // SAFETY: the name is a C string, and the result is checked before it is owned.
    let memfd = unsafe {
        let fd = libc::memfd_create(c"heddle-guest".as_ptr(), flags | libc::MFD_CLOEXEC);
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        File::from_raw_fd(fd)
    };
    memfd.set_len(bytes)?;
    let memfd = Arc::new(memfd);
    let low = bytes.min(LOW_RAM_END);
    let parts = [(0, low, 0), (HIGH_RAM, bytes - low, low)];
    let mut regions = Vec::new();
    for (base, size, offset) in parts.into_iter().filter(|(_, size, _)| *size > 0) {
        // Huge pages are promised at the time of mapping; a guest must not die of a missing one.
        let reserve = if hugepages.is_some() { 0 } else { libc::MAP_NORESERVE };
        let mapping = MmapRegionBuilder::new(size as usize)
            .with_file_offset(FileOffset::from_arc(Arc::clone(&memfd), offset))
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_mmap_flags(libc::MAP_SHARED | reserve)
            .build()
            .map_err(|error| io::Error::other(error.to_string()))?;
        let region = GuestRegionMmap::new(mapping, GuestAddress(base))
            .ok_or_else(|| io::Error::other("memory beyond the address space"))?;
        regions.push(region);
    }
    let memory = GuestMemoryMmap::from_regions(regions).map_err(io::Error::other)?;
    Ok(Arc::new(memory))
}

/// Gives the memory to the guest. `vm` must not outlive `memory`, see the caller.
pub fn attach(vm: &VmFd, memory: &Mem) -> Result<(), kvm_ioctls::Error> {
    for (slot, region) in memory.iter().enumerate() {
        let slot = kvm_userspace_memory_region {
            slot: slot as u32,
            guest_phys_addr: region.start_addr().0,
            memory_size: region.len(),
            userspace_addr: region.as_ptr() as u64,
            flags: 0,
        };
        // SAFETY: the region is mapped, belongs to this process, and the machine that owns `vm`
        // keeps `memory` for as long as vCPUs can run.
        unsafe { vm.set_user_memory_region(slot) }?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_that_does_not_fit_below_the_holes_goes_on_at_4_gib() {
        let memory = allocate(LOW_RAM_END + (2 << 20), None).unwrap();
        let parts: Vec<_> = memory.iter().map(|r| (r.start_addr().0, r.len())).collect();
        assert_eq!(parts, [(0, LOW_RAM_END), (HIGH_RAM, 2 << 20)]);
    }
}
