//! `heddle bench`: measurements that a person starts.

mod host;
mod loop_costs;
pub mod ratio;
mod start;

use serde_json::Value;

use crate::cli::Bench;

const INTERNAL: u8 = 1;

/// Carries out `heddle bench` and gives the exit code.
pub fn bench(what: &Bench) -> u8 {
    let done = match *what {
        Bench::Start { runs, json } => start::start(runs, json),
        Bench::Loop { pairs, json } => {
            loop_costs::measure(pairs as usize).map(|report| match json {
                true => print_json(&serde_json::json!(report)),
                false => print!("{}", report.render()),
            })
        }
    };
    match done {
        Ok(()) => 0,
        Err(why) => {
            eprintln!("heddle: bench: {why}");
            INTERNAL
        }
    }
}

fn print_json(value: &Value) {
    println!("{value:#}");
}

/// Says on standard error what takes so long.
fn progress(what: &str) {
    eprintln!("heddle: bench: {what}");
}
