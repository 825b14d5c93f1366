//! The bytes of a kernel or module, read in parts; what is missing is told by the field's name.

use std::fs::File;
use std::io::{Seek, SeekFrom};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::{BootError, Source};

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
            Content::File(file) => {
                let mut file = file;
                file.seek(SeekFrom::Start(piece.offset)).or_else(|error| self.fail(error))?;
                memory.read_exact_volatile_from(at, &mut file, len)
            }
            Content::Bytes(all) => {
                let from = piece.offset as usize;
                memory.write_slice(&all[from..from + len], at)
            }
        };
        copied.or_else(|error| self.fail(format!("copying {}: {error}", count(piece.len))))
    }
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
    use super::*;

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
