//! From a distribution's bzImage to the ELF inside it.

use crate::Result;

/// Fields of the boot sector (Linux x86 boot protocol 2.08): number of setup sectors, the magic
/// number "HdrS", and where the compressed kernel lies behind the setup sectors.
const SETUP_SECTORS: usize = 0x1f1;
const HEADER_MAGIC: usize = 0x202;
const PAYLOAD_OFFSET: usize = 0x248;
const PAYLOAD_LENGTH: usize = 0x24c;

/// The legacy frame of LZ4: this magic number, then blocks that each begin with their length and
/// unpack to 8 MiB, the last one to less.
const LEGACY_MAGIC: u32 = 0x184c_2102;
const LEGACY_BLOCK: usize = 8 << 20;
/// No kernel unpacks to more.
const MOST: usize = 512 << 20;

fn word(bytes: &[u8], at: usize, what: &str) -> Result<u32> {
    let field = at.checked_add(4).and_then(|end| bytes.get(at..end));
    let field = field.ok_or_else(|| format!("it ends before its {what}"))?;
    Ok(u32::from_le_bytes([field[0], field[1], field[2], field[3]]))
}

/// The ELF that a bzImage has inside, which must be packed with LZ4.
pub fn vmlinux(bzimage: &[u8]) -> Result<Vec<u8>> {
    if word(bzimage, HEADER_MAGIC, "setup header")?.to_le_bytes() != *b"HdrS" {
        return Err("not a bzImage: there is no HdrS at 0x202".into());
    }
    let sectors = match bzimage[SETUP_SECTORS] {
        0 => 4,
        sectors => usize::from(sectors),
    };
    let payload = (sectors + 1) * 512 + word(bzimage, PAYLOAD_OFFSET, "payload offset")? as usize;
    let length = word(bzimage, PAYLOAD_LENGTH, "payload length")? as usize;
    let payload = bzimage.get(payload..payload + length).ok_or("it ends before its payload")?;
    // The kernel's build puts the unpacked size behind the frame.
    let (frame, size) = payload.split_last_chunk::<4>().ok_or("its payload is empty")?;
    let elf = unpack(frame)?;
    if elf.len() != u32::from_le_bytes(*size) as usize || !elf.starts_with(b"\x7fELF") {
        return Err("its payload does not unpack to an ELF of the size it says".into());
    }
    Ok(elf)
}

/// Unpacks a legacy frame of LZ4.
fn unpack(frame: &[u8]) -> Result<Vec<u8>> {
    if word(frame, 0, "LZ4 magic number")? != LEGACY_MAGIC {
        return Err("not packed as a legacy frame of LZ4".into());
    }
    let mut rest = &frame[4..];
    let mut unpacked = Vec::new();
    let mut block = vec![0; LEGACY_BLOCK];
    while !rest.is_empty() {
        let length = word(rest, 0, "LZ4 block length")? as usize;
        let packed = rest.get(4..4 + length).ok_or("it ends within an LZ4 block")?;
        let size = lz4_flex::block::decompress_into(packed, &mut block)
            .map_err(|error| format!("LZ4: {error}"))?;
        if unpacked.len() + size > MOST {
            return Err(format!("it unpacks to more than {MOST} bytes"));
        }
        unpacked.extend_from_slice(&block[..size]);
        rest = &rest[4 + length..];
    }
    Ok(unpacked)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An LZ4 block of nothing but literals.
    fn literals(bytes: &[u8]) -> Vec<u8> {
        let mut block = vec![0xf0];
        let mut more = bytes.len() - 15;
        while more >= 255 {
            block.push(255);
            more -= 255;
        }
        block.push(more as u8);
        block.extend_from_slice(bytes);
        block
    }

    fn frame(parts: &[&[u8]]) -> Vec<u8> {
        let mut frame = LEGACY_MAGIC.to_le_bytes().to_vec();
        for part in parts {
            let block = literals(part);
            frame.extend((block.len() as u32).to_le_bytes());
            frame.extend(block);
        }
        frame
    }

    fn bzimage(elf: &[u8], claimed: u32) -> Vec<u8> {
        let mut image = vec![0; 0x600];
        image[SETUP_SECTORS] = 1;
        image[HEADER_MAGIC..HEADER_MAGIC + 4].copy_from_slice(b"HdrS");
        let mut payload = frame(&[elf]);
        payload.extend(claimed.to_le_bytes());
        image[PAYLOAD_OFFSET..PAYLOAD_OFFSET + 4].copy_from_slice(&0x200u32.to_le_bytes());
        let length = (payload.len() as u32).to_le_bytes();
        image[PAYLOAD_LENGTH..PAYLOAD_LENGTH + 4].copy_from_slice(&length);
        image.extend(payload);
        image
    }

    #[test]
    fn the_elf_comes_out_of_a_bzimage() {
        let elf = [b"\x7fELF".as_slice(), &[7; 1000]].concat();
        assert_eq!(vmlinux(&bzimage(&elf, elf.len() as u32)).unwrap(), elf);
    }

    #[test]
    fn what_is_cut_off_or_claims_another_size_is_refused() {
        let elf = [b"\x7fELF".as_slice(), &[7; 1000]].concat();
        assert!(vmlinux(&bzimage(&elf, 1)).unwrap_err().contains("the size it says"));
        let whole = bzimage(&elf, elf.len() as u32);
        for length in 0..whole.len() {
            vmlinux(&whole[..length]).unwrap_err();
        }
    }

    #[test]
    fn a_frame_has_many_blocks_with_repetitions() {
        let parts = [[1; 300], [2; 300]];
        assert_eq!(unpack(&frame(&[&parts[0], &parts[1]])).unwrap(), parts.concat());
        // One literal "a", then a match of 4 + 15 + 5 bytes at distance 1, then a last literal.
        let block = [0x1f, b'a', 1, 0, 5, 0x10, b'z'];
        let mut frame = LEGACY_MAGIC.to_le_bytes().to_vec();
        frame.extend((block.len() as u32).to_le_bytes());
        frame.extend(block);
        let mut expected = vec![b'a'; 25];
        expected.push(b'z');
        assert_eq!(unpack(&frame).unwrap(), expected);
    }

    #[test]
    fn other_compressions_and_absurd_lengths_are_refused() {
        assert!(unpack(b"\x1f\x8b\x08\x00").unwrap_err().contains("legacy frame"));
        let mut frame = LEGACY_MAGIC.to_le_bytes().to_vec();
        frame.extend(u32::MAX.to_le_bytes());
        assert!(unpack(&frame).unwrap_err().contains("within an LZ4 block"));
    }
}
