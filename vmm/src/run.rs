//! `heddle run`: one machine from its file to its exit code.

use std::fs::File;
use std::io::{IsTerminal, Write};
use std::os::fd::AsRawFd;

use config::plan::{OnReset, Plan, SerialOut, Verdict};
use config::{Host, Loaded, Severity};
use iothread::{Blocking, Granted};
use serde_json::{Value, json};

use crate::cli::Run;
use crate::console::{Line, Supervisor};
use crate::ending::{End, Ending};
use crate::machine::{HostError, Machine, ThreadInfo};
use crate::resources::Resources;
use crate::terminal::{self, RawTerminal, Signals};
use crate::timing::{Timing, TimingReport};
use crate::verdict;

const INTERNAL: u8 = 1;
const INVALID: u8 = 3;
const HOST: u8 = 4;

/// Should messages on standard error be coloured?
pub fn colors() -> bool {
    std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|v| v.is_empty())
}

/// Columns of this terminal.
pub fn terminal_columns(tty: &File) -> Option<usize> {
    let mut size = libc::winsize { ws_row: 0, ws_col: 0, ws_xpixel: 0, ws_ypixel: 0 };
    #[expect(unsafe_code, reason = "TIOCGWINSZ")]
    // SAFETY: the kernel writes one winsize.
    let result = unsafe { libc::ioctl(tty.as_raw_fd(), libc::TIOCGWINSZ, &raw mut size) };
    (result == 0 && size.ws_col > 0).then_some(usize::from(size.ws_col))
}

/// Prints one line on standard output. A reader that went away is no error of ours; false: it could
/// not be written for another reason, which is said.
pub fn print_json(value: &Value) -> bool {
    let mut out = std::io::stdout().lock();
    match writeln!(out, "{value}").and_then(|()| out.flush()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => {
            eprintln!("heddle: standard output: {error}");
            false
        }
        _ => true,
    }
}

/// Carries out `heddle run` and gives the exit code.
pub fn run(options: &Run) -> u8 {
    let mut timing = Timing::default();
    let loaded = match config::load(&options.machine.file, &options.machine.set) {
        Ok(loaded) => loaded,
        Err(diagnostics) => {
            if options.json {
                print_json(&diagnostics.to_json());
            } else {
                eprint!("{}", diagnostics.render(colors()));
            }
            return INVALID;
        }
    };
    eprint!("{}", loaded.warnings.render(colors()));
    if options.print_effective {
        eprintln!("{}", loaded.effective);
    }
    timing.lap("configuration");
    match run_plan(options, &loaded, timing) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("heddle: {error}");
            if options.json {
                print_json(
                    &json!({ "exit": HOST, "reason": "host", "message": error.to_string() }),
                );
            }
            HOST
        }
    }
}

fn run_plan(options: &Run, loaded: &Loaded, mut timing: Timing) -> Result<u8, HostError> {
    let plan = &loaded.plan;
    let doubts = Doubts::of(plan)?;
    doubts.say();
    // Before any thread, so that all of them have these signals blocked.
    let signals = Signals::take().map_err(|error| HostError::new("signals", error))?;
    iothread::raise_file_limit().map_err(|error| HostError::new("open files", error))?;
    iothread::reserve_files(doubts.fds);
    timing.lap("host");
    let ending = Ending::new().map_err(|error| HostError::new("eventfd", error))?;
    let resources = Resources::take(plan)?;
    timing.lap("loops and images");
    let images = resources.handles(plan)?;
    let console_on_stderr = options.json;
    let lines = plan.serials.iter().map(|serial| Line::open(serial, console_on_stderr));
    let lines = lines.collect::<Result<_, _>>()?;
    let mut machine = match Machine::build(plan, &resources, &ending, &mut timing) {
        Ok(built) => built,
        // Large memory takes its time.
        Err(error) => match signals.next() {
            Some(signal) => return Ok(stopped_early(options, plan, signal)),
            None => return Err(error),
        },
    };
    let fallbacks = resources.fallbacks.iter().chain(&machine.fallbacks);
    let fallbacks: Vec<_> = fallbacks.map(|f| format!("{}: {}", f.whose, f.what)).collect();
    if plan.policy.fallback == Verdict::Warn {
        fallbacks.iter().for_each(|fallback| eprintln!("heddle: not granted: {fallback}"));
    }
    let Some(blocking) = Blocking::on_this_thread() else {
        return Err(HostError::new("heddle", "called from a loop"));
    };
    if plan.policy.fallback == Verdict::Error && !fallbacks.is_empty() {
        let _ = machine.stop(&resources, &blocking);
        let why = format!("not granted: {}", fallbacks.join("; "));
        return Err(HostError::new("policy.fallback", why));
    }
    let stdio = plan.serials.iter().any(|serial| serial.out == SerialOut::Stdio);
    let raw = if stdio { RawTerminal::take() } else { Ok(None) };
    let raw = raw.map_err(|error| HostError::new("terminal", error))?;
    // A terminal that is not ours (a job in the background) is not read either.
    let reads = raw.is_some() || !std::io::stdin().is_terminal();
    let interaction = (reads, raw.is_some());
    let mut supervisor = Supervisor::new(lines, signals, &ending, interaction, options.timeout);
    let timing = timing.report(&machine.memory_addresses());
    end_on_panic(ending.clone());
    let mut resets = 0;
    let (end, threads, prealloc, stopped) = loop {
        supervisor.connect(&machine);
        machine.start();
        let end = supervisor.wait();
        let threads: Vec<_> = resources.threads().chain(machine.threads()).collect();
        let prealloc = std::mem::take(&mut machine.prealloc);
        let stopped = machine.stop(&resources, &blocking);
        supervisor.finish();
        if end != End::Reset || plan.policy.on_reset == OnReset::Exit || stopped.is_err() {
            break (end, threads, prealloc, stopped);
        }
        resets += 1;
        ending.clear();
        machine = Machine::build(plan, &resources, &ending, &mut Timing::default())?;
    };
    let stopped = match stopped {
        Ok(()) => resources.release(),
        Err(why) => {
            // The process ends with requests in flight: nothing they use may be freed.
            std::mem::forget(resources);
            Err(why)
        }
    };
    drop(raw);
    let said = supervisor.lines.first().and_then(|line| line.transcript.json.as_deref());
    let guest: Option<Value> = said.and_then(|text| serde_json::from_str(text).ok());
    let mut end = match stopped {
        Ok(()) => end,
        Err(why) => End::Internal(why),
    };
    if plan.boot.kernel.is_none() {
        end = verdict::judge(end, guest.as_ref(), &images);
    }
    let report = Report {
        end: &end,
        threads: &threads,
        prealloc: &prealloc,
        fallbacks: &fallbacks,
        timing: &timing,
        resets,
    };
    if options.json {
        if !print_json(&report.to_json(loaded, guest.as_ref())) {
            return Ok(INTERNAL);
        }
    } else {
        report.say(options, plan);
    }
    Ok(end.exit_code())
}

/// A signal came before the guest ran.
fn stopped_early(options: &Run, plan: &Plan, signal: i32) -> u8 {
    let end = End::Signal(signal);
    if options.json {
        let (exit, reason, message) = (end.exit_code(), end.reason(), end.to_string());
        print_json(&json!({ "exit": exit, "reason": reason, "message": message }));
    } else {
        eprintln!("heddle: {}: {end}, before the guest ran", plan.name);
    }
    end.exit_code()
}

/// A thread that panics ends the machine: without its work a guest would only hang.
fn end_on_panic(ending: Ending) {
    let before = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        before(info);
        ending.announce(End::Internal(format!("a bug in heddle: {info}")));
    }));
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
            Some(doubt) => Err(HostError::new(doubt.code, &doubt.message)),
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

struct Report<'a> {
    end: &'a End,
    threads: &'a [ThreadInfo],
    prealloc: &'a [Granted],
    fallbacks: &'a [String],
    timing: &'a TimingReport,
    resets: u64,
}

impl Report<'_> {
    fn to_json(&self, loaded: &Loaded, guest: Option<&Value>) -> Value {
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
                "counters": counters,
            })
        });
        let prealloc = self.prealloc.iter().map(
            |granted| json!({ "name": granted.name, "tid": granted.tid, "cpus": granted.cpus }),
        );
        let raw = match self.end {
            End::DebugExit(value) => Some(*value),
            _ => None,
        };
        json!({
            "exit": self.end.exit_code(),
            "reason": self.end.reason(),
            "message": self.end.to_string(),
            "debug-exit": raw,
            "resets": self.resets,
            "not-granted": self.fallbacks,
            "timing": self.timing,
            "threads": threads.collect::<Vec<_>>(),
            "prealloc": prealloc.collect::<Vec<_>>(),
            "guest": guest,
            "effective": loaded.effective,
        })
    }

    fn say(&self, options: &Run, plan: &Plan) {
        let mut text = String::new();
        if options.stats {
            text += &stats(self.threads);
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
        text.push('\n');
    }
    text
}
