//! Whatever is in a file: an answer, and never a panic. What loads, loads again.

use std::path::Path;

use config::{Host, Synthetic, explain, load_str};
use proptest::prelude::*;
use proptest::sample::{Index, select};

const EXAMPLES: [&str; 5] = [
    include_str!("../../examples/quickstart.toml"),
    include_str!("../../examples/many-vcpus.toml"),
    include_str!("../../examples/linux.toml"),
    include_str!("../../examples/placement.toml"),
    include_str!("../../examples/pinned.toml"),
];

/// Loads `text`, says what is wrong or what it comes to, and loads the effective text again.
fn exercise(text: &str, sets: &[String]) -> bool {
    let loaded = match load_str("vm.toml", text, Path::new("/base"), sets) {
        Ok(loaded) => loaded,
        Err(errors) => {
            assert!(!errors.list.is_empty());
            for found in &errors.list {
                assert!(found.line >= 1 && found.column >= 1, "{found:?}");
            }
            let plain = errors.render(false);
            assert!(!plain.contains('\u{1b}'), "{plain:?}");
            errors.render(true);
            errors.to_json();
            return false;
        }
    };
    let again = load_str("other.toml", &loaded.effective, Path::new("/other"), &[])
        .unwrap_or_else(|errors| panic!("{}\n{errors}", loaded.effective));
    assert_eq!(again.plan, loaded.plan, "{}", loaded.effective);
    true
}

/// Parts of files, right and wrong.
fn fragment() -> impl Strategy<Value = String> {
    let keys = select(vec![
        "name",
        "memory",
        "size",
        "hugepages",
        "cpus",
        "count",
        "topology",
        "cores",
        "threads",
        "affinity",
        "sched",
        "policy",
        "nice",
        "priority",
        "poll",
        "max",
        "path",
        "queues",
        "place",
        "on",
        "home",
        "out",
        "file",
        "overlap",
        "engine",
        "direct",
        "queue-size",
        "vcpus",
        "host-node",
        "distances",
        "prealloc",
        "near",
        "kernel",
        "multiboot",
        "modules",
        "cmdline",
        "a.b",
        "\"\"",
    ]);
    let values = select(vec![
        "1",
        "-1",
        "4",
        "0x10",
        "1.5",
        "nan",
        "true",
        "\"x\"",
        "\"4M\"",
        "\"0-3\"",
        "\"io0\"",
        "\"vcpu\"",
        "\"main\"",
        "\"fifo\"",
        "\"32us\"",
        "[]",
        "[{}]",
        "{}",
        "{ a = 1 }",
        "{ count = 2 }",
        "{ policy = \"idle\" }",
        "[{ queues = \"0\", on = \"io0\" }]",
        "1979-05-27",
        "{ file = \"f\" }",
        "\"1:1@0-9\"",
        "\"null\"",
        "9223372036854775808",
        "\"\\u0000\"",
    ]);
    let headers = select(vec![
        "machine",
        "machine.cpus",
        "machine.memory",
        "boot",
        "vcpu",
        "vcpu.pin",
        "thread.io0",
        "thread.main",
        "disk.d",
        "disk.e",
        "[disk.d.place]",
        "[numa]",
        "rng.r",
        "serial.com1",
        "policy",
    ]);
    prop_oneof![
        (keys, values).prop_map(|(key, value)| format!("{key} = {value}\n")),
        headers.prop_map(|header| format!("[{header}]\n")),
    ]
}

/// A file with nothing wrong in it.
fn good_file() -> impl Strategy<Value = String> {
    let sched = select(vec![
        "{}",
        "{ nice = -20 }",
        "{ policy = \"batch\", nice = 19 }",
        "{ policy = \"idle\" }",
        "{ policy = \"fifo\", priority = 99, runaway = \"10s\" }",
        "{ policy = \"rr\", priority = 1, runaway = \"1.5s\" }",
        "{ policy = \"rr\", priority = 1, runaway = \"off\" }",
    ]);
    let affinity = select(vec!["none", "0-8191,^5", "1:1@100-200", "7"]);
    let name = "[ -~\u{e9}\u{1f9f6}]{1,20}";
    let poll = (0u64..1_000_000_000, 2u32..1000, 0u32..1000, 1u32..=100);
    let transport = select(vec!["pci", "mmio"]);
    let slots = (transport, 0u8..32);
    let machine = (1u32..70, 1u64..(32 << 20), any::<bool>(), slots);
    let disk = (0usize..4, 1u32..65, 0u32..9, any::<[bool; 4]>(), 1u64..(1 << 40));
    (name, machine, sched, affinity, poll, prop::collection::vec(disk, 0..5), any::<u64>()).prop_map(
        |(name, (cpus, memory, debug, (transport, slots)), sched, affinity, (max, grow, shrink, share), disks, seed)| {
            let name = toml_string(&name);
            let slots = if transport == "pci" { slots } else { 0 };
            let mut text = format!(
                "name = {name}\n[machine]\nmemory = \"{}M\"\ncpus = {cpus}\ndebug-exit = {debug}\n\
                 transport = \"{transport}\"\nhotplug-slots = {slots}\n[vcpu]\nsched = {sched}\naffinity = \"{affinity}\"\npin.0 = \"8191\"\n\
                 [thread.a]\nsched = {sched}\npoll = {{ max = \"{max}ns\", grow = {grow}, shrink = {shrink}, share = {share} }}\n\
                 [thread.b]\ncpus = \"{}\"\n",
                memory * 2,
                seed % 8192,
            );
            if debug {
                let (rest, near) = (memory * 2 - 2, seed % 3 == 0);
                text = text.replace(
                    &format!("memory = \"{}M\"", memory * 2),
                    &format!("memory = {{ prealloc = {{ threads = {}, near = {near} }} }}", seed % 256 + 1),
                );
                text += &format!("[[numa]]\nvcpus = \"0-{}\"\nmemory = \"2M\"\n", cpus - 1);
                if rest > 0 {
                    text += &format!("distances = [10, {}]\n", 11 + seed % 200);
                    text += &format!("[[numa]]\nhost-node = {}\nmemory = \"{rest}M\"\n", seed % 5);
                    text += &format!("distances = [{}, 10]\n", 11 + seed % 200);
                }
            }
            text += &match seed % 3 {
                0 => String::new(),
                1 => format!("[boot]\nkernel = \"k\"\ninitrd = \"i\"\ncmdline = {name}\n"),
                _ => format!(
                    "[boot]\nmultiboot = \"k\"\n\
                     modules = [\"a b\", {{ path = \"c\", cmdline = {name} }}]\n"
                ),
            };
            for (index, (place, queues, bits, flags, size)) in disks.into_iter().enumerate() {
                text += &format!("[disk.d{index}]\nqueues = {queues}\nqueue-size = {}\n", 2 << bits);
                text += &format!("read-only = {}\ndirect = {}\n", flags[0], flags[1]);
                if flags[2] {
                    text += &format!("path = {}\n", toml_string(&format!("d {index} \"é\\")));
                }
                if flags[3] || !flags[2] {
                    text += &format!("size = \"{size}.5K\"\n");
                }
                match ["main", "vcpu", "a"].get(place) {
                    Some(place) => text += &format!("place = \"{place}\"\n"),
                    None => {
                        for queue in 0..queues {
                            let on = match (seed >> (queue % 61)) % 4 {
                                0 => "on = \"main\"",
                                1 => "on = \"b\"",
                                2 => "on = \"vcpu\"",
                                _ => "on = \"vcpu\"\nhome = \"a\"",
                            };
                            text += &format!("[[disk.d{index}.place]]\nqueues = \"{queue}\"\n{on}\n");
                        }
                    }
                }
            }
            text
        },
    )
}

fn toml_string(text: &str) -> String {
    toml::Value::from(text).to_string()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(500))]

    #[test]
    fn random_bytes(bytes: Vec<u8>) {
        exercise(&String::from_utf8_lossy(&bytes), &[]);
    }

    #[test]
    fn random_characters(text in "[\\[\\]{}=.,\"'#a-c0-9 \r\n\t\u{feff}é\u{1b}-]{0,200}") {
        exercise(&text, &[]);
    }

    #[test]
    fn random_fragments(fragments in prop::collection::vec(fragment(), 0..12)) {
        exercise(&fragments.concat(), &[]);
    }

    #[test]
    fn random_sets(sets in prop::collection::vec("[a-z]{0,8}[.=]{0,2}[a-z\"{}\\[\\]0-9\n =]{0,12}", 0..4)) {
        exercise("", &sets);
    }

    #[test]
    fn mutated_examples(
        example in select(EXAMPLES.to_vec()),
        cuts in prop::collection::vec((any::<Index>(), any::<Index>(), any::<Index>()), 1..6),
    ) {
        let mut text: Vec<char> = example.chars().collect();
        for (from, length, to) in cuts {
            // A short piece moves elsewhere, or is doubled.
            let from = from.index(text.len());
            let end = (from + length.index(20)).min(text.len());
            let piece: Vec<char> = text[from..end].to_vec();
            if length.index(2) == 0 {
                text.drain(from..end);
            }
            let to = to.index(text.len() + 1);
            text.splice(to..to, piece);
        }
        exercise(&text.into_iter().collect::<String>(), &[]);
    }

    #[test]
    fn one_character_changed(
        example in select(EXAMPLES.to_vec()),
        at: Index,
        new in "[-\\[\\]{}=.,\"'# 0-9a-z\n]",
    ) {
        let mut text: Vec<char> = example.chars().collect();
        let at = at.index(text.len());
        text.splice(at..=at, new.chars());
        exercise(&text.into_iter().collect::<String>(), &[]);
    }

    #[test]
    fn good_files_load_again(text in good_file()) {
        prop_assert!(exercise(&text, &[]), "{}\n{}", text, load_str("x", &text, Path::new("/"), &[]).unwrap_err());
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    #[test]
    fn good_files_are_explained(
        text in good_file(),
        sockets in 1u32..4,
        cores in 1u32..5,
        threads in 1u32..3,
        width in 0usize..200,
    ) {
        let loaded = load_str("vm.toml", &text, Path::new("/base"), &[]).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let synthetic = Synthetic { sockets, cores, threads, memory: 1 << 30, hugepages: 8 };
        synthetic.write(dir.path()).unwrap();
        let host = Host::from_sysfs(dir.path()).unwrap();
        prop_assert_eq!(host.cpus.len() as u32, sockets * cores * threads);
        let explanation = explain(&loaded.plan, &host).for_vms(3);
        let text = explanation.render(width);
        for line in text.lines() {
            prop_assert!(line.chars().count() <= width.max(80), "{}", text);
        }
        prop_assert!(explanation.to_json()["threads"].as_array().unwrap().len() == explanation.threads.len());
    }
}
