//! What Linux complains of in heddle, and not in QEMU.

use std::collections::BTreeSet;
use std::process::Command;
use std::time::Duration;

use serde_json::json;

use crate::guest::{self, Disk};
use crate::job::{Job, Place};
use crate::kit::{self, Kit};
use crate::l1::L1;
use crate::matrix::{Guest, Only, Transport};
use crate::{At, Result, With};

/// Levels of the kernel's log up to this are warnings and worse.
const WARNING: u8 = 4;
/// What complaints of firmware and platform have in them, whatever their level.
const WORDS: [&str; 9] = [
    "ACPI Error",
    "ACPI Warning",
    "ACPI BIOS",
    "Firmware Bug",
    "firmware bug",
    "can't claim",
    "no compatible bridge window",
    "failed",
    "not found",
];

/// What an emulated CPU on a busy machine makes the kernel say, here or there.
const SLOWNESS: [&str; 2] = ["hrtimer: interrupt took", "rcu_preempt self-detected stall"];

/// The complaints in the raw log of a kernel (`dmesg -r`), in their order, without time stamps.
fn complaints(log: &str) -> Vec<String> {
    let mut found = Vec::new();
    for line in log.lines() {
        let Some((level, rest)) = line.strip_prefix('<').and_then(|line| line.split_once('>'))
        else {
            continue;
        };
        // Facility and level; only what the kernel itself says.
        let Ok(level @ 0..8) = level.parse::<u8>() else { continue };
        let text = rest.split_once("] ").map_or(rest, |(_, text)| text).trim();
        if SLOWNESS.iter().any(|words| text.contains(words)) {
            continue;
        }
        if level <= WARNING || WORDS.iter().any(|word| text.contains(word)) {
            found.push(text.to_owned());
        }
    }
    found
}

/// A complaint without the numbers that differ between machines.
fn shape(complaint: &str) -> String {
    complaint.chars().map(|c| if c.is_ascii_hexdigit() { '#' } else { c }).collect()
}

/// Those of `here` that have no like in `there`.
fn only_in<'a>(here: &'a [String], there: &[String]) -> Vec<&'a String> {
    let known: BTreeSet<String> = there.iter().map(|line| shape(line)).collect();
    here.iter().filter(|line| !known.contains(&shape(line))).collect()
}

const MIB: u32 = 1;
const CPUS: u32 = 2;

/// Compares heddle with QEMU; true: Linux complains of nothing more in heddle.
pub fn run(with: &With, only: &Only) -> Result<bool> {
    let kit = Kit::get()?;
    let heddle = kit::heddle(with)?;
    kit::say("booting the kernel in QEMU (q35)");
    let reference = complaints(&in_qemu(&kit)?);
    let scratch = tempfile::tempdir().at("temporary directory")?;
    let image = scratch.path().join("disk.img");
    guest::make_disk(&image, MIB, 2)?;
    let mut jobs = Vec::new();
    for transport in only.transports() {
        for kernel in only.kernels() {
            let guest = Guest { cpus: CPUS, place: Place::Main, transport, kernel, reboots: false };
            let mut toml = guest.toml("check", "256M", &with.append);
            if transport == Transport::Pci {
                toml = toml.replacen("[machine]\n", "[machine]\nhotplug-slots = 2\n", 1);
            }
            let limit = Duration::from_secs(150);
            jobs.push(Job::heddle(&guest.name(), toml, Some(image.clone()), limit));
        }
    }
    let mut found = Vec::new();
    let refs: Vec<&Job> = jobs.iter().collect();
    L1::new(with, &kit, &heddle).run(&refs, with.keep.as_deref(), |nth, outcome| {
        let log = Disk(&outcome.image()).text("/out/dmesg");
        let log = log.map_err(|error| format!("{error}:\n{}", outcome.text("console.txt")));
        found.push((jobs[nth].name.clone(), log.map(|log| complaints(&log))));
    })?;
    let mut good = true;
    let mut report = json!({ "qemu": reference });
    for (name, lines) in found {
        let lines = lines.at(&name)?;
        let new = only_in(&lines, &reference);
        good &= new.is_empty();
        report["heddle"][&name] = json!({ "all": lines, "only-in-heddle": new });
        if !with.json {
            println!("{name}: {} complaints, {} of them not in QEMU", lines.len(), new.len());
            new.iter().for_each(|line| println!("    {line}"));
        }
    }
    if with.json {
        println!("{report}");
    } else {
        println!("QEMU (q35): {} complaints", reference.len());
        reference.iter().for_each(|line| println!("    {line}"));
    }
    Ok(good)
}

/// The log of the same guest in QEMU on this machine.
fn in_qemu(kit: &Kit) -> Result<String> {
    let scratch = tempfile::tempdir().at("temporary directory")?;
    let image = scratch.path().join("disk.img");
    guest::make_disk(&image, MIB, 2)?;
    let mut qemu = Command::new("timeout");
    qemu.args(["-s", "KILL", "240", "qemu-system-x86_64", "-M", "q35", "-accel", "tcg"])
        .args(["-cpu", "max,-la57", "-smp", &CPUS.to_string(), "-m", "256"])
        .args(["-nodefaults", "-display", "none", "-no-reboot", "-serial", "stdio", "-kernel"])
        .arg(kit.path("vmlinuz"))
        .arg("-initrd")
        .arg(kit.path("l2.cpio"))
        .args(["-append", &guest::cmdline("check", "poweroff", ""), "-drive"])
        .arg(format!("if=none,id=disk,format=raw,file={}", image.display()))
        .args(["-device", "virtio-blk-pci,drive=disk,disable-legacy=on"]);
    let said = kit::run(&mut qemu)?;
    Disk(&image).text("/out/dmesg").map_err(|error| format!("QEMU's guest: {error}:\n{said}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn complaints_are_warnings_and_what_sounds_like_one() {
        let log = "<6>[    0.1] ACPI: all is well\n<4>[    0.2] ACPI BIOS Warning (bug): x\n\
                   <6>[    0.3] pci 0000:00:01.0: can't claim BAR 0 [mem 0xc0]\n\
                   <12>[    0.4] systemd: told by a program\n<3>[    1.2] oh\nno level\n\
                   <4>[    2.0] hrtimer: interrupt took 5 ns\n";
        let expected =
            ["ACPI BIOS Warning (bug): x", "pci 0000:00:01.0: can't claim BAR 0 [mem 0xc0]", "oh"];
        assert_eq!(complaints(log), expected);
    }

    #[test]
    fn numbers_make_no_new_complaint() {
        let own = ["pci 0000:00:02.0: no".to_owned(), "other".to_owned()];
        assert_eq!(only_in(&own, &["pci 0000:00:1f.0: no".to_owned()]), [&own[1]]);
        assert_eq!(only_in(&own, &["pci 0000:00:1f.0: yes".to_owned()]).len(), 2);
    }
}
