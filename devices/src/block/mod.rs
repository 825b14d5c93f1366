//! Block backends: where a disk's bytes are, apart from how a guest asks for them.
//!
//! The shared half ([`Backend`]) is one image; it makes one exclusive half ([`BlockIo`]) per
//! queue. A `BlockIo` owns no ring: it submits through that of the thread it is called on.

pub mod raw;

use std::io;
use std::sync::Arc;

use iothread::{Cx, Port};

/// Bytes in a sector of the virtio-blk protocol, whatever the disk's own block size is.
pub const SECTOR: u64 = 512;

/// One image.
pub trait Backend: Send + Sync {
    /// Size and layout, as the guest is told when it starts.
    fn geometry(&self) -> Geometry;

    /// Access for one queue.
    fn open_queue(&self) -> io::Result<Box<dyn BlockIo>>;
}

/// What a disk looks like.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Geometry {
    /// Capacity in sectors of 512 bytes.
    pub sectors: u64,
    /// The block size that requests should be multiples of, in bytes.
    pub block_size: u32,
    /// Writes are refused.
    pub read_only: bool,
}

/// What to do with the image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Op {
    /// Image to memory.
    Read,
    /// Memory to image; `durable`: on stable storage when it completes.
    Write {
        /// Complete only when the data is on stable storage.
        durable: bool,
    },
    /// All that was written before goes to stable storage.
    Flush,
}

/// One access to the image.
#[derive(Debug, Clone, Copy)]
pub struct Access<'a> {
    /// What to do.
    pub op: Op,
    /// Where in the image, in bytes.
    pub offset: u64,
    /// The memory.
    pub buffers: &'a [libc::iovec],
}

/// What became of a submission.
#[derive(Debug)]
pub enum Submitted {
    /// Done: the bytes moved, or a negated errno.
    Done(i32),
    /// The result will come out of the port.
    Pending,
    /// This thread has no ring: submit again on the home loop.
    NeedsHome,
    /// The ring is full: submit again in a later turn.
    NeedsTurn,
}

/// One queue's access to an image.
pub trait BlockIo: Send {
    /// Starts an access. `slot` names it in `port`, and is not in flight there.
    ///
    /// A result may be shorter than asked for; the rest is then the caller's to ask for again.
    ///
    /// # Safety
    /// If this answers [`Submitted::Pending`], the buffers' array and the memory it names must stay
    /// valid and be used for nothing else until the result has come out of `port`.
    #[expect(unsafe_code, reason = "the kernel uses the memory after this returns")]
    unsafe fn submit(
        &mut self,
        access: Access<'_>,
        port: &Arc<Port>,
        slot: u16,
        cx: &mut Cx<'_>,
    ) -> Submitted;
}
