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

mod counters;
mod cx;
mod event_loop;
mod hold;
mod inbox;
mod poll;
mod readiness;
mod reply;
mod ring;
mod strand;
mod sync;
mod thread;
mod timer;
mod wake;

pub use counters::{Counter, Counters};
pub use cx::{Cx, ExitCx, VcpuLoop};
pub use event_loop::{EventLoop, FdSource, LoopHandle, Poller, Trigger};
pub use poll::PollPolicy;
pub use reply::{Answer, Blocking, Gone, Reply};
pub use ring::{Operation, Port, Ring, RingFull};
pub use strand::{Event, Progress, Strand};
pub use thread::{
    Granted, Refused, Sched, Starting, Thread, ThreadSpec, available_cpus, raise_file_limit,
    reserve_files, spawn, spawn_loop, start_thread,
};
pub use timer::Timer;
