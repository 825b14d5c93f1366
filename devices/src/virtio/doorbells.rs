//! The eventfds by which a driver's kicks reach the loops, without an exit to user space.

use std::io;
use std::os::fd::{AsFd, FromRawFd, IntoRawFd, OwnedFd};
use std::sync::Arc;

use iothread::FdSource;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::seat::Placement;
use super::transport::Transport;
use crate::irq::{Doorbell, Doorbells};

/// One doorbell for each queue of a device that a loop serves; those that vCPUs serve take the
/// exit.
pub(super) struct DoorbellRow {
    name: String,
    doorbells: Arc<dyn Doorbells>,
    rows: Vec<(u16, FdSource)>,
}

impl DoorbellRow {
    /// The doorbells of a device, not connected yet.
    pub(super) fn new(transport: &Transport, doorbells: Arc<dyn Doorbells>) -> io::Result<Self> {
        let mut rows = Vec::new();
        for queue in 0..transport.queue_count() {
            if let Some(seat) = transport.seat(queue)
                && matches!(seat.placement(), Placement::Loop(_))
            {
                let eventfd = owned(EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?);
                rows.push((queue, seat.watch(eventfd)));
            }
        }
        Ok(Self { name: transport.name().to_owned(), doorbells, rows })
    }

    /// Connects each of them to where `place` says for its queue.
    pub(super) fn connect(&self, place: impl Fn(u16) -> Doorbell) {
        for (queue, source) in &self.rows {
            if let Err(error) = self.doorbells.connect(place(*queue), source.as_fd()) {
                // The exit then reaches the transport's registers, which pass the kick on.
                eprintln!("heddle: {}:q{queue}: kicks take exits: {error}", self.name);
            }
        }
    }

    /// Takes back what [`connect`](Self::connect) did.
    pub(super) fn disconnect(&self, place: impl Fn(u16) -> Doorbell) {
        for (queue, source) in &self.rows {
            // Fails for a doorbell that could not be connected.
            let _ = self.doorbells.disconnect(place(*queue), source.as_fd());
        }
    }
}

fn owned(eventfd: EventFd) -> OwnedFd {
    #[expect(unsafe_code, reason = "an EventFd gives its fd only raw")]
    // SAFETY: into_raw_fd passed the ownership on.
    unsafe {
        OwnedFd::from_raw_fd(eventfd.into_raw_fd())
    }
}
