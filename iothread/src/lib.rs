//! Event loops, and the strands that run on them.
//!
//! A [`Strand`] owns an object and admits one thread at a time to it. An [`Event`] is a callback
//! of that object; it can be fired by a readable file descriptor, a timer, a bottom half, a
//! completed io_uring operation, or right here on a vCPU thread whose exit asked for it. Whoever
//! finds the strand held leaves the event with the holder and goes on: nobody waits.
//!
//! The compiler keeps the rules:
//!
//! A callback cannot run another object's callback, because that takes an [`ExitCx`]:
//! ```compile_fail
//! fn callback(other: &iothread::Event<u32>, cx: &mut iothread::Cx<'_>) {
//!     other.run_here(cx);
//! }
//! ```
//! A [`Cx`] does not leave its thread:
//! ```compile_fail
//! fn leave(cx: iothread::Cx<'static>) {
//!     std::thread::spawn(move || drop(cx));
//! }
//! ```
//! A callback cannot wait for another thread, because that takes a [`Blocking`]:
//! ```compile_fail
//! fn callback(reply: iothread::Reply<u32>, cx: &mut iothread::Cx<'_>) {
//!     reply.wait(cx);
//! }
//! ```
//! and the token cannot be carried to a loop:
//! ```compile_fail
//! fn smuggle(strand: &iothread::Strand<u32>, token: iothread::Blocking) {
//!     strand.call(move |_, _| drop(token));
//! }
//! ```
//! The object of a strand is reachable in no other way than through its callbacks:
//! ```compile_fail
//! fn peek(strand: &iothread::Strand<u32>) -> u32 {
//!     *strand.object
//! }
//! ```
//!
//! What the compiler cannot keep is tried in models: `docs/loop.md`.

mod activity;
mod announce;
mod class;
mod clock;
mod counters;
mod cx;
mod event_loop;
mod handle;
mod hold;
mod idle;
mod inbox;
#[cfg(loom)]
mod models;
mod place;
mod poll;
#[cfg_attr(loom, path = "models/readiness.rs")]
mod readiness;
mod reply;
mod ring;
mod runaway;
mod shuffle;
mod source;
mod strand;
mod sync;
mod thread;
mod timer;
mod wake;

pub use activity::{Activity, Spell};
pub use announce::announce;
pub use class::Class;
pub use counters::{Counter, Counters};
pub use cx::{Cx, ExitCx, VcpuLoop};
pub use event_loop::{EventLoop, LoopPolicy};
pub use handle::LoopHandle;
pub use idle::Idle;
pub use poll::PollPolicy;
pub use reply::{Answer, Blocking, Gone, Reply};
pub use ring::{Operation, Port, Ring, RingFull};
pub use runaway::{Guard, ring_on_demotion};
pub use source::{FdSource, Poller, Trigger};
pub use strand::{Event, Progress, Strand};
pub use thread::{
    Granted, Refused, Sched, Starting, Thread, ThreadSpec, available_cpus, elsewhere,
    raise_file_limit, reserve_files, spawn, spawn_loop, start_thread,
};
pub use timer::Timer;
