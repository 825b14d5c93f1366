//! Work is done where the placement says, and nothing is lost, doubled or late: with several
//! vCPUs on one queue, around the start, in a storm of resets, and across pauses.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::*};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::{Scope, yield_now};
use std::time::{Duration, Instant};

use devices::block::raw::{Engine, Options, RawImage};
use devices::device::{Lifecycle, Paused};
use devices::virtio::blk::Blk;
use devices::virtio::seat::Placement;
use devices::virtio::testing::{Plugged, Rig, Ring, TestLoop, Via, memory};
use devices::virtio::transport::status;
use devices::virtio::{F_EVENT_IDX, F_VERSION_1, Mem};
use iothread::{Blocking, Counters, LoopHandle, PollPolicy, Strand, VcpuLoop};
use vm_memory::{Bytes, GuestAddress};

use crate::VIA;

const IN: u32 = 0;
const OUT: u32 = 1;
const OK: u8 = 0;

/// How long something that must happen may take.
const PATIENCE: Duration = Duration::from_secs(30);

const SECTORS: u64 = 8192;
const BLOCK: u64 = 4096;
const HEADERS: u64 = 0x10_0000;
const STATUS: u64 = 0x12_0000;
const DATA: u64 = 0x20_0000;
const MEMORY: usize = 8 << 20;

const ALL: u64 = !0;

fn disk(file: &File, engine: Engine, queues: u16) -> Blk {
    let options = Options { engine, read_only: false, direct: false };
    let image = RawImage::from_file(file.try_clone().unwrap(), options).unwrap();
    Blk::new(Arc::new(image), "test", queues, 256)
}

fn image() -> File {
    let file = tempfile::tempfile().unwrap();
    file.set_len(SECTORS * 512).unwrap();
    file
}

fn placements(home: &LoopHandle) -> [Placement<LoopHandle>; 2] {
    [Placement::Loop(home.clone()), Placement::Vcpu { home: home.clone() }]
}

fn everywhere(test: impl Fn(&TestLoop, Placement<LoopHandle>, Engine)) {
    for poll in [PollPolicy::OFF, PollPolicy::default()] {
        let home = TestLoop::new("io0", poll);
        for placement in placements(&home.handle) {
            for engine in [Engine::IoUring, Engine::Sync] {
                test(&home, placement.clone(), engine);
            }
        }
    }
}

/// Puts a request of one block into the ring, its buffers those of `slot`; false: it is full.
fn add(mem: &Mem, ring: &mut Ring, slot: u64, kind: u32, block: u64) -> bool {
    let mut header = [0; 16];
    header[..4].copy_from_slice(&kind.to_le_bytes());
    header[8..].copy_from_slice(&(block * (BLOCK / 512)).to_le_bytes());
    mem.write_slice(&header, GuestAddress(HEADERS + 16 * slot)).unwrap();
    mem.write_obj(0xaau8, GuestAddress(STATUS + slot)).unwrap();
    let data = (DATA + BLOCK * slot, BLOCK as u32, kind == IN);
    ring.add(&[(HEADERS + 16 * slot, 16, false), data, (STATUS + slot, 1, true)]).is_some()
}

/// A vCPU thread that kicks when it is told to.
struct Kicker {
    counters: Arc<Counters>,
    orders: Sender<u16>,
    done: Receiver<()>,
}

impl Kicker {
    fn new<'scope>(scope: &'scope Scope<'scope, '_>, transport: &'scope Plugged) -> Self {
        let (orders, received) = channel();
        let (say, done) = channel();
        let (tell, told) = channel();
        scope.spawn(move || {
            let mut vcpu = VcpuLoop::enter();
            tell.send(Arc::clone(vcpu.counters())).unwrap();
            for queue in received {
                transport.notify(queue, &mut vcpu.exit());
                say.send(()).unwrap();
            }
        });
        Self { counters: told.recv().unwrap(), orders, done }
    }

    fn kick(&self, queue: u16) {
        self.orders.send(queue).unwrap();
        self.done.recv_timeout(PATIENCE).unwrap();
    }
}

/// Takes used entries until there are `count`, or none for too long.
fn collect(ring: &mut Ring, count: u64) {
    let (mut back, mut last) = (0, Instant::now());
    while back < count {
        match ring.take_used() {
            Some(_) => (back, last) = (back + 1, Instant::now()),
            None => yield_now(),
        }
        assert!(last.elapsed() < PATIENCE, "{back} of {count} requests came back");
    }
}

/// What a thread has done: kicks, requests taken, operations submitted to a ring and reaped from
/// it, requests completed.
fn work(counters: &Counters) -> [u64; 5] {
    let Counters { kicks, requests, ring_submits, ring_completions, completions, .. } = counters;
    [kicks, requests, ring_submits, ring_completions, completions].map(|counter| counter.get())
}

#[test]
fn every_thread_does_what_its_placement_says_and_no_more() {
    const N: u64 = 100;
    for (on_vcpu, engine, at_vcpu, at_home) in [
        (false, Engine::Sync, [0; 5], [N, N, 0, 0, N]),
        (false, Engine::IoUring, [0; 5], [N; 5]),
        (true, Engine::Sync, [N, N, 0, 0, N], [0; 5]),
        (true, Engine::IoUring, [N, N, 0, 0, 0], [0, 0, N, N, N]),
    ] {
        let home = TestLoop::new("io0", PollPolicy::OFF);
        let other = TestLoop::new("io1", PollPolicy::OFF);
        let blocking = Blocking::on_this_thread().unwrap();
        let quiet = || home.handle.barrier().wait(&blocking).unwrap();
        let [at_loop, at_submitter] = placements(&home.handle);
        let placement = if on_vcpu { at_submitter } else { at_loop };
        let mut rig = Rig::new(VIA, disk(&image(), engine, 1), placement, memory(MEMORY));
        rig.start(64, F_VERSION_1);
        (0..3).for_each(|_| quiet()); // the first kick is that of the start
        let before = work(home.handle.counters());
        let Rig { transport, mut queues, mem, .. } = rig;
        std::thread::scope(|scope| {
            let vcpu = Kicker::new(scope, &transport);
            for n in 0..N {
                assert!(add(&mem, &mut queues[0], 0, [IN, OUT][n as usize % 2], n));
                assert!(queues[0].wants_kick(), "nothing is in flight");
                vcpu.kick(0);
                collect(&mut queues[0], 1);
                quiet(); // it has asked for kicks again
            }
            assert_eq!(work(&vcpu.counters), at_vcpu, "the vCPU, {engine:?}");
        });
        let after = work(home.handle.counters());
        let done: Vec<_> = after.iter().zip(before).map(|(after, before)| after - before).collect();
        assert_eq!(done, at_home, "the home loop, on_vcpu {on_vcpu}, {engine:?}");
        assert_eq!(work(other.handle.counters()), [0; 5], "a loop that serves nothing");
    }
}

#[test]
#[expect(clippy::disallowed_types, reason = "a driver takes a lock around its ring")]
fn vcpus_that_kick_one_queue_at_once_lose_nothing() {
    const EACH: u64 = 1000;
    const VCPUS: u64 = 4;
    everywhere(|home, placement, engine| {
        for features in [F_VERSION_1, F_VERSION_1 | F_EVENT_IDX] {
            let began = work(home.handle.counters());
            let mut rig =
                Rig::new(VIA, disk(&image(), engine, 1), placement.clone(), memory(MEMORY));
            rig.start(64, features);
            let Rig { transport, mut queues, mem, .. } = rig;
            let ring = std::sync::Mutex::new((queues.remove(0), 0u64, 0u64));
            let vcpu = || {
                let mut vcpu = VcpuLoop::enter();
                let (mut left, mut last) = (EACH, Instant::now());
                while left > 0 {
                    let mut guard = ring.lock().unwrap();
                    let (ring, added, back) = &mut *guard;
                    let fits = add(&mem, ring, *added % 64, IN, *added % 1000);
                    let kick = fits && ring.wants_kick();
                    if fits {
                        (*added, left, last) = (*added + 1, left - 1, Instant::now());
                    } else {
                        *back += std::iter::from_fn(|| ring.take_used()).count() as u64;
                    }
                    drop(guard);
                    if kick {
                        transport.notify(0, &mut vcpu.exit());
                    }
                    if !fits {
                        assert!(last.elapsed() < PATIENCE, "the queue is stuck");
                        yield_now();
                    }
                }
                work(vcpu.counters())
            };
            let vcpus: Vec<_> = std::thread::scope(|scope| {
                let vcpus: Vec<_> = (0..VCPUS).map(|_| scope.spawn(vcpu)).collect();
                vcpus.into_iter().map(|vcpu| vcpu.join().unwrap()).collect()
            });
            let (mut ring, added, back) = ring.into_inner().unwrap();
            collect(&mut ring, added - back);
            assert_eq!(ring.take_used(), None, "nothing came back twice");
            stop(&transport);
            let ended = work(home.handle.counters());
            let sum = |nth: usize| {
                vcpus.iter().map(|vcpu| vcpu[nth]).sum::<u64>() + ended[nth] - began[nth]
            };
            assert_eq!((sum(1), sum(4)), (VCPUS * EACH, VCPUS * EACH), "requests, completions");
        }
    });
}

#[test]
fn a_kick_rings_the_doorbell_of_its_queue_at_a_loop_and_takes_an_exit_at_a_vcpu() {
    let home = TestLoop::new("io0", PollPolicy::OFF);
    let blocking = Blocking::on_this_thread().unwrap();
    for (placement, rings) in placements(&home.handle).into_iter().zip([true, false]) {
        let blk = disk(&image(), Engine::Sync, 3);
        let mut rig = Rig::new(VIA, blk, placement, memory(MEMORY));
        rig.start(64, F_VERSION_1);
        (0..3).for_each(|_| home.handle.barrier().wait(&blocking).unwrap());
        let Rig { transport, mut queues, mem, .. } = rig;
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let mut vcpu = VcpuLoop::enter();
                for queue in [2, 0, 1] {
                    for (slot, ring) in queues.iter_mut().enumerate() {
                        assert!(add(&mem, ring, slot as u64, IN, 0));
                    }
                    assert_eq!(transport.ring(queue, &mut vcpu.exit()), rings);
                    collect(&mut queues[usize::from(queue)], 1);
                    for (nth, ring) in (0..).zip(&mut queues) {
                        assert_eq!(ring.take_used(), None, "queue {nth}, kicked was {queue}");
                        if nth != queue {
                            transport.notify(nth, &mut vcpu.exit());
                            collect(ring, 1);
                        }
                    }
                }
            });
        });
    }
}

/// Resets and waits until that is over; true: it had to wait.
fn stop(transport: &Plugged) -> bool {
    transport.set_status(0);
    let began = Instant::now();
    let mut waited = false;
    while transport.status() != 0 {
        waited = true;
        assert!(began.elapsed() < PATIENCE, "the reset never ends");
        yield_now();
    }
    waited
}

#[test]
fn a_kick_before_the_driver_is_ready_does_nothing_and_is_made_up_for_after() {
    everywhere(|home, placement, engine| {
        let blocking = Blocking::on_this_thread().unwrap();
        let Rig { transport, mem, .. } =
            Rig::new(VIA, disk(&image(), engine, 1), placement, memory(MEMORY));
        std::thread::scope(|scope| {
            let vcpu = Kicker::new(scope, &transport);
            for n in 0..100 {
                transport.set_driver_features(F_VERSION_1);
                transport.set_status(3 | status::FEATURES_OK);
                let mut ring = Ring::new(&mem, 0x1000, 64, F_VERSION_1);
                transport.set_rings(0, |rings| *rings = ring.addresses());
                transport.enable_queue(0);
                assert!(add(&mem, &mut ring, 0, IN, 0));
                vcpu.kick(0);
                home.handle.barrier().wait(&blocking).unwrap();
                assert_eq!(ring.take_used(), None, "before DRIVER_OK");
                transport.set_status(3 | status::FEATURES_OK | status::DRIVER_OK);
                if n % 2 == 0 {
                    assert!(add(&mem, &mut ring, 1, IN, 1));
                    vcpu.kick(0);
                }
                collect(&mut ring, 1 + u64::from(n % 2 == 0));
                stop(&transport);
            }
        });
    });
}

#[test]
fn resets_with_requests_in_flight_lose_nothing_and_touch_no_memory_afterwards() {
    const REQUESTS: u64 = 60;
    const RESETS: u64 = 40;
    const POISON: u8 = 0x5a;
    let waits = AtomicU64::new(0);
    everywhere(|home, placement, engine| {
        let blocking = Blocking::on_this_thread().unwrap();
        // Around the page cache, where that is possible: then requests take their time.
        let file = tempfile::NamedTempFile::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        file.as_file().write_all_at(&vec![0x11; (SECTORS * 512) as usize], 0).unwrap();
        let open =
            |direct| RawImage::open(file.path(), Options { engine, read_only: false, direct });
        let image = open(true).or_else(|_| open(false)).unwrap();
        let mut rig =
            Rig::new(VIA, Blk::new(Arc::new(image), "t", 1, 256), placement, memory(MEMORY));
        for n in 0..RESETS {
            let began = work(home.handle.counters());
            rig.start(256, ALL);
            let (mem, transport, ring) = (&rig.mem, &rig.transport, &mut rig.queues[0]);
            let block = |slot| (n * REQUESTS + slot) % (SECTORS * 512 / BLOCK);
            let fill = |slot: u64| (n + slot) as u8 | 0x80;
            for slot in 0..REQUESTS {
                let data = GuestAddress(DATA + BLOCK * slot);
                mem.write_slice(&[fill(slot); BLOCK as usize], data).unwrap();
                assert!(add(mem, ring, slot, [IN, OUT][slot as usize % 2], block(slot)));
            }
            let at_vcpu = std::thread::scope(|scope| {
                let vcpu = Kicker::new(scope, transport);
                vcpu.kick(0);
                (0..n % 8 * 20).for_each(|_| yield_now());
                waits.fetch_add(stop(transport).into(), Relaxed);
                work(&vcpu.counters)
            });
            let interrupts = rig.interrupts.count();

            // What was taken is finished, and what was finished is done.
            let at_home = work(home.handle.counters());
            let sum = |nth: usize| at_vcpu[nth] + at_home[nth] - began[nth];
            let (requests, submits, reaps, completions) = (sum(1), sum(2), sum(3), sum(4));
            let mut back = 0;
            while let Some((head, written)) = ring.take_used() {
                back += 1;
                assert!(written == 1 || written == BLOCK as u32 + 1, "{head}: {written}");
            }
            assert_eq!((requests, completions), (back, back));
            assert_eq!(submits, reaps);
            for slot in 0..REQUESTS {
                let code: u8 = mem.read_obj(GuestAddress(STATUS + slot)).unwrap();
                assert!(matches!(code, OK | 0xaa), "slot {slot}: {code}");
                back -= u64::from(code == OK);
                if code == OK && slot % 2 == 1 {
                    let mut stored = [0; BLOCK as usize];
                    file.as_file().read_exact_at(&mut stored, block(slot) * BLOCK).unwrap();
                    assert!(stored == [fill(slot); BLOCK as usize], "slot {slot} was written");
                }
            }
            assert_eq!(back, 0, "as many on the used ring as were finished");

            let poisoned = [(0x1000, 0x8000), (STATUS, REQUESTS), (DATA, REQUESTS * BLOCK)];
            for (at, len) in poisoned {
                mem.write_slice(&vec![POISON; len as usize], GuestAddress(at)).unwrap();
            }
            home.handle.barrier().wait(&blocking).unwrap();
            (0..20).for_each(|_| yield_now());
            for (at, len) in poisoned {
                let mut bytes = vec![0; len as usize];
                mem.read_slice(&mut bytes, GuestAddress(at)).unwrap();
                assert!(bytes.iter().all(|&byte| byte == POISON), "reset {n}: {at:#x} changed");
            }
            assert_eq!(rig.interrupts.count(), interrupts, "after reset {n}");
        }
    });
    // Over MMIO the exit itself waits.
    let unseen = VIA == Via::Mmio;
    assert!(unseen || waits.into_inner() > 0, "no reset ever came upon a request in flight");
}

#[test]
fn a_request_whose_kick_is_queued_while_the_device_resumes_is_served() {
    let home = TestLoop::new("io0", PollPolicy::OFF);
    let blocking = Blocking::on_this_thread().unwrap();
    let placement = Placement::Loop(home.handle.clone());
    let mut rig = Rig::new(VIA, disk(&image(), Engine::Sync, 1), placement, memory(MEMORY));
    rig.start(64, F_VERSION_1);
    let Rig { transport, mut queues, mem, .. } = rig;
    transport.pause().into_iter().for_each(|(_, paused)| paused.wait(&blocking).unwrap());
    // Keep the loop where it is until both have arrived.
    let ((enter, entered), (leave, left)) = (channel(), channel::<()>());
    let gate = Strand::new("test", &home.handle, ());
    let through = gate.call(move |_, _| {
        enter.send(()).unwrap();
        left.recv().unwrap();
    });
    entered.recv().unwrap();
    std::thread::scope(|scope| {
        let vcpu = Kicker::new(scope, &transport);
        assert!(add(&mem, &mut queues[0], 0, IN, 0));
        vcpu.kick(0);
        transport.resume();
    });
    leave.send(()).unwrap();
    through.wait(&blocking).unwrap();
    collect(&mut queues[0], 1);
}

/// Lets other threads end when this one fails.
struct EndOnDrop<'a>(&'a AtomicBool);

impl Drop for EndOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Relaxed);
    }
}

#[test]
fn a_pause_under_load_stands_still_and_the_load_goes_on_after_it() {
    const PAUSES: u64 = 40;
    everywhere(|home, placement, engine| {
        let mut rig = Rig::new(VIA, disk(&image(), engine, 2), placement, memory(MEMORY));
        rig.start(64, ALL);
        let Rig { transport, queues, mem, .. } = rig;
        let used: Vec<_> = queues.iter().map(|ring| ring.addresses().used + 2).collect();
        let used = || -> Vec<u16> {
            used.iter().map(|at| mem.load(GuestAddress(*at), Acquire).unwrap()).collect()
        };
        let device = Arc::new(transport);
        let devices: [Arc<dyn Lifecycle>; 1] = [Arc::clone(&device) as _];
        let ending = AtomicBool::new(false);
        let (ending, mem, device) = (&ending, &mem, &device);
        std::thread::scope(|scope| {
            let mut vcpus = Vec::new();
            for (queue, mut ring) in (0u16..).zip(queues) {
                vcpus.push(scope.spawn(move || {
                    let mut vcpu = VcpuLoop::enter();
                    let (mut added, mut back) = (0, 0);
                    while !ending.load(Relaxed) {
                        let slot = u64::from(queue) * 64 + added % 64;
                        if add(mem, &mut ring, slot, [IN, OUT][added as usize % 2], added % 512) {
                            added += 1;
                            if ring.wants_kick() {
                                device.notify(queue, &mut vcpu.exit());
                            }
                        } else {
                            back += std::iter::from_fn(|| ring.take_used()).count() as u64;
                            yield_now();
                        }
                    }
                    collect(&mut ring, added - back);
                    assert_eq!(ring.take_used(), None, "nothing came back twice");
                }));
            }
            let end = EndOnDrop(ending);
            let blocking = Blocking::on_this_thread().unwrap();
            for _ in 0..PAUSES {
                let paused = Paused::pause(&devices, &blocking, PATIENCE).unwrap();
                let before = used();
                home.handle.barrier().wait(&blocking).unwrap();
                (0..20).for_each(|_| yield_now());
                assert_eq!(used(), before, "it stands still");
                paused.resume();
                let resumed = Instant::now();
                while used().iter().zip(&before).any(|(now, before)| now == before) {
                    assert!(resumed.elapsed() < PATIENCE, "it never goes on");
                    yield_now();
                }
            }
            drop(end);
            vcpus.into_iter().for_each(|vcpu| vcpu.join().unwrap());
        });
    });
}
