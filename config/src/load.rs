//! Opens files, follows includes, lays `--set` on top, and has the result read.

use std::fs::{self, File, OpenOptions};
use std::io::Read;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use serde::Serialize;
use toml::de::DeTable;

use crate::cpuset::excerpt;
use crate::diagnostics::{Diagnostic, Diagnostics};
use crate::effective;
use crate::keys;
use crate::plan::Plan;
use crate::read;
use crate::report::{Report, Source};
use crate::tree::{Kind, Loc, Node, Table};

/// A file that holds together.
#[derive(Debug, Clone, PartialEq)]
pub struct Loaded {
    /// What it says.
    pub plan: Plan,
    /// The same as one TOML text, with includes, `--set` and defaults worked in and absolute
    /// paths. It loads to the same plan.
    pub effective: String,
    /// For each value that was set: where. In the order of the files.
    pub provenance: Vec<Provenance>,
    /// Doubts that keep nothing from running.
    pub warnings: Diagnostics,
}

/// Where a value comes from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Provenance {
    /// Dotted name of the value. A short form goes by its full name: `machine.cpus.count`.
    pub key: String,
    /// The file, or `--set`.
    pub file: String,
    /// Line, from 1.
    pub line: usize,
}

/// No file that describes one machine is larger.
const LARGEST: u64 = 1 << 20;
const DEEPEST_INCLUDE: usize = 16;
const MOST_FILES: usize = 64;

/// Reads the file at `path` with its includes, then lays `overrides` (`a.b=c`) on top.
///
/// Relative paths are relative to the file they are in, those in `overrides` to the current
/// directory.
///
/// # Errors
/// All that is wrong with the files, at once.
pub fn load(path: &Path, overrides: &[String]) -> Result<Loaded, Diagnostics> {
    let mut loader = Loader::default();
    let tree = loader.file(path, None);
    loader.finish(tree, path, overrides)
}

/// As [`load`], with the text at hand: `name` stands for it in messages, `base` is where its
/// relative paths start.
///
/// # Errors
/// All that is wrong with the text, at once.
pub fn load_str(
    name: &str,
    text: &str,
    base: &Path,
    overrides: &[String],
) -> Result<Loaded, Diagnostics> {
    let mut loader = Loader::default();
    let tree = loader.text(name, text, &absolute(base));
    loader.finish(tree, Path::new(name), overrides)
}

/// `path` from the root directory on. Links and `..` stay as they are.
fn absolute(path: &Path) -> PathBuf {
    let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
    std::path::absolute(path).unwrap_or_else(|_| path.to_owned())
}

#[derive(Default)]
struct Loader {
    report: Report,
    /// Files that could not be read, without an include that asked for them.
    unreadable: Vec<Diagnostic>,
    /// The files that are being read, each included by the one before.
    open: Vec<PathBuf>,
    files: usize,
}

impl Loader {
    fn finish(
        mut self,
        tree: Option<Table>,
        path: &Path,
        overrides: &[String],
    ) -> Result<Loaded, Diagnostics> {
        let sound = !self.report.has_errors();
        let sets: Vec<Option<Table>> = overrides.iter().map(|set| self.set(set)).collect();
        // A file that is missing or cut short would make complaints about what is not there.
        let Some(mut tree) = tree.filter(|_| sound) else {
            let unreadable = self.unreadable;
            let mut diagnostics = self.report.into_diagnostics();
            diagnostics.list.splice(0..0, unreadable);
            return Err(diagnostics);
        };
        for set in sets.into_iter().flatten() {
            tree.merge(set);
        }
        let plan = read::plan(&self.report, &tree, &default_name(path));
        if self.report.has_errors() {
            return Err(self.report.into_diagnostics());
        }
        let mut provenance = Vec::new();
        trace(&self.report, &tree, "", &mut provenance);
        Ok(Loaded {
            effective: effective::toml(&plan),
            plan,
            provenance,
            warnings: self.report.into_diagnostics(),
        })
    }

    /// One file with its includes. `None`: it could not be had, which is reported.
    fn file(&mut self, path: &Path, included: Option<Loc>) -> Option<Table> {
        let name = path.display().to_string();
        let text = match self.read(path) {
            Ok(text) => text,
            Err(Unreadable { message, hint }) => {
                match included {
                    Some(loc) => self.report.error(loc, format!("`include`: {message}"), hint),
                    None => self.unreadable.push(Diagnostic::of_file(&name, message, hint)),
                }
                return None;
            }
        };
        self.open.push(fs::canonicalize(path).unwrap_or_else(|_| path.to_owned()));
        let base = absolute(path.parent().unwrap_or(Path::new("/")));
        let tree = match String::from_utf8(text) {
            Ok(text) => self.text(&name, &text, &base),
            Err(error) => {
                // What comes before the bad byte is shown with it.
                let valid = error.utf8_error().valid_up_to();
                let text = String::from_utf8_lossy(error.as_bytes()).into_owned();
                let source = self.add(Source::new(name, text, base));
                let loc = Loc { source, start: valid, end: valid + 1 };
                self.report.error(loc, "this byte is not UTF-8", None);
                None
            }
        };
        self.open.pop();
        tree
    }

    fn read(&mut self, path: &Path) -> Result<Vec<u8>, Unreadable> {
        self.files += 1;
        if self.files > MOST_FILES {
            return Err(Unreadable::new("these are too many files", "the most is 64"));
        }
        if self.open.len() > DEEPEST_INCLUDE {
            return Err(Unreadable::new("the includes are too deep", "the most is 16"));
        }
        let metadata = fs::metadata(path)?;
        if metadata.is_dir() {
            return Err(Unreadable::new("this is a directory", "give a file in it"));
        }
        if !metadata.is_file() {
            return Err(Unreadable::new(
                "this is not a regular file",
                "pipes and devices are not read; save it as a file",
            ));
        }
        if self.open.contains(&fs::canonicalize(path)?) {
            return Err(Unreadable::new("the file includes itself", "take it out of the circle"));
        }
        // Should a FIFO have taken its place meanwhile: do not wait for its other end.
        let file: File = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path)?;
        let mut text = Vec::new();
        file.take(LARGEST + 1).read_to_end(&mut text)?;
        if text.len() as u64 > LARGEST {
            return Err(Unreadable::new("the file is larger than 1 MiB", "is it the right one?"));
        }
        Ok(text)
    }

    fn add(&mut self, source: Source) -> usize {
        self.report.sources.push(source);
        self.report.sources.len() - 1
    }

    /// A text with its includes worked in. `None`: it is not TOML, which is reported.
    fn text(&mut self, name: &str, text: &str, base: &Path) -> Option<Table> {
        // Some editors put a byte order mark in front; it would count as a column.
        let text = text.strip_prefix('\u{feff}').unwrap_or(text);
        let source = self.add(Source::new(name.to_owned(), text.to_owned(), base.to_owned()));
        if base.to_str().is_none() {
            let loc = Loc { source, start: 0, end: 0 };
            self.report.error(loc, "the file's directory has a name that is not UTF-8", None);
            return None;
        }
        let (table, errors) = DeTable::parse_recoverable(text);
        let mut lines = Vec::new();
        for error in &errors {
            let span = error.span().unwrap_or_default();
            let line = self.report.sources[source].line_at(span.start);
            // One mistake makes several complaints in its line; the first tells most.
            if !lines.contains(&line) && lines.len() < 10 {
                lines.push(line);
                let loc = Loc { source, start: span.start, end: span.end };
                self.report.error(loc, error.message(), None);
            }
        }
        if !errors.is_empty() {
            return None;
        }
        let mut own = Table::from_toml(table.get_ref(), source);
        own.lift(&keys::ROOT);
        let mut tree = Table::default();
        for (path, loc) in self.includes(own.take("include").map(|entry| entry.value)) {
            tree.merge(self.file(&base.join(path), Some(loc)).unwrap_or_default());
        }
        tree.merge(own);
        Some(tree)
    }

    fn includes(&self, value: Option<Node>) -> Vec<(String, Loc)> {
        let mut paths = Vec::new();
        let hint = || Some("write include = [\"base.toml\"]".to_owned());
        let items = match value {
            None => return paths,
            Some(Node { kind: Kind::Array(items), .. }) => items,
            Some(Node { kind, loc }) => {
                let message =
                    format!("`include` must be a list of paths, found {}", kind.describe());
                self.report.error(loc, message, hint());
                return paths;
            }
        };
        for Node { loc, kind } in items {
            match kind {
                Kind::Text(path) if !path.is_empty() && !path.contains('\0') => {
                    paths.push((path, loc));
                }
                Kind::Text(_) => self.report.error(loc, "this is not a path", hint()),
                other => {
                    let message = format!("`include` must hold paths, found {}", other.describe());
                    self.report.error(loc, message, hint());
                }
            }
        }
        paths
    }

    /// The argument of one `--set` as a tree. `None`: it is none, which is reported.
    fn set(&mut self, argument: &str) -> Option<Table> {
        let base = absolute(Path::new(""));
        let source = Source::new("--set".to_owned(), argument.to_owned(), base);
        let source = self.add(source.into_override());
        let whole = Loc { source, start: 0, end: argument.len() };
        let form = || Some("write --set machine.cpus.count=4".to_owned());
        let Some((key, value)) =
            argument.split_once('=').filter(|(key, _)| !key.contains(['\n', '[', '{']))
        else {
            self.report.error(whole, "this is not of the form key=value", form());
            return None;
        };
        // Either it is TOML as it stands, or what follows the `=` is a string.
        let mut tree = match DeTable::parse(argument) {
            Ok(table) if !value.contains('\n') => Table::from_toml(table.get_ref(), source),
            _ => match DeTable::parse(&format!("{key} = 0")) {
                Ok(table) => {
                    let mut tree = Table::from_toml(table.get_ref(), source);
                    let value = value.trim_start();
                    let loc = Loc { start: argument.len() - value.len(), ..whole };
                    tree.set_leaf(Node { loc, kind: Kind::Text(value.to_owned()) });
                    tree
                }
                Err(_) => {
                    let message = format!("`{}` is not a dotted key", excerpt(key));
                    self.report.error(Loc { end: key.len(), ..whole }, message, form());
                    return None;
                }
            },
        };
        if tree.take("include").is_some() {
            let hint = Some("write it in a file".to_owned());
            self.report.error(whole, "`include` works in files only", hint);
        }
        tree.lift(&keys::ROOT);
        Some(tree)
    }
}

/// Why a file is not read.
struct Unreadable {
    message: String,
    hint: Option<String>,
}

impl Unreadable {
    fn new(message: &str, hint: &str) -> Self {
        Self { message: message.to_owned(), hint: Some(hint.to_owned()) }
    }
}

impl From<std::io::Error> for Unreadable {
    fn from(error: std::io::Error) -> Self {
        Self { message: format!("cannot read the file: {error}"), hint: None }
    }
}

/// The machine's name when the file says none.
fn default_name(path: &Path) -> String {
    let stem = path.file_stem().unwrap_or_default().to_string_lossy();
    let name: String = stem.chars().filter(|c| !c.is_control()).take(read::LONGEST_NAME).collect();
    if name.is_empty() { "vm".to_owned() } else { name }
}

/// Lists the leaves of `table` with their places.
fn trace(report: &Report, table: &Table, prefix: &str, found: &mut Vec<Provenance>) {
    for entry in &table.entries {
        let bare = entry.key.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_');
        let key = if bare {
            entry.key.clone()
        } else {
            toml::Value::from(entry.key.as_str()).to_string()
        };
        let key = format!("{prefix}{key}");
        if let Kind::Table(table) = &entry.value.kind {
            trace(report, table, &format!("{key}."), found);
        } else {
            let source = &report.sources[entry.loc.source];
            let line = 1 + source.line_at(entry.loc.start);
            found.push(Provenance { key, file: source.name.clone(), line });
        }
    }
}
