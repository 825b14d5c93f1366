//! The built-in guest on somebody else's machine: what it says of heddle can be trusted only if it
//! says the same of QEMU.

use std::fs::File;
use std::process::{Command, Stdio};

use serde_json::Value;
use vmm::ending::End;

const DISK: u64 = 16 << 20;

#[test]
fn the_same_elf_boots_under_qemu_by_pvh_and_finds_its_devices_good() {
    let directory = tempfile::tempdir().unwrap();
    let (guest, disk) = (directory.path().join("guest"), directory.path().join("disk"));
    std::fs::write(&guest, vmm::machine::BUILT_IN_GUEST).unwrap();
    File::create(&disk).unwrap().set_len(DISK).unwrap();
    let output = Command::new("qemu-system-x86_64")
        .args(["-M", "q35", "-accel", "tcg", "-cpu", "max", "-smp", "2", "-m", "128"])
        .args(["-nodefaults", "-no-reboot", "-display", "none", "-serial", "stdio"])
        .arg("-kernel")
        .arg(&guest)
        .arg("-drive")
        .arg(format!("if=none,id=d,format=raw,file={}", disk.display()))
        .args(["-device", "virtio-blk-pci,drive=d,serial=data,num-queues=2,disable-legacy=on"])
        .args(["-device", "virtio-rng-pci,disable-legacy=on"])
        .stdin(Stdio::null())
        .output()
        .expect("qemu-system-x86_64 is installed by tests/run");
    let said = String::from_utf8_lossy(&output.stdout);
    let line = said.lines().rfind(|line| line.starts_with('{'));
    let report: Value =
        line.and_then(|line| serde_json::from_str(line).ok()).unwrap_or_else(|| {
            panic!("no report: {said}\n{}", String::from_utf8_lossy(&output.stderr))
        });
    assert_eq!((&report["verdict"], &report["vcpus"]), (&"ok".into(), &2.into()), "{said}");
    let images = [("data".to_owned(), File::open(&disk).unwrap())];
    assert_eq!(vmm::verdict::judge(End::PowerOff, Some(&report), &images), End::PowerOff);
}
