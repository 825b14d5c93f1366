//! The `heddle` program: reads the command line and carries it out.

use std::fs;
use std::io::{IsTerminal, Write};
use std::path::Path;
use std::process::ExitCode;

use clap::Parser;
use config::plan::Plan;
use config::{Diagnostics, Host, Problem, Severity};
use vmm::cli::{Check, Cli, Command, Explain};
use vmm::{bench, boot, limits, run, terminal};

/// Exit codes of commands that run no machine; those of a machine are in `vmm::ending`.
const INTERNAL: u8 = 1;
const INVALID: u8 = 3;
const HOST: u8 = 4;
/// Code of a problem with a boot file, see `config::check_host`.
const BOOT_FILE: &str = "H02";

fn main() -> ExitCode {
    let code = match Cli::parse().command {
        Command::Run(options) => run::run(&options),
        Command::Check(options) => check(&options),
        Command::Explain(options) => explain(&options),
        Command::Schema { json_schema: true } => print_json(&config::json_schema()),
        Command::Schema { json_schema: false } => print(&config::schema_text()),
        Command::Init { template } => init(&template),
        Command::Guest { file } => guest(&file),
        Command::Bench { what } => bench::bench(&what),
    };
    ExitCode::from(code)
}

/// Prints on standard output; a reader that went away is no error of ours.
fn print(text: &str) -> u8 {
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => {
            eprintln!("heddle: standard output: {error}");
            INTERNAL
        }
        _ => 0,
    }
}

fn print_json(value: &serde_json::Value) -> u8 {
    print(&format!("{value:#}\n"))
}

fn init(name: &str) -> u8 {
    // The command line takes only names that there are.
    print(config::template(name).unwrap_or_default())
}

fn guest(file: &Path) -> u8 {
    match fs::write(file, vmm::machine::BUILT_IN_GUEST) {
        Ok(()) => 0,
        Err(error) => {
            eprintln!("heddle: {}: {error}", file.display());
            HOST
        }
    }
}

/// Says what is wrong with a file, for people or for programs.
fn complain(diagnostics: &Diagnostics, json: bool) {
    if json {
        print_json(&diagnostics.to_json());
    } else {
        eprint!("{}", diagnostics.render(terminal::colors()));
    }
}

fn check(options: &Check) -> u8 {
    let loaded = match config::load(&options.machine.file, &options.machine.set) {
        Ok(loaded) => loaded,
        Err(diagnostics) => {
            complain(&diagnostics, options.json);
            return INVALID;
        }
    };
    let mut problems = Vec::new();
    if options.host {
        match Host::live() {
            Ok(host) => {
                problems.extend(limits::problem(&loaded.plan));
                problems.extend(config::check_host(&loaded.plan, &host));
                problems.extend(bad_kernel(&loaded.plan, &problems));
            }
            Err(error) => {
                eprintln!("heddle: {error}");
                return HOST;
            }
        }
    }
    let bad = problems.iter().any(|problem| problem.severity == Severity::Error);
    if options.json {
        let mut report = loaded.warnings.to_json();
        report["problems"] = serde_json::json!(problems);
        report["ok"] = (!bad).into();
        print_json(&report);
    } else {
        eprint!("{}", loaded.warnings.render(terminal::colors()));
        problems.iter().for_each(say);
        if !bad {
            print(&format!("{}: ok\n", options.machine.file.display()));
        }
    }
    if bad { HOST } else { 0 }
}

/// What is wrong inside the kernel and its modules, if their files can be read at all.
fn bad_kernel(plan: &Plan, known: &[Problem]) -> Option<Problem> {
    if known.iter().any(|problem| problem.code == BOOT_FILE) {
        return None;
    }
    let message = boot::inspect(plan).err()?.to_string();
    Some(Problem { code: BOOT_FILE, severity: Severity::Error, message, hint: None })
}

fn say(problem: &Problem) {
    let kind = match problem.severity {
        Severity::Error => "error",
        Severity::Warning => "warning",
    };
    eprintln!("{kind}[{}]: {}", problem.code, problem.message);
    if let Some(hint) = &problem.hint {
        eprintln!("  help: {hint}");
    }
}

fn explain(options: &Explain) -> u8 {
    let loaded = match config::load(&options.machine.file, &options.machine.set) {
        Ok(loaded) => loaded,
        Err(diagnostics) => {
            complain(&diagnostics, options.json);
            return INVALID;
        }
    };
    let host = match &options.sysfs {
        Some(directory) => Host::from_sysfs(directory),
        None => Host::live(),
    };
    let host = match host {
        Ok(host) => host,
        Err(error) => {
            eprintln!("heddle: {error}");
            return HOST;
        }
    };
    let explanation = config::explain(&loaded.plan, &host).for_vms(options.vms);
    if options.json {
        return print_json(&explanation.to_json());
    }
    eprint!("{}", loaded.warnings.render(terminal::colors()));
    print(&explanation.render(width()))
}

/// Columns of the terminal, or 100.
fn width() -> usize {
    let columns = std::env::var("COLUMNS").ok().and_then(|text| text.parse().ok());
    let is_terminal = std::io::stdout().is_terminal();
    let asked = || fs::File::open("/dev/tty").ok().and_then(|tty| terminal::columns(&tty));
    columns.or_else(|| is_terminal.then(asked).flatten()).unwrap_or(100)
}
