//! Models: small programs of which loom tries every schedule and every value that a read may see,
//! within the bounds that each states.
//!
//! What runs in them is the crate itself, built with `--cfg loom`: only the atomics and the
//! kernel's part of a loop ([`sync`], `readiness.rs`) are other ones. Each statement has mutants,
//! the same program with one [`Fault`] in it: a model that holds with a fault proves nothing.

use std::cell::Cell;
use std::panic::Location;

pub(crate) mod sync;

#[cfg(test)]
mod check;
#[cfg(test)]
mod inbox;
#[cfg(test)]
mod moves;
#[cfg(test)]
mod rearm;
#[cfg(test)]
mod strand;
#[cfg(test)]
mod wake;

/// What is wrong in a mutant.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Fault {
    /// Two steps are swapped: the code asks for this by name.
    Swapped(&'static str),
    /// The operation on this line orders nothing.
    Unordered(Line),
    /// The operation on this line, which has no result that counts, is not there.
    LeftOut(Line),
}

/// A line of the source.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Line {
    file: &'static str,
    line: u32,
}

impl Line {
    fn is(self, here: &Location<'_>) -> bool {
        here.file().ends_with(self.file) && here.line() == self.line
    }
}

thread_local! {
    /// The fault in the model that runs on this thread.
    static FAULT: Cell<Option<Fault>> = const { Cell::new(None) };
}

/// Is the code to do these two steps in the wrong order?
pub(crate) fn asks_for(swapped: &str) -> bool {
    matches!(FAULT.get(), Some(Fault::Swapped(name)) if name == swapped)
}

fn is_unordered(here: &Location<'_>) -> bool {
    matches!(FAULT.get(), Some(Fault::Unordered(line)) if line.is(here))
}

fn is_left_out(here: &Location<'_>) -> bool {
    matches!(FAULT.get(), Some(Fault::LeftOut(line)) if line.is(here))
}
