//! Loading a kernel by the PVH protocol, and the state its first vCPU starts in.

use std::fs::File;
use std::io::{Cursor, Read, Seek, SeekFrom};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use kvm_bindings::{kvm_regs, kvm_segment};
use kvm_ioctls::VcpuFd;
use linux_loader::loader::KernelLoader;
use linux_loader::loader::elf::start_info::{
    hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info,
};
use linux_loader::loader::elf::{Elf, PvhBootCapability};
use vm_memory::{
    ByteValued, Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, ReadVolatile,
};

use crate::acpi;
use crate::memory::{BOOT_DATA, ECAM, HIGH_RAM, LOW_RAM_END, ONE_MIB};

/// What is wrong with what should be booted.
#[derive(Debug, thiserror::Error)]
#[error("{what}: {why}")]
pub struct BootError {
    what: String,
    why: String,
}

fn fail<T>(what: impl Into<String>, why: impl ToString) -> Result<T, BootError> {
    Err(BootError { what: what.into(), why: why.to_string() })
}

/// Where to take a kernel from.
#[derive(Debug, Clone, Copy)]
pub enum Kernel<'a> {
    /// An ELF file.
    File(&'a Path),
    /// An ELF in memory.
    Bytes(&'a [u8]),
}

/// What to boot.
#[derive(Debug, Clone, Copy)]
pub struct Boot<'a> {
    /// The kernel.
    pub kernel: Kernel<'a>,
    /// The first module.
    pub initrd: Option<&'a Path>,
    /// Its command line.
    pub cmdline: &'a str,
}

/// Where the first vCPU starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    /// Instruction pointer, 32-bit protected mode without paging.
    pub rip: u64,
    /// Address of the `hvm_start_info`, for EBX.
    pub start_info: u64,
}

/// Longest command line, with its final NUL.
const CMDLINE_MAX: usize = 4096;
/// Where the start info lies, after the ACPI tables; then modules, memory map, command line.
const START_INFO: u64 = 0xf_8000;
const MODULES: u64 = 0xf_8100;
const MEMORY_MAP: u64 = 0xf_8200;
const CMDLINE: u64 = 0xf_c000;

/// hvm_start_info: "xEn3" and the first version with a memory map.
const XEN_START_MAGIC: u32 = 0x336e_c578;
const XEN_START_VERSION: u32 = 1;
const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;

/// Puts kernel, modules, tables and start info into memory.
pub fn load(
    memory: &GuestMemoryMmap,
    boot: Boot<'_>,
    machine: &acpi::Description<'_>,
) -> Result<Entry, BootError> {
    let rip = match boot.kernel {
        Kernel::File(path) => {
            let what = path.display().to_string();
            let mut file = open(path).or_else(|why| fail(&what, why))?;
            load_elf(memory, &mut file, &what)?
        }
        Kernel::Bytes(bytes) => load_elf(memory, &mut Cursor::new(bytes), "the built-in guest")?,
    };
    let module = boot.initrd.map(|path| load_initrd(memory, path)).transpose()?;
    let tables = acpi::tables(BOOT_DATA, machine);
    if BOOT_DATA + tables.len() as u64 > START_INFO {
        return fail("ACPI tables", "too many vCPUs for the space below 1 MiB");
    }
    let put = |what: &str, bytes: &[u8], at: u64| {
        memory.write_slice(bytes, GuestAddress(at)).or_else(|why| fail(what, why))
    };
    put("ACPI tables", &tables, BOOT_DATA)?;
    let mut cmdline = boot.cmdline.as_bytes().to_vec();
    cmdline.push(0);
    if cmdline.len() > CMDLINE_MAX || boot.cmdline.contains('\0') {
        return fail(
            "boot.cmdline",
            format!("longer than {} bytes, or with a NUL", CMDLINE_MAX - 1),
        );
    }
    put("boot.cmdline", &cmdline, CMDLINE)?;
    if let Some(module) = &module {
        put("start info", module.as_slice(), MODULES)?;
    }
    let map = memory_map(memory);
    for (nth, entry) in map.iter().enumerate() {
        put("memory map", entry.as_slice(), MEMORY_MAP + (nth * size_of_val(entry)) as u64)?;
    }
    let info = hvm_start_info {
        magic: XEN_START_MAGIC,
        version: XEN_START_VERSION,
        nr_modules: u32::from(module.is_some()),
        modlist_paddr: if module.is_some() { MODULES } else { 0 },
        cmdline_paddr: CMDLINE,
        rsdp_paddr: BOOT_DATA,
        memmap_paddr: MEMORY_MAP,
        memmap_entries: map.len() as u32,
        ..hvm_start_info::default()
    };
    put("start info", info.as_slice(), START_INFO)?;
    Ok(Entry { rip, start_info: START_INFO })
}

/// Opens a regular file, and never waits for a pipe's other end.
fn open(path: &Path) -> std::io::Result<File> {
    let file = File::options().read(true).custom_flags(libc::O_NONBLOCK).open(path)?;
    match file.metadata()?.is_file() {
        true => Ok(file),
        false => Err(std::io::Error::other("not a regular file")),
    }
}

fn load_elf<F>(memory: &GuestMemoryMmap, file: &mut F, what: &str) -> Result<u64, BootError>
where
    F: Read + Seek + ReadVolatile,
{
    check_elf(memory, file, what)?;
    match Elf::load(memory, None, file, None) {
        Ok(loaded) => match loaded.pvh_boot_cap {
            PvhBootCapability::PvhEntryPresent(entry) => Ok(entry.0),
            _ => fail(
                what,
                "it has no PVH entry (an ELF note of owner \"Xen\" and type 18); for Linux use a \
                 vmlinux built with CONFIG_PVH",
            ),
        },
        Err(why) => fail(what, why),
    }
}

/// ELF64 header and program header fields this looks at: offset and size in bytes.
const PHOFF: usize = 32;
const PHENTSIZE: usize = 54;
const PHNUM: usize = 56;
const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;
const MOST_HEADERS: u16 = 128;
const MOST_NOTES: u64 = 64 << 10;

/// Refuses headers that ask for absurd amounts of work or for memory that is not there; names
/// the field.
fn check_elf<F: Read + Seek>(
    memory: &GuestMemoryMmap,
    file: &mut F,
    what: &str,
) -> Result<(), BootError> {
    let mut header = [0; 64];
    let read = |file: &mut F, at: u64, into: &mut [u8], field: &str| {
        let result = file.seek(SeekFrom::Start(at)).and_then(|_| file.read_exact(into));
        result.or_else(|_| fail(what, format!("the file ends before its {field}")))
    };
    read(file, 0, &mut header, "ELF header")?;
    if &header[..4] != b"\x7fELF" {
        return fail(what, "not an ELF file (a compressed bzImage is not supported yet)");
    }
    if header[4] != 2 || header[5] != 1 || header[18] != 62 {
        return fail(what, "not a 64-bit little-endian x86 ELF (e_ident, e_machine)");
    }
    let word = |bytes: &[u8], at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
    let long = |bytes: &[u8], at: usize| {
        bytes[at..at + 8].iter().rev().fold(0u64, |value, byte| value << 8 | u64::from(*byte))
    };
    let (headers, size) = (word(&header, PHNUM), word(&header, PHENTSIZE));
    if headers == 0 || headers > MOST_HEADERS || size != 56 {
        return fail(what, format!("e_phnum {headers} or e_phentsize {size} is absurd"));
    }
    let length = file.seek(SeekFrom::End(0)).or_else(|why| fail(what, why))?;
    for nth in 0..u64::from(headers) {
        let mut segment = [0; 56];
        let at = long(&header, PHOFF).checked_add(nth * 56);
        let Some(at) = at else { return fail(what, "e_phoff is beyond the file") };
        read(file, at, &mut segment, "program headers (e_phoff, e_phnum)")?;
        let kind = u32::from_le_bytes([segment[0], segment[1], segment[2], segment[3]]);
        let field = |at| long(&segment, at);
        let (offset, paddr, filesz, memsz) = (field(8), field(24), field(32), field(40));
        if kind != PT_LOAD && kind != PT_NOTE {
            continue;
        }
        if offset.checked_add(filesz).is_none_or(|end| end > length) {
            return fail(what, format!("segment {nth}: p_offset + p_filesz is beyond the file"));
        }
        if kind == PT_NOTE && filesz > MOST_NOTES {
            return fail(
                what,
                format!("segment {nth}: {filesz} bytes of notes (p_filesz) are absurd"),
            );
        }
        if kind == PT_LOAD {
            check_load(memory, paddr, filesz, memsz)
                .or_else(|why| fail(what, format!("segment {nth}: {why}")))?;
        }
    }
    Ok(())
}

fn check_load(memory: &GuestMemoryMmap, paddr: u64, filesz: u64, memsz: u64) -> Result<(), String> {
    if filesz > memsz {
        return Err(format!("p_filesz {filesz:#x} is more than p_memsz {memsz:#x}"));
    }
    let end = paddr.checked_add(memsz).ok_or("p_paddr + p_memsz wraps round")?;
    let inside = usize::try_from(memsz)
        .is_ok_and(|len| len == 0 || memory.check_range(GuestAddress(paddr), len));
    if !inside {
        return Err(format!(
            "p_paddr {paddr:#x} with p_memsz {memsz:#x} is not in guest memory; \
             is machine.memory too small?"
        ));
    }
    if paddr < ONE_MIB && end > BOOT_DATA {
        return Err(format!("p_paddr {paddr:#x} meets the boot data at {BOOT_DATA:#x}"));
    }
    Ok(())
}

/// Loads the module as high as it can lie below the hole.
fn load_initrd(memory: &GuestMemoryMmap, path: &Path) -> Result<hvm_modlist_entry, BootError> {
    let what = path.display().to_string();
    let mut file = open(path).or_else(|why| fail(&what, why))?;
    let size = file.metadata().or_else(|why| fail(&what, why))?.len();
    let low_end = memory.last_addr().0.saturating_add(1).min(LOW_RAM_END);
    let Some(at) = low_end.checked_sub(size).map(|at| at & !0xfff).filter(|at| *at >= ONE_MIB)
    else {
        return fail(what, format!("its {size} bytes do not fit into guest memory"));
    };
    memory
        .read_exact_volatile_from(GuestAddress(at), &mut file, size as usize)
        .or_else(|why| fail(&what, why))?;
    Ok(hvm_modlist_entry { paddr: at, size, ..hvm_modlist_entry::default() })
}

fn memory_map(memory: &GuestMemoryMmap) -> Vec<hvm_memmap_table_entry> {
    let entry = |from: u64, to: u64, type_: u32| hvm_memmap_table_entry {
        addr: from,
        size: to - from,
        type_,
        ..hvm_memmap_table_entry::default()
    };
    let end = memory.last_addr().0 + 1;
    let low_end = end.min(LOW_RAM_END);
    let mut map = vec![
        entry(0, BOOT_DATA - 0x4_0000, E820_RAM),
        entry(BOOT_DATA, ONE_MIB, E820_RESERVED),
        entry(ONE_MIB, low_end, E820_RAM),
        entry(ECAM, ECAM + ONE_MIB, E820_RESERVED),
    ];
    if end > HIGH_RAM {
        map.push(entry(HIGH_RAM, end, E820_RAM));
    }
    map
}

/// Puts a vCPU into the state the PVH protocol starts kernels in.
pub fn enter(vcpu: &VcpuFd, entry: Entry) -> Result<(), kvm_ioctls::Error> {
    let flat = |selector: u16, type_: u8| kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector,
        type_,
        present: 1,
        dpl: 0,
        db: 1,
        s: 1,
        l: 0,
        g: 1,
        ..kvm_segment::default()
    };
    let mut sregs = vcpu.get_sregs()?;
    let data = flat(0x10, 3);
    sregs.cs = flat(0x08, 11);
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    // A busy 32-bit TSS of the smallest size.
    sregs.tr = kvm_segment { limit: 0x67, type_: 11, s: 0, db: 0, g: 0, ..flat(0x18, 11) };
    sregs.cr0 = 0x11; // PE, ET
    sregs.cr4 = 0;
    sregs.efer = 0;
    vcpu.set_sregs(&sregs)?;
    let regs = kvm_regs { rip: entry.rip, rbx: entry.start_info, rflags: 2, ..kvm_regs::default() };
    vcpu.set_regs(&regs)
}
