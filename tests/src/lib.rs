//! Helpers of the whole-machine tests: each runs the `heddle` program on /dev/kvm.
//!
//! A host without /dev/kvm fails these tests rather than passing them over.

pub mod machine;
pub mod payload;
pub mod program;
pub mod pty;
