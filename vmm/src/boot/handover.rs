//! What a boot protocol hands over, put one after the other into the boot data below 1 MiB.

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::BootError;
use super::image::count;
use crate::memory::{BOOT_DATA, ONE_MIB};

/// The boot data that is being written. Everything in it has a 32-bit address.
#[derive(Debug)]
pub(super) struct Handover<'a> {
    memory: &'a GuestMemoryMmap,
    next: u64,
}

impl<'a> Handover<'a> {
    pub(super) fn new(memory: &'a GuestMemoryMmap) -> Self {
        Self { memory, next: BOOT_DATA }
    }

    /// Puts `bytes`, which are `what`, where the next multiple of `align` is, and says where.
    pub(super) fn put(&mut self, what: &str, bytes: &[u8], align: u64) -> Result<u32, BootError> {
        self.put_with(what, bytes.len(), align, |_| bytes.to_vec())
    }

    /// The same for bytes that depend on their address.
    pub(super) fn put_with(
        &mut self,
        what: &str,
        len: usize,
        align: u64,
        bytes: impl FnOnce(u64) -> Vec<u8>,
    ) -> Result<u32, BootError> {
        let error = |why| BootError { what: what.to_owned(), why };
        let at = self.next.next_multiple_of(align);
        let end = at + len as u64;
        if end > ONE_MIB {
            let (len, room) = (count(len as u64), count(ONE_MIB.saturating_sub(at)));
            return Err(error(format!("{len} of boot data, but only {room} are left below 1 MiB")));
        }
        self.next = end;
        let written = self.memory.write_slice(&bytes(at), GuestAddress(at));
        written.map_err(|why| error(why.to_string()))?;
        Ok(at as u32)
    }

    /// Puts a text with a final NUL.
    pub(super) fn put_text(&mut self, what: &str, text: &str) -> Result<u32, BootError> {
        let mut bytes = text.as_bytes().to_vec();
        bytes.push(0);
        self.put(what, &bytes, 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_boot_data_ends_at_1_mib() {
        let memory = crate::memory::allocate(2 << 20, crate::memory::Backing::Shared).unwrap();
        let mut handover = Handover::new(&memory);
        assert_eq!(handover.put_text("a", "abc").unwrap(), 0xe_0000);
        assert_eq!(handover.put("b", &[7], 4096).unwrap(), 0xe_1000);
        let room = 0x10_0000 - 0xe_1001;
        let why = handover.put("c", &vec![1; room + 1], 1).unwrap_err().to_string();
        assert_eq!(
            why,
            "c: 126,976 bytes of boot data, but only 126,975 bytes are left below 1 MiB"
        );
        assert_eq!(handover.put("d", &vec![1; room], 1).unwrap(), 0xe_1001);
        assert!(handover.put("e", &[1], 1).is_err());
        let mut last = [0; 5];
        memory.read_slice(&mut last, GuestAddress(0xe_0000)).unwrap();
        assert_eq!(&last, b"abc\0\0");
        assert!(handover.put("f", &[], 4096).is_ok());
    }
}
