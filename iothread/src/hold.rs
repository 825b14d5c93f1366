//! The hold of a strand: one word, taken by one exchange and never waited for.
//!
//! Who finds it taken leaves a letter, then says so with MAIL; the holder cannot let go while MAIL
//! is set, so it finds the letter. The order matters: the letter is in the inbox before MAIL is set.

use crate::sync::{AtomicU8, Ordering::*};

const FREE: u8 = 0;
const HELD: u8 = 1;
const MAIL: u8 = 2;

pub(crate) struct Hold(AtomicU8);

impl Hold {
    pub(crate) fn free() -> Self {
        Self(AtomicU8::new(FREE))
    }

    /// True: it was free, and is the caller's now.
    pub(crate) fn try_enter(&self) -> bool {
        self.0.compare_exchange(FREE, HELD, Acquire, Relaxed).is_ok()
    }

    /// Tells of a letter that is in the inbox already. True: the holder is gone, and the hold is
    /// the caller's now, with the letter.
    pub(crate) fn leave_mail(&self) -> bool {
        self.0.fetch_or(HELD | MAIL, AcqRel) & HELD == 0
    }

    /// As [`leave_mail`](Self::leave_mail), by the holder itself.
    pub(crate) fn keep_mail(&self) {
        self.0.fetch_or(MAIL, Relaxed);
    }

    /// The holder's look: is there something in the inbox?
    pub(crate) fn has_mail(&self) -> bool {
        self.0.load(Relaxed) & MAIL != 0
    }

    /// Lets go. False: there is mail, and the hold stays the caller's.
    pub(crate) fn release(&self) -> bool {
        self.0.compare_exchange(HELD, FREE, Release, Relaxed).is_ok()
    }

    /// The holder is about to empty the inbox: letters that come from here on are new mail.
    pub(crate) fn open_mail(&self) {
        self.0.swap(HELD, AcqRel);
    }
}
