//! Helpers of the whole-machine tests.
