//! Whole machines whose devices are virtio-mmio.

use serde_json::Value;
use tests::machine::Machine;

/// A machine over MMIO with `cpus` vCPUs, and what else its file says.
fn machine(cpus: usize, cmdline: &str, toml: &str) -> Machine {
    Machine::new(&format!(
        "[machine]\ncpus = {cpus}\ntransport = \"mmio\"\n[boot]\ncmdline = '{cmdline}'\n{toml}"
    ))
}

#[track_caller]
fn run(cpus: usize, cmdline: &str, toml: &str) -> Value {
    let report = machine(cpus, cmdline, toml).run(&["--json"]).expect(0).json();
    assert_eq!(
        (&report["guest"]["verdict"], &report["reason"]),
        (&"ok".into(), &"power-off".into())
    );
    assert_eq!(report["guest"]["vcpus"], cpus);
    report
}

#[track_caller]
fn counter(report: &Value, thread: &str, counter: &str) -> u64 {
    let threads = report["threads"].as_array().unwrap();
    let found = threads.iter().find(|found| found["name"] == thread).unwrap();
    found["counters"][counter].as_u64().unwrap()
}

#[test]
fn a_loop_serves_a_disk_and_its_kicks_take_no_exits() {
    for cpus in [1, 4, 16] {
        let toml = "[thread.io0]\n[disk.d]\nsize = \"64M\"\nengine = \"sync\"\nplace = \"io0\"\n";
        let report = run(cpus, "", toml);
        let disk = &report["guest"]["disks"][0];
        assert_eq!((&disk["mmio"], &disk["pci"]), (&"mmio@feb00000".into(), &Value::Null));
        let sum = |column: usize| -> u64 {
            let rows = disk["per_vcpu"].as_array().unwrap();
            rows.iter().map(|row| row[column].as_u64().unwrap()).sum()
        };
        assert_eq!(counter(&report, "io0", "requests"), sum(2));
        assert_eq!(counter(&report, "main", "requests"), 0);
        // Only doorbells are fds there, and several kicks may be one event.
        let events = counter(&report, "io0", "fd_events");
        assert!(events > sum(3) / 4, "{events} events for {} kicks", sum(3));
        for vcpu in 0..cpus {
            assert_eq!(counter(&report, &format!("vcpu{vcpu}"), "kicks"), 0);
        }
    }
}

#[test]
fn vcpus_serve_their_own_queues() {
    for (cpus, cmdline) in [(1, "no-event-idx"), (4, "no-indirect"), (16, "")] {
        let report = run(cpus, cmdline, "[disk.d]\nsize = \"64M\"\nplace = \"vcpu\"\n");
        for vcpu in 0..cpus {
            assert!(counter(&report, &format!("vcpu{vcpu}"), "requests") > 0, "vCPU {vcpu}");
        }
        assert!(counter(&report, "main", "completions") > 0);
        let disk = &report["guest"]["disks"][0];
        assert_eq!(disk["event_idx"], cmdline != "no-event-idx");
        assert_eq!(disk["indirect"], cmdline != "no-indirect");
    }
}

#[test]
fn as_many_devices_as_there_are_lines_are_driven_each_with_its_own() {
    let mut toml = "[thread.a]\n[rng.r]\nplace = \"vcpu\"\n[rng.s]\nplace = \"a\"\n".to_owned();
    for disk in 0..13 {
        let place = ["main", "a", "vcpu"][disk % 3];
        toml += &format!("[disk.d{disk}]\nsize = \"2M\"\nplace = \"{place}\"\n");
    }
    let report = run(2, "requests=100", &toml);
    let disks = report["guest"]["disks"].as_array().unwrap();
    let ids: Vec<_> = disks.iter().map(|disk| disk["id"].as_str().unwrap().to_owned()).collect();
    assert_eq!(ids, (0..13).map(|disk| format!("d{disk}")).collect::<Vec<_>>());
    let rngs = report["guest"]["rng"].as_array().unwrap();
    assert_eq!(rngs.iter().filter(|rng| rng["interrupts"].as_u64() > Some(0)).count(), 2);
    machine(2, "", &format!("{toml}[disk.more]\nsize = \"2M\"\n"))
        .run(&[])
        .refuses(4, "machine.transport: \"mmio\" has interrupt lines for 15 devices");
}

#[test]
fn a_machine_without_devices_runs() {
    let report = run(1, "", "");
    assert!(!report["guest"]["cmdline"].as_str().unwrap().contains("mmio"));
}
