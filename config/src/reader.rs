//! Reads tables by the description in [`keys`] and reports every key that does not fit.

use std::borrow::Cow;
use std::cell::Cell;

use crate::cpuset::excerpt;
use crate::keys::{self, Default, Key, Shape};
use crate::report::{Report, did_you_mean};
use crate::tree::{Entry, Kind, Loc, Node, Table};
use crate::value::Value;

/// Reads one table. When it goes out of scope, keys that are not described are reported.
pub(crate) struct Reader<'a> {
    pub(crate) report: &'a Report,
    shape: &'static keys::Table,
    table: Cow<'a, Table>,
    /// The table's key, to point at when something is missing.
    pub(crate) loc: Loc,
    /// Dotted name of the table, empty at the top.
    pub(crate) path: String,
    /// Bit per described key: was it asked for?
    asked: Cell<u32>,
}

impl<'a> Reader<'a> {
    pub(crate) fn root(report: &'a Report, table: &'a Table) -> Self {
        let loc = Loc { source: 0, start: 0, end: 0 };
        Self::new(report, &keys::ROOT, Cow::Borrowed(table), loc, String::new())
    }

    pub(crate) fn new(
        report: &'a Report,
        shape: &'static keys::Table,
        table: Cow<'a, Table>,
        loc: Loc,
        path: String,
    ) -> Self {
        Self { report, shape, table, loc, path, asked: Cell::new(0) }
    }

    /// Reports something about the table as a whole.
    pub(crate) fn error(&self, message: impl Into<String>, hint: Option<String>) {
        self.report.error(self.loc, message, hint);
    }

    /// The dotted name of a key in this table.
    fn name_of(&self, key: &str) -> String {
        if self.path.is_empty() { key.to_owned() } else { format!("{}.{key}", self.path) }
    }

    /// Notes that `name` was asked for. A name that is not described is a mistake in heddle.
    fn ask(&self, name: &str) -> &'static Key {
        let at = self.shape.keys.iter().position(|key| key.name == name);
        let at = at.unwrap_or_else(|| panic!("`{}` is not described", self.name_of(name)));
        self.asked.set(self.asked.get() | 1 << at);
        &self.shape.keys[at]
    }

    fn entry(&self, name: &str) -> Option<&Entry> {
        self.table.get(name)
    }

    /// Is the key in the file?
    pub(crate) fn has(&self, name: &str) -> bool {
        self.table.get(name).is_some()
    }

    /// Where the key is, or the table.
    pub(crate) fn loc_of(&self, name: &str) -> Loc {
        self.entry(name).map_or(self.loc, |entry| entry.loc)
    }

    /// The key's value, or its default. `None`: there is none, which is reported if it is required.
    pub(crate) fn value(&self, name: &str) -> Option<Value<'a>> {
        let key = self.ask(name);
        let node = match (self.entry(name), &key.default) {
            (Some(entry), _) => entry.value.clone(),
            (None, Default::Value(toml)) => Node::default(toml, self.loc),
            (None, Default::Required) => {
                let hint = format!("add `{name} = ...`: {}", key.doc);
                self.error(format!("`{}` is missing", self.name_of(name)), Some(hint));
                return None;
            }
            (None, _) => return None,
        };
        Some(Value {
            report: self.report,
            shape: &key.shape,
            described: &key.shape,
            node,
            path: self.name_of(name),
        })
    }

    /// The table under `name`; an empty one if it is absent.
    pub(crate) fn table(&self, name: &str) -> Reader<'a> {
        let (Shape::Table(shape) | Shape::Lift(shape)) = self.ask(name).shape else {
            panic!("`{}` is not described as a table", self.name_of(name));
        };
        let path = self.name_of(name);
        let Some(entry) = self.entry(name) else {
            return Reader::new(self.report, shape, Cow::default(), self.loc, path);
        };
        self.open(shape, entry, path).unwrap_or_else(|| {
            Reader::new(self.report, shape, Cow::default(), entry.loc, self.name_of(name))
        })
    }

    /// The tables `[name.NAME]` in the order of the file, those with a bad name left out.
    pub(crate) fn named(&self, name: &str) -> Vec<(String, Reader<'a>)> {
        let Shape::Named(shape, names) = &self.ask(name).shape else {
            panic!("`{}` is not described as named tables", self.name_of(name));
        };
        let Some(entry) = self.entry(name) else {
            return Vec::new();
        };
        let Kind::Table(table) = &entry.value.kind else {
            let hint = format!("write [{name}.NAME]");
            self.expected(entry, "tables with names", Some(hint));
            return Vec::new();
        };
        let mut readers = Vec::new();
        if table.entries.len() > names.most {
            let (many, most) = (table.entries.len(), names.most);
            let message = format!("{many} times [{name}.NAME] is too much, the most is {most}");
            self.report.error(entry.loc, message, None);
        }
        for entry in table.entries.iter().take(names.most) {
            let path = format!("{}.{}", self.name_of(name), excerpt(&entry.key));
            if let Err(problem) = check_name(&entry.key, names.longest) {
                self.report.error(entry.loc, format!("the name in `{path}` {problem}"), None);
            } else if let Some(reader) = self.open(shape, entry, path) {
                readers.push((entry.key.clone(), reader));
            }
        }
        readers
    }

    /// The entries of a table whose keys the user chooses: key, where it is, value.
    pub(crate) fn map(&self, name: &str) -> Vec<(String, Loc, Value<'a>)> {
        let Shape::Map(_, shape) = self.ask(name).shape else {
            panic!("`{}` is not described as a map", self.name_of(name));
        };
        let Some(entry) = self.entry(name) else {
            return Vec::new();
        };
        let Kind::Table(table) = &entry.value.kind else {
            self.expected(entry, "a table", None);
            return Vec::new();
        };
        let value = |entry: &Entry| {
            let path = format!("{}.\"{}\"", self.name_of(name), excerpt(&entry.key));
            let value = Value {
                report: self.report,
                shape,
                described: shape,
                node: entry.value.clone(),
                path,
            };
            (entry.key.clone(), entry.loc, value)
        };
        table.entries.iter().map(value).collect()
    }

    fn open(&self, shape: &'static keys::Table, entry: &Entry, path: String) -> Option<Reader<'a>> {
        match &entry.value.kind {
            Kind::Table(table) => {
                Some(Reader::new(self.report, shape, Cow::Owned(table.clone()), entry.loc, path))
            }
            _ => {
                let found = entry.value.kind.describe();
                let message = format!("`{path}` must be a table, found {found}");
                let hint = match (&entry.value.kind, shape.keys.first()) {
                    // sched = "batch"
                    (Kind::Text(text), Some(Key { name, shape: Shape::Words(words), .. }))
                        if words.contains(&text.as_str()) =>
                    {
                        format!("write {} = {{ {name} = \"{text}\" }}", entry.key)
                    }
                    _ => format!("write [{path}]"),
                };
                self.report.error(entry.value.loc, message, Some(hint));
                None
            }
        }
    }

    fn expected(&self, entry: &Entry, what: &str, hint: Option<String>) {
        let name = self.name_of(&excerpt(&entry.key));
        let found = entry.value.kind.describe();
        self.report.error(entry.value.loc, format!("`{name}` must be {what}, found {found}"), hint);
    }
}

impl Drop for Reader<'_> {
    fn drop(&mut self) {
        for entry in &self.table.entries {
            if self.shape.key(&entry.key).is_none() {
                self.unknown(entry);
            }
        }
        if cfg!(debug_assertions) && !std::thread::panicking() {
            for (at, key) in self.shape.keys.iter().enumerate() {
                let asked = self.asked.get() >> at & 1 == 1;
                assert!(asked, "`{}` is described but never read", self.name_of(key.name));
            }
        }
    }
}

impl Reader<'_> {
    fn unknown(&self, entry: &Entry) {
        let name = self.name_of(&excerpt(&entry.key));
        if self.shape.later.contains(&entry.key.as_str()) {
            let message = format!("`{name}` comes later, not in this version");
            return self.report.error(entry.loc, message, Some("leave it out".to_owned()));
        }
        let names = self.shape.keys.iter().map(|key| key.name);
        let hint = did_you_mean(&entry.key, names.clone())
            .or_else(|| elsewhere(&entry.key))
            .unwrap_or_else(|| {
                let names: Vec<_> = names.map(|name| format!("`{name}`")).collect();
                format!("known here: {}", names.join(", "))
            });
        self.report.error(entry.loc, format!("unknown key `{name}`"), Some(hint));
    }
}

/// Where a key of this name does exist, or will.
fn elsewhere(name: &str) -> Option<String> {
    fn search(table: &keys::Table, prefix: &str, name: &str) -> Option<String> {
        table.keys.iter().find_map(|key| {
            let path = format!("{prefix}{}", key.name);
            let (inner, path, header) = match &key.shape {
                Shape::Table(inner) | Shape::Lift(inner) => (*inner, path.clone(), path),
                Shape::List(Shape::Lift(inner)) => (*inner, path.clone(), format!("[{path}]")),
                Shape::Named(inner, _) => (*inner, format!("{path}.NAME"), format!("{path}.NAME")),
                Shape::List(Shape::Table(inner)) => (*inner, path.clone(), format!("[{path}]")),
                Shape::Either(shapes) => {
                    let inner = shapes.iter().find_map(|shape| match shape {
                        Shape::List(Shape::Table(inner)) => Some(*inner),
                        _ => None,
                    })?;
                    (inner, path.clone(), format!("[{path}]"))
                }
                _ => return None,
            };
            if inner.key(name).is_some() {
                return Some(format!("there is a `{name}` in [{header}]"));
            }
            if inner.later.contains(&name) {
                return Some(format!("it comes later, in [{header}]"));
            }
            search(inner, &format!("{path}."), name)
        })
    }
    search(&keys::ROOT, "", name)
}

/// Is `name` fit for a thread or a device?
fn check_name(name: &str, longest: usize) -> Result<(), String> {
    let fine = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_';
    if name.is_empty() {
        Err("is empty".to_owned())
    } else if !name.bytes().all(fine) {
        Err("may only have the characters a-z, A-Z, 0-9, `-` and `_`".to_owned())
    } else if name.len() > longest {
        Err(format!("has {} characters, the most is {longest}", name.len()))
    } else {
        Ok(())
    }
}
