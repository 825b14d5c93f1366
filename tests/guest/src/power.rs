//! Ending the machine.

use core::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use crate::acpi::PowerOff;
use crate::gate;

const UNKNOWN: u32 = u32::MAX;

/// How this machine ends, kept where a panic finds it.
static PM1A: AtomicU32 = AtomicU32::new(UNKNOWN);
static SLEEP_CONTROL: AtomicU32 = AtomicU32::new(UNKNOWN);
static S5: AtomicU32 = AtomicU32::new(UNKNOWN);
static DEBUG_EXIT: AtomicBool = AtomicBool::new(false);

/// Remembers what ACPI says, and whether the command line asked for the debug exit port.
pub fn remember(acpi: PowerOff, debug_exit: bool) {
    PM1A.store(acpi.pm1a.map_or(UNKNOWN, u32::from), Ordering::Relaxed);
    SLEEP_CONTROL.store(acpi.sleep_control.map_or(UNKNOWN, u32::from), Ordering::Relaxed);
    S5.store(acpi.s5.map_or(UNKNOWN, u32::from), Ordering::Relaxed);
    DEBUG_EXIT.store(debug_exit, Ordering::Relaxed);
}

/// Ends the machine, by the debug exit port if asked, else by ACPI, else by whatever works.
pub fn off(ok: bool) -> ! {
    let known = |value: &AtomicU32| Some(value.load(Ordering::Relaxed)).filter(|&v| v != UNKNOWN);
    if DEBUG_EXIT.load(Ordering::Relaxed) {
        gate::out8(0xf4, u8::from(!ok));
    }
    if let Some(s5) = known(&S5) {
        if let Some(port) = known(&SLEEP_CONTROL) {
            gate::out8(port as u16, (s5 << 2 | 1 << 5) as u8);
        }
        if let Some(port) = known(&PM1A) {
            gate::out16(port as u16, (s5 << 10 | 1 << 13) as u16);
        }
    }
    // Where QEMU's q35 has that register, in case there were no tables to say so.
    gate::out16(0x604, 0x2000);
    gate::out8(0xcf9, 0x02);
    gate::out8(0xcf9, 0x06);
    gate::out8(0x64, 0xfe);
    gate::triple_fault()
}
