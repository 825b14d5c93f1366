//! A terminal that a test holds the other end of.

#![expect(unsafe_code, reason = "pseudo terminals are made by system calls")]

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command};
use std::ptr;
use std::time::{Duration, Instant};

const LIMIT: Duration = Duration::from_secs(60);

/// A pseudo terminal.
#[derive(Debug)]
pub struct Pty {
    master: File,
    slave: OwnedFd,
    said: Vec<u8>,
}

impl Default for Pty {
    fn default() -> Self {
        let (mut master, mut slave) = (-1, -1);
        // SAFETY: both numbers are written; the rest may be null.
        let result = unsafe {
            libc::openpty(
                &raw mut master,
                &raw mut slave,
                ptr::null_mut(),
                ptr::null_mut(),
                ptr::null_mut(),
            )
        };
        assert_eq!(result, 0, "openpty: {}", io::Error::last_os_error());
        // SAFETY: both are new and belong to nobody else.
        let (master, slave) = unsafe { (File::from_raw_fd(master), OwnedFd::from_raw_fd(slave)) };
        for fd in [master.as_raw_fd(), slave.as_raw_fd()] {
            // SAFETY: only sets a flag: children get what they are given and no more.
            unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) };
        }
        Self { master, slave, said: Vec::new() }
    }
}

/// What `stty` would tell.
#[derive(Debug, PartialEq, Eq)]
pub struct Settings([u32; 4], [u8; libc::NCCS]);

impl Pty {
    /// Starts a program in a session of its own whose terminal this is.
    pub fn start(&self, command: &mut Command) -> Child {
        let end = || self.slave.try_clone().expect("a file descriptor");
        command.stdin(end()).stdout(end()).stderr(end());
        // SAFETY: only system calls, which are allowed between fork and exec.
        unsafe {
            command.pre_exec(|| {
                if libc::setsid() < 0 || libc::ioctl(0, libc::TIOCSCTTY, 0) < 0 {
                    return Err(io::Error::last_os_error());
                }
                Ok(())
            });
        }
        command.spawn().expect("it starts")
    }

    /// The settings as they are now.
    pub fn settings(&self) -> Settings {
        // SAFETY: zeros are a valid termios, which tcgetattr fills.
        let now = unsafe {
            let mut now: libc::termios = std::mem::zeroed();
            assert_eq!(libc::tcgetattr(self.slave.as_raw_fd(), &raw mut now), 0);
            now
        };
        Settings([now.c_iflag, now.c_oflag, now.c_cflag, now.c_lflag], now.c_cc)
    }

    /// Are keys passed on one by one, unseen by the terminal?
    pub fn is_raw(&self) -> bool {
        self.settings().0[3] & (libc::ICANON | libc::ECHO | libc::ISIG) == 0
    }

    /// Types.
    pub fn type_in(&mut self, keys: &[u8]) {
        self.master.write_all(keys).expect("the terminal takes input");
    }

    /// Waits until `text` has appeared behind what was waited for before; what came before it.
    #[track_caller]
    pub fn wait_for(&mut self, text: &str) -> Vec<u8> {
        let deadline = Instant::now() + LIMIT;
        loop {
            let found = self.said.windows(text.len()).position(|part| part == text.as_bytes());
            if let Some(at) = found {
                let rest = self.said.split_off(at + text.len());
                let mut before = std::mem::replace(&mut self.said, rest);
                before.truncate(at);
                return before;
            }
            let mut fd =
                libc::pollfd { fd: self.master.as_raw_fd(), events: libc::POLLIN, revents: 0 };
            let left = deadline.saturating_duration_since(Instant::now());
            // SAFETY: one valid pollfd.
            let ready = unsafe { libc::poll(&raw mut fd, 1, left.as_millis() as libc::c_int) };
            let said = String::from_utf8_lossy(&self.said);
            assert!(ready > 0, "{text:?} did not appear in {LIMIT:?}: {said:?}");
            let mut bytes = [0; 1024];
            let count = self.master.read(&mut bytes);
            let count = count.unwrap_or_else(|error| panic!("{error}, after {said:?}"));
            self.said.extend(&bytes[..count]);
        }
    }

    /// Takes the terminal away, as when its window is closed.
    pub fn hang_up(self) {}
}
