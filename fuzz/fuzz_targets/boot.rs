//! Kernels of any content by any protocol: they are loaded or refused, and nothing worse.
//!
//! The first byte of the input chooses the protocol, the second how many modules there are; the
//! rest is the kernel.
#![no_main]

use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use vmm::acpi::Description;
use vmm::boot::{Boot, Module, Protocol, Source};
use vmm::memory::{self, Backing, GuestMemory};

const MEMORY: u64 = 64 << 20;

static RAM: LazyLock<GuestMemory> =
    LazyLock::new(|| memory::allocate(MEMORY, Backing::Shared).expect("64 MiB"));

fuzz_target!(|input: &[u8]| {
    let [protocol, modules, kernel @ ..] = input else { return };
    let module = Module { source: Source::Bytes("module", b"module"), cmdline: "a b" };
    let boot = Boot {
        protocol: if protocol & 1 == 0 { Protocol::Native } else { Protocol::Multiboot },
        kernel: Source::Bytes("kernel", kernel),
        modules: vec![module; usize::from(modules % 4)],
        cmdline: "hello".into(),
    };
    let description = Description {
        apic_ids: &[0],
        rtc: true,
        serials: &[0],
        pci_buses: 1,
        mmio: &[],
        nodes: &[],
    };
    let _ = boot.load(RAM.mem(), &description);
});
