//! The `heddle` program under test.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

/// The root of the source tree.
pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("this crate lies in a workspace")
}

/// The `heddle` program of this very tree.
///
/// Cargo builds no other package's programs for `cargo test -p tests`, so each test process has
/// cargo build it first: into the same target directory and with the same profile, which takes no
/// time when it is there already. Cargo's lock on that directory orders processes that do so at
/// once.
pub fn heddle() -> &'static Path {
    static PATH: OnceLock<PathBuf> = OnceLock::new();
    PATH.get_or_init(build)
}

fn build() -> PathBuf {
    let test = env::current_exe().expect("a path to this test");
    // TARGET/PROFILE/deps/TEST
    let directory = test.ancestors().nth(2).expect("tests lie in a target directory");
    let target = directory.parent().expect("a target directory");
    let profile = match directory.file_name().and_then(|name| name.to_str()) {
        Some("debug") => "dev",
        Some(name) => name,
        None => panic!("{} is no target directory", target.display()),
    };
    let status = Command::new(env!("CARGO"))
        .args(["build", "--quiet", "--locked", "--offline", "--workspace", "--bin", "heddle"])
        .args(["--profile", profile])
        .arg("--target-dir")
        .arg(target)
        .arg("--manifest-path")
        .arg(root().join("Cargo.toml"))
        .status()
        .expect("cargo starts");
    assert!(status.success(), "heddle does not build: {status}");
    directory.join("heddle")
}

/// Fails, and says what to do, unless machines can run here.
pub fn need_kvm() {
    if let Err(error) = std::fs::File::options().read(true).write(true).open("/dev/kvm") {
        panic!(
            "this test runs a machine and needs /dev/kvm: {error}. Load kvm_intel or kvm_amd, \
             become a member of the group kvm, or run as root."
        );
    }
}
