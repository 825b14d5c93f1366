//! Where virtio-mmio devices are.

/// The place of one virtio-mmio device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MmioSlot {
    /// Guest physical address of its registers.
    pub base: u64,
    /// Its interrupt, an edge.
    pub gsi: u32,
}

impl MmioSlot {
    /// Bytes of registers.
    pub const SIZE: u64 = 0x1000;
}
