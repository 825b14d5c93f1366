//! The local APIC: through MSRs (x2APIC) where the CPU has them, else through its page.

use core::arch::x86_64::_rdtsc;

use crate::cpu::{VECTOR_SPURIOUS, VECTOR_TIMER, VECTOR_WAKE};
use crate::gate;
use crate::mem::Mmio;

const SPURIOUS: u32 = 0xf0;
const ICR: u32 = 0x300;
const LVT_TIMER: u32 = 0x320;
const LVT_LINT0: u32 = 0x350;
const TIMER_INITIAL: u32 = 0x380;
const TIMER_CURRENT: u32 = 0x390;
const TIMER_DIVIDE: u32 = 0x3e0;
const MASKED: u32 = 1 << 16;
const DIVIDE_BY_1: u32 = 0xb;

/// The registers of the local APIC; each CPU sees its own through the same value.
pub struct Apic {
    x2apic: bool,
    page: Mmio,
}

impl Apic {
    /// Switches the local APIC of CPU 0 on and keeps the interrupts of a PC's past away.
    pub fn init() -> Self {
        gate::out8(0x21, 0xff);
        gate::out8(0xa1, 0xff);
        let x2apic = gate::cpuid(1, 0)[2] & 1 << 21 != 0;
        // SAFETY: the local APIC is at its architectural place; its page is no memory.
        let apic = Apic { x2apic, page: unsafe { Mmio::new(0xfee0_0000, 0x1000) } };
        let base = gate::read_msr(0x1b) | 1 << 11 | u64::from(x2apic) << 10;
        // SAFETY: enabling the APIC in the mode the processor says it has.
        unsafe { gate::write_msr(0x1b, base) };
        apic.write(SPURIOUS, 0x100 | u32::from(VECTOR_SPURIOUS));
        apic.write(LVT_LINT0, MASKED);
        apic.write(LVT_TIMER, VECTOR_TIMER.into());
        apic.write(TIMER_DIVIDE, DIVIDE_BY_1);
        apic
    }

    pub fn x2apic(&self) -> bool {
        self.x2apic
    }

    /// The id of this CPU.
    pub fn id(&self) -> u32 {
        if self.x2apic { gate::read_msr(0x802) as u32 } else { self.page.read32(0x20) >> 24 }
    }

    fn write(&self, register: u32, value: u32) {
        if self.x2apic {
            // SAFETY: an APIC register.
            unsafe { gate::write_msr(0x800 + (register >> 4), value.into()) };
        } else {
            self.page.write32(register as usize, value);
        }
    }

    fn read(&self, register: u32) -> u32 {
        if self.x2apic {
            gate::read_msr(0x800 + (register >> 4)) as u32
        } else {
            self.page.read32(register as usize)
        }
    }

    fn send(&self, id: u32, command: u32) {
        if self.x2apic {
            // SAFETY: the interrupt command register.
            unsafe { gate::write_msr(0x830, u64::from(id) << 32 | u64::from(command)) };
        } else {
            self.page.write32(ICR as usize + 0x10, id << 24);
            self.page.write32(ICR as usize, command);
        }
    }

    pub fn init_ipi(&self, id: u32) {
        self.send(id, 0x4500);
    }

    pub fn startup_ipi(&self, id: u32, page: u64) {
        self.send(id, 0x4600 | (page >> 12) as u32);
    }

    /// Wakes another CPU out of `hlt`.
    pub fn wake(&self, id: u32) {
        self.send(id, 0x4000 | u32::from(VECTOR_WAKE));
    }

    /// Stops the timer of this CPU.
    pub fn stop_timer(&self) {
        self.write(TIMER_INITIAL, 0);
    }
}

/// How fast the two clocks of a CPU run.
#[derive(Clone, Copy)]
pub struct Clock {
    pub tsc_hz: u64,
    pub timer_hz: u64,
}

impl Clock {
    /// Asks the hypervisor, or else measures the TSC against the APIC timer.
    pub fn find(apic: &Apic) -> Self {
        let mut timer_hz = 1_000_000_000;
        if gate::cpuid(1, 0)[2] & 1 << 31 != 0 && gate::cpuid(0x4000_0000, 0)[0] >= 0x4000_0010 {
            let [tsc_khz, bus_khz, ..] = gate::cpuid(0x4000_0010, 0);
            if bus_khz != 0 {
                timer_hz = u64::from(bus_khz) * 1000;
            }
            if tsc_khz != 0 {
                return Clock { tsc_hz: u64::from(tsc_khz) * 1000, timer_hz };
            }
        }
        apic.write(LVT_TIMER, MASKED | u32::from(VECTOR_TIMER));
        apic.write(TIMER_INITIAL, u32::MAX);
        let (from, start) = (apic.read(TIMER_CURRENT), now());
        while now() - start < 3_000_000 {
            core::hint::spin_loop();
        }
        let (to, end) = (apic.read(TIMER_CURRENT), now());
        apic.write(TIMER_INITIAL, 0);
        apic.write(LVT_TIMER, VECTOR_TIMER.into());
        let counts = u64::from(from.wrapping_sub(to)).max(1);
        Clock { tsc_hz: ((end - start) * timer_hz / counts).max(1_000_000), timer_hz }
    }

    pub fn micros(&self, ticks: u64) -> u64 {
        (u128::from(ticks) * 1_000_000 / u128::from(self.tsc_hz)) as u64
    }

    pub fn ticks(&self, micros: u64) -> u64 {
        self.tsc_hz / 1000 * micros / 1000
    }

    /// Counts of the APIC timer.
    pub fn timer(&self, micros: u64) -> u32 {
        u32::try_from(self.timer_hz / 1000 * micros / 1000).unwrap_or(u32::MAX)
    }
}

/// Whether a device can interrupt a CPU with an id above 255, without interrupt remapping: KVM's
/// extended destination ids.
pub fn msi_reaches(id: u32) -> bool {
    let [highest, a, b, c] = gate::cpuid(0x4000_0000, 0);
    let kvm = [a, b, c] == [0x4b4d_564b, 0x564b_4d56, 0x4d] && highest > 0x4000_0000;
    kvm && gate::cpuid(0x4000_0001, 0)[0] & 1 << 15 != 0 && id < 1 << 15
}

/// The time stamp counter of this CPU.
pub fn now() -> u64 {
    // SAFETY: every x86-64 processor has it, and ring 3 may read it unless CR4.TSD is set.
    unsafe { _rdtsc() }
}
