//! Reads single values by their described shape and reports those that do not fit.

use std::borrow::Cow;
use std::fmt::Display;
use std::path::PathBuf;

use crate::cpuset::CpuSet;
use crate::keys::Shape;
use crate::reader::Reader;
use crate::report::{Report, did_you_mean};
use crate::schema::type_text;
use crate::tree::{Kind, Node};
use crate::units::{UnitError, parse_size};

/// One value that is being read. The methods report what does not fit and answer `None`.
pub(crate) struct Value<'a> {
    pub(crate) report: &'a Report,
    /// What it is read as.
    pub(crate) shape: &'static Shape,
    /// All it might have been.
    pub(crate) described: &'static Shape,
    pub(crate) node: Node,
    pub(crate) path: String,
}

impl<'a> Value<'a> {
    /// Reports something about the value.
    pub(crate) fn error(&self, message: impl Into<String>, hint: Option<String>) {
        self.report.error(self.node.loc, message, hint);
    }

    /// Reports that the value is none of those described.
    fn misfit(&self, hint: Option<String>) {
        let (what, found) = (type_text(self.described), self.node.kind.describe());
        self.error(format!("`{}` must be {what}, found {found}", self.path), hint);
    }

    /// The value as the alternative that its TOML type belongs to.
    pub(crate) fn alternative(mut self) -> Option<Self> {
        let Shape::Either(shapes) = self.shape else {
            panic!("`{}` has no alternatives", self.path)
        };
        let fits = |shape: &&Shape| match self.node.kind {
            Kind::Text(_) => matches!(shape, Shape::Text(_) | Shape::Words(_)),
            Kind::Int(_) => matches!(shape, Shape::Int(..)),
            Kind::Bool(_) => matches!(shape, Shape::Bool),
            Kind::Array(_) => matches!(shape, Shape::List(_)),
            Kind::Table(_) => matches!(shape, Shape::Table(_)),
            _ => false,
        };
        match shapes.iter().find(fits) {
            Some(shape) => {
                self.shape = shape;
                Some(self)
            }
            None => {
                self.misfit(None);
                None
            }
        }
    }

    pub(crate) fn is_text(&self) -> bool {
        matches!(self.node.kind, Kind::Text(_))
    }

    pub(crate) fn is_array(&self) -> bool {
        matches!(self.node.kind, Kind::Array(_))
    }

    pub(crate) fn is_table(&self) -> bool {
        matches!(self.node.kind, Kind::Table(_))
    }

    pub(crate) fn text(&self) -> Option<&str> {
        let source = &self.report.sources[self.node.loc.source];
        match &self.node.kind {
            Kind::Text(text) => Some(text),
            // `--set vcpu.affinity=3` means the text.
            Kind::Int(_) | Kind::Bool(_) | Kind::Float | Kind::Datetime if source.is_override => {
                source.text.get(self.node.loc.start..self.node.loc.end)
            }
            _ => {
                let scalar = matches!(self.node.kind, Kind::Int(_) | Kind::Float);
                let hint = match self.shape {
                    Shape::Size if scalar => Some("add a unit and quotes: \"512M\""),
                    Shape::Text(what) if scalar && what.contains("TIME") => {
                        Some("add a unit and quotes: \"32us\"")
                    }
                    Shape::Cpus if self.is_array() => Some("a set is a string: \"0-3,8\""),
                    _ => scalar.then_some("put it in quotes"),
                };
                self.misfit(hint.map(str::to_owned));
                None
            }
        }
    }

    pub(crate) fn bool(&self) -> Option<bool> {
        let Kind::Bool(value) = self.node.kind else {
            self.misfit(self.is_text().then(|| "without quotes".to_owned()));
            return None;
        };
        Some(value)
    }

    /// An integer in the described range, which fits `T`.
    pub(crate) fn int<T: TryFrom<i64>>(&self) -> Option<T> {
        let Shape::Int(min, max) = self.shape else { panic!("`{}` is no integer", self.path) };
        let Kind::Int(value) = self.node.kind else {
            let digits = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
            let quoted = matches!(&self.node.kind, Kind::Text(text) if digits(text));
            self.misfit(quoted.then(|| "without quotes".to_owned()));
            return None;
        };
        match value.filter(|value| (*min..=*max).contains(value)) {
            Some(value) => T::try_from(value).ok(),
            None => {
                let range = type_text(self.described);
                self.error(format!("`{}` must be {range}", self.path), None);
                None
            }
        }
    }

    /// One of the described words.
    pub(crate) fn word(&self) -> Option<&'static str> {
        let Shape::Words(words) = self.shape else { panic!("`{}` has no words", self.path) };
        let text = self.text()?;
        let word = words.iter().find(|word| **word == text).copied();
        if word.is_none() {
            let hint = did_you_mean(text, words.iter().copied());
            self.error(format!("`{}` must be {}", self.path, type_text(self.described)), hint);
        }
        word
    }

    /// The text as `parse` reads it.
    pub(crate) fn parse<T, E: Display>(
        &self,
        parse: impl FnOnce(&str) -> Result<T, E>,
        hint: impl FnOnce(&E) -> Option<String>,
    ) -> Option<T> {
        match parse(self.text()?) {
            Ok(value) => Some(value),
            Err(error) => {
                self.error(format!("`{}`: {error}", self.path), hint(&error));
                None
            }
        }
    }

    /// A size in bytes.
    pub(crate) fn size(&self) -> Option<u64> {
        self.parse(parse_size, |error| match error {
            UnitError::NoUnit(number) => Some(format!("add a unit: \"{}M\"", number.trim())),
            _ => Some("sizes look like \"64K\", \"512M\", \"4G\"".to_owned()),
        })
    }

    pub(crate) fn cpus(&self) -> Option<CpuSet> {
        self.parse(str::parse, |_| Some("sets look like \"0-3,8\" or \"0-7,^2\"".to_owned()))
    }

    /// A path; a relative one starts where the source does.
    pub(crate) fn path(&self) -> Option<PathBuf> {
        let text = self.text()?;
        if text.is_empty() || text.contains('\0') {
            self.error(format!("`{}` is not a path", self.path), None);
            return None;
        }
        Some(self.report.sources[self.node.loc.source].base.join(text))
    }

    /// The items of a list of plain values.
    pub(crate) fn items(&self) -> Option<Vec<Self>> {
        let Shape::List(shape) = self.shape else { panic!("`{}` is no list", self.path) };
        let Kind::Array(items) = &self.node.kind else {
            self.misfit(None);
            return None;
        };
        let value = |node: &Node| Self {
            report: self.report,
            shape,
            described: shape,
            node: node.clone(),
            path: self.path.clone(),
        };
        Some(items.iter().map(value).collect())
    }

    /// The items of a list of tables, as readers; `None` for an item of another type.
    pub(crate) fn tables(&self) -> impl Iterator<Item = Option<Reader<'a>>> {
        let Shape::List(Shape::Table(shape) | Shape::Lift(shape)) = self.shape else {
            panic!("`{}` is not a list of tables", self.path);
        };
        let items = match &self.node.kind {
            Kind::Array(items) => items.as_slice(),
            _ => {
                self.misfit(Some("put it in brackets: [...]".to_owned()));
                &[]
            }
        };
        items.iter().map(move |item| match &item.kind {
            Kind::Table(table) => {
                let table = Cow::Owned(table.clone());
                Some(Reader::new(self.report, shape, table, item.loc, self.path.clone()))
            }
            other => {
                let found = other.describe();
                let message = format!("`{}` must hold tables, found {found}", self.path);
                self.report.error(item.loc, message, Some(format!("write [[{}]]", self.path)));
                None
            }
        })
    }

    /// The value as a table.
    pub(crate) fn into_table(self) -> Reader<'a> {
        let (Shape::Table(shape), Kind::Table(table)) = (self.shape, self.node.kind) else {
            panic!("`{}` is not a table", self.path);
        };
        Reader::new(self.report, shape, Cow::Owned(table), self.node.loc, self.path)
    }
}
