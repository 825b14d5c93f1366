//! What a host cannot do.

use crate::boot::BootError;

/// What this host, or this file on this host, cannot do.
#[derive(Debug, thiserror::Error)]
#[error("{what}: {why}")]
pub struct HostError {
    what: String,
    why: String,
}

impl HostError {
    /// `what` cannot be done, and why.
    pub fn new(what: impl Into<String>, why: impl ToString) -> Self {
        Self { what: what.into(), why: why.to_string() }
    }
}

impl From<BootError> for HostError {
    fn from(error: BootError) -> Self {
        HostError::new("boot", error)
    }
}
