//! The console on a terminal, a pipe, a file: taken, used and given back.

use std::io::Write;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use tests::machine::{Machine, Running, text};
use tests::payload;
use tests::program::heddle;
use tests::pty::Pty;

const LIMIT: Duration = Duration::from_secs(60);

/// A machine that sends back what it gets.
fn echo() -> Machine {
    Machine::booting(payload::echo(), "", "")
}

/// Waits for the end of a child; its exit code.
#[track_caller]
fn end(mut child: Child) -> Option<i32> {
    let (sender, receiver) = channel();
    let pid = child.id();
    std::thread::spawn(move || sender.send(child.wait().expect("a child").code()));
    receiver.recv_timeout(LIMIT).unwrap_or_else(|_| panic!("process {pid} does not end"))
}

fn signal(child: &Child, name: &str) {
    let kill = format!("kill -{name} {}", child.id());
    assert!(Command::new("sh").args(["-c", &kill]).status().unwrap().success());
}

/// Starts an echoing machine on a terminal, lets `leave` end it, and expects the terminal to be
/// as it was.
#[track_caller]
fn leaves_as_it_was(args: &[&str], code: i32, leave: impl FnOnce(&mut Pty, &Child)) {
    let machine = echo();
    let mut pty = Pty::default();
    let before = pty.settings();
    let child = pty.start(&mut machine.command(args));
    pty.wait_for("ready");
    assert!(pty.is_raw(), "while the guest runs");
    leave(&mut pty, &child);
    assert_eq!(end(child), Some(code));
    assert_eq!(pty.settings(), before);
}

#[test]
fn power_off_gives_the_terminal_back() {
    leaves_as_it_was(&[], 0, |pty, _| pty.type_in(b"q"));
}

#[test]
fn ctrl_a_x_leaves_and_gives_the_terminal_back() {
    leaves_as_it_was(&[], 0, |pty, _| pty.type_in(b"\x01x"));
    leaves_as_it_was(&[], 0, |pty, _| pty.type_in(b"abc\x01X"));
}

#[test]
fn a_triple_fault_gives_the_terminal_back() {
    leaves_as_it_was(&[], 12, |pty, _| pty.type_in(b"t"));
}

#[test]
fn signals_give_the_terminal_back() {
    leaves_as_it_was(&[], 143, |_, child| signal(child, "TERM"));
    leaves_as_it_was(&[], 130, |_, child| signal(child, "INT"));
    leaves_as_it_was(&[], 129, |_, child| signal(child, "HUP"));
}

#[test]
fn a_timeout_gives_the_terminal_back() {
    leaves_as_it_was(&["--timeout", "2s"], 14, |_, _| ());
}

#[test]
fn a_closed_terminal_ends_the_machine() {
    let machine = echo();
    let mut pty = Pty::default();
    let child = pty.start(&mut machine.command(&[]));
    pty.wait_for("ready");
    pty.hang_up();
    assert_eq!(end(child), Some(129));
}

#[test]
fn keys_reach_the_guest_as_they_are_and_ctrl_c_is_one_of_them() {
    leaves_as_it_was(&[], 0, |pty, _| {
        for keys in ["hello", "\x03\x1a\x1c\x04\x11\x13", "\r", "\x1b[A\x7f", "grün"] {
            pty.type_in(keys.as_bytes());
            assert_eq!(pty.wait_for(keys), b"");
        }
        pty.type_in(b"q");
    });
}

#[test]
fn ctrl_a_ctrl_a_sends_one_ctrl_a() {
    leaves_as_it_was(&[], 0, |pty, _| {
        pty.type_in(b"<\x01\x01>");
        assert_eq!(pty.wait_for(">"), b"<\x01");
        // The second one was no first half of an escape.
        pty.type_in(b"\x01\x01x>");
        assert_eq!(pty.wait_for(">"), b"\x01x");
        pty.type_in(b"q");
    });
}

#[test]
fn ctrl_a_p_presses_the_power_button() {
    let machine = Machine::booting(payload::button(), "", "");
    let mut pty = Pty::default();
    let child = pty.start(&mut machine.command(&[]));
    pty.wait_for("ready");
    pty.type_in(b"\x01p");
    pty.wait_for("!");
    assert_eq!(end(child), Some(0));
}

#[test]
fn a_reset_starts_the_guest_anew_and_the_console_stays() {
    let machine = echo();
    let mut pty = Pty::default();
    let before = pty.settings();
    let child = pty.start(&mut machine.command(&[]));
    for _ in 0..3 {
        pty.wait_for("ready");
        pty.type_in(b"x");
        pty.wait_for("x");
        pty.type_in(b"\x12");
    }
    pty.wait_for("ready");
    assert!(pty.is_raw());
    pty.type_in(b"q");
    assert_eq!(end(child), Some(0));
    assert_eq!(pty.settings(), before);
}

#[test]
fn a_job_in_the_background_runs_on_and_leaves_the_terminal_alone() {
    let machine = echo();
    let mut pty = Pty::default();
    let before = pty.settings();
    let script = "set -m; \"$0\" run \"$1\" --timeout 1s & wait $!; echo \"ended with $?.\"";
    let mut shell = Command::new("sh");
    shell.args(["-c", script, text(heddle()), text(&machine.path("vm.toml"))]);
    let shell = pty.start(&mut shell);
    pty.wait_for("ready");
    assert_eq!(pty.settings(), before);
    pty.type_in(b"q");
    pty.wait_for("ended with 14.");
    assert_eq!(end(shell), Some(0));
    assert_eq!(pty.settings(), before);
}

#[test]
fn standard_input_can_be_a_file_in_which_nothing_is_an_escape() {
    let machine = echo();
    // More than the port and its FIFO hold.
    let mut input: Vec<u8> = (0..5000_u32).map(|at| b"abcdefg"[at as usize % 7]).collect();
    input.extend(b"\x01x\x01\x01q");
    machine.write("input", &input);
    let file = std::fs::File::open(machine.path("input")).unwrap();
    let outcome = Running::start(machine.command(&[]).stdin(file)).wait().expect(0);
    let expected = [b"ready", &input[..input.len() - 1]].concat();
    assert!(outcome.stdout == expected, "{:?}", outcome.text());
}

#[test]
fn standard_input_can_be_a_pipe() {
    let machine = echo();
    let mut child =
        machine.command(&[]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(b"piped q").unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!((output.status.code(), &output.stdout[..]), (Some(0), &b"readypiped "[..]));
}

#[test]
fn without_input_the_guest_runs_on() {
    let machine = echo();
    let outcome = machine.run(&["--timeout", "500ms"]).expect(14);
    assert_eq!(outcome.text(), "ready");
    // Closed altogether.
    let script = "exec \"$0\" run \"$1\" --timeout 500ms <&-";
    let mut shell = Command::new("sh");
    shell.args(["-c", script, text(heddle()), text(&machine.path("vm.toml"))]);
    assert_eq!(Running::start(&mut shell).wait().expect(14).text(), "ready");
}

#[test]
fn output_that_nobody_reads_stops_neither_timeout_nor_end() {
    let machine = Machine::booting(payload::flood(), "", "");
    // A pipe that fills, and stays open until the end.
    let began = Instant::now();
    let mut child = machine.command(&["--timeout", "2s"]).stdout(Stdio::piped()).spawn().unwrap();
    let stdout = child.stdout.take();
    assert_eq!(end(child), Some(14));
    drop(stdout);
    // And a terminal that is not read, with heddle's own last words and without.
    for elsewhere in ["", "2>/dev/null"] {
        let mut pty = Pty::default();
        let before = pty.settings();
        let script = format!("exec \"$0\" run \"$1\" --timeout 2s --stats {elsewhere}");
        let mut shell = Command::new("sh");
        shell.args(["-c", &script, text(heddle()), text(&machine.path("vm.toml"))]);
        let child = pty.start(&mut shell);
        pty.wait_for("~");
        assert_eq!(end(child), Some(14));
        assert_eq!(pty.settings(), before);
    }
    assert!(began.elapsed() < Duration::from_secs(20), "{:?}", began.elapsed());
}

#[test]
fn a_reader_that_goes_away_does_not_end_the_machine() {
    let machine = Machine::booting(payload::cmdline(), &"x".repeat(4000), "");
    let mut child =
        machine.command(&[]).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
    drop(child.stdout.take());
    assert_eq!(end(child), Some(0));
}
