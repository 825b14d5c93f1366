//! How a machine ends, and with which exit code.

use std::fmt;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use devices::power::{Power, PowerRequest};
use vmm_sys_util::eventfd::EventFd;

use crate::host_error::HostError;

/// Why a run ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum End {
    /// The guest powered off.
    PowerOff,
    /// The guest asked for a reset.
    Reset,
    /// The guest says that it panicked.
    GuestPanic,
    /// The first vCPU hit a triple fault.
    TripleFault,
    /// The guest wrote this to the debug-exit port.
    DebugExit(u32),
    /// `--timeout` ran out.
    Timeout,
    /// This signal came.
    Signal(i32),
    /// The user left by the console's escape.
    Console,
    /// The built-in guest ended without a good verdict.
    Verdict(String),
    /// This host cannot run it.
    Host(String),
    /// Something heddle or KVM could not do.
    Internal(String),
}

impl From<HostError> for End {
    fn from(error: HostError) -> Self {
        Self::Host(error.to_string())
    }
}

impl End {
    /// The exit code of the process, see `heddle run --help`.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::PowerOff | Self::DebugExit(0) | Self::Console => 0,
            Self::Verdict(_) | Self::Internal(_) => 1,
            Self::Host(_) => 4,
            Self::Reset => 10,
            Self::GuestPanic => 11,
            Self::TripleFault => 12,
            Self::Timeout => 14,
            Self::DebugExit(value) => 64 + (*value).min(63) as u8,
            Self::Signal(number) => 128 + (*number as u8 & 0x7f),
        }
    }

    /// One word for machines.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::PowerOff => "power-off",
            Self::Reset => "reset",
            Self::GuestPanic => "guest-panic",
            Self::TripleFault => "triple-fault",
            Self::DebugExit(_) => "debug-exit",
            Self::Timeout => "timeout",
            Self::Signal(_) => "signal",
            Self::Console => "console",
            Self::Verdict(_) => "verdict",
            Self::Host(_) => "host",
            Self::Internal(_) => "internal-error",
        }
    }
}

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::PowerOff => write!(f, "the guest powered off"),
            Self::Reset => write!(f, "the guest asked for a reset"),
            Self::GuestPanic => write!(f, "the guest panicked"),
            Self::TripleFault => write!(f, "the guest hit a triple fault"),
            Self::DebugExit(value) => write!(f, "the guest wrote {value:#x} to debug-exit"),
            Self::Timeout => write!(f, "the time given by --timeout is over"),
            Self::Signal(number) => write!(f, "signal {number}"),
            Self::Console => write!(f, "left by the console's escape"),
            Self::Verdict(why) => write!(f, "the built-in guest: {why}"),
            Self::Host(why) | Self::Internal(why) => write!(f, "{why}"),
        }
    }
}

struct Announced {
    #[expect(clippy::disallowed_types, reason = "the machine ends once")]
    end: std::sync::Mutex<Option<End>>,
    /// Wakes whoever waits for the end.
    wake: EventFd,
}

/// Where the end is announced; the first announcement counts. Cheap to clone.
#[derive(Clone)]
pub struct Ending(Arc<Announced>);

impl fmt::Debug for Ending {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Ending").field(&self.get()).finish()
    }
}

impl Ending {
    /// Nothing has ended yet.
    pub fn new() -> std::io::Result<Self> {
        let flags = vmm_sys_util::eventfd::EFD_NONBLOCK | vmm_sys_util::eventfd::EFD_CLOEXEC;
        let wake = EventFd::new(flags)?;
        Ok(Self(Arc::new(Announced { end: None.into(), wake })))
    }

    fn end(&self) -> std::sync::MutexGuard<'_, Option<End>> {
        self.0.end.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// The machine ends for this reason, unless it has ended already.
    pub fn announce(&self, end: End) {
        self.end().get_or_insert(end);
        self.wake();
    }

    /// Makes the waiting thread look round.
    pub fn wake(&self) {
        // An eventfd refuses only when it is readable anyway.
        let _ = self.0.wake.write(1);
    }

    /// Another way to [`wake`](Self::wake).
    ///
    /// # Errors
    /// No file descriptor is left.
    pub fn bell(&self) -> std::io::Result<EventFd> {
        self.0.wake.try_clone()
    }

    /// The end, if it has come.
    pub fn get(&self) -> Option<End> {
        self.end().clone()
    }

    /// Forgets the end, for the next machine. Nothing of the last one may be running.
    pub fn clear(&self) {
        *self.end() = None;
    }

    /// Forgets the wake-ups so far.
    pub fn drain(&self) {
        let _ = self.0.wake.read();
    }
}

impl AsRawFd for Ending {
    fn as_raw_fd(&self) -> RawFd {
        self.0.wake.as_raw_fd()
    }
}

impl Power for Ending {
    fn request(&self, request: PowerRequest) {
        self.announce(match request {
            PowerRequest::Off => End::PowerOff,
            PowerRequest::Reset => End::Reset,
            PowerRequest::Panic => End::GuestPanic,
            PowerRequest::DebugExit(value) => End::DebugExit(value),
        });
    }
}
