//! Real-time threads that ran away and lost their priority: said while the machine runs.

use std::sync::Arc;

use iothread::{Granted, Guard};

use crate::ending::Ending;
use crate::machine::ThreadInfo;

/// The guarded threads of a machine.
#[derive(Debug, Default)]
pub struct Demotions {
    watched: Vec<(Granted, Arc<Guard>)>,
    /// Those whose loss has been said, also of machines before a reset: loops outlive it.
    said: Vec<Arc<Guard>>,
}

impl Demotions {
    /// From now on every demotion in this process wakes who waits at `ending`.
    ///
    /// # Errors
    /// No file descriptor is left.
    pub fn announce_at(ending: &Ending) -> std::io::Result<()> {
        ending.bell().map(iothread::ring_on_demotion)
    }

    /// Watches these threads and no others. One may have lost its priority already, while the
    /// machine was being made.
    pub fn watch(&mut self, threads: impl Iterator<Item = ThreadInfo>) {
        let guarded = |ThreadInfo { granted, .. }| Some((granted.clone(), granted.guard?));
        self.watched = threads.filter_map(guarded).collect();
        self.watched.retain(|(_, guard)| !self.said.iter().any(|said| Arc::ptr_eq(said, guard)));
    }

    /// What there is to say of those that lost their priority since the last call.
    pub fn news(&mut self) -> Vec<String> {
        let lost = self.watched.extract_if(.., |(_, guard)| guard.demoted());
        let say = |(granted, guard): (Granted, Arc<Guard>)| {
            let sentence = sentence(&granted, &guard);
            self.said.push(guard);
            sentence
        };
        lost.map(say).collect()
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

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use iothread::{Counters, Sched, ThreadSpec, spawn};

    use super::*;

    #[test]
    fn a_loss_before_anybody_looked_is_said_and_once() {
        let sched = Sched::Fifo(1);
        let runaway = Some(Duration::from_millis(10));
        let spec = ThreadSpec { sched, runaway, ..ThreadSpec::new("spins") };
        let (sender, receiver) = std::sync::mpsc::channel::<Option<Arc<Guard>>>();
        let thread = spawn(spec, move || {
            if let Ok(Some(guard)) = receiver.recv() {
                while !guard.demoted() {}
            }
        })
        .unwrap();
        let granted = thread.granted.clone();
        sender.send(granted.guard.clone()).unwrap();
        thread.join().unwrap();
        if granted.guard.is_none() {
            return; // real-time policies are not permitted here
        }
        let info = ThreadInfo { granted, counters: Arc::new(Counters::default()) };
        let mut demotions = Demotions::default();
        demotions.watch(std::iter::once(info.clone()));
        let news = demotions.news();
        assert!(news[0].starts_with("thread spins is no longer fifo 1 but other: "), "{news:?}");
        assert_eq!(demotions.news(), [""; 0]);
        demotions.watch(std::iter::once(info)); // after a reset
        assert_eq!(demotions.news(), [""; 0]);
    }
}
