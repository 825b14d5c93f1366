//! ELF files of both sizes: headers, what to load, notes (System V ABI, chapters 4 and 5).

use super::BootError;
use super::image::{Image, Piece, half, long, word};
use super::memory_map::Ram;

/// More program headers than any kernel has.
const MOST_HEADERS: u16 = 128;
/// More notes than any kernel has.
const MOST_NOTES: u64 = 1 << 20;
const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;
const EM_386: u16 = 3;
const EM_X86_64: u16 = 62;

/// An ELF with good headers.
#[derive(Debug)]
pub(super) struct Elf {
    /// `e_entry`.
    entry: u64,
    segments: Vec<Segment>,
}

#[derive(Debug, Clone, Copy)]
struct Segment {
    /// Its program header's number.
    nth: u16,
    kind: u32,
    offset: u64,
    vaddr: u64,
    paddr: u64,
    filesz: u64,
    memsz: u64,
}

/// Where the two sizes of ELF have their fields.
struct Layout {
    header: usize,
    phentsize: u16,
    phoff: usize,
    phentsize_at: usize,
    /// p_offset, p_vaddr, p_paddr, p_filesz, p_memsz
    segment: [usize; 5],
    long: fn(&[u8], usize) -> u64,
}

const ELF32: Layout = Layout {
    header: 52,
    phentsize: 32,
    phoff: 28,
    phentsize_at: 42,
    segment: [4, 8, 12, 16, 20],
    long: |bytes, at| word(bytes, at).into(),
};
const ELF64: Layout = Layout {
    header: 64,
    phentsize: 56,
    phoff: 32,
    phentsize_at: 54,
    segment: [8, 16, 24, 32, 40],
    long,
};

impl Elf {
    /// Reads and checks all headers.
    pub(super) fn parse(image: &Image<'_>) -> Result<Self, BootError> {
        let ident: [u8; 16] = image.array(0, "the ELF header (e_ident)")?;
        if !ident.starts_with(b"\x7fELF") {
            return image.fail("e_ident: not an ELF file");
        }
        let layout = match ident[4] {
            1 => ELF32,
            2 => ELF64,
            other => {
                return image
                    .fail(format!("e_ident[EI_CLASS]: {other}, not 1 or 2 (32 or 64 bits)"));
            }
        };
        if ident[5] != 1 {
            return image.fail(format!("e_ident[EI_DATA]: {}, not 1 (little-endian)", ident[5]));
        }
        let mut header = [0; 64];
        let header = &mut header[..layout.header];
        image.read(0, header, "the ELF header")?;
        let machine = half(header, 18);
        if machine != EM_X86_64 && machine != EM_386 {
            return image.fail(format!("e_machine: {machine}, not {EM_X86_64} or {EM_386} (x86)"));
        }
        let phentsize = half(header, layout.phentsize_at);
        if phentsize != layout.phentsize {
            return image.fail(format!("e_phentsize: {phentsize}, not {}", layout.phentsize));
        }
        let phnum = half(header, layout.phentsize_at + 2);
        if !(1..=MOST_HEADERS).contains(&phnum) {
            return image.fail(format!("e_phnum: {phnum}, not 1 to {MOST_HEADERS}"));
        }
        let phoff = (layout.long)(header, layout.phoff);
        let mut segments = Vec::new();
        for nth in 0..phnum {
            let field = format!("program header {nth} of e_phoff {phoff:#x}, e_phnum {phnum}");
            let Some(at) = phoff.checked_add(u64::from(nth) * u64::from(phentsize)) else {
                return image.fail(format!("{field}: beyond any file"));
            };
            let mut bytes = [0; 56];
            let bytes = &mut bytes[..usize::from(phentsize)];
            image.read(at, bytes, &field)?;
            let [offset, vaddr, paddr, filesz, memsz] =
                layout.segment.map(|at| (layout.long)(bytes, at));
            let kind = word(bytes, 0);
            let segment = Segment { nth, kind, offset, vaddr, paddr, filesz, memsz };
            if kind == PT_LOAD || kind == PT_NOTE {
                segment.check(image).or_else(|why| image.fail(format!("segment {nth}: {why}")))?;
                segments.push(segment);
            }
        }
        Ok(Self { entry: (layout.long)(header, 24), segments })
    }

    fn loads(&self) -> impl Iterator<Item = &Segment> {
        self.segments.iter().filter(|segment| segment.kind == PT_LOAD)
    }

    /// What to put where, by physical addresses.
    pub(super) fn pieces(&self, image: &Image<'_>, ram: Ram) -> Result<Vec<Piece>, BootError> {
        let mut pieces: Vec<Piece> = Vec::new();
        let loads = self.loads().filter(|segment| segment.memsz > 0);
        for &Segment { nth, offset, paddr, filesz, memsz, .. } in loads {
            ram.check(paddr, memsz).or_else(|why| {
                let what = format!("p_paddr {paddr:#x} with p_memsz {memsz:#x}");
                image.fail(format!("segment {nth}: {what} {why}"))
            })?;
            let meets = |other: &Piece| other.at < paddr + memsz && paddr < other.at + other.room;
            if pieces.iter().any(meets) {
                return image.fail(format!("segment {nth}: p_paddr {paddr:#x} is in another one"));
            }
            pieces.push(Piece { offset, len: filesz, at: paddr, room: memsz });
        }
        Ok(pieces)
    }

    /// The physical address of `e_entry`, which may be virtual.
    pub(super) fn physical_entry(&self, image: &Image<'_>) -> Result<u64, BootError> {
        let within = |start: u64, segment: &Segment| {
            self.entry.checked_sub(start).filter(|offset| *offset < segment.memsz)
        };
        let by_virtual =
            self.loads().find_map(|it| Some(it.paddr.wrapping_add(within(it.vaddr, it)?)));
        let entry = by_virtual
            .or_else(|| self.loads().find_map(|it| within(it.paddr, it).map(|_| self.entry)));
        match entry {
            Some(entry) => Ok(entry),
            None => image.fail(format!("e_entry: {:#x} is in no segment", self.entry)),
        }
    }

    /// The descriptor of the first note with this name and type, up to 8 bytes of it, and how long
    /// it is.
    pub(super) fn note(
        &self,
        image: &Image<'_>,
        name: &[u8; 4],
        kind: u32,
    ) -> Result<Option<([u8; 8], u32)>, BootError> {
        for segment in self.segments.iter().filter(|segment| segment.kind == PT_NOTE) {
            let mut notes = vec![0; segment.filesz as usize];
            image.read(segment.offset, &mut notes, "notes (p_offset, p_filesz)")?;
            let fail = |why| image.fail(format!("segment {}: {why}", segment.nth));
            let mut rest = notes.as_slice();
            while !rest.is_empty() {
                let Some((header, after)) = rest.split_at_checked(12) else {
                    return fail(format!("a note's header ends after {} bytes", rest.len()));
                };
                let (namesz, descsz) = (word(header, 0), word(header, 4));
                let (padded_name, padded_desc) = (padded(namesz), padded(descsz));
                let Some((found, after)) = after.split_at_checked(padded_name) else {
                    return fail(format!("a note's n_namesz: {namesz} is beyond the notes"));
                };
                // The last one may do without its padding.
                let Some(desc) = after.get(..descsz as usize) else {
                    return fail(format!("a note's n_descsz: {descsz} is beyond the notes"));
                };
                if word(header, 8) == kind && namesz == 4 && found == name {
                    let mut start = [0; 8];
                    let len = desc.len().min(8);
                    start[..len].copy_from_slice(&desc[..len]);
                    return Ok(Some((start, descsz)));
                }
                rest = after.get(padded_desc..).unwrap_or_default();
            }
        }
        Ok(None)
    }
}

impl Segment {
    /// Is it within the file, and not larger there than in memory?
    fn check(&self, image: &Image<'_>) -> Result<(), String> {
        let Self { offset, filesz, memsz, .. } = *self;
        if image.check(offset, filesz).is_err() {
            return Err(format!(
                "p_offset {offset:#x} with p_filesz {filesz:#x} is beyond the file's {:#x} bytes",
                image.len
            ));
        }
        if self.kind == PT_NOTE && filesz > MOST_NOTES {
            return Err(format!(
                "p_filesz: {filesz:#x} bytes of notes, the most is {MOST_NOTES:#x}"
            ));
        }
        if self.kind == PT_LOAD && filesz > memsz {
            return Err(format!("p_filesz {filesz:#x} is more than p_memsz {memsz:#x}"));
        }
        Ok(())
    }
}

/// Names and descriptors fill up words of 4 bytes, also in 64-bit files.
fn padded(size: u32) -> usize {
    (size as usize).next_multiple_of(4)
}
