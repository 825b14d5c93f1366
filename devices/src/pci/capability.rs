//! Capabilities: what the list in configuration space says a function can do (PCI 3.0 §6.7).

use std::sync::Arc;

use super::msix::Msix;

/// Vendor specific: the id of all virtio capabilities (PCI 3.0 appendix H).
pub const VENDOR_SPECIFIC: u8 = 0x09;
const MSIX: u8 = 0x11;

/// One entry of the list.
#[derive(Debug)]
pub struct Capability {
    pub(super) id: u8,
    /// What follows the id and the link to the next one.
    pub(super) body: Vec<u8>,
    /// Which bits of `body` the guest may write; where it is shorter, none.
    pub(super) writable: Vec<u8>,
    pub(super) kind: Kind,
}

#[derive(Debug)]
pub(super) enum Kind {
    Plain,
    Msix(Arc<Msix>),
    Window,
}

impl Capability {
    /// One that the guest can only read. `body` is what follows the two bytes of id and link.
    pub fn new(id: u8, body: Vec<u8>) -> Self {
        Self { id, body, writable: Vec::new(), kind: Kind::Plain }
    }

    /// MSI-X, with its table and pending bits in BAR `bar` (PCI 3.0 §6.8.2).
    pub fn msix(bar: u8, msix: Arc<Msix>) -> Self {
        // The message control, the first two bytes, is read from and written to `msix`.
        let mut body = vec![0; 2];
        body.extend((msix.table_offset() | u32::from(bar)).to_le_bytes());
        body.extend((msix.pending_offset() | u32::from(bar)).to_le_bytes());
        Self { id: MSIX, body, writable: Vec::new(), kind: Kind::Msix(msix) }
    }

    /// A window through which the BARs can be reached from configuration space, as virtio wants
    /// one (VIRTIO_PCI_CAP_PCI_CFG, virtio 1.2 §4.1.4.10).
    pub fn window() -> Self {
        let mut body = vec![0; 18];
        body[0] = 20; // cap_len
        body[1] = 5; // cfg_type
        let mut writable = vec![0; 14];
        writable[2] = 0xff; // bar
        writable[6..14].fill(0xff); // offset, length
        Self { id: VENDOR_SPECIFIC, body, writable, kind: Kind::Window }
    }
}
