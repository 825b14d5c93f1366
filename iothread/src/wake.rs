//! Who sleeps and who wakes: the state of a loop, as those see it who post to it.
//!
//! Who posts writes to the inbox, then reads this state. The loop writes this state, then reads its
//! inbox. [`announce`] says why one of them sees what the other wrote.

use crate::announce::announce;
use crate::sync::{AtomicU8, Ordering::*, fence};

const AWAKE: u8 = 0;
const ASLEEP: u8 = 1;
const ENDED: u8 = 2;

/// What someone who has posted owes the loop.
#[must_use]
pub(crate) enum Owed {
    /// Nothing: it will look.
    Nothing,
    /// A signal: it sleeps. Nobody else owes this one.
    Signal,
    /// There is no loop any more: to take back what was posted.
    Removal,
}

pub(crate) struct Wake(AtomicU8);

impl Wake {
    pub(crate) fn awake() -> Self {
        Self(AtomicU8::new(AWAKE))
    }

    /// To be called after whatever the loop is to see.
    pub(crate) fn posted(&self) -> Owed {
        match self.after_posting() {
            ASLEEP if self.0.compare_exchange(ASLEEP, AWAKE, AcqRel, Relaxed).is_ok() => {
                Owed::Signal
            }
            ENDED => Owed::Removal,
            _ => Owed::Nothing,
        }
    }

    /// To be called after something for which the loop need not wake up. True: there is no loop any
    /// more, and it is for the caller to take it back.
    pub(crate) fn posted_to_nobody(&self) -> bool {
        self.after_posting() == ENDED
    }

    fn after_posting(&self) -> u8 {
        fence(SeqCst); // pairs with that of `announce`
        self.0.load(Relaxed)
    }

    /// The loop is going to sleep, unless `idle`, its last look, says no. The same answer.
    pub(crate) fn falls_asleep(&self, idle: impl FnOnce() -> bool) -> bool {
        announce(|| self.0.store(ASLEEP, Relaxed), idle)
    }

    /// The loop sleeps no more, whatever ended it.
    pub(crate) fn woke_up(&self) {
        self.0.store(AWAKE, Relaxed);
    }

    /// Does the loop sleep, for all that one can know who is not the loop?
    pub(crate) fn is_asleep(&self) -> bool {
        self.0.load(Acquire) == ASLEEP
    }

    /// The loop has ended and empties its inbox for the last time: what comes afterwards is for
    /// those to remove who posted it.
    pub(crate) fn ends(&self, empty: impl FnOnce()) {
        announce(|| self.0.store(ENDED, Relaxed), empty);
    }
}
