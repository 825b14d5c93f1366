//! Files to start from.

const SMALL: &str = r#"# The least there is to say. Without a [boot], heddle starts its built-in guest.

[machine]
memory = "256M"
cpus = 2

[disk.data]
size = "64M"
"#;

const TEMPLATES: [(&str, &str); 5] = [
    ("small", SMALL),
    ("linux", include_str!("../../examples/linux.toml")),
    ("many-vcpus", include_str!("../../examples/many-vcpus.toml")),
    ("placement", include_str!("../../examples/placement.toml")),
    ("pinned", include_str!("../../examples/pinned.toml")),
];

/// The text of a template; it loads as it is. `None`: there is none of this name.
pub fn template(name: &str) -> Option<&'static str> {
    TEMPLATES.iter().find(|template| template.0 == name).map(|template| template.1)
}

/// The names of the templates.
pub fn template_names() -> impl Iterator<Item = &'static str> {
    TEMPLATES.iter().map(|template| template.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn templates_load() {
        for name in template_names() {
            let text = template(name).unwrap();
            if let Err(errors) = crate::load_str(name, text, "/".as_ref(), &[]) {
                panic!("{errors}");
            }
        }
        assert!(template("large").is_none());
    }
}
