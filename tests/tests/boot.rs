//! Kernels by each boot protocol, from their file to what they find in memory.

use tests::machine::Machine;
use tests::payload::{self, elf, multiboot_file, parts};

const HOST: i32 = 4;

fn multiboot(boot: &str) -> Machine {
    let machine = Machine::new(&format!(
        "[machine]\nmemory = \"64M\"\ndebug-exit = true\n[boot]\nmultiboot = \"test.flat\"\n{boot}"
    ));
    machine.write("test.flat", multiboot_file(payload::multiboot()));
    machine.write("env", "A=1\nB=2\n");
    machine.write("empty", "");
    machine
}

#[test]
fn a_multiboot_kernel_finds_its_command_line_modules_and_memory() {
    let machine = multiboot(
        "cmdline = \"one two\"\ninitrd = \"env\"\n\
         modules = [\"empty\", { path = \"env\", cmdline = \"-v \\\"x\\\"\" }]\n",
    );
    let outcome = machine.run(&["--timeout", "20s"]).expect(64 + 5);
    let (eax, parts) = parts(&outcome.stdout);
    assert_eq!(eax, 0x2bad_b002);
    let (map, texts) = parts.split_last().unwrap();
    let texts: Vec<_> = texts.iter().map(|text| std::str::from_utf8(text).unwrap()).collect();
    let (loader, texts) = texts.split_last().unwrap();
    let env = "A=1\nB=2\n";
    assert_eq!(texts, ["test.flat one two", "env", env, "empty", "", "env -v \"x\"", env]);
    assert!(loader.starts_with("heddle "), "{loader}");
    let long = |bytes: &[u8]| u64::from_le_bytes(bytes.try_into().unwrap());
    let areas: Vec<_> =
        map.chunks(24).map(|area| (long(&area[4..12]), long(&area[12..20]), area[20])).collect();
    assert!(areas.contains(&(0, 0xa_0000, 1)), "{areas:x?}");
    assert!(areas.contains(&(0x10_0000, 63 << 20, 1)), "{areas:x?}");
}

#[test]
fn without_modules_or_arguments_there_are_none() {
    let outcome = multiboot("").run(&["--timeout", "20s"]).expect(64 + 5);
    let (_, parts) = parts(&outcome.stdout);
    assert_eq!((parts.len(), parts[0]), (3, b"test.flat".as_slice()));
}

#[test]
fn run_and_check_refuse_the_same_kernels_with_the_same_words() {
    for (key, file, why) in [
        ("kernel", multiboot_file(&[]), "boot.kernel takes a Linux bzImage"),
        ("kernel", b"\x1f\x8b\x08\0".to_vec(), "kernel: this is gzip data"),
        ("multiboot", elf(payload::spin()), "no Multiboot header"),
    ] {
        let machine = Machine::new(&format!("[boot]\n{key} = \"kernel\"\n"));
        machine.write("kernel", file);
        machine.run(&[]).refuses(HOST, why);
        let checked = machine.heddle("check").arg("--host").output().unwrap();
        let said = String::from_utf8_lossy(&checked.stderr);
        assert_eq!(checked.status.code(), Some(HOST), "{said}");
        assert!(said.contains("error[H02]") && said.contains(why), "not {why:?}: {said}");
        // Once is enough.
        assert_eq!(said.matches("H02").count(), 1, "{said}");
    }
}

#[test]
fn a_good_kernel_passes_the_check_and_a_missing_one_is_said_once() {
    let machine = multiboot("initrd = \"env\"\n");
    let check = || machine.heddle("check").arg("--host").output().unwrap();
    assert_eq!(check().status.code(), Some(0), "{:?}", check());
    std::fs::remove_file(machine.path("env")).unwrap();
    let said = String::from_utf8_lossy(&check().stderr).into_owned();
    assert_eq!(said.matches("H02").count(), 1, "{said}");
}
