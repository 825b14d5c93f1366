//! Millions of random accesses to virtio-pci devices: nothing panics, nothing hangs, and after a
//! reset the devices serve an orderly driver.
//!
//! Noise alone would never get past the feature bits, so a driver that mostly knows what it does
//! brings the devices up and uses them, and noise comes between its steps. The seed is printed on
//! failure; `HEDDLE_SEED` sets it.

mod driver;
mod noise;

use std::fs::File;
use std::hash::{BuildHasher, RandomState};
use std::os::unix::fs::FileExt;
use std::panic::resume_unwind;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::*};
use std::time::Duration;

use devices::block::raw::{Engine, Options, RawImage};
use devices::virtio::blk::Blk;
use devices::virtio::rng::Rng;
use devices::virtio::seat::Placement;
use devices::virtio::testing::{Board, Dice, TestLoop};
use devices::virtio::{F_EVENT_IDX, F_INDIRECT_DESC, F_VERSION_1, Mem};
use iothread::{PollPolicy, VcpuLoop};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use driver::{Device, Guest, Ring};

/// Accesses of one machine; every test has one for each of [`RUNS`].
const STEPS: u64 = 1_000_000;

/// Do loops poll, and is there a second vCPU?
const RUNS: [(bool, bool); 4] = [(false, false), (true, false), (false, true), (true, true)];

/// How long nothing may happen.
const PATIENCE: Duration = Duration::from_secs(30);

/// Guest memory: two pieces with a hole between them.
const PIECE: u64 = 1 << 20;
const SECOND: u64 = 4 << 20;

/// Where the driver has what.
const RINGS: u64 = 0x1_0000;
const RING: u64 = 0x4000;
const HEADERS: u64 = 0x7_0000;
const DATA: u64 = 0x8_0000;

/// The status byte and the buffers of slot `n`; a chain of the driver has 4 descriptors at most.
const CHAIN: u16 = 4;
const HEADER: u64 = 32;
const BUFFER: u64 = 1024;

const QUEUE_SIZE: u16 = 64;
/// What the driver's memory has room for.
const MOST: u16 = 256;
const SECTORS: u64 = 512;

/// Offsets in BAR 0.
const STATUS: u64 = 20;
const ISR: u64 = 0x1000;
const CONFIG: u64 = 0x2000;
const NOTIFY: u64 = 0x3000;

const DRIVER_OK: u8 = 4;
const FEATURES_OK: u8 = 8;
const NEEDS_RESET: u8 = 64;

/// Offsets in configuration space.
const COMMAND: u16 = 4;
const BARS: [u16; 2] = [0x10, 0x18];

/// Descriptor flags.
const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// What one test has seen, over all its machines.
#[derive(Default)]
struct Seen {
    steps: AtomicU64,
    running: AtomicU64,
    needs_reset: AtomicU64,
    completions: AtomicU64,
}

/// One machine: noise for a while, then an orderly driver.
fn machine(seen: &Seen, seed: u64, on_vcpu: bool, engine: Engine, polls: bool, racing: bool) {
    let poll = if polls { PollPolicy::default() } else { PollPolicy::OFF };
    let home = TestLoop::new("noise", poll);
    let placement = || match on_vcpu {
        true => Placement::Vcpu { home: home.handle.clone() },
        false => Placement::Loop(home.handle.clone()),
    };
    let pieces = [(GuestAddress(0), PIECE as usize), (GuestAddress(SECOND), PIECE as usize)];
    let mem = Arc::new(GuestMemoryMmap::from_ranges(&pieces).unwrap());
    let file = tempfile::tempfile().unwrap();
    file.set_len(SECTORS * 512).unwrap();
    let options = Options { engine, read_only: false, direct: false };
    let image = RawImage::from_file(file.try_clone().unwrap(), options).unwrap();
    let mut board = Board::new(mem);
    let blk = Blk::new(Arc::new(image), "noise", 2, QUEUE_SIZE);
    let slots = [
        (board.add("disk.noise", blk, placement()), 2, true),
        (board.add("rng", Rng, placement()), 1, false),
    ];
    let mut bases = (RINGS..).step_by(RING as usize);
    let devices = slots.map(|(address, queues, blk)| Device {
        slot: address.slot(),
        queues,
        blk,
        home: [0; 2],
        bars: [0; 2],
        msix: 0,
        rings: bases
            .by_ref()
            .take(queues.into())
            .map(|base| Ring { base, size: QUEUE_SIZE, added: 0, used: 0 })
            .collect(),
        event_idx: false,
        indirect: false,
        status: 0,
    });
    let until = seen.steps.load(Relaxed) + STEPS;
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let board = &board;
        let vcpu = scope.spawn(|| {
            let mut guest = Guest::new(board, seen, devices.to_vec(), seed);
            (0..devices.len()).for_each(|device| guest.find(device));
            let known = guest.devices.clone();
            let second = racing.then(|| {
                scope.spawn(|| {
                    let mut guest = Guest::new(board, seen, known, !seed);
                    while !done.load(Relaxed) {
                        guest.make_noise();
                    }
                    guest.vcpu.counters().completions.get()
                })
            });
            while seen.steps.load(Relaxed) < until {
                assert!(!home.is_finished(), "the loop has died");
                guest.noise = guest.dice.of(&[5, 20, 100, 500]);
                guest.live();
            }
            done.store(true, Relaxed);
            let others =
                second.map_or(0, |second| second.join().unwrap_or_else(|e| resume_unwind(e)));
            let counters = [guest.vcpu.counters(), home.handle.counters()];
            let completions: u64 = counters.iter().map(|counters| counters.completions.get()).sum();
            seen.completions.fetch_add(completions + others, Relaxed);
            (guest.noise, guest.orderly) = (0, true);
            guest.verify(&file);
        });
        if let Err(panic) = vcpu.join() {
            done.store(true, Relaxed);
            resume_unwind(panic);
        }
    });
}

fn seed() -> u64 {
    match std::env::var("HEDDLE_SEED") {
        Ok(seed) => seed.parse().expect("HEDDLE_SEED is a number"),
        Err(_) => RandomState::new().hash_one(0),
    }
}

/// Runs the machines on a thread of their own and sees to it that they get on.
fn survive(on_vcpu: bool, engine: Engine) {
    let seed = seed();
    let seen = Arc::new(Seen::default());
    let shared = Arc::clone(&seen);
    let worker = std::thread::spawn(move || {
        for (nth, (polls, racing)) in (0..).zip(RUNS) {
            machine(&shared, seed.wrapping_add(nth), on_vcpu, engine, polls, racing);
        }
    });
    let began = std::time::Instant::now();
    let (mut steps, mut moved) = (0, began);
    while !worker.is_finished() {
        std::thread::sleep(Duration::from_millis(20));
        let now = seen.steps.load(Relaxed);
        if now != steps {
            (steps, moved) = (now, std::time::Instant::now());
        }
        assert!(moved.elapsed() < PATIENCE, "hangs after {steps} steps: HEDDLE_SEED={seed}");
    }
    if let Err(panic) = worker.join() {
        eprintln!("after {steps} steps: HEDDLE_SEED={seed}");
        resume_unwind(panic);
    }
    let [steps, running, broken, completions] =
        [&seen.steps, &seen.running, &seen.needs_reset, &seen.completions].map(|n| n.load(Relaxed));
    println!(
        "{steps} steps in {:?}, running {running}, needs reset {broken}, completions {completions}",
        began.elapsed()
    );
    assert!(steps >= STEPS * RUNS.len() as u64);
    assert!(running > 1000, "seen running {running} times");
    assert!(broken > 500, "seen in need of a reset {broken} times");
    assert!(completions > 10_000, "{completions} completions");
}

#[test]
fn noise_at_loops_with_io_uring_is_survived() {
    survive(false, Engine::IoUring);
}

#[test]
fn noise_at_loops_with_system_calls_is_survived() {
    survive(false, Engine::Sync);
}

#[test]
fn noise_at_vcpus_with_io_uring_is_survived() {
    survive(true, Engine::IoUring);
}

#[test]
fn noise_at_vcpus_with_system_calls_is_survived() {
    survive(true, Engine::Sync);
}
