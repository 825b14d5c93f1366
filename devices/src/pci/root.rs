//! The root bus: who is in which slot, and which bus is behind which port.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use iothread::ExitCx;

use super::config::{Config, Ids};
use super::endpoint::moves_bars;
use super::function::Function;
use super::root_port::RootPort;
use crate::snapshot::Snapshot;

/// The host bridge. This id is registered (as Red Hat's) for a virtual host bridge that has no
/// registers beyond the standard ones, so no driver or quirk of a real chipset takes it for its
/// own. A bridge of some sort has to be there: Linux trusts ports 0xcf8 and 0xcfc only if it finds
/// one.
const HOST_BRIDGE: Ids = Ids {
    vendor: 0x1b36,
    device: 0x0008,
    class: 0x06_0000,
    revision: 0,
    subsystem_vendor: 0x1af4,
    subsystem: 0x1100,
};

/// The register with the header type, and its bit for a device of several functions (PCI 3.0
/// §6.2.1).
const HEADER_TYPE: u16 = 3;
const MULTI_FUNCTION: u32 = 1 << (16 + 7);

/// What a register reads as where nothing is.
const NOTHING: u32 = u32::MAX;

/// The place of a function: bus, slot and function, from the top in 8, 5 and 3 bits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Address(u16);

impl Address {
    /// Function `function`, 0 to 7, of slot `slot`, 0 to 31, on bus 0.
    pub const fn new(slot: u8, function: u8) -> Option<Self> {
        let fits = slot < 32 && function < 8;
        if fits { Some(Self((slot << 3 | function) as u16)) } else { None }
    }

    /// The same slot and function on bus `bus`.
    #[must_use]
    pub const fn on_bus(self, bus: u8) -> Self {
        Self((bus as u16) << 8 | self.0 & 0xff)
    }

    /// The bus.
    pub const fn bus(self) -> u8 {
        (self.0 >> 8) as u8
    }

    /// The slot, 0 to 31.
    pub const fn slot(self) -> u8 {
        self.0 as u8 >> 3
    }

    /// The function in the slot, 0 to 7.
    pub const fn function(self) -> u8 {
        self.0 as u8 & 7
    }

    /// From bus, slot and function as they are encoded in configuration accesses.
    pub(super) const fn from_bits(bits: u16) -> Self {
        Self(bits)
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:02x}:{:02x}.{}", self.bus(), self.slot(), self.function())
    }
}

impl fmt::Debug for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A function that cannot go where it should.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum InsertError {
    /// Someone is there.
    #[error("{0} is taken")]
    Taken(Address),
    /// The place is not on bus 0; behind a bridge, see [`RootPort::plug`].
    #[error("{0} is not on the root bus")]
    NotHere(Address),
    /// A slot starts with function 0, or the guest does not look at it (PCI 3.0 §3.2.2.3.4).
    #[error("{0}: the slot has no function 0")]
    Alone(Address),
    /// All 248 places are taken.
    #[error("the PCI bus is full")]
    Full,
}

type Functions = BTreeMap<Address, Arc<dyn Function>>;

/// Bus 0 with its host bridge, and behind each [`RootPort`] on it a bus with one place.
pub struct PciRoot {
    functions: Snapshot<Functions>,
    ports: Snapshot<Vec<Arc<RootPort>>>,
}

impl fmt::Debug for PciRoot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.functions.load().keys()).finish()
    }
}

impl Default for PciRoot {
    fn default() -> Self {
        let bridge: Arc<dyn Function> = Arc::new(HostBridge(Config::new(&HOST_BRIDGE)));
        let functions = Snapshot::from_pointee(BTreeMap::from([(Address(0), bridge)]));
        Self { functions, ports: Snapshot::from_pointee(Vec::new()) }
    }
}

impl PciRoot {
    /// Puts `function` at `address`.
    pub fn insert(
        &self,
        address: Address,
        function: &Arc<dyn Function>,
    ) -> Result<(), InsertError> {
        if address.bus() != 0 {
            return Err(InsertError::NotHere(address));
        }
        let mut result = Ok(());
        self.functions.rcu(|functions| {
            let first = Address(address.0 & !7);
            let mut functions = Functions::clone(functions);
            result = if functions.contains_key(&address) {
                Err(InsertError::Taken(address))
            } else if address != first && !functions.contains_key(&first) {
                Err(InsertError::Alone(address))
            } else {
                functions.insert(address, Arc::clone(function));
                Ok(())
            };
            functions
        });
        result
    }

    /// The next free place: first one per slot, from slot 1, then further functions in the slots.
    pub fn free_place(&self) -> Result<Address, InsertError> {
        let functions = self.functions.load();
        let mut places =
            (0..8).flat_map(|nth| (1..32).filter_map(move |slot| Address::new(slot, nth)));
        places.find(|place| !functions.contains_key(place)).ok_or(InsertError::Full)
    }

    /// Puts `function` at the next [free place](Self::free_place).
    pub fn add(&self, function: &Arc<dyn Function>) -> Result<Address, InsertError> {
        loop {
            let place = self.free_place()?;
            match self.insert(place, function) {
                Err(InsertError::Taken(_)) => {} // somebody was faster
                result => return result.map(|()| place),
            }
        }
    }

    /// Puts a root port at the next free place on bus 0 and lets it lead to the bus behind it. Of
    /// several whose secondary bus has the same number, the one that was added first does.
    pub fn add_port(&self, port: &Arc<RootPort>) -> Result<Address, InsertError> {
        let place = self.add(&(Arc::clone(port) as Arc<dyn Function>))?;
        self.ports.rcu(|ports| {
            let mut ports = Vec::clone(ports);
            ports.push(Arc::clone(port));
            ports
        });
        Ok(place)
    }

    /// The function at `address` behind a root port. The only place on a link is device 0 (PCI
    /// Express 3.0 §7.3.1), and it has one function.
    fn behind_port(&self, address: Address) -> Option<Arc<dyn Function>> {
        let only_place = address.slot() == 0 && address.function() == 0;
        let ports = self.ports.load();
        ports.iter().find(|port| port.leads_to(address.bus()))?.behind().filter(|_| only_place)
    }

    /// The interrupt inputs that pins are wired to: the last eight of the IOAPIC.
    pub const LINES: Range<u32> = 16..24;

    /// Which of [`Self::LINES`] pin A of the functions in `slot` is wired to, from 0: all in turn.
    pub const fn wire_of(slot: u8) -> usize {
        slot as usize % (Self::LINES.end - Self::LINES.start) as usize
    }

    /// The interrupt input that this wire is.
    pub const fn line_of(slot: u8) -> u32 {
        Self::LINES.start + Self::wire_of(slot) as u32
    }

    /// Reads a register of the function at `address`; all ones where there is none.
    pub fn read(&self, address: Address, register: u16, exit: &mut ExitCx<'_>) -> u32 {
        if address.bus() != 0 {
            let function = self.behind_port(address);
            return function.map_or(NOTHING, |function| function.read_config(register, exit));
        }
        let functions = self.functions.load();
        let Some(function) = functions.get(&address) else { return NOTHING };
        let value = function.read_config(register, exit);
        let others = || functions.range(Address(address.0 + 1)..=Address(address.0 | 7));
        match register {
            HEADER_TYPE if address.function() == 0 && others().next().is_some() => {
                value | MULTI_FUNCTION
            }
            _ => value,
        }
    }

    /// Writes the bits in `lanes` of a register of the function at `address`.
    pub fn write(
        &self,
        address: Address,
        register: u16,
        value: u32,
        lanes: u32,
        exit: &mut ExitCx<'_>,
    ) {
        let function = match address.bus() {
            0 => self.functions.load().get(&address).cloned(),
            _ => self.behind_port(address),
        };
        let Some(function) = function else { return };
        function.write_config(register, value, lanes, exit);
        if moves_bars(register) {
            self.settle();
        }
    }

    /// Lets every function try again to have its BARs decoded. Needed after a restore, in which
    /// functions may have found each other's old places taken.
    pub fn settle(&self) {
        self.functions.load().values().for_each(|function| function.settle());
    }
}

/// A function that is nothing but registers, none of which has an effect: so none can be written,
/// and there is nothing to save.
struct HostBridge(Config);

impl Function for HostBridge {
    fn read_config(&self, register: u16, _: &mut ExitCx<'_>) -> u32 {
        self.0.read(register)
    }

    fn write_config(&self, _: u16, _: u32, _: u32, _: &mut ExitCx<'_>) {}
}

#[cfg(test)]
mod tests {
    use super::*;
    use iothread::VcpuLoop;

    struct Tag(u32);

    impl Function for Tag {
        fn read_config(&self, _: u16, _: &mut ExitCx<'_>) -> u32 {
            self.0
        }
        fn write_config(&self, _: u16, _: u32, _: u32, _: &mut ExitCx<'_>) {}
    }

    fn tag(n: u32) -> Arc<dyn Function> {
        Arc::new(Tag(n))
    }

    fn at(slot: u8, function: u8) -> Address {
        Address::new(slot, function).unwrap()
    }

    #[test]
    fn the_host_bridge_is_at_the_first_place_and_alone() {
        let (root, mut vcpu) = (PciRoot::default(), VcpuLoop::enter());
        assert_eq!(root.read(at(0, 0), 2, &mut vcpu.exit()) >> 8, 0x06_0000);
        assert_eq!(root.read(at(0, 0), HEADER_TYPE, &mut vcpu.exit()), 0);
        assert_eq!(root.read(at(1, 0), 0, &mut vcpu.exit()), NOTHING);
        root.write(at(1, 0), 1, 0, u32::MAX, &mut vcpu.exit());
    }

    #[test]
    fn functions_fill_the_slots_first_and_then_the_functions_of_each() {
        let (root, mut vcpu) = (PciRoot::default(), VcpuLoop::enter());
        let places: Vec<_> = (0..248).map(|n| root.add(&tag(n)).unwrap()).collect();
        assert_eq!(places[0], at(1, 0));
        assert_eq!(places[30], at(31, 0));
        assert_eq!(places[31], at(1, 1));
        assert_eq!(places[247], at(31, 7));
        assert_eq!(root.add(&tag(0)), Err(InsertError::Full));
        assert_eq!(root.read(at(31, 7), 0, &mut vcpu.exit()), 247);
    }

    #[test]
    fn only_function_0_of_a_slot_with_more_says_so() {
        let (root, mut vcpu) = (PciRoot::default(), VcpuLoop::enter());
        root.insert(at(3, 0), &tag(0)).unwrap();
        root.insert(at(4, 0), &tag(0)).unwrap();
        assert_eq!(root.read(at(3, 0), HEADER_TYPE, &mut vcpu.exit()), 0);
        root.insert(at(3, 5), &tag(0)).unwrap();
        assert_eq!(root.read(at(3, 0), HEADER_TYPE, &mut vcpu.exit()), MULTI_FUNCTION);
        assert_eq!(root.read(at(3, 5), HEADER_TYPE, &mut vcpu.exit()), 0);
        assert_eq!(root.read(at(4, 0), HEADER_TYPE, &mut vcpu.exit()), 0);
    }

    #[test]
    fn a_place_that_is_taken_or_cannot_be_found_is_refused() {
        let root = PciRoot::default();
        assert_eq!(root.insert(at(0, 0), &tag(0)), Err(InsertError::Taken(at(0, 0))));
        assert_eq!(root.insert(at(2, 1), &tag(0)), Err(InsertError::Alone(at(2, 1))));
        assert_eq!(InsertError::Taken(at(0x1f, 7)).to_string(), "00:1f.7 is taken");
        assert_eq!((Address::new(32, 0), Address::new(0, 8)), (None, None));
        let elsewhere = at(1, 2).on_bus(0xab);
        assert_eq!((elsewhere.bus(), elsewhere.slot(), elsewhere.function()), (0xab, 1, 2));
        assert_eq!(root.insert(elsewhere, &tag(0)), Err(InsertError::NotHere(elsewhere)));
        assert_eq!(elsewhere.to_string(), "ab:01.2");
    }
}
