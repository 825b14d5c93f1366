//! What `heddle run` tells of a run when it is over.

use std::io::Write;

use config::Loaded;
use config::plan::Plan;
use iothread::{Granted, Spell};
use serde_json::{Value, json};

use crate::cli::Run;
use crate::ending::End;
use crate::machine::ThreadInfo;
use crate::terminal::{self, colors};
use crate::timing::TimingReport;

/// Prints one line on standard output. A reader that went away is no error of ours; false: it could
/// not be written for another reason, which is said.
fn print_json(value: &Value) -> bool {
    let mut out = std::io::stdout().lock();
    match writeln!(out, "{value}").and_then(|()| out.flush()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => {
            eprintln!("heddle: standard output: {error}");
            false
        }
        _ => true,
    }
}

/// The file is no machine.
pub fn say_invalid(options: &Run, diagnostics: &config::Diagnostics) -> u8 {
    const INVALID: u8 = 3;
    if options.json {
        let mut report = diagnostics.to_json();
        report["exit"] = INVALID.into();
        report["reason"] = "invalid".into();
        print_json(&report);
    } else {
        eprint!("{}", diagnostics.render(colors()));
    }
    INVALID
}

/// The guest did not run at all.
pub fn say_not_run(options: &Run, end: &End) -> u8 {
    if options.json {
        let (exit, reason, message) = (end.exit_code(), end.reason(), end.to_string());
        print_json(&json!({ "exit": exit, "reason": reason, "message": message }));
    } else {
        let when = if matches!(end, End::Signal(_)) { ", before the guest ran" } else { "" };
        eprintln!("heddle: {end}{when}");
    }
    end.exit_code()
}

/// A run, from its guest's start to its end.
#[derive(Debug)]
pub struct Report {
    /// Why it ended.
    pub end: End,
    /// The verdict of the built-in guest.
    pub guest: Option<Value>,
    /// The threads of its last machine.
    pub threads: Vec<ThreadInfo>,
    /// Those that touched its memory.
    pub prealloc: Vec<Granted>,
    /// Wishes that the host did not grant.
    pub not_granted: Vec<String>,
    /// What the start took.
    pub timing: TimingReport,
    /// Times the guest was reset.
    pub resets: u64,
}

impl Report {
    /// Prints it, and gives the exit code.
    pub fn say(&self, options: &Run, loaded: &Loaded) -> u8 {
        const INTERNAL: u8 = 1;
        if !options.json {
            self.say_in_words(options, &loaded.plan);
        } else if !print_json(&self.to_json(loaded)) {
            return INTERNAL;
        }
        self.end.exit_code()
    }

    fn to_json(&self, loaded: &Loaded) -> Value {
        let threads = self.threads.iter().map(|thread| {
            let granted = &thread.granted;
            let counters: serde_json::Map<String, Value> = thread
                .counters
                .snapshot()
                .into_iter()
                .map(|(name, value)| (name.to_owned(), value.into()))
                .collect();
            json!({
                "name": granted.name,
                "tid": granted.tid,
                "cpus": granted.cpus,
                "sched": granted.sched.to_string(),
                "demoted": demoted(granted),
                "counters": counters,
                "longest-callback": spell(thread.counters.activity.longest()),
                "latest-timer": spell(thread.counters.activity.latest_timer()),
                "spinning": thread.counters.activity.spinning(),
            })
        });
        let prealloc = self.prealloc.iter().map(
            |granted| json!({ "name": granted.name, "tid": granted.tid, "cpus": granted.cpus }),
        );
        let raw = match self.end {
            End::DebugExit(value) => Some(value),
            _ => None,
        };
        json!({
            "exit": self.end.exit_code(),
            "reason": self.end.reason(),
            "message": self.end.to_string(),
            "debug-exit": raw,
            "resets": self.resets,
            "not-granted": self.not_granted,
            "timing": self.timing,
            "threads": threads.collect::<Vec<_>>(),
            "prealloc": prealloc.collect::<Vec<_>>(),
            "guest": self.guest,
            "effective": loaded.effective,
        })
    }

    fn say_in_words(&self, options: &Run, plan: &Plan) {
        let mut text = String::new();
        if options.stats {
            text += &stats(&self.threads);
        }
        if options.timing {
            text += &self.timing.render();
        }
        if !matches!(self.end, End::PowerOff | End::DebugExit(0)) || plan.boot.kernel.is_none() {
            text += &format!("heddle: {}: {}\n", plan.name, self.end);
        }
        terminal::say(&text);
    }
}

/// Has it run away, and lost its priority?
fn demoted(granted: &Granted) -> bool {
    granted.guard.as_ref().is_some_and(|guard| guard.demoted())
}

fn spell(spell: Option<Spell>) -> Value {
    spell.map_or(Value::Null, |it| json!({ "owner": it.owner, "ns": it.time.as_nanos() as u64 }))
}

/// The counters that tell where work was done, one line per thread.
fn stats(threads: &[ThreadInfo]) -> String {
    const COLUMNS: [&str; 9] = [
        "kicks",
        "requests",
        "completions",
        "interrupts",
        "mmio_exits",
        "pio_exits",
        "sleeps",
        "ring_enters",
        "left",
    ];
    let mut text = format!("{:<16}", "thread");
    COLUMNS.iter().for_each(|column| text += &format!(" {column:>11}"));
    text.push('\n');
    for thread in threads {
        let counters = thread.counters.snapshot();
        text += &format!("{:<16}", thread.granted.name);
        for column in COLUMNS {
            let value = counters.iter().find(|(name, _)| *name == column).map_or(0, |(_, v)| *v);
            text += &format!(" {value:>11}");
        }
        if demoted(&thread.granted) {
            text += &format!("  lost {}", thread.granted.sched);
        }
        text.push('\n');
    }
    for thread in threads {
        let (name, activity) = (&thread.granted.name, &thread.counters.activity);
        if let Some(Spell { owner, time }) = activity.longest() {
            text += &format!("{name:<16} longest callback {time:>10.1?} of {owner}");
            if let Some(Spell { owner, time }) = activity.latest_timer() {
                text += &format!(", latest timer {time:.1?} late, held up by {owner}");
            }
            text.push('\n');
        }
    }
    text
}
