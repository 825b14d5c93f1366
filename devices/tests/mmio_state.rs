//! A virtio-mmio device's registers, doorbells and line, and how it is saved and goes on as another
//! instance.

use std::collections::BTreeSet;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

use devices::block::raw::{Engine, Options, RawImage};
use devices::bus::Bus;
use devices::device::{Lifecycle, Paused};
use devices::irq::{Doorbell, Doorbells, IrqEdge};
use devices::snapshot::Snapshot;
use devices::virtio::blk::Blk;
use devices::virtio::mmio::{SIZE, Socket, VirtioMmio};
use devices::virtio::pci::Slots;
use devices::virtio::seat::Placement;
use devices::virtio::testing::{Count, Ring, TestLoop, memory};
use devices::virtio::{F_VERSION_1, Mem};
use iothread::{Blocking, PollPolicy, VcpuLoop};
use vm_memory::{Bytes, GuestAddress};

const BASE: u64 = 0xfeb0_0000;
const HEADER: u64 = 0x10_0000;
const DATA: u64 = 0x11_0000;
const STATUS_BYTE: u64 = 0x12_0000;
const LIMIT: Duration = Duration::from_secs(30);
const QUEUE_SIZE: u32 = 64;

const DEVICE_FEATURES: u64 = 0x10;
const DEVICE_FEATURES_SEL: u64 = 0x14;
const DRIVER_FEATURES: u64 = 0x20;
const DRIVER_FEATURES_SEL: u64 = 0x24;
const QUEUE_SEL: u64 = 0x30;
const QUEUE_NUM_MAX: u64 = 0x34;
const QUEUE_NUM: u64 = 0x38;
const QUEUE_READY: u64 = 0x44;
const QUEUE_NOTIFY: u64 = 0x50;
const INTERRUPT_STATUS: u64 = 0x60;
const INTERRUPT_ACK: u64 = 0x64;
const STATUS: u64 = 0x70;
const QUEUE_DESC: u64 = 0x80;
const QUEUE_DRIVER: u64 = 0x90;
const QUEUE_DEVICE: u64 = 0xa0;
const CONFIG: u64 = 0x100;

struct Line(Sender<()>);

impl IrqEdge for Line {
    fn pulse(&self) {
        let _ = self.0.send(());
    }
}

/// Which doorbells are connected; none of them rings.
#[derive(Default)]
struct Connected(Snapshot<BTreeSet<Doorbell>>);

impl Doorbells for Connected {
    fn connect(&self, doorbell: Doorbell, _: BorrowedFd<'_>) -> std::io::Result<()> {
        self.0.rcu(|set| BTreeSet::from_iter(set.iter().copied().chain([doorbell])));
        Ok(())
    }
    fn disconnect(&self, doorbell: Doorbell, _: BorrowedFd<'_>) -> std::io::Result<()> {
        self.0.rcu(|set| BTreeSet::from_iter(set.iter().copied().filter(|it| *it != doorbell)));
        Ok(())
    }
}

/// One disk in one machine, as its driver sees it.
struct Machine {
    bus: Arc<Bus>,
    device: [Arc<dyn Lifecycle>; 1],
    doorbells: Arc<Connected>,
    edges: Receiver<()>,
    mem: Mem,
    vcpu: VcpuLoop,
}

impl Machine {
    fn new(placements: &[Placement<iothread::LoopHandle>], mem: &Mem) -> Self {
        let file = tempfile::tempfile().unwrap();
        file.set_len(1 << 20).unwrap();
        let options = Options { engine: Engine::IoUring, read_only: false, direct: false };
        let image = RawImage::from_file(file, options).unwrap();
        let queues = placements.len() as u16;
        let blk = Blk::new(Arc::new(image), "state", queues, QUEUE_SIZE as u16);
        let (bus, doorbells) = (Arc::<Bus>::default(), Arc::<Connected>::default());
        let (line, edges) = channel();
        let slots = Slots {
            bus: Arc::clone(&bus),
            msi: Arc::<Count>::default(),
            doorbells: Arc::clone(&doorbells) as _,
            mem: Arc::clone(mem),
        };
        let socket = Socket { base: BASE, line: Arc::new(Line(line)) };
        let device =
            VirtioMmio::new("disk.state", Arc::new(blk), placements, &slots, socket).unwrap();
        // Made on another thread, so that this one may block.
        let vcpu = std::thread::spawn(VcpuLoop::enter).join().unwrap();
        Self { bus, device: [Arc::new(device)], doorbells, edges, mem: Arc::clone(mem), vcpu }
    }

    /// A disk with this many queues, all served by a loop.
    fn at(home: &TestLoop, queues: usize, mem: &Mem) -> Self {
        Self::new(&vec![Placement::Loop(home.handle.clone()); queues], mem)
    }

    fn write(&mut self, register: u64, value: u32) {
        self.write_bytes(register, &value.to_le_bytes());
    }

    fn write_bytes(&mut self, register: u64, data: &[u8]) {
        assert!(self.bus.write(BASE + register, data, &mut self.vcpu.exit()));
    }

    fn read(&mut self, register: u64) -> u32 {
        u32::from_le_bytes(self.read_bytes(register, 4).try_into().unwrap())
    }

    fn read_bytes(&mut self, register: u64, len: usize) -> Vec<u8> {
        let mut data = vec![0xa5; len];
        assert!(self.bus.read(BASE + register, &mut data, &mut self.vcpu.exit()));
        data
    }

    /// Up to FEATURES_OK.
    fn agree(&mut self) {
        self.write(STATUS, 3);
        self.write(DRIVER_FEATURES_SEL, 1);
        self.write(DRIVER_FEATURES, (F_VERSION_1 >> 32) as u32);
        self.write(STATUS, 11);
        assert_eq!(self.read(STATUS), 11);
    }

    fn bring_up(&mut self, ring: &Ring) {
        self.agree();
        let at = ring.addresses();
        self.write(QUEUE_SEL, 0);
        self.write(QUEUE_NUM, at.size.into());
        for (register, address) in
            [(QUEUE_DESC, at.descriptors), (QUEUE_DRIVER, at.available), (QUEUE_DEVICE, at.used)]
        {
            self.write(register, address as u32);
            self.write(register + 4, (address >> 32) as u32);
        }
        self.write(QUEUE_READY, 1);
        self.write(STATUS, 15);
        assert_eq!(self.read(STATUS), 15);
    }

    fn edge(&self) {
        self.edges.recv_timeout(LIMIT).expect("an interrupt that never came");
    }

    fn add_read(&self, ring: &mut Ring, sector: u64) {
        let mut header = [0; 16];
        header[8..].copy_from_slice(&sector.to_le_bytes());
        self.mem.write_slice(&header, GuestAddress(HEADER)).unwrap();
        ring.add(&[(HEADER, 16, false), (DATA, 512, true), (STATUS_BYTE, 1, true)]).unwrap();
        ring.want_interrupt();
    }
}

fn home() -> TestLoop {
    TestLoop::new("io0", PollPolicy::OFF)
}

#[test]
fn the_registers_say_what_the_specification_wants() {
    let home = home();
    let mut it = Machine::at(&home, 3, &memory(4 << 20));
    let first: Vec<u32> = (0..4).map(|nth| it.read(4 * nth)).collect();
    assert_eq!(first, [u32::from_le_bytes(*b"virt"), 2, 2, 0x1af4]);
    for (select, bit) in [(0, 1 << 9), (1, 1), (2, 0)] {
        it.write(DEVICE_FEATURES_SEL, select);
        let features = it.read(DEVICE_FEATURES);
        assert_eq!((features & bit, features == 0), (bit, bit == 0), "half {select}");
    }
    for (queue, size) in [(0, QUEUE_SIZE), (2, QUEUE_SIZE), (3, 0), (1 << 16, 0), (u32::MAX, 0)] {
        it.write(QUEUE_SEL, queue);
        assert_eq!((it.read(QUEUE_NUM_MAX), it.read(QUEUE_READY)), (size, 0), "queue {queue}");
    }
    // Shared memory there is none; what is not there and what is only written reads as 0.
    for register in (0..CONFIG).step_by(4) {
        let expected = match register {
            0xb0..=0xbc => u32::MAX,
            0..=0xc | DEVICE_FEATURES | QUEUE_NUM_MAX => continue,
            _ => 0,
        };
        assert_eq!(it.read(register), expected, "{register:#x}");
    }
    assert_eq!(it.read(CONFIG), (1 << 20) / 512, "the capacity in sectors");
    assert_eq!(it.read_bytes(CONFIG + 1, 2), [8, 0], "configuration has any width");
    assert_eq!(it.read_bytes(SIZE - 8, 8), [0; 8]);
}

#[test]
fn accesses_of_the_wrong_width_read_0_and_write_nothing() {
    let home = home();
    let mut it = Machine::at(&home, 1, &memory(4 << 20));
    for (offset, len) in [(0, 1), (0, 2), (0, 8), (1, 4), (2, 2), (0x71, 1), (0xfe, 4), (0xfc, 8)] {
        assert_eq!(it.read_bytes(offset, len), vec![0; len], "{len} bytes at {offset:#x}");
    }
    for len in [1, 2, 8] {
        it.write_bytes(STATUS, &3u64.to_le_bytes()[..len]);
        it.write_bytes(STATUS - 1, &[0, 3, 0, 0]);
        assert_eq!(it.read(STATUS), 0);
    }
    it.write(STATUS, 0x103);
    assert_eq!(it.read(STATUS), 0, "only 8 bits of status are known");
    it.write(STATUS, 3);
    it.write(STATUS, 0x100);
    assert_eq!(it.read(STATUS), 3, "that is no reset");
}

#[test]
fn a_queue_can_be_taken_back_until_the_device_runs() {
    let home = home();
    let mem = memory(4 << 20);
    let mut it = Machine::at(&home, 1, &mem);
    let ring = Ring::new(&mem, 0x1000, QUEUE_SIZE as u16, F_VERSION_1);
    it.agree();
    it.write(QUEUE_READY, 1);
    assert_eq!(it.read(QUEUE_READY), 1);
    it.write(QUEUE_READY, 0);
    assert_eq!(it.read(QUEUE_READY), 0);
    it.bring_up(&ring);
    it.write(QUEUE_READY, 0);
    assert_eq!(it.read(QUEUE_READY), 1, "it runs on");
    it.write(STATUS, 0);
    assert_eq!((it.read(STATUS), it.read(QUEUE_READY)), (0, 0), "Linux looks only once");
}

#[test]
fn only_queues_at_loops_have_doorbells_each_with_its_number_until_the_device_is_gone() {
    let home = home();
    let (at_loop, at_vcpu) =
        (Placement::Loop(home.handle.clone()), Placement::Vcpu { home: home.handle.clone() });
    let it = Machine::new(&[at_loop.clone(), at_vcpu, at_loop], &memory(4 << 20));
    let doorbell = |queue| Doorbell { address: BASE + QUEUE_NOTIFY, value: Some(queue) };
    assert_eq!(**it.doorbells.0.load(), BTreeSet::from([doorbell(0), doorbell(2)]));
    let Machine { device, doorbells, bus, mut vcpu, .. } = it;
    drop(device);
    assert!(doorbells.0.load().is_empty());
    assert!(!bus.read(BASE, &mut [0; 4], &mut vcpu.exit()), "nothing answers any more");
}

#[test]
fn an_event_stays_in_the_status_until_it_is_acknowledged() {
    let home = home();
    let mem = memory(4 << 20);
    let mut it = Machine::at(&home, 2, &mem);
    let mut ring = Ring::new(&mem, 0x1000, QUEUE_SIZE as u16, F_VERSION_1);
    it.bring_up(&ring);
    it.write(QUEUE_NOTIFY, 2);
    it.write(QUEUE_NOTIFY, 1 << 16);
    it.add_read(&mut ring, 1);
    it.write(QUEUE_NOTIFY, 0);
    it.edge();
    assert_eq!(it.read(INTERRUPT_STATUS), 1);
    it.write(INTERRUPT_ACK, 2);
    assert_eq!(it.read(INTERRUPT_STATUS), 1, "another event was acknowledged");
    // An edge for each event, acknowledged or not.
    assert!(ring.take_used().is_some());
    it.add_read(&mut ring, 1);
    it.write(QUEUE_NOTIFY, 0);
    it.edge();
    it.write(INTERRUPT_ACK, 1);
    assert_eq!(it.read(INTERRUPT_STATUS), 0);
    ring.offer(4000);
    it.write(QUEUE_NOTIFY, 0);
    it.edge();
    assert_eq!((it.read(STATUS) & 64, it.read(INTERRUPT_STATUS)), (64, 2));
    it.write(STATUS, 0);
    assert_eq!((it.read(STATUS), it.read(INTERRUPT_STATUS)), (0, 0));
}

#[test]
fn a_reset_with_nothing_in_flight_is_over_when_its_write_is() {
    let home = home();
    let mem = memory(4 << 20);
    let mut it = Machine::at(&home, 1, &mem);
    for _ in 0..20 {
        let ring = Ring::new(&mem, 0x1000, QUEUE_SIZE as u16, F_VERSION_1);
        it.bring_up(&ring);
        it.write(STATUS, 0);
        it.write(STATUS, 1);
        assert_eq!(it.read(STATUS), 1, "a driver that goes on at once");
        it.write(STATUS, 0);
    }
}

#[test]
fn a_saved_device_goes_on_as_another_instance_where_it_stood() {
    let home = home();
    let blocking = Blocking::on_this_thread().unwrap();
    let mem = memory(4 << 20);
    let mut first = Machine::at(&home, 2, &mem);
    let mut ring = Ring::new(&mem, 0x1000, QUEUE_SIZE as u16, F_VERSION_1);
    first.bring_up(&ring);
    first.add_read(&mut ring, 1);
    first.write(QUEUE_NOTIFY, 0);
    first.edge();
    assert_eq!(ring.take_used().unwrap().1, 513);
    first.write(QUEUE_SEL, 1);

    let paused = Paused::pause(&first.device, &blocking, LIMIT).unwrap();
    let text = serde_json::to_string(&paused.save()[0]).unwrap();
    let mut second = Machine::at(&home, 2, &mem);
    let standing = Paused::pause(&second.device, &blocking, LIMIT).unwrap();
    let state = serde_json::from_str(&text).unwrap();
    second.device[0].restore(&standing, &state).unwrap();
    assert!(second.device[0].restore(&standing, &state).is_err(), "it is running already");
    second.device[0].resume();
    second.edge();
    assert_eq!(second.read(INTERRUPT_STATUS), 1, "it was not acknowledged");
    second.write(INTERRUPT_ACK, 1);
    assert_eq!((second.read(STATUS), second.read(QUEUE_READY)), (15, 0), "queue 1 is selected");
    second.write(QUEUE_SEL, 0);
    assert_eq!(second.read(QUEUE_READY), 1);
    second.add_read(&mut ring, 3);
    second.write(QUEUE_NOTIFY, 0);
    second.edge();
    assert_eq!(second.read(INTERRUPT_STATUS), 1);
    assert_eq!(ring.take_used().unwrap().1, 513);
}

#[test]
fn a_state_of_something_else_is_refused_and_changes_nothing() {
    let home = home();
    let blocking = Blocking::on_this_thread().unwrap();
    let mem = memory(4 << 20);
    let other = Machine::at(&home, 3, &mem);
    let good = Paused::pause(&other.device, &blocking, LIMIT).unwrap().save().remove(0);
    let mut bad_kind = good.clone();
    bad_kind.kind = "virtio-pci".to_owned();
    let mut bad_version = good.clone();
    bad_version.version = 2;
    let mut bad_body = good.clone();
    bad_body.body["interrupt_status"] = serde_json::json!("many");
    let mut bad_size = good.clone();
    bad_size.body["transport"]["queues"][0][0]["rings"]["size"] = 65.into();
    for (queues, state) in
        [(2, &good), (3, &bad_kind), (3, &bad_version), (3, &bad_body), (3, &bad_size)]
    {
        let machine = Machine::at(&home, queues, &mem);
        let standing = Paused::pause(&machine.device, &blocking, LIMIT).unwrap();
        let before = standing.save();
        let error = machine.device[0].restore(&standing, state).unwrap_err();
        assert_eq!(error.device, "disk.state");
        assert_eq!(standing.save(), before, "{error}");
        standing.resume();
    }
}
