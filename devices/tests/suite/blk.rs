//! virtio-blk, driven by a guest in this process, in every placement and with every engine.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::mpsc::Receiver;
use std::time::Duration;

use devices::block::raw::{Engine, Options, RawImage};
use devices::device::{Lifecycle, PauseError, Paused};
use devices::virtio::blk::Blk;
use devices::virtio::seat::Placement;
use devices::virtio::testing::{Interrupt, Rig, Scripted, TestLoop, memory};
use devices::virtio::transport::status;
use devices::virtio::{F_EVENT_IDX, F_INDIRECT_DESC, F_VERSION_1};
use iothread::{Blocking, LoopHandle, PollPolicy, Port};
use vm_memory::{Bytes, GuestAddress};

use crate::VIA;

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;

const OK: u8 = 0;
const IOERR: u8 = 1;
const UNSUPP: u8 = 2;

const SECTORS: u64 = 2048;
const HEADER: u64 = 0x10_0000;
const DATA: u64 = 0x11_0000;
const STATUS: u64 = 0x12_0000;

const PLAIN: u64 = F_VERSION_1 | 1 << 9;
const ALL: u64 = !0;

fn image() -> File {
    let file = tempfile::tempfile().unwrap();
    file.set_len(SECTORS * 512).unwrap();
    file
}

fn options(engine: Engine) -> Options {
    Options { engine, read_only: false, direct: false }
}

fn disk(file: &File, options: Options, queues: u16) -> Blk {
    let image = RawImage::from_file(file.try_clone().unwrap(), options).unwrap();
    Blk::new(Arc::new(image), "test-disk", queues, 256)
}

/// Writes a request's header, and its status as something no device answers.
fn prepare(rig: &Rig, slot: u64, kind: u32, sector: u64) {
    let mut header = [0; 16];
    header[..4].copy_from_slice(&kind.to_le_bytes());
    header[8..].copy_from_slice(&sector.to_le_bytes());
    rig.mem.write_slice(&header, GuestAddress(HEADER + slot * 16)).unwrap();
    rig.mem.write_obj(0xaau8, GuestAddress(STATUS + slot)).unwrap();
}

/// Sends one request through queue 0 and waits for it; its status and written bytes.
fn request(rig: &mut Rig, kind: u32, sector: u64, data: &[(u64, u32, bool)]) -> (u8, u32) {
    prepare(rig, 0, kind, sector);
    let mut chain = vec![(HEADER, 16, false)];
    chain.extend_from_slice(data);
    chain.push((STATUS, 1, true));
    let head = rig.queues[0].add(&chain).unwrap();
    rig.kick(0);
    let (used, written) = rig.used(0);
    assert_eq!(used, head);
    (rig.mem.read_obj(GuestAddress(STATUS)).unwrap(), written)
}

fn everywhere(test: impl Fn(Placement<LoopHandle>, Engine, u64)) {
    for poll in [PollPolicy::OFF, PollPolicy::default()] {
        let home = TestLoop::new("io0", poll);
        for placement in
            [Placement::Loop(home.handle.clone()), Placement::Vcpu { home: home.handle.clone() }]
        {
            for engine in [Engine::IoUring, Engine::Sync] {
                for features in [PLAIN, PLAIN | F_EVENT_IDX, PLAIN | F_INDIRECT_DESC, ALL] {
                    test(placement.clone(), engine, features);
                }
            }
        }
    }
}

#[test]
fn what_was_written_is_in_the_image_and_is_read_back() {
    everywhere(|placement, engine, features| {
        let file = image();
        let mut rig = Rig::new(VIA, disk(&file, options(engine), 1), placement, memory(4 << 20));
        rig.start(64, features);
        for round in 0..20u64 {
            let pattern: Vec<u8> = (0..1024).map(|n| (n as u8).wrapping_add(round as u8)).collect();
            rig.mem.write_slice(&pattern, GuestAddress(DATA)).unwrap();
            let parts = [(DATA, 100, false), (DATA + 100, 924, false)];
            assert_eq!(request(&mut rig, OUT, round * 2, &parts), (OK, 1));
            let mut stored = [0; 1024];
            file.read_exact_at(&mut stored, round * 1024).unwrap();
            assert_eq!(stored, pattern[..]);
            let back = [(DATA + 0x2000, 1024, true)];
            assert_eq!(request(&mut rig, IN, round * 2, &back), (OK, 1025));
            let mut read = [0; 1024];
            rig.mem.read_slice(&mut read, GuestAddress(DATA + 0x2000)).unwrap();
            assert_eq!(read, pattern[..]);
        }
        assert_eq!(request(&mut rig, FLUSH, 0, &[]), (OK, 1));
        rig.reset();
    });
}

#[test]
fn a_full_ring_is_served_without_loss() {
    everywhere(|placement, engine, features| {
        let file = image();
        let mut rig = Rig::new(VIA, disk(&file, options(engine), 1), placement, memory(4 << 20));
        rig.start(256, features);
        let (mut sent, mut back) = (0, 0);
        while back < 1000 {
            while sent < 1000 {
                let slot = sent % 256;
                prepare(&rig, slot, OUT, sent);
                let chain = [
                    (HEADER + slot * 16, 16, false),
                    (DATA + slot * 16, 512, false),
                    (STATUS + slot, 1, true),
                ];
                if rig.queues[0].add(&chain).is_none() {
                    break;
                }
                sent += 1;
            }
            rig.kick(0);
            rig.used(0);
            back += 1;
        }
        rig.reset();
    });
}

#[test]
fn queues_that_share_a_loop_are_all_served() {
    everywhere(|placement, engine, features| {
        const QUEUES: u16 = 4;
        let file = image();
        let mut rig =
            Rig::new(VIA, disk(&file, options(engine), QUEUES), placement, memory(4 << 20));
        rig.start(64, features);
        for round in 0..20 {
            for queue in 0..QUEUES {
                let slot = u64::from(queue);
                prepare(&rig, slot, IN, round);
                let data = (DATA + slot * 512, 512, true);
                let chain = [(HEADER + slot * 16, 16, false), data, (STATUS + slot, 1, true)];
                rig.queues[usize::from(queue)].add(&chain).unwrap();
            }
            rig.kick_all(0..QUEUES);
            for queue in 0..QUEUES {
                assert_eq!(rig.used(queue).1, 513);
            }
        }
    });
}

#[test]
fn while_a_request_is_in_flight_the_driver_need_not_kick_and_its_completion_finds_the_next() {
    for features in [PLAIN, PLAIN | F_EVENT_IDX] {
        let home = TestLoop::new("io0", PollPolicy::OFF);
        let (mut rig, submitted) = slow_rig(&home, features);
        let (port, slot) = submitted.recv().unwrap();
        home.handle.barrier().wait(&Blocking::on_this_thread().unwrap()).unwrap();
        prepare(&rig, 1, IN, 0);
        let second = [(HEADER + 16, 16, false), (DATA, 512, true), (STATUS + 1, 1, true)];
        rig.queues[0].add(&second).unwrap();
        assert!(!rig.kick(0), "a kick with features {features:x}");
        port.post(slot, 512);
        let (port, slot) = submitted.recv_timeout(Duration::from_secs(30)).expect("found it");
        assert_eq!(rig.used(0).1, 513);
        port.post(slot, 512);
        assert_eq!(rig.used(0).1, 513);
        home.handle.barrier().wait(&Blocking::on_this_thread().unwrap()).unwrap();
        prepare(&rig, 2, IN, 0);
        let third = [(HEADER + 32, 16, false), (DATA, 512, true), (STATUS + 2, 1, true)];
        rig.queues[0].add(&third).unwrap();
        assert!(rig.kick(0), "idle again: kicks are wanted with features {features:x}");
        let (port, slot) = submitted.recv().unwrap();
        port.post(slot, 512);
    }
}

#[test]
fn requests_that_cannot_be_are_answered_and_the_queue_lives() {
    let home = TestLoop::new("io0", PollPolicy::OFF);
    let file = image();
    let blk = disk(&file, options(Engine::Sync), 1);
    let mut rig = Rig::new(VIA, blk, Placement::Loop(home.handle.clone()), memory(4 << 20));
    rig.start(64, PLAIN);
    let read = |len| [(DATA, len, true)];
    assert_eq!(request(&mut rig, 77, 0, &[]), (UNSUPP, 1));
    assert_eq!(request(&mut rig, IN, SECTORS, &read(512)), (IOERR, 1));
    assert_eq!(request(&mut rig, IN, SECTORS - 1, &read(1024)), (IOERR, 1));
    assert_eq!(request(&mut rig, IN, u64::MAX, &read(512)), (IOERR, 1));
    assert_eq!(request(&mut rig, IN, 0, &read(511)), (IOERR, 1));
    assert_eq!(request(&mut rig, OUT, 0, &[(u64::MAX - 100, 512, false)]), (IOERR, 1));
    assert_eq!(request(&mut rig, IN, 0, &[(3 << 20, 2 << 20, true)]), (IOERR, 1));
    assert_eq!(request(&mut rig, IN, SECTORS - 1, &read(512)), (OK, 513));
    assert_eq!(request(&mut rig, GET_ID, 0, &read(20)), (OK, 21));
    let id: [u8; 20] = rig.mem.read_obj(GuestAddress(DATA)).unwrap();
    assert_eq!(&id, b"test-disk\0\0\0\0\0\0\0\0\0\0\0");
}

#[test]
fn a_read_only_disk_refuses_writes() {
    let home = TestLoop::new("io0", PollPolicy::OFF);
    let file = image();
    let read_only = Options { read_only: true, ..options(Engine::IoUring) };
    let mut rig = Rig::new(
        VIA,
        disk(&file, read_only, 1),
        Placement::Loop(home.handle.clone()),
        memory(4 << 20),
    );
    rig.start(64, ALL);
    assert_ne!(rig.features & 1 << 5, 0, "VIRTIO_BLK_F_RO");
    assert_eq!(request(&mut rig, OUT, 0, &[(DATA, 512, false)]), (IOERR, 1));
    assert_eq!(request(&mut rig, IN, 0, &[(DATA, 512, true)]), (OK, 513));
}

#[test]
fn header_and_status_may_be_split_anywhere() {
    let home = TestLoop::new("io0", PollPolicy::OFF);
    let file = image();
    file.write_all_at(&[7; 512], 512).unwrap();
    let blk = disk(&file, options(Engine::IoUring), 1);
    let mut rig = Rig::new(VIA, blk, Placement::Loop(home.handle.clone()), memory(4 << 20));
    rig.start(64, PLAIN);
    prepare(&rig, 0, IN, 1);
    // The status byte is the last of the one writable descriptor.
    let chain =
        [(HEADER, 3, false), (HEADER + 3, 0, false), (HEADER + 3, 13, false), (DATA, 513, true)];
    rig.queues[0].add(&chain).unwrap();
    rig.kick(0);
    assert_eq!(rig.used(0).1, 513);
    let data: [u8; 32] = rig.mem.read_obj(GuestAddress(DATA + 512 - 31)).unwrap();
    assert_eq!((data[30], data[31]), (7, OK));
}

#[test]
fn an_image_that_shrinks_fails_requests_and_nothing_else() {
    everywhere(|placement, engine, features| {
        let file = image();
        let mut rig = Rig::new(VIA, disk(&file, options(engine), 1), placement, memory(4 << 20));
        rig.start(64, features);
        file.set_len(1536).unwrap();
        assert_eq!(request(&mut rig, IN, 100, &[(DATA, 512, true)]).0, IOERR);
        assert_eq!(request(&mut rig, IN, 2, &[(DATA, 1024, true)]).0, IOERR, "half of it is left");
        assert_eq!(request(&mut rig, IN, 0, &[(DATA, 512, true)]), (OK, 513));
    });
}

#[test]
fn a_broken_chain_retires_its_queue_alone_until_a_reset() {
    type Break = fn(&mut Rig);
    let breaks: [Break; 6] = [
        |rig| rig.queues[0].offer(4000), // no such descriptor
        |rig| {
            let table = rig.queues[0].addresses().descriptors;
            rig.queues[0].descriptor(table, 0, (HEADER, 16, false), Some(0), 0); // a loop
            rig.queues[0].offer(0);
        },
        |rig| {
            let table = rig.queues[0].addresses().descriptors;
            rig.queues[0].descriptor(table, 0, (HEADER, 16, false), Some(999), 0);
            rig.queues[0].offer(0);
        },
        |rig| assert!(rig.queues[0].add(&[(HEADER, 16, false), (DATA, 512, false)]).is_some()), // no status
        |rig| assert!(rig.queues[0].add(&[(HEADER, 15, false), (STATUS, 1, true)]).is_some()),
        |rig| {
            let table = rig.queues[0].addresses().descriptors;
            rig.queues[0].descriptor(table, 0, (u64::MAX - 15, 64, false), None, 4); // indirect
            rig.queues[0].offer(0);
        },
    ];
    let home = TestLoop::new("io0", PollPolicy::OFF);
    for (nth, break_it) in breaks.into_iter().enumerate() {
        let file = image();
        let blk = disk(&file, options(Engine::IoUring), 2);
        let mut rig = Rig::new(VIA, blk, Placement::Loop(home.handle.clone()), memory(4 << 20));
        rig.start(64, PLAIN);
        break_it(&mut rig);
        rig.kick(0);
        assert_eq!(rig.interrupt(), Interrupt::Config, "{nth}: a configuration interrupt");
        assert_ne!(rig.transport.status() & status::NEEDS_RESET, 0, "{nth}");
        prepare(&rig, 1, IN, 0);
        rig.queues[1]
            .add(&[(HEADER + 16, 16, false), (DATA, 512, true), (STATUS + 1, 1, true)])
            .unwrap();
        rig.kick(1);
        assert_eq!(rig.used(1).1, 513, "{nth}: the other queue lives");
        rig.reset();
        rig.start(64, PLAIN);
        assert_eq!(rig.transport.status() & status::NEEDS_RESET, 0, "{nth}");
        assert_eq!(request(&mut rig, IN, 0, &[(DATA, 512, true)]), (OK, 513), "{nth}");
        rig.reset();
    }
}

#[test]
fn rings_outside_memory_need_a_reset() {
    let home = TestLoop::new("io0", PollPolicy::OFF);
    let file = image();
    let blk = disk(&file, options(Engine::IoUring), 1);
    let rig = Rig::new(VIA, blk, Placement::Loop(home.handle.clone()), memory(1 << 20));
    let transport = &rig.transport;
    transport.set_driver_features(F_VERSION_1);
    transport.set_status(3 | status::FEATURES_OK);
    transport.set_rings(0, |rings| {
        rings.descriptors = 0x1000;
        rings.available = (1 << 20) - 2;
        rings.used = !3;
    });
    transport.enable_queue(0);
    transport.set_status(15);
    assert_ne!(transport.status() & status::NEEDS_RESET, 0);
    rig.reset();
    assert_eq!(transport.status(), 0);
}

fn slow_rig(home: &TestLoop, features: u64) -> (Rig, Receiver<(Arc<Port>, u16)>) {
    let (backend, submitted) = Scripted::pending();
    let blk = Blk::new(Arc::new(backend), "slow", 1, 64);
    let mut rig = Rig::new(VIA, blk, Placement::Loop(home.handle.clone()), memory(4 << 20));
    rig.start(64, features);
    prepare(&rig, 0, IN, 0);
    rig.queues[0].add(&[(HEADER, 16, false), (DATA, 512, true), (STATUS, 1, true)]).unwrap();
    rig.kick(0);
    (rig, submitted)
}

#[test]
fn a_reset_is_over_only_when_nothing_is_in_flight() {
    let home = TestLoop::new("io0", PollPolicy::OFF);
    let (rig, submitted) = slow_rig(&home, PLAIN);
    let (port, slot) = submitted.recv().unwrap();
    let blocking = Blocking::on_this_thread().unwrap();
    rig.transport.set_status(0);
    home.handle.barrier().wait(&blocking).unwrap();
    assert_ne!(rig.transport.status(), 0, "a request is still with the backend");
    rig.transport.set_status(1);
    assert_ne!(rig.transport.status(), 1, "no new life before the old one is over");
    port.post(slot, 512);
    rig.reset();
    assert_eq!(rig.transport.status(), 0);
}

#[test]
fn a_pause_that_takes_too_long_names_the_queue_and_the_device_runs_on() {
    let home = TestLoop::new("io0", PollPolicy::OFF);
    let (mut rig, submitted) = slow_rig(&home, PLAIN);
    let (port, slot) = submitted.recv().unwrap();
    let blocking = Blocking::on_this_thread().unwrap();
    let Rig { transport, mem, .. } = rig;
    let devices: [Arc<dyn Lifecycle>; 1] = [Arc::new(transport)];
    let error = Paused::pause(&devices, &blocking, Duration::from_millis(5)).unwrap_err();
    assert!(matches!(error, PauseError { part, .. } if part == "disk.test:q0"));
    port.post(slot, 512);
    let paused = Paused::pause(&devices, &blocking, Duration::from_secs(30)).unwrap();
    assert_eq!(rig.queues[0].take_used().unwrap().1, 513, "it was finished first");
    assert_eq!(mem.read_obj::<u8>(GuestAddress(STATUS)).unwrap(), OK);
    paused.resume();
}

#[test]
fn a_paused_disk_is_saved_and_goes_on_elsewhere() {
    let home = TestLoop::new("io0", PollPolicy::default());
    let blocking = Blocking::on_this_thread().unwrap();
    let file = image();
    let place = || Placement::Loop(home.handle.clone());
    let mem = memory(4 << 20);
    let mut first = Rig::new(VIA, disk(&file, options(Engine::IoUring), 1), place(), mem.clone());
    first.start(64, ALL);
    for sector in 0..5 {
        assert_eq!(request(&mut first, OUT, sector, &[(DATA, 512, false)]), (OK, 1));
    }
    let Rig { transport, mut queues, features, .. } = first;
    let devices: [Arc<dyn Lifecycle>; 1] = [Arc::new(transport)];
    let paused = Paused::pause(&devices, &blocking, Duration::from_secs(30)).unwrap();
    // The driver goes on adding while the device stands still.
    let ring = &mut queues[0];
    mem.write_slice(&[9; 512], GuestAddress(DATA)).unwrap();
    mem.write_slice(&[1, 0, 0, 0, 0, 0, 0, 0, 9], GuestAddress(HEADER)).unwrap();
    ring.add(&[(HEADER, 16, false), (DATA, 512, false), (STATUS, 1, true)]).unwrap();
    let states = paused.save();
    assert!(ring.take_used().is_none());

    let mut second = Rig::new(VIA, disk(&file, options(Engine::IoUring), 1), place(), mem);
    second.queues = queues;
    second.features = features;
    let Rig { transport, queues, interrupts, mem, .. } = second;
    let twins: [Arc<dyn Lifecycle>; 1] = [Arc::new(transport)];
    let paused_twin = Paused::pause(&twins, &blocking, Duration::from_secs(30)).unwrap();
    let text = serde_json::to_string(&states[0]).unwrap();
    twins[0].restore(&paused_twin, &serde_json::from_str(&text).unwrap()).unwrap();
    assert!(twins[0].restore(&paused_twin, &states[0]).is_err(), "it is running already");
    assert_eq!(interrupts.count(), 0);
    paused_twin.resume();
    let mut queues = queues;
    queues[0].want_interrupt();
    while queues[0].take_used().is_none() {
        std::thread::yield_now();
    }
    assert_eq!(mem.read_obj::<u8>(GuestAddress(STATUS)).unwrap(), OK);
    let mut stored = [0; 512];
    file.read_exact_at(&mut stored, 9 * 512).unwrap();
    assert_eq!(stored, [9; 512]);
}

#[test]
fn what_is_no_file_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let fifo = directory.path().join("fifo");
    let path = std::ffi::CString::new(fifo.to_str().unwrap()).unwrap();
    #[expect(unsafe_code, reason = "mkfifo")]
    // SAFETY: a valid C string.
    let made = unsafe { libc::mkfifo(path.as_ptr(), 0o600) };
    assert_eq!(made, 0);
    for path in [directory.path(), &fifo, std::path::Path::new("/dev/null")] {
        let read_only = Options { read_only: true, ..options(Engine::Sync) };
        let error = RawImage::open(path, read_only).unwrap_err();
        assert!(error.to_string().contains("neither"), "{}: {error}", path.display());
    }
    let odd = directory.path().join("odd");
    std::fs::write(&odd, [0; 700]).unwrap();
    assert!(RawImage::open(&odd, options(Engine::Sync)).unwrap_err().to_string().contains("700"));
}
