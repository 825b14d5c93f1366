//! What a file is, by its content.

use super::BootError;
use super::image::{Image, half, word};

/// What a file seems to be.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// An ELF.
    Elf,
    /// A Linux kernel with a setup header ("HdrS" at 0x202).
    BzImage,
    /// Nothing that starts; in words, with an article.
    Other(&'static str),
}

/// What files begin with. The first that fits counts.
const BEGINNINGS: &[(usize, &[u8], &str)] = &[
    (0x38, b"ARM\x64", "a Linux Image for ARM64"),
    (0x38, b"RSC\x05", "a Linux Image for RISC-V"),
    (4, b"zimg", "a compressed EFI kernel (EFI zboot), not unpacked"),
    (0, b"\x1f\x8b", "gzip data; unpack it first (gunzip)"),
    (0, b"\xfd7zXZ\0", "xz data; unpack it first (unxz)"),
    (0, b"\x28\xb5\x2f\xfd", "zstd data; unpack it first (unzstd)"),
    (0, b"BZh", "bzip2 data; unpack it first (bunzip2)"),
    (0, b"\x04\x22\x4d\x18", "LZ4 data; unpack it first (unlz4)"),
    (0, b"\x02\x21\x4c\x18", "LZ4 data; unpack it first (unlz4)"),
    (0, b"\x89LZO", "LZO data; unpack it first (lzop -d)"),
    (0, b"\x5d\0\0", "LZMA data; unpack it first (unlzma)"),
    (0, b"PK\x03\x04", "a ZIP archive"),
    (0, b"!<arch>\n", "an ar archive, such as a Debian package"),
    (0, b"070701", "a cpio archive; boot.initrd may want it"),
    (0, b"070702", "a cpio archive; boot.initrd may want it"),
    (257, b"ustar", "a tar archive"),
    (0, b"\x27\x05\x19\x56", "a U-Boot image (uImage)"),
    (0, b"QFI\xfb", "a QEMU disk image (qcow2)"),
    (0, b"#!", "a script"),
];

/// A volume descriptor of ISO 9660 has this at its second byte.
const ISO: (u64, &[u8; 5]) = (0x8001, b"CD001");

/// Looks at a file.
pub(super) fn kind(image: &Image<'_>) -> Result<Kind, BootError> {
    let head = image.head(1024)?;
    let at = |at: usize, bytes: &[u8]| head.get(at..at + bytes.len()) == Some(bytes);
    if at(0, b"\x7fELF") {
        return Ok(Kind::Elf);
    }
    // An EFI stub makes a bzImage begin like a Windows program, too.
    if at(0x202, b"HdrS") {
        return Ok(Kind::BzImage);
    }
    if let Some((.., what)) = BEGINNINGS.iter().find(|(where_, bytes, _)| at(*where_, bytes)) {
        return Ok(Kind::Other(what));
    }
    let (descriptor, magic) = ISO;
    if image.check(descriptor, 5).is_ok() && image.array(descriptor, "ISO 9660")? == *magic {
        return Ok(Kind::Other("an ISO 9660 image (a CD or DVD)"));
    }
    Ok(Kind::Other(match head.as_slice() {
        [] => "an empty file",
        _ if at(0, b"MZ") => "an EFI or Windows program (PE) without a Linux setup header",
        _ if multiboot2(&head) => "a file with a Multiboot 2 header, and heddle knows Multiboot 1",
        _ if at(0x1fe, b"\x55\xaa") => "a disk image or boot sector",
        _ if head.iter().all(|byte| *byte == 0) => "a file of zeros",
        _ if is_text(&head) => "a text file",
        _ => "data of no kind heddle knows",
    }))
}

fn multiboot2(head: &[u8]) -> bool {
    head.chunks_exact(8).any(|at| word(at, 0) == 0xe852_50d6 && half(at, 4) == 0)
}

fn is_text(head: &[u8]) -> bool {
    let printable = |byte: &u8| matches!(byte, b'\t' | b'\n' | b'\r' | b' '..=b'~' | 0x80..);
    let valid = match std::str::from_utf8(head) {
        Ok(_) => true,
        // The last character may go on after what was read.
        Err(error) => error.error_len().is_none(),
    };
    valid && head.iter().all(printable)
}

#[cfg(test)]
mod tests {
    use super::super::Source;
    use super::*;

    fn kind_of(bytes: &[u8]) -> Kind {
        kind(&Image::open(Source::Bytes("it", bytes)).unwrap()).unwrap()
    }

    fn with(at: usize, bytes: &[u8]) -> Vec<u8> {
        let mut file = vec![1; at];
        file.extend(bytes);
        file
    }

    #[test]
    fn files_are_known_by_their_content() {
        for (file, part) in [
            (b"".to_vec(), "empty"),
            (b"\x1f\x8b\x08".to_vec(), "gzip"),
            (b"\xfd7zXZ\0\0".to_vec(), "unxz"),
            (b"MZ\0\0".to_vec(), "(PE)"),
            (b"hello, w\xc3\xb6rld\n".to_vec(), "text"),
            (b"#!/bin/sh\n".to_vec(), "script"),
            (with(0x38, b"ARM\x64"), "ARM64"),
            (with(0x8001, b"CD001"), "ISO"),
            (with(0x1fe, b"\x55\xaa"), "boot sector"),
            (with(16, b"\xd6\x50\x52\xe8\0\0\0\0"), "Multiboot 2"),
            (vec![0; 4096], "zeros"),
            (b"070701".to_vec(), "boot.initrd"),
            (vec![1, 2, 3], "no kind"),
        ] {
            match kind_of(&file) {
                Kind::Other(what) => assert!(what.contains(part), "{part}: {what}"),
                other => panic!("{part}: {other:?}"),
            }
        }
        assert_eq!(kind_of(b"\x7fELF"), Kind::Elf);
        let mut stub = with(0x202, b"HdrS");
        stub[..2].copy_from_slice(b"MZ");
        assert_eq!(kind_of(&stub), Kind::BzImage);
    }
}
