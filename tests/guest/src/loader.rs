//! What the loader says (PVH): memory, command line, ACPI.

use alloc::string::String;
use alloc::vec::Vec;

use crate::mem::{self, Region};

const MAGIC: u32 = 0x336e_c578;
const RAM: u32 = 1;
const REGIONS: usize = 64;
const CMDLINE: usize = 2048;

#[derive(Clone, Copy)]
#[repr(C)]
struct StartInfo {
    magic: u32,
    version: u32,
    flags: u32,
    modules: u32,
    module_list: u64,
    cmdline: u64,
    rsdp: u64,
    memmap: u64,
    memmap_entries: u32,
    reserved: u32,
}

#[derive(Clone, Copy)]
#[repr(C)]
struct MemmapEntry {
    start: u64,
    size: u64,
    kind: u32,
    reserved: u32,
}

pub struct Loader {
    pub ram: Vec<Region>,
    pub cmdline: String,
    pub rsdp: Option<u64>,
}

impl Loader {
    /// Reads everything to the stack, starts the heap, then keeps it there: what the loader left
    /// may lie in memory the heap takes.
    ///
    /// # Safety
    /// `info` must be the address of a `hvm_start_info`, and nothing may have used the heap.
    pub unsafe fn read(info: u64) -> Result<Self, &'static str> {
        // SAFETY: by the caller; the loader's structures are below 4 GiB, which is mapped.
        let start: StartInfo = unsafe { mem::read(info) };
        if start.magic != MAGIC {
            return Err("the loader gave no start info");
        }
        if start.version < 1 || start.memmap == 0 {
            return Err("the loader gave no memory map");
        }
        let mut regions = [Region::default(); REGIONS];
        let mut found = 0;
        for i in 0..u64::from(start.memmap_entries) {
            // SAFETY: an entry of the loader's table.
            let entry: MemmapEntry = unsafe { mem::read(start.memmap + 24 * i) };
            if entry.kind == RAM && entry.size != 0 && found < REGIONS {
                regions[found] = Region { start: entry.start, end: entry.start + entry.size };
                found += 1;
            }
        }
        let mut text = [0u8; CMDLINE];
        let mut length = 0;
        while start.cmdline != 0 && length < CMDLINE {
            // SAFETY: a byte of a string that has not ended yet.
            match unsafe { mem::read::<u8>(start.cmdline + length as u64) } {
                0 => break,
                byte => text[length] = byte,
            }
            length += 1;
        }
        mem::init(&regions[..found]);
        Ok(Loader {
            ram: regions[..found].to_vec(),
            cmdline: String::from_utf8_lossy(&text[..length]).trim().into(),
            rsdp: (start.rsdp != 0).then_some(start.rsdp),
        })
    }

    /// A page below 640 KiB for real-mode code.
    pub fn low_page(&self) -> Option<u64> {
        self.ram
            .iter()
            .map(|r| (r.start.max(0x8000).next_multiple_of(0x1000), r.end.min(0xa_0000)))
            .find(|&(start, end)| start + 0x1000 <= end)
            .map(|(start, _)| start)
    }
}
