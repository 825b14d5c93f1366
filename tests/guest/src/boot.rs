//! The ring 0 part of the guest (`boot.s`) and the structures it shares with Rust.

use core::arch::global_asm;
use core::mem::{offset_of, size_of};
use core::sync::atomic::{AtomicU16, AtomicU32, AtomicU64};

use crate::cpu::{Cpu, LINES, VECTOR_LINES, VECTOR_SHARED, VECTOR_SPURIOUS, VECTOR_TIMER};

/// What a starting CPU reads before it can run Rust.
#[repr(C)]
pub struct ApBoot {
    /// The CPUID leaf that holds the APIC id: 11, or 1 where there is no leaf 11.
    pub id_leaf: AtomicU32,
    /// How many entries `index` has.
    pub ids: AtomicU32,
    /// Address of a table of `u16`: APIC id to CPU number, 0xffff where there is none.
    pub index: AtomicU64,
    /// Address of the array of `Cpu`.
    pub cpus: AtomicU64,
    /// 1 if the local APICs are driven through MSRs. The interrupt entries read it as well.
    pub x2apic: AtomicU32,
    pub gdtr: TablePointer,
    pub idtr: TablePointer,
}

/// The operand of `lgdt` and `lidt`: a limit, and a base that is not aligned.
#[repr(C)]
pub struct TablePointer {
    limit: AtomicU16,
    base: [AtomicU16; 4],
}

impl TablePointer {
    const fn empty() -> Self {
        TablePointer { limit: AtomicU16::new(0), base: [const { AtomicU16::new(0) }; 4] }
    }

    pub fn set(&self, base: u64, bytes: usize) {
        use core::sync::atomic::Ordering::Relaxed;
        self.limit.store((bytes - 1) as u16, Relaxed);
        for (i, word) in self.base.iter().enumerate() {
            word.store((base >> (16 * i)) as u16, Relaxed);
        }
    }
}

pub static AP_BOOT: ApBoot = ApBoot {
    id_leaf: AtomicU32::new(1),
    ids: AtomicU32::new(0),
    index: AtomicU64::new(0),
    cpus: AtomicU64::new(0),
    x2apic: AtomicU32::new(0),
    gdtr: TablePointer::empty(),
    idtr: TablePointer::empty(),
};

global_asm!(
    include_str!("boot.s"),
    boot_main = sym crate::boot_main,
    ap_main = sym crate::ap_main,
    crashed = sym crate::crashed,
    AP_BOOT = sym AP_BOOT,
    AP_ID_LEAF = const offset_of!(ApBoot, id_leaf),
    AP_IDS = const offset_of!(ApBoot, ids),
    AP_INDEX = const offset_of!(ApBoot, index),
    AP_CPUS = const offset_of!(ApBoot, cpus),
    AP_X2APIC = const offset_of!(ApBoot, x2apic),
    AP_GDTR = const offset_of!(ApBoot, gdtr),
    AP_IDTR = const offset_of!(ApBoot, idtr),
    CPU_SIZE = const size_of::<Cpu>(),
    CPU_STACK = const offset_of!(Cpu, stack_top),
    CPU_CRASH = const offset_of!(Cpu, crash),
    CPU_IRQ_SLOT = const offset_of!(Cpu, irq_stack) + crate::cpu::SLOT,
    LINES = const LINES,
    VECTOR_LINES = const VECTOR_LINES,
    VECTOR_SHARED = const VECTOR_SHARED,
    VECTOR_SPURIOUS = const VECTOR_SPURIOUS,
    VECTOR_TIMER = const VECTOR_TIMER,
);

unsafe extern "C" {
    /// The start of real-mode code for the other CPUs, to be copied below 1 MiB.
    pub static trampoline_start: u8;
    pub static trampoline_end: u8;
    /// Entries of vectors 0 to 31, 16 bytes apart.
    pub static fault_stubs: u8;
    /// Entries of vectors 32 to 255, 16 bytes apart.
    pub static irq_stubs: u8;
    /// Entries of the vectors of interrupt lines, 16 bytes apart, that pass the interrupt on.
    pub static line_stubs: u8;
    /// The entry of #GP, through which ring 3 reaches ring 0.
    pub static gate_entry: u8;
    /// The top-level page table the image brings: 4 GiB in pages of 2 MiB.
    pub static boot_pml4: u8;
    /// The first byte after the image.
    pub static image_end: u8;
}

/// The address of a symbol of `boot.s` or of the linker script.
pub fn address(symbol: &u8) -> u64 {
    core::ptr::from_ref(symbol) as u64
}
