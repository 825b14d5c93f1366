//! The threads of a running machine, as the kernel sees them.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;
use tests::machine::{Machine, Outcome, Running, text, threads, wait_for_thread};
use tests::payload::{self, port_writes};
use tests::program::heddle;

/// What the kernel says of a thread.
#[derive(Debug, PartialEq, Eq)]
struct Seen {
    cpus: String,
    policy: libc::c_int,
    nice: i32,
}

/// A thread on `cpus`.
fn on(cpus: &str, policy: libc::c_int, nice: i32) -> Seen {
    Seen { cpus: cpus.to_owned(), policy, nice }
}

/// `Cpus_allowed_list` of a process or thread.
fn allowed(path: &str) -> String {
    let status = fs::read_to_string(format!("{path}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"));
    line.unwrap().trim().to_owned()
}

fn seen(pid: u32, thread: u32) -> Seen {
    let path = format!("/proc/{pid}/task/{thread}");
    let stat = fs::read_to_string(format!("{path}/stat")).unwrap();
    // proc(5): what follows the name begins with field 3; nice is field 19, policy 41.
    let fields: Vec<_> = stat.rsplit(')').next().unwrap().split_whitespace().collect();
    let nice = fields[19 - 3].parse().unwrap();
    let policy = fields[41 - 3].parse().unwrap();
    Seen { cpus: allowed(&path), policy, nice }
}

/// The first and the last CPU this process may use, and all of them.
fn host_cpus() -> (String, String, String) {
    let all = allowed("/proc/self");
    let first = all.split([',', '-']).next().unwrap().to_owned();
    let last = all.rsplit([',', '-']).next().unwrap().to_owned();
    (first, last, all)
}

/// How the kernel writes the set of two CPUs, which may be one.
fn both_of(first: &str, last: &str) -> String {
    match [first, last].map(|cpu| cpu.parse::<u32>().unwrap()) {
        [first, last] if first == last => format!("{first}"),
        [first, last] if first + 1 == last => format!("{first}-{last}"),
        [first, last] => format!("{first},{last}"),
    }
}

/// The threads heddle made, by name; those that the kernel adds are left out.
fn made(pid: u32) -> Vec<(String, u32)> {
    let kernels = |name: &str| name.starts_with("iou-") || name.starts_with("kvm-");
    let named = threads(pid).into_iter().map(|(id, name)| (name, id));
    let mut made: Vec<_> = named.filter(|(name, _)| !kernels(name)).collect();
    made.sort();
    made
}

/// A machine that waits for input, and its threads.
fn waiting(toml: &str) -> (Machine, Running, Vec<(String, u32)>) {
    let machine = Machine::booting(payload::echo(), "", toml);
    let mut running = machine.start(&["--json"]);
    running.wait_for("ready");
    let threads = made(running.pid());
    (machine, running, threads)
}

#[track_caller]
fn stop(running: Running) -> Outcome {
    running.signal(libc::SIGTERM);
    running.wait().expect(143)
}

#[test]
fn threads_have_the_name_cpus_policy_and_nice_of_the_file() {
    let (first, last, all) = host_cpus();
    let toml = format!(
        "[machine]\ncpus = 3\n\
         [vcpu]\nsched = {{ policy = \"batch\", nice = 3 }}\n\
         [vcpu.pin]\n1 = \"{last}\"\n2 = \"{first},{last}\"\n\
         [thread.main]\ncpus = \"{first}\"\n\
         [thread.io0]\ncpus = \"{last}\"\nsched = {{ nice = 5 }}\n\
         [thread.fifteen-letters]\nsched = {{ policy = \"idle\" }}\n\
         [thread.batch]\nsched = {{ policy = \"batch\", nice = 19 }}\n"
    );
    let (_machine, running, threads) = waiting(&toml);
    let both = both_of(&first, &last);
    let expected = [
        ("batch", on(&all, libc::SCHED_BATCH, 19)),
        ("fifteen-letters", on(&all, libc::SCHED_IDLE, 0)),
        ("heddle", on(&all, libc::SCHED_OTHER, 0)),
        ("io0", on(&last, libc::SCHED_OTHER, 5)),
        ("main", on(&first, libc::SCHED_OTHER, 0)),
        ("vcpu0", on(&all, libc::SCHED_BATCH, 3)),
        ("vcpu1", on(&last, libc::SCHED_BATCH, 3)),
        ("vcpu2", on(&both, libc::SCHED_BATCH, 3)),
    ];
    let found: Vec<_> =
        threads.iter().map(|(name, id)| (name.as_str(), seen(running.pid(), *id))).collect();
    assert_eq!(found, expected);
    // The report names the same threads, and nothing was refused.
    let report = stop(running).json();
    assert_eq!(report["not-granted"], Value::Array(Vec::new()));
    let told: BTreeMap<_, _> = report["threads"]
        .as_array()
        .unwrap()
        .iter()
        .map(|thread| (thread["name"].as_str().unwrap(), thread["tid"].as_u64().unwrap()))
        .collect();
    let without_the_first = threads.iter().filter(|(name, _)| *name != "heddle");
    let ids: BTreeMap<_, _> =
        without_the_first.map(|(name, id)| (name.as_str(), u64::from(*id))).collect();
    assert_eq!(told, ids);
}

#[test]
fn there_are_as_many_threads_as_vcpus_and_declared_loops_and_two_more() {
    for (vcpus, loops) in [(1, 0), (5, 3), (40, 8)] {
        let mut toml = format!("[machine]\ncpus = {vcpus}\n[disk.a]\nsize = \"1M\"\n");
        (0..loops).for_each(|nth| toml += &format!("[thread.io{nth}]\n"));
        let (_machine, running, threads) = waiting(&toml);
        assert_eq!(threads.len(), vcpus + loops + 2, "the first one, and main: {threads:?}");
        stop(running);
    }
}

#[test]
fn threads_that_ask_for_no_cpus_get_those_heddle_was_started_with() {
    let (first, last, _) = host_cpus();
    let toml = format!("[thread.main]\ncpus = \"{first}\"\n[thread.io0]\n");
    let machine = Machine::booting(payload::echo(), "", &toml);
    let mut taskset = Command::new("taskset");
    taskset.args(["-c", &last, text(heddle()), "run", text(&machine.path("vm.toml"))]);
    taskset.stdin(Stdio::null());
    let mut running = Running::start(&mut taskset);
    running.wait_for("ready");
    for (name, id) in made(running.pid()) {
        let expected = if name == "main" { &first } else { &last };
        assert_eq!(seen(running.pid(), id).cpus, *expected, "{name}");
    }
    stop(running);
}

#[test]
fn a_cpu_the_host_lacks_is_not_granted_and_said_once() {
    let (_, last, all) = host_cpus();
    let toml =
        format!("[thread.io0]\ncpus = \"{last},4095\"\n[thread.io1]\ncpus = \"4090-4095\"\n");
    let (machine, running, threads) = waiting(&toml);
    let cpus = |name: &str| {
        let (_, id) = threads.iter().find(|(found, _)| found == name).unwrap();
        seen(running.pid(), *id).cpus
    };
    assert_eq!(cpus("io0"), last, "what there is of it");
    assert_eq!(cpus("io1"), all, "nothing of it is there");
    let outcome = stop(running);
    let report = outcome.json();
    let refused = report["not-granted"].as_array().unwrap();
    assert_eq!(refused.len(), 2, "{refused:?}");
    for (refused, whose) in refused.iter().zip(["thread.io0", "thread.io1"]) {
        let refused = refused.as_str().unwrap();
        assert!(refused.starts_with(whose) && refused.contains("4095"), "{refused}");
        let said = outcome.stderr.matches(refused).count();
        assert_eq!(said, 1, "{}", outcome.stderr);
    }
    // A policy can make it an error.
    let strict = machine.run(&["--set", "policy.fallback=error"]);
    strict.refuses(4, "thread.io0");
}

/// May heddle have real-time threads here? Says so if not.
fn real_time_is_permitted() -> bool {
    let tried = Command::new("chrt").args(["--fifo", "1", "true"]).output().unwrap();
    if !tried.status.success() {
        eprintln!("not tried, needs CAP_SYS_NICE: {}", String::from_utf8_lossy(&tried.stderr));
    }
    tried.status.success()
}

/// Field `number` of /proc/PID/task/TID/stat, as proc(5) counts them; one behind the name.
fn field(pid: u32, thread: u32, number: usize) -> u64 {
    let stat = fs::read_to_string(format!("/proc/{pid}/task/{thread}/stat")).unwrap();
    let fields = stat.rsplit(')').next().unwrap();
    fields.split_whitespace().nth(number - 3).unwrap().parse().unwrap()
}

/// The real-time priority of a thread.
fn priority(pid: u32, thread: u32) -> u64 {
    const RT_PRIORITY: usize = 40;
    field(pid, thread, RT_PRIORITY)
}

/// CPU time of a thread, in the guest too.
fn cpu_time(pid: u32, thread: u32) -> Duration {
    const UTIME: usize = 14;
    const STIME: usize = 15;
    const TICKS_PER_SECOND: u64 = 100; // USER_HZ, the same on every x86_64
    let ticks = field(pid, thread, UTIME) + field(pid, thread, STIME);
    Duration::from_millis(ticks * 1000 / TICKS_PER_SECOND)
}

#[test]
fn real_time_threads_have_the_policy_and_priority_of_the_file_and_timers_without_slack() {
    if !real_time_is_permitted() {
        return;
    }
    let (first, last, all) = host_cpus();
    let toml = format!(
        "[thread.main]\nsched = {{ nice = -20 }}\n\
         [thread.fifo]\ncpus = \"{last}\"\nsched = {{ policy = \"fifo\", priority = 5 }}\n\
         [thread.rr]\nsched = {{ policy = \"rr\", priority = 99, runaway = \"off\" }}\n\
         [thread.batch]\ncpus = \"{first}\"\nsched = {{ policy = \"batch\", nice = -1 }}\n\
         [thread.idle]\nsched = {{ policy = \"idle\" }}\n"
    );
    let (_machine, running, threads) = waiting(&toml);
    let expected = [
        ("batch", 0, on(&first, libc::SCHED_BATCH, -1)),
        ("fifo", 5, on(&last, libc::SCHED_FIFO, 0)),
        ("heddle", 0, on(&all, libc::SCHED_OTHER, 0)),
        ("idle", 0, on(&all, libc::SCHED_IDLE, 0)),
        ("main", 0, on(&all, libc::SCHED_OTHER, -20)),
        ("rr", 99, on(&all, libc::SCHED_RR, 0)),
        ("vcpu0", 0, on(&all, libc::SCHED_OTHER, 0)),
    ];
    let pid = running.pid();
    let look = |(name, id): &(String, u32)| (name.clone(), priority(pid, *id), seen(pid, *id));
    let found: Vec<_> = threads.iter().map(look).collect();
    let found: Vec<_> = found.iter().map(|(name, n, seen)| (name.as_str(), *n, seen)).collect();
    assert_eq!(found, expected.each_ref().map(|(name, n, seen)| (*name, *n, seen)));
    for (name, id) in threads.iter().filter(|(name, _)| name != "heddle") {
        let slack = fs::read_to_string(format!("/proc/{id}/timerslack_ns")).unwrap();
        // Since Linux 6.12 those of real-time threads have none at all.
        assert!(["0", "1"].contains(&slack.trim()), "{name}: {slack}");
    }
    let report = stop(running).json();
    assert_eq!(report["not-granted"], Value::Array(Vec::new()));
    for thread in report["threads"].as_array().unwrap() {
        assert_eq!(thread["demoted"], false, "{thread}");
    }
}

/// A machine whose guest never leaves its CPU, with a real-time vCPU, and the vCPU's thread.
fn spinning(sched: &str, args: &[&str]) -> (Machine, Running, u32) {
    let toml = format!("[vcpu]\nsched = {{ policy = \"fifo\", priority = 1{sched} }}\n");
    let machine = Machine::booting(payload::spin(), "", &toml);
    let running = machine.start(args);
    wait_for_thread(running.pid(), "vcpu0");
    let (_, vcpu) = made(running.pid()).into_iter().find(|(name, _)| name == "vcpu0").unwrap();
    (machine, running, vcpu)
}

#[test]
fn a_vcpu_that_may_not_run_away_loses_its_priority_and_that_is_said() {
    if !real_time_is_permitted() {
        return;
    }
    let lost = "thread vcpu0 is no longer fifo 1 but other: it ran for 100ms and more";
    for args in [["--json"], ["--stats"]] {
        let (_machine, mut running, vcpu) = spinning(", runaway = \"100ms\"", &args);
        running.wait_for(lost);
        assert_eq!(seen(running.pid(), vcpu).policy, libc::SCHED_OTHER);
        running.signal(libc::SIGTERM);
        let outcome = running.wait().expect(143);
        assert_eq!(outcome.stderr.matches(lost).count(), 1, "{}", outcome.stderr);
        if args == ["--stats"] {
            let line = outcome.stderr.lines().find(|line| line.starts_with("vcpu0 "));
            assert!(line.unwrap().ends_with("  lost fifo 1"), "{}", outcome.stderr);
            continue;
        }
        for thread in outcome.json()["threads"].as_array().unwrap() {
            assert_eq!(thread["demoted"], thread["name"] == "vcpu0", "{thread}");
        }
    }
}

#[test]
fn a_vcpu_may_compute_for_as_long_as_it_likes_unless_the_file_says_otherwise() {
    if !real_time_is_permitted() {
        return;
    }
    let (first, last, _) = host_cpus();
    let (_machine, running, vcpu) = spinning("", &["--set", &format!("vcpu.affinity={last}")]);
    let began = Instant::now();
    while cpu_time(running.pid(), vcpu) < Duration::from_millis(600) {
        assert!(began.elapsed() < Duration::from_secs(60), "it does not run");
        std::thread::yield_now();
    }
    assert_eq!(seen(running.pid(), vcpu).policy, libc::SCHED_FIFO);
    assert_eq!(seen(running.pid(), vcpu).cpus, last);
    // KVM makes threads of its own on behalf of the first vCPU; they do not take after it.
    let all = threads(running.pid()).into_iter();
    for (id, name) in all.filter(|(_, name)| name.starts_with("kvm-")) {
        let Seen { cpus, policy, nice } = seen(running.pid(), id);
        assert_eq!((policy, nice), (libc::SCHED_OTHER, 0), "{name}");
        assert_eq!(cpus == last, first == last, "{name} is on {cpus}");
    }
    running.signal(libc::SIGTERM);
    let outcome = running.wait().expect(143);
    assert!(!outcome.stderr.contains("no longer"), "{}", outcome.stderr);
}

/// heddle without the right to real-time policies.
fn without_rights(machine: &Machine, args: &[&str]) -> Outcome {
    deprived(&mut machine.heddle("run"), args)
}

/// Runs a command of heddle without that right.
fn deprived(heddle: &mut Command, args: &[&str]) -> Outcome {
    let mut command = Command::new("prlimit");
    command.args(["--rtprio=0:0", "--nice=0:0", "--"]);
    // As root, take the capability away as well.
    if fs::metadata("/proc/self").unwrap().uid() == 0 {
        command.args(["setpriv", "--bounding-set", "-sys_nice", "--inh-caps", "-sys_nice", "--"]);
    }
    command.arg(heddle.get_program()).args(heddle.get_args()).args(args);
    command.stdin(Stdio::null());
    Running::start(&mut command).wait()
}

#[test]
fn a_policy_that_is_not_permitted_is_not_granted_and_said_once() {
    tests::program::need_kvm();
    let toml = "[thread.io0]\nsched = { policy = \"fifo\", priority = 10 }\n\
                [thread.io1]\nsched = { nice = -5 }\n";
    let machine = Machine::booting(payload::cmdline(), "", toml);
    let outcome = without_rights(&machine, &["--json"]).expect(0);
    let report = outcome.json();
    let refused: Vec<_> =
        report["not-granted"].as_array().unwrap().iter().map(|it| it.as_str().unwrap()).collect();
    assert_eq!(refused.len(), 2, "{refused:?}");
    assert!(refused[0].starts_with("thread.io0: wanted fifo 10, got other"), "{refused:?}");
    assert!(refused[1].starts_with("thread.io1: wanted other, nice -5, got other"), "{refused:?}");
    for refused in refused {
        assert!(refused.contains("CAP_SYS_NICE"), "it says what to do: {refused}");
        assert_eq!(outcome.stderr.matches(refused).count(), 1, "{}", outcome.stderr);
    }
    let threads = report["threads"].as_array().unwrap();
    let io0 = threads.iter().find(|thread| thread["name"] == "io0").unwrap();
    assert_eq!(io0["sched"], "other");
    without_rights(&machine, &["--set", "policy.fallback=error"]).refuses(4, "io0");
    let quiet = without_rights(&machine, &["--set", "policy.fallback=allow"]).expect(0);
    assert!(!quiet.stderr.contains("not granted"), "{}", quiet.stderr);
}

#[test]
fn a_check_of_the_host_finds_what_is_not_permitted_and_counts_it_as_an_error() {
    tests::program::need_kvm();
    let toml = "[vcpu]\nsched = { policy = \"rr\", priority = 3 }\n\
                [thread.io0]\nsched = { policy = \"batch\", nice = -1 }\n";
    let machine = Machine::booting(payload::cmdline(), "", toml);
    let checked = deprived(&mut machine.heddle("check"), &["--host"]).expect(4);
    let errors: Vec<_> =
        checked.stderr.lines().filter(|line| line.starts_with("error[W09]")).collect();
    assert_eq!(errors.len(), 2, "{}", checked.stderr);
    assert!(errors.iter().any(|error| error.contains("thread io0 wants nice -1")), "{errors:?}");
    assert!(errors.iter().any(|error| error.contains("every vCPU wants real-time")), "{errors:?}");
    assert!(checked.stderr.contains("CAP_SYS_NICE"), "{}", checked.stderr);
    // It runs all the same, with what there is, and says so.
    let outcome = without_rights(&machine, &["--json"]).expect(0);
    for refused in ["vcpu0: wanted rr 3, got other", "thread.io0: wanted batch, nice -1, got"] {
        assert_eq!(outcome.stderr.matches(refused).count(), 1, "{}", outcome.stderr);
    }
    without_rights(&machine, &["--set", "policy.fallback=error"]).refuses(4, "CAP_SYS_NICE");
    // Who allows it need not hear of it.
    deprived(&mut machine.heddle("check"), &["--host", "--set", "policy.fallback=allow"]).expect(0);
}

/// A machine whose guest does nothing, with a callback that keeps `io0` busy.
fn stalled(time: &str, every: &str, more: &str) -> Machine {
    let toml = format!(
        "[thread.io0]\n{more}\n[[test.stall]]\nthread = \"io0\"\ntime = \"{time}\"\nevery = \"{every}\"\n"
    );
    Machine::booting(&port_writes(&[]), "", &toml)
}

#[test]
fn a_callback_that_does_not_end_is_named_while_it_runs() {
    let machine = stalled("5s", "6s", "");
    let mut running = machine.start(&["--timeout", "60s"]);
    running.wait_for("thread io0 has been in a callback of test.stall for ");
    running.signal(libc::SIGTERM);
    running.wait();
}

#[test]
fn the_longest_callback_of_a_thread_is_reported_with_its_owner() {
    let machine = stalled("20ms", "50ms", "");
    let report = machine.run(&["--json", "--timeout", "500ms"]).json();
    let threads = report["threads"].as_array().unwrap();
    let io0 = threads.iter().find(|thread| thread["name"] == "io0").unwrap();
    assert_eq!(io0["longest-callback"]["owner"], "test.stall", "{io0}");
    assert!(io0["longest-callback"]["ns"].as_u64().unwrap() >= 20_000_000, "{io0}");
}

#[test]
fn a_real_time_loop_whose_callback_does_not_pause_is_demoted_and_no_other_thread() {
    if !real_time_is_permitted() {
        return;
    }
    let sched = "sched = { policy = \"rr\", priority = 3, runaway = \"50ms\" }";
    let more = format!("{sched}\n[thread.io1]\n{sched}");
    let machine = stalled("300ms", "400ms", &more);
    let lost = "thread io0 is no longer rr 3 but other: it ran for 50ms and more without a pause";
    let mut running = machine.start(&["--json"]);
    running.wait_for(lost);
    running.signal(libc::SIGTERM);
    let outcome = running.wait().expect(143);
    assert_eq!(outcome.stderr.matches("is no longer").count(), 1, "{}", outcome.stderr);
    for thread in outcome.json()["threads"].as_array().unwrap() {
        assert_eq!(thread["demoted"], thread["name"] == "io0", "{thread}");
    }
}
