use proptest::prelude::*;

use super::super::config::{COMMAND_STATUS, Ids};
use super::*;

const IDS: Ids = Ids {
    vendor: 0x1b36,
    device: 0x000c,
    class: 0x06_0400,
    revision: 0,
    subsystem_vendor: 0,
    subsystem: 0,
};
const MIB: u64 = 1 << 20;

fn bridge(memory: Range<u64>, prefetchable: Range<u64>) -> Bridge {
    let mut config = Config::bridge(&IDS);
    define(&mut config, &Room { secondary: 5, memory, prefetchable });
    let bridge = Bridge::new(config);
    bridge.set_link(true);
    bridge
}

fn small() -> Bridge {
    bridge(0xc010_0000..0xc030_0000, 0x40_0000_0000..0x40_0010_0000)
}

#[test]
fn what_firmware_gives_is_what_a_guest_reads() {
    let small = small();
    let read = |register| small.config.read(register);
    assert_eq!(read(BUSES), 0x0005_0500);
    assert_eq!(read(MEMORY), 0xc020_c010);
    assert_eq!((read(PREFETCHABLE), read(10), read(11)), (0x0001_0001, 0x40, 0x40));
    assert_eq!((read(7), read(12)), (0, 0), "no ports");
    small.config.write(7, u32::MAX, u32::MAX);
    assert_eq!(read(7), 0, "and none can be had");
}

#[test]
fn a_window_forwards_what_lies_wholly_in_it() {
    let small = small();
    for (base, size, forwards) in [
        (0xc010_0000, 0x4000, true),
        (0xc010_0000, 2 * MIB, true),
        (0xc010_0000, 2 * MIB + 1, false),
        (0xc02f_c000, 0x4000, true),
        (0xc02f_c000, 0x8000, false),
        (0xc00f_c000, 0x8000, false),
        (0xc030_0000, 0x4000, false),
        (0x40_0000_0000, MIB, true),
        (0x40_0010_0000, 1, false),
        (0xc010_0000, 0, false),
        (u64::MAX, 2, false),
    ] {
        assert_eq!(small.forwards(base, size), forwards, "{base:#x} {size:#x}");
    }
}

#[test]
fn nothing_comes_through_without_decoding_or_a_link() {
    let small = small();
    small.config.write(COMMAND_STATUS, 0, 0xffff);
    assert!(!small.forwards(0xc010_0000, 1));
    small.config.write(COMMAND_STATUS, 2, 0xffff);
    assert!(small.forwards(0xc010_0000, 1));
    assert!(small.set_link(false) && !small.set_link(false));
    assert!(!small.forwards(0xc010_0000, 1));
}

#[test]
fn empty_windows_are_closed() {
    let closed = bridge(0..0, 0xd000_0000..0xd000_0000);
    for base in [0, 1, MIB - 1, MIB, 0xd000_0000] {
        assert!(!closed.forwards(base, 1), "{base:#x}");
    }
}

#[test]
fn only_a_bridge_with_sane_numbers_leads_somewhere() {
    let small = small();
    for (subordinate, secondary, bus, leads) in [
        (5, 5, 5, true),
        (9, 5, 5, true),
        (9, 5, 6, false),
        (4, 5, 5, false),
        (0, 0, 0, false),
        (9, 0, 0, false),
        (255, 255, 255, true),
    ] {
        small.config.write(BUSES, subordinate << 16 | secondary << 8, u32::MAX);
        assert_eq!(small.leads_to(bus), leads, "{secondary} to {subordinate}, bus {bus}");
    }
}

proptest! {
    #[test]
    fn whatever_is_written_the_windows_are_what_the_registers_say(
        writes in proptest::collection::vec((0_u16..16, any::<u32>()), 0..20),
        base in any::<u64>(),
        size in any::<u64>(),
    ) {
        let small = small();
        for (register, value) in writes {
            small.config.write(register, value, u32::MAX);
        }
        let [memory, prefetchable] = [MEMORY, PREFETCHABLE].map(|at| small.config.read(at));
        prop_assert_eq!(memory & 0x000f_000f, 0);
        prop_assert_eq!(prefetchable & 0x000f_000f, WIDE);
        prop_assert!(!small.forwards(base, size) || base.checked_add(size).is_some());
        let window = small.memory();
        let open = small.config.decodes_memory();
        let units = (window.end() + 1).saturating_sub(*window.start()) / MIB;
        prop_assert_eq!(open && units > 0, (units > 0) && small.forwards(*window.start(), units * MIB));
        prop_assert!(units == 0 || small.prefetchable().contains(window.end()) || !small.forwards(*window.start(), units * MIB + 1));
    }
}
