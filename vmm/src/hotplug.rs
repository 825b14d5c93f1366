//! The hot-plug slots of a machine: PCIe root ports with buses 1, 2 and so on behind them.

use std::sync::Arc;

use devices::irq::{MsiSender, SharedLine};
use devices::pci::{BarSpace, PciRoot, Room, RootPort};

use crate::host_error::HostError;

/// Addresses for BARs behind each port, for either kind of BAR. The largest virtio device takes 64
/// KiB; Linux would give a port without windows just as much.
const WINDOW: u64 = 2 << 20;

/// Adds `count` empty root ports to `root`, at most 31. They come after the devices of the file, so
/// that the places of those do not depend on the number of slots. `lines` are the wires of the
/// interrupt pins, [`PciRoot::LINES`].
///
/// # Errors
/// If the bus is full, or `space` has too little room for the windows.
pub fn ports(
    count: u8,
    root: &PciRoot,
    space: &mut BarSpace,
    msi: &Arc<dyn MsiSender>,
    lines: &[Arc<SharedLine>],
) -> Result<Vec<Arc<RootPort>>, HostError> {
    let mut port = |number: u8| {
        let name = format!("hotplug-slot.{number}");
        let mut window = || {
            let window = space.allocate(WINDOW).map(|base| base..base + WINDOW);
            window.ok_or_else(|| HostError::new(&name, "no room for its windows"))
        };
        let room = Room { secondary: number, memory: window()?, prefetchable: window()? };
        let port = Arc::new(RootPort::new(&name, number, &room, Arc::clone(msi)));
        let place = root.add_port(&port).map_err(|error| HostError::new(&name, error))?;
        port.connect_pin(lines[PciRoot::wire_of(place.slot())].pin());
        Ok(port)
    };
    (1..=count).map(&mut port).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::BARS;
    use devices::irq::{IrqLine, Msi};
    use devices::pci::Address;
    use iothread::VcpuLoop;

    struct Nothing;

    impl MsiSender for Nothing {
        fn send(&self, _: Msi) {}
    }

    impl IrqLine for Nothing {
        fn set(&self, _: bool) {}
    }

    #[test]
    fn as_many_ports_as_the_file_may_ask_for_have_buses_and_windows_of_their_own() {
        let (root, mut space) = (PciRoot::default(), BarSpace::new(BARS.start + 0x4000, BARS.end));
        let msi = Arc::new(Nothing) as Arc<dyn MsiSender>;
        let line = Arc::new(SharedLine::new(Arc::new(Nothing)));
        let lines = vec![line; 8];
        let made = ports(31, &root, &mut space, &msi, &lines).unwrap();
        assert_eq!(made.len(), 31);
        let (mut vcpu, mut end) = (VcpuLoop::enter(), BARS.start as u32);
        for slot in 1..32u8 {
            let place = Address::new(slot, 0).unwrap();
            let mut read = |register| root.read(place, register, &mut vcpu.exit());
            assert_eq!(read(6), u32::from(slot) << 16 | u32::from(slot) << 8);
            for window in [read(8), read(9) & !0x000f_000f] {
                let (base, limit) = (window << 16, window & 0xfff0_0000 | 0xf_ffff);
                assert!(base >= end && limit - base == WINDOW as u32 - 1, "{window:#x}");
                end = limit;
            }
        }
        assert!(u64::from(end) < BARS.end);
        let no_room = ports(1, &root, &mut BarSpace::new(0, WINDOW), &msi, &lines).unwrap_err();
        assert!(no_room.to_string().contains("hotplug-slot.1"), "{no_room}");
    }
}
