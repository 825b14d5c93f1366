//! The supervisor: the thread that `heddle run` was started on. It carries the serial ports'
//! bytes to and from the world, and waits for the machine to end.
//!
//! It never blocks on a slow terminal: output waits for room while signals and the guest's end
//! are still seen.

#![expect(unsafe_code, reason = "poll, and reads and writes that never wait")]

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use config::plan::{self, SerialOut};
use devices::legacy::{PowerPorts, Serial};

use crate::demotions::Demotions;
use crate::ending::{End, Ending};
use crate::host_error::HostError;
use crate::machine::Machine;
use crate::resources::Resources;
use crate::terminal::{Signals, output, say};
use crate::watchdog::Watchdog;

/// Bytes moved at a time: a pipe that is writable takes this many without blocking.
const CHUNK: usize = 4096;

/// Ctrl-A begins an escape: X leaves the console, P presses the power button.
const ESCAPE: u8 = 0x01;

/// What a person wants of the console.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Wish {
    Leave,
    PowerButton,
}

/// Where a serial port's output goes.
#[derive(Debug)]
pub enum Sink {
    /// A file descriptor of the terminal's kind.
    Stdio(OwnedFd),
    /// A file.
    File(File),
    /// Nowhere.
    Null,
}

impl Sink {
    /// Opens what the plan says. `to_stderr`: stdio is standard error.
    fn open(serial: &plan::Serial, to_stderr: bool) -> Result<Self, HostError> {
        let whose = format!("serial.{}", serial.name);
        match &serial.out {
            SerialOut::Null => Ok(Self::Null),
            SerialOut::Stdio => {
                Ok(Self::Stdio(output(to_stderr).map_err(|e| HostError::new(&whose, e))?))
            }
            SerialOut::File(path) => File::options()
                .write(true)
                .create(true)
                .truncate(true)
                .custom_flags(libc::O_NONBLOCK)
                .open(path)
                .map(Self::File)
                .map_err(|e| HostError::new(format!("{whose}: {}", path.display()), e)),
        }
    }
}

/// A serial port with its way out. The way out stays when a reset brings a new port.
pub struct Line {
    port: Option<Arc<Serial>>,
    sink: Sink,
    pending: VecDeque<u8>,
    /// Looks for the built-in guest's last words.
    pub transcript: Transcript,
}

impl Line {
    /// A port to come, whose output goes where the plan says.
    pub fn open(serial: &plan::Serial, to_stderr: bool) -> Result<Self, HostError> {
        let sink = Sink::open(serial, to_stderr)?;
        let pending = VecDeque::new();
        Ok(Self { port: None, sink, pending, transcript: Transcript::default() })
    }

    fn is_stdio(&self) -> bool {
        matches!(self.sink, Sink::Stdio(_))
    }

    fn collect(&mut self) {
        let Some(port) = &self.port else { return };
        while self.pending.len() < CHUNK {
            let bytes = port.drain(CHUNK);
            if bytes.is_empty() {
                return;
            }
            self.transcript.add(&bytes);
            self.pending.extend(bytes);
        }
    }

    /// The fd to wait for before more can be written, if any.
    fn blocked_on(&self) -> Option<RawFd> {
        match &self.sink {
            Sink::Stdio(fd) if !self.pending.is_empty() => Some(fd.as_raw_fd()),
            _ => None,
        }
    }

    /// Writes what the sink takes. `writable`: its fd was found writable.
    fn write(&mut self, writable: bool) {
        use std::io::Write;
        match &mut self.sink {
            Sink::Null => self.pending.clear(),
            Sink::File(file) => {
                // A full disk loses output, not the machine.
                let _ = file.write_all(self.pending.make_contiguous());
                self.pending.clear();
            }
            Sink::Stdio(fd) if writable => {
                let bytes = self.pending.make_contiguous();
                let count = bytes.len().min(CHUNK);
                // SAFETY: the pointer and length are those of a slice.
                let done = unsafe { libc::write(fd.as_raw_fd(), bytes.as_ptr().cast(), count) };
                match usize::try_from(done) {
                    Ok(done) => drop(self.pending.drain(..done)),
                    Err(_) => {
                        let error = io::Error::last_os_error();
                        let again = [io::ErrorKind::WouldBlock, io::ErrorKind::Interrupted];
                        if !again.contains(&error.kind()) {
                            self.sink = Sink::Null; // nobody reads any more
                        }
                    }
                }
            }
            Sink::Stdio(_) => {}
        }
    }
}

/// Keeps the last line that looks like a JSON object.
#[derive(Debug, Default)]
pub struct Transcript {
    line: Vec<u8>,
    /// The last complete line that began with `{`.
    pub json: Option<String>,
}

impl Transcript {
    /// Longest line kept: the built-in guest's report of 1,024 vCPUs fits.
    const LONGEST: usize = 1 << 20;

    fn add(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            match byte {
                b'\n' => {
                    if self.line.first() == Some(&b'{') {
                        self.json = Some(String::from_utf8_lossy(&self.line).into_owned());
                    }
                    self.line.clear();
                }
                b'\r' => {}
                _ if self.line.len() < Self::LONGEST => self.line.push(byte),
                _ => {}
            }
        }
    }
}

/// What may wait for a guest that does not read, when a person types.
const TYPED_AHEAD: usize = 4096;

/// Standard input on its way to a serial port.
struct Input {
    open: bool,
    escaped: bool,
    pending: VecDeque<u8>,
}

impl Input {
    /// Reads what is there, up to an escape.
    fn read(&mut self, interactive: bool) -> Option<Wish> {
        let mut bytes = [0u8; 256];
        // SAFETY: the pointer and length are those of the array.
        let count = unsafe { libc::read(0, bytes.as_mut_ptr().cast(), bytes.len()) };
        let Ok(count @ 1..) = usize::try_from(count) else {
            let interrupted = io::Error::last_os_error().kind() == io::ErrorKind::Interrupted;
            self.open = count != 0 && interrupted;
            return None;
        };
        let mut wish = None;
        for &byte in &bytes[..count] {
            match (std::mem::take(&mut self.escaped), byte) {
                (true, b'x' | b'X') if interactive => return Some(Wish::Leave),
                (true, b'p' | b'P') if interactive => wish = Some(Wish::PowerButton),
                (false, ESCAPE) if interactive => self.escaped = true,
                // A guest that reads nothing must not keep the escape from being seen.
                _ if self.pending.len() < TYPED_AHEAD => self.pending.push_back(byte),
                _ => {}
            }
        }
        wish
    }
}

/// Waits for the end of a machine, carrying its serial ports' bytes meanwhile.
pub struct Supervisor {
    /// The ports.
    pub lines: Vec<Line>,
    signals: Signals,
    ending: Ending,
    power_button: Option<Arc<PowerPorts>>,
    input: Input,
    interactive: bool,
    deadline: Option<Instant>,
    watchdog: Watchdog,
    /// The real-time threads that may lose their priority.
    demotions: Demotions,
}

impl Supervisor {
    /// `reads`: standard input goes to the guest; `interactive`: it is a terminal in raw mode. It
    /// all ends after `timeout`.
    pub fn new(
        lines: Vec<Line>,
        signals: Signals,
        ending: &Ending,
        (reads, interactive): (bool, bool),
        timeout: Option<Duration>,
    ) -> Self {
        let open = reads && lines.iter().any(Line::is_stdio);
        let input = Input { open, escaped: false, pending: VecDeque::new() };
        let deadline = timeout.map(|timeout| Instant::now() + timeout);
        let ending = ending.clone();
        let (demotions, watchdog) = (Demotions::default(), Watchdog::default());
        Self {
            lines,
            demotions,
            signals,
            ending,
            power_button: None,
            input,
            interactive,
            deadline,
            watchdog,
        }
    }

    /// Takes on the ports, the power button and the threads of a machine, its first or the next one.
    pub fn connect(&mut self, machine: &Machine, resources: &Resources) {
        let threads = || resources.threads().chain(machine.threads());
        self.watchdog.watch(resources.loop_handles(), threads(), &self.ending);
        self.demotions.watch(threads());
        for (line, port) in self.lines.iter_mut().zip(&machine.serials) {
            line.port = Some(Arc::clone(port));
        }
        self.power_button = Some(Arc::clone(&machine.power_button));
    }

    /// Returns when the machine has ended, or after the timeout.
    pub fn wait(&mut self) -> End {
        loop {
            for news in self.demotions.news() {
                say(&format!("heddle: {news}\n"));
            }
            if let Some(end) = self.ending.get() {
                return end;
            }
            let now = Instant::now();
            let left = self.deadline.map(|at| at.saturating_duration_since(now));
            if left.is_some_and(|left| left.is_zero()) {
                return End::Timeout;
            }
            for complaint in self.watchdog.look(now) {
                say(&format!("heddle: {complaint}\n"));
            }
            let left = [left, self.watchdog.wait(now)].into_iter().flatten().min();
            if let Some(end) = self.turn(left) {
                return end;
            }
        }
    }

    /// Writes out what the ports still hold, as far as the world takes it within a second. Gives
    /// the end that somebody wished for meanwhile.
    pub fn finish(&mut self) -> Option<End> {
        // What is typed now is for the next machine, if there is one.
        let open = std::mem::take(&mut self.input.open);
        let deadline = Instant::now() + Duration::from_secs(1);
        let mut wished = None;
        loop {
            self.lines.iter_mut().for_each(Line::collect);
            let waiting = self.lines.iter().any(|line| !line.pending.is_empty());
            let left = deadline.saturating_duration_since(Instant::now());
            if !waiting || left.is_zero() {
                break;
            }
            wished = self.turn(Some(left)).or(wished);
        }
        self.input.open = open;
        wished
    }

    /// The signal to end that has come, if any.
    pub fn signal(&self) -> Option<i32> {
        self.signals.next()
    }

    /// The last line on the first port that is a JSON object.
    pub fn last_json(&self) -> Option<serde_json::Value> {
        serde_json::from_str(self.lines.first()?.transcript.json.as_deref()?).ok()
    }

    fn turn(&mut self, timeout: Option<Duration>) -> Option<End> {
        self.lines.iter_mut().for_each(Line::collect);
        let reads = self.input.open && (self.interactive || self.input.pending.is_empty());
        let pollfd = |fd: RawFd, events| libc::pollfd { fd, events, revents: 0 };
        let mut fds = vec![
            pollfd(self.ending.as_raw_fd(), libc::POLLIN),
            pollfd(self.signals.as_raw_fd(), libc::POLLIN),
            pollfd(if reads { 0 } else { -1 }, libc::POLLIN),
        ];
        let outputs = self.lines.iter().map(|line| line.blocked_on().unwrap_or(-1));
        fds.extend(outputs.map(|fd| pollfd(fd, libc::POLLOUT)));
        // What goes to a file or nowhere need not wait for room.
        let idle = self.lines.iter().all(|line| line.pending.is_empty() || line.is_stdio());
        let limit = match timeout {
            _ if !idle => 0,
            None => -1,
            Some(timeout) => timeout.as_millis().min(1 << 30) as libc::c_int + 1,
        };
        // SAFETY: the pointer and length are those of the vector.
        unsafe { libc::poll(fds.as_mut_ptr(), fds.len() as libc::nfds_t, limit) };
        if fds[0].revents != 0 {
            self.ending.drain();
        }
        if fds[1].revents != 0
            && let Some(signal) = self.signals.next()
        {
            return Some(End::Signal(signal));
        }
        if fds[2].revents != 0 {
            match self.input.read(self.interactive) {
                Some(Wish::Leave) => return Some(End::Console),
                Some(Wish::PowerButton) => {
                    self.power_button.iter().for_each(|button| button.press_power_button());
                }
                None => {}
            }
        }
        for (line, fd) in self.lines.iter_mut().zip(&fds[3..]) {
            line.write(fd.revents != 0);
        }
        self.feed();
        None
    }

    /// Gives the guest what was typed.
    fn feed(&mut self) {
        let Some(line) = self.lines.iter().find(|line| line.is_stdio()) else { return };
        let Some(port) = &line.port else { return };
        let taken = port.push_input(self.input.pending.make_contiguous());
        self.input.pending.drain(..taken);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_json_line_is_kept_whatever_its_line_end() {
        let mut transcript = Transcript::default();
        transcript.add(b"hello\r\n{\"a\": 1}\r\n{\"b\"");
        assert_eq!(transcript.json.as_deref(), Some("{\"a\": 1}"));
        transcript.add(b": 2}\nbye\n{");
        assert_eq!(transcript.json.as_deref(), Some("{\"b\": 2}"));
    }
}
