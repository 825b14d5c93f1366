use std::sync::Arc;

use crossbeam_queue::SegQueue;
use iothread::VcpuLoop;
use proptest::prelude::*;

use super::*;
use crate::irq::{Msi, MsiSender};
use crate::pci::{PciRoot, root::Address};

const IDS: Ids = Ids {
    vendor: 0x1af4,
    device: 0x1042,
    class: 0x01_8000,
    revision: 1,
    subsystem_vendor: 0x1af4,
    subsystem: 0x1100,
};

#[derive(Debug, PartialEq)]
enum Heard {
    Mapped(u64),
    Unmapped(u64),
    Write(u64, Vec<u8>),
}

/// A device that answers with its offset and keeps what it hears.
#[derive(Default)]
struct Recorder(SegQueue<Heard>);

impl Recorder {
    fn heard(&self) -> Vec<Heard> {
        std::iter::from_fn(|| self.0.pop()).collect()
    }
}

impl Device for Recorder {
    fn read(&self, offset: u64, data: &mut [u8], _: &mut ExitCx<'_>) {
        data.iter_mut().zip(offset..).for_each(|(byte, at)| *byte = at as u8);
    }
    fn write(&self, offset: u64, data: &[u8], _: &mut ExitCx<'_>) {
        self.0.push(Heard::Write(offset, data.to_vec()));
    }
}

impl Placed for Recorder {
    fn mapped(&self, base: u64) {
        self.0.push(Heard::Mapped(base));
    }
    fn unmapped(&self, base: u64) {
        self.0.push(Heard::Unmapped(base));
    }
}

struct NoSender;

impl MsiSender for NoSender {
    fn send(&self, _: Msi) {}
}

const SIZE: u64 = 0x4000;

fn bar(index: u8, address: u64, recorder: &Arc<Recorder>) -> Bar {
    Bar {
        index,
        address,
        size: SIZE,
        device: Arc::clone(recorder) as Arc<dyn Device>,
        placed: Some(Arc::clone(recorder) as Arc<dyn Placed>),
    }
}

struct Bench {
    bus: Arc<Bus>,
    recorder: Arc<Recorder>,
    msix: Arc<Msix>,
    endpoint: Arc<Endpoint>,
    vcpu: VcpuLoop,
}

const MSIX: u16 = 0x10;
const WINDOW: u16 = 0x13;

impl Bench {
    fn new(address: u64) -> Self {
        Self::on(&Arc::default(), address)
    }

    fn on(bus: &Arc<Bus>, address: u64) -> Self {
        let recorder = Arc::new(Recorder::default());
        let msix = Arc::new(Msix::new(4, Arc::new(NoSender)));
        let capabilities = vec![Capability::msix(2, Arc::clone(&msix)), Capability::window()];
        let bars = vec![bar(0, address, &recorder)];
        let endpoint = Arc::new(Endpoint::new(&IDS, bars, capabilities, bus));
        Self { bus: Arc::clone(bus), recorder, msix, endpoint, vcpu: VcpuLoop::enter() }
    }

    fn read(&mut self, register: u16) -> u32 {
        self.endpoint.read_config(register, &mut self.vcpu.exit())
    }

    fn write(&mut self, register: u16, value: u32) {
        self.endpoint.write_config(register, value, u32::MAX, &mut self.vcpu.exit());
    }

    fn answers(&mut self, address: u64) -> bool {
        self.bus.read(address, &mut [0; 4], &mut self.vcpu.exit())
    }
}

#[test]
fn a_new_function_is_decoded_where_firmware_put_it() {
    let mut bench = Bench::new(0x8000);
    assert!(bench.answers(0x8000) && bench.answers(0xbffc));
    assert!(!bench.answers(0x7ffc) && !bench.answers(0xc000));
    assert_eq!(bench.recorder.heard(), [Heard::Mapped(0x8000)]);
    assert_eq!(bench.read(COMMAND_STATUS) & 0xffff, 0b110);
}

#[test]
fn a_bar_follows_the_memory_bit_of_the_command_register() {
    let mut bench = Bench::new(0x8000);
    bench.write(COMMAND_STATUS, 0);
    assert!(!bench.answers(0x8000));
    bench.write(COMMAND_STATUS, 2);
    assert!(bench.answers(0x8000));
    bench.write(COMMAND_STATUS, 6);
    let heard = bench.recorder.heard();
    assert_eq!(heard, [Heard::Mapped(0x8000), Heard::Unmapped(0x8000), Heard::Mapped(0x8000)]);
}

#[test]
fn sizing_and_moving_as_linux_does_it() {
    let mut bench = Bench::new(0x8000);
    bench.write(COMMAND_STATUS, 0);
    bench.write(4, u32::MAX);
    bench.write(5, u32::MAX);
    assert_eq!((bench.read(4), bench.read(5)), (0xffff_c004, 0xffff_ffff));
    bench.write(4, 0x4000_0000);
    bench.write(5, 0x10);
    bench.write(COMMAND_STATUS, 6);
    assert_eq!(bench.endpoint.decoded_at(0), Some(0x10_4000_0000));
    assert!(bench.answers(0x10_4000_0000) && !bench.answers(0x8000));
    let heard = bench.recorder.heard();
    assert_eq!(
        heard,
        [Heard::Mapped(0x8000), Heard::Unmapped(0x8000), Heard::Mapped(0x10_4000_0000)]
    );
}

#[test]
fn an_absurd_address_is_not_decoded_until_it_becomes_sane() {
    let mut bench = Bench::new(0x8000);
    for (low, high) in [(0, 0), (u32::MAX, u32::MAX), (0, 1 << 20), (0xffff_c000, 0xf_ffff + 1)] {
        bench.write(4, low);
        bench.write(5, high);
        assert_eq!(bench.endpoint.decoded_at(0), None, "{high:x}:{low:x}");
    }
    bench.write(5, 0);
    bench.write(4, 0x1_0000);
    assert_eq!(bench.endpoint.decoded_at(0), Some(0x1_0000));
}

#[test]
fn a_bar_that_collides_is_decoded_once_the_other_has_moved_away() {
    let bus = Arc::default();
    let (one, other) = (Bench::on(&bus, 0x8000), Bench::on(&bus, 0x1_0000));
    let (root, mut vcpu) = (PciRoot::default(), VcpuLoop::enter());
    let function = |bench: &Bench| Arc::clone(&bench.endpoint) as Arc<dyn Function>;
    let (first, second) =
        (root.add(&function(&one)).unwrap(), root.add(&function(&other)).unwrap());
    let mut move_to =
        |place: Address, address| root.write(place, 4, address, u32::MAX, &mut vcpu.exit());
    move_to(first, 0x1_0000);
    assert_eq!((one.endpoint.decoded_at(0), other.endpoint.decoded_at(0)), (None, Some(0x1_0000)));
    move_to(second, 0x8000);
    assert_eq!(one.endpoint.decoded_at(0), Some(0x1_0000));
    assert_eq!(other.endpoint.decoded_at(0), Some(0x8000));
}

#[test]
fn two_bars_of_a_function_can_change_places() {
    let (bus, recorder): (Arc<Bus>, _) = (Arc::default(), Arc::new(Recorder::default()));
    let bars = vec![bar(0, 0x8000, &recorder), bar(2, 0x1_0000, &recorder)];
    let endpoint = Endpoint::new(&IDS, bars, Vec::new(), &bus);
    let mut vcpu = VcpuLoop::enter();
    endpoint.write_config(4, 0x1_0000, u32::MAX, &mut vcpu.exit());
    endpoint.write_config(6, 0x8000, u32::MAX, &mut vcpu.exit());
    assert_eq!((endpoint.decoded_at(0), endpoint.decoded_at(2)), (Some(0x1_0000), Some(0x8000)));
}

#[test]
fn message_control_is_that_of_the_table() {
    let mut bench = Bench::new(0x8000);
    assert_eq!(bench.read(MSIX), 0x0003_4c11);
    assert_eq!((bench.read(MSIX + 1), bench.read(MSIX + 2)), (2, 64 | 2));
    bench.write(MSIX, u32::MAX);
    assert_eq!(bench.msix.control(), 0xc003);
    assert_eq!(bench.read(MSIX), 0xc003_4c11);
    bench.endpoint.write_config(MSIX, 0, 0xffff, &mut bench.vcpu.exit());
    assert_eq!(bench.msix.control(), 0xc003, "that was the id and the link");
}

#[test]
fn the_window_reaches_a_bar_that_is_not_even_decoded() {
    let mut bench = Bench::new(0x8000);
    bench.write(COMMAND_STATUS, 0);
    bench.recorder.heard();
    assert_eq!(bench.read(WINDOW), 0x0514_0009);
    bench.write(WINDOW + 1, 0);
    bench.write(WINDOW + 2, 0x44);
    bench.write(WINDOW + 3, 4);
    assert_eq!(bench.read(WINDOW + 4), 0x4746_4544);
    bench.write(WINDOW + 4, 0x0403_0201);
    bench.write(WINDOW + 3, 2);
    assert_eq!(bench.read(WINDOW + 4), 0x4544);
    bench.endpoint.write_config(WINDOW + 4, 0x0201, 0xffff, &mut bench.vcpu.exit());
    let heard = bench.recorder.heard();
    assert_eq!(heard, [Heard::Write(0x44, vec![1, 2, 3, 4]), Heard::Write(0x44, vec![1, 2])]);
}

#[test]
fn a_window_that_makes_no_sense_reaches_nothing() {
    let mut bench = Bench::new(0x8000);
    bench.recorder.heard();
    let (size, top) = (SIZE as u32, u32::MAX);
    let windows = [(1, 0, 4), (255, 0, 4), (0, size, 4), (0, size - 2, 4), (0, 2, 4), (0, 0, 3)];
    let more = [(0, 0, 0), (0, 0, 8), (0, top, 1), (0, top - 3, 4), (0, 0, top)];
    for (bar, offset, length) in windows.into_iter().chain(more) {
        bench.write(WINDOW + 1, bar);
        bench.write(WINDOW + 2, offset);
        bench.write(WINDOW + 3, length);
        assert_eq!(bench.read(WINDOW + 4), 0, "{bar} {offset:#x} {length}");
        bench.write(WINDOW + 4, top);
    }
    bench.write(WINDOW + 2, 0);
    bench.write(WINDOW + 3, 4);
    bench.endpoint.write_config(WINDOW + 4, top, 0xffff, &mut bench.vcpu.exit());
    assert_eq!(bench.recorder.heard(), [], "and half of a write is none");
}

#[test]
fn a_function_that_goes_away_is_decoded_no_longer() {
    let mut bench = Bench::new(0x8000);
    let Bench { endpoint, recorder, .. } = Bench::on(&bench.bus, 0x1_0000);
    drop(endpoint);
    assert_eq!(recorder.heard(), [Heard::Mapped(0x1_0000), Heard::Unmapped(0x1_0000)]);
    assert!(bench.answers(0x8000) && !bench.answers(0x1_0000));
}

#[test]
fn a_restored_function_is_decoded_where_the_guest_had_put_it() {
    let mut from = Bench::new(0x8000);
    from.write(4, 0x2_0000);
    from.write(MSIX, 1 << 31);
    let saved = serde_json::to_value(from.endpoint.save()).unwrap();

    let mut to = Bench::new(0x8000);
    let saved = serde_json::from_value(saved).unwrap();
    to.endpoint.accepts(&saved).unwrap();
    to.endpoint.restore(&saved);
    assert!(to.answers(0x2_0000) && !to.answers(0x8000));
    assert_eq!(to.msix.control(), 0x8003);
    let other = Endpoint::new(&IDS, Vec::new(), Vec::new(), &Arc::default());
    assert!(other.accepts(&saved).is_err());
}

proptest! {
    #[test]
    fn whatever_two_functions_are_told_they_are_never_decoded_at_one_place(
        steps in proptest::collection::vec(
            (any::<bool>(), 0_u16..70, prop_oneof![any::<u32>(), 0_u32..0x4_0000], 0_usize..5),
            1..300,
        ),
    ) {
        let bus = Arc::default();
        let functions = [Bench::on(&bus, 0x8000), Bench::on(&bus, 0x1_0000)];
        let root = PciRoot::default();
        let places = functions.each_ref().map(|bench| {
            root.add(&(Arc::clone(&bench.endpoint) as Arc<dyn Function>)).unwrap()
        });
        let mut vcpu = VcpuLoop::enter();
        for (which, register, value, lanes) in steps {
            let lanes = [u32::MAX, 0xff, 0xff00, 0xffff_0000, 0xff00_0000][lanes];
            root.write(places[usize::from(which)], register, value, lanes, &mut vcpu.exit());
            root.read(places[usize::from(which)], register, &mut vcpu.exit());
            let [one, other] = functions.each_ref().map(|bench| bench.endpoint.decoded_at(0));
            if let (Some(one), Some(other)) = (one, other) {
                prop_assert!(one.abs_diff(other) >= SIZE);
            }
            for (bench, at) in functions.iter().zip([one, other]) {
                let wanted = bench.endpoint.config.bar(0).filter(|&base| base != 0 && base < ADDRESS_LIMIT);
                prop_assert!(at == wanted || at.is_none());
            }
            prop_assert!(one.is_some() || other.is_some() || {
                let wanted = functions.each_ref().map(|bench| bench.endpoint.config.bar(0));
                wanted.iter().flatten().all(|&base| base == 0 || base >= ADDRESS_LIMIT)
            }, "one of two that collide is decoded");
        }
    }
}

#[test]
fn a_function_does_not_keep_its_bus() {
    let bench = Bench::new(0x8000);
    let bus = Arc::downgrade(&bench.bus);
    let Bench { endpoint, bus: last, .. } = bench;
    drop(last);
    assert!(bus.upgrade().is_none());
    drop(endpoint);
}
