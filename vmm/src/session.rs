//! One run of a machine: prepared, run through its guest's resets, and taken down.

use std::fs::File;
use std::io::IsTerminal;

use config::plan::{OnReset, Plan, SerialOut, Verdict};
use iothread::Blocking;

use crate::cli::Run;
use crate::console::{Line, Supervisor};
use crate::demotions::Demotions;
use crate::ending::{End, Ending};
use crate::host_error::HostError;
use crate::machine::Machine;
use crate::report::Report;
use crate::resources::Resources;
use crate::terminal::{RawTerminal, Signals};
use crate::timing::{Timing, TimingReport};
use crate::verdict;

/// A machine whose guest can start, and all that outlives a reset of it.
pub struct Session<'a> {
    plan: &'a Plan,
    blocking: Blocking,
    ending: Ending,
    resources: Resources,
    /// By disk, to look at after the run.
    images: Vec<(String, File)>,
    machine: Machine,
    supervisor: Supervisor,
    /// Given back when the session is over.
    terminal: Option<RawTerminal>,
    not_granted: Vec<String>,
    timing: TimingReport,
}

impl<'a> Session<'a> {
    /// Makes the machine. `fds`: files it is going to open. The error is why it ended already.
    pub fn prepare(
        options: &Run,
        plan: &'a Plan,
        fds: u64,
        mut timing: Timing,
    ) -> Result<Self, End> {
        // Before any thread, so that all of them have these signals blocked.
        let signals = Signals::take().map_err(|error| HostError::new("signals", error))?;
        iothread::raise_file_limit().map_err(|error| HostError::new("open files", error))?;
        iothread::reserve_files(fds);
        timing.lap("host");
        let blocking = Blocking::on_this_thread()
            .ok_or_else(|| End::Internal("called from a loop".to_owned()))?;
        let ending = Ending::new().map_err(|error| HostError::new("eventfd", error))?;
        Demotions::announce_at(&ending).map_err(|error| HostError::new("eventfd", error))?;
        let resources = Resources::take(plan)?;
        timing.lap("loops and images");
        let images = resources.handles(plan)?;
        let lines = plan.serials.iter().map(|serial| Line::open(serial, options.json));
        let lines = lines.collect::<Result<_, _>>()?;
        let machine = Machine::build(plan, &resources, &ending, &mut timing)
            .map_err(|error| early(error, signals.next()))?;
        let not_granted = not_granted(plan, &resources, &machine);
        let stdio = plan.serials.iter().any(|serial| serial.out == SerialOut::Stdio);
        let terminal = if stdio { RawTerminal::take() } else { Ok(None) };
        let terminal = terminal.map_err(|error| HostError::new("terminal", error))?;
        // A terminal that is not ours (a job in the background) is not read either.
        let reads = terminal.is_some() || !std::io::stdin().is_terminal();
        let interaction = (reads, terminal.is_some());
        let supervisor = Supervisor::new(lines, signals, &ending, interaction, options.timeout);
        let timing = timing.report(&machine.memory_addresses());
        let session = Self {
            plan,
            blocking,
            ending,
            resources,
            images,
            machine,
            supervisor,
            terminal,
            not_granted,
            timing,
        };
        match plan.policy.fallback {
            Verdict::Error if !session.not_granted.is_empty() => Err(session.refuse()),
            _ => Ok(session),
        }
    }

    /// The policy wants all that was asked for or nothing.
    fn refuse(self) -> End {
        let _ = self.machine.stop(&self.resources, &self.blocking);
        let why = format!("not granted: {}", self.not_granted.join("; "));
        HostError::new("policy.fallback", why).into()
    }

    /// Runs the guest to its end.
    pub fn run(self) -> Report {
        let Self { plan, blocking, ending, resources, mut machine, mut supervisor, .. } = self;
        end_on_panic(ending.clone());
        let mut resets = 0;
        let (end, threads, prealloc, stopped) = loop {
            supervisor.connect(&machine, &resources);
            machine.start();
            let end = supervisor.wait();
            let threads = resources.threads().chain(machine.threads()).collect();
            let prealloc = std::mem::take(&mut machine.prealloc);
            let stopped = machine.stop(&resources, &blocking);
            let wished = supervisor.finish();
            let again = end == End::Reset && plan.policy.on_reset != OnReset::Exit;
            if !again || stopped.is_err() {
                break (end, threads, prealloc, stopped);
            }
            let rebuild = || {
                ending.clear();
                Machine::build(plan, &resources, &ending, &mut Timing::default())
                    .map_err(|error| early(error, supervisor.signal()))
            };
            match wished.map_or_else(rebuild, Err) {
                Ok(next) => machine = next,
                Err(end) => break (end, threads, prealloc, stopped),
            }
            resets += 1;
        };
        let stopped = match stopped {
            Ok(()) => resources.release(),
            Err(why) => {
                // The process ends with requests in flight: nothing they use may be freed.
                std::mem::forget(resources);
                Err(why)
            }
        };
        drop(self.terminal);
        let guest = supervisor.last_json();
        let mut end = stopped.map_or_else(End::Internal, |()| end);
        if plan.boot.kernel.is_none() {
            end = verdict::judge(end, guest.as_ref(), &self.images);
        }
        let (not_granted, timing) = (self.not_granted, self.timing);
        Report { end, guest, threads, prealloc, not_granted, timing, resets }
    }
}

/// Why a machine could not be built: large memory takes its time, and a signal ends the wait.
fn early(error: HostError, signal: Option<i32>) -> End {
    signal.map_or_else(|| error.into(), End::Signal)
}

/// What the host did not grant, which is said if the policy wants so.
fn not_granted(plan: &Plan, resources: &Resources, machine: &Machine) -> Vec<String> {
    let fallbacks = resources.fallbacks.iter().chain(&machine.fallbacks);
    let fallbacks: Vec<_> = fallbacks.map(|it| format!("{}: {}", it.whose, it.what)).collect();
    if plan.policy.fallback == Verdict::Warn {
        fallbacks.iter().for_each(|fallback| eprintln!("heddle: not granted: {fallback}"));
    }
    fallbacks
}

/// A thread that panics ends the machine: without its work a guest would only hang.
fn end_on_panic(ending: Ending) {
    let before = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        before(info);
        ending.announce(End::Internal(format!("a bug in heddle: {info}")));
    }));
}
