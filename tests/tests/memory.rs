//! Memory that is touched before the start, and machines with NUMA nodes.

use serde_json::Value;
use tests::machine::Machine;

/// What the threads that touched memory were called.
fn touchers(report: &Value) -> Vec<&str> {
    let threads = report["prealloc"].as_array().unwrap();
    threads.iter().map(|thread| thread["name"].as_str().unwrap()).collect()
}

#[test]
fn memory_is_touched_by_placed_threads_that_end_before_the_guest_starts() {
    let toml = "[machine]\nmemory = { size = \"64M\", prealloc = { threads = 3, near = true } }\n\
        cpus = 2\n[[numa]]\nvcpus = \"0-1\"\nmemory = \"64M\"\nhost-node = 0\n\
        [disk.d]\nsize = \"8M\"\n[policy]\nfallback = \"error\"\n";
    let report = Machine::new(toml).run(&["--json"]).expect(0).json();
    assert_eq!(report["guest"]["verdict"], "ok");
    assert_eq!(touchers(&report), ["prealloc0", "prealloc1", "prealloc2"]);
    let laps = report["timing"]["laps-ms"].as_array().unwrap();
    assert!(laps.iter().any(|lap| lap[0] == "prealloc"), "{laps:?}");
    // They are nobody's threads any more.
    let names = report["threads"].as_array().unwrap().iter().map(|thread| &thread["name"]);
    assert!(names.into_iter().all(|name| !name.as_str().unwrap().starts_with("prealloc")));
    let cpus = report["prealloc"][0]["cpus"].as_array().unwrap();
    assert!(!cpus.is_empty(), "read back from the kernel");
    let shown = Machine::new(toml).run(&["--timing"]).expect(0);
    assert!(shown.stderr.contains("  prealloc  "), "{}", shown.stderr);
}

#[test]
fn a_machine_with_two_nodes_on_both_sides_of_the_hole() {
    let toml = "[machine]\ncpus = 4\n\
        [[numa]]\nvcpus = \"0,2\"\nmemory = \"2G\"\nhost-node = 0\ndistances = [10, 21]\n\
        [[numa]]\nvcpus = \"1,3\"\nmemory = \"2G\"\ndistances = [21, 10]\n\
        [disk.d]\nsize = \"8M\"\n[policy]\nfallback = \"error\"\n";
    let report = Machine::new(toml).run(&["--json"]).expect(0).json();
    assert_eq!(report["guest"]["verdict"], "ok");
    assert!(report["guest"]["memory"].as_u64().unwrap() > 4095 << 20, "{}", report["guest"]);
    assert_eq!(touchers(&report), Vec::<&str>::new());
    let effective = report["effective"].as_str().unwrap();
    assert!(effective.contains("size = \"4G\""), "{effective}");
}

#[test]
fn a_host_node_that_is_not_there_is_said_and_the_policy_decides() {
    let toml = "[[numa]]\nvcpus = \"0\"\nmemory = \"64M\"\nhost-node = 1023\n";
    let outcome = Machine::new(toml).run(&[]).expect(0);
    let said = "not granted: numa node 0: wanted memory of host node 1023";
    assert!(outcome.stderr.contains(said), "{}", outcome.stderr);
    let strict = Machine::new(&format!("{toml}[policy]\nfallback = \"error\"\n"));
    strict.run(&[]).refuses(4, "wanted memory of host node 1023");
    let near = "[machine.memory]\nprealloc = { threads = 3, near = true }\n";
    let outcome = Machine::new(&format!("{near}{toml}")).run(&[]).expect(0);
    let said = "not granted: machine.memory.prealloc: wanted CPUs of host node 1023, got any";
    assert_eq!(outcome.stderr.matches(said).count(), 1, "{}", outcome.stderr);
}

#[test]
fn missing_huge_pages_are_said_at_the_start() {
    let toml = "[machine]\nmemory = { size = \"8T\", hugepages = \"2M\" }\n";
    Machine::new(toml).run(&[]).refuses(4, "machine.memory.hugepages: ");
    let bound = "[machine.memory]\nhugepages = \"2M\"\n\
        [[numa]]\nvcpus = \"0\"\nmemory = \"8T\"\nhost-node = 0\n";
    Machine::new(bound).run(&[]).refuses(4, "machine.memory.hugepages: ");
}

#[test]
fn a_signal_ends_it_while_memory_is_touched() {
    // More than is touched in the time a signal takes; should it get far, it is the one to die.
    let toml = "[machine]\nmemory = { size = \"16G\", prealloc = { threads = 1 } }\n";
    let machine = Machine::new(toml);
    let running = machine.start(&["--json"]);
    std::fs::write(format!("/proc/{}/oom_score_adj", running.pid()), "1000").unwrap();
    tests::machine::wait_for_thread(running.pid(), "prealloc0");
    running.signal(libc::SIGTERM);
    let report = running.wait().expect(128 + libc::SIGTERM).json();
    assert_eq!((&report["reason"], &report["exit"]), (&"signal".into(), &143.into()));
    assert!(report.get("guest").is_none(), "the guest never ran: {report}");
}
