//! Hands a value from one CPU to another.

use alloc::boxed::Box;
use core::ptr;
use core::sync::atomic::{AtomicPtr, Ordering};

/// Holds at most one value. Neither side ever waits.
pub struct Mailbox<T>(AtomicPtr<T>);

impl<T: Send> Mailbox<T> {
    pub fn new() -> Self {
        Mailbox(AtomicPtr::new(ptr::null_mut()))
    }

    /// Puts a value in. One that was still there is lost.
    pub fn put(&self, value: Box<T>) {
        self.0.swap(Box::into_raw(value), Ordering::AcqRel);
    }

    /// Takes the value out.
    pub fn take(&self) -> Option<Box<T>> {
        let value = self.0.swap(ptr::null_mut(), Ordering::AcqRel);
        // SAFETY: the pointer came from a box in `put`, and the swap gives it to one taker only.
        (!value.is_null()).then(|| unsafe { Box::from_raw(value) })
    }
}
