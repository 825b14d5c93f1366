//! Kernels of any content by any protocol: they are loaded or refused, and nothing worse.
//!
//! The first byte of the input chooses the protocol, the second how many modules there are; the
//! rest is the kernel.
#![no_main]

use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use vm_memory::GuestMemoryMmap;
use vmm::boot::{Boot, Module, Protocol, Source};
use vmm::memory;

const MEMORY: u64 = 64 << 20;

static RAM: LazyLock<std::sync::Arc<GuestMemoryMmap>> =
    LazyLock::new(|| memory::allocate(MEMORY, memory::Backing::Shared).expect("64 MiB"));

fuzz_target!(|input: &[u8]| {
    let [protocol, modules, kernel @ ..] = input else { return };
    let module = Module { source: Source::Bytes("module", b"module"), cmdline: "a b" };
    let boot = Boot {
        protocol: if protocol & 1 == 0 { Protocol::Native } else { Protocol::Multiboot },
        kernel: Source::Bytes("kernel", kernel),
        modules: vec![module; usize::from(modules % 4)],
        cmdline: "hello".into(),
    };
    let _ = boot.load(&RAM, &[0]);
});
