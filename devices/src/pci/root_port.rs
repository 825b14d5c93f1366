//! A PCI Express root port: a bridge on bus 0 with a slot behind it into which a function can be
//! plugged while the guest runs.
//!
//! Simplified: one function per slot; the function behind is not reset with its link, and the
//! secondary bus reset of bridge control cannot be asked for; no power management capability, so
//! the port is always in D0; no errors, hence no advanced error reporting.

use std::fmt;
use std::sync::{Arc, OnceLock, Weak};

use iothread::{ExitCx, Reply};
use serde::{Deserialize, Serialize};

use super::bar_space::BarSpace;
use super::bridge::{self, Bridge, Room};
use super::config::{COMMAND_STATUS, Config, INTERRUPT_STATUS, Ids};
use super::endpoint::moves_bars;
use super::express::{self, EVENTS, ExpressRegisters};
use super::function::{Function, Upstream};
use super::msi::MessageRegisters;
use crate::device::{Body, Lifecycle, Paused, RestoreError, State};
use crate::irq::{IrqLine, MsiSender, Pin};

/// This id is registered (as Red Hat's) for a virtual root port without registers beyond the
/// standard ones.
const ROOT_PORT: Ids = Ids {
    vendor: 0x1b36,
    device: 0x000c,
    class: 0x06_0400,
    revision: 0,
    subsystem_vendor: 0x1b36,
    subsystem: 0,
};

/// The slot has something in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the slot is taken")]
pub struct Occupied;

/// What changes while the guest runs, besides registers.
#[derive(Default)]
struct Slot {
    function: Option<Arc<dyn Function>>,
    /// Those the guest has not cleared yet, as in slot status.
    events: u16,
    /// The guest has got the message for the events that are there (PCI Express 3.0 §6.7.3.4: one
    /// when the first comes, and no other until all are cleared).
    told: bool,
}

/// A root port with a hot-plug slot, empty at first.
///
/// Linux's `pciehp` takes a new function into use as soon as it sees the link, and drops one that is
/// [unplugged](Self::unplug) with all that is in flight. Who wants it to finish first
/// [presses the button](Self::press_button) and waits until it
/// [permits the removal](Self::permits_removal), about five seconds.
pub struct RootPort {
    name: String,
    bridge: Arc<Bridge>,
    express: ExpressRegisters,
    msi: MessageRegisters,
    sender: Arc<dyn MsiSender>,
    pin: OnceLock<Pin>,
    /// Held while a register of the port is accessed, so that what depends on several is never
    /// seen halfway. A function's own registers are accessed without it.
    #[expect(clippy::disallowed_types, reason = "configuration space is cold")]
    slot: std::sync::Mutex<Slot>,
}

impl fmt::Debug for RootPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RootPort").field("name", &self.name).finish_non_exhaustive()
    }
}

/// What [`RootPort`] remembers.
#[derive(Serialize, Deserialize)]
struct Saved {
    config: Vec<u32>,
    occupied: bool,
    events: u16,
    told: bool,
}

impl Body for Saved {
    const KIND: &'static str = "pci-root-port";
    const VERSION: u32 = 1;
}

impl RootPort {
    /// An empty port with slot number `number`, 1 and up, which no other port of the machine has.
    /// Decoding is on, bus numbers and windows are set: as firmware leaves it.
    ///
    /// # Panics
    /// If no bridge can have that `room`.
    pub fn new(name: &str, number: u8, room: &Room, sender: Arc<dyn MsiSender>) -> Self {
        let mut config = Config::bridge(&ROOT_PORT);
        config.use_pin_a();
        bridge::define(&mut config, room);
        let msi = MessageRegisters::add(&mut config);
        let express = ExpressRegisters::add(&mut config, number);
        let bridge = Arc::new(Bridge::new(config));
        let pin = OnceLock::new();
        Self { name: name.to_owned(), bridge, express, msi, sender, pin, slot: Default::default() }
    }

    /// Wires the interrupt pin, once; until then a guest without MSI gets no interrupts.
    pub fn connect_pin(&self, pin: Pin) {
        let _ = self.pin.set(pin);
    }

    /// Where BARs of a function to be plugged in can lie: in the window for memory, as the guest has
    /// it now.
    pub fn bar_space(&self) -> BarSpace {
        let window = self.bridge.memory();
        BarSpace::new(*window.start(), window.end() + 1)
    }

    /// Puts `function` into the slot: the link comes up, and the guest is told. From now on the
    /// function is decoded only where the port forwards accesses.
    pub fn plug(&self, function: Arc<dyn Function>) -> Result<(), Occupied> {
        let mut slot = self.slot();
        if slot.function.is_some() {
            return Err(Occupied);
        }
        let bridge: Weak<Bridge> = Arc::downgrade(&self.bridge);
        function.move_behind(bridge);
        slot.function = Some(function);
        self.presence_changed(&mut slot);
        Ok(())
    }

    /// Takes the function out of the slot, whether the guest agrees or not: the link goes down, the
    /// function is decoded no longer, and the guest is told. `None`: the slot is empty. Addresses
    /// that others wait for are free then, see [`PciRoot::settle`](super::PciRoot::settle).
    pub fn unplug(&self) -> Option<Arc<dyn Function>> {
        let mut slot = self.slot();
        let function = slot.function.take()?;
        function.move_behind(Weak::<Bridge>::new());
        function.settle();
        self.presence_changed(&mut slot);
        Some(function)
    }

    /// Asks the guest to let go of the function, or to use it again if it has just been asked.
    pub fn press_button(&self) {
        let mut slot = self.slot();
        slot.events |= express::BUTTON_PRESSED;
        self.interrupt(&mut slot);
    }

    /// Has the guest let go of what is in the slot? That is what a power indicator that is off says
    /// (PCI Express 3.0 §6.7.1.1.2). It is off at first, too, until the guest uses the function.
    pub fn permits_removal(&self) -> bool {
        self.express.power_indicator_off(&self.bridge.config)
    }

    /// Is bus `bus` the one behind this port?
    pub(super) fn leads_to(&self, bus: u8) -> bool {
        self.bridge.leads_to(bus)
    }

    /// The function in the slot, if the guest has not switched the link off.
    pub(super) fn behind(&self) -> Option<Arc<dyn Function>> {
        let slot = self.slot();
        slot.function.clone().filter(|_| self.bridge.link())
    }

    fn slot(&self) -> std::sync::MutexGuard<'_, Slot> {
        self.slot.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    fn presence_changed(&self, slot: &mut Slot) {
        slot.events |= express::PRESENCE_CHANGED;
        if self.update_link(slot) {
            slot.events |= express::LINK_CHANGED;
        }
        self.interrupt(slot);
    }

    /// Computes the link anew and lets the function follow it; true: it has changed.
    fn update_link(&self, slot: &Slot) -> bool {
        let up = slot.function.is_some() && !self.express.link_disabled(&self.bridge.config);
        let changed = self.bridge.set_link(up);
        slot.function.iter().for_each(|function| function.settle());
        changed
    }

    /// Tells the guest about events, or stops telling. After anything that may have changed them,
    /// or whether and how they are told.
    fn interrupt(&self, slot: &mut Slot) {
        let config = &self.bridge.config;
        let wanted = self.express.interrupts(config, slot.events);
        let message = self.msi.message(config);
        let by_message = wanted && message.is_some();
        if let Some(msi) = message.filter(|_| by_message && !slot.told) {
            self.sender.send(msi);
        }
        slot.told = by_message;
        if let Some(pin) = self.pin.get() {
            pin.set(wanted && message.is_none() && config.pin_enabled());
        }
    }

    /// The upper half of registers whose state is not the guest's.
    fn status(&self, register: u16, slot: &Slot) -> u32 {
        let config = &self.bridge.config;
        if self.express.is_link(register) {
            express::link_status(self.bridge.link())
        } else if self.express.is_slot(register) {
            express::slot_status(slot.events, slot.function.is_some())
        } else if register == COMMAND_STATUS
            && self.express.interrupts(config, slot.events)
            && self.msi.message(config).is_none()
        {
            INTERRUPT_STATUS
        } else {
            0
        }
    }

    fn refuse(&self, why: impl ToString) -> RestoreError {
        RestoreError { device: self.name.clone(), why: why.to_string() }
    }
}

impl Function for RootPort {
    fn read_config(&self, register: u16, _: &mut ExitCx<'_>) -> u32 {
        let slot = self.slot();
        self.bridge.config.read(register) | self.status(register, &slot)
    }

    fn write_config(&self, register: u16, value: u32, lanes: u32, _: &mut ExitCx<'_>) {
        let mut slot = self.slot();
        self.bridge.config.write(register, value, lanes);
        if self.express.is_slot(register) {
            // A one clears an event.
            slot.events &= !((value & lanes) >> 16) as u16;
        }
        if self.express.is_link(register) && self.update_link(&slot) {
            slot.events |= express::LINK_CHANGED;
        }
        if moves_bars(register) {
            slot.function.iter().for_each(|function| function.settle());
        }
        self.interrupt(&mut slot);
    }

    fn settle(&self) {
        self.slot().function.iter().for_each(|function| function.settle());
    }

    /// There is nothing of a port on the memory bus, and no port behind a port.
    fn move_behind(&self, _: Weak<dyn Upstream>) {}
}

/// The function in the slot is a device of its own: it is paused and saved for itself, and has to
/// be plugged in before a port is restored that had one.
impl Lifecycle for RootPort {
    fn name(&self) -> &str {
        &self.name
    }

    fn pause(&self) -> Vec<(String, Reply<()>)> {
        Vec::new()
    }

    fn resume(&self) {}

    fn save(&self, _: &Paused<'_>) -> State {
        let slot = self.slot();
        State::of(&Saved {
            config: self.bridge.config.save(),
            occupied: slot.function.is_some(),
            events: slot.events,
            told: slot.told,
        })
    }

    fn restore(&self, _: &Paused<'_>, state: &State) -> Result<(), RestoreError> {
        let saved: Saved = state.body().map_err(|why| self.refuse(why))?;
        self.bridge.config.accepts(&saved.config).map_err(|why| self.refuse(why))?;
        let mut slot = self.slot();
        match (saved.occupied, slot.function.is_some()) {
            (true, false) => return Err(self.refuse("its slot is empty, and was not")),
            (false, true) => return Err(self.refuse("its slot is taken, and was not")),
            _ => {}
        }
        if saved.events & !EVENTS != 0 {
            return Err(self.refuse(format!("no slot has the events {:#x}", saved.events)));
        }
        self.bridge.config.restore(&saved.config);
        (slot.events, slot.told) = (saved.events, saved.told);
        self.update_link(&slot);
        self.interrupt(&mut slot);
        Ok(())
    }
}

#[cfg(test)]
#[path = "root_port_tests.rs"]
mod tests;
