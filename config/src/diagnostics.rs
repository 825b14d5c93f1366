//! What is wrong with a file, where, and what would help.

use std::fmt;

use annotate_snippets::{AnnotationKind, Level, Origin, Renderer, Snippet};
use serde::Serialize;

/// One complaint.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Diagnostic {
    /// Does it keep the file from being used?
    pub severity: Severity,
    /// The file, or `--set`.
    pub file: String,
    /// Line, from 1; 0 when the complaint is about the file as a whole.
    pub line: usize,
    /// Column in characters, from 1; 0 when the complaint is about the file as a whole.
    pub column: usize,
    /// What is wrong.
    pub message: String,
    /// What would help.
    pub hint: Option<String>,
    /// The line, with the part to underline.
    #[serde(skip)]
    excerpt: Option<Excerpt>,
}

/// How bad something is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Severity {
    /// Doubtful, but it can be used.
    Warning,
    /// It cannot be used.
    Error,
}

/// A line of a file around the place that is underlined.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Excerpt {
    text: String,
    /// Bytes of `text`.
    start: usize,
    end: usize,
    /// Is there more of the line in front?
    cut: bool,
}

/// All complaints about one configuration, in the order of its files.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Diagnostics {
    /// The complaints.
    pub list: Vec<Diagnostic>,
    /// How many more there were.
    pub omitted: usize,
}

impl Diagnostics {
    /// For people: each complaint with its line, the place underlined.
    pub fn render(&self, color: bool) -> String {
        let renderer = if color { Renderer::styled() } else { Renderer::plain() };
        let mut text = String::new();
        for diagnostic in &self.list {
            text += &renderer.render(&[diagnostic.report()]);
            text += "\n\n";
        }
        if self.omitted > 0 {
            text += &format!("... and {} more\n", self.omitted);
        }
        text
    }

    /// For programs: `{"diagnostics": [{severity, file, line, column, message, hint}], "omitted": 0}`.
    pub fn to_json(&self) -> serde_json::Value {
        serde_json::json!({ "diagnostics": self.list, "omitted": self.omitted })
    }

    /// Is there nothing to complain about?
    pub fn is_empty(&self) -> bool {
        self.list.is_empty()
    }
}

impl fmt::Display for Diagnostics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.render(false))
    }
}

impl std::error::Error for Diagnostics {}

impl Diagnostic {
    /// A complaint about `file` as a whole.
    pub(crate) fn of_file(file: &str, message: String, hint: Option<String>) -> Self {
        Self {
            severity: Severity::Error,
            file: file.to_owned(),
            line: 0,
            column: 0,
            message,
            hint,
            excerpt: None,
        }
    }

    /// A complaint about `text[start..end]`, where `text` is all of `file`.
    pub(crate) fn of_place(
        file: &str,
        text: &str,
        (start, end): (usize, usize),
        message: String,
        hint: Option<String>,
    ) -> Self {
        let start = text.floor_char_boundary(start);
        let line_start = text[..start].rfind('\n').map_or(0, |newline| newline + 1);
        let line_end = text[start..].find(['\r', '\n']).map_or(text.len(), |length| start + length);
        let end = text.ceil_char_boundary(end.clamp(start, line_end.max(start)));
        Self {
            line: 1 + text[..start].matches('\n').count(),
            column: 1 + text[line_start..start].chars().count(),
            excerpt: Some(Excerpt::around(
                &text[line_start..line_end],
                start - line_start,
                end - line_start,
            )),
            ..Self::of_file(file, message, hint)
        }
    }

    fn report(&self) -> annotate_snippets::Group<'_> {
        let level = match self.severity {
            Severity::Error => Level::ERROR,
            Severity::Warning => Level::WARNING,
        };
        let group = level.primary_title(&self.message);
        let origin = || Origin::path(&self.file);
        let group = match &self.excerpt {
            None => group.element(origin()),
            Some(excerpt) => {
                let underlined = AnnotationKind::Primary.span(excerpt.start..excerpt.end);
                let snippet =
                    Snippet::source(&excerpt.text).line_start(self.line).annotation(underlined);
                if excerpt.cut {
                    // The renderer would count the column from where the line was cut.
                    group
                        .element(origin().line(self.line).char_column(self.column))
                        .element(snippet)
                } else {
                    group.element(snippet.path(&self.file))
                }
            }
        };
        match &self.hint {
            Some(hint) => group.element(Level::HELP.message(hint)),
            None => group,
        }
    }
}

impl Excerpt {
    /// All of `line`, or of a very long one the surroundings of `start..end`.
    fn around(line: &str, start: usize, end: usize) -> Self {
        const CONTEXT: usize = 60;
        let end = line.floor_char_boundary(end.min(start + CONTEXT)).max(start);
        let from = line.floor_char_boundary(start.saturating_sub(CONTEXT));
        let to = line.ceil_char_boundary((end + CONTEXT).min(line.len()));
        let before = if from > 0 { "…" } else { "" };
        let after = if to < line.len() { "…" } else { "" };
        Self {
            text: format!("{before}{}{after}", &line[from..to]),
            start: before.len() + start - from,
            end: before.len() + end - from,
            cut: from > 0,
        }
    }
}
