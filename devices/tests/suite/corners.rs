//! Corners that were wrong once: ended loops, odd chains, full rings, saves and pauses in the midst of
//! a reset.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering::*};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use devices::block::Submitted;
use devices::device::{Lifecycle, Paused};
use devices::virtio::blk::Blk;
use devices::virtio::rng::Rng;
use devices::virtio::seat::Placement;
use devices::virtio::testing::{Interrupt, Rig, Scripted, TestLoop, memory};
use devices::virtio::transport::status;
use devices::virtio::{F_INDIRECT_DESC, F_VERSION_1};
use iothread::{Blocking, PollPolicy, Port, Progress, Strand};
use vm_memory::{Bytes, GuestAddress};

use crate::VIA;

const HEADER: u64 = 0x10_0000;
const DATA: u64 = 0x11_0000;
const STATUS: u64 = 0x12_0000;
const TABLE: u64 = 0x13_0000;

fn scripted(f: impl Fn(&Arc<Port>, u16) -> Submitted + Send + Sync + 'static) -> Blk {
    Blk::new(Arc::new(Scripted::new(f)), "s", 1, 64)
}
fn add(rig: &mut Rig, slot: u64) {
    rig.mem.write_slice(&[0; 16], GuestAddress(HEADER + 16 * slot)).unwrap();
    rig.queues[0]
        .add(&[
            (HEADER + 16 * slot, 16, false),
            (DATA + 512 * slot, 512, true),
            (STATUS + slot, 1, true),
        ])
        .unwrap();
}

#[test]
fn a_loop_that_has_ended_says_so() {
    let home = TestLoop::new("io0", PollPolicy::OFF);
    let handle = home.handle.clone();
    drop(home);
    let blocking = Blocking::on_this_thread().unwrap();
    assert_eq!(handle.barrier().wait_for(&blocking, Duration::from_secs(2)), Err(iothread::Gone));
}

#[test]
fn a_device_can_be_reset_after_its_loop_has_ended() {
    let home = TestLoop::new("io0", PollPolicy::OFF);
    let mut rig = Rig::new(VIA, Rng, Placement::Loop(home.handle.clone()), memory(4 << 20));
    rig.start(64, F_VERSION_1);
    drop(home);
    rig.transport.set_status(0);
    std::thread::sleep(Duration::from_secs(1));
    assert_eq!(rig.transport.status(), 0);
}

#[test]
fn empty_descriptors_count_towards_the_length_of_a_chain() {
    const EMPTY: u16 = 128;
    let home = TestLoop::new("io0", PollPolicy::OFF);
    let blk = scripted(|_, _| Submitted::Done(512));
    let mut rig = Rig::new(VIA, blk, Placement::Loop(home.handle.clone()), memory(4 << 20));
    rig.start(64, F_VERSION_1 | F_INDIRECT_DESC);
    let ring = &mut rig.queues[0];
    ring.descriptor(TABLE, 0, (HEADER, 16, false), Some(1), 0);
    for nth in 1..=EMPTY {
        ring.descriptor(TABLE, nth, (HEADER, 0, false), Some(nth + 1), 0);
    }
    ring.descriptor(TABLE, EMPTY + 1, (STATUS, 1, true), None, 0);
    let table = (TABLE, 16 * u32::from(EMPTY + 2), false);
    ring.descriptor(ring.addresses().descriptors, 0, table, None, 4);
    ring.offer(0);
    rig.kick(0);
    assert_eq!(
        rig.interrupt(),
        Interrupt::Config,
        "the queue is retired, not the request answered"
    );
}

#[test]
fn a_request_found_at_the_last_look_before_sleep_is_submitted_again_when_the_ring_was_full() {
    let full = Arc::new(AtomicU32::new(0));
    let left = full.clone();
    let blk = scripted(move |_, _| {
        if left.fetch_update(AcqRel, Acquire, |n| n.checked_sub(1)).is_ok() {
            Submitted::NeedsTurn
        } else {
            Submitted::Done(512)
        }
    });
    // It polls in principle, but never long enough to find anything. What is lined up below, of two
    // objects, has to stay so.
    let home =
        TestLoop::in_order("io0", PollPolicy { max: Duration::from_nanos(1), ..PollPolicy::OFF });
    let mut rig = Rig::new(VIA, blk, Placement::Loop(home.handle.clone()), memory(4 << 20));
    rig.start(64, F_VERSION_1);
    let blocking = Blocking::on_this_thread().unwrap();
    (0..3).for_each(|_| home.handle.barrier().wait(&blocking).unwrap());
    // Hold the loop between the kick that empties the ring and its last look.
    let (enter, entered) = channel();
    let (go, wait) = channel::<()>();
    let strand = Strand::new("test", &home.handle, wait);
    let hold = strand.event(move |wait: &mut Receiver<()>, _| {
        enter.send(()).unwrap();
        wait.recv().unwrap();
        Progress::Idle
    });
    // Both are in one batch: first hold (to line them up), then kick, then hold again.
    hold.schedule();
    entered.recv().unwrap();
    add(&mut rig, 0);
    let transport = &rig.transport;
    std::thread::scope(|scope| {
        scope.spawn(|| transport.notify(0, &mut iothread::VcpuLoop::enter().exit()));
    });
    hold.schedule();
    go.send(()).unwrap();
    entered.recv().unwrap();
    assert!(rig.queues[0].take_used().is_some());
    full.store(2, Release);
    add(&mut rig, 1);
    go.send(()).unwrap();
    let began = Instant::now();
    while rig.queues[0].take_used().is_none() {
        assert!(
            began.elapsed() < Duration::from_secs(3),
            "the request is stuck in the backlog; NeedsTurn left: {}",
            full.load(Acquire)
        );
        std::thread::yield_now();
    }
}

fn slow(home: &TestLoop) -> (Rig, Receiver<(Arc<Port>, u16)>) {
    let (backend, submitted) = Scripted::pending();
    let blk = Blk::new(Arc::new(backend), "s", 1, 64);
    let mut rig = Rig::new(VIA, blk, Placement::Loop(home.handle.clone()), memory(4 << 20));
    rig.start(64, F_VERSION_1);
    add(&mut rig, 0);
    rig.kick(0);
    (rig, submitted)
}

#[test]
fn a_device_saved_in_the_middle_of_a_reset_is_saved_as_reset() {
    let home = TestLoop::new("io0", PollPolicy::OFF);
    let (rig, submitted) = slow(&home);
    let (port, slot) = submitted.recv().unwrap();
    rig.transport.set_status(0);
    port.post(slot, 512);
    let Rig { transport, .. } = rig;
    let devices: [Arc<dyn Lifecycle>; 1] = [Arc::new(transport)];
    let blocking = Blocking::on_this_thread().unwrap();
    let paused = Paused::pause(&devices, &blocking, Duration::from_secs(5)).unwrap();
    let state = &paused.save()[0];
    assert_eq!(state.body["transport"]["status"], 0, "{}", state.body);
}

#[test]
fn a_device_that_needs_a_reset_still_does_after_a_restore() {
    let home = TestLoop::new("io0", PollPolicy::OFF);
    let mut rig = Rig::new(VIA, Rng, Placement::Loop(home.handle.clone()), memory(4 << 20));
    rig.start(64, F_VERSION_1);
    rig.queues[0].offer(4000);
    rig.kick(0);
    assert_eq!(rig.interrupt(), Interrupt::Config);
    assert_ne!(rig.transport.status() & status::NEEDS_RESET, 0);
    let blocking = Blocking::on_this_thread().unwrap();
    let Rig { transport, mem, .. } = rig;
    let devices: [Arc<dyn Lifecycle>; 1] = [Arc::new(transport)];
    let paused = Paused::pause(&devices, &blocking, Duration::from_secs(5)).unwrap();
    let states = paused.save();
    let Rig { transport, .. } = Rig::new(VIA, Rng, Placement::Loop(home.handle.clone()), mem);
    let twin = Arc::new(transport);
    let twins: [Arc<dyn Lifecycle>; 1] = [twin.clone()];
    let paused = Paused::pause(&twins, &blocking, Duration::from_secs(5)).unwrap();
    twins[0].restore(&paused, &states[0]).unwrap();
    paused.resume();
    assert_ne!(twin.status() & status::NEEDS_RESET, 0);
}

#[test]
fn a_pause_in_the_middle_of_a_reset_holds_what_starts_after_it() {
    let home = TestLoop::new("io0", PollPolicy::OFF);
    let (rig, submitted) = slow(&home);
    let (port, slot) = submitted.recv().unwrap();
    rig.transport.set_status(0);
    let blocking = Blocking::on_this_thread().unwrap();
    let replies = rig.transport.pause();
    port.post(slot, 512);
    for (_, reply) in replies {
        reply.wait(&blocking).unwrap();
    }
    rig.reset();
    let mut rig = rig;
    rig.start(64, F_VERSION_1);
    add(&mut rig, 0);
    rig.kick(0);
    assert!(submitted.recv_timeout(Duration::from_millis(500)).is_err(), "it is paused");
    rig.transport.resume();
    let (port, slot) = submitted.recv_timeout(Duration::from_secs(2)).unwrap();
    port.post(slot, 512);
}
