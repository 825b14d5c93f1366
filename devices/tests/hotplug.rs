//! A virtio function is plugged into a root port and unplugged, as its guest sees it.

use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Barrier};
use std::time::Duration;

use devices::bus::Bus;
use devices::device::{Lifecycle, Paused};
use devices::irq::{Doorbell, Doorbells, Msi, MsiSender};
use devices::pci::{Address, ConfigPorts, Ecam, Function, PciRoot, Room, RootPort};
use devices::power::{Power, PowerRequest};
use devices::virtio::pci::{Slots, VirtioPci};
use devices::virtio::rng::Rng;
use devices::virtio::seat::Placement;
use devices::virtio::testing::{TestLoop, memory};
use iothread::{Blocking, PollPolicy, VcpuLoop};

const ECAM: u64 = 0xe000_0000;
const WINDOW: u64 = 0xd020_0000;
const MESSAGE: Msi = Msi { address: 0xfee0_1000, data: 0x33 };
/// Bytes of configuration space.
const COMMAND: u64 = 4;
const BAR_0: u64 = 0x10;
const BUSES: u64 = 0x18;
const MEMORY_WINDOW: u64 = 0x20;
const MSI: u64 = 0x48;
const SLOT_CONTROL: u64 = 0x70;
/// The device's features, selected and read in the common configuration.
const QUEUES: u64 = 18;
/// Slot status: presence detect state, the link changed, presence changed.
const PRESENT: u16 = 0x40;
const CHANGES: u16 = 0x108;

struct Messages(Sender<Msi>);

impl MsiSender for Messages {
    fn send(&self, msi: Msi) {
        self.0.send(msi).unwrap();
    }
}

struct Nobody;

impl Doorbells for Nobody {
    fn connect(&self, _: Doorbell, _: BorrowedFd<'_>) -> std::io::Result<()> {
        Ok(())
    }
    fn disconnect(&self, _: Doorbell, _: BorrowedFd<'_>) -> std::io::Result<()> {
        Ok(())
    }
}

impl Power for Nobody {
    fn request(&self, _: PowerRequest) {}
}

/// A machine with two ports, buses 1 and 2 behind them, seen through its buses.
struct Machine {
    memory: Arc<Bus>,
    ports: Bus,
    slots: Slots,
    root_ports: Vec<Arc<RootPort>>,
    interrupts: Receiver<Msi>,
    vcpu: VcpuLoop,
}

impl Machine {
    fn new() -> Self {
        let (memory_bus, ports, root) = (Arc::<Bus>::default(), Bus::default(), Arc::default());
        let ecam = Ecam::new(Arc::clone(&root));
        memory_bus.insert(ECAM, Ecam::size(3), Arc::new(ecam)).unwrap();
        let config = ConfigPorts::new(Arc::clone(&root), Arc::new(Nobody));
        ports.insert(ConfigPorts::PORT, ConfigPorts::SIZE, Arc::new(config)).unwrap();
        let (sender, interrupts) = channel();
        let msi = Arc::new(Messages(sender)) as Arc<dyn MsiSender>;
        let root_ports = [1, 2].map(|number| Self::port(&root, number, &msi));
        let slots = Slots {
            bus: Arc::clone(&memory_bus),
            msi,
            doorbells: Arc::new(Nobody),
            mem: memory(1 << 20),
        };
        let root_ports = root_ports.to_vec();
        let vcpu = VcpuLoop::enter();
        Self { memory: memory_bus, ports, slots, root_ports, interrupts, vcpu }
    }

    fn port(root: &PciRoot, number: u8, msi: &Arc<dyn MsiSender>) -> Arc<RootPort> {
        let base = WINDOW + u64::from(number - 1) * 0x10_0000;
        let room = Room { secondary: number, memory: base..base + 0x10_0000, prefetchable: 0..0 };
        let port = Arc::new(RootPort::new("port", number, &room, Arc::clone(msi)));
        assert_eq!(root.add_port(&port), Ok(Address::new(number, 0).unwrap()));
        port
    }

    /// A function with its BARs in the window of the first port.
    fn function(&self, home: &TestLoop) -> Arc<VirtioPci> {
        let placements = [Placement::Loop(home.handle.clone())];
        let mut space = self.root_ports[0].bar_space();
        Arc::new(
            VirtioPci::new("rng.test", Arc::new(Rng), &placements, &self.slots, &mut space)
                .unwrap(),
        )
    }

    fn read<const N: usize>(&mut self, address: u64) -> [u8; N] {
        let mut data = [0; N];
        self.memory.read(address, &mut data, &mut self.vcpu.exit());
        data
    }

    fn write(&mut self, address: u64, data: &[u8]) {
        self.memory.write(address, data, &mut self.vcpu.exit());
    }

    /// Where a byte of configuration space lies: bus, slot, byte.
    fn config(bus: u64, slot: u64, byte: u64) -> u64 {
        ECAM + (bus << 20 | slot << 15 | byte)
    }

    /// The vendor at device 0 of a bus, through memory and through ports; both say the same.
    fn vendor(&mut self, bus: u8) -> u16 {
        let by_memory = self.read(Self::config(bus.into(), 0, 0));
        let address = (1 << 31 | u32::from(bus) << 16).to_le_bytes();
        self.ports.write(ConfigPorts::PORT, &address, &mut self.vcpu.exit());
        let mut by_ports = [0; 2];
        self.ports.read(ConfigPorts::PORT + 4, &mut by_ports, &mut self.vcpu.exit());
        assert_eq!(by_ports, by_memory);
        u16::from_le_bytes(by_memory)
    }

    fn slot_status(&mut self) -> u16 {
        u16::from_le_bytes(self.read(Self::config(0, 1, SLOT_CONTROL + 2)))
    }

    fn clear_slot_status(&mut self) {
        self.write(Self::config(0, 1, SLOT_CONTROL + 2), &[0xff; 2]);
    }

    /// What a driver reads of the number of queues in BAR 0 at `base`; `None`: nothing is decoded.
    fn queues(&mut self, base: u64) -> Option<u16> {
        let mut data = [0; 2];
        let there = self.memory.read(base + QUEUES, &mut data, &mut self.vcpu.exit());
        there.then_some(u16::from_le_bytes(data))
    }

    fn interrupts(&self) -> Vec<Msi> {
        self.interrupts.try_iter().collect()
    }
}

#[test]
fn a_function_comes_and_goes() {
    let home = TestLoop::new("home", PollPolicy::OFF);
    let mut machine = Machine::new();
    assert_eq!([0, 1, 2, 3].map(|bus| machine.vendor(bus)), [0x1b36, 0xffff, 0xffff, 0xffff]);
    let port = |byte| Machine::config(0, 1, byte);
    machine.write(port(MSI + 4), &(MESSAGE.address as u32).to_le_bytes());
    machine.write(port(MSI + 12), &(MESSAGE.data as u16).to_le_bytes());
    machine.write(port(MSI + 2), &[1, 0]);
    // As pciehp does it: the button, changes of the link, and interrupts at all.
    machine.write(port(SLOT_CONTROL), &0x13e1_u16.to_le_bytes());

    let function = machine.function(&home);
    machine.root_ports[0].plug(Arc::clone(&function) as Arc<dyn Function>).unwrap();
    assert_eq!(machine.interrupts(), [MESSAGE]);
    assert_eq!(machine.slot_status(), PRESENT | CHANGES);
    machine.clear_slot_status();
    assert_eq!([1, 2].map(|bus| machine.vendor(bus)), [0x1af4, 0xffff]);
    assert_eq!(machine.read(Machine::config(1, 0, 2)), 0x1044_u16.to_le_bytes());
    assert_eq!(machine.read(Machine::config(1, 1, 0)), [0xff; 4], "a link has one device");
    // Its BAR is where Linux puts it, within the window.
    assert_eq!(machine.queues(WINDOW), Some(1));
    let device = |byte| Machine::config(1, 0, byte);
    machine.write(device(COMMAND), &[0, 0]);
    assert_eq!(machine.queues(WINDOW), None);
    machine.write(device(BAR_0), &(WINDOW as u32 + 0x8_0000).to_le_bytes());
    machine.write(device(COMMAND), &[6, 0]);
    assert_eq!(machine.queues(WINDOW + 0x8_0000), Some(1));

    assert_eq!(machine.interrupts(), []);
    machine.root_ports[0].press_button();
    assert_eq!((machine.interrupts(), machine.slot_status()), (vec![MESSAGE], PRESENT | 1));
    machine.clear_slot_status();
    let gone = machine.root_ports[0].unplug().unwrap();
    assert_eq!((machine.interrupts(), machine.slot_status()), (vec![MESSAGE], CHANGES));
    assert_eq!(machine.vendor(1), 0xffff);
    assert_eq!(machine.read(device(0x40)), [0xff; 8]);
    assert_eq!(machine.queues(WINDOW + 0x8_0000), None);
    gone.settle();
    assert_eq!(machine.queues(WINDOW + 0x8_0000), None, "nobody forwards to it any more");

    // The other port's window is elsewhere, so there it is found, but not decoded.
    machine.root_ports[1].plug(gone).unwrap();
    assert_eq!([1, 2].map(|bus| machine.vendor(bus)), [0xffff, 0x1af4]);
    assert_eq!(machine.queues(WINDOW + 0x8_0000), None);
    machine.write(Machine::config(2, 0, BAR_0), &(WINDOW as u32 + 0x10_0000).to_le_bytes());
    assert_eq!(machine.queues(WINDOW + 0x10_0000), Some(1));
}

#[test]
fn a_bar_is_decoded_only_where_its_port_forwards() {
    let home = TestLoop::new("home", PollPolicy::OFF);
    let mut machine = Machine::new();
    let function = machine.function(&home);
    machine.root_ports[0].plug(function).unwrap();
    assert_eq!(machine.queues(WINDOW), Some(1));
    let port = |byte| Machine::config(0, 1, byte);
    machine.write(port(COMMAND), &[4, 0]);
    assert_eq!(machine.queues(WINDOW), None, "the port decodes nothing");
    machine.write(port(COMMAND), &[6, 0]);
    assert_eq!(machine.queues(WINDOW), Some(1));
    // The window moves away, and the BAR after it.
    machine.write(port(MEMORY_WINDOW), &0xd100_d100_u32.to_le_bytes());
    assert_eq!(machine.queues(WINDOW), None);
    machine.write(Machine::config(1, 0, BAR_0), &0xd100_0000_u32.to_le_bytes());
    assert_eq!(machine.queues(0xd100_0000), Some(1));
    // Bus numbers have nothing to do with it.
    machine.write(port(BUSES), &[0, 2, 2]);
    assert_eq!([1, 2].map(|bus| machine.vendor(bus)), [0xffff, 0x1af4]);
    machine.write(port(BUSES), &[0, 0, 0]);
    assert_eq!([0, 1, 2].map(|bus| machine.vendor(bus)), [0x1b36, 0xffff, 0xffff]);
    assert_eq!(machine.queues(0xd100_0000), Some(1));
}

#[test]
fn a_port_and_what_is_in_it_are_saved_and_restored() {
    let home = TestLoop::new("home", PollPolicy::OFF);
    let devices = |machine: &Machine| {
        let function = machine.function(&home);
        machine.root_ports[0].plug(Arc::clone(&function) as _).unwrap();
        [function as Arc<dyn Lifecycle>, Arc::clone(&machine.root_ports[0]) as _]
    };
    let mut from = Machine::new();
    let saved = devices(&from);
    from.write(Machine::config(0, 1, MEMORY_WINDOW), &0xd100_d100_u32.to_le_bytes());
    from.write(Machine::config(1, 0, BAR_0), &0xd100_0000_u32.to_le_bytes());
    from.write(Machine::config(0, 1, BUSES), &[0, 2, 2]);

    let mut to = Machine::new();
    let restored = devices(&to);
    assert_eq!(to.queues(WINDOW), Some(1));
    std::thread::scope(|scope| {
        let work = || {
            let blocking = Blocking::on_this_thread().unwrap();
            let pause =
                |of| Paused::pause(of, &blocking, Duration::from_secs(30)).expect("they are idle");
            let (from, to) = (pause(&saved), pause(&restored));
            for (device, state) in restored.iter().zip(from.save()) {
                device.restore(&to, &state).unwrap();
            }
            to.resume();
            from.resume();
        };
        scope.spawn(work).join().unwrap();
    });
    assert_eq!([1, 2].map(|bus| to.vendor(bus)), [0xffff, 0x1af4]);
    assert_eq!((to.queues(WINDOW), to.queues(0xd100_0000)), (None, Some(1)));
    assert_eq!(to.slot_status(), PRESENT | CHANGES);
}

/// The guest writes whatever it likes to the port and to what is behind it, while functions come and
/// go: nobody waits for anybody for good, and in the end nothing is left on the bus.
#[test]
fn plugging_and_the_guest_do_not_get_in_each_others_way() {
    let home = TestLoop::new("home", PollPolicy::OFF);
    let machine = Machine::new();
    let function = machine.function(&home);
    let (port, memory) = (Arc::clone(&machine.root_ports[0]), Arc::clone(&machine.memory));
    let (done, all_there) = (AtomicBool::new(false), Barrier::new(3));
    std::thread::scope(|scope| {
        for start in 0..2_usize {
            let (memory, done, all_there) = (&memory, &done, &all_there);
            scope.spawn(move || {
                let mut vcpu = VcpuLoop::enter();
                let port = |byte| Machine::config(0, 1, byte);
                let device = |byte| Machine::config(1, 0, byte);
                let writes: [(u64, u32); 10] = [
                    (port(COMMAND), 4),
                    (device(BAR_0), WINDOW as u32 + 0x4000),
                    (port(COMMAND), 6),
                    (port(SLOT_CONTROL), 0xffff_13e9),
                    (port(MEMORY_WINDOW), 0xd100_d100),
                    (port(SLOT_CONTROL - 8), 1 << 4),
                    (device(COMMAND), 0),
                    (port(MEMORY_WINDOW), 0xd020_d020),
                    (device(COMMAND), 6),
                    (port(SLOT_CONTROL - 8), 0),
                ];
                all_there.wait();
                for (address, value) in writes.iter().cycle().skip(start * 5) {
                    memory.write(*address, &value.to_le_bytes(), &mut vcpu.exit());
                    memory.read(device(0), &mut [0; 4], &mut vcpu.exit());
                    if done.load(Ordering::SeqCst) {
                        break;
                    }
                }
            });
        }
        all_there.wait();
        for _ in 0..20_000 {
            port.plug(Arc::clone(&function) as _).unwrap();
            port.press_button();
            assert!(port.unplug().is_some());
        }
        done.store(true, Ordering::SeqCst);
    });
    let mut vcpu = VcpuLoop::enter();
    for base in (WINDOW..WINDOW + 0x10_0000).step_by(0x1000).chain([0xd100_0000]) {
        assert!(!memory.read(base, &mut [0; 4], &mut vcpu.exit()), "{base:#x}");
    }
}
