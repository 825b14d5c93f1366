//! In the place of `readiness.rs`: no fds but those that only end a wait.

use std::io;
use std::os::fd::RawFd;
use std::sync::Arc;

use loom::sync::Notify;

use crate::models::sync::bell_of;
use crate::place::Place;
use crate::source::Watched;

pub(crate) struct Readiness {
    bell: Option<Arc<Notify>>,
}

impl Readiness {
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self { bell: None })
    }

    pub(crate) fn add(&mut self, watched: &Arc<Watched>) -> io::Result<()> {
        unimplemented!("the models have no fds: {:?}", watched.trigger)
    }

    pub(crate) fn remove(&mut self, _: &Arc<Watched>) {}

    pub(crate) fn detach(&mut self, _: &Arc<Place>) -> Vec<Arc<Watched>> {
        Vec::new()
    }

    pub(crate) fn watch_wakeups(&mut self, fd: RawFd) -> io::Result<()> {
        if let Some(bell) = bell_of(fd) {
            self.bell = Some(bell);
        }
        Ok(())
    }

    pub(crate) fn look(&mut self) -> bool {
        false
    }

    /// Ends when the loop's bell has rung since the last wait, and sometimes for no reason, as
    /// when a timer is due. If it does not end and nothing else goes on, the model has failed.
    pub(crate) fn wait(&mut self) {
        self.bell.as_ref().expect("EventLoop::new has it watched").wait();
    }

    pub(crate) fn take_ready(&mut self, _: &mut Vec<u32>) {}

    pub(crate) fn watched(&self, _: u32) -> Option<&Watched> {
        None
    }
}
