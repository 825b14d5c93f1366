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
use std::sync::Arc;
use std::time::{Duration, Instant};

use devices::legacy::Serial;

use crate::ending::{End, Ending};
use crate::terminal::Signals;

/// Bytes moved at a time: a pipe that is writable takes this many without blocking.
const CHUNK: usize = 4096;

/// The escape that leaves the console: Ctrl-A, then X.
const ESCAPE: u8 = 0x01;

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

/// A serial port with its way out.
pub struct Line {
    port: Arc<Serial>,
    sink: Sink,
    pending: VecDeque<u8>,
    /// Looks for the built-in guest's last words.
    pub transcript: Transcript,
}

impl Line {
    /// A port whose output goes to `sink`.
    pub fn new(port: Arc<Serial>, sink: Sink) -> Self {
        Self { port, sink, pending: VecDeque::new(), transcript: Transcript::default() }
    }

    fn is_stdio(&self) -> bool {
        matches!(self.sink, Sink::Stdio(_))
    }

    fn collect(&mut self) {
        while self.pending.len() < CHUNK {
            let bytes = self.port.drain(CHUNK);
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
    /// Reads what is there; true: the escape came.
    fn read(&mut self, interactive: bool) -> bool {
        let mut bytes = [0u8; 256];
        // SAFETY: the pointer and length are those of the array.
        let count = unsafe { libc::read(0, bytes.as_mut_ptr().cast(), bytes.len()) };
        let Ok(count @ 1..) = usize::try_from(count) else {
            let interrupted = io::Error::last_os_error().kind() == io::ErrorKind::Interrupted;
            self.open = count != 0 && interrupted;
            return false;
        };
        for &byte in &bytes[..count] {
            match (std::mem::take(&mut self.escaped), byte) {
                (true, b'x' | b'X') if interactive => return true,
                (false, ESCAPE) if interactive => self.escaped = true,
                // A guest that reads nothing must not keep the escape from being seen.
                _ if self.pending.len() < TYPED_AHEAD => self.pending.push_back(byte),
                _ => {}
            }
        }
        false
    }
}

/// Waits for the end of a machine, carrying its serial ports' bytes meanwhile.
pub struct Supervisor {
    /// The ports.
    pub lines: Vec<Line>,
    signals: Signals,
    input: Input,
    interactive: bool,
}

impl Supervisor {
    /// `reads`: standard input goes to the guest; `interactive`: it is a terminal in raw mode.
    pub fn new(lines: Vec<Line>, signals: Signals, reads: bool, interactive: bool) -> Self {
        let open = reads && lines.iter().any(Line::is_stdio);
        let input = Input { open, escaped: false, pending: VecDeque::new() };
        Self { lines, signals, input, interactive }
    }

    /// Returns when the machine has ended, or after `timeout`.
    pub fn wait(&mut self, ending: &Ending, timeout: Option<Duration>) -> End {
        let deadline = timeout.map(|timeout| Instant::now() + timeout);
        loop {
            if let Some(end) = ending.get() {
                return end.clone();
            }
            let left = deadline.map(|at| at.saturating_duration_since(Instant::now()));
            if left.is_some_and(|left| left.is_zero()) {
                return End::Timeout;
            }
            if let Some(end) = self.turn(ending, left) {
                return end;
            }
        }
    }

    /// Writes out what the ports still hold, as far as the world takes it within a second.
    pub fn finish(&mut self, ending: &Ending) {
        self.input.open = false;
        let deadline = Instant::now() + Duration::from_secs(1);
        loop {
            self.lines.iter_mut().for_each(Line::collect);
            let waiting = self.lines.iter().any(|line| !line.pending.is_empty());
            let left = deadline.saturating_duration_since(Instant::now());
            if !waiting || left.is_zero() {
                return;
            }
            self.turn(ending, Some(left));
        }
    }

    fn turn(&mut self, ending: &Ending, timeout: Option<Duration>) -> Option<End> {
        self.lines.iter_mut().for_each(Line::collect);
        let reads = self.input.open && (self.interactive || self.input.pending.is_empty());
        let pollfd = |fd: RawFd, events| libc::pollfd { fd, events, revents: 0 };
        let mut fds = vec![
            pollfd(ending.as_raw_fd(), libc::POLLIN),
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
            ending.drain();
        }
        if fds[1].revents != 0
            && let Some(signal) = self.signals.next()
        {
            return Some(End::Signal(signal));
        }
        if fds[2].revents != 0 && self.input.read(self.interactive) {
            return Some(End::Console);
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
        let taken = line.port.push_input(self.input.pending.make_contiguous());
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
