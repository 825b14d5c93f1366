//! Plans on hosts: recorded and synthetic topologies, what is explained, what is found lacking.

use std::fs;
use std::os::unix::fs::symlink;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::Command;

use config::plan::Plan;
use config::{
    CpuSet, Explanation, Host, Limits, Role, Severity, Synthetic, check_host, explain, load_str,
};
use tempfile::TempDir;

fn plan(text: &str) -> Plan {
    load_str("vm.toml", text, Path::new("/base"), &[])
        .unwrap_or_else(|errors| panic!("{errors}"))
        .plan
}

fn synthetic(sockets: u32, cores: u32, threads: u32) -> Host {
    let dir = tempfile::tempdir().unwrap();
    Synthetic { sockets, cores, threads, memory: 4 << 30, hugepages: 64 }
        .write(dir.path())
        .unwrap();
    Host::from_sysfs(dir.path()).unwrap()
}

fn cpus(text: &str) -> CpuSet {
    text.parse().unwrap()
}

/// The codes of the warnings, with those that are errors marked.
fn codes(explanation: &Explanation) -> Vec<String> {
    let mark = |severity| if severity == Severity::Error { "!" } else { "" };
    explanation.warnings.iter().map(|w| format!("{}{}", w.code, mark(w.severity))).collect()
}

#[track_caller]
fn warns(text: &str, host: &Host, expected: &[&str]) -> Explanation {
    let explanation = explain(&plan(text), host);
    assert_eq!(codes(&explanation), expected, "{text}\n{}", explanation.render(100));
    explanation
}

#[test]
fn synthetic_hosts_are_read_back() {
    let host = synthetic(2, 4, 2);
    assert_eq!(host.online(), cpus("0-15"));
    assert_eq!((host.memory, host.allowed.clone(), host.limits), (Some(8 << 30), None, None));
    let cpu = &host.cpus[&13];
    assert_eq!((cpu.package, cpu.core, cpu.die, cpu.node), (1, 1, 0, 1));
    assert_eq!((cpu.siblings.clone(), cpu.llc.clone()), (cpus("5,13"), Some(cpus("4-7,12-15"))));
    assert_eq!(host.free_hugepages(2 << 20), 256 << 20);
    assert_eq!(host.free_hugepages(1 << 30), 0);
    assert_eq!(host.nodes_of(&cpus("0,4")), cpus("0-1"));
}

#[test]
fn this_host_is_read() {
    let host = Host::live().unwrap();
    assert!(!host.usable().is_empty() && host.memory.unwrap() > 1 << 20);
    assert!(host.limits.unwrap().nofile > 0);
    let json = serde_json::to_value(&host).unwrap();
    assert!(json["cpus"].is_object() && json["allowed"].is_string(), "{json}");
}

#[test]
fn what_is_missing_has_a_default() {
    let dir = tempfile::tempdir().unwrap();
    let cpu = dir.path().join("devices/system/cpu");
    fs::create_dir_all(&cpu).unwrap();
    fs::write(cpu.join("online"), "0-1,8100\n").unwrap();
    let host = Host::from_sysfs(dir.path()).unwrap();
    assert_eq!((host.online(), host.memory), (cpus("0-1,8100"), None));
    let last = &host.cpus[&8100];
    assert_eq!((last.package, last.core, last.node, last.siblings.len()), (0, 8100, 0, 1));
    assert_eq!(last.llc, None);

    // Unknown to the kernel; an older name; a node without CPUs.
    fs::create_dir_all(cpu.join("cpu1/topology")).unwrap();
    fs::write(cpu.join("cpu1/topology/physical_package_id"), "-1\n").unwrap();
    fs::write(cpu.join("cpu1/topology/thread_siblings_list"), "0-1\n").unwrap();
    for (node, list) in [("node0", "0-1,8100\n"), ("node7", "\n")] {
        let node = dir.path().join("devices/system/node").join(node);
        fs::create_dir_all(&node).unwrap();
        fs::write(node.join("cpulist"), list).unwrap();
    }
    let host = Host::from_sysfs(dir.path()).unwrap();
    assert_eq!((host.cpus[&1].package, host.cpus[&1].siblings.len()), (0, 2));
}

#[test]
fn what_is_damaged_is_named() {
    let dir = tempfile::tempdir().unwrap();
    Synthetic { sockets: 1, cores: 2, threads: 1, memory: 1 << 30, hugepages: 0 }
        .write(dir.path())
        .unwrap();
    let system = dir.path().join("devices/system");
    let files = [
        "cpu/online",
        "cpu/cpu1/topology/core_id",
        "cpu/cpu0/topology/core_cpus_list",
        "cpu/cpu1/cache/index1/level",
        "cpu/cpu1/cache/index1/shared_cpu_list",
        "node/node0/cpulist",
        "node/node0/meminfo",
        "node/node0/hugepages/hugepages-2048kB/free_hugepages",
    ];
    for file in files {
        let path = system.join(file);
        let good = fs::read(&path).unwrap();
        for damage in [&b"\xff\x1b[31m"[..], b"99999999999999999999", b"5-2", &b"x".repeat(3 << 20)]
        {
            fs::write(&path, damage).unwrap();
            let error = Host::from_sysfs(dir.path()).unwrap_err().to_string();
            assert!(
                error.contains(file) && error.len() < 300 && !error.contains('\u{1b}'),
                "{error}"
            );
        }
        fs::remove_file(&path).unwrap();
        fs::create_dir(&path).unwrap();
        let error = Host::from_sysfs(dir.path()).unwrap_err().to_string();
        assert!(error.contains(file), "{error}");
        fs::remove_dir(&path).unwrap();
        assert!(Command::new("mkfifo").arg(&path).status().unwrap().success());
        let error = Host::from_sysfs(dir.path()).unwrap_err().to_string();
        assert!(error.contains(file), "{error}");
        fs::remove_file(&path).unwrap();
        fs::write(&path, good).unwrap();
    }
    Host::from_sysfs(dir.path()).unwrap();
    let error = Host::from_sysfs(Path::new("/nowhere")).unwrap_err().to_string();
    assert!(error.contains("/nowhere/devices/system/cpu/online"), "{error}");
}

#[test]
fn every_thread_is_there_with_its_work() {
    let text = "[machine]\ncpus = 4\n[thread.io0]\ncpus = \"2\"\npoll = \"off\"\n[thread.io1]\n\
        sched = { policy = \"fifo\", priority = 5 }\n\
        [disk.data]\nsize = \"1M\"\n[[disk.data.place]]\nqueues = \"0,2\"\non = \"io0\"\n\
        [[disk.data.place]]\nqueues = \"1,3\"\non = \"vcpu\"\nhome = \"io1\"\n[rng.r]";
    let explanation = warns(text, &synthetic(1, 8, 1), &[]);
    let threads = &explanation.threads;
    let names: Vec<_> = threads.iter().map(|thread| thread.name.as_str()).collect();
    assert_eq!(names, ["heddle", "main", "io0", "io1", "vcpu0", "vcpu1", "vcpu2", "vcpu3"]);
    assert_eq!(threads[0].role, Role::Process);
    let threads = &threads[1..];
    let roles: Vec<_> = threads.iter().take(4).map(|thread| thread.role).collect();
    assert_eq!(roles, [Role::Main, Role::Iothread, Role::Iothread, Role::Vcpu]);
    assert_eq!(threads[0].queues, ["rng.r:q0"]);
    assert_eq!(threads[1].queues, ["disk.data:q0,2"]);
    assert_eq!(threads[1].reasons, ["the file places disk.data:q0,2 here"]);
    assert_eq!((threads[1].cpus.clone(), threads[1].poll.clone()), (Some(cpus("2")), None));
    assert_eq!(
        threads[2].reasons,
        [
            "home of disk.data:q1,3, run on the submitting vCPU",
            "becomes other after 200ms of CPU time without a pause"
        ]
    );
    assert_eq!((threads[2].policy.as_str(), threads[2].rings, threads[2].fds), ("fifo 5", 1, 5));
    assert_eq!(threads[4].queues, ["disk.data:q1,3"]);
    let json = explanation.to_json();
    assert_eq!(json["totals"]["threads"], 8);
    assert_eq!(json["totals"]["kernel-workers"], 16, "io0 and io1 have a ring");
    assert_eq!(json["threads"][2]["role"], "iothread");
    assert_eq!(json["threads"][2]["cpus"], "2");
    assert_eq!(explanation.for_vms(3).to_json()["totals"]["vcpus"], 12);
}

#[test]
fn the_table_is_tidy() {
    let text = "[machine]\ncpus = 64\n[vcpu]\naffinity = \"1:1@64-127\"\n[thread.main]\ncpus = \"0\"\n\
        [thread.a]\ncpus = \"1,3,5,7,9,11,13,15,17,19,21,23,25,27,29\"\n[disk.d]\nsize = \"1M\"\nplace = \"vcpu\"";
    let explanation = explain(&plan(text), &synthetic(2, 64, 1)).for_vms(2);
    let table = explanation.render(80);
    assert!(
        table.lines().all(|line| line.chars().count() <= 80 && line.trim_end() == line),
        "{table}"
    );
    assert!(table.contains("vm: 67 threads (heddle, main, 1 iothread, 64 vCPUs)"), "{table}");
    assert!(table.contains("2 such machines: 134 threads"), "{table}");
    let small = explain(&plan("[machine]\ncpus = 2\n[disk.d]\nsize = \"1M\""), &synthetic(1, 2, 1));
    let expected = "\
THREAD    CPUS  NODES  POLICY  POLL
heddle    any   0      other   -
    the process's own thread: start, end, signals, serial.com1
    costs 18 fds
main      any   0      other   32us
    every machine has it, for what is placed nowhere else
    disk.d:q0-1: placed here, which is the default
    costs 7 fds, 1 ring (up to 8 kernel threads), up to 32us of CPU time before each sleep
vcpu 0-1  any   0      other   -
    runs a CPU of the guest
    costs 1 fd each

vm: 4 threads (heddle, main, 0 iothreads, 2 vCPUs), 27 fds, 256M of memory, on 2 host CPUs
";
    assert_eq!(small.render(100), expected);
}

#[test]
fn threads_on_the_cpus_of_vcpus() {
    let host = synthetic(1, 4, 2); // cores: 0,4 1,5 2,6 3,7
    let with = |main: &str, policy: &str| {
        format!(
            "[machine]\ncpus = 2\n[vcpu]\naffinity = \"1:1@2-3\"\n[thread.main]\n{main}\n[policy]\noverlap = \"{policy}\""
        )
    };
    warns(&with("cpus = \"0-1\"", "error"), &host, &[]);
    let found = warns(&with("cpus = \"1-2\"", "warn"), &host, &["W01"]);
    assert_eq!(found.warnings[0].message, "main is on CPU 2 of the pinned vCPU 0");
    assert_eq!(found.warnings[0].hint.as_deref(), Some("CPUs without a pinned vCPU: 0-1,4-7"));
    warns(&with("cpus = \"1-2\"", "error"), &host, &["W01!"]);
    warns(&with("cpus = \"1-2\"", "allow"), &host, &[]);
    let found = warns(&with("", "warn"), &host, &["W01"]);
    assert!(found.warnings[0].message.contains("may run on CPUs 2-3 of the pinned vCPUs 0-1"));
    let found = warns(&with("cpus = \"6\"", "warn"), &host, &["W02"]);
    assert_eq!(
        found.warnings[0].message,
        "main on CPU 6 shares cores with the pinned vCPU 0 on CPU 2"
    );
    warns(&with("cpus = \"6\"", "allow"), &host, &[]);
}

#[test]
fn queue_maps_that_pile_up() {
    let host = synthetic(1, 16, 1);
    let text = "[machine]\ncpus = 8\n[thread.a]\n[thread.b]\n[disk.d]\nsize = \"1M\"\n";
    let found = warns(&format!("{text}place = \"a\""), &host, &["W04", "W06"]);
    assert_eq!(found.warnings[0].message, "a serves 8 queues while nothing is placed on b");
    warns(&format!("{text}place = \"a\"\nqueues = 3"), &host, &["W06"]);
    warns(&format!("{text}place = \"a\"\n[rng.r]\nplace = \"b\""), &host, &[]);
    // Being the home of a queue is work.
    let places = "place = [{ queues = \"0-5\", on = \"a\" }, { queues = \"6-7\", on = \"vcpu\", home = \"b\" }]";
    warns(&format!("{text}{places}"), &host, &[]);
    warns(
        "[machine]\ncpus = 4\n[vcpu]\naffinity = \"3\"\n[thread.main]\ncpus = \"1\"",
        &host,
        &["W03"],
    );
    warns("[machine]\ncpus = 17", &host, &["W12"]);
}

#[test]
fn forced_experiments() {
    let host = synthetic(1, 8, 1);
    let disk = "[thread.a]\n[disk.d]\nsize = \"1M\"\nengine = \"sync\"\n";
    warns(&format!("{disk}place = \"a\""), &host, &[]);
    let found = warns(&format!("{disk}place = \"vcpu\"\n[rng.r]\nplace = \"a\""), &host, &["W05"]);
    assert!(
        found.warnings[0].message.starts_with("disk.d:q0 with engine = \"sync\" stops the vCPU")
    );
    let found = warns(&format!("{disk}place = \"a\"\n[rng.r]\nplace = \"a\""), &host, &["W05"]);
    assert!(found.warnings[0].message.ends_with("keeps a from serving rng.r:q0"));
}

#[test]
fn what_the_host_does_not_give() {
    let mut host = synthetic(1, 8, 1);
    let pinned = "[machine]\ncpus = 2\n[vcpu]\naffinity = \"1:1@2,9\"\n[thread.main]\ncpus = \"0,8190\"\n[policy]\noverlap = \"allow\"";
    let found = warns(pinned, &host, &["W07", "W07"]);
    assert_eq!(
        found.warnings[0].message,
        "thread main wants CPU 8190, which the host does not have"
    );
    assert_eq!(
        found.warnings[1].message,
        "the pinning of vCPU 1 wants CPU 9, which the host does not have"
    );
    host.allowed = Some(cpus("2-3"));
    warns(pinned, &host, &["W07", "W07", "W08"]);

    warns("[machine]\nmemory = \"8G\"", &host, &["W10"]);
    warns("[machine]\nmemory = { size = \"128M\", hugepages = \"2M\" }", &host, &[]);
    warns("[machine]\nmemory = { size = \"130M\", hugepages = \"2M\" }", &host, &["W11"]);

    let wish = "[vcpu]\nsched = { policy = \"rr\", priority = 3 }\n[thread.main]\nsched = { nice = -5 }\n[policy]\nfallback = ";
    warns(&format!("{wish}\"error\""), &host, &[]);
    let limits =
        Limits { uid: 1000, sys_nice: false, nofile: 1024, rtprio: 2, nice: -4, memlock: 0 };
    host.limits = Some(limits);
    let found = warns(&format!("{wish}\"warn\""), &host, &["W09", "W09"]);
    assert!(found.warnings[0].message.contains("nice -5, but the lowest allowed is -4"));
    warns(&format!("{wish}\"error\""), &host, &["W09!", "W09!"]);
    warns(&format!("{wish}\"allow\""), &host, &[]);
    host.limits = Some(Limits { rtprio: 3, nice: -5, ..limits });
    warns(&format!("{wish}\"warn\""), &host, &[]);
    host.limits = Some(Limits { sys_nice: true, ..limits });
    warns(&format!("{wish}\"warn\""), &host, &[]);
}

/// The problems of a check, except those with /dev/kvm, which is not the same everywhere.
fn problems(text: &str, dir: &TempDir, host: &Host) -> Vec<(&'static str, Severity, String)> {
    let loaded =
        load_str("vm.toml", text, dir.path(), &[]).unwrap_or_else(|errors| panic!("{errors}"));
    let problems = check_host(&loaded.plan, host);
    assert!(problems.iter().all(|problem| problem.hint.is_some()));
    problems
        .into_iter()
        .filter(|problem| problem.code != "H05")
        .map(|problem| (problem.code, problem.severity, problem.message))
        .collect()
}

#[test]
fn disks_that_are_none() {
    let host = synthetic(1, 4, 1);
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    fs::create_dir(path("dir")).unwrap();
    fs::write(path("good"), [0; 1024]).unwrap();
    fs::write(path("odd"), [0; 1000]).unwrap();
    fs::write(path("empty"), "").unwrap();
    symlink("nothing", path("dangling")).unwrap();
    symlink("good", path("alias")).unwrap();
    assert!(Command::new("mkfifo").arg(path("fifo")).status().unwrap().success());
    let _socket = UnixListener::bind(path("socket")).unwrap();
    let one = |disk: &str, severity, message: &str| {
        let found = problems(&format!("[disk.d]\n{disk}"), &dir, &host);
        assert_eq!(found.len(), 1, "{found:?}");
        assert_eq!((found[0].0, found[0].1), ("H01", severity));
        assert!(found[0].2.contains(message), "{message}: {found:?}");
    };
    let none = |text: &str| assert_eq!(problems(text, &dir, &host), []);
    let error = Severity::Error;
    none("[disk.d]\npath = \"good\"");
    one("path = \"dir\"", error, "is a directory");
    one("path = \"fifo\"", error, "is a named pipe");
    one("path = \"socket\"", error, "is a socket");
    one("path = \"/dev/null\"", error, "is a character device");
    one("path = \"nothing\"", error, "does not exist");
    one("path = \"dangling\"", error, "does not exist");
    one("path = \"good/x\"", error, "not a directory");
    one("path = \"no/x\"\nsize = \"1M\"", error, "its directory does not exist");
    one("path = \"empty\"", error, "its size, 0 bytes, is no positive multiple of 512");
    one("path = \"odd\"", error, "its size, 1000 bytes, is no positive multiple of 512");
    one("path = \"good\"\nsize = \"1M\"", Severity::Warning, "exists and has 1024 bytes");
    none("[disk.d]\npath = \"good\"\nsize = \"1K\"");
    none("[disk.d]\npath = \"new\"\nsize = \"1M\"");
    assert!(!path("new").exists(), "a check has no side effects");
    let both = |one: bool, other: bool| {
        format!(
            "[disk.d]\npath = \"good\"\nread-only = {one}\n[disk.e]\npath = \"alias\"\nread-only = {other}"
        )
    };
    none(&both(true, true));
    for (one, other) in [(false, false), (false, true), (true, false)] {
        let found = problems(&both(one, other), &dir, &host);
        assert!(found[0].2.contains("is the same file as disk.d"), "{found:?}");
    }
}

#[test]
fn other_files_and_limits() {
    let mut host = synthetic(1, 4, 1);
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("k"), "x").unwrap();
    let found = problems("[boot]\nkernel = \"k\"\ninitrd = \"i\"", &dir, &host);
    assert!(
        found.len() == 1
            && found[0].0 == "H02"
            && found[0].2.ends_with("/i: no such file or directory"),
        "{found:?}"
    );
    let found = problems("[boot]\nmultiboot = \"no\"\nmodules = [\"k\", \"m\"]", &dir, &host);
    let wrong: Vec<_> = found.iter().map(|problem| problem.2.as_str()).collect();
    assert!(wrong.len() == 2 && wrong[0].contains("/no:") && wrong[1].contains("/m:"), "{wrong:?}");
    let found = problems("[boot]\nkernel = \"/dev/zero\"", &dir, &host);
    assert!(found[0].2.contains("is a character device"), "{found:?}");
    for (out, wrong) in
        [("log", false), ("/dev/null", false), (".", true), ("no/log", true), ("k/log", true)]
    {
        let found = problems(&format!("[serial.com1]\nout = {{ file = \"{out}\" }}"), &dir, &host);
        assert_eq!(found.len(), usize::from(wrong), "{out}: {found:?}");
    }
    assert!(!dir.path().join("log").exists());

    // What explain doubts is an error where the host lacks it.
    let lacking = "[machine]\nmemory = \"5G\"\n[thread.main]\ncpus = \"7\"\n[disk.d]\nsize = \"1M\"\nqueues = 1024";
    host.limits =
        Some(Limits { uid: 0, sys_nice: true, nofile: 1024, rtprio: 0, nice: 0, memlock: 0 });
    let found = problems(lacking, &dir, &host);
    let codes: Vec<_> = found.iter().map(|problem| (problem.0, problem.1)).collect();
    let error = Severity::Error;
    assert_eq!(codes, [("H04", error), ("W07", error), ("W10", error)]);
}

/// Two host nodes of four CPUs each: 0-3 and 4-7, with 3 of 4 GiB free and 64 huge pages.
fn two_nodes() -> Host {
    synthetic(2, 4, 1)
}

/// Two guest nodes with this memory on host nodes 0 and `second`.
fn numa(first: &str, other: &str, second: u32) -> String {
    format!(
        "[[numa]]\nvcpus = \"0-1\"\nmemory = \"{first}\"\nhost-node = 0\n\
         [[numa]]\nvcpus = \"2-3\"\nmemory = \"{other}\"\nhost-node = {second}\n"
    )
}

#[test]
fn memory_of_host_nodes() {
    let host = two_nodes();
    assert_eq!(host.nodes[&1].total, Some(4 << 30));
    assert_eq!(host.nodes[&1].available, Some(3 << 30));
    assert_eq!(host.usable_on(1), cpus("4-7"));
    let four = |memory: &str, nodes: String| {
        format!("[machine]\ncpus.topology.sockets = 4\n{memory}\n{nodes}")
    };
    warns(&four("", numa("3G", "3G", 1)), &host, &[]);
    // Both on one node: together they are too much.
    let found = warns(&four("", numa("2G", "1026M", 0)), &host, &["W22"]);
    assert!(found.warnings[0].message.contains("3074M are to come from host node 0"));
    let found = warns(&four("", numa("2G", "2050M", 0)), &host, &["W21"]);
    assert!(found.warnings[0].message.contains("which has 4G"), "{}", found.warnings[0].message);
    let found = warns(&four("", numa("1G", "1G", 2)), &host, &["W20"]);
    assert!(found.warnings[0].message.contains("guest node 1 wants memory of host node 2"));
    assert_eq!(found.warnings[0].hint.as_deref(), Some("its nodes are 0-1"));
    // Enough huge pages on the host, but not on the node.
    let huge = "memory = { hugepages = \"2M\" }";
    let found = warns(&four(huge, numa("128M", "128M", 1)), &host, &[]);
    // They are touched in any case.
    assert_eq!(found.threads.iter().filter(|thread| thread.role == Role::Prealloc).count(), 8);
    let found = warns(&four(huge, numa("126M", "130M", 1)), &host, &["W21"]);
    let problem = &found.warnings[0];
    assert!(problem.message.contains("65 huge pages of 2M are needed on host node 1, 64 are free"));
    assert!(problem.hint.as_ref().unwrap().contains("node/node1/hugepages/hugepages-2048kB"));
    let errors = check_host(&plan(&four(huge, numa("126M", "130M", 1))), &host);
    assert!(errors.iter().any(|p| p.code == "W21" && p.severity == Severity::Error), "{errors:?}");
}

#[test]
fn work_away_from_its_memory() {
    let host = two_nodes();
    let text = |pin: &str, threads: &str| {
        format!(
            "[machine]\ncpus.topology.sockets = 4\n{}[vcpu.pin]\n{pin}\n{threads}",
            numa("128M", "128M", 1)
        )
    };
    warns(&text("\"0-1\" = \"0-1\"\n\"2-3\" = \"4-5\"", ""), &host, &["W01"]);
    let apart = "[thread.main]\ncpus = \"3\"\n";
    warns(&text("\"0-1\" = \"0-1\"\n\"2-3\" = \"4-5\"", apart), &host, &[]);
    let found = warns(&text("\"0-1\" = \"0-1\"\n\"2\" = \"0-1,4\"", apart), &host, &["W23"]);
    let message = &found.warnings[0].message;
    assert_eq!(
        message,
        "pinned vCPU 2 of guest node 1 may run away from its memory on host node 1"
    );
    assert_eq!(found.warnings[0].hint.as_deref(), Some("host node 1 has CPUs 4-7"));
    let disk = format!("{apart}[disk.d]\nsize = \"1M\"");
    let found = warns(&text("", &disk), &host, &["W24"]);
    let message = &found.warnings[0].message;
    assert!(message.starts_with("main serves disk.d:q2-3 of guest node 1"), "{message}");
    assert!(message.ends_with("from node 0"), "{message}");
    // One queue for all is near to somebody.
    warns(&text("", &format!("{disk}\nqueues = 1")), &host, &[]);
    let both = "[thread.main]\ncpus = \"3,4\"\n[disk.d]\nsize = \"1M\"";
    warns(&text("", both), &host, &[]);
}

#[test]
fn guest_nodes_that_cut_a_die() {
    let with = |topology: &str| {
        format!("[machine]\ncpus.topology = {{ {topology} }}\n{}", numa("2M", "2M", 1))
    };
    let found = warns(&with("cores = 4"), &two_nodes(), &["W26"]);
    let message = &found.warnings[0].message;
    assert_eq!(message, "vCPUs 0-3 share a die, but are in the guest's nodes 0-1");
    for topology in ["sockets = 2, cores = 2", "dies = 2, threads = 2", "sockets = 4"] {
        warns(&with(topology), &two_nodes(), &[]);
    }
}

#[test]
fn threads_that_touch_memory() {
    let with = |prealloc: &str, nodes: &str| {
        plan(&format!(
            "[machine]\ncpus.topology.sockets = 4\nmemory = {{ prealloc = {prealloc} }}\n{nodes}"
        ))
    };
    let touchers = |plan: &Plan, host: &Host| config::prealloc::touchers(plan, host);
    let host = two_nodes();
    assert_eq!(touchers(&with("false", ""), &host), []);
    let found = touchers(&with("true", ""), &host);
    assert_eq!(found.len(), 8);
    assert!(found.iter().all(|one| one.cpus.is_none() && one.node.is_none()));
    // Not more than 16 by default, and not more than there are pieces.
    assert_eq!(touchers(&with("true", ""), &synthetic(2, 64, 2)).len(), 16);
    let small = plan("[machine.memory]\nsize = \"6M\"\nprealloc = { threads = 9 }");
    assert_eq!(touchers(&small, &host).len(), 3);
    // By host node, each with its share.
    let nodes = numa("384M", "128M", 1);
    let found = touchers(&with("{ threads = 4, near = true }", &nodes), &host);
    let seen: Vec<_> = found.iter().map(|one| (one.node, one.cpus.clone().unwrap())).collect();
    assert_eq!(seen[..3], vec![(Some(0), cpus("0-3")); 3]);
    assert_eq!(seen[3..], [(Some(1), cpus("4-7"))]);
    assert_eq!(found[3].name, "prealloc3");
    let all: Vec<_> = found.iter().flat_map(|one| one.ranges.clone()).collect();
    let mib = |from: u64, to: u64| from << 20..to << 20;
    assert_eq!(all, [mib(0, 128), mib(128, 256), mib(256, 384), mib(384, 512)]);
    // One thread is too few for two nodes; two parts of one node are one group.
    assert_eq!(touchers(&with("{ threads = 1, near = true }", &nodes), &host).len(), 2);
    let one = touchers(&with("{ threads = 2, near = true }", &numa("4M", "4M", 0)), &host);
    assert_eq!(one.len(), 2);
    let mixed = format!("{}[[numa]]\nmemory = \"6M\"\nhost-node = 0", numa("4M", "2M", 1));
    let found = touchers(&with("{ threads = 2, near = true }", &mixed), &host);
    assert_eq!(found[0].ranges, [mib(0, 4), mib(6, 12)]);
    assert_eq!(found[1].ranges, [mib(4, 6)]);
    // A node whose CPUs are all for others.
    let host = Host { allowed: Some(cpus("0-3")), ..host };
    let near = with("{ near = true }", &nodes);
    assert!(touchers(&near, &host).iter().any(|one| one.node == Some(1) && one.cpus.is_none()));
    assert_eq!(codes(&explain(&near, &host)), ["W25"]);
}

#[test]
fn guest_nodes_and_short_lived_threads_are_explained() {
    let text = format!(
        "[machine]\ncpus.topology.sockets = 4\nmemory = {{ prealloc = {{ threads = 4, near = true }} }}\n{}\
         [[numa]]\nmemory = \"2M\"",
        numa("128M", "128M", 1)
    );
    let explanation = warns(&text, &two_nodes(), &[]);
    let table = explanation.render(80);
    for part in [
        "prealloc 1-2  0-3   0      other   -\n    touches the guest's memory on host node 0\n",
        "prealloc 3-4  4-7   1      other   -\n    touches the guest's memory on host node 1\n",
        "    ends before the guest starts",
        "guest node 0: vCPUs 0-1, 128M of host node 0",
        "guest node 2: no vCPUs, 2M of any host node",
        "vm: 6 threads (heddle, main, 0 iothreads, 4 vCPUs)",
    ] {
        assert!(table.contains(part), "{part}\n{table}");
    }
    let json = explanation.to_json();
    assert_eq!(json["nodes"][1]["host-node"], 1);
    assert_eq!(json["totals"]["threads"], 6);
    assert_eq!(json["memory"], 258 << 20);
}

#[test]
fn hot_plug_slots_are_explained() {
    let host = synthetic(1, 2, 1);
    let without = explain(&plan(""), &host);
    assert!(!without.render(80).contains("hot-plug"));
    for (slots, words) in [
        (1, "1 hot-plug slot, empty at the start: a PCIe root port with bus 1 behind it\n"),
        (2, "2 hot-plug slots, empty at the start: PCIe root ports with buses 1-2 behind them\n"),
    ] {
        let with = explain(&plan(&format!("machine.hotplug-slots = {slots}")), &host);
        assert!(with.render(100).contains(words), "{}", with.render(100));
        assert_eq!(with.to_json()["hotplug-slots"], slots);
        assert_eq!((with.fds(), with.threads), (without.fds(), without.threads.clone()));
    }
}
