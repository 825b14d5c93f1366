use crossbeam_queue::SegQueue;
use iothread::{Blocking, VcpuLoop};
use proptest::prelude::*;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::time::Duration;

use super::*;
use crate::irq::{IrqLine, Msi, SharedLine};
use crate::pci::{Address, PciRoot};

#[derive(Default)]
struct Wires {
    messages: SegQueue<Msi>,
    line: AtomicBool,
}

impl MsiSender for Wires {
    fn send(&self, msi: Msi) {
        self.messages.push(msi);
    }
}

impl IrqLine for Wires {
    fn set(&self, high: bool) {
        self.line.store(high, SeqCst);
    }
}

/// A function whose registers read as its number, and which keeps what is written.
#[derive(Default)]
struct Tag(u32, SegQueue<(u16, u32)>);

impl Function for Tag {
    fn read_config(&self, _: u16, _: &mut ExitCx<'_>) -> u32 {
        self.0
    }
    fn write_config(&self, register: u16, value: u32, _: u32, _: &mut ExitCx<'_>) {
        self.1.push((register, value));
    }
}

fn tag(number: u32) -> Arc<dyn Function> {
    Arc::new(Tag(number, SegQueue::new()))
}

const NOTHING: u32 = u32::MAX;
const BUSES: u16 = 6;
/// Of message-signalled interrupts and PCI Express: where the capabilities are.
const MSI: u16 = 0x12;
const EXPRESS: u16 = 0x16;
const LINK: u16 = EXPRESS + 4;
const SLOT: u16 = EXPRESS + 6;
/// Slot status, in the upper half.
const PRESENT: u32 = 1 << 22;
const BUTTON: u32 = 1 << 16;
const PRESENCE: u32 = 1 << 19;
const LINK_CHANGE: u32 = 1 << 24;
const STATUS: u32 = 0xffff_0000;
/// Slot control: all events interrupt; the indicators stay off.
const ALL_EVENTS: u32 = 0x1029 | 0x3c0;
const MESSAGE: Msi = Msi { address: 0x1_fee0_1000, data: 0x4021 };

struct Bench {
    root: PciRoot,
    ports: Vec<Arc<RootPort>>,
    places: Vec<Address>,
    wires: Arc<Wires>,
    vcpu: VcpuLoop,
}

impl Bench {
    /// Ports with buses 1, 2, and so on.
    fn new(count: u8) -> Self {
        let wires = Arc::new(Wires::default());
        let line = Arc::new(SharedLine::new(Arc::clone(&wires) as _));
        let root = PciRoot::default();
        let make = |number: u8| {
            let memory = u64::from(number) << 28..(u64::from(number) << 28) + (2 << 20);
            let room = Room { secondary: number, memory, prefetchable: 0..0 };
            let port = RootPort::new("port", number, &room, Arc::clone(&wires) as _);
            port.connect_pin(line.pin());
            Arc::new(port)
        };
        let ports: Vec<_> = (1..=count).map(make).collect();
        let places = ports.iter().map(|port| root.add_port(port).unwrap()).collect();
        Self { root, ports, places, wires, vcpu: VcpuLoop::enter() }
    }

    fn read(&mut self, port: usize, register: u16) -> u32 {
        self.root.read(self.places[port], register, &mut self.vcpu.exit())
    }

    fn write(&mut self, port: usize, register: u16, value: u32, lanes: u32) {
        self.root.write(self.places[port], register, value, lanes, &mut self.vcpu.exit());
    }

    /// What is at device 0 of a bus.
    fn at_bus(&mut self, bus: u8) -> u32 {
        let place = Address::new(0, 0).unwrap().on_bus(bus);
        self.root.read(place, 5, &mut self.vcpu.exit())
    }

    fn enable_msi(&mut self) {
        self.write(0, MSI + 1, MESSAGE.address as u32, u32::MAX);
        self.write(0, MSI + 2, (MESSAGE.address >> 32) as u32, u32::MAX);
        self.write(0, MSI + 3, MESSAGE.data, u32::MAX);
        self.write(0, MSI, 1 << 16, STATUS);
    }

    fn messages(&self) -> Vec<Msi> {
        std::iter::from_fn(|| self.wires.messages.pop()).collect()
    }

    fn line(&self) -> bool {
        self.wires.line.load(SeqCst)
    }
}

#[test]
fn a_guest_finds_a_root_port_with_an_empty_hot_plug_slot() {
    let mut bench = Bench::new(2);
    assert_eq!(bench.places[1].to_string(), "00:02.0");
    assert_eq!((bench.read(1, 0), bench.read(1, 2)), (0x000c_1b36, 0x0604_0000));
    assert_eq!(bench.read(1, 3), 0x0001_0000, "a bridge, one function");
    assert_eq!(bench.read(1, 15) & 0xff00, 0x0100, "pin A");
    // The list of capabilities, as a guest walks it.
    let (mut at, mut seen) = (bench.read(1, 13) as u8, Vec::new());
    while at != 0 {
        let register = bench.read(1, u16::from(at / 4));
        seen.push((u16::from(at / 4), register as u8));
        at = (register >> 8) as u8;
    }
    assert_eq!(seen, [(0x10, 0x0d), (MSI, 0x05), (EXPRESS, 0x10)]);
    assert_eq!(bench.read(1, EXPRESS) >> 16, 0x0142, "version 2, root port, slot");
    assert_eq!(bench.read(1, LINK - 1), 0x0250_0011, "port 2 tells of its link");
    assert_eq!(bench.read(1, LINK), 0, "which is down");
    assert_eq!(bench.read(1, SLOT - 1), 2 << 19 | 1 << 18 | 0x79, "slot 2");
    assert_eq!(bench.read(1, SLOT), 0x3c0, "empty, indicators off");
    assert_eq!(bench.read(1, 0x100), 0, "no extended capabilities");
}

#[test]
fn a_function_is_found_behind_its_port_and_nowhere_else() {
    let mut bench = Bench::new(2);
    let function = Arc::new(Tag(7, SegQueue::new()));
    bench.ports[1].plug(Arc::clone(&function) as _).unwrap();
    assert_eq!([0, 1, 2, 3].map(|bus| bench.at_bus(bus)), [0, NOTHING, 7, NOTHING]);
    for (slot, nth) in [(0, 1), (1, 0), (31, 7)] {
        let place = Address::new(slot, nth).unwrap().on_bus(2);
        assert_eq!(bench.root.read(place, 0, &mut bench.vcpu.exit()), NOTHING, "{place}");
        bench.root.write(place, 9, 1, u32::MAX, &mut bench.vcpu.exit());
    }
    let place = Address::new(0, 0).unwrap().on_bus(2);
    bench.root.write(place, 9, 5, u32::MAX, &mut bench.vcpu.exit());
    assert_eq!((function.1.pop(), function.1.pop()), (Some((9, 5)), None));
    assert_eq!(bench.ports[1].plug(tag(8)), Err(Occupied));
    assert_eq!(bench.at_bus(2), 7);
    assert!(bench.ports[1].unplug().is_some() && bench.ports[1].unplug().is_none());
    assert_eq!(bench.at_bus(2), NOTHING);
}

#[test]
fn buses_are_where_the_guest_says_and_the_first_of_two_ports_wins() {
    let mut bench = Bench::new(2);
    bench.ports[0].plug(tag(1)).unwrap();
    bench.ports[1].plug(tag(2)).unwrap();
    bench.write(1, BUSES, 0x00ff_c800, u32::MAX);
    assert_eq!([1, 2, 0xc8, 0xff].map(|bus| bench.at_bus(bus)), [1, NOTHING, 2, NOTHING]);
    bench.write(0, BUSES, 0x00c8_c800, u32::MAX);
    assert_eq!([1, 0xc8].map(|bus| bench.at_bus(bus)), [NOTHING, 1]);
    bench.ports[0].unplug();
    assert_eq!(bench.at_bus(0xc8), NOTHING, "though the other has something there");
    // Secondary 0 hides nothing of bus 0.
    bench.write(1, BUSES, 0x00ff_0000, u32::MAX);
    assert_eq!(bench.at_bus(0), 0);
    assert_eq!(bench.read(1, 0), 0x000c_1b36);
}

#[test]
fn presence_link_and_events_follow_what_is_plugged() {
    let mut bench = Bench::new(1);
    bench.ports[0].plug(tag(1)).unwrap();
    assert_eq!(bench.read(0, SLOT) & STATUS, PRESENT | PRESENCE | LINK_CHANGE);
    assert_eq!(bench.read(0, LINK) & STATUS, 0x2011_0000, "active, 2.5 GT/s, one lane");
    // A one clears an event, and nothing else.
    bench.write(0, SLOT, PRESENCE | PRESENT, STATUS);
    assert_eq!(bench.read(0, SLOT) & STATUS, PRESENT | LINK_CHANGE);
    bench.write(0, SLOT, u32::MAX, 0x00ff_ffff);
    assert_eq!(bench.read(0, SLOT) & STATUS, PRESENT | LINK_CHANGE, "that was the other byte");
    bench.write(0, SLOT, u32::MAX, STATUS);
    assert_eq!(bench.read(0, SLOT) & STATUS, PRESENT);
    bench.ports[0].unplug();
    assert_eq!(bench.read(0, SLOT) & STATUS, PRESENCE | LINK_CHANGE);
    assert_eq!(bench.read(0, LINK) & STATUS, 0);
    bench.ports[0].press_button();
    assert_eq!(bench.read(0, SLOT) & STATUS, BUTTON | PRESENCE | LINK_CHANGE);
}

#[test]
fn only_what_there_is_can_be_written() {
    let mut bench = Bench::new(1);
    for (register, value) in [(SLOT, 0x13e9), (LINK, 0xd3), (EXPRESS + 2, 0xf), (EXPRESS + 7, 0xf)]
    {
        bench.write(0, register, u32::MAX, u32::MAX);
        assert_eq!(bench.read(0, register) & 0xffff, value, "{register:#x}");
    }
    bench.write(0, MSI, u32::MAX, u32::MAX);
    assert_eq!(bench.read(0, MSI) >> 16, 0x81);
    bench.write(0, MSI + 1, u32::MAX, u32::MAX);
    assert_eq!(bench.read(0, MSI + 1), 0xffff_fffc);
}

#[test]
fn a_link_that_the_guest_switches_off_hides_the_function() {
    let mut bench = Bench::new(1);
    bench.ports[0].plug(tag(1)).unwrap();
    bench.write(0, SLOT, STATUS, STATUS);
    bench.write(0, LINK, 1 << 4, 0xffff);
    assert_eq!((bench.at_bus(1), bench.read(0, LINK) & STATUS), (NOTHING, 0));
    assert_eq!(bench.read(0, SLOT) & STATUS, PRESENT | LINK_CHANGE);
    bench.write(0, LINK, 0, 0xffff);
    assert_eq!(bench.at_bus(1), 1);
}

#[test]
fn one_message_tells_of_events_until_all_are_cleared() {
    let mut bench = Bench::new(1);
    bench.enable_msi();
    bench.ports[0].plug(tag(1)).unwrap();
    assert_eq!(bench.messages(), [], "nothing is enabled");
    bench.write(0, SLOT, STATUS, STATUS);
    bench.write(0, SLOT, ALL_EVENTS, 0xffff);
    assert_eq!(bench.messages(), []);
    bench.ports[0].unplug();
    assert_eq!(bench.messages(), [MESSAGE]);
    bench.ports[0].press_button();
    bench.write(0, SLOT, PRESENCE, STATUS);
    assert_eq!(bench.messages(), [], "not all are cleared");
    bench.write(0, SLOT, STATUS, STATUS);
    bench.ports[0].press_button();
    assert_eq!(bench.messages(), [MESSAGE]);
    assert!(!bench.line());
}

#[test]
fn each_event_interrupts_only_if_it_is_enabled_and_all_are() {
    for (enable, button, plug) in [
        (0x20, false, false),
        (0x21, true, false),
        (0x28, false, true),
        (0x1020, false, true),
        (0x1009, false, false),
    ] {
        let mut bench = Bench::new(1);
        bench.enable_msi();
        bench.write(0, SLOT, enable, 0xffff);
        bench.ports[0].press_button();
        assert_eq!(bench.messages().len(), usize::from(button), "{enable:#x}");
        bench.write(0, SLOT, STATUS, STATUS);
        bench.ports[0].plug(tag(1)).unwrap();
        assert_eq!(bench.messages().len(), usize::from(plug), "{enable:#x}");
    }
}

#[test]
fn what_happened_before_it_was_enabled_is_told_then() {
    let mut bench = Bench::new(1);
    bench.ports[0].plug(tag(1)).unwrap();
    bench.write(0, SLOT, ALL_EVENTS, 0xffff);
    bench.enable_msi();
    assert_eq!(bench.messages(), [MESSAGE]);
}

#[test]
fn without_messages_the_pin_is_pulled_until_the_events_are_cleared() {
    let mut bench = Bench::new(1);
    bench.write(0, SLOT, ALL_EVENTS, 0xffff);
    bench.ports[0].press_button();
    assert!(bench.line() && bench.read(0, 1) & INTERRUPT_STATUS != 0);
    bench.write(0, 1, 1 << 10 | 6, 0xffff);
    assert!(!bench.line(), "INTx is disabled");
    bench.write(0, 1, 6, 0xffff);
    assert!(bench.line());
    bench.write(0, SLOT, STATUS, STATUS);
    assert!(!bench.line() && bench.read(0, 1) & INTERRUPT_STATUS == 0);
    bench.ports[0].press_button();
    bench.enable_msi();
    assert!(!bench.line());
    assert_eq!(bench.messages(), [MESSAGE]);
}

#[test]
fn the_power_indicator_says_when_the_function_may_go() {
    let mut bench = Bench::new(1);
    let port = Arc::clone(&bench.ports[0]);
    assert!(port.permits_removal());
    for (indicator, permits) in [(1, false), (2, false), (3, true), (0, false)] {
        bench.write(0, SLOT, indicator << 8, 0xffff);
        assert_eq!(port.permits_removal(), permits);
    }
}

/// Does something with the first port while it stands still, on a thread that may wait for that.
fn paused<R: Send>(bench: &Bench, f: impl Send + FnOnce(&RootPort, &Paused<'_>) -> R) -> R {
    let port = Arc::clone(&bench.ports[0]);
    let then = move || {
        let devices = [Arc::clone(&port) as Arc<dyn Lifecycle>];
        let blocking = Blocking::on_this_thread().unwrap();
        f(&port, &Paused::pause(&devices, &blocking, Duration::ZERO).unwrap())
    };
    std::thread::scope(|scope| scope.spawn(then).join().unwrap())
}

fn saved(bench: &Bench) -> State {
    paused(bench, |port, proof| port.save(proof))
}

fn restore(bench: &Bench, state: &State) -> Result<(), RestoreError> {
    paused(bench, |port, proof| port.restore(proof, state))
}

#[test]
fn a_port_goes_on_where_it_was_saved() {
    let mut from = Bench::new(1);
    from.enable_msi();
    from.write(0, BUSES, 0x0009_0900, u32::MAX);
    from.write(0, SLOT, ALL_EVENTS, 0xffff);
    from.ports[0].plug(tag(1)).unwrap();
    assert_eq!(from.messages(), [MESSAGE]);
    let state = saved(&from);

    let mut to = Bench::new(1);
    assert!(restore(&to, &state).unwrap_err().to_string().contains("slot is empty"));
    assert_eq!(to.read(0, BUSES), 0x0001_0100, "nothing has changed");
    to.ports[0].plug(tag(2)).unwrap();
    restore(&to, &state).unwrap();
    assert_eq!((to.at_bus(9), to.at_bus(1)), (2, NOTHING));
    for register in 0..64 {
        assert_eq!(to.read(0, register), from.read(0, register), "{register:#x}");
    }
    assert_eq!(to.messages(), [], "it was told before");
    to.write(0, SLOT, STATUS, STATUS);
    to.ports[0].unplug();
    assert_eq!(to.messages(), [MESSAGE]);
}

#[test]
fn states_that_no_port_has_are_refused() {
    let (bench, mut occupied) = (Bench::new(1), Bench::new(1));
    let good = saved(&bench);
    occupied.ports[0].plug(tag(1)).unwrap();
    assert!(restore(&occupied, &good).unwrap_err().to_string().contains("slot is taken"));
    assert_eq!(occupied.at_bus(1), 1);
    for (key, value, why) in [
        ("events", 2.into(), "events 0x2"),
        ("config", vec![0; 3].into(), "3 configuration registers"),
        ("config", vec![0; 64].into(), "register 0x0"),
        ("told", serde_json::Value::Null, "null"),
    ] {
        let mut state = good.clone();
        state.body[key] = value;
        let said = restore(&bench, &state).unwrap_err().to_string();
        assert!(said.starts_with("port: cannot restore") && said.contains(why), "{said}");
    }
    let other = State { version: 2, ..good };
    assert!(restore(&bench, &other).unwrap_err().to_string().contains("version 2"));
}

proptest! {
    #[test]
    fn whatever_two_ports_are_told_every_bus_leads_to_one_place(
        steps in proptest::collection::vec(
            (0_u8..5, 0_usize..2, 0_u16..64, prop_oneof![any::<u32>(), 0_u32..0x4_0000], 0_usize..4),
            1..200,
        ),
    ) {
        let mut bench = Bench::new(2);
        for (what, port, register, value, lanes) in steps {
            let lanes = [u32::MAX, 0xffff, 0xffff_0000, 0xff00][lanes];
            match what {
                0 => drop(bench.ports[port].plug(tag(port as u32))),
                1 => drop(bench.ports[port].unplug()),
                2 => bench.ports[port].press_button(),
                _ => bench.write(port, register, value, lanes),
            }
            bench.read(port, register);
            prop_assert_eq!(bench.at_bus(0), 0);
            let [first, second] = [0, 1].map(|port| {
                let [_, secondary, subordinate, _] = bench.read(port, BUSES).to_le_bytes();
                (secondary != 0 && secondary <= subordinate).then_some(secondary)
            });
            let known = [1, 2, 3, 255].map(Some).into_iter().chain([first, second]);
            for bus in known.flatten() {
                let owner = [first, second].iter().position(|secondary| *secondary == Some(bus));
                let expected = owner.filter(|&port| bench.read(port, LINK) & STATUS != 0);
                prop_assert_eq!(bench.at_bus(bus), expected.map_or(NOTHING, |port| port as u32));
            }
            let wanted = bench.ports.iter().any(|port| {
                let slot = port.slot();
                let config = &port.bridge.config;
                port.express.interrupts(config, slot.events)
                    && port.msi.message(config).is_none()
                    && config.pin_enabled()
            });
            prop_assert_eq!(bench.line(), wanted);
        }
    }
}
