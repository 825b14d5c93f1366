//! Machines with hot-plug slots, as the built-in guest finds them.

use tests::machine::Machine;

/// A machine with a disk and so many slots: what the built-in guest says of it.
fn console(slots: u8) -> String {
    let toml =
        format!("[machine]\ncpus = 2\nhotplug-slots = {slots}\n[disk.data]\nsize = \"8M\"\n");
    let shown = Machine::new(&toml).run(&[]).expect(0).text();
    assert!(shown.contains("verdict: ok"), "{shown}");
    shown
}

/// The guest reads each function's ids through the ports and again through memory.
#[test]
fn every_slot_is_a_bridge_after_the_devices_of_the_file() {
    for slots in [0, 1, 31] {
        let shown = console(slots);
        let ecam = format!("ecam     0xe0000000, buses 0 to {slots}");
        assert!(shown.contains(&ecam), "{shown}");
        assert!(shown.contains("00:01.0  1af4:1042 virtio-blk"), "{shown}");
        let bridges: Vec<&str> = shown.lines().filter(|line| line.contains("1b36:000c")).collect();
        assert_eq!(bridges.len(), usize::from(slots), "{shown}");
        for (nth, line) in bridges.iter().enumerate() {
            assert!(line.contains("pci bridge"), "{line}");
            // The disk has taken one of the 31 slots of bus 0; the last port is a second function.
            let place = if nth < 30 { format!("00:{:02x}.0", nth + 2) } else { "00:01.1".into() };
            assert!(shown.contains(&format!("{place}  1b36:000c")), "{place}\n{shown}");
        }
        assert!(!shown.contains("  01:00.0"), "the slots are empty: {shown}");
    }
}

#[test]
fn a_file_without_pci_has_no_slots() {
    let toml = "[machine]\ntransport = \"mmio\"\nhotplug-slots = 2\n";
    Machine::new(toml).run(&[]).refuses(3, "vm.toml:3:17");
}
