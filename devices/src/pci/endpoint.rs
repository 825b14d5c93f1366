//! A function with BARs, decoded on the memory bus where the guest puts them.

use std::fmt;
use std::sync::{Arc, Weak};

use iothread::ExitCx;
use serde::{Deserialize, Serialize};

use super::bridge;
use super::capability::{Capability, Kind};
use super::config::{BAR_0, COMMAND_STATUS, Config, Ids};
use super::function::{Function, Upstream};
use super::msix::{self, Msix};
use crate::bus::Bus;
use crate::device::Device;
use crate::snapshot::Snapshot;

/// Physical addresses have at most 52 bits (Intel SDM vol. 3, 4.1.4).
const ADDRESS_LIMIT: u64 = 1 << 52;

/// Registers of the window capability, from its first (virtio 1.2 §4.1.4.10).
const WINDOW_BAR: u16 = 1;
const WINDOW_OFFSET: u16 = 2;
const WINDOW_LENGTH: u16 = 3;
const WINDOW_DATA: u16 = 4;

/// A memory BAR.
pub struct Bar {
    /// Its index in the header: 0, 2 or 4, for each takes two registers.
    pub index: u8,
    /// Where it is until the guest moves it, aligned to its size.
    pub address: u64,
    /// Its size in bytes, a power of two of at least 16.
    pub size: u64,
    /// What answers there.
    pub device: Arc<dyn Device>,
    /// Who wants to know where it is.
    pub placed: Option<Arc<dyn Placed>>,
}

/// Learns where a BAR is decoded, for example to connect doorbells there.
///
/// Calls come one at a time, and first the BAR is mapped, then unmapped, and so on. They come on
/// the vCPU whose access moved the BAR and from [`Endpoint::new`], and must not enter the
/// configuration space of the endpoint.
pub trait Placed: Send + Sync {
    /// The BAR now answers from `base` on.
    fn mapped(&self, base: u64);

    /// The BAR is about to be gone from `base`.
    fn unmapped(&self, base: u64);
}

/// What an endpoint remembers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Saved {
    config: Vec<u32>,
    msix: Option<msix::Saved>,
}

/// A PCI function with its configuration space, BARs and capabilities.
///
/// A BAR is decoded while memory decoding is on and its address is free and, if the function is
/// [behind a bridge](Function::move_behind), while that forwards it. One that is where it
/// cannot be is not decoded; it is tried again at each write that may have changed that, to this
/// function or to another.
pub struct Endpoint {
    config: Config,
    bars: Box<[Bar]>,
    /// First register of the MSI-X capability.
    msix: Option<(u16, Arc<Msix>)>,
    /// First register of the window capability.
    window: Option<u16>,
    /// Weak, for the bus has the configuration space, and that has this function.
    bus: Weak<Bus>,
    /// By BAR: where it is decoded.
    #[expect(clippy::disallowed_types, reason = "taken where a BAR may move, and nowhere else")]
    at: std::sync::Mutex<Box<[Option<u64>]>>,
    /// The bridge that it is behind; `None`: it is on the root bus. One that is gone forwards nothing.
    upstream: Snapshot<Option<Weak<dyn Upstream>>>,
}

impl fmt::Debug for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Endpoint").field("config", &self.config).finish_non_exhaustive()
    }
}

impl Endpoint {
    /// A function as firmware leaves it: BARs at their addresses, decoding and bus mastering on.
    ///
    /// # Panics
    /// If a BAR is impossible (see [`Config::add_bar`]), or the capabilities do not fit.
    pub fn new(ids: &Ids, bars: Vec<Bar>, capabilities: Vec<Capability>, bus: &Arc<Bus>) -> Self {
        let mut config = Config::new(ids);
        config.use_pin_a();
        bars.iter().for_each(|bar| config.add_bar(bar.index, bar.address, bar.size));
        let (mut msix, mut window) = (None, None);
        for Capability { id, body, writable, kind } in capabilities {
            let register = config.add_capability(id, &body, &writable);
            match kind {
                Kind::Plain => {}
                Kind::Msix(table) => msix = Some((register, table)),
                Kind::Window => window = Some(register),
            }
        }
        let at = vec![None; bars.len()].into_boxed_slice().into();
        let (bus, upstream) = (Arc::downgrade(bus), Snapshot::from_pointee(None));
        let endpoint = Self { config, bars: bars.into(), msix, window, bus, at, upstream };
        endpoint.settle();
        endpoint
    }

    /// May the function pull its interrupt pin?
    pub fn pin_enabled(&self) -> bool {
        self.config.pin_enabled()
    }

    /// Where BAR `index` is decoded now.
    pub fn decoded_at(&self, index: u8) -> Option<u64> {
        let nth = self.bars.iter().position(|bar| bar.index == index)?;
        self.placements()[nth]
    }

    /// What the function remembers: its registers and the state of MSI-X.
    pub fn save(&self) -> Saved {
        let msix = self.msix.as_ref().map(|(_, msix)| msix.save());
        Saved { config: self.config.save(), msix }
    }

    /// Could this be the state of this function? Else says why not.
    pub fn accepts(&self, saved: &Saved) -> Result<(), String> {
        self.config.accepts(&saved.config)?;
        match (&self.msix, &saved.msix) {
            (Some((_, own)), Some(saved)) => own.accepts(saved),
            (None, None) => Ok(()),
            _ => Err("one has MSI-X, the other has not".to_owned()),
        }
    }

    /// Takes on a state that it [`accepts`](Self::accepts): BARs move to where they were, and
    /// pending interrupts that may be sent are sent. After the last one of a bus, see
    /// [`PciRoot::settle`](super::PciRoot::settle).
    pub fn restore(&self, saved: &Saved) {
        self.config.restore(&saved.config);
        self.settle();
        if let (Some((_, own)), Some(saved)) = (&self.msix, &saved.msix) {
            own.restore(saved);
        }
    }

    fn placements(&self) -> std::sync::MutexGuard<'_, Box<[Option<u64>]>> {
        self.at.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// What the guest can reach through the window at present: a device, an offset in it, and how
    /// many bytes. `None`: nothing, as its registers make no sense.
    fn behind_window(&self, window: u16) -> Option<(&dyn Device, u64, usize)> {
        let index = self.config.read(window + WINDOW_BAR) as u8;
        let offset = u64::from(self.config.read(window + WINDOW_OFFSET));
        let length = u64::from(self.config.read(window + WINDOW_LENGTH));
        let bar = self.bars.iter().find(|bar| bar.index == index)?;
        let sane =
            matches!(length, 1 | 2 | 4) && offset.is_multiple_of(length) && offset < bar.size;
        sane.then_some((&*bar.device, offset, length as usize))
    }

    fn unmap(&self, bar: &Bar, at: &mut Option<u64>) {
        if let Some(base) = at.take() {
            bar.placed.iter().for_each(|placed| placed.unmapped(base));
            if let Some(bus) = self.bus.upgrade() {
                bus.remove(base);
            }
        }
    }
}

impl Function for Endpoint {
    fn read_config(&self, register: u16, exit: &mut ExitCx<'_>) -> u32 {
        let value = self.config.read(register);
        if let Some((first, msix)) = &self.msix
            && register == *first
        {
            return value | u32::from(msix.control()) << 16;
        }
        if let Some(window) = self.window
            && register == window + WINDOW_DATA
            && let Some((device, offset, length)) = self.behind_window(window)
        {
            let mut data = [0; 4];
            device.read(offset, &mut data[..length], exit);
            return u32::from_le_bytes(data);
        }
        value
    }

    fn write_config(&self, register: u16, value: u32, lanes: u32, exit: &mut ExitCx<'_>) {
        self.config.write(register, value, lanes);
        if moves_bars(register) {
            self.settle();
        }
        if let Some((first, msix)) = &self.msix
            && register == *first
            && lanes >> 16 != 0
        {
            msix.write_control((value >> 16) as u16, (lanes >> 16) as u16);
        }
        if let Some(window) = self.window
            && register == window + WINDOW_DATA
            && let Some((device, offset, length)) = self.behind_window(window)
            && lanes.trailing_ones() as usize >= length * 8
        {
            device.write(offset, &value.to_le_bytes()[..length], exit);
        }
    }

    fn settle(&self) {
        let mut placements = self.placements();
        let upstream = self.upstream.load();
        let forwarded = |base, size| match &**upstream {
            None => true,
            Some(bridge) => bridge.upgrade().is_some_and(|bridge| bridge.forwards(base, size)),
        };
        let wanted = |bar: &Bar| {
            let base = self.config.bar(bar.index)?;
            let sane = base != 0 && base.checked_add(bar.size)? <= ADDRESS_LIMIT;
            (sane && forwarded(base, bar.size)).then_some(base)
        };
        let wanted: Vec<_> = self.bars.iter().map(wanted).collect();
        let each = || self.bars.iter().zip(&wanted);
        for ((bar, wanted), at) in each().zip(placements.iter_mut()) {
            if at != wanted {
                self.unmap(bar, at);
            }
        }
        let Some(bus) = self.bus.upgrade() else { return };
        for ((bar, wanted), at) in each().zip(placements.iter_mut()) {
            if let (None, Some(base)) = (*at, *wanted)
                && bus.insert(base, bar.size, Arc::clone(&bar.device)).is_ok()
            {
                *at = Some(base);
                bar.placed.iter().for_each(|placed| placed.mapped(base));
            }
        }
    }

    fn move_behind(&self, upstream: Weak<dyn Upstream>) {
        self.upstream.store(Arc::new(Some(upstream)));
    }
}

impl Drop for Endpoint {
    fn drop(&mut self) {
        let mut placements = self.placements();
        self.bars.iter().zip(placements.iter_mut()).for_each(|(bar, at)| self.unmap(bar, at));
    }
}

/// Can a write to this register move a BAR, or the window of a bridge that it is behind?
pub(super) fn moves_bars(register: u16) -> bool {
    register == COMMAND_STATUS || (BAR_0..=bridge::LAST_WINDOW).contains(&register)
}

#[cfg(test)]
#[path = "endpoint_tests.rs"]
mod tests;
