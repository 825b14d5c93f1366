//! Writes one JSON value, compactly. The caller opens and closes; commas come by themselves.

use core::fmt::{self, Write};

pub struct Json<'a, W: Write> {
    out: &'a mut W,
    /// Whether a comma is due before the next value.
    comma: bool,
}

impl<'a, W: Write> Json<'a, W> {
    pub fn new(out: &'a mut W) -> Self {
        Json { out, comma: false }
    }

    fn raw(&mut self, text: fmt::Arguments) {
        self.out.write_fmt(text).ok();
    }

    fn separate(&mut self) {
        if core::mem::replace(&mut self.comma, true) {
            self.raw(format_args!(","));
        }
    }

    /// The name of the next value in an object.
    pub fn key(&mut self, name: &str) -> &mut Self {
        self.string(name);
        self.raw(format_args!(":"));
        self.comma = false;
        self
    }

    pub fn string(&mut self, text: &str) {
        self.separate();
        self.raw(format_args!("\""));
        for c in text.chars() {
            match c {
                '"' | '\\' => self.raw(format_args!("\\{c}")),
                ' '..='~' => self.raw(format_args!("{c}")),
                _ => self.raw(format_args!("\\u{:04x}", u32::from(c).min(0xffff))),
            }
        }
        self.raw(format_args!("\""));
    }

    pub fn number(&mut self, value: impl Into<u64>) {
        self.separate();
        let value = value.into();
        self.raw(format_args!("{value}"));
    }

    pub fn bool(&mut self, value: bool) {
        self.separate();
        self.raw(format_args!("{value}"));
    }

    pub fn null(&mut self) {
        self.separate();
        self.raw(format_args!("null"));
    }

    pub fn object(&mut self, fill: impl FnOnce(&mut Self)) {
        self.nested('{', '}', fill);
    }

    pub fn array(&mut self, fill: impl FnOnce(&mut Self)) {
        self.nested('[', ']', fill);
    }

    pub fn numbers(&mut self, values: &[u64]) {
        self.array(|json| values.iter().for_each(|&v| json.number(v)));
    }

    pub fn strings(&mut self, values: &[&str]) {
        self.array(|json| values.iter().for_each(|v| json.string(v)));
    }

    fn nested(&mut self, open: char, close: char, fill: impl FnOnce(&mut Self)) {
        self.separate();
        self.raw(format_args!("{open}"));
        self.comma = false;
        fill(self);
        self.raw(format_args!("{close}"));
        self.comma = true;
    }
}
