//! Virtio 1.x: queues, the seats they are served in, devices, and transports.
//!
//! A device comes in two halves. The shared half ([`VirtioDevice`]) answers configuration and may
//! be entered by any thread. When the driver is ready it makes one exclusive half
//! ([`QueueHandler`]) per group of queues; each sits in a strand ([`seat`]) that one thread at a
//! time may enter, and neither knows which thread that is nor which transport it hangs on.

pub mod blk;
mod doorbells;
pub mod mmio;
pub mod pci;
pub mod queue;
pub mod rng;
pub mod seat;
#[cfg(feature = "testing")]
pub mod testing;
pub mod transport;

use std::ops::Range;
use std::sync::Arc;

use iothread::{Cx, Port, Progress};
use vm_memory::GuestMemoryMmap;

use queue::VirtQueue;

/// Guest memory; immutable once the machine is built.
pub type Mem = Arc<GuestMemoryMmap>;

/// Virtio 1.2 §6: the driver follows version 1 of the specification.
pub const F_VERSION_1: u64 = 1 << 32;
/// §6: chains may lie in indirect tables.
pub const F_INDIRECT_DESC: u64 = 1 << 28;
/// §6: notifications are suppressed by ring index.
pub const F_EVENT_IDX: u64 = 1 << 29;

/// The shared half of a virtio device.
pub trait VirtioDevice: Send + Sync + 'static {
    /// Virtio 1.2 §5: the kind of device.
    fn device_id(&self) -> u16;

    /// The device's own feature bits; those of the ring are added by the transport.
    fn features(&self) -> u64;

    /// The largest size of each queue, a power of two.
    fn queue_sizes(&self) -> &[u16];

    /// Queues that share state are one group and have one handler. Default: each queue by itself.
    fn groups(&self) -> Vec<Range<u16>> {
        (0..self.queue_sizes().len() as u16).map(|queue| queue..queue + 1).collect()
    }

    /// The guest reads device configuration. Beyond its end all bytes are zero.
    fn read_config(&self, offset: u64, data: &mut [u8]);

    /// The guest writes device configuration. Default: nothing there can be written.
    fn write_config(&self, _offset: u64, _data: &[u8]) {}

    /// Makes the handler of a group, with the features the driver took. Called on the group's
    /// home loop when the driver is ready; `None` entries are queues the driver left disabled.
    fn start(
        &self,
        queues: Vec<Option<VirtQueue>>,
        features: u64,
        port: Arc<Port>,
    ) -> Box<dyn QueueHandler>;
}

/// The exclusive half of a virtio device: the rings of one group and the requests in flight.
///
/// It is only ever entered through its seat, by one thread at a time.
pub trait QueueHandler: Send {
    /// Looks at the rings and starts what it finds.
    fn kick(&mut self, cx: &mut Cx<'_>) -> Progress;

    /// Takes results out of its port, then looks at the rings.
    fn completed(&mut self, cx: &mut Cx<'_>) -> Progress;

    /// Requests taken from the rings and not yet given back.
    fn in_flight(&self) -> usize;

    /// The rings.
    fn queues(&mut self) -> &mut [VirtQueue];
}

/// What a queue tells its transport. Must not wait.
pub trait QueueEvents: Send + Sync {
    /// The used ring of `queue` has news, and the driver wants to know.
    fn used(&self, queue: u16);

    /// `queue` broke the rules; the device needs a reset (virtio 1.2 §2.1.1).
    fn broken(&self, queue: u16, why: &str);
}
