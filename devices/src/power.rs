//! Ways for a guest to end its machine.

/// What the guest asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PowerRequest {
    /// Power off.
    Off,
    /// Reset.
    Reset,
    /// The guest says that it has panicked.
    Panic,
    /// End with this value, written to the debug-exit port.
    DebugExit(u32),
}

/// Takes the requests. Must not wait; the machine ends some time after.
pub trait Power: Send + Sync {
    /// The guest asks for this. Only the first request counts.
    fn request(&self, request: PowerRequest);
}
