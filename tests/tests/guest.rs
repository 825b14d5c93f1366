//! The built-in guest with 1 to 64 vCPUs and its queues in every place; the counters of each
//! thread show that the work was done where the file says.

use std::collections::BTreeMap;

use serde_json::Value;
use tests::machine::Machine;

/// Who serves a queue.
#[derive(Clone, PartialEq)]
enum Place {
    /// This loop.
    Loop(String),
    /// The vCPU that submits; this loop completes.
    Vcpu(String),
}

use Place::{Loop, Vcpu};

impl Place {
    /// The loop of its requests, or of their completions.
    fn home(&self) -> &str {
        match self {
            Loop(name) | Vcpu(name) => name,
        }
    }
}

/// A machine with one disk that has a queue for each vCPU, queue `n` at `places[n]`.
fn file(places: &[Place], engine: &str) -> String {
    let mut homes: Vec<_> = places.iter().map(Place::home).collect();
    homes.sort();
    homes.dedup();
    let mut text = format!("[machine]\nmemory = \"512M\"\ncpus = {}\n", places.len());
    for name in homes.iter().filter(|name| **name != "main") {
        text += &format!("[thread.{name}]\n");
    }
    text += &format!("[disk.data]\nsize = \"64M\"\nengine = \"{engine}\"\n");
    for (queue, place) in places.iter().enumerate() {
        text += &format!("[[disk.data.place]]\nqueues = \"{queue}\"\n");
        text += &match place {
            Loop(name) => format!("on = \"{name}\"\n"),
            Vcpu(home) => format!("on = \"vcpu\"\nhome = \"{home}\"\n"),
        };
    }
    text
}

/// The counters of a thread.
struct Counters<'a>(&'a str, &'a Value);

impl Counters<'_> {
    #[track_caller]
    fn get(&self, counter: &str) -> u64 {
        self.1[counter].as_u64().unwrap_or_else(|| panic!("{} has no {counter}", self.0))
    }

    #[track_caller]
    fn expect(&self, counter: &str, value: u64) {
        assert_eq!(self.get(counter), value, "{counter} of {}: {}", self.0, self.1);
    }
}

/// Runs the built-in guest with its queues at `places` and looks where the work was done.
fn check(places: &[Place], engine: &str) {
    let report = Machine::new(&file(places, engine)).run(&["--json"]).expect(0).json();
    assert_eq!((&report["exit"], &report["reason"]), (&0.into(), &"power-off".into()));
    let guest = &report["guest"];
    assert_eq!(guest["verdict"], "ok");
    assert_eq!(guest["vcpus"], places.len());
    let threads: BTreeMap<&str, &Value> = report["threads"]
        .as_array()
        .unwrap()
        .iter()
        .map(|thread| (thread["name"].as_str().unwrap(), &thread["counters"]))
        .collect();
    let counters = |name: &str| Counters(threads.get_key_value(name).unwrap().0, threads[name]);
    // What is left for each loop, once the vCPUs' own share is taken off.
    let mut left: BTreeMap<&str, [u64; 2]> = BTreeMap::new();
    let queues = guest["disks"][0]["per_vcpu"].as_array().unwrap();
    assert_eq!(queues.len(), places.len());
    for (nth, (place, queue)) in places.iter().zip(queues).enumerate() {
        let vcpu = counters(&format!("vcpu{nth}"));
        let [requests, kicks] = [2, 3].map(|column| queue[column].as_u64().unwrap());
        assert_eq!((&queue[0], &queue[1]), (&nth.into(), &nth.into()), "its own queue");
        assert!(requests >= 1000, "vCPU {nth}: {requests} requests");
        assert!(kicks < requests, "kicks are suppressed while requests are in flight");
        let (taken, completed) = (vcpu.get("requests"), vcpu.get("completions"));
        match place {
            Loop(_) => {
                for counter in ["kicks", "requests", "completions", "left", "handed_over"] {
                    vcpu.expect(counter, 0);
                }
            }
            // A kick that finds the queue held is left with the holder, who serves it.
            Vcpu(_) if engine == "sync" => {
                assert!(taken * 10 > requests * 9, "vCPU {nth} took {taken} of {requests}");
                assert_eq!(taken, completed, "vCPU {nth}");
                vcpu.expect("handed_over", 0);
            }
            // Each completion looks for new requests, too, and a vCPU that holds the queue serves
            // a completion that comes meanwhile.
            Vcpu(_) => {
                assert!(taken * 3 > requests, "vCPU {nth} took {taken} of {requests}");
                assert!(completed * 10 < requests, "vCPU {nth} completed {completed}");
                assert!(vcpu.get("handed_over") > 0);
            }
        }
        vcpu.expect("ring_submits", 0);
        // vCPU 0 sets up the devices; the others do nothing but their requests, except that the
        // guest looks at a device's status after each second in which nothing came.
        if nth > 0 {
            let exits = if matches!(place, Vcpu(_)) { kicks } else { 0 };
            let looks = guest["work_us"].as_u64().unwrap() / 1_000_000;
            let found = vcpu.get("mmio_exits");
            assert!(
                (exits..=exits + looks).contains(&found),
                "vCPU {nth} left the guest {found} times for {kicks} kicks, {looks} looks at most"
            );
            vcpu.expect("pio_exits", 0);
        }
        let home = left.entry(place.home()).or_default();
        home[0] += requests - taken;
        home[1] += requests - completed;
    }
    for (name, [requests, completions]) in left {
        let home = counters(name);
        home.expect("requests", requests);
        home.expect("completions", completions);
        home.expect("mmio_exits", 0);
        if engine == "sync" {
            home.expect("ring_submits", 0);
            continue;
        }
        let of_it = places.iter().filter(|place| place.home() == name);
        // All but the get-id requests, of which each queue has one or two, go through the ring.
        let mut least = 0;
        for (nth, _) in places.iter().enumerate().filter(|(_, place)| place.home() == name) {
            least += queues[nth][2].as_u64().unwrap() - 2;
        }
        assert!(home.get("ring_submits") >= least, "{name}: {}", threads[name]);
        assert_eq!(home.get("ring_submits"), home.get("ring_completions"), "{name}");
        if of_it.clone().any(|place| matches!(place, Loop(_))) {
            assert!(home.get("fd_events") > 0, "kicks come by eventfd");
        }
    }
}

/// The same with both engines, and with 1, 2 and 8 vCPUs.
fn check_all(place: impl Fn(usize) -> Place) {
    for vcpus in [1, 2, 8] {
        for engine in ["io_uring", "sync"] {
            check(&(0..vcpus).map(&place).collect::<Vec<_>>(), engine);
        }
    }
}

fn name(text: impl Into<String>) -> String {
    text.into()
}

/// Loops, vCPUs with different homes, several queues on one loop.
fn mix(queue: usize) -> Place {
    match queue % 5 {
        0 => Vcpu(name("io0")),
        1 => Loop(name("io0")),
        2 => Loop(name("main")),
        3 => Vcpu(name("main")),
        _ => Loop(name("io1")),
    }
}

#[test]
fn queues_on_the_main_loop_are_served_there() {
    check_all(|_| Loop(name("main")));
}

#[test]
fn queues_on_one_iothread_are_served_there() {
    check_all(|_| Loop(name("io0")));
}

#[test]
fn queues_on_an_iothread_each_are_served_there() {
    check_all(|queue| Loop(format!("io{queue}")));
}

#[test]
fn queues_on_the_vcpu_are_served_there_with_one_exit_per_kick() {
    check_all(|_| Vcpu(name("io0")));
}

#[test]
fn a_mix_of_places_is_served_by_each_its_own() {
    check_all(mix);
}

#[test]
fn sixty_four_vcpus_with_an_iothread_each() {
    check(&(0..64).map(|queue| Loop(format!("io{queue}"))).collect::<Vec<_>>(), "io_uring");
}

#[test]
fn sixty_four_vcpus_that_serve_themselves() {
    check(&vec![Vcpu(name("io0")); 64], "sync");
}

#[test]
fn sixty_four_vcpus_with_a_mix_of_places() {
    check(&(0..64).map(mix).collect::<Vec<_>>(), "io_uring");
}

#[test]
fn several_disks_and_rngs_are_driven_each_in_its_place() {
    let toml = "[machine]\ncpus = 2\n[thread.a]\n[thread.b]\n[thread.r]\n\
        [disk.a]\nsize = \"8M\"\nplace = \"a\"\n\
        [disk.b]\nsize = \"8M\"\nplace = \"b\"\nqueues = 1\nengine = \"sync\"\n\
        [rng.x]\nplace = \"r\"\n[rng.y]\nplace = \"vcpu\"\n";
    let report = Machine::new(toml).run(&["--json"]).expect(0).json();
    let guest = &report["guest"];
    let requests = |nth: usize| -> u64 {
        let rows = guest["disks"][nth]["per_vcpu"].as_array().unwrap();
        rows.iter().map(|row| row[2].as_u64().unwrap()).sum()
    };
    let counter = |name: &str, counter: &str| {
        let threads = report["threads"].as_array().unwrap();
        let thread = threads.iter().find(|thread| thread["name"] == name).unwrap();
        thread["counters"][counter].as_u64().unwrap()
    };
    assert_eq!(guest["disks"][0]["id"], "a");
    assert_eq!(counter("a", "requests"), requests(0));
    assert_eq!(counter("b", "requests"), requests(1));
    let of_rng = |nth: usize| guest["rng"][nth]["requests"].as_u64().unwrap();
    assert!(of_rng(0) > 0 && of_rng(1) > 0);
    assert_eq!(counter("r", "requests"), of_rng(0));
    // A queue's home loop kicks it once when the driver is ready, so it may take the first few.
    assert!(counter("vcpu0", "requests") > 0);
    assert_eq!(counter("vcpu0", "requests") + counter("main", "requests"), of_rng(1));
}

#[test]
fn the_console_tells_a_person_and_json_keeps_standard_output_for_itself() {
    let machine = Machine::new("");
    let shown = machine.run(&["--stats", "--timing"]).expect(0);
    assert!(shown.text().contains("verdict: ok"), "{}", shown.text());
    for part in ["vcpu0", "ring_enters", "private memory", "the guest powered off"] {
        assert!(shown.stderr.contains(part), "{}", shown.stderr);
    }
    let silent = machine.run(&["--json"]).expect(0);
    assert!(silent.stderr.contains("verdict: ok"), "{}", silent.stderr);
    assert_eq!(silent.text().lines().count(), 1);
    let timing = &silent.json()["timing"];
    assert!(timing["total-ms"].as_f64().is_some_and(|ms| ms > 0.0), "{timing}");
    assert!(timing["private-kib"].as_u64().is_some_and(|kib| kib > 0), "{timing}");
}
