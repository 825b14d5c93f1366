use std::sync::Arc;

use crossbeam_queue::SegQueue;
use iothread::VcpuLoop;
use proptest::prelude::*;

use super::*;
use crate::pci::Function;

#[derive(Default)]
struct Requests(SegQueue<PowerRequest>);

impl Power for Requests {
    fn request(&self, request: PowerRequest) {
        self.0.push(request);
    }
}

/// Reads as its register number in each byte, and keeps what is written.
#[derive(Default)]
struct Recorder(SegQueue<(u16, u32, u32)>);

impl Function for Recorder {
    fn read_config(&self, register: u16, _: &mut ExitCx<'_>) -> u32 {
        0x0302_0100 | u32::from(register) << 28
    }
    fn write_config(&self, register: u16, value: u32, lanes: u32, _: &mut ExitCx<'_>) {
        self.0.push((register, value & lanes, lanes));
    }
}

struct Bench {
    ports: ConfigPorts,
    ecam: Ecam,
    requests: Arc<Requests>,
    recorder: Arc<Recorder>,
    vcpu: VcpuLoop,
}

impl Bench {
    /// The recorder is function 0 of slot 1.
    fn new() -> Self {
        let root = Arc::new(PciRoot::default());
        let recorder = Arc::new(Recorder::default());
        root.add(&(Arc::clone(&recorder) as Arc<dyn Function>)).unwrap();
        let requests = Arc::new(Requests::default());
        let power = Arc::clone(&requests) as Arc<dyn Power>;
        let ports = ConfigPorts::new(Arc::clone(&root), power);
        Self { ports, ecam: Ecam::new(root), requests, recorder, vcpu: VcpuLoop::enter() }
    }

    fn out(&mut self, offset: u64, data: &[u8]) {
        self.ports.write(offset, data, &mut self.vcpu.exit());
    }

    fn out32(&mut self, offset: u64, value: u32) {
        self.out(offset, &value.to_le_bytes());
    }

    fn input(&mut self, offset: u64, len: usize) -> Vec<u8> {
        let mut data = vec![0xaa; len];
        self.ports.read(offset, &mut data, &mut self.vcpu.exit());
        data
    }

    fn mem(&mut self, offset: u64, len: usize) -> Vec<u8> {
        let mut data = vec![0xaa; len];
        self.ecam.read(offset, &mut data, &mut self.vcpu.exit());
        data
    }

    fn written(&self) -> Vec<(u16, u32, u32)> {
        std::iter::from_fn(|| self.recorder.0.pop()).collect()
    }
}

const SLOT_1: u32 = 0x8000_0800;

#[test]
fn the_data_port_leads_to_the_register_in_the_address_port() {
    let mut bench = Bench::new();
    bench.out32(0, SLOT_1 | 0x14);
    assert_eq!(bench.input(4, 4), [0, 1, 2, 0x53]);
    assert_eq!(bench.input(6, 2), [2, 0x53]);
    assert_eq!(bench.input(5, 1), [1]);
    bench.out(7, &[0x99]);
    bench.out(4, &[0x11, 0x22]);
    assert_eq!(bench.written(), [(5, 0x9900_0000, 0xff00_0000), (5, 0x2211, 0xffff)]);
}

#[test]
fn the_probe_of_linux_finds_configuration_mechanism_1() {
    let mut bench = Bench::new();
    bench.out(3, &[1]);
    bench.out32(0, 0x8000_0000);
    assert_eq!(bench.input(0, 4), [0, 0, 0, 0x80]);
    bench.out32(0, 0x8000_0008);
    assert_eq!(bench.input(6, 2), [0x00, 0x06], "a host bridge");
}

#[test]
fn only_whole_writes_reach_the_address_port_and_only_its_bits_stay() {
    let mut bench = Bench::new();
    bench.out32(0, u32::MAX);
    assert_eq!(bench.input(0, 4), 0x80ff_fffc_u32.to_le_bytes());
    bench.out(0, &[0]);
    bench.out(0, &[0, 0]);
    bench.out(2, &[0, 0]);
    bench.out(2, &[0, 0, 0, 0]);
    assert_eq!(bench.input(0, 4), 0x80ff_fffc_u32.to_le_bytes());
    assert_eq!(bench.input(0, 2), [0xff, 0xff]);
}

#[test]
fn without_the_enable_bit_or_on_another_bus_nothing_is_there() {
    let mut bench = Bench::new();
    for address in [SLOT_1 & !ENABLE, SLOT_1 | 1 << 16, SLOT_1 | 1 << 8, 0x8000_1000] {
        bench.out32(0, address);
        assert_eq!(bench.input(4, 4), [0xff; 4], "{address:#x}");
        bench.out32(4, 0);
    }
    assert_eq!(bench.written(), []);
}

#[test]
fn port_0xcf9_is_the_reset_register() {
    let mut bench = Bench::new();
    bench.out32(0, SLOT_1);
    bench.out(1, &[2]);
    assert_eq!(bench.input(1, 1), [2]);
    assert_eq!(bench.requests.0.pop(), None);
    bench.out(1, &[6]);
    assert_eq!(bench.requests.0.pop(), Some(PowerRequest::Reset));
    assert_eq!(bench.input(0, 4), SLOT_1.to_le_bytes(), "the address is as it was");
    bench.out(1, &[6, 6]);
    bench.out32(0, 0x0606_0606);
    assert_eq!(bench.requests.0.pop(), None);
}

#[test]
fn the_state_of_the_ports_moves_to_another_machine() {
    let (mut from, mut to) = (Bench::new(), Bench::new());
    from.out32(0, SLOT_1 | 8);
    from.out(1, &[2]);
    to.ports.restore(from.ports.save());
    assert_eq!((to.input(0, 4), to.input(1, 1)), (from.input(0, 4), vec![2]));
}

#[test]
fn memory_has_4_kib_for_each_function_and_one_bus() {
    let mut bench = Bench::new();
    assert_eq!(bench.mem(0x8014, 4), [0, 1, 2, 0x53]);
    assert_eq!(bench.mem(0x8016, 2), [2, 0x53]);
    assert_eq!(bench.mem(0x8014, 8), [0, 1, 2, 0x53, 0, 1, 2, 0x63]);
    assert_eq!(bench.mem(0x1_0000, 4), [0xff; 4], "an empty slot");
    assert_eq!(bench.mem(0x10_8014, 4), [0xff; 4], "bus 1");
    assert_eq!(bench.mem(0x08, 4), [0, 0, 0, 6], "the host bridge");
    assert_eq!(bench.mem(0x100, 4), [0xff; 4], "no extended space");
    bench.ecam.write(0x8ffd, &[1, 2], &mut bench.vcpu.exit());
    assert_eq!(bench.written(), [(0x3ff, 0x0002_0100, 0x00ff_ff00)]);
}

proptest! {
    #[test]
    fn no_access_to_ports_or_memory_panics(
        steps in proptest::collection::vec((0_u64..8, 0..1_u64 << 28, 0_u32..4, any::<[u8; 8]>()), 1..300),
    ) {
        let mut bench = Bench::new();
        for (port, address, width, data) in steps {
            let len = (1_usize << width).min(4).min(8 - port as usize);
            bench.out(port, &data[..len]);
            bench.input(port, len);
            let len = 1 << width;
            bench.ecam.write(address, &data[..len], &mut bench.vcpu.exit());
            bench.mem(address, len);
        }
    }
}
