//! Files with mistakes, and what is said about them: all at once, each at its place.

use std::path::Path;

use config::{Diagnostics, Severity, load_str};

fn complaints(text: &str) -> Diagnostics {
    match load_str("vm.toml", text, Path::new("/base"), &[]) {
        Ok(_) => panic!("this loads:\n{text}"),
        Err(diagnostics) => diagnostics,
    }
}

/// line, column, part of the message, part of the hint ("" for none)
type Expected = (usize, usize, &'static str, &'static str);

#[track_caller]
fn expect(text: &str, expected: &[Expected]) {
    let found = complaints(text);
    let all = found.render(false);
    assert_eq!(found.list.len(), expected.len(), "{text}\n{all}");
    for (found, (line, column, message, hint)) in found.list.iter().zip(expected) {
        assert_eq!((found.line, found.column), (*line, *column), "{message}\n{all}");
        assert!(found.message.contains(message), "{message}\n{all}");
        let found_hint = found.hint.as_deref().unwrap_or_default();
        assert!(found_hint.contains(hint), "{hint}\n{all}");
        assert!(!hint.is_empty() || found_hint.is_empty(), "unexpected hint\n{all}");
        assert_eq!((found.file.as_str(), found.severity), ("vm.toml", Severity::Error));
    }
}

#[test]
fn unknown_keys_and_their_nearest() {
    expect("nmae = \"a\"", &[(1, 1, "unknown key `nmae`", "did you mean `name`?")]);
    expect("memory = \"1G\"", &[(1, 1, "unknown key `memory`", "`memory` in [machine]")]);
    expect("poll = \"off\"", &[(1, 1, "unknown key `poll`", "`poll` in [thread.NAME]")]);
    expect(
        "[machine]\nmemroy = \"1G\"\ndebug_exit = true\nxyzzy = 1",
        &[
            (2, 1, "`machine.memroy`", "did you mean `memory`?"),
            (3, 1, "`machine.debug_exit`", "did you mean `debug-exit`?"),
            (
                4,
                1,
                "`machine.xyzzy`",
                "known here: `memory`, `cpus`, `transport`, `hotplug-slots`, `rtc`, `debug-exit`",
            ),
        ],
    );
    expect("[disks.a]\nsize = \"1M\"", &[(1, 2, "`disks`", "did you mean `disk`?")]);
    // What later versions will have is no key of this one.
    expect(
        "[pool.a]\n[service.b]\n[machine]\nfirmware = \"bios\"",
        &[
            (1, 2, "`pool`", "known here"),
            (2, 2, "`service`", "known here"),
            (4, 1, "`machine.firmware`", "known here"),
        ],
    );
}

#[test]
fn wrong_types_and_units() {
    expect("name = 3", &[(1, 8, "found an integer", "put it in quotes")]);
    expect("name = \"\"", &[(1, 8, "is empty", "")]);
    expect("schema = 2", &[(1, 10, "`schema` must be 1", "")]);
    expect("machine = 1", &[(1, 11, "`machine` must be a table", "write [machine]")]);
    expect("disk = 1", &[(1, 8, "must be tables with names", "write [disk.NAME]")]);
    expect("[disk]\na = 1", &[(2, 5, "`disk.a` must be a table", "write [disk.a]")]);
    expect("boot = \"vmlinux\"", &[(1, 8, "`boot` must be a table", "write [boot]")]);
    expect("include = \"a\"", &[(1, 11, "must be a list of paths", "include = [\"base.toml\"]")]);
    expect("[machine]\nmemory = 512", &[(2, 10, "found an integer", "add a unit and quotes")]);
    expect("[machine]\nmemory = \"512\"", &[(2, 10, "`512` has no unit", "\"512M\"")]);
    expect("[machine]\nmemory = nan", &[(2, 10, "found a float", "add a unit")]);
    expect("[machine]\nmemory = -1", &[(2, 10, "found an integer", "add a unit")]);
    expect("[machine]\nmemory = 1979-05-27", &[(2, 10, "found a date", "")]);
    expect("[machine]\nmemory = \"99999999999999T\"", &[(2, 10, "too large", "sizes look like")]);
    expect("[machine]\nmemory = \"3M\"", &[(2, 10, "multiple of 2M", "the next is \"4M\"")]);
    expect("[machine]\nmemory = \"0M\"", &[(2, 10, "multiple of 2M", "\"2M\"")]);
    expect("[machine]\nmemory = \"65T\"", &[(2, 10, "the most memory is 64T", "")]);
    expect(
        "[machine]\nmemory = { size = \"512M\", hugepages = \"1G\" }",
        &[(2, 19, "multiple of 1G", "\"1G\"")],
    );
    expect("[machine]\ntransport = \"isa\"", &[(2, 13, "\"pci\" | \"mmio\"", "")]);
    expect("[machine]\ndebug-exit = \"true\"", &[(2, 14, "found a string", "without quotes")]);
    expect("[machine]\ncpus = 0", &[(2, 8, "an integer from 1 to 1024", "")]);
    expect("[machine]\ncpus = 1025", &[(2, 8, "an integer from 1 to 1024", "")]);
    expect("[machine]\ncpus = 9223372036854775808", &[(2, 8, "an integer from 1 to 1024", "")]);
    expect("[machine]\ncpus = -1", &[(2, 8, "an integer from 1 to 1024", "")]);
    expect("[machine]\ncpus = inf", &[(2, 8, "found a float", "")]);
    expect("[machine]\ncpus = \"4\"", &[(2, 8, "found a string", "without quotes")]);
}

#[test]
fn hot_plug_slots_that_cannot_be() {
    let range = "`machine.hotplug-slots` must be an integer from 0 to 31";
    for slots in ["32", "-1", "9223372036854775808"] {
        expect(&format!("[machine]\nhotplug-slots = {slots}"), &[(2, 17, range, "")]);
    }
    expect("[machine]\nhotplug-slots = \"2\"", &[(2, 17, "found a string", "without quotes")]);
    expect("[machine]\nhotplug_slots = 2", &[(2, 1, "unknown key", "`hotplug-slots`?")]);
    expect(
        "[machine]\nhotplug-slots = 1\ntransport = \"mmio\"",
        &[(2, 17, "with `transport = \"mmio\"` there is no PCI", "leave one of the two out")],
    );
    let disks: String = (0..218).map(|nth| format!("[disk.d{nth}]\nsize = \"1M\"\n")).collect();
    expect(
        &format!("[machine]\nhotplug-slots = 31\n{disks}"),
        &[(1, 2, "218 disks and rngs and 31 hot-plug slots are too many", "")],
    );
    let fits = format!("[machine]\nhotplug-slots = 30\n{disks}");
    assert!(load_str("vm.toml", &fits, Path::new("/base"), &[]).is_ok());
}

#[test]
fn topologies_that_do_not_add_up() {
    expect(
        "[machine]\ncpus = { count = 6, topology = { cores = 2, threads = 2 } }",
        &[(2, 21, "makes 4 CPUs, but `machine.cpus.count` is 6", "must be the count")],
    );
    expect(
        "[machine.cpus.topology]\nsockets = 1024\ncores = 1024\nthreads = 1024\ndies = 1024",
        &[(1, 15, "makes 1099511627776 CPUs, the most is 1024", "")],
    );
}

#[test]
fn boot() {
    expect("[boot]\ninitrd = \"x\"", &[(2, 1, "takes no initrd", "add `kernel = ...`")]);
    expect("[boot]\nmodules = [\"x\"]", &[(2, 1, "takes no modules", "add `kernel = ...`")]);
    expect(
        "[boot]\nkernel = \"k\"\nmultiboot = \"m\"",
        &[(3, 1, "`boot.kernel` and `boot.multiboot` exclude each other", "leave the other out")],
    );
    let modules = |list: &str| format!("[boot]\nmultiboot = \"k\"\nmodules = {list}");
    expect(&modules("\"x\""), &[(3, 11, "`boot.modules` must be [PATH", "brackets")]);
    expect(&modules("[3]"), &[(3, 12, "`boot.modules.path` must be PATH", "quotes")]);
    expect(&modules("[{ cmdline = \"a\" }]"), &[(3, 12, "`boot.modules.path` is missing", "add")]);
    expect(&modules("[{ path = \"a\", args = 1 }]"), &[(3, 26, "unknown key", "known here")]);
    expect(&modules("[{ path = \"a\", cmdline = \"\\u0000\" }]"), &[(3, 36, "NUL", "")]);
    expect(&modules(&format!("[{}]", "\"m\",".repeat(65))), &[(3, 1, "65 modules are", "")]);
    expect("[boot]\nkernel = \"\"", &[(2, 10, "is not a path", "")]);
    expect("[boot]\nkernel = \"a\\u0000b\"", &[(2, 10, "is not a path", "")]);
    expect("[boot]\nkernel = \"k\"\ncmdline = \"a\\u0000\"", &[(3, 11, "NUL", "")]);
}

#[test]
fn vcpus_and_their_pins() {
    let four = "[machine]\ncpus = 4\n[vcpu]\n";
    let set = "sets look like";
    expect(
        &format!("{four}affinity = \"1:1@0-2\""),
        &[(4, 12, "has 3 CPUs, 4 vCPUs need", "write")],
    );
    expect(&format!("{four}affinity = \"5-2\""), &[(4, 12, "runs backwards", "write \"none\"")]);
    expect(&format!("{four}affinity = \"auto\""), &[(4, 12, "neither a number", "write \"none\"")]);
    expect(&format!("{four}affinity = \"2:1@0-9\""), &[(4, 12, "`2:1@0-9` is neither", "write")]);
    expect(
        &format!("{four}[vcpu.pin]\n\"4-5\" = \"0\""),
        &[(5, 1, "no vCPUs 4-5: the machine has 0 to 3", "")],
    );
    expect(
        &format!("{four}[vcpu.pin]\n\"0-1\" = \"0\"\n\"1\" = \"\"\nx = \"1\""),
        &[
            (6, 1, "vCPU 1 pinned twice", ""),
            (6, 7, "the set is empty", set),
            (7, 1, "`x` is neither", "which vCPUs"),
        ],
    );
    expect(&format!("{four}pin = 3"), &[(4, 7, "`vcpu.pin` must be a table", "")]);
    expect(
        &format!("{four}pin = {{ 1 = 2 }}"),
        &[(4, 13, "must be CPUS, found an integer", "quotes")],
    );
    expect(
        &format!("{four}sched = {{ policy = \"fifo\" }}"),
        &[(4, 1, "the policy fifo needs a `priority`", "priority = 1")],
    );
    expect(
        &format!("{four}sched = {{ policy = \"fifa\", nice = -21, priority = 0 }}"),
        &[
            (4, 20, "\"other\" | \"batch\"", "did you mean `fifo`?"),
            (4, 35, "-20 to 19", ""),
            (4, 51, "1 to 99", ""),
        ],
    );
    expect(
        &format!("{four}sched = {{ policy = \"other\", priority = 3 }}"),
        &[(4, 29, "`priority` goes with the policies fifo and rr", "")],
    );
    let runaway = |policy: &str, time: &str| {
        format!("{four}sched = {{ policy = \"{policy}\", runaway = \"{time}\" }}")
    };
    expect(
        &runaway("batch", "1s"),
        &[(4, 29, "`runaway` goes with the policies fifo and rr, this is batch", "")],
    );
    let fifo = |time: &str| runaway("fifo\", priority = \"1", time).replace("\"1\"", "1");
    expect(&fifo("never"), &[(4, 52, "`never`", "write \"off\", or a time like \"200ms\"")]);
    expect(&fifo("200"), &[(4, 52, "200", "\"200ms\"")]);
    for time in ["9ms", "11s", "0s"] {
        expect(&fifo(time), &[(4, 52, "must be from 10ms to 10s, or \"off\"", "")]);
    }
    expect(
        "[thread.a]\nsched = { policy = \"rr\", priority = 1 }\npoll = \"200ms\"",
        &[(1, 9, "polling for 200ms is running away after 200ms", "poll for less")],
    );
}

#[test]
fn threads() {
    expect("[thread.vcpu]", &[(1, 9, "`vcpu` is no event loop", "[vcpu]")]);
    expect("[thread.sixteen-letters-]", &[(1, 9, "has 16 characters, the most is 15", "")]);
    expect("[thread.\"io 0\"]", &[(1, 9, "may only have the characters", "")]);
    expect("[thread.\"\"]", &[(1, 9, "is empty", "")]);
    expect("[thread.\"\\u001b[31m\"]", &[(1, 9, "may only have", "")]);
    expect("[thread.io]\ncpus = \"8192\"", &[(2, 8, "`8192` is beyond", "sets look like")]);
    expect("[thread.io]\ncpus = 3", &[(2, 8, "found an integer", "quotes")]);
    expect("[thread.io]\npoll = \"32\"", &[(2, 8, "`32` has no unit", "\"32us\"")]);
    expect("[thread.io]\npoll = \"2s\"", &[(2, 8, "the longest poll is 1s", "usual")]);
    expect("[thread.io]\npoll = \"fast\"", &[(2, 8, "not a number with a unit", "\"off\"")]);
    expect("[thread.io]\npoll = \"1h\"", &[(2, 8, "no unit `h`, only ns, us, ms, s", "\"off\"")]);
    expect("[thread.io]\npoll = 32", &[(2, 8, "found an integer", "add a unit and quotes")]);
    expect("[thread.io]\ncpus = [1]", &[(2, 8, "found an array", "a set is a string")]);
    expect(
        "[thread.io]\nsched = \"rr\"",
        &[(2, 9, "must be a table", "write sched = { policy = \"rr\" }")],
    );
    expect("[thread.io]\npoll = { grow = 1 }", &[(2, 17, "from 2 to 1000", "")]);
}

#[test]
fn disks() {
    expect("[disk.a]", &[(1, 7, "neither a `path` nor a `size`", "temporary")]);
    expect("[disk.a]\nsize = \"0.25K\"", &[(2, 8, "multiple of 512", "")]);
    expect("[disk.a]\nsize = \"8192P\"", &[(2, 8, "multiple of 512", "")]);
    expect(
        "[disk.a]\nsize = \"1M\"\nengine = \"uring\"",
        &[(3, 10, "\"io_uring\" | \"sync\"", "did you mean `io_uring`?")],
    );
    expect("[disk.a]\nsize = \"1M\"\nqueue-size = 100", &[(3, 14, "power of two", "128 is one")]);
    expect("[disk.a]\nsize = \"1M\"\nqueue-size = 2048", &[(3, 14, "from 2 to 1024", "")]);
    expect("[disk.a]\nsize = \"1M\"\nqueues = 0", &[(3, 10, "\"per-vcpu\" | an integer", "")]);
    expect(
        "[disk.a]\nsize = \"1M\"\nqueues = \"all\"",
        &[(3, 10, "\"per-vcpu\" | an integer", "")],
    );
    expect("[disk.a]\nsize = \"1M\"\nqueues = []", &[(3, 10, "found an array", "")]);
    expect(
        "[disk.a-name-of-21-letters-]\nsize = \"1M\"",
        &[(1, 7, "has 21 characters, the most is 20", "")],
    );
    expect(
        "[disk.a]\npath = \"x/./y\"\n[disk.b]\npath = \"x//y\"\nread-only = true",
        &[(4, 1, "disk.b uses the same file as disk.a", "read-only")],
    );
    expect(
        "[disk.a]\npath = \"x\"\n[serial.com1]\nout = { file = \"x\" }\n[boot]\nkernel = \"x\"",
        &[
            (2, 1, "disk.a uses the same file as boot.kernel", "read-only"),
            (4, 1, "serial.com1 uses the same file as boot.kernel", "read-only"),
        ],
    );
}

#[test]
fn placement() {
    let disk = "[machine]\ncpus = 4\n[thread.io0]\n[disk.a]\nsize = \"1M\"\n";
    let places = |places: &[&str]| {
        let list: Vec<_> = places.iter().map(|place| format!("  {{ {place} }}")).collect();
        format!("{disk}place = [\n{}\n]", list.join(",\n"))
    };
    expect(&format!("{disk}place = \"io1\""), &[(6, 9, "no thread `io1`", "did you mean `io0`?")]);
    expect(
        &format!("{disk}place = \"backup\""),
        &[(6, 9, "no thread `backup`", "add [thread.backup]")],
    );
    expect(&format!("{disk}place = 1"), &[(6, 9, "\"main\" | \"vcpu\" | THREAD", "")]);
    expect(&format!("{disk}place = [1]"), &[(6, 10, "must hold tables", "[[disk.a.place]]")]);
    expect(
        &format!("{disk}place = []"),
        &[(6, 1, "no place for queues 0-3 of `disk.a`", "4 queues")],
    );
    expect(
        &places(&["queues = \"0-1\", on = \"io0\"", "queues = \"1,3-4\", on = \"vcpu\""]),
        &[
            (6, 1, "no place for queue 2 of `disk.a`", "queues = \"2\""),
            (8, 5, "`disk.a` has no queue 4: it has 0 to 3", ""),
            (8, 5, "queue 1 of `disk.a` placed twice", ""),
        ],
    );
    expect(
        &places(&["queues = \"0-3\", on = \"io0\", home = \"main\""]),
        &[(7, 33, "`home` goes with `on = \"vcpu\"`", "leave `home` out")],
    );
    expect(
        &places(&["queues = \"0-3\", on = \"vcpu\", home = \"vcpu\""]),
        &[(7, 41, "there is no thread `vcpu`", "name an event loop")],
    );
    expect(
        &places(&["queues = \"0-3\", on = \"vcpu\", complete = \"submitter\""]),
        &[(7, 34, "`disk.a.place.complete` comes later, not in this version", "leave it out")],
    );
    // A bad range hides which queues are left over, and nothing is said about those.
    expect(
        &places(&["queues = \"3-0\", on = \"io0\"", "queues = \"1\""]),
        &[
            (7, 14, "runs backwards", "sets look like"),
            (8, 3, "`disk.a.place.on` is missing", "add `on"),
        ],
    );
    // The place is checked even if the number of queues is not known.
    expect(
        &format!("{disk}queues = 2000\nplace = [{{ on = \"io9\" }}]"),
        &[
            (6, 10, "from 1 to 1024", ""),
            (7, 10, "`disk.a.place.queues` is missing", "add"),
            (7, 17, "no thread `io9`", "did you mean `io0`?"),
        ],
    );
    expect("[rng.r]\nplace = \"io\"", &[(2, 9, "no thread `io`", "add [thread.io]")]);
}

#[test]
fn serial_ports_and_policy() {
    expect("[serial.com5]", &[(1, 9, "no serial port `com5`", "com1, com2, com3 and com4")]);
    expect(
        "[serial.com1]\n[serial.com2]",
        &[(2, 9, "is on stdio, and so is `serial.com1`", "null")],
    );
    expect("[serial.com1]\nout = \"file\"", &[(2, 7, "\"stdio\" | \"null\" | { file }", "")]);
    expect("[serial.com1]\nout = {}", &[(2, 7, "`serial.com1.out.file` is missing", "add")]);
    expect(
        "[serial]\ncom1.out = { file = \"x\" }\ncom2.out = { file = \"x\" }",
        &[(3, 6, "same file as serial.com1", "read-only")],
    );
    expect("[policy]\noverlap = \"eror\"", &[(2, 11, "\"allow\"", "did you mean `error`?")]);
}

#[test]
fn syntax() {
    expect("[machine", &[(1, 9, "unclosed table", "")]);
    expect(
        "a = \"x\nb = 1\n[c",
        &[(1, 7, "invalid basic string", ""), (3, 3, "unclosed table", "")],
    );
    expect("name = \"a\"\r\nname = \"b\"\r\n", &[(2, 1, "duplicate key", "")]);
    let deep = format!("a = {}", "[".repeat(100_000));
    assert!(complaints(&deep).render(false).contains("recurs"));
    let deep = format!("{}a = 1", "a.".repeat(100_000));
    assert!(complaints(&deep).render(false).contains("recurs"));
    let deep = format!("[{}a]", "a.".repeat(100_000));
    assert!(complaints(&deep).render(false).contains("recurs"));
}

#[test]
fn everything_is_said_at_once_in_order() {
    let found =
        complaints("[disk.a]\nqueues = 0\n[machine]\ncpus = 0\nmemory = \"x\"\n[rng]\nr = 1");
    let lines: Vec<_> = found.list.iter().map(|diagnostic| diagnostic.line).collect();
    assert_eq!(lines, [1, 2, 4, 5, 7]);
}

#[test]
fn columns_count_characters() {
    // Four characters of two bytes and one that is two columns wide.
    expect(
        "name = \"ääää\u{4e2d}\"\nserial = { \"ö\" = {}, com1 = 1 }",
        &[(2, 12, "may only have", ""), (2, 29, "must be a table", "[serial.com1]")],
    );
}

#[test]
fn the_line_is_underlined() {
    let text = complaints("name = \"a\"\n[machine]\nmemroy = \"1G\"\n").render(false);
    let expected = "\
error: unknown key `machine.memroy`
 --> vm.toml:3:1
  |
3 | memroy = \"1G\"
  | ^^^^^^
  |
  = help: did you mean `memory`?

";
    assert_eq!(text, expected);
    let colored = complaints("name = 1").render(true);
    assert!(colored.contains("\u{1b}["), "{colored}");
}

#[test]
fn long_lines_are_cut() {
    let text = format!("a = [{}]", "1, ".repeat(300_000));
    let found = complaints(&text).render(false);
    assert!(found.len() < 1000 && found.contains("unknown key `a`"), "{found}");
    let text = format!("name = \"{}\"\nx.{} = 1", "ä".repeat(1000), "y".repeat(100_000));
    let found = complaints(&text).render(false);
    assert!(found.len() < 2000, "{found}");
    let inline = format!("machine = {{ {}zz = 1 }}", " ".repeat(10_000));
    let found = complaints(&inline);
    assert_eq!((found.list[0].line, found.list[0].column), (1, 10_013));
    let text = found.render(false);
    assert!(text.contains("vm.toml:1:10013") && text.contains("^^"), "{text}");
}

#[test]
fn no_more_than_anyone_reads() {
    let text: String = (0..100_000).map(|n| format!("k{n} = 1\n")).collect();
    let found = complaints(&text);
    assert_eq!((found.list.len(), found.omitted), (100, 99_900));
    assert!(found.render(false).ends_with("... and 99900 more\n"));
    assert_eq!(found.to_json()["omitted"], 99_900);
}

#[test]
fn json_has_the_same() {
    let json = complaints("[machine]\nmemroy = 1").to_json();
    let expected = serde_json::json!({
        "diagnostics": [{
            "severity": "error",
            "file": "vm.toml",
            "line": 2,
            "column": 1,
            "message": "unknown key `machine.memroy`",
            "hint": "did you mean `memory`?",
        }],
        "omitted": 0,
    });
    assert_eq!(json, expected);
}

#[test]
fn too_much_of_anything() {
    let threads: String = (0..5000).map(|n| format!("[thread.t{n}]\n")).collect();
    expect(&threads, &[(1, 2, "5000 times [thread.NAME] is too much, the most is 4096", "")]);
    let disks: String =
        (0..20_000).map(|n| format!("[disk.d{n}]\nsize=\"1M\"\nqueues=1024\n")).collect();
    let found = complaints(&disks).render(false);
    assert!(found.contains("too much, the most is 255"), "{found}");
}

/// Four vCPUs, then these nodes.
fn numa(nodes: &str) -> String {
    format!("[machine]\nmemory = \"1G\"\ncpus = 4\n{nodes}")
}

#[test]
fn preallocation() {
    let memory = |prealloc: &str| format!("[machine.memory]\nsize = \"1G\"\nprealloc = {prealloc}");
    expect(&memory("1"), &[(3, 12, "true | false | { threads, near }, found an integer", "")]);
    expect(&memory("{ threads = 0 }"), &[(3, 24, "an integer from 1 to 256", "")]);
    expect(&memory("{ threads = 257 }"), &[(3, 24, "an integer from 1 to 256", "")]);
    expect(&memory("{ near = 1 }"), &[(3, 21, "`machine.memory.prealloc.near` must be", "")]);
    expect(
        &memory("{ cpus = \"0\" }"),
        &[(3, 14, "unknown key", "there is a `cpus` in [machine]")],
    );
    let near = load_str("vm.toml", &memory("{ near = true }"), Path::new("/base"), &[]).unwrap();
    let warning = &near.warnings.list[0];
    assert_eq!((warning.severity, warning.line), (Severity::Warning, 1));
    assert!(warning.message.contains("no [[numa]] has a `host-node`"), "{}", near.warnings);
}

#[test]
fn nodes_of_the_guest() {
    expect("numa = 1", &[(1, 8, "`numa` must be tables", "write [[numa]]")]);
    expect("[numa]", &[(1, 1, "`numa` must be tables", "write [[numa]]")]);
    expect("numa = [1]", &[(1, 9, "must hold tables, found an integer", "write [[numa]]")]);
    expect(
        &numa("[[numa]]\nvcpus = \"0-3\"\nmem = \"1G\""),
        &[(4, 1, "`numa.memory` is missing", "add"), (6, 1, "`numa.mem`", "`memory`")],
    );
    expect(
        &numa("[[numa]]\nvcpus = \"0-3\"\nmemory = \"1G\"\nhost-node = 1024"),
        &[(7, 13, "an integer from 0 to 1023", "")],
    );
    expect(
        &numa(
            "[[numa]]\nvcpus = \"0-1\"\nmemory = \"512M\"\n[[numa]]\nvcpus = \"1-4\"\nmemory = \"256M\"",
        ),
        &[
            (4, 3, "node 1 has vCPU 4, but the machine has 0 to 3", ""),
            (4, 3, "vCPU 1 in two nodes, the second is 1", ""),
            (4, 3, "have 768M of memory, but `machine.memory` is 1G", "it is the sum"),
        ],
    );
    expect(
        &numa("[[numa]]\nvcpus = \"1,3\"\nmemory = \"1G\""),
        &[(4, 3, "no node for vCPUs 0,2", "vcpus = \"0,2\"")],
    );
    expect(
        &numa("[[numa]]\nvcpus = \"0-3\"\nmemory = \"1023M\"\n[[numa]]\nmemory = \"0M\""),
        &[
            (4, 3, "1023M of memory", "sum"),
            (6, 10, "multiple of 2M", "\"1G\""),
            (8, 10, "multiple of 2M", "\"2M\""),
        ],
    );
    expect(
        "[machine.memory]\nhugepages = \"1G\"\n[[numa]]\nvcpus = \"0\"\nmemory = \"512M\"",
        &[(5, 10, "multiple of 1G", "\"1G\"")],
    );
    expect(
        "[[numa]]\nvcpus = \"0\"\nmemory = \"40T\"\n[[numa]]\nmemory = \"40T\"",
        &[(1, 3, "more memory than the most, 64T", "")],
    );
    let many = "[[numa]]\nmemory = \"2M\"\n".repeat(129);
    expect(&many, &[(1, 3, "the most nodes are 128", "")]);
}

#[test]
fn distances_of_nodes() {
    let two = |a: &str, b: &str| {
        numa(&format!(
            "[[numa]]\nvcpus = \"0-3\"\nmemory = \"512M\"\n{a}\n[[numa]]\nmemory = \"512M\"\n{b}"
        ))
    };
    let said = |list: &str| format!("distances = {list}");
    expect(&two(&said("[10, 20]"), ""), &[(8, 1, "node 1 has no `distances`", "or none")]);
    expect(
        &two(&said("[10, 20]"), &said("[21, 10]")),
        &[(10, 1, "node 1 is 21 from node 0, but not back", "the same both ways")],
    );
    expect(
        &two(&said("[11, 20]"), &said("[10, 10]")),
        &[
            (7, 1, "node 0 is 11 from node 0", "10 is the distance to itself"),
            (10, 1, "node 1 is 10 from node 0", "10 is the distance to itself"),
        ],
    );
    expect(
        &two(&said("[10]"), &said("[20, 10]")),
        &[(7, 1, "1 distances, there are 2 nodes", "one for")],
    );
    expect(
        &two(&said("[10, 255]"), &said("[\"20\", 10]")),
        &[
            (7, 18, "an integer from 10 to 254", ""),
            (10, 14, "an integer from 10 to 254, found a string", "without quotes"),
        ],
    );
    expect(&two("distances = 20", ""), &[(7, 13, "must be [an integer from 10 to 254, ...]", "")]);
}

#[test]
fn troubles_on_purpose_are_checked_like_everything_else() {
    let stall = |rest: &str| format!("[thread.io0]\n[[test.stall]]\nthread = \"io0\"\n{rest}");
    expect("[test]\nshuffle = -1", &[(2, 11, "from 0 to 4294967295", "")]);
    expect("[test]\nstall = 1", &[(2, 9, "`stall` must be tables", "write [[test.stall]]")]);
    expect(
        &stall("time = \"20ms\""),
        &[(2, 1, "`test.stall.every` is missing", "add `every = ...`")],
    );
    expect(
        &stall("time = \"20ms\"\nevery = \"10ms\""),
        &[(5, 9, "would begin before the last has ended", "longer than `time`")],
    );
    expect(
        &stall("time = \"0s\"\nevery = \"2000s\""),
        &[(4, 8, "from 1ns to 10s", ""), (5, 9, "from 1ns to 1000s", "")],
    );
    expect(
        "[[test.stall]]\nthread = \"oi0\"\ntime = \"1ms\"\nevery = \"1s\"\n[thread.io0]",
        &[(2, 10, "there is no thread `oi0`", "did you mean `io0`?")],
    );
}
