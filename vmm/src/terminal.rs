//! The terminal heddle runs in: raw while the guest has it, and always given back as it was.

#![expect(unsafe_code, reason = "termios and signalfd")]

use std::fs::File;
use std::io::{self, IsTerminal, Write};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering::*};
use std::time::{Duration, Instant};

/// Should messages on standard error be coloured?
pub fn colors() -> bool {
    io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|v| v.is_empty())
}

/// Columns of this terminal.
pub fn columns(tty: &File) -> Option<usize> {
    let mut size = libc::winsize { ws_row: 0, ws_col: 0, ws_xpixel: 0, ws_ypixel: 0 };
    #[expect(unsafe_code, reason = "TIOCGWINSZ")]
    // SAFETY: the kernel writes one winsize.
    let result = unsafe { libc::ioctl(tty.as_raw_fd(), libc::TIOCGWINSZ, &raw mut size) };
    (result == 0 && size.ws_col > 0).then_some(usize::from(size.ws_col))
}

/// The settings to go back to, for every way out, panics included.
static SAVED: OnceLock<libc::termios> = OnceLock::new();
static RAW: AtomicBool = AtomicBool::new(false);

/// The terminal in raw mode; dropping it gives it back.
#[derive(Debug)]
pub struct RawTerminal(());

impl RawTerminal {
    /// Takes the terminal on standard input, if there is one and it is ours to take: a job in the
    /// background leaves it alone.
    pub fn take() -> io::Result<Option<Self>> {
        // SAFETY: these only ask about standard input and this process.
        let ours = unsafe { libc::isatty(0) == 1 && libc::tcgetpgrp(0) == libc::getpgrp() };
        if !ours {
            return Ok(None);
        }
        // SAFETY: zeros are a valid termios, which tcgetattr fills.
        let mut settings: libc::termios = unsafe { std::mem::zeroed() };
        // SAFETY: `settings` is valid for both calls; cfmakeraw only changes it.
        unsafe {
            if libc::tcgetattr(0, &raw mut settings) != 0 {
                return Err(io::Error::last_os_error());
            }
            SAVED.get_or_init(|| settings);
            libc::cfmakeraw(&raw mut settings);
            // heddle's own messages still end their lines with a newline alone.
            settings.c_oflag |= libc::OPOST | libc::ONLCR;
            if libc::tcsetattr(0, libc::TCSANOW, &raw const settings) != 0 {
                return Err(io::Error::last_os_error());
            }
        }
        RAW.store(true, Release);
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            restore();
            before(info);
        }));
        Ok(Some(Self(())))
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        restore();
    }
}

/// Gives the terminal back, if it was taken.
fn restore() {
    if RAW.swap(false, AcqRel)
        && let Some(settings) = SAVED.get()
    {
        // SAFETY: the settings came from tcgetattr.
        unsafe { libc::tcsetattr(0, libc::TCSANOW, settings) };
    }
}

/// A descriptor of its own for standard output, or standard error. A terminal is opened anew, so
/// that it can be non-blocking here without being so for the shell, and Ctrl-S stops nothing but
/// the output.
pub fn output(to_stderr: bool) -> io::Result<OwnedFd> {
    let output = match to_stderr {
        true => io::stderr().as_fd().try_clone_to_owned()?,
        false => io::stdout().as_fd().try_clone_to_owned()?,
    };
    if !output.is_terminal() {
        return Ok(output);
    }
    let path = format!("/proc/self/fd/{}", output.as_raw_fd());
    let flags = libc::O_NONBLOCK | libc::O_NOCTTY;
    let terminal = File::options().write(true).custom_flags(flags).open(path);
    Ok(terminal.map_or(output, OwnedFd::from))
}

/// How long last words wait for somebody to read them.
const PATIENCE: Duration = Duration::from_secs(1);

/// Says something on standard error if it can be said within a second: a terminal or a pipe that
/// nobody reads must not keep the process from ending.
pub fn say(text: &str) {
    let Ok(mut to) = output(true).map(File::from) else { return };
    let deadline = Instant::now() + PATIENCE;
    let mut left = text.as_bytes();
    while !left.is_empty() {
        let wait = deadline.saturating_duration_since(Instant::now()).as_millis() as libc::c_int;
        let mut fd = libc::pollfd { fd: to.as_raw_fd(), events: libc::POLLOUT, revents: 0 };
        // SAFETY: one pollfd, valid during the call.
        if unsafe { libc::poll(&raw mut fd, 1, wait) } != 1 {
            return;
        }
        // A pipe that is ready takes this many bytes without blocking.
        match to.write(&left[..left.len().min(libc::PIPE_BUF)]) {
            Ok(0) => return,
            Ok(count) => left = &left[count..],
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock
                ) => {}
            Err(_) => return,
        }
    }
}

/// Signals that end the machine in order, delivered as readable data.
#[derive(Debug)]
pub struct Signals(OwnedFd);

/// Which ones.
const ENDING: [libc::c_int; 4] = [libc::SIGINT, libc::SIGTERM, libc::SIGHUP, libc::SIGQUIT];

impl Signals {
    /// Blocks the ending signals in this thread and all it will start, and ignores SIGPIPE.
    pub fn take() -> io::Result<Self> {
        // SAFETY: zeros are a valid signal set; all pointers are valid during the calls.
        unsafe {
            let mut set: libc::sigset_t = std::mem::zeroed();
            for signal in ENDING {
                libc::sigaddset(&raw mut set, signal);
            }
            libc::signal(libc::SIGPIPE, libc::SIG_IGN);
            if libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()) != 0 {
                return Err(io::Error::last_os_error());
            }
            let fd = libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK);
            if fd < 0 {
                return Err(io::Error::last_os_error());
            }
            Ok(Self(OwnedFd::from_raw_fd(fd)))
        }
    }

    /// The next signal that has come, if any.
    pub fn next(&self) -> Option<i32> {
        let mut info = std::mem::MaybeUninit::<libc::signalfd_siginfo>::uninit();
        let size = size_of::<libc::signalfd_siginfo>();
        // SAFETY: the kernel writes one siginfo of this size or nothing.
        unsafe {
            let got = libc::read(self.0.as_raw_fd(), info.as_mut_ptr().cast(), size);
            (got == size as isize).then(|| info.assume_init().ssi_signo as i32)
        }
    }
}

/// Has a signal come that [`Signals::next`] has not given yet? For long work on the thread that
/// has not got around to looking.
pub fn ending_signal_waits() -> bool {
    // SAFETY: zeros are a valid signal set; the pointer is valid during the calls.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigpending(&raw mut set) == 0
            && ENDING.iter().any(|signal| libc::sigismember(&raw const set, *signal) == 1)
    }
}

impl AsRawFd for Signals {
    fn as_raw_fd(&self) -> i32 {
        self.0.as_raw_fd()
    }
}
