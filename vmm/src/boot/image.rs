//! The bytes of a kernel or module, read in parts; what is missing is told by the field's name.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use vm_memory::bitmap::BitmapSlice;
use vm_memory::mmap::{MmapRegion, MmapRegionBuilder};
use vm_memory::{
    Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryError, GuestMemoryMmap,
    VolatileMemory, VolatileSlice,
};

use super::{BootError, Source};

/// What is zero is found, and left out, in these units.
const PAGE: u64 = 4096;

/// A kernel or module that can be read.
#[derive(Debug)]
pub(super) struct Image<'a> {
    /// For messages: the path, or what it is.
    pub what: String,
    /// What the guest is told: the file's name without directories.
    pub name: String,
    /// Bytes.
    pub len: u64,
    content: Content<'a>,
}

#[derive(Debug)]
enum Content<'a> {
    File(File),
    Bytes(&'a [u8]),
}

/// A part of an image and where it goes in guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Piece {
    /// Where it begins in the image.
    pub offset: u64,
    /// Bytes of it.
    pub len: u64,
    /// Where it goes.
    pub at: u64,
    /// Bytes it takes there, at least `len`; the rest is zero.
    pub room: u64,
}

impl<'a> Image<'a> {
    pub(super) fn open(source: Source<'a>) -> Result<Self, BootError> {
        match source {
            Source::File(path) => Self::open_file(path),
            Source::Bytes(name, bytes) => Ok(Self {
                what: name.to_owned(),
                name: name.to_owned(),
                len: bytes.len() as u64,
                content: Content::Bytes(bytes),
            }),
        }
    }

    /// Opens a regular file. Never waits for the other end of a FIFO.
    fn open_file(path: &Path) -> Result<Self, BootError> {
        let what = path.display().to_string();
        let name = path.file_name().map(|name| name.to_string_lossy().into_owned());
        let opened = File::options().read(true).custom_flags(libc::O_NONBLOCK).open(path);
        let opened = opened.and_then(|file| Ok((file.metadata()?, file)));
        match opened {
            Ok((metadata, file)) if metadata.is_file() => Ok(Self {
                what,
                name: name.unwrap_or_default(),
                len: metadata.len(),
                content: Content::File(file),
            }),
            Ok(_) => Err(BootError { what, why: "not a regular file".to_owned() }),
            Err(error) => Err(BootError { what, why: error.to_string() }),
        }
    }

    /// This image is wrong, and why.
    pub(super) fn fail<T>(&self, why: impl ToString) -> Result<T, BootError> {
        Err(BootError { what: self.what.clone(), why: why.to_string() })
    }

    /// The `N` bytes at `at`, which are `field`.
    pub(super) fn array<const N: usize>(&self, at: u64, field: &str) -> Result<[u8; N], BootError> {
        let mut bytes = [0; N];
        self.read(at, &mut bytes, field)?;
        Ok(bytes)
    }

    /// As many bytes as there are from the start, up to `most`.
    pub(super) fn head(&self, most: usize) -> Result<Vec<u8>, BootError> {
        let mut bytes = vec![0; usize::try_from(self.len).map_or(most, |len| len.min(most))];
        self.read(0, &mut bytes, "its first bytes")?;
        Ok(bytes)
    }

    /// Fills `bytes` with what is at `at`, which is `field`.
    pub(super) fn read(&self, at: u64, bytes: &mut [u8], field: &str) -> Result<(), BootError> {
        self.check(at, bytes.len() as u64).or_else(|why| self.fail(format!("{field}: {why}")))?;
        match &self.content {
            Content::File(file) => file
                .read_exact_at(bytes, at)
                .or_else(|error| self.fail(format!("reading {field}: {error}"))),
            Content::Bytes(all) => {
                bytes.copy_from_slice(&all[at as usize..at as usize + bytes.len()]);
                Ok(())
            }
        }
    }

    /// Are there `len` bytes at `at`?
    pub(super) fn check(&self, at: u64, len: u64) -> Result<(), String> {
        if at.checked_add(len).is_some_and(|end| end <= self.len) {
            return Ok(());
        }
        Err(format!("{} at {at:#x}, but the file ends after {}", count(len), count(self.len)))
    }

    /// Copies a piece, which has been checked, to where it belongs. Guest memory is zero before.
    pub(super) fn copy(&self, piece: Piece, memory: &GuestMemoryMmap) -> Result<(), BootError> {
        let (at, len) = (GuestAddress(piece.at), piece.len as usize);
        let copied = match &self.content {
            Content::File(file) => match map(file, piece) {
                Ok(bytes) => copy_but_zeros(&bytes, piece, memory),
                // Some file systems cannot map.
                Err(_) => {
                    let mut file = file;
                    file.seek(SeekFrom::Start(piece.offset)).or_else(|error| self.fail(error))?;
                    memory.read_exact_volatile_from(at, &mut file, len)
                }
            },
            Content::Bytes(all) => {
                let from = piece.offset as usize;
                memory.write_slice(&all[from..from + len], at)
            }
        };
        copied.or_else(|error| self.fail(format!("copying {}: {error}", count(piece.len))))
    }
}

/// Maps a piece of a file, from the page it begins in.
fn map(file: &File, piece: Piece) -> io::Result<MmapRegion> {
    let skip = piece.offset % PAGE;
    if file.metadata()?.len() < piece.offset + piece.len {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    MmapRegionBuilder::new((skip + piece.len) as usize)
        .with_file_offset(FileOffset::new(file.try_clone()?, piece.offset - skip))
        .with_mmap_prot(libc::PROT_READ)
        .with_mmap_flags(libc::MAP_PRIVATE | libc::MAP_POPULATE)
        .build()
        .map_err(io::Error::other)
}

/// Copies what [`map`] has mapped, but for pages of zeros: a third of a Linux ELF is `.bss` and room
/// for page tables, and guest memory that nobody touches costs nothing.
fn copy_but_zeros(
    mapped: &MmapRegion,
    piece: Piece,
    memory: &GuestMemoryMmap,
) -> Result<(), GuestMemoryError> {
    let bytes = mapped.as_volatile_slice().offset((piece.offset % PAGE) as usize)?;
    let copy = |from: usize, to: usize| {
        let there = memory.get_slice(GuestAddress(piece.at + from as u64), to - from)?;
        bytes.subslice(from, to - from)?.copy_to_volatile_slice(there);
        Ok::<_, GuestMemoryError>(())
    };
    let (mut begin, mut at, len) = (0, 0, piece.len as usize);
    while at < len {
        // To the end of the guest's page.
        let room = (PAGE - (piece.at + at as u64) % PAGE) as usize;
        let end = len.min(at + room);
        if is_zero(&bytes.subslice(at, end - at)?)? {
            if begin < at {
                copy(begin, at)?;
            }
            begin = end;
        }
        at = end;
    }
    if begin < len { copy(begin, len) } else { Ok(()) }
}

/// Is all of it zero, as far as it consists of whole groups of words? The rest counts as not zero.
fn is_zero<B: BitmapSlice>(bytes: &VolatileSlice<'_, B>) -> Result<bool, GuestMemoryError> {
    const GROUP: usize = 8;
    let words = bytes.get_array_ref::<u64>(0, bytes.len() / 8)?;
    let group = |nth: usize| (0..GROUP).fold(0, |all, word| all | words.load(nth + word));
    let whole = bytes.len().is_multiple_of(8 * GROUP);
    Ok(whole && (0..words.len()).step_by(GROUP).all(|nth| group(nth) == 0))
}

/// `1,234 bytes`.
pub(super) fn count(bytes: u64) -> String {
    let digits = bytes.to_string();
    let mut text = String::new();
    for (nth, digit) in digits.chars().enumerate() {
        if nth > 0 && (digits.len() - nth).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text + if bytes == 1 { " byte" } else { " bytes" }
}

/// The little-endian 16 bits at `at`, which must be there.
pub(super) fn half(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

/// The little-endian 32 bits at `at`, which must be there.
pub(super) fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from(half(bytes, at)) | u32::from(half(bytes, at + 2)) << 16
}

/// The little-endian 64 bits at `at`, which must be there.
pub(super) fn long(bytes: &[u8], at: usize) -> u64 {
    u64::from(word(bytes, at)) | u64::from(word(bytes, at + 4)) << 32
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::unix::fs::MetadataExt;

    use vm_memory::GuestMemoryRegion;

    use super::*;
    use crate::memory::{self, Backing};

    /// Copies `bytes` from a file to the same place modulo the page, wherever they begin there.
    /// Gives what guest memory has from 1 MiB on, and the KiB of it that are in use.
    fn through_a_file(bytes: &[u8], offset: u64, at: u64) -> (Vec<u8>, u64) {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(&vec![0xee; offset as usize]).unwrap();
        file.write_all(bytes).unwrap();
        let image = Image::open(Source::File(file.path())).unwrap();
        let memory = memory::allocate(32 << 20, Backing::Shared).unwrap();
        let len = bytes.len() as u64;
        image.copy(Piece { offset, len, at: (1 << 20) + at, room: len }, &memory).unwrap();
        let memfd = memory.iter().next().unwrap().file_offset().unwrap();
        let used = memfd.file().metadata().unwrap().blocks() / 2;
        let mut copied = vec![0; bytes.len()];
        memory.read_slice(&mut copied, GuestAddress((1 << 20) + at)).unwrap();
        (copied, used)
    }

    #[test]
    fn pages_of_zeros_are_not_touched_and_all_else_is_there() {
        let mut bytes = vec![0u8; 12 << 20];
        let end = bytes.len();
        bytes[0] = 1;
        bytes[4095] = 2;
        bytes[5000] = 3;
        bytes[end - 1] = 4;
        for (offset, at) in [(0, 0), (0x234, 0x234), (0x234, 0), (1, 8), (8192, 4088)] {
            for bytes in [&bytes[..], &bytes[1..], &bytes[..end - 1], &bytes[..5], &[]] {
                let (copied, used) = through_a_file(bytes, offset, at);
                assert!(copied == bytes, "{} bytes of {offset:#x} at {at:#x}", bytes.len());
                // With huge pages: one at each end.
                assert!(used <= 2 * 2048 + 8, "{used} KiB");
            }
        }
    }

    #[test]
    fn a_file_that_got_shorter_is_told() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(8192).unwrap();
        let image = Image::open(Source::File(file.path())).unwrap();
        let memory = memory::allocate(4 << 20, Backing::Private).unwrap();
        file.as_file().set_len(4096).unwrap();
        let piece = Piece { offset: 0, len: 8192, at: 1 << 20, room: 8192 };
        assert!(image.copy(piece, &memory).unwrap_err().to_string().contains("8,192 bytes"));
    }

    #[test]
    fn counts_are_grouped() {
        let counts = [0, 1, 12, 123, 1234, 123_456, 1_234_567].map(count);
        assert_eq!(
            counts,
            [
                "0 bytes",
                "1 byte",
                "12 bytes",
                "123 bytes",
                "1,234 bytes",
                "123,456 bytes",
                "1,234,567 bytes"
            ]
        );
    }

    #[test]
    fn reading_beyond_the_end_says_so() {
        let image = Image::open(Source::Bytes("k", &[1; 10])).unwrap();
        assert_eq!(image.array::<2>(8, "it").unwrap(), [1, 1]);
        let error = image.array::<2>(9, "e_phoff").unwrap_err();
        assert_eq!(
            error.to_string(),
            "k: e_phoff: 2 bytes at 0x9, but the file ends after 10 bytes"
        );
        assert!(image.array::<2>(u64::MAX, "it").is_err());
        assert_eq!(image.head(4).unwrap().len(), 4);
        assert_eq!(image.head(100).unwrap().len(), 10);
    }
}
