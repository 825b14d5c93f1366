//! Random accesses to the registers and rings of a device that runs: nothing panics, nothing hangs,
//! and after a reset the device serves an orderly driver. The seed is printed on failure;
//! `HEDDLE_SEED` sets it.

use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::*};

use devices::block::raw::{Engine, Options, RawImage};
use devices::virtio::Mem;
use devices::virtio::blk::Blk;
use devices::virtio::seat::Placement;
use devices::virtio::testing::{Dice, Plugged, Rig, TestLoop, Via, memory};
use devices::virtio::transport::status;
use iothread::{PollPolicy, VcpuLoop};
use vm_memory::{Bytes, GuestAddress};

use crate::VIA;

/// Of one machine.
const ROUNDS: u64 = 80;
/// Of one round.
const STEPS: u64 = 300;

const QUEUES: u16 = 2;
const SECTORS: u64 = 512;
const MEMORY: u64 = 4 << 20;
/// Where the rig puts the rings.
const RINGS: u64 = 0x1000;
const RING: u64 = 0x8000;
const HEADER: u64 = 0x10_0000;
const DATA: u64 = 0x11_0000;
const STATUS: u64 = 0x12_0000;

/// A number that somebody may not have thought of.
fn odd(dice: &mut Dice) -> u64 {
    match dice.below(8) {
        0 => 0,
        1 => u64::MAX,
        2 => dice.below(8),
        3 => 1 << dice.below(64),
        4 => MEMORY - 32 + dice.below(64),
        5 => RINGS + dice.below(RING * u64::from(QUEUES)),
        6 => DATA + dice.below(0x1_0000),
        _ => dice.roll(),
    }
}

/// One access that no driver would make, or any might.
fn make_noise(device: &Plugged, mem: &Mem, dice: &mut Dice, vcpu: &mut VcpuLoop) {
    let (control, config, status, notify, page) = match VIA {
        Via::Pci => (56, 0x2000, 20, 0x3000, 0x4000),
        Via::Mmio => (0x100, 0x100, 0x70, 0x50, 0x1000),
    };
    let width = dice.of(&[4, 4, 4, 1, 2, 8]);
    let exit = &mut vcpu.exit();
    let value = odd(dice).to_le_bytes();
    match dice.below(100) {
        0..25 => device.poke(4 * dice.below(control / 4), &value[..width], exit),
        25..30 => device.poke(dice.below(page - 8), &value[..width], exit),
        30..40 => device.peek(dice.below(page - 8), &mut [0; 8][..width], exit),
        40..42 => device.poke(config + dice.below(64), &value[..width], exit),
        42..60 => {
            let queue = dice.of(&[0, 0, 1, 1, 2, 0x1_0000, u32::MAX]);
            let offset = if VIA == Via::Pci { u64::from(queue & 3) * 4 } else { 0 };
            device.poke(notify + offset, &queue.to_le_bytes()[..width.min(4)], exit);
        }
        60..62 => {
            let value: u32 = dice.of(&[0, 1, 3, 8, 11, 15, 15, 64, 128, 255, 0x100]);
            let width = if VIA == Via::Pci { 1 } else { 4 };
            device.poke(status, &value.to_le_bytes()[..width], exit);
        }
        _ => {
            let ring = RINGS + RING * dice.below(QUEUES.into());
            let at = match dice.below(4) {
                0 => ring + 16 * dice.below(64) + dice.of(&[0, 8, 12, 14]),
                1 => ring + 0x1000 + dice.below(64),
                2 => ring + dice.below(RING),
                _ => HEADER + dice.below(0x2_0000),
            };
            let len = dice.of(&[1, 2, 2, 4, 8]);
            mem.write_slice(&value[..len], GuestAddress(at)).unwrap();
        }
    }
}

/// Writes a block and reads it back, through each queue.
fn verify(rig: &mut Rig, fill: u8) {
    for (queue, ring) in (0..).zip(0..usize::from(QUEUES)) {
        for (kind, byte) in [(1u32, fill), (0, !fill)] {
            let mut header = [0; 16];
            header[..4].copy_from_slice(&kind.to_le_bytes());
            rig.mem.write_slice(&header, GuestAddress(HEADER)).unwrap();
            rig.mem.write_slice(&[byte; 512], GuestAddress(DATA)).unwrap();
            rig.mem.write_obj(0xaau8, GuestAddress(STATUS)).unwrap();
            let chain = [(HEADER, 16, false), (DATA, 512, kind == 0), (STATUS, 1, true)];
            rig.queues[ring].add(&chain).unwrap();
            rig.kick(queue);
            assert_eq!(rig.used(queue).1, if kind == 0 { 513 } else { 1 });
            assert_eq!(rig.mem.read_obj::<u8>(GuestAddress(STATUS)).unwrap(), 0);
        }
        let mut read = [0; 512];
        rig.mem.read_slice(&mut read, GuestAddress(DATA)).unwrap();
        assert_eq!(read, [fill; 512]);
    }
}

/// How often the device was found in need of a reset.
fn machine(seed: u64, placement: Placement<iothread::LoopHandle>, engine: Engine) -> u64 {
    let file = tempfile::tempfile().unwrap();
    file.set_len(SECTORS * 512).unwrap();
    let options = Options { engine, read_only: false, direct: false };
    let image = RawImage::from_file(file, options).unwrap();
    let blk = Blk::new(Arc::new(image), "noise", QUEUES, 64);
    let mut rig = Rig::new(VIA, blk, placement, memory(MEMORY as usize));
    let mut broken = 0;
    for round in 0..ROUNDS {
        rig.start(64, !0);
        verify(&mut rig, round as u8);
        assert_eq!(rig.transport.status() & status::NEEDS_RESET, 0);
        let (device, mem, done) = (&rig.transport, &rig.mem, &AtomicBool::new(false));
        std::thread::scope(|scope| {
            let race = move || {
                let (mut dice, mut vcpu) = (Dice::new(!seed ^ round << 8), VcpuLoop::enter());
                while !done.load(Relaxed) {
                    make_noise(device, mem, &mut dice, &mut vcpu);
                }
            };
            let second = (round % 4 == 3).then(|| scope.spawn(race));
            let first = scope.spawn(move || {
                let (mut dice, mut vcpu) = (Dice::new(seed ^ round << 8), VcpuLoop::enter());
                for _ in 0..STEPS {
                    make_noise(device, mem, &mut dice, &mut vcpu);
                }
            });
            let ended = first.join();
            done.store(true, Relaxed);
            ended.unwrap();
            second.into_iter().for_each(|second| second.join().unwrap());
        });
        broken += u64::from(rig.transport.status() & status::NEEDS_RESET != 0);
        rig.reset();
    }
    broken
}

#[test]
fn noise_is_survived() {
    let seed = match std::env::var("HEDDLE_SEED") {
        Ok(seed) => seed.parse().expect("HEDDLE_SEED is a number"),
        Err(_) => RandomState::new().hash_one(0),
    };
    println!("HEDDLE_SEED={seed}");
    let mut broken = 0;
    for poll in [PollPolicy::OFF, PollPolicy::default()] {
        let home = TestLoop::new("noise", poll);
        for engine in [Engine::IoUring, Engine::Sync] {
            broken += machine(seed, Placement::Loop(home.handle.clone()), engine);
            broken += machine(seed, Placement::Vcpu { home: home.handle.clone() }, engine);
        }
    }
    assert!(broken > 20, "it was in need of a reset only {broken} times");
}
