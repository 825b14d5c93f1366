//! The atomics of the lock-free parts, and what a loop sleeps on: those of the standard library
//! and the kernel. With `--cfg loom` they are the models', which try every order of what threads
//! do to them.

#[cfg(loom)]
pub(crate) use crate::models::sync::{AtomicBool, AtomicPtr, AtomicU8, EventFd, UnsafeCell, fence};
#[cfg(not(loom))]
pub(crate) use std::cell::UnsafeCell;
#[cfg(not(loom))]
pub(crate) use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU8, fence};
#[cfg(not(loom))]
pub(crate) use vmm_sys_util::eventfd::EventFd;

pub(crate) use std::sync::atomic::Ordering;
