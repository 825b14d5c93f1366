//! PCI: one root bus, the functions on it, their configuration space, BARs and MSI-X.
//!
//! ```text
//!   ports 0xcf8, 0xcfc ─┐                    ┌─ host bridge
//!                       ├─► PciRoot ─────────┼─ Endpoint ── Config      what the guest reads
//!   ECAM (memory) ──────┘   bus 0, by slot   │     │   └─── Msix        its interrupts
//!                                            │     └─ Bar ► the memory bus, where it is decoded
//!                                            ├─ Endpoint ...
//!                                            └─ RootPort ── Bridge      bus numbers and windows
//!                                                  └─ Endpoint, while one is plugged in
//! ```
//!
//! Configuration space is made of registers of 4 bytes. Whatever the width of an access, it
//! arrives at a [`Function`] as one register and the bits of it that are meant, as on a real bus
//! (PCI 3.0 §3.2.2.3.4, byte enables).

pub mod access;
pub mod bar_space;
pub mod bridge;
pub mod capability;
pub mod config;
pub mod endpoint;
pub mod express;
pub mod function;
pub mod msi;
pub mod msix;
pub mod root;
pub mod root_port;

pub use access::{ConfigPorts, Ecam};
pub use bar_space::BarSpace;
pub use bridge::Room;
pub use capability::Capability;
pub use config::{Config, Ids};
pub use endpoint::{Bar, Endpoint, Placed};
pub use function::{Function, Upstream};
pub use msix::Msix;
pub use root::{Address, PciRoot};
pub use root_port::RootPort;
