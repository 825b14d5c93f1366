//! Multiboot 1 (Multiboot Specification 0.6.96): a header in the file's first 8 KiB, 32-bit
//! protected mode, the Multiboot information in EBX.

use super::elf::Elf;
use super::handover::Handover;
use super::image::{Image, Piece, word};
use super::kind::{Kind, kind};
use super::memory_map::{FIRST_RAM_END, Ram};
use super::{BootError, Entry, Placed, Program};
use crate::memory::ONE_MIB;

const MAGIC: u32 = 0x1bad_b002;
/// The header is within so many bytes.
const SEARCHED: usize = 8192;
/// Magic, flags, checksum.
const SHORT: usize = 12;
/// With the address fields.
const LONG: usize = 32;

/// Header flags: bits of the lower half are wishes that a loader must refuse if it cannot fulfil
/// them. Modules are always at a page (bit 0), and memory is always told (bit 1).
const FULFILLED: u32 = 3;
const VIDEO_MODE: u32 = 4;
const MUST_KNOW: u32 = 0xffff;
const ADDRESS_FIELDS: u32 = 1 << 16;

const LOADER_NAME: &str = concat!("heddle ", env!("CARGO_PKG_VERSION"));

/// Which fields of the information are set (3.3).
const HAS_MEMORY: u32 = 1;
const HAS_CMDLINE: u32 = 1 << 2;
const HAS_MODULES: u32 = 1 << 3;
const HAS_MAP: u32 = 1 << 6;
const HAS_LOADER_NAME: u32 = 1 << 9;

#[derive(Debug)]
pub(super) struct Multiboot {
    rip: u32,
    pieces: Vec<Piece>,
}

/// A header with a good checksum.
struct Header {
    /// Where it is in the file.
    at: u64,
    bytes: Vec<u8>,
}

/// Does the file have a Multiboot header?
pub(super) fn is_there(image: &Image<'_>) -> Result<bool, BootError> {
    let head = image.head(SEARCHED)?;
    Ok(candidates(&head).any(|at| sum(&head, at) == 0))
}

/// Where the magic number is.
fn candidates(head: &[u8]) -> impl Iterator<Item = usize> {
    let last = head.len().saturating_sub(SHORT - 1);
    (0..last).step_by(4).filter(|at| word(head, *at) == MAGIC)
}

/// Magic, flags and checksum together, which must be 0.
fn sum(head: &[u8], at: usize) -> u32 {
    word(head, at).wrapping_add(word(head, at + 4)).wrapping_add(word(head, at + 8))
}

impl Header {
    fn find(image: &Image<'_>) -> Result<Self, BootError> {
        let head = image.head(SEARCHED)?;
        if let Some(at) = candidates(&head).find(|at| sum(&head, *at) == 0) {
            let bytes = head[at..].iter().copied().take(LONG).collect();
            return Ok(Self { at: at as u64, bytes });
        }
        if let Some(at) = candidates(&head).next() {
            let (checksum, sum) = (word(&head, at + 8), sum(&head, at));
            return image.fail(format!(
                "checksum: {checksum:#x} of the Multiboot header at {at:#x} makes the sum {sum:#x}, \
                 not 0"
            ));
        }
        let what = match kind(image)? {
            Kind::Elf => "this ELF",
            Kind::BzImage => "this Linux bzImage, which boot.kernel takes,",
            Kind::Other(what) => what,
        };
        image.fail(format!("no Multiboot header (magic {MAGIC:#x}) in the first 8 KiB of {what}"))
    }

    fn flags(&self) -> u32 {
        word(&self.bytes, 4)
    }

    fn check_flags(&self) -> Result<(), String> {
        let flags = self.flags();
        if flags & VIDEO_MODE != 0 {
            return Err(format!("flags: {flags:#x} asks for a video mode (bit 2), there is none"));
        }
        let unknown = flags & MUST_KNOW & !FULFILLED;
        if unknown != 0 {
            return Err(format!(
                "flags: {flags:#x} asks for what heddle does not know, {unknown:#x}"
            ));
        }
        if flags & ADDRESS_FIELDS != 0 && self.bytes.len() < LONG {
            return Err(format!(
                "flags: {flags:#x} promises address fields (bit 16), but the header at {:#x} ends \
                 with the file or its first 8 KiB",
                self.at
            ));
        }
        Ok(())
    }

    /// What the address fields say (3.1.3): what to put where, and the entry.
    fn addresses(&self, image: &Image<'_>) -> Result<(Piece, u32), String> {
        let [header_addr, load_addr, load_end, bss_end, entry] =
            [12, 16, 20, 24, 28].map(|at| word(&self.bytes, at));
        let before = header_addr.checked_sub(load_addr).ok_or_else(|| {
            format!("load_addr: {load_addr:#x} is above header_addr {header_addr:#x}")
        })?;
        let offset = self.at.checked_sub(before.into()).ok_or_else(|| {
            format!(
                "load_addr: {load_addr:#x} is {before:#x} bytes before header_addr, but the header \
                 is at {:#x} of the file",
                self.at
            )
        })?;
        let len = match load_end {
            0 => image.len - offset,
            end => end.checked_sub(load_addr).map(u64::from).ok_or_else(|| {
                format!("load_end_addr: {end:#x} is below load_addr {load_addr:#x}")
            })?,
        };
        image.check(offset, len).map_err(|why| format!("load_end_addr: {load_end:#x}: {why}"))?;
        let room = match bss_end {
            0 => len,
            end => u64::from(end)
                .checked_sub(u64::from(load_addr))
                .filter(|room| *room >= len)
                .ok_or_else(|| {
                    format!("bss_end_addr: {end:#x} is below the end of what is loaded")
                })?,
        };
        if u64::from(entry.wrapping_sub(load_addr)) >= room {
            return Err(format!("entry_addr: {entry:#x} is not in what is loaded"));
        }
        Ok((Piece { offset, len, at: load_addr.into(), room }, entry))
    }
}

impl Multiboot {
    pub(super) fn parse(image: &Image<'_>, ram: Ram) -> Result<Self, BootError> {
        let header = Header::find(image)?;
        header.check_flags().or_else(|why| image.fail(why))?;
        if header.flags() & ADDRESS_FIELDS != 0 {
            let (piece, rip) = header.addresses(image).or_else(|why| image.fail(why))?;
            ram.check(piece.at, piece.room).or_else(|why| {
                let what = format!("load_addr {:#x} with {:#x} bytes", piece.at, piece.room);
                image.fail(format!("{what} {why}"))
            })?;
            return Ok(Self { rip, pieces: vec![piece] });
        }
        if kind(image)? != Kind::Elf {
            let flags = header.flags();
            return image.fail(format!("flags: {flags:#x} without addresses (bit 16), and no ELF"));
        }
        let elf = Elf::parse(image)?;
        let pieces = elf.pieces(image, ram)?;
        let entry = elf.physical_entry(image)?;
        match u32::try_from(entry) {
            Ok(rip) => Ok(Self { rip, pieces }),
            Err(_) => image.fail(format!("e_entry: {entry:#x} is beyond 4 GiB")),
        }
    }
}

/// The file's name, then the arguments, as loaders have always done it.
fn command_line(name: &str, arguments: &str) -> String {
    if arguments.is_empty() { name.to_owned() } else { format!("{name} {arguments}") }
}

impl Program for Multiboot {
    fn pieces(&self) -> &[Piece] {
        &self.pieces
    }

    fn hand_over(&self, placed: &Placed<'_>, to: &mut Handover<'_>) -> Result<Entry, BootError> {
        let mut put_text =
            |what, name: &str, arguments| to.put_text(what, &command_line(name, arguments));
        let cmdline = put_text("boot.cmdline", placed.name, placed.cmdline)?;
        let mut modules = Words::default();
        for module in &placed.modules {
            let text = put_text("boot.modules.cmdline", module.name, module.cmdline)?;
            // Low memory ends below 4 GiB.
            let (start, end) = (module.at as u32, (module.at + module.size) as u32);
            [start, end, text, 0].into_iter().for_each(|word| modules.push(word));
        }
        let mut map = Words::default();
        for (area, kind) in placed.ram.map(placed.pci_buses) {
            map.push(20); // the size of the rest
            map.push_long(area.start);
            map.push_long(area.end - area.start);
            map.push(kind as u32);
        }
        let name = to.put_text("boot loader name", LOADER_NAME)?;
        let modules_at = to.put("module list", &modules.0, 4)?;
        let map_at = to.put("memory map", &map.0, 4)?;
        let mut info = Words::default();
        info.push(HAS_MEMORY | HAS_CMDLINE | HAS_MODULES | HAS_MAP | HAS_LOADER_NAME);
        info.push((FIRST_RAM_END >> 10) as u32); // mem_lower, KiB
        info.push(((placed.ram.low_end() - ONE_MIB) >> 10) as u32); // mem_upper, KiB from 1 MiB on
        info.push(0); // boot_device
        info.push(cmdline);
        info.push(placed.modules.len() as u32);
        info.push(modules_at);
        (0..4).for_each(|_| info.push(0)); // symbols
        info.push(map.0.len() as u32);
        info.push(map_at);
        (0..3).for_each(|_| info.push(0)); // drives, ROM configuration table
        info.push(name);
        (0..12).for_each(|_| info.push(0)); // APM, VBE, framebuffer
        let info = to.put("Multiboot information", &info.0, 4)?;
        Ok(Entry::Multiboot { rip: self.rip, info })
    }
}

/// Little-endian words, one after the other.
#[derive(Default)]
struct Words(Vec<u8>);

impl Words {
    fn push(&mut self, word: u32) {
        self.0.extend(word.to_le_bytes());
    }

    fn push_long(&mut self, long: u64) {
        self.0.extend(long.to_le_bytes());
    }
}
