//! Many vCPUs in a machine, and many machines at once.

use std::fs;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Instant;

use serde_json::Value;
use tests::machine::{Machine, Running, text};
use tests::payload;
use tests::program::{heddle, need_kvm};

/// Local APICs have ids beyond this only in x2APIC mode, and messages reach those only by the
/// extended bits of their destination.
const XAPIC: u64 = 256;

/// A machine whose disk has a queue for each vCPU, `cpus` as the file says it.
fn file(cpus: &str, place: &str, requests: u32) -> String {
    format!(
        "[machine]\nmemory = \"1G\"\ncpus = {cpus}\n[boot]\ncmdline = \"requests={requests}\"\n\
         [thread.io0]\n[disk.data]\nsize = \"128M\"\nplace = \"{place}\"\n"
    )
}

/// Runs the built-in guest, whose CPUs all drive their queue and get its interrupts; `far` of them
/// have APIC ids above 255.
#[track_caller]
fn check(toml: &str, vcpus: u64, far: u64) {
    let outcome = Machine::new(toml).run(&["--json"]).expect(0);
    let report = outcome.json();
    let guest = &report["guest"];
    assert_eq!((&guest["verdict"], &guest["vcpus"]), (&"ok".into(), &vcpus.into()));
    assert_eq!(guest["cpus_above_255"], far);
    assert_eq!(guest["cpus_above_255_interrupted"], far);
    let queues = guest["disks"][0]["per_vcpu"].as_array().unwrap();
    assert_eq!(queues.len() as u64, vcpus);
    for queue in queues {
        assert!(queue[2].as_u64() > Some(16) && queue[4].as_u64() >= Some(2), "{queue}");
    }
    let took = outcome.took.as_secs_f64();
    println!("{vcpus} vCPUs: {took:.1} s, timing {}", report["timing"]);
}

/// The same for one socket of `vcpus` cores, whose APIC ids count up from 0.
#[track_caller]
fn check_cores(vcpus: u64, place: &str, requests: u32) {
    check(&file(&vcpus.to_string(), place, requests), vcpus, vcpus.saturating_sub(XAPIC));
}

#[test]
fn two_hundred_and_fifty_five_vcpus() {
    check_cores(255, "io0", 64);
}

#[test]
fn two_hundred_and_eighty_eight_vcpus() {
    check_cores(288, "io0", 64);
}

#[test]
fn two_hundred_and_eighty_eight_vcpus_that_serve_themselves() {
    check_cores(288, "vcpu", 64);
}

#[test]
fn apic_ids_above_255_in_a_machine_of_150_vcpus() {
    // Five of eight ids on two levels: sockets begin at 0, 64, 128, 192, 256 and 320.
    let topology = "{ count = 150, topology = { sockets = 6, dies = 5, cores = 5, threads = 1 } }";
    check(&file(topology, "io0", 64), 150, 50);
}

#[test]
fn five_hundred_and_twelve_vcpus() {
    check_cores(512, "io0", 32);
}

#[test]
fn one_thousand_and_twenty_four_vcpus() {
    check_cores(1024, "io0", 16);
}

#[test]
fn one_thousand_and_twenty_four_vcpus_that_serve_themselves() {
    check_cores(1024, "vcpu", 16);
}

/// KVM mistakes one CPU for another if they are made in another order.
#[test]
fn vcpus_with_apic_ids_above_255_are_made_after_the_others() {
    // The large ones have a host's CPU for themselves, if there are two.
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let cpus = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:")).unwrap();
    let mut cpus = cpus.trim().split([',', '-']);
    let first = cpus.next().unwrap();
    let last = cpus.next_back().unwrap_or(first);
    let pin = format!("\"0-255\" = \"{first}\"\n\"256-399\" = \"{last}\"\n");
    let toml = format!("[machine]\ncpus = 400\n[vcpu.pin]\n{pin}");
    let machine = Machine::booting(payload::echo(), "", &toml);
    let mut running = machine.start(&["--json"]);
    running.wait_for("ready");
    // Descriptors are given out in ascending order.
    let fds = PathBuf::from(format!("/proc/{}/fd", running.pid()));
    let vcpu = |fd: fs::DirEntry| {
        let target = fs::read_link(fd.path()).unwrap();
        let id = text(&target).strip_prefix("anon_inode:kvm-vcpu:")?.parse::<u64>().unwrap();
        Some((fd.file_name().to_str()?.parse::<u32>().unwrap(), id))
    };
    let mut made: Vec<_> =
        fs::read_dir(fds).unwrap().filter_map(|entry| vcpu(entry.unwrap())).collect();
    made.sort_unstable();
    assert_eq!(made.len(), 400);
    let (small, large) = made.split_at(XAPIC as usize);
    assert!(small.iter().all(|(_, id)| *id < XAPIC), "{small:?}");
    assert!(large.iter().all(|(_, id)| *id >= XAPIC), "{large:?}");
    running.signal(libc::SIGTERM);
    running.wait().expect(143);
}

#[test]
fn a_vcpu_that_cannot_be_made_is_named_and_nothing_runs() {
    need_kvm();
    let machine = Machine::new("[machine]\ncpus = 100\n");
    let mut command = Command::new("prlimit");
    command.args(["--nofile=60:60", "--", text(heddle()), "run"]);
    command.arg(machine.path("vm.toml")).stdin(Stdio::null());
    let outcome = Running::start(&mut command).wait();
    assert!(!outcome.text().contains("heddle: the built-in guest"), "{}", outcome.text());
    let outcome = outcome.refuses(4, "KVM_CREATE_VCPU: Too many open files");
    assert!(outcome.stderr.contains("heddle: vcpu"), "{}", outcome.stderr);
}

/// The processes with `text` in their command line.
fn processes(text: &str) -> Vec<String> {
    let has = |process: fs::DirEntry| {
        // Not there for what is no process, or has ended.
        let line = String::from_utf8(fs::read(process.path().join("cmdline")).ok()?).ok()?;
        line.contains(text).then(|| line.replace('\0', " "))
    };
    fs::read_dir("/proc").unwrap().filter_map(|process| has(process.ok()?)).collect()
}

#[test]
fn sixty_four_machines_at_once() {
    need_kvm();
    const MACHINES: usize = 64;
    let machine = Machine::new(
        "[boot]\ncmdline = \"requests=64 quiet\"\n[thread.io0]\n\
         [disk.data]\nsize = \"8M\"\nplace = \"io0\"\n",
    );
    heddle();
    let began = Instant::now();
    let running: Vec<Running> = (0..MACHINES).map(|_| machine.start(&["--json"])).collect();
    let reports: Vec<Value> =
        running.into_iter().map(|machine| machine.wait().expect(0).json()).collect();
    let took = began.elapsed().as_secs_f64();
    let mut private: Vec<u64> = Vec::new();
    for report in &reports {
        assert_eq!(report["guest"]["verdict"], "ok");
        assert_eq!(report["not-granted"], Value::Array(Vec::new()));
        private.push(report["timing"]["private-kib"].as_u64().unwrap());
    }
    private.sort_unstable();
    let [least, median, most] = [0, MACHINES / 2, MACHINES - 1].map(|nth| private[nth]);
    println!("{MACHINES} machines: {took:.1} s, private KiB {least} {median} {most}");
    assert!(most < 16 << 10, "{private:?}");
    assert_eq!(processes(text(&machine.path(""))), [""; 0]);
    let files: Vec<_> = fs::read_dir(machine.path("")).unwrap().collect();
    assert_eq!(files.len(), 1, "{files:?}");
}
