//! The texts that were read, and what was found wrong in them.

use std::cell::{Cell, RefCell};
use std::path::PathBuf;

use crate::diagnostics::{Diagnostic, Diagnostics, Severity};
use crate::tree::Loc;

/// One text that was read: a file, or the argument of a `--set`.
pub(crate) struct Source {
    pub(crate) name: String,
    pub(crate) text: String,
    /// Where relative paths start; absolute.
    pub(crate) base: PathBuf,
    /// Is it a `--set`? Then quotes around strings may be missing.
    pub(crate) is_override: bool,
    /// Where the newlines are.
    newlines: Vec<usize>,
}

impl Source {
    pub(crate) fn new(name: String, text: String, base: PathBuf) -> Self {
        let newlines = text.match_indices('\n').map(|(at, _)| at).collect();
        Self { name, text, base, is_override: false, newlines }
    }

    pub(crate) fn into_override(self) -> Self {
        Self { is_override: true, ..self }
    }

    /// The line of a byte, from 0.
    pub(crate) fn line_at(&self, byte: usize) -> usize {
        self.newlines.partition_point(|newline| *newline < byte)
    }
}

/// The sources, and what was found wrong in them.
#[derive(Default)]
pub(crate) struct Report {
    pub(crate) sources: Vec<Source>,
    found: RefCell<Vec<(Loc, Diagnostic)>>,
    omitted: Cell<usize>,
}

impl Report {
    /// More than anyone reads; keeps hostile files from costing time and memory.
    const MOST: usize = 100;

    pub(crate) fn error(&self, loc: Loc, message: impl Into<String>, hint: Option<String>) {
        self.add(Severity::Error, loc, message.into(), hint);
    }

    pub(crate) fn warning(&self, loc: Loc, message: impl Into<String>, hint: Option<String>) {
        self.add(Severity::Warning, loc, message.into(), hint);
    }

    fn add(&self, severity: Severity, loc: Loc, message: String, hint: Option<String>) {
        let mut found = self.found.borrow_mut();
        if found.len() >= Self::MOST {
            self.omitted.set(self.omitted.get() + 1);
            return;
        }
        let source = &self.sources[loc.source];
        let span = (loc.start, loc.end);
        let mut diagnostic = Diagnostic::of_place(&source.name, &source.text, span, message, hint);
        diagnostic.severity = severity;
        found.push((loc, diagnostic));
    }

    pub(crate) fn has_errors(&self) -> bool {
        self.found.borrow().iter().any(|(_, found)| found.severity == Severity::Error)
    }

    pub(crate) fn into_diagnostics(self) -> Diagnostics {
        let mut found = self.found.into_inner();
        found.sort_by_key(|(loc, _)| *loc);
        let list = found.into_iter().map(|(_, diagnostic)| diagnostic).collect();
        Diagnostics { list, omitted: self.omitted.get() }
    }
}

/// The candidate that `name` was probably meant to be.
pub(crate) fn nearest<'c>(
    name: &str,
    candidates: impl IntoIterator<Item = &'c str>,
) -> Option<&'c str> {
    if name.len() > 64 {
        return None;
    }
    let plain = |name: &str| name.to_lowercase().replace('_', "-");
    let name = plain(name);
    let close = |candidate: &'c str| {
        let plain = plain(candidate);
        let distance = strsim::damerau_levenshtein(&name, &plain);
        let is_part = name.len() > 2 && plain.contains(&name);
        let limit = (plain.len().max(name.len()) / 3).max(1);
        (distance <= limit || is_part).then_some((distance, candidate))
    };
    let (_, nearest) =
        candidates.into_iter().filter_map(close).min_by_key(|(distance, _)| *distance)?;
    Some(nearest)
}

/// "did you mean ...?"
pub(crate) fn did_you_mean<'c>(
    name: &str,
    candidates: impl IntoIterator<Item = &'c str>,
) -> Option<String> {
    nearest(name, candidates).map(|nearest| format!("did you mean `{nearest}`?"))
}
