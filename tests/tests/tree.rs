//! What the tree promises about itself: one version of what is shared, and an ARCHITECTURE.md
//! whose walk can be followed.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use tests::program::root;

const WALK: &str = "## One request, from kick to disk";

/// The versions of a package in Cargo.lock.
fn versions<'a>(lock: &'a str, package: &str) -> Vec<&'a str> {
    let header = format!("[[package]]\nname = \"{package}\"\nversion = \"");
    lock.split(&header).skip(1).filter_map(|rest| rest.split('"').next()).collect()
}

/// One step of the walk: a file and functions in it.
#[derive(Debug, PartialEq, Eq)]
struct Step {
    file: String,
    functions: Vec<String>,
}

/// The code spans of a text.
fn spans(text: &str) -> impl Iterator<Item = &str> {
    text.split('`').skip(1).step_by(2)
}

/// The functions among them.
fn functions(text: &str) -> Vec<String> {
    spans(text).filter_map(|span| span.strip_suffix("()")).map(str::to_owned).collect()
}

/// The section of the walk: its steps, and the functions named in the text around them.
fn walk(document: &str) -> Option<(Vec<Step>, Vec<String>)> {
    let section = document.split_once(WALK)?.1;
    let section = section.split("\n## ").next()?;
    let (mut steps, mut around) = (Vec::new(), String::new());
    for paragraph in section.split("\n\n") {
        // A numbered line begins a step; indented ones go on with it.
        let mut texts = vec![String::new()];
        for line in paragraph.trim().lines() {
            let is_step = line.split_once(". ").is_some_and(|(n, _)| n.parse::<u32>().is_ok());
            if is_step {
                texts.push(String::new());
            }
            let last = texts.last_mut()?;
            *last += line;
            last.push(' ');
        }
        around += &texts.remove(0);
        for text in texts {
            let file = spans(&text).find(|span| span.ends_with(".rs"))?.to_owned();
            steps.push(Step { file, functions: functions(&text) });
        }
    }
    Some((steps, functions(&around)))
}

/// Does Rust source define this function?
fn defines(source: &str, function: &str) -> bool {
    ["(", "<"].iter().any(|next| source.contains(&format!("fn {function}{next}")))
}

#[test]
fn there_is_one_vm_memory_and_one_vmm_sys_util() {
    let lock = fs::read_to_string(root().join("Cargo.lock")).unwrap();
    for package in ["vm-memory", "vmm-sys-util", "kvm-bindings"] {
        let versions = versions(&lock, package);
        assert_eq!(versions.len(), 1, "{package}: {versions:?}");
    }
}

#[test]
fn the_walk_of_a_request_names_files_and_functions_that_exist() {
    let document = fs::read_to_string(root().join("ARCHITECTURE.md")).unwrap();
    let Some((steps, around)) = walk(&document) else {
        panic!("ARCHITECTURE.md has no {WALK:?}, or a step in it that names no file")
    };
    assert!(steps.len() >= 3, "that is no walk: {steps:?}");
    let mut sources = Vec::new();
    for Step { file, functions } in &steps {
        let source = fs::read_to_string(root().join(file))
            .unwrap_or_else(|error| panic!("the walk names {file}: {error}"));
        assert!(!functions.is_empty(), "the walk names no function in {file}");
        for function in functions {
            assert!(defines(&source, function), "{file} has no {function}()");
        }
        sources.push(source);
    }
    for function in around {
        let found = sources.iter().any(|source| defines(source, &function));
        assert!(found, "no file of the walk has {function}()");
    }
    let files: BTreeSet<_> = steps.iter().map(|step| &step.file).collect();
    assert!(files.len() <= 6, "one request can be read in at most 6 files: {files:?}");
}

#[test]
fn no_file_of_the_walk_has_a_lock_to_wait_for() {
    let document = fs::read_to_string(root().join("ARCHITECTURE.md")).unwrap();
    let (steps, _) = walk(&document).expect("a walk");
    for Step { file, .. } in steps {
        let source = fs::read_to_string(root().join(&file)).unwrap();
        for lock in ["Mutex", "RwLock", "Condvar", "recv()", "sleep("] {
            assert!(!source.contains(lock), "{file} has {lock}");
        }
    }
}

#[test]
fn every_path_that_the_documents_name_exists() {
    for document in ["ARCHITECTURE.md", "README.md", "docs/decisions.md"] {
        let text = fs::read_to_string(root().join(document)).unwrap();
        let paths = spans(&text).filter(|span| span.ends_with(".rs") && span.contains('/'));
        for path in paths {
            assert!(root().join(path).exists(), "{document} names {path}");
        }
    }
}

/// All Rust sources below a directory.
fn sources(directory: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path());
    let below = |path: PathBuf| if path.is_dir() { sources(&path) } else { vec![path] };
    let all = entries.flat_map(below);
    all.filter(|path| path.extension().is_some_and(|extension| extension == "rs")).collect()
}

/// The lines of a source that are product code and may make a thread.
fn threads_made(source: &str) -> Vec<&str> {
    let makers = ["thread::spawn", "thread::Builder", "thread::scope", "pthread_create", "clone3"];
    // Tests come last in a file.
    let product = source.split("#[cfg(test)]\nmod").next().unwrap_or_default();
    let code = product.lines().filter(|line| !line.trim_start().starts_with("//"));
    let makes = |line: &str| makers.iter().any(|maker| line.contains(maker));
    code.filter(|line| makes(&line.replace("iothread::", ""))).collect()
}

#[test]
fn every_thread_is_made_by_one_spawner() {
    let spawner = Path::new("iothread/src/thread.rs");
    let mut found = Vec::new();
    for part in ["config", "iothread", "devices", "vmm"] {
        for path in sources(&root().join(part).join("src")) {
            let name = path.strip_prefix(root()).unwrap().to_owned();
            // Modules of their own that are only there in tests.
            let is_test = name.iter().any(|part| {
                let part = part.to_string_lossy();
                part.contains("test") || part == "models"
            });
            let source = fs::read_to_string(&path).unwrap();
            let made = threads_made(&source).len();
            found.extend((made > 0 && !is_test).then_some((name, made)));
        }
    }
    assert_eq!(found, [(spawner.to_owned(), 1)], "use iothread::start_thread");
}

#[test]
fn no_device_gets_on_by_looking_now_and_then() {
    // Everything has somebody who says when to go on: a kick, a completion, a message.
    for path in sources(&root().join("devices/src")) {
        let source = fs::read_to_string(&path).unwrap();
        for wait in [".timer()", ".idle("] {
            let at = path.display();
            assert!(!source.contains(wait), "{at}: {wait}, see docs/loop.md, B3");
        }
    }
}

#[test]
fn making_a_thread_is_seen_in_product_code_only() {
    let source = "// thread::spawn\niothread::spawn(\nstd::thread::Builder::new()\n#[cfg(test)]\nmod tests {\n\
        std::thread::scope(";
    assert_eq!(threads_made(source), ["std::thread::Builder::new()"]);
}

#[test]
fn a_walk_is_read_step_by_step() {
    let document = "# Map\n\n## One request, from kick to disk\n\nFirst `ring()`.\n\n\
        1. `a/b.rs`: `kick()` looks, with `budget = 4`, and\n   `pop()` takes.\n\
        2. `c.rs`: see `submit()`.\n\nThen `reap()` in `c.rs`.\n\n## Else\n\n1. `d.rs`: `no()`\n";
    let (steps, around) = walk(document).unwrap();
    let step = |file: &str, functions: &[&str]| Step {
        file: file.to_owned(),
        functions: functions.iter().map(|name| (*name).to_owned()).collect(),
    };
    assert_eq!(steps, [step("a/b.rs", &["kick", "pop"]), step("c.rs", &["submit"])]);
    assert_eq!(around, ["ring", "reap"]);
}

#[test]
fn a_missing_section_or_a_step_without_a_file_is_no_walk() {
    assert_eq!(walk("# Map\n\n## Else\n\n1. `a.rs`: `b()`\n"), None);
    assert_eq!(walk(&format!("{WALK}\n\n1. `b()` somewhere\n")), None);
}

#[test]
fn two_versions_of_a_package_are_two() {
    let package = |name: &str, version: &str| {
        format!("[[package]]\nname = \"{name}\"\nversion = \"{version}\"\n\n")
    };
    let lock = package("a", "1.0.0") + &package("b", "1.0.0") + &package("a", "2.0.0");
    assert_eq!(versions(&lock, "a"), ["1.0.0", "2.0.0"]);
    assert_eq!(versions(&lock, "c"), [""; 0]);
}

#[test]
fn a_function_is_found_by_its_definition_only() {
    assert!(defines("pub fn look(&mut self)", "look") && defines("fn look<T>()", "look"));
    assert!(!defines("self.look(); fn look_up()", "look"));
}
