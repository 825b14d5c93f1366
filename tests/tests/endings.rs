//! Kernels that are not ours, booted by `[boot] kernel`: what they find, and every way to end.

use std::time::Duration;

use tests::machine::{Machine, Outcome, wait_for_thread};
use tests::payload::{self, PciFunction, port_writes};

const DEBUG_EXIT: &str = "[machine]\ndebug-exit = true\n";

/// Runs code that writes to these ports.
fn writes(toml: &str, writes: &[(u16, usize, u32)]) -> Outcome {
    Machine::booting(&port_writes(writes), "", toml).run(&["--json", "--timeout", "20s"])
}

const EXIT_ON_RESET: &str = "[policy]\non-reset = \"exit\"\n";

#[track_caller]
fn expect_reason(outcome: Outcome, code: i32, reason: &str) {
    let report = outcome.expect(code).json();
    assert_eq!(report["reason"], reason, "{report}");
    assert_eq!(report["exit"], code, "{report}");
}

#[test]
fn debug_exit_gives_64_and_the_value_and_json_has_all_of_it() {
    for (bytes, value, code) in [
        (1, 0, 0),
        (1, 1, 65),
        (1, 62, 126),
        (1, 63, 127),
        (1, 0xff, 127),
        (2, 0x1234, 127),
        (4, 0x8000_0001, 127),
    ] {
        let report = writes(DEBUG_EXIT, &[(0xf4, bytes, value)]).expect(code).json();
        assert_eq!(report["reason"], "debug-exit", "{report}");
        assert_eq!(report["debug-exit"], value, "{report}");
    }
}

#[test]
fn debug_exit_is_not_there_unless_asked_for() {
    let outcome = writes("", &[(0xf4, 1, 5), (0x604, 2, 0x2000)]);
    assert!(outcome.json()["debug-exit"].is_null());
    expect_reason(outcome, 0, "power-off");
}

#[test]
fn acpi_s5_powers_off_and_other_sleep_types_do_not() {
    expect_reason(writes("", &[(0x604, 2, 0x2000)]), 0, "power-off");
    let outcome = writes(DEBUG_EXIT, &[(0x604, 2, 0x2400), (0x604, 2, 0), (0xf4, 1, 9)]);
    expect_reason(outcome, 64 + 9, "debug-exit");
}

#[test]
fn the_acpi_tables_say_how_to_power_off_and_to_reset() {
    let run = |code| Machine::booting(code, "", "").run(&["--json", "--timeout", "20s"]);
    expect_reason(run(payload::acpi_power_off()), 0, "power-off");
    let reset = Machine::booting(payload::acpi_reset(), "", EXIT_ON_RESET);
    expect_reason(reset.run(&["--json", "--timeout", "20s"]), 10, "reset");
}

#[test]
fn the_keyboard_controller_and_the_reset_register_reset() {
    expect_reason(writes(EXIT_ON_RESET, &[(0x64, 1, 0xfe)]), 10, "reset");
    for value in [0x06, 0x0e] {
        expect_reason(writes(EXIT_ON_RESET, &[(0xcf9, 1, 0x02), (0xcf9, 1, value)]), 10, "reset");
    }
}

#[test]
fn resets_count_and_threads_images_and_output_outlive_them() {
    // It resets for as long as nobody stops it.
    let toml = "[serial.com1]\nout = { file = \"log\" }\n[disk.d]\nsize = \"1M\"\n[rng.r]\n";
    let code = port_writes(&[(0x3f8, 1, u32::from(b'x')), (0x64, 1, 0xfe)]);
    let machine = Machine::booting(&code, "", toml);
    let report = machine.run(&["--json", "--timeout", "2s"]).expect(14).json();
    let resets = report["resets"].as_u64().unwrap();
    assert!(resets > 2, "{report}");
    let said = std::fs::read_to_string(machine.path("log")).unwrap();
    assert!(said.bytes().all(|byte| byte == b'x'), "{said}");
    assert!((resets..=resets + 1).contains(&(said.len() as u64)), "{resets} resets: {said}");
    let names: Vec<_> = report["threads"].as_array().unwrap().iter().map(|t| &t["name"]).collect();
    assert_eq!(names, ["main", "vcpu0"]);
}

#[test]
fn a_reset_leaves_nothing_of_the_machine_before() {
    for transport in ["pci", "mmio"] {
        let toml = format!(
            "[machine]\ntransport = \"{transport}\"\nmemory = \"64M\"\n[disk.d]\nsize = \"1M\"\n[rng.r]\n"
        );
        let code = port_writes(&[(0x3f8, 1, u32::from(b'x')), (0x64, 1, 0xfe)]);
        let machine = Machine::booting(&code, "", &toml);
        let mut running = machine.start(&["--timeout", "100s"]);
        let mut after = |resets: usize| {
            running.wait_for(&"x".repeat(resets));
            (open_files(running.pid()), mapped_kib(running.pid()))
        };
        let ((files, kib), (later_files, later_kib)) = (after(5), after(85));
        running.signal(libc::SIGTERM);
        running.wait().expect(128 + libc::SIGTERM);
        // What is being built or taken down right now comes and goes.
        assert!(later_files < files + 40, "{transport}: {files} files, then {later_files}");
        assert!(later_kib < kib + (512 << 10), "{transport}: {kib} KiB, then {later_kib} KiB");
    }
}

fn open_files(pid: u32) -> usize {
    std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count()
}

fn mapped_kib(pid: u32) -> usize {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let size = status.lines().find_map(|line| line.strip_prefix("VmSize:")).unwrap();
    size.trim().trim_end_matches(" kB").parse().unwrap()
}

#[test]
fn a_guest_that_says_it_panicked_is_11() {
    expect_reason(writes("", &[(0x505, 1, 2), (0x505, 1, 1)]), 11, "guest-panic");
}

#[test]
fn a_triple_fault_is_12() {
    let outcome = Machine::booting(payload::fault(), "", "").run(&["--json", "--timeout", "20s"]);
    expect_reason(outcome, 12, "triple-fault");
}

#[test]
fn the_first_of_two_ends_counts() {
    expect_reason(writes("", &[(0x604, 2, 0x2000), (0x64, 1, 0xfe)]), 0, "power-off");
}

#[test]
fn a_guest_that_never_exits_is_stopped_by_the_timeout() {
    let machine = Machine::booting(payload::spin(), "", "[machine]\ncpus = 2\n");
    let outcome = machine.run(&["--json", "--timeout", "300ms"]);
    assert!(outcome.took >= Duration::from_millis(300), "{:?}", outcome.took);
    assert!(outcome.took < Duration::from_secs(5), "{:?}", outcome.took);
    expect_reason(outcome, 14, "timeout");
}

#[test]
fn a_guest_that_sleeps_for_good_is_stopped_by_the_timeout() {
    let machine = Machine::booting(&port_writes(&[]), "", "[machine]\ncpus = 4\n");
    let outcome = machine.run(&["--json", "--timeout", "100ms"]);
    assert!(outcome.took < Duration::from_secs(5), "{:?}", outcome.took);
    expect_reason(outcome, 14, "timeout");
}

#[test]
fn a_signal_ends_the_machine_with_128_and_its_number() {
    for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGHUP, libc::SIGQUIT] {
        for busy in [false, true] {
            let code = if busy { payload::spin() } else { payload::echo() };
            let machine = Machine::booting(code, "", "");
            let mut running = machine.start(&["--json"]);
            match busy {
                // Nothing is heard of that guest.
                true => wait_for_thread(running.pid(), "vcpu0"),
                false => running.wait_for("ready"),
            }
            running.signal(signal);
            let outcome = running.wait();
            assert!(outcome.took < Duration::from_secs(10), "{:?}", outcome.took);
            expect_reason(outcome, 128 + signal, "signal");
        }
    }
}

#[test]
fn the_command_line_arrives_byte_by_byte_and_com1_is_standard_output() {
    let long = "x".repeat(4095);
    for line in ["", "console=ttyS0 a=\"b c\"", "grüße", &long] {
        let outcome = Machine::booting(payload::cmdline(), line, "").run(&["--timeout", "60s"]);
        assert_eq!(outcome.expect(0).text(), line);
    }
}

#[test]
fn a_serial_port_can_go_to_a_file_or_nowhere() {
    let machine =
        Machine::booting(payload::cmdline(), "hello", "[serial.com1]\nout = { file = \"log\" }\n");
    assert_eq!(machine.run(&[]).expect(0).text(), "");
    assert_eq!(std::fs::read_to_string(machine.path("log")).unwrap(), "hello");
    let machine = Machine::booting(payload::cmdline(), "hello", "[serial.com1]\nout = \"null\"\n");
    assert_eq!(machine.run(&[]).expect(0).text(), "");
}

#[test]
fn pci_by_ports_finds_virtio_blk_with_memory_bars_msix_and_a_queue_per_vcpu() {
    const MSIX: u8 = 0x11;
    const VENDOR_SPECIFIC: u8 = 0x09;
    let toml = "[machine]\ncpus = 3\n[disk.a]\nsize = \"1M\"\n[disk.b]\nsize = \"1M\"\nqueues = 2\n\
                [rng.r]\n";
    let outcome = Machine::booting(payload::pci(), "", toml).run(&["--timeout", "60s"]).expect(0);
    let found = PciFunction::parse(&outcome.stdout);
    let ids: Vec<_> = found.iter().map(|f| (f.device, f.word(0), f.word(2))).collect();
    assert_eq!(ids[0].0, 0, "the host bridge is first: {ids:x?}");
    assert_eq!(ids[1..], [(1, 0x1af4, 0x1042), (2, 0x1af4, 0x1042), (3, 0x1af4, 0x1044)]);
    for (function, queues) in found[1..].iter().zip([3, 2, 1]) {
        assert_eq!(function.queues, queues, "num_queues by way of BAR 0: {function:x?}");
        let [msix] = function.capabilities(MSIX)[..] else { panic!("{function:x?}") };
        let vectors = (function.word(msix + 2) & 0x7ff) + 1;
        assert_eq!(vectors, queues + 1, "one for each queue and one for the configuration");
        let table = (function.long(msix + 4) & 7) as usize;
        // Bit 0 of a BAR is clear when it is in memory.
        for bar in [0, table] {
            let bar = function.long(0x10 + 4 * bar);
            assert!(bar & 1 == 0 && (0xc000_0000..0xe000_0000).contains(&bar), "{bar:#x}");
        }
        assert_eq!(function.word(4) & 2, 2, "memory decoding is on");
        // Common configuration, notifications, interrupt status, device configuration; the
        // payload relies on the first being at the start of BAR 0.
        let virtio = function.capabilities(VENDOR_SPECIFIC);
        let structures: Vec<_> = virtio.iter().map(|at| function.config[at + 3]).collect();
        for kind in 1..=4 {
            assert!(structures.contains(&kind), "{structures:?}");
        }
        let common = virtio.iter().find(|at| function.config[**at + 3] == 1).unwrap();
        assert_eq!((function.config[common + 4], function.long(common + 8)), (0, 0));
    }
}

#[test]
fn init_and_sipi_start_a_second_cpu_in_real_mode() {
    let machine = Machine::booting(payload::two_cpus(), "", "[machine]\ncpus = 2\n");
    assert_eq!(machine.run(&["--timeout", "20s"]).expect(0).text(), "AB");
}
