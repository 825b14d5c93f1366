//! The fixed power management registers of ACPI (ACPI 6.5 §4.8.3): power-off and the power button.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering::SeqCst};

use iothread::ExitCx;

use crate::device::Device;
use crate::irq::{self, IrqLine};
use crate::power::{Power, PowerRequest};

/// Offset of the enable register in the event block; the status register is at 0.
const ENABLE: u64 = 2;
/// Offset of the control register.
const CONTROL: u64 = 4;

/// Status and enable: the power button, PWRBTN_STS and PWRBTN_EN.
const POWER_BUTTON: u16 = 1 << 8;

/// Control: SCI_EN, the machine is in ACPI mode. It never was in another.
const SCI_ENABLE: u16 = 1;
/// Control: SLP_EN, enter the sleeping state SLP_TYPx.
const SLEEP_ENABLE: u16 = 1 << 13;
const SLEEP_TYPE_SHIFT: u32 = 10;
/// Types of S5, "soft off". The machine's own table says 0; 5 is what guests write that do not
/// read it.
const SOFT_OFF: [u16; 2] = [0, 5];

/// The PM1a event block, 4 ports, and the PM1a control block, 2 ports, behind it.
///
/// The power button is the only event there is. The enable register keeps what is written: Linux
/// reads it back to see whether an event could be enabled.
pub struct PowerPorts {
    power: Arc<dyn Power>,
    /// The system control interrupt: high while an event has happened that is enabled.
    sci: Arc<dyn IrqLine>,
    status: AtomicU16,
    enable: AtomicU16,
}

impl fmt::Debug for PowerPorts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PowerPorts").field("enable", &self.enable).finish_non_exhaustive()
    }
}

impl PowerPorts {
    /// The first port of the event block.
    pub const PORT: u64 = 0x600;
    /// The first port of the control block.
    pub const CONTROL_PORT: u64 = Self::PORT + CONTROL;
    /// How many ports there are, in both blocks.
    pub const SIZE: u64 = 6;

    /// The interrupt of its events.
    pub const SCI: u32 = 9;

    /// Ports that ask `power` to switch off, and tell of events by `sci`.
    pub fn new(power: Arc<dyn Power>, sci: Arc<dyn IrqLine>) -> Self {
        Self { power, sci, status: AtomicU16::new(0), enable: AtomicU16::new(0) }
    }

    /// Presses the power button: a guest that listens shuts down by itself. Any thread may call
    /// this.
    pub fn press_power_button(&self) {
        self.status.fetch_or(POWER_BUTTON, SeqCst);
        self.settle();
    }

    fn settle(&self) {
        irq::settle(&*self.sci, || self.status.load(SeqCst) & self.enable.load(SeqCst) != 0);
    }

    /// The status and the enable register, to be saved.
    pub fn save(&self) -> (u16, u16) {
        (self.status.load(SeqCst), self.enable.load(SeqCst))
    }

    /// Takes on what [`save`](Self::save) gave.
    pub fn restore(&self, (status, enable): (u16, u16)) {
        self.status.store(status & POWER_BUTTON, SeqCst);
        self.enable.store(enable, SeqCst);
        self.settle();
    }

    fn write_control(&self, value: u16) {
        let kind = value >> SLEEP_TYPE_SHIFT & 7;
        if value & SLEEP_ENABLE != 0 && SOFT_OFF.contains(&kind) {
            self.power.request(PowerRequest::Off);
        }
    }
}

impl Device for PowerPorts {
    fn read(&self, offset: u64, data: &mut [u8], _: &mut ExitCx<'_>) {
        let [status, more_status] = self.status.load(SeqCst).to_le_bytes();
        let [low, high] = self.enable.load(SeqCst).to_le_bytes();
        let ports = [status, more_status, low, high, SCI_ENABLE as u8, 0];
        for (byte, port) in data.iter_mut().zip(offset..) {
            *byte = ports.get(port as usize).copied().unwrap_or(0);
        }
    }

    fn write(&self, offset: u64, data: &[u8], _: &mut ExitCx<'_>) {
        let mut control = 0;
        for (&byte, port) in data.iter().zip(offset..) {
            let shift = port as u32 % 2 * 8;
            let (bits, lane) = (u16::from(byte) << shift, 0xff << shift);
            if port >= CONTROL {
                control |= bits;
            } else if port >= ENABLE {
                let merge = |old: u16| Some(old & !lane | bits);
                // Cannot fail: there is always a new value.
                let _ = self.enable.fetch_update(SeqCst, SeqCst, merge);
            } else {
                self.status.fetch_and(!bits, SeqCst); // written ones clear
            }
        }
        self.settle();
        self.write_control(control);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::legacy::testing::{Bench, Wire};

    fn bench() -> Bench<PowerPorts> {
        Bench::new(|power| PowerPorts::new(power, Arc::new(Wire::default())))
    }

    #[test]
    fn the_power_button_interrupts_if_it_is_enabled_until_it_is_acknowledged() {
        let wire = Arc::new(Wire::default());
        let mut bench = Bench::new(|power| PowerPorts::new(power, Arc::clone(&wire) as _));
        bench.device.press_power_button();
        assert!(!wire.is_high(), "not enabled");
        assert_eq!(bench.read(0, 2), [0, 1]);
        bench.write(ENABLE, &[0, 1]);
        assert!(wire.is_high());
        bench.write(0, &[0xff, 0xfe]);
        assert!(wire.is_high(), "another event was acknowledged");
        bench.write(0, &[0, 1]);
        assert!(!wire.is_high());
        assert_eq!(bench.read(0, 2), [0, 0]);
        bench.device.press_power_button();
        assert!(wire.is_high());
        bench.write(ENABLE, &[0, 0]);
        assert!(!wire.is_high());
    }

    #[test]
    fn soft_off_switches_off_and_other_states_do_not() {
        for kind in 0..8 {
            let mut bench = bench();
            let value: u16 = SLEEP_ENABLE | kind << SLEEP_TYPE_SHIFT;
            bench.write(CONTROL, &(value & !SLEEP_ENABLE).to_le_bytes());
            assert_eq!(bench.requests.take(), []);
            bench.write(CONTROL, &value.to_le_bytes());
            let off = matches!(kind, 0 | 5);
            assert_eq!(bench.requests.take().contains(&PowerRequest::Off), off, "type {kind}");
        }
    }

    #[test]
    fn the_upper_half_of_the_control_register_is_enough() {
        let mut bench = bench();
        bench.write(CONTROL, &[0x34]);
        assert_eq!(bench.requests.take(), []);
        bench.write(CONTROL + 1, &[0x34]);
        assert_eq!(bench.requests.take(), [PowerRequest::Off]);
    }

    #[test]
    fn the_machine_is_in_acpi_mode_and_stays_there() {
        let mut bench = bench();
        assert_eq!(bench.read(CONTROL, 2), [1, 0]);
        bench.write(CONTROL, &[0, 0]);
        assert_eq!(bench.read(CONTROL, 2), [1, 0]);
    }

    #[test]
    fn the_enable_register_keeps_its_value_and_the_status_register_is_empty() {
        let mut bench = bench();
        bench.write(0, &[0xff; 2]);
        bench.write(ENABLE, &[0x20, 0x01]);
        bench.write(ENABLE + 1, &[0x03]);
        assert_eq!(bench.read(0, 4), [0, 0, 0x20, 0x03]);
        let mut other = self::bench();
        other.device.restore(bench.device.save());
        assert_eq!(other.read(ENABLE, 2), [0x20, 0x03]);
        assert_eq!(bench.requests.take(), []);
        bench.access_all(PowerPorts::SIZE, 0xff);
    }
}
