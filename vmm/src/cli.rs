//! The command line.

use std::path::PathBuf;
use std::time::Duration;

use clap::builder::{PossibleValuesParser, RangedI64ValueParser};
use clap::{Args, Parser, Subcommand};

/// Exit codes, as `--help` shows them.
const EXIT_CODES: &str = "\
Exit codes:
  0        the guest powered off, or wrote 0 to the debug-exit port, or Ctrl-A X
  1        internal error, or the built-in guest failed
  2        usage
  3        the configuration is invalid
  4        this host cannot (no KVM, a file, a cpuset, a limit)
  10       the guest asked for a reset, with policy.on-reset = exit
  11       the guest panicked
  12       triple fault
  14       --timeout
  64-127   the guest wrote v to the debug-exit port: 64 + min(v, 63)
  128+n    signal n";

/// A virtual machine monitor whose thread placement is data.
#[derive(Debug, Parser)]
#[command(name = "heddle", version, after_help = EXIT_CODES)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run a machine until it ends
    ///
    /// The console is on the terminal: Ctrl-A X ends the machine, Ctrl-A P presses its power button,
    /// Ctrl-A Ctrl-A sends a Ctrl-A.
    /// A file without a kernel runs the built-in guest, which drives every device and checks every
    /// byte. It overwrites its disks; an image that has something on it is refused.
    #[command(after_help = EXIT_CODES)]
    Run(Run),
    /// Say all that is wrong with a file; no side effects
    Check(Check),
    /// Say which thread will do what, where, and why
    Explain(Explain),
    /// Describe every key of a machine file
    Schema {
        /// As a JSON schema, for editors
        #[arg(long)]
        json_schema: bool,
    },
    /// Print a machine file to start from
    Init {
        /// Which one
        #[arg(long, default_value = "small", value_parser = templates())]
        template: String,
    },
    /// Write the built-in guest's ELF to a file, to boot it elsewhere
    ///
    /// It starts by PVH: qemu-system-x86_64 -M q35 -kernel FILE runs it, too.
    Guest {
        /// Where to
        file: PathBuf,
    },
    /// Measure
    Bench {
        /// What to measure
        #[command(subcommand)]
        what: Bench,
    },
}

/// A machine file, and changes to it.
#[derive(Debug, Args)]
pub struct MachineFile {
    /// The machine file (TOML)
    pub file: PathBuf,
    /// Change a value, for example machine.cpus=8; may be given several times
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub set: Vec<String>,
}

/// `heddle run`.
#[derive(Debug, Args)]
pub struct Run {
    /// What to run.
    #[command(flatten)]
    pub machine: MachineFile,
    /// End the machine after this time, for example 60s
    #[arg(long, value_name = "TIME", value_parser = duration)]
    pub timeout: Option<Duration>,
    /// Say where the time of the start went and what memory heddle itself takes
    #[arg(long)]
    pub timing: bool,
    /// At the end, say what each thread did
    #[arg(long)]
    pub stats: bool,
    /// At the end, print one JSON object on standard output; the console goes to standard error
    #[arg(long)]
    pub json: bool,
    /// Print the effective configuration first, with includes, --set and defaults worked in
    #[arg(long)]
    pub print_effective: bool,
}

/// `heddle check`.
#[derive(Debug, Args)]
pub struct Check {
    /// What to check.
    #[command(flatten)]
    pub machine: MachineFile,
    /// Also check what the file needs of this host: files, KVM, CPUs, huge pages, limits
    ///
    /// What the file asks for and this host lacks is an error here, also where policy.fallback
    /// lets a run go on without it.
    #[arg(long)]
    pub host: bool,
    /// For programs
    #[arg(long)]
    pub json: bool,
}

/// `heddle explain`.
#[derive(Debug, Args)]
pub struct Explain {
    /// What to explain.
    #[command(flatten)]
    pub machine: MachineFile,
    /// For programs
    #[arg(long)]
    pub json: bool,
    /// Plan for another host, from a copy of its /sys
    #[arg(long, value_name = "DIR")]
    pub sysfs: Option<PathBuf>,
    /// Add totals for this many machines
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = at_least_one())]
    pub vms: u32,
}

/// `heddle bench`.
#[derive(Debug, Subcommand)]
pub enum Bench {
    /// Start-up time and private memory of a one-vCPU machine
    Start {
        /// How many starts
        #[arg(long, default_value_t = 20, value_parser = at_least_one())]
        runs: u32,
        /// For programs
        #[arg(long)]
        json: bool,
    },
    /// What an event costs, against a bare epoll loop; how much a loop can take; who delays whom
    ///
    /// Every ratio comes from pairs of measurements taken in turn on this machine, and a verdict
    /// is given only where the 95% interval of the ratio allows one. Takes about half a minute.
    Loop {
        /// How many pairs of measurements each ratio is made of
        #[arg(long, default_value_t = 15, value_parser = clap::value_parser!(u32).range(15..=500))]
        pairs: u32,
        /// For programs
        #[arg(long)]
        json: bool,
    },
}

fn templates() -> PossibleValuesParser {
    config::template_names().collect::<Vec<_>>().into()
}

fn at_least_one() -> RangedI64ValueParser<u32> {
    clap::value_parser!(u32).range(1..)
}

fn duration(text: &str) -> Result<Duration, String> {
    config::units::parse_time(text).map_err(|error| error.to_string())
}
