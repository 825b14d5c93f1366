//! Real-time threads that ran away and lost their priority: said while the machine runs.

use std::sync::Arc;

use iothread::{Granted, Guard};

use crate::ending::Ending;
use crate::machine::ThreadInfo;

/// The guarded threads whose loss has not been said yet.
#[derive(Debug, Default)]
pub struct Demotions(Vec<(Granted, Arc<Guard>)>);

impl Demotions {
    /// From now on every demotion in this process wakes who waits at `ending`.
    ///
    /// # Errors
    /// No file descriptor is left.
    pub fn announce_at(ending: &Ending) -> std::io::Result<()> {
        ending.bell().map(iothread::ring_on_demotion)
    }

    /// Watches these threads and no others.
    pub fn watch(&mut self, threads: impl Iterator<Item = ThreadInfo>) {
        let guarded = |ThreadInfo { granted, .. }| Some((granted.clone(), granted.guard?));
        self.0 = threads.filter_map(guarded).filter(|(_, guard)| !guard.demoted()).collect();
    }

    /// What there is to say of those that lost their priority since the last call.
    pub fn news(&mut self) -> Vec<String> {
        let lost = self.0.extract_if(.., |(_, guard)| guard.demoted());
        lost.map(|(granted, guard)| sentence(&granted, &guard)).collect()
    }
}

/// Names the thread, what it lost, why, and what to do.
fn sentence(granted: &Granted, guard: &Guard) -> String {
    let Granted { name, sched, .. } = granted;
    let limit = guard.limit();
    format!(
        "thread {name} is no longer {sched} but other: it ran for {limit:?} and more without a \
         pause. Give it less to do, or sched.runaway = \"off\" if its CPUs are its own"
    )
}
