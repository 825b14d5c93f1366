//! One structure per CPU, the descriptor tables, and starting the CPUs.

use core::cell::UnsafeCell;
use core::mem::{offset_of, size_of};
use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use alloc::vec;
use alloc::vec::Vec;

use crate::apic::Apic;
use crate::boot::{self, AP_BOOT, TablePointer, address};
use crate::{gate, mem};

/// Vectors of interrupt lines: `VECTOR_LINES + input of the I/O APIC`. They all go to CPU 0, which
/// passes them on to all others as `VECTOR_SHARED`.
pub const VECTOR_LINES: u8 = 0x20;
/// Inputs of the I/O APIC.
pub const LINES: usize = 24;
/// Vectors of virtio queues: `VECTOR_QUEUES + device`, the same on every CPU.
pub const VECTOR_QUEUES: u8 = 0x40;
/// Devices with a vector of their own; the next one shares with the first.
pub const VECTOR_COUNT: usize = 0xa0;
/// Configuration changes of virtio devices, sent to CPU 0.
pub const VECTOR_CONFIG: u8 = 0xe7;
pub const VECTOR_TIMER: u8 = 0xe8;
/// Sent by a CPU that is done, to wake CPU 0.
pub const VECTOR_WAKE: u8 = 0xe9;
pub const VECTOR_SHARED: u8 = 0xea;
pub const VECTOR_SPURIOUS: u8 = 0xff;

/// Offset in a ring 0 stack of its last 16 bytes. Interrupt frames are pushed below; the slot
/// holds the address of the `Cpu`.
pub const SLOT: usize = 1024 - 16;

const STACK: usize = 48 << 10;

#[repr(C, align(16))]
pub struct RingZeroStack(UnsafeCell<[u64; 128]>);

/// What a CPU was doing when it died.
#[repr(C)]
pub struct Crash {
    pub vector: AtomicU64,
    pub error: AtomicU64,
    pub rip: AtomicU64,
    pub address: AtomicU64,
}

/// All that belongs to one CPU. `boot.s` knows `counts` (at offset 0), `crash`, `stack_top` and
/// the slots.
#[repr(C, align(64))]
pub struct Cpu {
    counts: [AtomicU64; 256],
    pub crash: Crash,
    pub stack_top: AtomicU64,
    gate_stack: RingZeroStack,
    pub irq_stack: RingZeroStack,
    fault_stack: RingZeroStack,
    tss: UnsafeCell<[u32; 26]>,
    pub index: AtomicU32,
    pub apic_id: AtomicU32,
    /// One of `ABSENT`, `AT_WORK`, `DONE`, `CRASHED`.
    pub state: AtomicU32,
    /// Counts completed requests, for the watchdog.
    pub progress: AtomicU64,
    /// What the CPU is at: device in the upper half, phase in the lower.
    pub at: AtomicU32,
}

// SAFETY: other CPUs touch only the atomic fields; the cells are written by CPU 0 before the CPU
// starts, and by its own ring 0 entries afterwards.
unsafe impl Sync for Cpu {}

pub const ABSENT: u32 = 0;
pub const AT_WORK: u32 = 1;
pub const DONE: u32 = 2;
pub const CRASHED: u32 = 3;

/// Stands for a fault vector when the CPU died of a panic.
pub const PANIC: u64 = 256;

impl Cpu {
    /// How often this vector came to this CPU.
    pub fn count(&self, vector: u8) -> u64 {
        self.counts[usize::from(vector)].load(Ordering::Relaxed)
    }

    /// Whether only the extended bits of a message's destination reach this CPU.
    pub fn is_far(&self) -> bool {
        self.apic_id.load(Ordering::Relaxed) > 0xff
    }

    /// Whether a queue of a device has interrupted this CPU.
    pub fn got_message(&self) -> bool {
        (VECTOR_QUEUES..VECTOR_QUEUES + VECTOR_COUNT as u8).any(|v| self.count(v) > 0)
    }

    /// Interrupts of vectors nobody asked for. `lines`: there are interrupt lines.
    pub fn strays(&self, lines: bool) -> u64 {
        (0x20..0xff)
            .filter(|&v| {
                let queue = (VECTOR_QUEUES..VECTOR_QUEUES + VECTOR_COUNT as u8).contains(&v);
                let line = (VECTOR_LINES..VECTOR_LINES + LINES as u8).contains(&v);
                let known = queue || lines && (line || v == VECTOR_SHARED);
                !known && !matches!(v, VECTOR_CONFIG | VECTOR_TIMER | VECTOR_WAKE)
            })
            .map(|v| self.count(v))
            .sum()
    }

    /// Whether an address lies on this CPU's stack.
    pub fn owns_stack(&self, address: u64) -> bool {
        let top = self.stack_top.load(Ordering::Relaxed);
        (top - STACK as u64..=top).contains(&address)
    }

    fn init(&self, index: usize, apic_id: u32) {
        self.index.store(index as u32, Ordering::Relaxed);
        self.apic_id.store(apic_id, Ordering::Relaxed);
        let stack = mem::pages(STACK);
        // As a function finds it: 8 below a multiple of 16.
        self.stack_top.store((stack.as_ptr() as u64) + STACK as u64 - 8, Ordering::Relaxed);
        let me = core::ptr::from_ref(self) as u64;
        let tss = self.tss.get().cast::<u32>();
        for (ist, stack) in
            [&self.gate_stack, &self.irq_stack, &self.fault_stack].iter().enumerate()
        {
            let top = stack.0.get() as u64 + SLOT as u64;
            // SAFETY: the CPU has not started, so nothing else looks at its stacks and its TSS;
            // the slot lies within the stack, and IST entries 1 to 3 within the TSS.
            unsafe {
                (top as *mut u64).write(me);
                tss.add(9 + 2 * ist).write(top as u32);
                tss.add(10 + 2 * ist).write((top >> 32) as u32);
            }
        }
        // SAFETY: as above; word 25 holds the offset of the (empty) I/O bitmap.
        unsafe { tss.add(25).write((size_of::<[u32; 26]>() as u32) << 16) };
    }
}

const IST_GATE: u64 = 1;
const IST_IRQ: u64 = 2;
const IST_FAULT: u64 = 3;

/// The 16 bytes of an interrupt gate.
fn interrupt_gate(entry: u64, ist: u64) -> [u64; 2] {
    let low = entry & 0xffff | 0x10 << 16 | ist << 32 | 0x8e << 40 | (entry >> 16 & 0xffff) << 48;
    [low, entry >> 32]
}

fn interrupt_table(cpus: usize) -> Vec<u64> {
    // SAFETY: only the addresses of these symbols are taken.
    let (faults, irqs, gate, lines) = unsafe {
        (
            address(&boot::fault_stubs),
            address(&boot::irq_stubs),
            address(&boot::gate_entry),
            address(&boot::line_stubs),
        )
    };
    let (first, count) = (u64::from(VECTOR_LINES), LINES as u64);
    (0..256)
        .flat_map(|v: u64| match v {
            13 => interrupt_gate(gate, IST_GATE),
            0..32 => interrupt_gate(faults + 16 * v, IST_FAULT),
            _ if cpus > 1 && (first..first + count).contains(&v) => {
                interrupt_gate(lines + 16 * (v - first), IST_IRQ)
            }
            _ => interrupt_gate(irqs + 16 * (v - 32), IST_IRQ),
        })
        .collect()
}

/// The descriptors of `boot.s` and a TSS for every CPU.
fn descriptor_table(cpus: &[Cpu]) -> Vec<u64> {
    let mut gdt = vec![
        0,
        0,
        0x00af_9b00_0000_ffff,
        0x00cf_9300_0000_ffff,
        0,
        0x00cf_f300_0000_ffff,
        0x00af_fb00_0000_ffff,
        0,
    ];
    for cpu in cpus {
        let base = cpu.tss.get() as u64;
        gdt.push(0x67 | (base & 0xff_ffff) << 16 | 0x89 << 40 | (base >> 24 & 0xff) << 56);
        gdt.push(base >> 32);
    }
    gdt
}

/// Makes the structures of all CPUs and loads the tables on this one, the first in `apic_ids`.
pub fn init(apic_ids: &[u32], x2apic: bool) -> &'static [Cpu] {
    let memory = mem::pages(size_of::<Cpu>() * apic_ids.len());
    memory.fill(0);
    // SAFETY: the memory is ours for good, aligned to a page, large enough, and all zeroes is a
    // valid `Cpu`.
    let cpus: &'static [Cpu] =
        unsafe { core::slice::from_raw_parts(memory.as_ptr().cast::<Cpu>(), apic_ids.len()) };
    for (index, (cpu, &id)) in cpus.iter().zip(apic_ids).enumerate() {
        cpu.init(index, id);
    }

    let highest = apic_ids.iter().copied().max().unwrap_or(0);
    let mut table = vec![0xffffu16; highest as usize + 1];
    for (index, &id) in apic_ids.iter().enumerate() {
        table[id as usize] = index as u16;
    }
    let gdt = descriptor_table(cpus).leak();
    let idt = interrupt_table(cpus.len()).leak();
    let has_leaf_11 = gate::cpuid(0, 0)[0] >= 11 && gate::cpuid(11, 0)[1] != 0;
    AP_BOOT.id_leaf.store(if has_leaf_11 { 11 } else { 1 }, Ordering::Relaxed);
    AP_BOOT.ids.store(highest + 1, Ordering::Relaxed);
    AP_BOOT.index.store(table.leak().as_ptr() as u64, Ordering::Relaxed);
    AP_BOOT.cpus.store(cpus.as_ptr() as u64, Ordering::Relaxed);
    AP_BOOT.x2apic.store(x2apic.into(), Ordering::Relaxed);
    AP_BOOT.gdtr.set(gdt.as_ptr() as u64, size_of_val(gdt));
    AP_BOOT.idtr.set(idt.as_ptr() as u64, size_of_val(idt));
    // SAFETY: both tables are complete and leaked; the selectors are those of `boot.s`.
    unsafe { gate::load_tables(&AP_BOOT.gdtr, &AP_BOOT.idtr, 0x40) };
    cpus
}

/// Puts the real-mode code into `page`, below 1 MiB.
pub fn install_trampoline(page: u64) {
    // SAFETY: only addresses are taken.
    let (start, end) =
        unsafe { (address(&boot::trampoline_start), address(&boot::trampoline_end)) };
    // SAFETY: `page` is a page of RAM nobody else uses, and the code is shorter than a page.
    unsafe {
        core::ptr::copy_nonoverlapping(start as *const u8, page as *mut u8, (end - start) as usize);
    }
}

/// Sends INIT and SIPI to all CPUs but this one. They go to work by themselves.
pub fn start_others(cpus: &[Cpu], apic: &Apic, page: u64) {
    let others = || cpus.iter().skip(1).map(|c| c.apic_id.load(Ordering::Relaxed));
    others().for_each(|id| apic.init_ipi(id));
    others().for_each(|id| apic.startup_ipi(id, page));
}

/// Sends another SIPI to those that did not come.
pub fn restart_missing(cpus: &[Cpu], apic: &Apic, page: u64) {
    for cpu in cpus.iter().skip(1) {
        if cpu.state.load(Ordering::Acquire) == ABSENT {
            apic.startup_ipi(cpu.apic_id.load(Ordering::Relaxed), page);
        }
    }
}

const _: () = assert!(offset_of!(Cpu, counts) == 0);
const _: () = assert!(size_of::<RingZeroStack>() == SLOT + 16);
const _: () = assert!(size_of::<TablePointer>() == 10);
