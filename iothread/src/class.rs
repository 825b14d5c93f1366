//! What a loop does first.

/// The class of an object's work on its loop. It orders what waits; what has begun is not
/// interrupted: for that, give the object a loop of its own with another scheduling policy.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub enum Class {
    /// Before everything else that waits.
    Realtime,
    /// In its turn.
    #[default]
    Normal,
    /// After the others, but some of it in every turn.
    Service,
}

impl Class {
    /// All of them, the first first.
    pub const ALL: [Self; 3] = [Self::Realtime, Self::Normal, Self::Service];
}
