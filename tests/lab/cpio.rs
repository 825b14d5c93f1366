//! Writes initrds: cpio archives in the format "newc" (Linux,
//! Documentation/driver-api/early-userspace/buffer-format.rst), not compressed, because unpacking
//! would take an emulated CPU seconds.

/// An archive that is being written.
pub struct Archive {
    bytes: Vec<u8>,
    entries: u32,
}

/// File types and permissions, as in `st_mode`.
const DIRECTORY: u32 = 0o040_755;
const PROGRAM: u32 = 0o100_755;
const CHARACTER_DEVICE: u32 = 0o020_600;

impl Archive {
    pub fn new() -> Self {
        Self { bytes: Vec::new(), entries: 0 }
    }

    pub fn directory(&mut self, name: &str) {
        self.entry(name, DIRECTORY, (0, 0), &[]);
    }

    pub fn file(&mut self, name: &str, bytes: &[u8]) {
        self.entry(name, PROGRAM, (0, 0), bytes);
    }

    /// A character device. The kernel opens /dev/console for init before anything is mounted.
    pub fn device(&mut self, name: &str, major: u32, minor: u32) {
        self.entry(name, CHARACTER_DEVICE, (major, minor), &[]);
    }

    /// The whole archive.
    pub fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, (0, 0), &[]);
        self.bytes
    }

    fn entry(&mut self, name: &str, mode: u32, device: (u32, u32), bytes: &[u8]) {
        self.entries += 1;
        let size = u32::try_from(bytes.len()).expect("files in an initrd are small");
        let name_size = name.len() as u32 + 1;
        let (major, minor) = device;
        let inode = self.entries;
        // ino, mode, uid, gid, nlink, mtime, filesize, dev, rdev, namesize, check
        let fields = [inode, mode, 0, 0, 1, 0, size, 0, 0, major, minor, name_size, 0];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes.extend_from_slice(format!("{field:08X}").as_bytes());
        }
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(bytes);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Name, mode, device, bytes.
    type Entry = (String, u32, (u32, u32), Vec<u8>);

    fn read(mut bytes: &[u8]) -> Vec<Entry> {
        let mut entries = Vec::new();
        loop {
            assert_eq!(&bytes[..6], b"070701");
            let field = |nth: usize| {
                let text = std::str::from_utf8(&bytes[6 + nth * 8..14 + nth * 8]).unwrap();
                u32::from_str_radix(text, 16).unwrap()
            };
            let (size, name_size) = (field(6) as usize, field(11) as usize);
            let name = String::from_utf8(bytes[110..109 + name_size].to_vec()).unwrap();
            assert_eq!(bytes[109 + name_size], 0);
            let data = (110 + name_size).next_multiple_of(4);
            let entry = (name, field(1), (field(9), field(10)), bytes[data..data + size].to_vec());
            bytes = &bytes[(data + size).next_multiple_of(4)..];
            if entry.0 == "TRAILER!!!" {
                assert!(bytes.is_empty());
                return entries;
            }
            entries.push(entry);
        }
    }

    #[test]
    fn what_is_put_in_can_be_read_back() {
        let mut archive = Archive::new();
        archive.directory("dev");
        archive.device("dev/console", 5, 1);
        for length in 0..5 {
            archive.file(&"n".repeat(length + 1), &vec![b'x'; length]);
        }
        let entries = read(&archive.finish());
        assert_eq!(entries[0], ("dev".to_owned(), DIRECTORY, (0, 0), vec![]));
        assert_eq!(entries[1], ("dev/console".to_owned(), CHARACTER_DEVICE, (5, 1), vec![]));
        for length in 0..5 {
            let file = ("n".repeat(length + 1), PROGRAM, (0, 0), vec![b'x'; length]);
            assert_eq!(entries[2 + length], file);
        }
        assert_eq!(entries.len(), 7);
    }
}
