//! Machines: a directory with a machine file, and runs of it.

#![expect(unsafe_code, reason = "signals are sent by a system call")]

use std::ffi::OsStr;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

use serde_json::Value;
use tempfile::TempDir;

use crate::payload;
use crate::program::{heddle, need_kvm};

/// No run of these tests takes so long, however busy the host: what does hangs.
const LIMIT: Duration = Duration::from_secs(120);

/// A directory with the machine file `vm.toml` and the files that it names.
#[derive(Debug)]
pub struct Machine {
    directory: TempDir,
}

impl Machine {
    /// A machine by the text of its file.
    pub fn new(toml: &str) -> Self {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let machine = Self { directory };
        machine.write("vm.toml", toml);
        machine
    }

    /// A machine that boots `code` (see [`payload`]), with what else its file says.
    pub fn booting(code: &[u8], cmdline: &str, toml: &str) -> Self {
        let boot = format!("[boot]\nkernel = \"kernel\"\ncmdline = '{cmdline}'\n{toml}");
        let machine = Self::new(&boot);
        machine.write("kernel", payload::elf(code));
        machine
    }

    /// Where `name` is, or would be.
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Makes a file.
    pub fn write(&self, name: &str, bytes: impl AsRef<[u8]>) {
        std::fs::write(self.path(name), bytes).expect("a file in a temporary directory");
    }

    /// `heddle run vm.toml ARGS`, not started yet.
    pub fn command(&self, args: &[&str]) -> Command {
        need_kvm();
        let mut command = self.heddle("run");
        // See docs/loop.md.
        if let Some(seed) = std::env::var_os("HEDDLE_SHUFFLE") {
            command.args(["--set", &format!("test.shuffle={}", seed.display())]);
        }
        command.args(args);
        command
    }

    /// `heddle COMMAND vm.toml`, not started yet.
    pub fn heddle(&self, command: &str) -> Command {
        let mut heddle = Command::new(heddle());
        heddle.arg(command).arg(self.path("vm.toml")).stdin(Stdio::null());
        heddle
    }

    /// `heddle run vm.toml ARGS` from its start to its end.
    pub fn run(&self, args: &[&str]) -> Outcome {
        self.start(args).wait()
    }

    /// `heddle run vm.toml ARGS`.
    pub fn start(&self, args: &[&str]) -> Running {
        Running::start(&mut self.command(args))
    }
}

enum Chunk {
    Out(Vec<u8>),
    Err(Vec<u8>),
}

/// A running program whose output is being read. Dropping it kills it.
#[derive(Debug)]
pub struct Running {
    child: Child,
    chunks: Receiver<Chunk>,
    began: Instant,
    stdout: Vec<u8>,
    stderr: Vec<u8>,
}

impl Running {
    /// Starts a program; reads its standard output and error.
    pub fn start(command: &mut Command) -> Self {
        let began = Instant::now();
        let mut child = command
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap_or_else(|error| panic!("{}: {error}", command.get_program().display()));
        let (sender, chunks) = channel();
        read(child.stdout.take(), sender.clone(), Chunk::Out);
        read(child.stderr.take(), sender, Chunk::Err);
        Self { child, chunks, began, stdout: Vec::new(), stderr: Vec::new() }
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Sends a signal.
    pub fn signal(&self, signal: i32) {
        // SAFETY: sends a signal to a child that has not been waited for.
        let result = unsafe { libc::kill(self.pid() as libc::pid_t, signal) };
        assert_eq!(result, 0, "kill: {}", std::io::Error::last_os_error());
    }

    /// Waits until it has printed `text`, on either stream.
    #[track_caller]
    pub fn wait_for(&mut self, text: &str) {
        let has = |stream: &[u8]| stream.windows(text.len()).any(|part| part == text.as_bytes());
        while !has(&self.stdout) && !has(&self.stderr) {
            assert!(self.take_chunk(), "it ended without {text:?}: {:#?}", self.said());
        }
    }

    /// Takes in some output; false: there is no more to come.
    #[track_caller]
    fn take_chunk(&mut self) -> bool {
        let left = LIMIT.saturating_sub(self.began.elapsed());
        match self.chunks.recv_timeout(left) {
            Ok(Chunk::Out(bytes)) => self.stdout.extend(bytes),
            Ok(Chunk::Err(bytes)) => self.stderr.extend(bytes),
            Err(RecvTimeoutError::Disconnected) => return false,
            Err(RecvTimeoutError::Timeout) => {
                panic!("still running after {LIMIT:?}: {:#?}", self.said());
            }
        }
        true
    }

    /// Has it ended?
    pub fn has_ended(&mut self) -> bool {
        self.child.try_wait().expect("a child").is_some()
    }

    /// Standard output and error so far.
    fn said(&self) -> [String; 2] {
        [lossy(&self.stdout), lossy(&self.stderr)]
    }

    /// Waits for its end.
    #[track_caller]
    pub fn wait(mut self) -> Outcome {
        // Both streams end when the process does.
        while self.take_chunk() {}
        let status = self.child.wait().expect("a child");
        Outcome {
            code: status.code(),
            stdout: std::mem::take(&mut self.stdout),
            stderr: lossy(&self.stderr),
            took: self.began.elapsed(),
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Fails if it has ended, which is as good.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn lossy(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn read<R>(stream: Option<R>, sender: Sender<Chunk>, chunk: fn(Vec<u8>) -> Chunk)
where
    R: Read + Send + 'static,
{
    let mut stream = stream.expect("a pipe");
    std::thread::spawn(move || {
        let mut bytes = [0; 4096];
        while let Ok(count @ 1..) = stream.read(&mut bytes) {
            if sender.send(chunk(bytes[..count].to_vec())).is_err() {
                return;
            }
        }
    });
}

/// How a program ended and what it said.
#[derive(Debug)]
pub struct Outcome {
    /// Its exit code; `None`: a signal ended it.
    pub code: Option<i32>,
    /// What it wrote to standard output.
    pub stdout: Vec<u8>,
    /// What it wrote to standard error.
    pub stderr: String,
    /// From start to end.
    pub took: Duration,
}

impl Outcome {
    /// It ended with this exit code and without a panic.
    #[track_caller]
    pub fn expect(self, code: i32) -> Self {
        let said = format!("{}\n{}", self.text(), self.stderr);
        assert_eq!(self.code, Some(code), "{said}");
        assert!(!said.contains("panicked at"), "{said}");
        self
    }

    /// It ended with this exit code, within a few seconds, and `said` is part of why.
    #[track_caller]
    pub fn refuses(self, code: i32, said: &str) -> Self {
        let outcome = self.expect(code);
        assert!(outcome.stderr.contains(said), "not {said:?}: {}", outcome.stderr);
        assert!(outcome.took < Duration::from_secs(10), "it took {:?}", outcome.took);
        outcome
    }

    /// Standard output as text.
    pub fn text(&self) -> String {
        lossy(&self.stdout)
    }

    /// Standard output, which is one JSON object and nothing else.
    #[track_caller]
    pub fn json(&self) -> Value {
        let value: Value = serde_json::from_slice(&self.stdout)
            .unwrap_or_else(|error| panic!("{error}: {}\n{}", self.text(), self.stderr));
        assert!(value.is_object(), "{value}");
        value
    }
}

/// The threads of a process: id and name.
pub fn threads(pid: u32) -> Vec<(u32, String)> {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).expect("a running process");
    let name = |id: u32| {
        let name = std::fs::read_to_string(format!("/proc/{pid}/task/{id}/comm")).ok()?;
        Some((id, name.trim_end().to_owned()))
    };
    tasks.filter_map(|task| name(task.ok()?.file_name().to_str()?.parse().ok()?)).collect()
}

/// Waits until a process has a thread of this name.
pub fn wait_for_thread(pid: u32, name: &str) {
    let began = Instant::now();
    while !threads(pid).iter().any(|(_, found)| found == name) {
        assert!(began.elapsed() < LIMIT, "no thread {name}");
        std::thread::yield_now();
    }
}

/// A path as text.
pub fn text(path: &(impl AsRef<Path> + ?Sized)) -> &str {
    OsStr::to_str(path.as_ref().as_os_str()).expect("a path in UTF-8")
}
