//! Runs models.

use std::cell::RefCell;
use std::panic::{catch_unwind, set_hook, take_hook};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Once};
use std::time::Instant;

use super::{FAULT, Fault, Line};

/// The files in which operations can be made faulty.
const SOURCES: [(&str, &str); 5] = [
    ("src/announce.rs", include_str!("../announce.rs")),
    ("src/event_loop.rs", include_str!("../event_loop.rs")),
    ("src/hold.rs", include_str!("../hold.rs")),
    ("src/inbox.rs", include_str!("../inbox.rs")),
    ("src/wake.rs", include_str!("../wake.rs")),
];

/// The operation on the only line of `src/FILE.rs` with this text orders nothing.
pub(super) fn unordered(file: &str, text: &str) -> Fault {
    Fault::Unordered(line(file, text))
}

/// The operation on the only line of `src/FILE.rs` with this text is not there.
pub(super) fn left_out(file: &str, text: &str) -> Fault {
    Fault::LeftOut(line(file, text))
}

fn line(file: &str, text: &str) -> Line {
    let is_this = |(name, _): &&(&str, &str)| *name == format!("src/{file}.rs");
    let (file, source) = SOURCES.iter().find(is_this).expect("a file of the models");
    let code = source.split("#[cfg(test)]").next().unwrap_or_default();
    let mut lines = code.lines().zip(1..).filter(|(line, _)| line.contains(text));
    let (Some((_, line)), None) = (lines.next(), lines.next()) else {
        panic!("{file}: not exactly one line with {text:?}")
    };
    Line { file, line }
}

/// Tries all schedules of `model` with at most `preemptions` involuntary switches between threads.
#[track_caller]
fn explore(preemptions: usize, model: fn()) -> usize {
    let executions = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&executions);
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound.get_or_insert(preemptions);
    builder.max_branches = 10_000;
    builder.check(move || {
        counted.fetch_add(1, Relaxed);
        model();
    });
    executions.load(Relaxed)
}

/// The model holds.
pub(super) fn holds(preemptions: usize, model: fn()) {
    let began = Instant::now();
    let executions = explore(preemptions, model);
    println!("{executions} executions in {:?}", began.elapsed());
}

/// With this fault, the model fails, and says so in these words.
#[track_caller]
pub(super) fn fails(preemptions: usize, model: fn(), fault: Fault, words: &str) {
    note_expected_panics();
    let began = Instant::now();
    FAULT.set(Some(fault));
    let outcome = catch_unwind(|| explore(preemptions, model));
    FAULT.set(None);
    match outcome {
        Ok(executions) => panic!("{fault:?} was not found in {executions} executions"),
        Err(_) => {
            let noted = NOTED.take();
            println!("{fault:?}, after {:?}: {noted}", began.elapsed());
            assert!(noted.contains(words), "{fault:?}: {noted}");
        }
    }
}

thread_local! {
    /// The first words of a model with a fault that failed.
    static NOTED: RefCell<String> = const { RefCell::new(String::new()) };
}

/// Panics that are asked for are noted instead of shown: a thread of a model has little stack.
fn note_expected_panics() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let show = take_hook();
        set_hook(Box::new(move |panic| {
            if FAULT.get().is_none() {
                return show(panic);
            }
            // Loom ends its threads by panics too, but those have no words.
            let words = panic.payload_as_str().unwrap_or_default();
            NOTED.with_borrow_mut(|noted| {
                if noted.is_empty() {
                    words.clone_into(noted);
                }
            });
        }));
    });
}
