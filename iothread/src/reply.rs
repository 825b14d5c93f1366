//! Answers from other threads, and who may wait for them.

use std::cell::Cell;
use std::marker::PhantomData;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TryRecvError, sync_channel};
use std::time::Duration;

thread_local! {
    static MUST_NOT_BLOCK: Cell<bool> = const { Cell::new(false) };
}

/// Called by every thread that becomes a loop or a vCPU.
pub(crate) fn forbid_blocking() {
    MUST_NOT_BLOCK.with(|flag| flag.set(true));
}

/// The right to wait for another thread. Loops and vCPUs cannot have it, so no wait can close a
/// circle between them. It does not leave its thread.
#[derive(Debug)]
pub struct Blocking(PhantomData<*mut ()>);

impl Blocking {
    /// `None` on a loop or a vCPU thread.
    pub fn on_this_thread() -> Option<Self> {
        MUST_NOT_BLOCK.with(|flag| (!flag.get()).then_some(Self(PhantomData)))
    }
}

/// The answer will never come: the loop that should give it has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the loop that should answer has ended")]
pub struct Gone;

/// An answer that is on its way.
#[derive(Debug)]
#[must_use = "an answer that nobody looks at was not needed"]
pub struct Reply<R>(Receiver<R>);

/// Where the answer goes in; dropping it tells the other side that none will come.
#[derive(Debug)]
pub struct Answer<R>(SyncSender<R>);

impl<R> Answer<R> {
    /// Answers; does nothing if nobody listens any more.
    pub fn give(self, value: R) {
        // Nobody listens any more: that is their choice.
        let _ = self.0.try_send(value);
    }
}

impl<R> Reply<R> {
    /// An answer to give and the reply it arrives at.
    pub fn pair() -> (Answer<R>, Self) {
        let (sender, receiver) = sync_channel(1);
        (Answer(sender), Self(receiver))
    }

    /// Waits for the answer.
    pub fn wait(self, _: &Blocking) -> Result<R, Gone> {
        self.0.recv().map_err(|_| Gone)
    }

    /// Waits for the answer, at most this long; `Ok(None)`: not yet.
    pub fn wait_for(&self, _: &Blocking, limit: Duration) -> Result<Option<R>, Gone> {
        match self.0.recv_timeout(limit) {
            Ok(value) => Ok(Some(value)),
            Err(RecvTimeoutError::Timeout) => Ok(None),
            Err(RecvTimeoutError::Disconnected) => Err(Gone),
        }
    }

    /// The answer if it is there; never waits.
    pub fn poll(&mut self) -> Result<Option<R>, Gone> {
        match self.0.try_recv() {
            Ok(value) => Ok(Some(value)),
            Err(TryRecvError::Empty) => Ok(None),
            Err(TryRecvError::Disconnected) => Err(Gone),
        }
    }
}
