//! The report, for people.

use std::fmt::Write;

use super::{Claimed, Cost, Report};

const HEADER: &str = "\
heddle bench loop: what the loop costs, against what one would write without it

A ratio is the loop's time divided by the baseline's, taken in pairs in turn; in brackets its 95%
interval. A claim holds or fails only if the whole interval says so. Times are nanoseconds for
each operation; both sides of a comparison include the signal (the write, the post).
";

impl Report {
    /// For people.
    pub(in crate::bench) fn render(&self) -> String {
        let mut text = format!("{HEADER}\nmachine: {}\n", self.machine.render());
        for (name, value) in &self.settings {
            line(&mut text, format_args!("{name}: {value}"));
        }
        self.costs(&mut text);
        self.saturation(&mut text);
        self.interference(&mut text);
        text
    }

    fn costs(&self, text: &mut String) {
        let head = ["min", "median", "min", "median"].map(|name| format!("{name:>8}")).concat();
        line(text, format_args!("\n{:<42}{:>16}{:>16}", "ns", "loop", "baseline"));
        line(text, format_args!("{:<42}{head}   ratio", ""));
        for Cost { what, baseline, times, claims, counts } in &self.costs {
            let (ours, base) = (times.ours, times.baseline);
            line(
                text,
                format_args!(
                    "{what:<42}{:>8.0}{:>8.0}{:>8.0}{:>8.0}   {}",
                    ours.min, ours.median, base.min, base.median, times.ratio
                ),
            );
            line(text, format_args!("  against {baseline}"));
            let counts: Vec<String> =
                counts.iter().map(|(what, count)| format!("{what} {count:.4}")).collect();
            if !counts.is_empty() {
                line(text, format_args!("  for each: {}", counts.join(", ")));
            }
            said(text, claims);
        }
    }

    fn saturation(&self, text: &mut String) {
        line(
            text,
            format_args!(
                "\n64 producers and one loop. Each producer has an object of its own; a few threads \
                 stand for them all.\nPaced, a thread posts for its producers every 200 us, and \
                 what comes late is made up for;\nwithout a limit, a producer posts when its last \
                 event was served;\na loop that was not busy all the time has not shown its \
                 limit."
            ),
        );
        for run in &self.saturation {
            let rate = run.events_per_second;
            line(
                text,
                format_args!(
                    "{:<42}{:.0} events/s [{:.0}, {:.0}]",
                    run.what, rate.median, rate.low, rate.high
                ),
            );
            let (made, served, callbacks) = (run.made, run.served, run.callbacks);
            let (threads, busy) = (run.threads, run.events_per_busy_second.median);
            line(
                text,
                format_args!(
                    "  by {threads} threads: made {made}, served {served}, in {callbacks} \
                     callbacks; {busy:.0} for each second busy"
                ),
            );
            let shares = [run.busy, run.poll, run.sleep].map(|share| 100.0 * share.median);
            let [busy, poll, sleep] = shares;
            let cpu = run.on_cpu.map_or(String::new(), |share| {
                format!("; the kernel says {:.1}% on a CPU", 100.0 * share)
            });
            line(
                text,
                format_args!(
                    "  busy {busy:.1}%, poll {poll:.1}%, sleep {sleep:.1}% of wall time, \
                     {:.2}% off{cpu}",
                    100.0 * run.unaccounted
                ),
            );
            said(text, &run.claims);
        }
    }

    fn interference(&self, text: &mut String) {
        line(
            text,
            format_args!(
                "\nlateness beside a callback of 20 ms every 100 ms, in microseconds; a verdict against \
                 it needs a machine\nthat is on time with the callback nowhere\n{:<42}{:>27}{:>27}",
                "", "1 ms timers", "kicks each ms"
            ),
        );
        let head = ["p50", "p99", "max"].map(|name| format!("{name:>9}")).concat();
        line(text, format_args!("{:<42}{head}{head}   p99 < 1 ms", "the long callback runs"));
        for case in &self.interference {
            let late = |late: super::interference::Lateness| {
                [late.p50, late.p99, late.max].map(|us| format!("{us:>9.1}")).concat()
            };
            let (timers, kicks) = (late(case.timers_us), late(case.kicks_us));
            let on_time = case.on_time.map_or("not asked".to_owned(), |said| said.to_string());
            line(text, format_args!("{:<42}{timers}{kicks}   {on_time}", case.what));
        }
    }
}

fn said(text: &mut String, claims: &[Claimed]) {
    for Claimed { claim, verdict } in claims {
        line(text, format_args!("  claim: {claim}: {verdict}"));
    }
}

fn line(text: &mut String, line: std::fmt::Arguments<'_>) {
    // Writing to a String does not fail.
    let _ = writeln!(text, "{line}");
}
