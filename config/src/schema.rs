//! The description of the keys, for people and for programs.

use serde_json::{Map as Object, Value, json};

use crate::keys::{Default, Key, ROOT, Shape, Table};

/// Every key with its type, default and meaning, table by table.
pub fn schema_text() -> String {
    let mut text = String::from(
        "A virtual machine is one TOML file. Every key may be left out unless it says \"required\".\n\
         SIZE is a number with a unit, \"64K\" \"512M\" \"4G\" \"2T\"; TIME likewise, \"100ns\" \"30us\" \"1.5ms\" \"2s\".\n\
         CPUS is a set of CPU numbers, \"0-4,^3,8\". PATH, when relative, starts at the file it is in.\n\
         THREAD is the name of a [thread.NAME]. On the command line: --set machine.cpus.count=64\n",
    );
    table_text(&mut text, &ROOT, "", "");
    text
}

fn table_text(text: &mut String, table: &Table, path: &str, doc: &str) {
    if !path.is_empty() {
        *text += &format!("\n[{path}]{}{doc}\n", if doc.is_empty() { "" } else { "  " });
    } else {
        *text += "\n";
    }
    for key in table.keys.iter().filter(|key| !is_section(key)) {
        key_text(text, key, "");
    }
    for key in table.keys {
        let path =
            if path.is_empty() { key.name.to_owned() } else { format!("{path}.{}", key.name) };
        match &key.shape {
            Shape::Named(inner, _) => table_text(text, inner, &format!("{path}.NAME"), key.doc),
            Shape::Table(inner) if is_section(key) => table_text(text, inner, &path, key.doc),
            Shape::Map(what, shape) => {
                *text += &format!("\n[{path}]  {}\n", key.doc);
                *text += &format!("  \"{what}\" = {}\n", type_text(shape));
            }
            Shape::List(Shape::Table(inner)) => {
                table_text(text, inner, &format!("[{path}]"), key.doc);
            }
            Shape::Either(shapes) => {
                for shape in *shapes {
                    if let Shape::List(Shape::Table(inner)) = shape {
                        table_text(text, inner, &format!("[{path}]"), "Some of the queues each.");
                    }
                }
            }
            _ => {}
        }
    }
}

/// Does the key have a `[header]` of its own?
fn is_section(key: &Key) -> bool {
    match &key.shape {
        Shape::Named(..) | Shape::Map(..) | Shape::List(Shape::Table(_)) => true,
        // A table of plain values is written in one line: sched = { policy = "batch" }.
        Shape::Table(_) => !matches!(key.name, "sched" | "topology"),
        _ => false,
    }
}

fn key_text(text: &mut String, key: &Key, indent: &str) {
    let default = match key.default {
        Default::Required => "required".to_owned(),
        Default::Absent | Default::Inside => String::new(),
        Default::Value(value) => format!("default {value}"),
        Default::Says(says) => format!("default: {says}"),
    };
    let what = type_text(&key.shape);
    *text += &format!("  {indent}{:<13} {}", key.name, key.doc);
    *text += &format!("\n  {indent}{:<13}   {what}", "");
    if !default.is_empty() {
        *text += &format!("; {default}");
    }
    *text += "\n";
    if let Shape::Lift(inner) | Shape::Table(inner) | Shape::List(Shape::Lift(inner)) = &key.shape {
        for key in inner.keys {
            key_text(text, key, &format!("{indent}    "));
        }
    }
    if let Shape::Either(shapes) = &key.shape {
        for shape in *shapes {
            if let Shape::Table(inner) = shape {
                for key in inner.keys {
                    key_text(text, key, &format!("{indent}    "));
                }
            }
        }
    }
}

/// The type of a value in a few words.
pub(crate) fn type_text(shape: &Shape) -> String {
    let words = |words: &[&str]| {
        words.iter().map(|word| format!("\"{word}\"")).collect::<Vec<_>>().join(" | ")
    };
    match shape {
        Shape::Bool => "true | false".to_owned(),
        Shape::Int(min, max) if min == max => min.to_string(),
        Shape::Int(min, max) => format!("an integer from {min} to {max}"),
        Shape::Text(text) => (*text).to_owned(),
        Shape::Words(list) => words(list),
        Shape::Size => "SIZE".to_owned(),
        Shape::Cpus => "CPUS".to_owned(),
        Shape::Path => "PATH".to_owned(),
        Shape::Table(table) => {
            let keys: Vec<_> = table.keys.iter().map(|key| key.name).collect();
            format!("{{ {} }}", keys.join(", "))
        }
        Shape::Lift(table) => {
            format!("{} | {}", type_text(&table.keys[0].shape), type_text(&Shape::Table(table)))
        }
        Shape::Named(..) => "tables with names".to_owned(),
        Shape::Map(what, value) => format!("{{ \"{what}\" = {} }}", type_text(value)),
        Shape::List(item) => format!("[{}, ...]", type_text(item)),
        Shape::Either(shapes) => shapes.iter().map(type_text).collect::<Vec<_>>().join(" | "),
    }
}

/// A JSON Schema (2020-12) of the file, for editors.
pub fn json_schema() -> Value {
    let mut schema = table_schema(&ROOT);
    schema["$schema"] = json!("https://json-schema.org/draft/2020-12/schema");
    schema["title"] = json!("heddle virtual machine");
    schema
}

fn table_schema(table: &Table) -> Value {
    let properties: Object<_, _> = table
        .keys
        .iter()
        .map(|key| {
            let mut schema = shape_schema(&key.shape);
            schema["description"] = json!(key.doc);
            if let Default::Value(toml) = key.default {
                // The defaults' strings, numbers and lists are the same in JSON.
                schema["default"] = serde_json::from_str(toml).unwrap_or_default();
            }
            (key.name.to_owned(), schema)
        })
        .collect();
    let required: Vec<_> = table
        .keys
        .iter()
        .filter(|key| matches!(key.default, Default::Required))
        .map(|key| key.name)
        .collect();
    json!({
        "type": "object",
        "properties": properties,
        "required": required,
        "additionalProperties": false,
    })
}

fn shape_schema(shape: &Shape) -> Value {
    match shape {
        Shape::Bool => json!({ "type": "boolean" }),
        Shape::Int(min, max) => json!({ "type": "integer", "minimum": min, "maximum": max }),
        Shape::Text(_) | Shape::Path => json!({ "type": "string" }),
        Shape::Words(words) => json!({ "enum": words }),
        Shape::Size => json!({ "type": "string", "pattern": "^[0-9]+(\\.[0-9]+)? ?[KMGTP](iB)?$" }),
        Shape::Cpus => json!({ "type": "string", "pattern": "^[0-9 ,^-]+$" }),
        Shape::Table(table) => table_schema(table),
        Shape::Lift(table) => {
            json!({ "anyOf": [shape_schema(&table.keys[0].shape), table_schema(table)] })
        }
        Shape::Named(table, names) => json!({
            "type": "object",
            "patternProperties": { format!("^[A-Za-z0-9_-]{{1,{}}}$", names.longest): table_schema(table) },
            "maxProperties": names.most,
            "additionalProperties": false,
        }),
        Shape::Map(_, value) => {
            json!({ "type": "object", "additionalProperties": shape_schema(value) })
        }
        Shape::List(item) => json!({ "type": "array", "items": shape_schema(item) }),
        Shape::Either(shapes) => {
            json!({ "anyOf": shapes.iter().map(shape_schema).collect::<Vec<_>>() })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_key_is_in_both() {
        fn walk(table: &Table, text: &str, schema: &str) {
            for key in table.keys {
                assert!(text.contains(key.name) && text.contains(key.doc), "{}", key.name);
                assert!(schema.contains(key.doc), "{}", key.name);
                match &key.shape {
                    Shape::Table(inner)
                    | Shape::Lift(inner)
                    | Shape::Named(inner, _)
                    | Shape::List(Shape::Lift(inner) | Shape::Table(inner)) => {
                        walk(inner, text, schema);
                    }
                    _ => {}
                }
            }
        }
        let text = schema_text();
        walk(&ROOT, &text, &json_schema().to_string());
        for line in text.lines() {
            assert!(line.chars().count() <= 120, "too wide: {line}");
        }
        for part in
            ["[thread.NAME]", "[[disk.NAME.place]]", "[[numa]]", "[vcpu.pin]", "file ", "\"auto\""]
        {
            assert_eq!(text.contains(part), part != "\"auto\"", "{part}\n{text}");
        }
    }
}
