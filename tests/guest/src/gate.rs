//! Privileged work asked of ring 0. Each call is one fault and a few instructions there, which is
//! cheap on hardware and dear where ring 0 is interpreted: nothing here belongs into a hot loop.

use core::arch::asm;

use crate::boot::TablePointer;

/// The order of `gate_table` in `boot.s`.
#[derive(Clone, Copy)]
#[repr(u64)]
enum Op {
    Out8,
    Out16,
    PciRead,
    PciWrite,
    ReadMsr,
    WriteMsr,
    Cpuid,
    Tables,
    Emit,
    Halt,
    Park,
    TripleFault,
}

/// # Safety
/// The operation with these arguments must be sound: addresses valid for what ring 0 does with
/// them, and no change of machine state that Rust relies on.
unsafe fn call(op: Op, a: u64, b: u64, c: u64, d: u64) -> u64 {
    let result: u64;
    // SAFETY: the gate keeps every register but those named here, and the caller vouches for the
    // operation itself.
    unsafe {
        asm!(
            "call gate",
            inlateout("rax") op as u64 => result,
            inlateout("rdi") a => _,
            inlateout("rsi") b => _,
            inlateout("rdx") c => _,
            inlateout("r8") d => _,
            lateout("rcx") _,
            lateout("r9") _,
        );
    }
    result
}

/// Writes a byte to an I/O port.
pub fn out8(port: u16, value: u8) {
    // SAFETY: no port of these machines makes a device write to memory by itself.
    unsafe { call(Op::Out8, port.into(), value.into(), 0, 0) };
}

pub fn out16(port: u16, value: u16) {
    // SAFETY: as for `out8`.
    unsafe { call(Op::Out16, port.into(), value.into(), 0, 0) };
}

/// Reads a register of PCI configuration space; `address` as port 0xcf8 wants it.
pub fn pci_read(address: u32) -> u32 {
    // SAFETY: reading configuration space has no effect on memory.
    unsafe { call(Op::PciRead, address.into(), 0, 0, 0) as u32 }
}

pub fn pci_write(address: u32, value: u32) {
    // SAFETY: what is written are command registers and MSI-X control words of devices whose
    // rings lie in memory set aside for them.
    unsafe { call(Op::PciWrite, address.into(), value.into(), 0, 0) };
}

pub fn read_msr(msr: u32) -> u64 {
    // SAFETY: reading has no effect; an unknown register ends in `crashed`.
    unsafe { call(Op::ReadMsr, msr.into(), 0, 0, 0) }
}

/// # Safety
/// The register must be one of the local APIC: others can pull the ground from under Rust.
pub unsafe fn write_msr(msr: u32, value: u64) {
    // SAFETY: by the caller.
    unsafe { call(Op::WriteMsr, msr.into(), value, 0, 0) };
}

/// CPUID as ring 0 sees it: eax, ebx, ecx, edx.
pub fn cpuid(leaf: u32, sub: u32) -> [u32; 4] {
    let mut out = [0u32; 4];
    // SAFETY: `out` has room for the four registers ring 0 stores there.
    unsafe { call(Op::Cpuid, leaf.into(), sub.into(), out.as_mut_ptr() as u64, 0) };
    out
}

/// Loads the GDT, the IDT and the task register, and turns interrupts on.
///
/// # Safety
/// The tables must be complete, keep the selectors of `boot.s`, and stay where they are for good.
pub unsafe fn load_tables(gdt: &TablePointer, idt: &TablePointer, tss: u16) {
    let gdt = core::ptr::from_ref(gdt) as u64;
    let idt = core::ptr::from_ref(idt) as u64;
    // SAFETY: by the caller.
    unsafe { call(Op::Tables, gdt, idt, tss.into(), 0) };
}

/// Writes text to the serial port.
pub fn emit(text: &[u8]) {
    // SAFETY: ring 0 reads exactly the bytes of the slice.
    unsafe { call(Op::Emit, text.len() as u64, text.as_ptr() as u64, 0, 0) };
}

/// Halts this CPU unless `*counter != seen` or a timer tick came after `ticks`. Arms the timer
/// with `timer` counts first if that is not 0. Any interrupt ends the halt. False if neither was
/// done.
///
/// # Safety
/// `counter` must be readable; a device may write to it meanwhile.
pub unsafe fn halt_unless_changed(counter: *const u16, seen: u16, timer: u32, ticks: u64) -> bool {
    // SAFETY: ring 0 only reads `counter`, the caller says it may.
    unsafe { call(Op::Halt, counter as u64, seen.into(), timer.into(), ticks) != 0 }
}

/// Halts this CPU for good, interrupts off.
pub fn park() -> ! {
    loop {
        // SAFETY: nothing runs on this CPU afterwards.
        unsafe { call(Op::Park, 0, 0, 0, 0) };
    }
}

/// Shuts the processor down by a fault it cannot deliver.
pub fn triple_fault() -> ! {
    loop {
        // SAFETY: nothing runs afterwards.
        unsafe { call(Op::TripleFault, 0, 0, 0, 0) };
    }
}
