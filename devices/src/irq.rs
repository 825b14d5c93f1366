//! Interrupts and doorbells: what a device needs of the machine, without knowing it.

use std::io;
use std::os::fd::BorrowedFd;

/// A message-signalled interrupt: one write of `data` to `address` (Intel SDM vol. 3, 11.11).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Msi {
    /// Where the message goes.
    pub address: u64,
    /// What it says.
    pub data: u32,
}

/// Delivers messages to the guest's interrupt controllers. Must not wait.
pub trait MsiSender: Send + Sync {
    /// Delivers one.
    fn send(&self, msi: Msi);
}

/// Raises and lowers a wire to the interrupt controllers. Must not wait.
pub trait IrqLine: Send + Sync {
    /// Sets the level.
    fn set(&self, high: bool);
}

/// A wire to the interrupt controllers whose rising edge is one interrupt. Must not wait.
pub trait IrqEdge: Send + Sync {
    /// Interrupts once: up and down again.
    fn pulse(&self);
}

/// The guest's writes that ring.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Doorbell {
    /// Where they go.
    pub address: u64,
    /// Only those of 32 bits with this value; `None`: any write.
    pub value: Option<u32>,
}

/// Turns guest writes to an address into signals of an eventfd, without an exit to user space.
pub trait Doorbells: Send + Sync {
    /// From now on, these writes signal `fd`.
    fn connect(&self, doorbell: Doorbell, fd: BorrowedFd<'_>) -> io::Result<()>;

    /// No longer. A write that came before may still have signalled `fd`.
    fn disconnect(&self, doorbell: Doorbell, fd: BorrowedFd<'_>) -> io::Result<()>;
}
