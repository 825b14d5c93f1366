//! In the place of the standard library's atomics and the kernel's eventfd: those of loom, in
//! which a [`Fault`](super::Fault) can be hidden.
//!
//! While a failed model is taken down nobody can ask loom any more: every word is zero then, and
//! what hangs on it is leaked.

use std::cell::RefCell;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::panic::Location;
use std::sync::{Arc, Weak};
use std::thread::panicking;

use loom::sync::Notify;
use loom::sync::atomic::Ordering;

use super::{is_left_out, is_unordered};

#[track_caller]
fn weakened(order: Ordering) -> Ordering {
    if is_unordered(Location::caller()) { Ordering::Relaxed } else { order }
}

#[track_caller]
pub(crate) fn fence(order: Ordering) {
    if !panicking() && !is_left_out(Location::caller()) {
        loom::sync::atomic::fence(order);
    }
}

macro_rules! atomic {
    ($name:ident$(<$T:ident>)?: $value:ty, $zero:expr; $($method:ident)*) => {
        #[derive(Debug)]
        pub(crate) struct $name$(<$T>)?(loom::sync::atomic::$name$(<$T>)?);

        impl$(<$T>)? $name$(<$T>)? {
            #[track_caller]
            pub(crate) fn new(value: $value) -> Self {
                Self(loom::sync::atomic::$name::new(value))
            }

            $(atomic!(@$method $value, $zero);)*
        }
    };
    (@load $value:ty, $zero:expr) => {
        #[track_caller]
        pub(crate) fn load(&self, order: Ordering) -> $value {
            if panicking() { $zero } else { self.0.load(weakened(order)) }
        }
    };
    (@store $value:ty, $zero:expr) => {
        #[track_caller]
        pub(crate) fn store(&self, value: $value, order: Ordering) {
            if !panicking() {
                self.0.store(value, weakened(order));
            }
        }
    };
    (@compare_exchange $value:ty, $zero:expr) => {
        #[track_caller]
        pub(crate) fn compare_exchange(
            &self,
            current: $value,
            new: $value,
            success: Ordering,
            failure: Ordering,
        ) -> Result<$value, $value> {
            if panicking() {
                return Ok(current);
            }
            self.0.compare_exchange(current, new, weakened(success), weakened(failure))
        }
    };
    (@compare_exchange_weak $value:ty, $zero:expr) => {
        #[track_caller]
        pub(crate) fn compare_exchange_weak(
            &self,
            current: $value,
            new: $value,
            success: Ordering,
            failure: Ordering,
        ) -> Result<$value, $value> {
            if panicking() {
                return Ok(current);
            }
            self.0.compare_exchange(current, new, weakened(success), weakened(failure))
        }
    };
    (@fetch_or $value:ty, $zero:expr) => {
        #[track_caller]
        pub(crate) fn fetch_or(&self, value: $value, order: Ordering) -> $value {
            if panicking() {
                $zero
            } else if is_left_out(Location::caller()) {
                self.0.load(Ordering::Relaxed)
            } else {
                self.0.fetch_or(value, weakened(order))
            }
        }
    };
    (@$method:ident $value:ty, $zero:expr) => {
        #[track_caller]
        pub(crate) fn $method(&self, value: $value, order: Ordering) -> $value {
            if panicking() { $zero } else { self.0.$method(value, weakened(order)) }
        }
    };
}

atomic!(AtomicBool: bool, false; load store swap);
atomic!(AtomicU8: u8, 0; load store swap fetch_or compare_exchange);
atomic!(AtomicPtr<T>: *mut T, std::ptr::null_mut(); load store swap compare_exchange_weak);

/// A cell whose every access must come after all others.
pub(crate) struct UnsafeCell<T> {
    access: loom::cell::UnsafeCell<()>,
    value: std::cell::UnsafeCell<T>,
}

impl<T> UnsafeCell<T> {
    pub(crate) fn new(value: T) -> Self {
        Self { access: loom::cell::UnsafeCell::new(()), value: std::cell::UnsafeCell::new(value) }
    }

    #[track_caller]
    pub(crate) fn get(&self) -> *mut T {
        if !panicking() {
            self.access.with_mut(|_| ());
        }
        self.value.get()
    }
}

thread_local! {
    /// The bells of this execution of a model. Its threads all are this thread.
    static BELLS: RefCell<Vec<Weak<Notify>>> = const { RefCell::new(Vec::new()) };
}

/// No fd of the process has such a number.
const FIRST_FD: RawFd = 1 << 30;

pub(crate) fn bell_of(fd: RawFd) -> Option<Arc<Notify>> {
    let at = usize::try_from(fd.checked_sub(FIRST_FD)?).ok()?;
    BELLS.with_borrow(|bells| bells.get(at).and_then(Weak::upgrade))
}

/// An eventfd that a loop sleeps on.
pub(crate) struct EventFd {
    bell: Arc<Notify>,
    fd: RawFd,
}

impl EventFd {
    pub(crate) fn new(_flags: i32) -> io::Result<Self> {
        let bell = Arc::new(Notify::new());
        let fd = BELLS.with_borrow_mut(|bells| {
            if bells.iter().all(|bell| bell.strong_count() == 0) {
                bells.clear();
            }
            bells.push(Arc::downgrade(&bell));
            FIRST_FD + bells.len() as RawFd - 1
        });
        Ok(Self { bell, fd })
    }

    pub(crate) fn write(&self, _: u64) -> io::Result<()> {
        if !panicking() {
            self.bell.notify();
        }
        Ok(())
    }
}

impl AsRawFd for EventFd {
    fn as_raw_fd(&self) -> RawFd {
        self.fd
    }
}
