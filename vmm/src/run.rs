//! `heddle run`: a machine from its file to its exit code.

use config::plan::Plan;
use config::{Host, Severity};

use crate::cli::Run;
use crate::ending::End;
use crate::host_error::HostError;
use crate::report;
use crate::session::Session;
use crate::terminal::colors;
use crate::timing::Timing;

/// Carries out `heddle run` and gives the exit code.
pub fn run(options: &Run) -> u8 {
    let mut timing = Timing::default();
    let loaded = match config::load(&options.machine.file, &options.machine.set) {
        Ok(loaded) => loaded,
        Err(diagnostics) => return report::say_invalid(options, &diagnostics),
    };
    eprint!("{}", loaded.warnings.render(colors()));
    if options.print_effective {
        eprintln!("{}", loaded.effective);
    }
    timing.lap("configuration");
    let plan = &loaded.plan;
    let doubts = match Doubts::of(plan) {
        Ok(doubts) => doubts,
        Err(error) => return report::say_not_run(options, &End::from(error)),
    };
    doubts.say();
    match Session::prepare(options, plan, doubts.fds, timing) {
        Ok(session) => session.run().say(options, &loaded),
        Err(end) => report::say_not_run(options, &end),
    }
}

/// What the plan's own policy says about doubtful placements, before anything is built.
struct Doubts {
    problems: Vec<config::Problem>,
    /// Files the machine is going to open.
    fds: u64,
}

impl Doubts {
    fn of(plan: &Plan) -> Result<Self, HostError> {
        // A host whose topology cannot be read still runs machines.
        let Ok(host) = Host::live() else { return Ok(Self { problems: Vec::new(), fds: 0 }) };
        let explanation = config::explain(plan, &host);
        let fds = explanation.fds();
        let problems = explanation.warnings;
        match problems.iter().find(|doubt| doubt.severity == Severity::Error) {
            Some(config::Problem { code, message, hint, .. }) => {
                let hint = hint.iter().map(|hint| format!("; {hint}"));
                Err(HostError::new(*code, message.clone() + &hint.collect::<String>()))
            }
            None => Ok(Self { problems, fds }),
        }
    }

    fn say(&self) {
        // CPUs, nodes and priorities that cannot be had are said later, with what there is instead.
        let said_later = ["W07", "W08", "W09", "W20", "W25"];
        for doubt in self.problems.iter().filter(|doubt| !said_later.contains(&doubt.code)) {
            eprintln!("heddle: warning[{}]: {}", doubt.code, doubt.message);
        }
    }
}
