//! Files that load: includes, `--set`, paths, defaults, and the effective configuration.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use config::plan::*;
use config::{Diagnostics, Loaded, load, load_str};
use tempfile::TempDir;

#[track_caller]
fn loads(text: &str) -> Loaded {
    sets(text, &[])
}

#[track_caller]
fn sets(text: &str, sets: &[&str]) -> Loaded {
    try_sets(text, sets).unwrap_or_else(|errors| panic!("{text}\n{errors}"))
}

fn try_sets(text: &str, sets: &[&str]) -> Result<Loaded, Diagnostics> {
    let sets: Vec<String> = sets.iter().map(|set| (*set).to_owned()).collect();
    load_str("dir/vm.toml", text, Path::new("/base"), &sets)
}

/// A directory with these files.
fn files(files: &[(&str, &str)]) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    for (name, text) in files {
        let path = dir.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }
    dir
}

fn examples() -> Vec<PathBuf> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples");
    let paths = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    paths.filter(|path| path.extension().is_some_and(|extension| extension == "toml")).collect()
}

#[test]
fn nothing_is_needed() {
    let plan = loads("").plan;
    assert_eq!((plan.name.as_str(), plan.machine.memory, plan.vcpus.len()), ("vm", 256 << 20, 1));
    let flat = Topology { sockets: 1, dies: 1, cores: 1, threads: 1 };
    assert_eq!((plan.machine.topology, plan.machine.debug_exit), (flat, false));
    assert_eq!((plan.machine.transport, plan.machine.hotplug_slots), (Transport::Pci, 0));
    assert_eq!((plan.boot.kernel, plan.disks.len(), plan.rngs.len()), (None, 0, 0));
    let poll = Poll { max: Duration::from_micros(32), grow: 2, shrink: 0, share: 100 };
    let main = Thread { name: "main".into(), cpus: None, sched: Sched::Other { nice: 0 }, poll };
    assert_eq!(plan.threads, [main]);
    assert_eq!(plan.serials, [Serial { name: "com1".into(), out: SerialOut::Stdio }]);
    assert_eq!(
        plan.policy,
        Policy { on_reset: OnReset::Restart, overlap: Verdict::Warn, fallback: Verdict::Warn }
    );
    assert_eq!(loads("[serial]").plan.serials, []);
}

#[test]
fn three_lines_are_a_machine() {
    let plan =
        loads("boot.kernel = \"vmlinux\"\ndisk.root.path = \"root.img\"\nmachine.memory = \"1G\"")
            .plan;
    assert_eq!(plan.boot.kernel, Some(Kernel::Native("/base/vmlinux".into())));
    assert_eq!(plan.disks[0].source, DiskSource::File("/base/root.img".into()));
    assert_eq!(
        (plan.disks[0].queues.as_slice(), plan.machine.memory),
        (&[Placement::Loop(MAIN)][..], 1 << 30)
    );
}

#[test]
fn all_examples_load_and_their_effective_text_loads_to_the_same() {
    let examples = examples();
    assert!(examples.len() >= 5);
    for path in examples {
        let loaded = load(&path, &[]).unwrap_or_else(|errors| panic!("{errors}"));
        assert!(loaded.warnings.is_empty());
        let again = load_str("other.toml", &loaded.effective, Path::new("/elsewhere"), &[])
            .unwrap_or_else(|errors| panic!("{}\n{errors}", loaded.effective));
        assert_eq!(again.plan, loaded.plan);
        assert_eq!(again.effective, loaded.effective);
    }
}

#[test]
fn hot_plug_slots_are_in_the_plan_and_in_the_effective_text() {
    let loaded = loads("machine.hotplug-slots = 31");
    assert_eq!(loaded.plan.machine.hotplug_slots, 31);
    assert!(loaded.effective.contains("\nhotplug-slots = 31\n"), "{}", loaded.effective);
    assert_eq!(loads(&loaded.effective).plan.machine, loaded.plan.machine);
    let overridden = sets("machine.hotplug-slots = 31", &["machine.hotplug-slots=2"]);
    assert_eq!(overridden.plan.machine.hotplug_slots, 2);
    assert_eq!(sets("", &["machine.transport=mmio"]).plan.machine.hotplug_slots, 0);
}

#[test]
fn everything_can_be_said() {
    let loaded = loads(
        r#"
        schema = 1
        name = 'a "name" — 名'
        [machine]
        memory = { size = "2G", hugepages = "1G" }
        cpus = { topology = { sockets = 2, dies = 1, cores = 2, threads = 1 } }
        transport = "mmio"
        debug-exit = true
        [boot]
        kernel = "k"
        initrd = "/i"
        modules = ["m", { path = "/n n", cmdline = 'a "b"' }]
        cmdline = "a='b' \"c\"\t"
        [vcpu]
        affinity = "1:1@10-20"
        sched = { policy = "rr", priority = 7 }
        pin = { 1-2 = "8,72" }
        [thread.main]
        cpus = "3"
        [thread.Io_0-a]
        cpus = "0-4,^3,1030"
        sched = { policy = "batch", nice = -3 }
        poll = { max = "1.5ms", grow = 3, shrink = 2, share = 25 }
        [thread.idle]
        sched = { policy = "idle" }
        poll = "off"
        [disk.file]
        path = "sub/x.img"
        read-only = true
        direct = true
        engine = "sync"
        queues = 2
        queue-size = 1024
        place = "Io_0-a"
        [disk.made]
        path = "/dev/y"
        size = "1.5K"
        place = "vcpu"
        [disk.scratch]
        size = "1T"
        place = [
            { queues = "0", on = "vcpu", home = "idle" },
            { queues = "1,3", on = "vcpu" },
            { queues = "2", on = "main" },
        ]
        [rng.r]
        place = "idle"
        [serial.com2]
        out = "null"
        [serial.com1]
        out = { file = "log" }
        [policy]
        overlap = "error"
        fallback = "allow"
        on-reset = "exit"
        "#,
    );
    let plan = &loaded.plan;
    assert_eq!(plan.name, "a \"name\" — 名");
    assert_eq!((plan.machine.memory, plan.machine.hugepages), (2 << 30, Some(1 << 30)));
    assert_eq!(plan.machine.topology.sockets, 2);
    assert_eq!(plan.machine.transport, Transport::Mmio);
    assert_eq!(plan.boot.cmdline, "a='b' \"c\"\t");
    let modules: Vec<_> =
        plan.boot.modules.iter().map(|it| (it.path.to_str().unwrap(), &*it.cmdline)).collect();
    assert_eq!(modules, [("/i", ""), ("/base/m", ""), ("/n n", "a \"b\"")]);
    let pins: Vec<_> =
        plan.vcpus.iter().map(|vcpu| vcpu.cpus.as_ref().unwrap().to_string()).collect();
    assert_eq!(pins, ["10", "8,72", "8,72", "13"]);
    assert_eq!(plan.vcpus[3].sched, Sched::Rr { priority: 7, runaway: None });
    let names: Vec<_> = plan.threads.iter().map(|thread| thread.name.as_str()).collect();
    assert_eq!(names, ["main", "Io_0-a", "idle"]);
    assert_eq!(plan.threads[0].cpus.as_ref().unwrap().to_string(), "3");
    assert_eq!(plan.threads[1].cpus.as_ref().unwrap().to_string(), "0-2,4,1030");
    assert_eq!(plan.threads[1].sched, Sched::Batch { nice: -3 });
    assert_eq!(
        plan.threads[1].poll,
        Poll { max: Duration::from_micros(1500), grow: 3, shrink: 2, share: 25 }
    );
    assert_eq!((plan.threads[2].sched, plan.threads[2].poll.max), (Sched::Idle, Duration::ZERO));
    let [file, made, scratch] = plan.disks.as_slice() else { panic!() };
    assert_eq!(file.source, DiskSource::File("/base/sub/x.img".into()));
    assert_eq!((file.read_only, file.direct, file.engine), (true, true, Engine::Sync));
    assert_eq!(
        (file.queue_size, file.queues.as_slice()),
        (1024, &[Placement::Loop(ThreadId(1)); 2][..])
    );
    assert_eq!(made.source, DiskSource::FileOrCreate("/dev/y".into(), 1536));
    assert_eq!(made.queues, [Placement::Vcpu { home: MAIN }; 4]);
    let [idle, main] = [ThreadId(2), MAIN];
    assert_eq!(
        scratch.queues,
        [
            Placement::Vcpu { home: idle },
            Placement::Vcpu { home: main },
            Placement::Loop(main),
            Placement::Vcpu { home: main },
        ]
    );
    assert_eq!(scratch.queues[0].home(), idle);
    assert_eq!(plan.rngs, [Rng { name: "r".into(), place: Placement::Loop(idle) }]);
    let outs: Vec<_> =
        plan.serials.iter().map(|serial| (serial.name.as_str(), &serial.out)).collect();
    assert_eq!(outs, [("com2", &SerialOut::Null), ("com1", &SerialOut::File("/base/log".into()))]);
    assert_eq!(
        plan.policy,
        Policy { on_reset: OnReset::Exit, overlap: Verdict::Error, fallback: Verdict::Allow }
    );
    assert_eq!(loads(&loaded.effective).plan, *plan);
}

#[test]
fn order_is_that_of_the_file() {
    let plan = sets(
        "[disk.z]\nsize=\"1M\"\n[disk.a]\nsize=\"1M\"\n[disk.m]\nsize=\"1M\"",
        &["disk.z.size=2M"],
    )
    .plan;
    let names: Vec<_> = plan.disks.iter().map(|disk| disk.name.as_str()).collect();
    assert_eq!(names, ["z", "a", "m"]);
}

#[test]
fn set_works_on_either_form() {
    for text in
        ["", "[machine]\ncpus = 4", "[machine]\ncpus = { count = 4 }", "[machine.cpus]\ncount = 4"]
    {
        assert_eq!(sets(text, &["machine.cpus.count=64"]).plan.vcpus.len(), 64);
        assert_eq!(sets(text, &["machine.cpus=64"]).plan.vcpus.len(), 64);
        assert_eq!(sets(text, &["machine.cpus={ count = 64 }"]).plan.vcpus.len(), 64);
    }
    for text in ["", "[machine]\nmemory = \"4M\"", "[machine]\nmemory = { size = \"4M\" }"] {
        assert_eq!(sets(text, &["machine.memory.size=1G"]).plan.machine.memory, 1 << 30);
        assert_eq!(sets(text, &["machine.memory=\"1G\""]).plan.machine.memory, 1 << 30);
    }
    let huge = "[machine]\nmemory = { size = \"4M\", hugepages = \"2M\" }";
    assert_eq!(sets(huge, &["machine.memory=8M"]).plan.machine.hugepages, Some(2 << 20));
    let polls = "[thread.io]\npoll = \"off\"";
    let poll = |set| sets(polls, &[set]).plan.threads[1].poll;
    assert_eq!(
        poll("thread.io.poll.grow=4"),
        Poll { max: Duration::ZERO, grow: 4, shrink: 0, share: 100 }
    );
    assert_eq!(poll("thread.io.poll=5us").max, Duration::from_micros(5));
}

#[test]
fn set_takes_values_with_and_without_quotes() {
    assert_eq!(sets("", &["name=a b = c"]).plan.name, "a b = c");
    assert_eq!(sets("", &["name=\"a\""]).plan.name, "a");
    assert_eq!(sets("", &["name=64"]).plan.name, "64");
    assert_eq!(sets("", &["name=true"]).plan.name, "true");
    assert_eq!(sets("", &["name = spaced"]).plan.name, "spaced");
    assert_eq!(sets("", &["name=1", "name=2"]).plan.name, "2");
    let vcpu = |set| sets("", &[set]).plan.vcpus[0].cpus.as_ref().unwrap().to_string();
    assert_eq!(vcpu("vcpu.affinity=3"), "3");
    assert_eq!(vcpu("vcpu.pin.\"0\"=5-6"), "5-6");
    assert_eq!(vcpu("vcpu.pin.0=5"), "5");
    let disks =
        sets("", &["disk.a={ size = \"1M\", queues = 3 }", "thread.io={}", "disk.a.place=io"]);
    assert_eq!(disks.plan.disks[0].queues, [Placement::Loop(ThreadId(1)); 3]);
    // From the command line, paths start where the user is.
    let here = std::env::current_dir().unwrap();
    let disk = &sets("", &["disk.a.path=b.img"]).plan.disks[0];
    assert_eq!(disk.source, DiskSource::File(here.join("b.img")));
}

#[test]
fn mistakes_in_set_are_shown_there() {
    let cases = [
        ("foo", 1, "not of the form key=value"),
        ("=3", 1, "not a dotted key"),
        ("a..b=3", 1, "not a dotted key"),
        ("[machine]=3", 1, "not of the form"),
        ("machine\n.cpus=3", 1, "not of the form"),
        ("machine.cpus=x", 14, "found a string"),
        ("machine.cpus.count=0", 20, "from 1 to 1024"),
        ("machine.cpu=4", 9, "unknown key `machine.cpu`"),
        ("machine.memory=512", 16, "has no unit"),
        ("disk.a.size=\"1M\nx\"", 13, "not a number with a unit"),
        ("include=[\"x\"]", 1, "`include` works in files only"),
        ("thread.io.cpus=9-3", 16, "runs backwards"),
    ];
    for (set, column, message) in cases {
        let errors = try_sets("", &[set]).unwrap_err();
        let text = errors.render(false);
        assert_eq!(errors.list.len(), 1, "{text}");
        assert!(text.contains(message), "{message}\n{text}");
        let found = &errors.list[0];
        assert_eq!((found.file.as_str(), found.line, found.column), ("--set", 1, column), "{text}");
        assert!(text.contains(set.lines().next().unwrap()), "{text}");
    }
    // Those of the file come with them.
    let errors = try_sets("nmae = 1", &["foo"]).unwrap_err();
    assert_eq!(errors.list.len(), 2, "{errors}");
}

#[test]
fn includes_merge_and_keep_their_paths() {
    let dir = files(&[
        (
            "base/base.toml",
            "include = [\"common.toml\"]\nname = \"base\"\n[machine]\nmemory = { size = \"1G\", hugepages = \"2M\" }\n\
             [disk.root]\npath = \"root.img\"\n[thread.io]\ncpus = \"1\"\n[rng.r]",
        ),
        (
            "base/common.toml",
            "[machine]\ncpus = 2\nmemory = \"4M\"\n[disk.first]\npath = \"/first.img\"",
        ),
        (
            "vm.toml",
            "include = [\"base/base.toml\"]\n[machine.memory]\nsize = \"2G\"\n[disk.data]\npath = \"data.img\"\n\
             [disk.root]\nread-only = true\nplace = \"io\"",
        ),
    ]);
    let path = dir.path().join("vm.toml");
    let loaded = load(&path, &[]).unwrap_or_else(|errors| panic!("{errors}"));
    let plan = &loaded.plan;
    assert_eq!((plan.name.as_str(), plan.vcpus.len(), plan.rngs.len()), ("base", 2, 1));
    assert_eq!((plan.machine.memory, plan.machine.hugepages), (2 << 30, Some(2 << 20)));
    let sources: Vec<_> = plan.disks.iter().map(|disk| &disk.source).collect();
    let file = |path: PathBuf| DiskSource::File(path);
    let root = file(dir.path().join("base/root.img"));
    assert_eq!(sources, [&file("/first.img".into()), &root, &file(dir.path().join("data.img"))]);
    assert_eq!(plan.disks[1].queues, [Placement::Loop(ThreadId(1)); 2]);
    let origin = |key: &str| {
        let found = loaded.provenance.iter().find(|provenance| provenance.key == key).unwrap();
        (Path::new(&found.file).file_name().unwrap().to_str().unwrap().to_owned(), found.line)
    };
    assert_eq!(origin("machine.memory.size"), ("vm.toml".into(), 3));
    assert_eq!(origin("machine.memory.hugepages"), ("base.toml".into(), 4));
    assert_eq!(origin("machine.cpus.count"), ("common.toml".into(), 2));
    assert_eq!(load_str("x", &loaded.effective, Path::new("/"), &[]).unwrap().plan, *plan);

    // A mistake is shown in the file it is in.
    fs::write(dir.path().join("base/common.toml"), "\n[machine]\ncpus = \"2\"").unwrap();
    let errors = load(&path, &[]).unwrap_err();
    assert!(errors.list[0].file.ends_with("base/common.toml"), "{errors}");
    assert_eq!((errors.list.len(), errors.list[0].line, errors.list[0].column), (1, 3, 8));
}

#[test]
fn includes_that_cannot_be() {
    let cases = [
        ("itself.toml", "include = [\"itself.toml\"]", "the file includes itself"),
        ("circle.toml", "include = [\"sub/back.toml\"]", "the file includes itself"),
        ("missing.toml", "include = [\"nowhere.toml\"]", "No such file"),
        ("dir.toml", "include = [\"sub\"]", "this is a directory"),
        ("number.toml", "include = [3]", "must hold paths"),
        ("empty.toml", "include = [\"\"]", "this is not a path"),
        ("many.toml", "include = [\"ok.toml\",\"ok.toml\",\"wide0.toml\"]", "too many files"),
        ("deep.toml", "include = [\"deep0.toml\"]", "too deep"),
    ];
    let dir = files(&[("sub/back.toml", "include = [\"../circle.toml\"]"), ("ok.toml", "")]);
    for n in 0..20 {
        let path = |kind: &str, n| dir.path().join(format!("{kind}{n}.toml"));
        fs::write(path("deep", n), format!("include = [\"deep{}.toml\"]", n + 1)).unwrap();
        let next = format!("\"wide{}.toml\"", n + 1);
        fs::write(path("wide", n), format!("include = [{next}, {next}]")).unwrap();
    }
    fs::write(dir.path().join("wide10.toml"), "").unwrap();
    for (name, text, message) in cases {
        let path = dir.path().join(name);
        fs::write(&path, text).unwrap();
        let errors = load(&path, &[]).unwrap_err();
        let text = errors.render(false);
        assert!(text.contains(message), "{name}\n{text}");
        assert!(errors.list[0].line == 1 && text.contains('^'), "{name}\n{text}");
    }
    // The same file twice is no circle.
    let path = dir.path().join("twice.toml");
    fs::write(&path, "include = [\"ok.toml\", \"./ok.toml\"]").unwrap();
    load(&path, &[]).unwrap();
}

#[test]
fn files_that_are_no_files() {
    let dir = files(&[("dir/x", ""), ("bytes.toml", "")]);
    let path = |name: &str| dir.path().join(name);
    assert!(Command::new("mkfifo").arg(path("fifo")).status().unwrap().success());
    symlink(path("fifo"), path("link")).unwrap();
    symlink(path("loop"), path("loop")).unwrap();
    fs::write(path("big.toml"), "#".repeat(10 << 20)).unwrap();
    fs::write(path("bytes.toml"), b"name = \"a\"\n# \xff\n").unwrap();
    let cases = [
        (path("dir"), "this is a directory"),
        (path("fifo"), "not a regular file"),
        (path("link"), "not a regular file"),
        (path("loop"), "symbolic link"),
        ("/dev/zero".into(), "not a regular file"),
        (path("big.toml"), "larger than 1 MiB"),
        (path("nothing"), "No such file"),
        ("".into(), "No such file"),
        ("/etc/passwd/x".into(), "Not a directory"),
    ];
    for (path, message) in cases {
        let errors = load(&path, &[]).unwrap_err();
        let text = errors.render(false);
        assert!(text.contains(message) && errors.list.len() == 1, "{}\n{text}", path.display());
        assert_eq!((errors.list[0].line, errors.list[0].column), (0, 0));
        assert!(text.contains(&path.display().to_string()), "{text}");
    }
    let errors = load(&path("bytes.toml"), &[]).unwrap_err();
    assert_eq!((errors.list[0].line, errors.list[0].column), (2, 3), "{errors}");
    assert!(errors.list[0].message.contains("not UTF-8"), "{errors}");
}

#[test]
fn marks_and_line_ends() {
    assert_eq!(loads("\u{feff}name = \"a\"\r\n[machine]\r\ncpus = 2\r\n").plan.vcpus.len(), 2);
    let errors = try_sets("\u{feff}nmae = 1\r\n\r\n[machine]\r\n cpsu = 2\r\n", &[]).unwrap_err();
    let places: Vec<_> = errors.list.iter().map(|found| (found.line, found.column)).collect();
    assert_eq!(places, [(1, 1), (4, 2)], "{errors}");
}

#[test]
fn names_come_from_the_file() {
    let dir = files(&[("my vm.prod.toml", ""), (".toml", "")]);
    assert_eq!(load(&dir.path().join("my vm.prod.toml"), &[]).unwrap().plan.name, "my vm.prod");
    assert_eq!(load(&dir.path().join(".toml"), &[]).unwrap().plan.name, ".toml");
    assert_eq!(load_str("", "", Path::new(""), &[]).unwrap().plan.name, "vm");
    let long = format!("{}\u{1b}.toml", "ü".repeat(100));
    let name = load_str(&long, "", Path::new("/"), &[]).unwrap().plan.name;
    assert_eq!(name, "ü".repeat(64));
}

#[test]
fn warnings_do_not_stop() {
    let loaded = loads("[disk.a]\nsize = \"1M\"\nread-only = true");
    let warnings = loaded.warnings.render(false);
    assert!(warnings.starts_with("warning: `disk.a` is empty and read-only"), "{warnings}");
    // With an error they come along.
    let errors = try_sets("[disk.a]\nsize = \"1M\"\nread-only = true\nx = 1", &[]).unwrap_err();
    assert_eq!(errors.list.len(), 2);
}

#[test]
fn large_files_are_quick() {
    let start = Instant::now();
    let threads: String =
        (0..4096).map(|n| format!("[thread.t{n}]\ncpus = \"0-8191\"\n")).collect();
    let disks: String = (0..255)
        .map(|n| format!("[disk.d{n}]\nsize = \"1M\"\nqueues = 1024\nplace = \"t{n}\"\n"))
        .collect();
    let comment = "#".repeat(700_000);
    let text = format!("{comment}\n{threads}{disks}");
    assert!(text.len() < 1 << 20);
    let plan = loads(&text).plan;
    assert_eq!((plan.threads.len(), plan.disks.len()), (4097, 255));
    assert!(start.elapsed() < Duration::from_secs(20), "{:?}", start.elapsed());
}

#[test]
fn a_loop_may_run_away_for_200ms_and_a_vcpu_for_ever_unless_the_file_says_otherwise() {
    let of_both = |runaway: &str| {
        let sched = format!("sched = {{ policy = \"rr\", priority = 1{runaway} }}");
        let text = format!("[vcpu]\n{sched}\n[thread.a]\n{sched}");
        let plan = loads(&text).plan;
        let again = loads(&loads(&text).effective).plan;
        assert_eq!((&plan.vcpus, &plan.threads), (&again.vcpus, &again.threads));
        [plan.vcpus[0].sched, plan.threads[1].sched].map(|sched| match sched {
            Sched::Rr { priority: 1, runaway } => runaway,
            other => panic!("{other:?}"),
        })
    };
    let time = |ms| Some(Duration::from_millis(ms));
    assert_eq!(of_both(""), [None, time(200)]);
    assert_eq!(of_both(", runaway = \"off\""), [None, None]);
    assert_eq!(of_both(", runaway = \"10ms\""), [time(10), time(10)]);
    assert_eq!(of_both(", runaway = \"1.5s\""), [time(1500), time(1500)]);
}
