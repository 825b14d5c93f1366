//! The file as a tree in which every key and value knows where it was written.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry as Slot;

use toml::de::{DeTable, DeValue};

use crate::keys::{self, Shape};

/// A place in a source: `sources[source].text[start..end]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Loc {
    pub(crate) source: usize,
    pub(crate) start: usize,
    pub(crate) end: usize,
}

/// A value and where it is.
#[derive(Debug, Clone)]
pub(crate) struct Node {
    pub(crate) loc: Loc,
    pub(crate) kind: Kind,
}

/// A value.
#[derive(Debug, Clone)]
pub(crate) enum Kind {
    Text(String),
    /// `None` when it does not fit.
    Int(Option<i64>),
    Bool(bool),
    Float,
    Datetime,
    Array(Vec<Node>),
    Table(Table),
}

impl Kind {
    /// For "found ...".
    pub(crate) fn describe(&self) -> &'static str {
        match self {
            Self::Text(_) => "a string",
            Self::Int(_) => "an integer",
            Self::Bool(_) => "a boolean",
            Self::Float => "a float",
            Self::Datetime => "a date",
            Self::Array(_) => "an array",
            Self::Table(_) => "a table",
        }
    }
}

/// Keys with values, in the order of the file.
#[derive(Debug, Clone, Default)]
pub(crate) struct Table {
    pub(crate) entries: Vec<Entry>,
    index: BTreeMap<String, usize>,
}

/// A key and its value.
#[derive(Debug, Clone)]
pub(crate) struct Entry {
    pub(crate) key: String,
    /// Where the key is.
    pub(crate) loc: Loc,
    pub(crate) value: Node,
}

impl Table {
    pub(crate) fn get(&self, key: &str) -> Option<&Entry> {
        self.index.get(key).map(|&at| &self.entries[at])
    }

    /// A table with this one entry.
    pub(crate) fn of(entry: Entry) -> Self {
        Self { index: BTreeMap::from([(entry.key.clone(), 0)]), entries: vec![entry] }
    }

    pub(crate) fn take(&mut self, key: &str) -> Option<Entry> {
        let at = self.index.remove(key)?;
        self.index.values_mut().filter(|index| **index > at).for_each(|index| *index -= 1);
        Some(self.entries.remove(at))
    }

    /// Replaces the value at the end of a tree that is one dotted key.
    pub(crate) fn set_leaf(&mut self, leaf: Node) {
        if let Some(entry) = self.entries.first_mut() {
            match &mut entry.value.kind {
                Kind::Table(table) => table.set_leaf(leaf),
                _ => entry.value = leaf,
            }
        }
    }

    /// Lays `over` on this table: tables merge, everything else is replaced.
    pub(crate) fn merge(&mut self, over: Self) {
        for entry in over.entries {
            match self.index.entry(entry.key.clone()) {
                Slot::Vacant(slot) => {
                    slot.insert(self.entries.len());
                    self.entries.push(entry);
                }
                Slot::Occupied(slot) => {
                    let old = &mut self.entries[*slot.get()];
                    old.loc = entry.loc;
                    match (&mut old.value.kind, entry.value.kind) {
                        (Kind::Table(old), Kind::Table(new)) => old.merge(new),
                        (old, new) => *old = new,
                    }
                    old.value.loc = entry.value.loc;
                }
            }
        }
    }

    /// From toml's own tree. The parser has limited its depth.
    pub(crate) fn from_toml(table: &DeTable<'_>, source: usize) -> Self {
        let mut entries: Vec<Entry> = table
            .iter()
            .map(|(key, value)| Entry {
                key: key.get_ref().to_string(),
                loc: loc(source, key.span()),
                value: Node::from_toml(value.get_ref(), loc(source, value.span())),
            })
            .collect();
        entries.sort_by_key(|entry| entry.loc);
        let index = entries.iter().enumerate().map(|(at, entry)| (entry.key.clone(), at)).collect();
        Self { entries, index }
    }

    /// Turns each short form into its table, so that both forms merge and read alike.
    pub(crate) fn lift(&mut self, shape: &keys::Table) {
        for entry in &mut self.entries {
            if let Some(key) = shape.key(&entry.key) {
                entry.value.lift(&key.shape);
            }
        }
    }
}

fn loc(source: usize, span: std::ops::Range<usize>) -> Loc {
    Loc { source, start: span.start, end: span.end }
}

impl Node {
    fn from_toml(value: &DeValue<'_>, at: Loc) -> Self {
        let kind = match value {
            DeValue::String(text) => Kind::Text(text.to_string()),
            DeValue::Integer(int) => Kind::Int(i64::from_str_radix(int.as_str(), int.radix()).ok()),
            DeValue::Float(_) => Kind::Float,
            DeValue::Boolean(value) => Kind::Bool(*value),
            DeValue::Datetime(_) => Kind::Datetime,
            DeValue::Array(array) => Kind::Array(
                array
                    .iter()
                    .map(|item| Self::from_toml(item.get_ref(), loc(at.source, item.span())))
                    .collect(),
            ),
            DeValue::Table(table) => Kind::Table(Table::from_toml(table, at.source)),
        };
        Self { loc: at, kind }
    }

    /// A default: `toml` is a constant of [`keys`], said to be at `at`.
    pub(crate) fn default(toml: &str, at: Loc) -> Self {
        let value = DeValue::parse(toml).expect("defaults are TOML");
        Self { loc: at, ..Self::from_toml(value.get_ref(), at) }
    }

    fn lift(&mut self, shape: &Shape) {
        if let (Shape::Lift(table), false) = (shape, matches!(self.kind, Kind::Table(_))) {
            let value = self.clone();
            let entry = Entry { key: table.keys[0].name.to_owned(), loc: self.loc, value };
            self.kind = Kind::Table(Table::of(entry));
        }
        match (&mut self.kind, shape) {
            (Kind::Table(table), Shape::Table(shape) | Shape::Lift(shape)) => table.lift(shape),
            (Kind::Array(items), Shape::List(shape)) => {
                items.iter_mut().for_each(|item| item.lift(shape));
            }
            (Kind::Table(table), Shape::Named(shape, _)) => {
                for entry in &mut table.entries {
                    entry.value.lift(&Shape::Table(shape));
                }
            }
            _ => {}
        }
    }
}
