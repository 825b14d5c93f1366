//! Interrupts and doorbells: what a device needs of the machine, without knowing it.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering::SeqCst};

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

/// A wire that several devices pull: it is high while one of them does.
pub struct SharedLine {
    line: Arc<dyn IrqLine>,
    /// Devices that pull it. Below 0 for a moment when a device lets go at once.
    pulling: AtomicI32,
}

impl std::fmt::Debug for SharedLine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SharedLine").field("pulling", &self.pulling).finish_non_exhaustive()
    }
}

impl SharedLine {
    /// `line`, pulled by nobody.
    pub fn new(line: Arc<dyn IrqLine>) -> Self {
        Self { line, pulling: AtomicI32::new(0) }
    }

    /// Another device on the wire.
    pub fn pin(self: &Arc<Self>) -> Pin {
        Pin { shared: Arc::clone(self), high: AtomicBool::new(false) }
    }
}

/// One device's end of a [`SharedLine`].
#[derive(Debug)]
pub struct Pin {
    shared: Arc<SharedLine>,
    high: AtomicBool,
}

impl IrqLine for Pin {
    /// Pulls the wire, or lets go.
    fn set(&self, high: bool) {
        if self.high.swap(high, SeqCst) != high {
            self.shared.pulling.fetch_add(if high { 1 } else { -1 }, SeqCst);
            let wanted = || self.shared.pulling.load(SeqCst) > 0;
            settle(&*self.shared.line, wanted);
        }
    }
}

/// Sets `line` as `wanted` says, again if that has changed meanwhile. Whoever changes what `wanted`
/// reads calls this afterwards; then the last of those who overtake each other sets it right.
pub(crate) fn settle(line: &dyn IrqLine, wanted: impl Fn() -> bool) {
    loop {
        let high = wanted();
        line.set(high);
        if wanted() == high {
            return;
        }
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Default)]
    struct Wire(AtomicBool);

    impl IrqLine for Wire {
        fn set(&self, high: bool) {
            self.0.store(high, SeqCst);
        }
    }

    #[test]
    fn a_shared_line_is_high_while_somebody_pulls() {
        let wire = Arc::new(Wire::default());
        let shared = Arc::new(SharedLine::new(Arc::clone(&wire) as _));
        let pins = [shared.pin(), shared.pin()];
        let levels = [(0, true), (1, true), (0, true), (0, false), (0, false), (1, false)];
        let seen: Vec<bool> = levels
            .into_iter()
            .map(|(pin, high)| {
                pins[pin].set(high);
                wire.0.load(SeqCst)
            })
            .collect();
        assert_eq!(seen, [true, true, true, true, true, false]);
    }

    #[test]
    fn threads_that_pull_and_let_go_leave_it_low() {
        let wire = Arc::new(Wire::default());
        let shared = Arc::new(SharedLine::new(Arc::clone(&wire) as _));
        std::thread::scope(|scope| {
            for _ in 0..4 {
                let pin = shared.pin();
                scope.spawn(move || (0..20_000).for_each(|nth| pin.set(nth % 2 == 0)));
            }
        });
        assert!(!wire.0.load(SeqCst));
    }
}
