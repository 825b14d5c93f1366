//! The PCI Express capability of a root port with a hot-plug slot (PCI Express 3.0 §7.8, §6.7).
//!
//! The slot has an attention button, by which its user asks the guest to let go of the device, and
//! two indicators, by which the guest answers: while the power indicator is off the device may be
//! removed. There is no power controller, so a device that is plugged in is there at once. Commands
//! take no time, so their completion is not told.

use super::config::Config;

/// The id of the capability (PCI 3.0 appendix H).
const ID: u8 = 0x10;
/// Version 2, root port (type 4), with a slot; its interrupt is message 0.
const FLAGS: u16 = 2 | 4 << 4 | 1 << 8;
/// Role-based error reporting, which all have. Payloads have 128 bytes.
const DEVICE: u32 = 1 << 15;
/// Reports of errors can be enabled; there are none.
const DEVICE_CONTROL: u16 = 0xf;
/// 2.5 GT/s, one lane; the state of the link is told; ASPM is left out, as is allowed. From bit 24 on:
/// the number of the port.
const LINK: u32 = 1 | 1 << 4 | 1 << 20 | 1 << 22;
/// ASPM, disable, common clock, extended synch. What is asked of them is remembered, no more.
const LINK_CONTROL: u16 = 0b11 | LINK_DISABLE | 1 << 6 | 1 << 7;
const LINK_DISABLE: u16 = 1 << 4;
/// Speed and width of the link, and that it is active.
const LINK_UP: u16 = 1 | 1 << 4 | 1 << 13;
/// Attention button, attention and power indicators, surprise removal, hot-plug, no completions
/// of commands. From bit 19 on: the number of the slot.
const SLOT: u32 = 1 | 1 << 3 | 1 << 4 | 1 << 5 | 1 << 6 | 1 << 18;
/// Both indicators off.
const INDICATORS_OFF: u16 = 0b11 << 6 | POWER_INDICATOR;
const POWER_INDICATOR: u16 = 0b11 << 8;
const INTERRUPT_ENABLE: u16 = 1 << 5;
const LINK_CHANGED_ENABLE: u16 = 1 << 12;
/// What the guest may write of slot control: the enables of events there are, and the indicators.
const SLOT_CONTROL: u16 =
    BUTTON_PRESSED | PRESENCE_CHANGED | INTERRUPT_ENABLE | INDICATORS_OFF | LINK_CHANGED_ENABLE;
/// Slot status: something is plugged in.
const PRESENT: u16 = 1 << 6;
/// Enables of errors and of power management events; there are none.
const ROOT_CONTROL: u16 = 0xf;
/// 2.5 GT/s is the only speed.
const LINK_SPEEDS: u32 = 1 << 1;

/// Events in slot status. The first two have their enables at the same place in slot control.
pub(super) const BUTTON_PRESSED: u16 = 1 << 0;
pub(super) const PRESENCE_CHANGED: u16 = 1 << 3;
pub(super) const LINK_CHANGED: u16 = 1 << 8;
pub(super) const EVENTS: u16 = BUTTON_PRESSED | PRESENCE_CHANGED | LINK_CHANGED;

/// Registers with a control half below a status half, from the first of the capability.
const LINK_REGISTER: u16 = 0x10 / 4;
const SLOT_REGISTER: u16 = 0x18 / 4;

/// Where the capability is in a port's registers. They hold what the guest writes; the status
/// halves are put together when they are read.
#[derive(Debug, Clone, Copy)]
pub(super) struct ExpressRegisters {
    first: u16,
}

impl ExpressRegisters {
    /// Adds the capability for a port whose slot has number `number`, 1 and up.
    pub(super) fn add(config: &mut Config, number: u8) -> Self {
        let number = u32::from(number);
        let registers: [(u32, u32); 14] = [
            (DEVICE, 0),
            (0, DEVICE_CONTROL.into()),
            (LINK | number << 24, 0),
            (0, LINK_CONTROL.into()),
            (SLOT | number << 19, 0),
            (INDICATORS_OFF.into(), SLOT_CONTROL.into()),
            (0, ROOT_CONTROL.into()),
            (0, 0), // root status
            (0, 0), // the second set: device, device control,
            (0, 0),
            (LINK_SPEEDS, 0),
            (0, 0), // link control,
            (0, 0), // slot, slot control
            (0, 0),
        ];
        let mut body = FLAGS.to_le_bytes().to_vec();
        let mut writable = vec![0; 2];
        for (value, mask) in registers {
            body.extend(value.to_le_bytes());
            writable.extend(mask.to_le_bytes());
        }
        Self { first: config.add_capability(ID, &body, &writable) }
    }

    /// Is this the register with link control?
    pub(super) fn is_link(self, register: u16) -> bool {
        register == self.first + LINK_REGISTER
    }

    /// Is this the register with slot control and slot status?
    pub(super) fn is_slot(self, register: u16) -> bool {
        register == self.first + SLOT_REGISTER
    }

    /// Has the guest switched the link off?
    pub(super) fn link_disabled(self, config: &Config) -> bool {
        config.read(self.first + LINK_REGISTER) as u16 & LINK_DISABLE != 0
    }

    /// Is the power indicator off?
    pub(super) fn power_indicator_off(self, config: &Config) -> bool {
        self.slot_control(config) & POWER_INDICATOR == POWER_INDICATOR
    }

    /// Is one of `events` to interrupt the guest (§6.7.3.4)?
    pub(super) fn interrupts(self, config: &Config, events: u16) -> bool {
        let control = self.slot_control(config);
        let mut enabled = control & (BUTTON_PRESSED | PRESENCE_CHANGED);
        if control & LINK_CHANGED_ENABLE != 0 {
            enabled |= LINK_CHANGED;
        }
        control & INTERRUPT_ENABLE != 0 && enabled & events != 0
    }

    fn slot_control(self, config: &Config) -> u16 {
        config.read(self.first + SLOT_REGISTER) as u16
    }
}

/// Link status, to be put into the upper half of its register.
pub(super) fn link_status(up: bool) -> u32 {
    if up { u32::from(LINK_UP) << 16 } else { 0 }
}

/// Slot status, to be put into the upper half of its register.
pub(super) fn slot_status(events: u16, present: bool) -> u32 {
    u32::from(events | if present { PRESENT } else { 0 }) << 16
}
