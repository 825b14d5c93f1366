//! A virtio-pci function is saved and goes on as another instance: rings, vectors, BARs.

use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Sender, TryRecvError, channel};
use std::time::Duration;

use devices::block::raw::{Engine, Options, RawImage};
use devices::bus::Bus;
use devices::device::{Lifecycle, Paused};
use devices::irq::{Doorbell, Doorbells, IrqLine, Msi, MsiSender, SharedLine};
use devices::pci::{BarSpace, Function};
use devices::virtio::blk::Blk;
use devices::virtio::pci::{Slots, VirtioPci};
use devices::virtio::seat::Placement;
use devices::virtio::testing::{Ring, TestLoop, memory};
use devices::virtio::{F_VERSION_1, Mem};
use iothread::{Blocking, PollPolicy, VcpuLoop};
use vm_memory::{Bytes, GuestAddress};

const HEADER: u64 = 0x10_0000;
const DATA: u64 = 0x11_0000;
const STATUS: u64 = 0x12_0000;
const MESSAGE: Msi = Msi { address: 0xfee0_1000, data: 0x41 };
/// Where the guest moves BAR 0 to.
const MOVED: u64 = 0xd800_0000;
/// Registers of configuration space.
const COMMAND: u16 = 1;
const BAR_0: u16 = 4;
const LIMIT: Duration = Duration::from_secs(30);

struct Messages(Sender<Msi>);

impl MsiSender for Messages {
    fn send(&self, msi: Msi) {
        self.0.send(msi).unwrap();
    }
}

struct NoDoorbells;

impl Doorbells for NoDoorbells {
    fn connect(&self, _: Doorbell, _: BorrowedFd<'_>) -> std::io::Result<()> {
        Err(std::io::ErrorKind::Unsupported.into())
    }
    fn disconnect(&self, _: Doorbell, _: BorrowedFd<'_>) -> std::io::Result<()> {
        Ok(())
    }
}

/// One disk in one machine, as its driver sees it.
struct Machine {
    bus: Arc<Bus>,
    device: [Arc<dyn Lifecycle>; 1],
    function: Arc<VirtioPci>,
    vcpu: VcpuLoop,
}

impl Machine {
    fn new(
        file: &std::fs::File,
        queues: u16,
        mem: &Mem,
        home: &TestLoop,
        to: &Sender<Msi>,
    ) -> Self {
        let options = Options { engine: Engine::IoUring, read_only: false, direct: false };
        let image = RawImage::from_file(file.try_clone().unwrap(), options).unwrap();
        let blk = Blk::new(Arc::new(image), "state", queues, 64);
        let bus = Arc::<Bus>::default();
        let slots = Slots {
            bus: Arc::clone(&bus),
            msi: Arc::new(Messages(to.clone())),
            doorbells: Arc::new(NoDoorbells),
            mem: Arc::clone(mem),
        };
        let placements = vec![Placement::Loop(home.handle.clone()); usize::from(queues)];
        let mut space = BarSpace::new(0xd000_0000, 0xe000_0000);
        let function =
            VirtioPci::new("disk.state", Arc::new(blk), &placements, &slots, &mut space).unwrap();
        let function = Arc::new(function);
        let device = [Arc::clone(&function) as Arc<dyn Lifecycle>];
        // Loops' threads run the callbacks; this thread may still block between its exits.
        Self { bus, device, function, vcpu: unblocked_vcpu() }
    }

    fn write(&mut self, address: u64, data: &[u8]) {
        assert!(self.bus.write(address, data, &mut self.vcpu.exit()), "nothing at {address:#x}");
    }

    fn read(&mut self, address: u64) -> u8 {
        let mut data = [0];
        assert!(
            self.bus.read(address, &mut data, &mut self.vcpu.exit()),
            "nothing at {address:#x}"
        );
        data[0]
    }

    fn enable_msix(&mut self, on: bool) {
        let exit = &mut self.vcpu.exit();
        let capability = msix_capability(&*self.function, exit);
        self.function.write_config(capability, u32::from(on) << 31, 0xffff_0000, exit);
    }

    /// Brings queue 0 up with interrupts by [`MESSAGE`], with BAR 0 moved to [`MOVED`].
    fn bring_up(&mut self, ring: &Ring) {
        self.enable_msix(true);
        let exit = &mut self.vcpu.exit();
        let msix_table = self.function.read_config(0x18 / 4, exit) & !0xf;
        self.function.write_config(BAR_0, MOVED as u32, !0, exit);
        let table = u64::from(msix_table) + 16; // vector 1
        self.write(table, &MESSAGE.address.to_le_bytes());
        self.write(table + 8, &MESSAGE.data.to_le_bytes());
        self.write(table + 12, &[0; 4]);
        self.write(MOVED + 20, &[3]);
        self.write(MOVED + 8, &1u32.to_le_bytes());
        self.write(MOVED + 12, &((F_VERSION_1 >> 32) as u32).to_le_bytes());
        self.write(MOVED + 20, &[11]);
        assert_eq!(self.read(MOVED + 20), 11);
        let at = ring.addresses();
        self.write(MOVED + 22, &0u16.to_le_bytes());
        self.write(MOVED + 24, &at.size.to_le_bytes());
        self.write(MOVED + 26, &1u16.to_le_bytes());
        self.write(MOVED + 32, &at.descriptors.to_le_bytes());
        self.write(MOVED + 40, &at.available.to_le_bytes());
        self.write(MOVED + 48, &at.used.to_le_bytes());
        self.write(MOVED + 28, &1u16.to_le_bytes());
        self.write(MOVED + 20, &[15]);
    }

    fn kick(&mut self) {
        self.write(MOVED + 0x3000, &0u16.to_le_bytes());
    }
}

/// A vCPU's context made on another thread, so that this one may go on blocking.
fn unblocked_vcpu() -> VcpuLoop {
    std::thread::spawn(VcpuLoop::enter).join().unwrap()
}

fn msix_capability(function: &dyn Function, exit: &mut iothread::ExitCx<'_>) -> u16 {
    let mut at = function.read_config(0x34 / 4, exit) as u8;
    loop {
        assert_ne!(at, 0, "no MSI-X capability");
        let register = function.read_config(u16::from(at) / 4, exit);
        if register as u8 == 0x11 {
            return u16::from(at) / 4;
        }
        at = (register >> 8) as u8;
    }
}

fn add_read(mem: &Mem, ring: &mut Ring, sector: u64) {
    let mut header = [0; 16];
    header[8..].copy_from_slice(&sector.to_le_bytes());
    mem.write_slice(&header, GuestAddress(HEADER)).unwrap();
    ring.add(&[(HEADER, 16, false), (DATA, 512, true), (STATUS, 1, true)]).unwrap();
    ring.want_interrupt();
}

#[test]
fn a_saved_function_goes_on_as_another_instance_where_it_stood() {
    let home = TestLoop::new("io0", PollPolicy::OFF);
    let blocking = Blocking::on_this_thread().unwrap();
    let mem = memory(4 << 20);
    let file = tempfile::tempfile().unwrap();
    file.set_len(1 << 20).unwrap();
    let (to, messages) = channel();
    let mut first = Machine::new(&file, 2, &mem, &home, &to);
    let mut ring = Ring::new(&mem, 0x1000, 64, F_VERSION_1);
    first.bring_up(&ring);
    add_read(&mem, &mut ring, 1);
    first.kick();
    assert_eq!(messages.recv_timeout(LIMIT), Ok(MESSAGE));
    assert_eq!(ring.take_used().unwrap().1, 513);

    let paused = Paused::pause(&first.device, &blocking, LIMIT).unwrap();
    add_read(&mem, &mut ring, 2);
    let state = paused.save().remove(0);
    let text = serde_json::to_string(&state).unwrap();

    let mut second = Machine::new(&file, 2, &mem, &home, &to);
    let standing = Paused::pause(&second.device, &blocking, LIMIT).unwrap();
    let state = serde_json::from_str(&text).unwrap();
    second.device[0].restore(&standing, &state).unwrap();
    standing.resume();
    assert_eq!(messages.recv_timeout(LIMIT), Ok(MESSAGE), "the request that came meanwhile");
    assert_eq!(ring.take_used().unwrap().1, 513);
    assert_eq!(second.read(MOVED + 20), 15, "the BAR is where the guest had moved it");
    add_read(&mem, &mut ring, 3);
    second.kick();
    assert_eq!(messages.recv_timeout(LIMIT), Ok(MESSAGE));
}

#[test]
fn a_state_of_something_else_is_refused_and_changes_nothing() {
    let home = TestLoop::new("io0", PollPolicy::OFF);
    let blocking = Blocking::on_this_thread().unwrap();
    let mem = memory(4 << 20);
    let file = tempfile::tempfile().unwrap();
    file.set_len(1 << 20).unwrap();
    let (to, _messages) = channel();
    let other = Machine::new(&file, 3, &mem, &home, &to);
    let paused = Paused::pause(&other.device, &blocking, LIMIT).unwrap();
    let good = paused.save().remove(0);
    let mut bad_kind = good.clone();
    bad_kind.kind = "virtio-mmio".to_owned();
    let mut bad_body = good.clone();
    bad_body.body["transport"]["queues"] = serde_json::json!("many");
    let mut bad_size = good.clone();
    bad_size.body["transport"]["queues"][0][0]["rings"]["size"] = 65.into();
    for (device, state) in [(2, &good), (3, &bad_kind), (3, &bad_body), (3, &bad_size)] {
        let machine = Machine::new(&file, device, &mem, &home, &to);
        let standing = Paused::pause(&machine.device, &blocking, LIMIT).unwrap();
        let before = standing.save();
        let error = machine.device[0].restore(&standing, state).unwrap_err();
        assert_eq!(error.device, "disk.state");
        assert_eq!(standing.save(), before, "{error}");
        standing.resume();
    }
}

/// Tells every change of level.
struct Wire(Sender<bool>, AtomicBool);

impl IrqLine for Wire {
    fn set(&self, high: bool) {
        if self.1.swap(high, Ordering::SeqCst) != high {
            self.0.send(high).unwrap();
        }
    }
}

#[test]
fn without_msix_the_pin_is_pulled_until_the_status_is_read() {
    const ISR: u64 = MOVED + 0x1000;
    const INTERRUPT_DISABLE: u32 = 1 << 10;
    let home = TestLoop::new("io0", PollPolicy::OFF);
    let mem = memory(4 << 20);
    let file = tempfile::tempfile().unwrap();
    file.set_len(1 << 20).unwrap();
    let (to, messages) = channel();
    let (levels, line) = channel();
    let mut machine = Machine::new(&file, 1, &mem, &home, &to);
    machine.function.connect_pin(
        Arc::new(SharedLine::new(Arc::new(Wire(levels, AtomicBool::new(false))))).pin(),
    );
    assert_eq!(machine.function.read_config(0x3c / 4, &mut machine.vcpu.exit()) >> 8, 1, "pin A");
    let mut ring = Ring::new(&mem, 0x1000, 64, F_VERSION_1);
    machine.bring_up(&ring);
    let mut request = |machine: &mut Machine, sector| {
        add_read(&mem, &mut ring, sector);
        machine.kick();
    };
    request(&mut machine, 1);
    assert_eq!(messages.recv_timeout(LIMIT), Ok(MESSAGE));
    assert_eq!(line.try_recv(), Err(TryRecvError::Empty), "MSI-X has no pin");
    assert_eq!(machine.read(ISR), 1);

    machine.enable_msix(false);
    request(&mut machine, 2);
    assert_eq!(line.recv_timeout(LIMIT), Ok(true));
    assert_eq!(machine.read(ISR), 1);
    assert_eq!(line.recv_timeout(LIMIT), Ok(false));
    assert_eq!(machine.read(ISR), 0);

    // Pulled at last when the driver allows it again, and let go when it forbids it.
    let set = |machine: &mut Machine, value: u32| {
        machine.function.write_config(COMMAND, value, 0xffff, &mut machine.vcpu.exit());
    };
    set(&mut machine, 6 | INTERRUPT_DISABLE);
    request(&mut machine, 3);
    // Not pulled meanwhile: the first level that comes is the one after the next line.
    set(&mut machine, 6);
    assert_eq!(line.recv_timeout(LIMIT), Ok(true));
    set(&mut machine, 6 | INTERRUPT_DISABLE);
    assert_eq!(line.recv_timeout(LIMIT), Ok(false));
    set(&mut machine, 6);
    assert_eq!(line.recv_timeout(LIMIT), Ok(true));
    machine.write(MOVED + 20, &[0]);
    while machine.read(MOVED + 20) != 0 {
        std::thread::yield_now();
    }
    assert_eq!(line.recv_timeout(LIMIT), Ok(false), "a reset lets go");
    assert_eq!(messages.try_recv(), Err(TryRecvError::Empty));
}
