//! Raw images: a file or block device whose bytes are the disk's.

#![expect(unsafe_code, reason = "positioned vectored I/O on guest memory")]

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;

use iothread::{Cx, Operation, Port};

use super::{Access, Backend, BlockIo, Geometry, Op, SECTOR, Submitted};

/// How accesses reach the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Engine {
    /// Through the io_uring of the thread.
    IoUring,
    /// With a system call, right there.
    Sync,
}

/// How to open an image.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    /// The engine.
    pub engine: Engine,
    /// Open for reading only.
    pub read_only: bool,
    /// Bypass the page cache.
    pub direct: bool,
}

struct Files {
    file: File,
    /// With `direct`: the same file through the page cache, for buffers that are not aligned.
    unaligned: Option<File>,
}

/// A raw image.
pub struct RawImage {
    files: Arc<Files>,
    geometry: Geometry,
    engine: Engine,
}

impl std::fmt::Debug for RawImage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RawImage").field("geometry", &self.geometry).finish_non_exhaustive()
    }
}

impl RawImage {
    /// Opens the file or block device at `path`.
    ///
    /// Anything else (a directory, a pipe, a terminal) is refused, and opening never waits for
    /// anybody. A size that is not a multiple of 512 bytes is refused too.
    pub fn open(path: &Path, options: Options) -> io::Result<Self> {
        let open = |direct: bool| {
            OpenOptions::new()
                .read(true)
                .write(!options.read_only)
                .custom_flags(libc::O_NONBLOCK | if direct { libc::O_DIRECT } else { 0 })
                .open(path)
        };
        let file = open(options.direct).map_err(|error| match error.raw_os_error() {
            Some(libc::EINVAL) if options.direct => {
                io::Error::other("its file system does not support O_DIRECT; use direct = false")
            }
            _ => error,
        })?;
        let kind = file.metadata()?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(io::Error::other("neither a regular file nor a block device"));
        }
        let unaligned = if options.direct { Some(open(false)?) } else { None };
        Self::from_files(file, unaligned, options)
    }

    /// Uses an open regular file.
    pub fn from_file(file: File, options: Options) -> io::Result<Self> {
        Self::from_files(file, None, options)
    }

    /// Another handle on the image's bytes, without demands on alignment.
    pub fn try_clone_file(&self) -> io::Result<File> {
        self.files.unaligned.as_ref().unwrap_or(&self.files.file).try_clone()
    }

    fn from_files(file: File, unaligned: Option<File>, options: Options) -> io::Result<Self> {
        let bytes = size(&file)?;
        if bytes == 0 || bytes % SECTOR != 0 {
            return Err(io::Error::other(format!(
                "its size, {bytes} bytes, is not a positive multiple of {SECTOR}"
            )));
        }
        let block_size = if options.direct { logical_block_size(&file) } else { SECTOR as u32 };
        let geometry =
            Geometry { sectors: bytes / SECTOR, block_size, read_only: options.read_only };
        Ok(Self { files: Arc::new(Files { file, unaligned }), geometry, engine: options.engine })
    }
}

impl Backend for RawImage {
    fn geometry(&self) -> Geometry {
        self.geometry
    }

    fn open_queue(&self) -> io::Result<Box<dyn BlockIo>> {
        Ok(Box::new(RawIo {
            files: Arc::clone(&self.files),
            engine: self.engine,
            block_size: u64::from(self.geometry.block_size),
        }))
    }
}

/// The size of a file or block device: the end is where seeking ends.
fn size(file: &File) -> io::Result<u64> {
    use std::io::{Seek, SeekFrom};
    let mut file = file;
    file.seek(SeekFrom::End(0))
}

fn logical_block_size(file: &File) -> u32 {
    let mut bytes: libc::c_int = 0;
    const BLKSSZGET: libc::c_ulong = 0x1268;
    // SAFETY: BLKSSZGET writes one int; on anything but a block device it fails.
    match unsafe { libc::ioctl(file.as_raw_fd(), BLKSSZGET, &raw mut bytes) } {
        0 => u32::try_from(bytes).unwrap_or(SECTOR as u32).max(SECTOR as u32),
        // Files want the block size of the device below, which they do not tell; 4096 suits all.
        _ => 4096,
    }
}

struct RawIo {
    files: Arc<Files>,
    engine: Engine,
    block_size: u64,
}

impl RawIo {
    /// O_DIRECT wants everything aligned; what is not goes through the page cache.
    fn file_for(&self, access: &Access<'_>) -> &File {
        let aligned = |value: u64| value.is_multiple_of(self.block_size);
        match &self.files.unaligned {
            Some(cached)
                if !aligned(access.offset)
                    || !access
                        .buffers
                        .iter()
                        .all(|b| aligned(b.iov_base as u64) && aligned(b.iov_len as u64)) =>
            {
                cached
            }
            _ => &self.files.file,
        }
    }
}

impl BlockIo for RawIo {
    unsafe fn submit(
        &mut self,
        access: Access<'_>,
        port: &Arc<Port>,
        slot: u16,
        cx: &mut Cx<'_>,
    ) -> Submitted {
        let fd = self.file_for(&access).as_raw_fd();
        if self.engine == Engine::IoUring {
            let (buffers, count) = (access.buffers.as_ptr(), access.buffers.len() as u32);
            let operation = match access.op {
                Op::Read => Operation::Read { fd, buffers, count, offset: access.offset },
                Op::Write { durable } => {
                    Operation::Write { fd, buffers, count, offset: access.offset, durable }
                }
                Op::Flush => Operation::Sync { fd },
            };
            let on_vcpu = cx.on_vcpu();
            match cx.ring() {
                // SAFETY: the caller keeps the memory, and `files` lives as long as the handler,
                // which is not dropped while anything is in flight.
                Some(ring) => match unsafe { ring.submit(operation, port, slot) } {
                    Ok(()) => return Submitted::Pending,
                    Err(iothread::RingFull) => return Submitted::NeedsTurn,
                },
                None if on_vcpu => return Submitted::NeedsHome,
                None => {} // the kernel gives no ring here: do it right away
            }
        }
        Submitted::Done(perform(fd, access))
    }
}

/// Does it with one system call; the result is a count or a negated errno.
fn perform(fd: i32, access: Access<'_>) -> i32 {
    let (buffers, count) = (access.buffers.as_ptr(), access.buffers.len() as i32);
    let offset = access.offset as libc::off_t;
    loop {
        // SAFETY: the caller of `submit` vouches for the buffers during the call.
        let result = unsafe {
            match access.op {
                Op::Read => libc::preadv(fd, buffers, count, offset),
                Op::Write { durable } => {
                    let flags = if durable { libc::RWF_DSYNC } else { 0 };
                    libc::pwritev2(fd, buffers, count, offset, flags)
                }
                Op::Flush => libc::fdatasync(fd) as isize,
            }
        };
        if result >= 0 {
            return result as i32;
        }
        match io::Error::last_os_error().raw_os_error() {
            Some(libc::EINTR) => {}
            errno => return -errno.unwrap_or(libc::EIO),
        }
    }
}
