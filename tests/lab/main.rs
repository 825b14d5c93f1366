//! Linux guests of heddle on a machine without KVM of its own.
//!
//! QEMU emulates a machine with AMD's virtualisation (L1) that runs Debian's cloud kernel. There
//! heddle has a true KVM, and runs the same kernel as its guest (L2). Nothing of it needs root.

mod complaints;
mod cpio;
mod guest;
mod job;
mod kernel;
mod kit;
mod l1;
mod matrix;
mod measure;
mod modules;

use std::fmt::Display;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};

/// What went wrong, in words.
type Result<T> = std::result::Result<T, String>;

/// Says of what an error tells.
trait At<T> {
    fn at(self, what: impl Display) -> Result<T>;
}

impl<T, E: Display> At<T> for std::result::Result<T, E> {
    fn at(self, what: impl Display) -> Result<T> {
        self.map_err(|error| format!("{what}: {error}"))
    }
}

/// Runs Linux in heddle in an emulated machine.
///
/// QEMU emulates a machine with AMD's virtualisation and Debian's cloud kernel (L1); heddle runs
/// there and has the same kernel as its guest (L2). What that takes is downloaded with apt-get and
/// kept in target/lab.
#[derive(Parser)]
#[command(name = "lab")]
struct Cli {
    #[command(subcommand)]
    command: Command,
    #[command(flatten)]
    with: With,
}

/// What all commands share.
#[derive(Args)]
struct With {
    /// Use this program instead of building heddle
    #[arg(long, value_name = "FILE", global = true)]
    heddle: Option<PathBuf>,
    /// CPUs of L1; QEMU has rare faults of its own with more than one
    #[arg(long, default_value_t = 1, global = true, value_parser = clap::value_parser!(u32).range(1..))]
    smp: u32,
    /// Keep the files of the run (consoles, reports, logs of the guests) in this directory
    #[arg(long, value_name = "DIR", global = true)]
    keep: Option<PathBuf>,
    /// Add this to the guests' kernel command line, for example pci=noacpi
    #[arg(long, value_name = "TEXT", default_value = "", global = true)]
    append: String,
    /// For programs: one JSON object on standard output, all else on standard error
    #[arg(long, global = true)]
    json: bool,
}

#[derive(Subcommand)]
enum Command {
    /// Run a machine file of yours, with its console on the terminal
    ///
    /// The files that it names are copied into the lab at the same paths; what the guest changes
    /// is lost. There is also a kernel: /lab/vmlinux, /lab/vmlinuz (as a bzImage) and, with a
    /// shell for a console, /lab/initrd.
    Boot(Boot),
    /// Run a set of jobs that covers each pair of properties
    Ci(matrix::Choice),
    /// Run every combination of properties
    Matrix(matrix::Choice),
    /// Say what Linux complains of in heddle and does not in QEMU
    Complaints(matrix::Only),
    /// Count instructions, exits and memory, beside what other machine monitors take
    Measure(measure::Measure),
    /// Look for a newer kernel with apt-get
    Update,
}

#[derive(Args)]
struct Boot {
    /// The machine file
    file: PathBuf,
    /// Change a value, for example boot.kernel=/lab/vmlinux; may be given several times
    #[arg(long = "set", value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// Memory of L1 in MiB
    #[arg(long, default_value_t = 2048)]
    memory: u32,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let done = match &cli.command {
        Command::Boot(boot) => l1::boot(&cli.with, &boot.file, &boot.set, boot.memory),
        Command::Ci(choice) => matrix::run(&cli.with, choice, matrix::Extent::Pairs),
        Command::Matrix(choice) => matrix::run(&cli.with, choice, matrix::Extent::All),
        Command::Complaints(only) => complaints::run(&cli.with, only),
        Command::Measure(options) => measure::run(&cli.with, options),
        Command::Update => kit::update().map(|_| true),
    };
    match done {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("lab: {error}");
            ExitCode::from(2)
        }
    }
}
