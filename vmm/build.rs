//! Builds the guest of `tests/guest` and tells `include_bytes!(env!("HEDDLE_GUEST"))` where it is.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

const TARGET: &str = "x86_64-unknown-linux-gnu";

/// The guest is a static image at a fixed address, for any x86-64 CPU, and has its own linker
/// script. `rust-lld` comes with the toolchain, so no C compiler is needed.
const FLAGS: &[&str] = &[
    "-Cpanic=abort",
    "-Crelocation-model=static",
    "-Ccode-model=small",
    "-Ctarget-cpu=x86-64",
    "-Ctarget-feature=+crt-static",
    "-Cno-redzone=yes",
    "-Cforce-unwind-tables=no",
    "-Clinker=rust-lld",
    "-Clinker-flavor=ld.lld",
    "-Clink-arg=-static",
    "-Clink-arg=-no-pie",
    "-Clink-arg=--build-id=none",
];

fn main() {
    let here = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").expect("set by cargo"));
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("set by cargo"));
    let guest = here.parent().expect("a workspace around this crate").join("tests/guest");
    for part in ["Cargo.toml", "Cargo.lock", "link.ld", "src"] {
        println!("cargo::rerun-if-changed={}", guest.join(part).display());
    }
    println!("cargo::rerun-if-changed=build.rs");
    let image = build(&guest, &out.join("guest"));
    println!("cargo::rustc-env=HEDDLE_GUEST={}", image.display());
}

/// Runs cargo on the guest's own workspace, in a target directory of its own so that the two
/// cargos do not wait for each other's locks.
fn build(guest: &Path, target_dir: &Path) -> PathBuf {
    let mut flags = FLAGS.join("\x1f");
    flags.push_str("\x1f-Clink-arg=-T");
    flags.push_str(guest.join("link.ld").to_str().expect("a path in UTF-8"));
    let mut cargo = Command::new(env::var_os("CARGO").expect("set by cargo"));
    cargo
        .args(["build", "--release", "--locked", "--offline", "--target", TARGET])
        .arg("--manifest-path")
        .arg(guest.join("Cargo.toml"))
        .arg("--target-dir")
        .arg(target_dir)
        .env("CARGO_ENCODED_RUSTFLAGS", flags);
    // What the outer build is run with is not meant for the guest: clippy's driver, flags, targets.
    for name in [
        "RUSTFLAGS",
        "RUSTC_WRAPPER",
        "RUSTC_WORKSPACE_WRAPPER",
        "CARGO_BUILD_TARGET",
        "CARGO_BUILD_RUSTFLAGS",
        "CARGO_TARGET_DIR",
    ] {
        cargo.env_remove(name);
    }
    let status = cargo.status().expect("cargo starts");
    assert!(status.success(), "the built-in guest does not compile: {status}");
    target_dir.join(TARGET).join("release/guest")
}
