//! Debian's kernel as a guest, in the nested lab (tests/lab).

use std::process::{Command, Stdio};

/// Takes minutes: sixteen guests that between them have every pair of vCPUs, placement, transport,
/// kernel format and way to end. A machine without QEMU, apt-get or network fails it.
#[test]
fn linux_boots_and_keeps_its_data_in_machines_of_all_kinds() {
    let output = Command::new(env!("CARGO_BIN_EXE_lab"))
        .arg("ci")
        .stdin(Stdio::null())
        .output()
        .expect("the lab is built with this test");
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let said = text(&output.stdout) + &text(&output.stderr);
    assert!(output.status.success(), "{said}");
    assert!(said.contains("16 of 16 guests ok"), "{said}");
}
