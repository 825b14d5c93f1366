//! The atomics of the lock-free parts: the standard library's. A build with `--cfg loom` has
//! those of the models here instead, which try out every order of what threads do to them.

#[cfg(not(loom))]
pub(crate) use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU8, fence};

pub(crate) use std::sync::atomic::Ordering;
