//! How two threads do not miss each other.

use crate::sync::{Ordering::SeqCst, fence};

/// Writes what the other side reads, then looks at what it writes: in this order, with a full
/// fence between.
///
/// If the other side does the same with the two swapped, at least one of them sees what the other
/// wrote. So a loop falls asleep and is not left asleep with work in its inbox, and a queue asks
/// its driver for kicks again and does not wait for one that will not come.
pub fn announce<R>(write: impl FnOnce(), look: impl FnOnce() -> R) -> R {
    #[cfg(loom)]
    if crate::models::asks_for("look, then announce") {
        let seen = look();
        write();
        return seen;
    }
    write();
    fence(SeqCst);
    look()
}
