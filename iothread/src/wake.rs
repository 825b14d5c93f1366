//! Who sleeps and who wakes: the state of a loop, as those see it who post to it.
//!
//! Two threads each write one thing and then read the other's: who posts writes to the inbox and
//! reads this state; the loop writes this state and reads its inbox. A full fence between the
//! two steps of each means that at least one of them sees what the other wrote.

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
        fence(SeqCst); // pairs with those of the loop, below
        match self.0.load(Relaxed) {
            ASLEEP if self.0.compare_exchange(ASLEEP, AWAKE, AcqRel, Relaxed).is_ok() => {
                Owed::Signal
            }
            ENDED => Owed::Removal,
            _ => Owed::Nothing,
        }
    }

    /// The loop is going to sleep: it must look once more after this, and not sleep if it finds
    /// anything.
    pub(crate) fn falls_asleep(&self) {
        self.0.store(ASLEEP, Relaxed);
        fence(SeqCst);
    }

    /// The loop sleeps no more, whatever ended it.
    pub(crate) fn woke_up(&self) {
        self.0.store(AWAKE, Relaxed);
    }

    /// The loop has ended: what is posted after its last look, which comes after this, is for
    /// those to remove who posted it.
    pub(crate) fn ended(&self) {
        self.0.store(ENDED, Relaxed);
        fence(SeqCst);
    }
}
