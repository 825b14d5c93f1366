//! Guest memory and the layout of the guest's physical addresses.
//!
//! ```text
//! 0          RAM, with the boot data at BOOT_DATA..1 MiB
//! 0xc0000000 PCI BARs
//! 0xe0000000 PCI configuration space (ECAM), 1 MiB per bus
//! 0xfeb00000 virtio-mmio devices, 4 KiB each
//! 0xfec00000 IOAPIC, 0xfee00000 local APICs, 0xfffbc000 KVM's own pages
//! 4 GiB      the rest of RAM
//! ```

#![expect(unsafe_code, reason = "memfd_create, mmap, mbind, and memory given to KVM")]

use std::fs::{self, File};
use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, FromRawFd};
use std::sync::Arc;

use config::CpuSet;
use config::plan::{self, Plan};
use config::units::format_size;
use devices::virtio::Mem;
use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{
    FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion,
    GuestRegionMmap,
};

use crate::host_error::HostError;
use crate::resources::Fallback;

/// ACPI tables and what the boot protocol hands over; reserved in the guest's memory map.
pub const BOOT_DATA: u64 = 0xe_0000;
/// Where ordinary memory begins again after the first MiB's holes.
pub const ONE_MIB: u64 = 0x10_0000;
/// RAM below 4 GiB ends here at the latest.
pub const LOW_RAM_END: u64 = 0xc000_0000;
/// The window for BARs.
pub const BARS: Range<u64> = 0xc000_0000..0xe000_0000;
/// Configuration space, from bus 0 on.
pub const ECAM: u64 = 0xe000_0000;
/// The window for virtio-mmio devices.
pub const MMIO_DEVICES: Range<u64> = 0xfeb0_0000..0xfec0_0000;
/// RAM above the holes begins here.
pub const HIGH_RAM: u64 = 1 << 32;
/// KVM keeps an identity map (one page) and a TSS (three pages) here on Intel CPUs.
pub const KVM_PAGES: u64 = 0xfffb_c000;

/// Memory is mapped at addresses that are those of the guest modulo this, so that one huge page
/// of the host can back one of the guest.
const ALIGN: u64 = 2 << 20;

/// Guest memory and its mappings.
#[derive(Debug)]
pub struct GuestMemory {
    mem: Mem,
    /// Of `mem`'s regions, which do not own them.
    mappings: Vec<Mapping>,
}

impl GuestMemory {
    /// Where it is mapped.
    pub fn addresses(&self) -> Vec<Range<usize>> {
        self.mappings.iter().map(|it| it.address..it.address + it.size).collect()
    }

    /// The memory, for those who use it.
    pub fn mem(&self) -> &Mem {
        &self.mem
    }
}

impl std::ops::Deref for GuestMemory {
    type Target = GuestMemoryMmap;

    fn deref(&self) -> &GuestMemoryMmap {
        &self.mem
    }
}

impl Drop for GuestMemory {
    fn drop(&mut self) {
        // Who still has a part in it (requests that did not end) keeps it mapped for good.
        if Arc::get_mut(&mut self.mem).is_none() {
            self.mappings.drain(..).for_each(std::mem::forget);
        }
    }
}

/// A mapping that is undone when it goes.
#[derive(Debug)]
struct Mapping {
    address: usize,
    size: usize,
}

impl Mapping {
    /// Maps `size` bytes, of `file` from `offset` if there is one, at a multiple of `align`.
    fn new(
        file: Option<&File>,
        offset: u64,
        size: usize,
        align: usize,
        flags: i32,
    ) -> io::Result<Self> {
        // mmap itself aligns huge pages, and on some kernels also what may become huge pages; a
        // reservation that is large enough and cut to size always is aligned.
        let room = size.checked_add(align).ok_or(io::ErrorKind::OutOfMemory)?;
        let reserve = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        let map = |at, size, prot, flags, fd, offset: u64| {
            // SAFETY: where `flags` has MAP_FIXED, `at` lies in a reservation made right here.
            match unsafe { libc::mmap(at, size, prot, flags, fd, offset as libc::off_t) } {
                libc::MAP_FAILED => Err(io::Error::last_os_error()),
                address => Ok(address),
            }
        };
        let start = map(std::ptr::null_mut(), room, libc::PROT_NONE, reserve, -1, 0)? as usize;
        let reserved = Self { address: start, size: room };
        let address = start.next_multiple_of(align);
        let (prot, flags) = (libc::PROT_READ | libc::PROT_WRITE, flags | libc::MAP_FIXED);
        let fd = file.map_or(-1, AsRawFd::as_raw_fd);
        map(address as *mut _, size, prot, flags, fd, if fd < 0 { 0 } else { offset })?;
        std::mem::forget(reserved);
        drop(Self { address: start, size: address - start });
        drop(Self { address: address + size, size: start + room - address - size });
        Ok(Self { address, size })
    }

    /// What the kernel may like to know about the mapping.
    fn advise(&self, advice: i32) -> io::Result<()> {
        // SAFETY: the range is this mapping; none of the advices used changes what it holds.
        match unsafe { libc::madvise(self.address as *mut _, self.size, advice) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        if self.size > 0 {
            // SAFETY: the range was mapped by `new`, and nobody refers to it any more.
            unsafe { libc::munmap(self.address as *mut _, self.size) };
        }
    }
}

/// What guest memory is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Backing {
    /// Memory of this process alone, in huge pages wherever the kernel finds them.
    Private,
    /// A memfd, which can be given to others.
    Shared,
    /// A memfd of huge pages of so many bytes from the host's pool.
    Huge(u64),
}

impl Backing {
    /// As the plan wants it.
    pub fn of(machine: &plan::Machine) -> Self {
        match machine.hugepages {
            Some(page) => Self::Huge(page),
            None if machine.shared => Self::Shared,
            None => Self::Private,
        }
    }
}

/// Makes guest memory of `bytes` bytes.
pub fn allocate(bytes: u64, backing: Backing) -> Result<GuestMemory, HostError> {
    let hugepages = match backing {
        Backing::Huge(page) => Some(page),
        Backing::Private | Backing::Shared => None,
    };
    // Huge pages are promised at the time of mapping; a guest must not die of a missing one.
    let reserve = if hugepages.is_some() { 0 } else { libc::MAP_NORESERVE };
    map(bytes, backing, reserve).map_err(|error| {
        let no_room = matches!(error.raw_os_error(), Some(libc::ENOMEM | libc::ENOSPC));
        match hugepages {
            Some(page) if no_room => too_few_hugepages(bytes, page),
            Some(_) if matches!(error.raw_os_error(), Some(libc::ENODEV | libc::ENOSYS)) => HostError::new(
                "machine.memory.hugepages",
                "this kernel has no huge pages of this size: set the other one, or leave it out",
            ),
            _ => HostError::new("machine.memory", error),
        }
    })
}

/// What to say when `bytes` bytes in huge pages of `page` bytes are not there.
fn too_few_hugepages(bytes: u64, page: u64) -> HostError {
    let kib = page / 1024;
    let dir = format!("/sys/kernel/mm/hugepages/hugepages-{kib}kB");
    let read = |file: &str| fs::read_to_string(format!("{dir}/{file}"));
    let number = |file: &str| read(file).ok()?.trim().parse::<u64>().ok();
    let free = match (number("free_hugepages"), number("resv_hugepages")) {
        (Some(free), Some(promised)) => format!("{} are free", free.saturating_sub(promised)),
        _ => "this kernel has none of this size".to_owned(),
    };
    let (need, size) = (bytes / page, format_size(page));
    let why = format!(
        "{need} huge pages of {size} are needed, {free}: raise {dir}/nr_hugepages, or \
         the cgroup's limit of them, or leave `hugepages` out"
    );
    HostError::new("machine.memory.hugepages", why)
}

/// A memfd of `bytes` bytes; `flags` say of which pages.
fn memfd(bytes: u64, flags: u32) -> io::Result<Arc<File>> {
    // SAFETY: the name is a C string, and the result is checked before it is owned.
    let memfd = unsafe {
        let fd = libc::memfd_create(c"heddle-guest".as_ptr(), flags | libc::MFD_CLOEXEC);
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        File::from_raw_fd(fd)
    };
    memfd.set_len(bytes)?;
    Ok(Arc::new(memfd))
}

pub(crate) fn map(bytes: u64, backing: Backing, reserve: i32) -> io::Result<GuestMemory> {
    // Both regions begin at multiples of 1 GiB in the guest and in the file, so a multiple of the
    // page is congruent to either.
    let (file, align, kind) = match backing {
        Backing::Private => (None, ALIGN, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS),
        Backing::Shared => (Some(memfd(bytes, 0)?), ALIGN, libc::MAP_SHARED),
        Backing::Huge(page) => {
            let flags = libc::MFD_HUGETLB | page.trailing_zeros() << libc::MFD_HUGE_SHIFT;
            (Some(memfd(bytes, flags)?), page, libc::MAP_SHARED)
        }
    };
    let mut mappings = Vec::new();
    let mut regions = Vec::new();
    for range in guest_ranges(0..bytes) {
        let (size, offset) = ((range.end - range.start) as usize, offset_of(range.start));
        let flags = kind | reserve;
        let mapping = Mapping::new(file.as_deref(), offset, size, align as usize, flags)?;
        // A core dump is for heddle's bugs, not for the guest's secrets.
        mapping.advise(libc::MADV_DONTDUMP)?;
        if !matches!(backing, Backing::Huge(_)) {
            // Fewer faults of the guest and shorter walks: Linux takes 19,000 exits less to its
            // first program. Private memory gets huge pages for the asking by default, a memfd only
            // with shmem_enabled = advise. A kernel without them may refuse (EINVAL).
            let _ = mapping.advise(libc::MADV_HUGEPAGE);
        }
        let builder = MmapRegionBuilder::new(size)
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_mmap_flags(flags);
        let builder = match &file {
            Some(file) => builder.with_file_offset(FileOffset::from_arc(Arc::clone(file), offset)),
            None => builder,
        };
        // SAFETY: the mapping has this size, and is there for as long as anyone has the region:
        // see the Drop of GuestMemory.
        let region = unsafe { builder.with_raw_mmap_pointer(mapping.address as *mut u8) };
        let region = region.build().map_err(|error| io::Error::other(error.to_string()))?;
        let region = GuestRegionMmap::new(region, GuestAddress(range.start))
            .ok_or_else(|| io::Error::other("memory beyond the address space"))?;
        mappings.push(mapping);
        regions.push(region);
    }
    let memory = GuestMemoryMmap::from_regions(regions).map_err(io::Error::other)?;
    Ok(GuestMemory { mem: Arc::new(memory), mappings })
}

/// Where the guest has the part `offsets` of its memory: in one range, or on both sides of the
/// hole below 4 GiB.
pub fn guest_ranges(offsets: Range<u64>) -> Vec<Range<u64>> {
    let low = offsets.start.min(LOW_RAM_END)..offsets.end.min(LOW_RAM_END);
    let above = |offset: u64| offset.max(LOW_RAM_END) - LOW_RAM_END + HIGH_RAM;
    let high = above(offsets.start)..above(offsets.end);
    [low, high].into_iter().filter(|range| !range.is_empty()).collect()
}

/// The offset of a guest-physical address of memory.
fn offset_of(address: u64) -> u64 {
    if address < LOW_RAM_END { address } else { address - HIGH_RAM + LOW_RAM_END }
}

/// A NUMA node of the guest, for the tables that tell it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GuestNode {
    /// Its vCPUs by number.
    pub vcpus: CpuSet,
    /// Its guest-physical memory, ascending: one range, or two around the hole below 4 GiB.
    pub ranges: Vec<Range<u64>>,
    /// The distances to all nodes, itself included, as in ACPI's SLIT.
    pub distances: Vec<u8>,
}

/// The guest's nodes, by number; none if the file names none. Each byte of memory and each vCPU is
/// in exactly one.
pub fn nodes(plan: &Plan) -> Vec<GuestNode> {
    const LOCAL: u8 = 10;
    const REMOTE: u8 = 20;
    let mut start = 0;
    let node = |(nth, node): (usize, &plan::GuestNode)| {
        let end = start + node.memory;
        let ranges = guest_ranges(start..end);
        start = end;
        let to = |other| if other == nth { LOCAL } else { REMOTE };
        let distances =
            node.distances.clone().unwrap_or_else(|| (0..plan.numa.len()).map(to).collect());
        GuestNode { vcpus: node.vcpus.clone(), ranges, distances }
    };
    plan.numa.iter().enumerate().map(node).collect()
}

/// Has the memory of each guest node come from its host node, and from nowhere else. Before any of
/// it is touched. What the host refuses comes from wherever the kernel likes.
pub fn bind(memory: &Mem, plan: &Plan) -> Vec<Fallback> {
    let mut fallbacks = Vec::new();
    for (nth, (node, place)) in nodes(plan).iter().zip(&plan.numa).enumerate() {
        let Some(host) = place.host_node else { continue };
        let bind = |range: &Range<u64>| bind_to(host_slice(memory, range.clone())?, host);
        if let Err(error) = node.ranges.iter().try_for_each(bind) {
            let why = match error.raw_os_error() {
                Some(libc::ENOSYS) => "this kernel has no NUMA".to_owned(),
                Some(libc::EPERM) => "not permitted here: a sandbox forbids mbind".to_owned(),
                Some(libc::EINVAL) => {
                    "the host has no such node, or the cpuset forbids its memory".to_owned()
                }
                _ => error.to_string(),
            };
            let what = format!("wanted memory of host node {host}, got that of any: {why}");
            fallbacks.push(Fallback { whose: format!("numa node {nth}"), what });
        }
    }
    fallbacks
}

/// The host's address and length of a guest-physical range.
pub fn host_slice(memory: &Mem, range: Range<u64>) -> io::Result<(*mut u8, usize)> {
    let size = (range.end - range.start) as usize;
    let slice = memory.get_slice(GuestAddress(range.start), size).map_err(io::Error::other)?;
    Ok((slice.ptr_guard_mut().as_ptr(), size))
}

fn bind_to((address, size): (*mut u8, usize), node: u32) -> io::Result<()> {
    let mut mask = [0u64; 17];
    mask[node as usize / 64 % 16] = 1 << (node % 64);
    // The kernel takes one bit less than it is told there are.
    let bits = (16 * u64::BITS + 1) as libc::c_ulong;
    // SAFETY: the mask has as many bits and is only read; a policy changes no contents.
    let result = unsafe {
        libc::syscall(libc::SYS_mbind, address, size, libc::MPOL_BIND, mask.as_ptr(), bits, 0)
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
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
pub(crate) mod tests {
    use std::os::unix::fs::MetadataExt;
    use std::path::Path;

    use super::*;

    /// The plan of a file.
    pub(crate) fn plan(text: &str) -> Plan {
        config::load_str("vm.toml", text, Path::new("/"), &[]).unwrap().plan
    }

    /// The lines that the kernel has on the mapping that begins with this region.
    pub(crate) fn smaps(region: &GuestRegionMmap) -> Option<String> {
        let start = format!("{:x}-", region.as_ptr() as usize);
        let all = fs::read_to_string("/proc/self/smaps").unwrap();
        let mut lines = all.lines().skip_while(|line| !line.starts_with(&start));
        let first = lines.next()?.to_owned();
        let is_field = |line: &&str| line.split(' ').next().is_some_and(|word| word.ends_with(':'));
        Some(lines.take_while(is_field).fold(first, |text, line| text + "\n" + line))
    }

    #[test]
    fn memory_that_does_not_fit_below_the_holes_goes_on_at_4_gib() {
        let memory = allocate(LOW_RAM_END + (2 << 20), Backing::Shared).unwrap();
        let parts: Vec<_> = memory.mem().iter().map(|r| (r.start_addr().0, r.len())).collect();
        assert_eq!(parts, [(0, LOW_RAM_END), (HIGH_RAM, 2 << 20)]);
    }

    #[test]
    fn a_huge_page_of_the_host_can_back_one_of_the_guest() {
        // Several, because one alone may be aligned by chance.
        let all: Vec<_> =
            (1..=8).map(|n| allocate(LOW_RAM_END + n * ALIGN, Backing::Shared).unwrap()).collect();
        for region in all.iter().flat_map(|memory| memory.mem().iter()) {
            let file = region.file_offset().unwrap().start();
            for address in [region.as_ptr() as u64, file] {
                assert_eq!(address % ALIGN, region.start_addr().0 % ALIGN, "{address:#x}");
            }
            let smaps = smaps(region).unwrap();
            let flags = smaps.lines().find_map(|line| line.strip_prefix("VmFlags:")).unwrap();
            assert!(flags.contains(" dd"), "no part of a core dump: {flags}");
            let has_thp = Path::new("/sys/kernel/mm/transparent_hugepage").exists();
            assert_eq!(flags.contains(" hg"), has_thp, "{flags}");
        }
    }

    #[test]
    fn mappings_for_pages_of_1_gib_are_aligned_to_it() {
        let memory = allocate(ALIGN, Backing::Shared).unwrap();
        let file = memory.mem().iter().next().unwrap().file_offset().unwrap().file();
        // Two, of which no kernel would align both by itself.
        let map =
            || Mapping::new(Some(file), 0, ALIGN as usize, 1 << 30, libc::MAP_SHARED).unwrap();
        for mapping in [map(), map()] {
            assert_eq!((mapping.address % (1 << 30), mapping.size), (0, ALIGN as usize));
        }
    }

    #[test]
    fn mappings_go_with_their_last_user() {
        // The address may be another test's by then; the inode is nobody else's.
        let inode = |memory: &GuestMemory| {
            let region = memory.mem().iter().next().unwrap();
            region.file_offset().unwrap().file().metadata().unwrap().ino()
        };
        let is_mapped = |inode: u64| {
            let maps = fs::read_to_string("/proc/self/maps").unwrap();
            maps.lines().any(|line| line.contains(&format!(" {inode} ")) && line.contains("heddle"))
        };
        let memory = allocate(ALIGN, Backing::Shared).unwrap();
        let first = inode(&memory);
        assert!(is_mapped(first));
        let user = Arc::clone(memory.mem());
        drop(memory);
        assert!(is_mapped(first), "somebody may still write there");
        drop(user);
        let memory = allocate(LOW_RAM_END + ALIGN, Backing::Shared).unwrap();
        let second = inode(&memory);
        assert!(is_mapped(second));
        drop(memory);
        assert!(!is_mapped(second));
    }

    #[test]
    fn nodes_lie_one_after_the_other_around_the_hole() {
        assert_eq!(nodes(&plan("")), []);
        let text = "[machine]\ncpus = 4\n\
            [[numa]]\nvcpus = \"0,3\"\nmemory = \"2G\"\n\
            [[numa]]\nvcpus = \"1-2\"\nmemory = \"2G\"\n\
            [[numa]]\nmemory = \"2M\"";
        let nodes = nodes(&plan(text));
        let seen: Vec<_> =
            nodes.iter().map(|node| (node.vcpus.to_string(), node.ranges.clone())).collect();
        let gib = 1u64 << 30;
        let low = (0..2 * gib, 2 * gib..3 * gib);
        let high = (4 * gib..5 * gib, 5 * gib..5 * gib + ALIGN);
        assert_eq!(
            seen,
            [
                ("0,3".to_owned(), vec![low.0]),
                ("1-2".to_owned(), vec![low.1, high.0]),
                (String::new(), vec![high.1]),
            ]
        );
        assert_eq!(nodes[1].distances, [20, 10, 20]);
        let said = "[[numa]]\nvcpus = \"0\"\nmemory = \"3G\"\ndistances = [10, 31]\n\
            [[numa]]\nmemory = \"2M\"\ndistances = [31, 10]";
        let nodes = super::nodes(&plan(said));
        let ranges: Vec<_> = nodes.iter().flat_map(|node| node.ranges.clone()).collect();
        assert_eq!(ranges, [0..LOW_RAM_END, HIGH_RAM..HIGH_RAM + ALIGN]);
        assert_eq!((nodes[0].ranges.len(), nodes[0].distances[1]), (1, 31));
    }

    #[test]
    fn memory_is_bound_to_its_host_node_or_it_is_said() {
        let text = "[[numa]]\nvcpus = \"0\"\nmemory = \"4M\"\n\
            [[numa]]\nmemory = \"2M\"\nhost-node = 0\n\
            [[numa]]\nmemory = \"2M\"\nhost-node = 1023";
        let plan = plan(text);
        let memory = allocate(plan.machine.memory, Backing::Shared).unwrap();
        let fallbacks = bind(memory.mem(), &plan);
        let last = fallbacks.last().unwrap();
        assert_eq!(last.whose, "numa node 2");
        assert!(last.what.starts_with("wanted memory of host node 1023"), "{}", last.what);
        if fallbacks.len() == 1 {
            let start = memory.mem().iter().next().unwrap().as_ptr() as usize;
            let maps = fs::read_to_string("/proc/self/numa_maps").unwrap();
            let policy = |at: usize| {
                let line = maps.lines().find_map(|line| line.strip_prefix(&format!("{at:x} ")));
                line.map(|line| line.split(' ').next().unwrap_or_default())
            };
            assert_eq!(policy(start), Some("default"));
            assert_eq!(policy(start + (4 << 20)), Some("bind:0"));
            assert_eq!(policy(start + (6 << 20)), Some("default"));
        }
    }

    #[test]
    fn huge_pages_that_are_not_there_are_an_error_and_not_a_signal() {
        // More than any host has.
        let error = allocate(64 << 40, Backing::Huge(2 << 20)).unwrap_err().to_string();
        assert!(error.starts_with("machine.memory.hugepages: "), "{error}");
    }
}
