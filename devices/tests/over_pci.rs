//! The suite that both transports run, over PCI.

use devices::virtio::testing::Via;

const VIA: Via = Via::Pci;

#[path = "suite/blk.rs"]
mod blk;
#[path = "suite/corners.rs"]
mod corners;
#[path = "suite/noise.rs"]
mod noise;
#[path = "suite/placements.rs"]
mod placements;
