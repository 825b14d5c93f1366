//! Files that are not what they should be: a clear error, the documented exit code, soon.

use std::fs::File;
use std::process::Command;
use std::time::{Duration, Instant};

use tests::machine::{Machine, Running, text};
use tests::payload::{self, elf, layout};
use tests::program::heddle;
use vmm::acpi::Description;
use vmm::boot::{Boot, BootError, Entry, Protocol, Source};
use vmm::memory;

const INVALID: i32 = 3;
const HOST: i32 = 4;

fn make_fifo(machine: &Machine, name: &str) {
    let made = Command::new("mkfifo").arg(machine.path(name)).status().unwrap();
    assert!(made.success());
}

/// A machine next to which there are a directory, a FIFO, an empty file and one of a few bytes.
fn among_strange_files(toml: &str) -> Machine {
    let machine = Machine::new(toml);
    std::fs::create_dir(machine.path("directory")).unwrap();
    make_fifo(&machine, "fifo");
    machine.write("empty", "");
    machine.write("short", "a few bytes");
    machine.write("kernel", elf(payload::spin()));
    machine
}

#[test]
fn a_machine_file_that_is_no_file_is_3() {
    let machine = among_strange_files("");
    let run = |path: &str| Running::start(Command::new(heddle()).args(["run", path])).wait();
    run(text(&machine.path("directory"))).refuses(INVALID, "this is a directory");
    run(text(&machine.path("fifo"))).refuses(INVALID, "not a regular file");
    run("/dev/zero").refuses(INVALID, "not a regular file");
    run(text(&machine.path("missing"))).refuses(INVALID, "No such file");
    run(text(&machine.path("kernel"))).refuses(INVALID, "not UTF-8");
    machine.write("deep", "a = ".to_owned() + &"[".repeat(1 << 20));
    run(text(&machine.path("deep"))).refuses(INVALID, "deep");
}

#[test]
fn a_disk_that_is_no_disk_is_4() {
    for (path, why) in [
        ("directory", "directory"),
        ("fifo", "neither a regular file nor a block device"),
        ("/dev/zero", "neither a regular file nor a block device"),
        ("/dev/tty", "disk.data: /dev/tty"),
        ("missing", "No such file"),
        ("empty", "multiple of 512"),
        ("short", "multiple of 512"),
        ("short/below", "Not a directory"),
    ] {
        for read_only in [false, true] {
            let toml = format!("[disk.data]\npath = \"{path}\"\nread-only = {read_only}\n");
            let outcome = among_strange_files(&toml).run(&[]).refuses(HOST, why);
            assert!(outcome.stderr.contains("disk.data"), "{}", outcome.stderr);
        }
    }
}

#[test]
fn a_kernel_or_initrd_that_is_no_file_is_4() {
    for (path, why) in [
        ("directory", "not a regular file"),
        ("fifo", "not a regular file"),
        ("/dev/zero", "not a regular file"),
        ("missing", "No such file"),
        ("empty", "this is an empty file"),
        ("short", "this is a text file"),
    ] {
        let toml = format!("[boot]\nkernel = \"{path}\"\n");
        among_strange_files(&toml).run(&[]).refuses(HOST, why);
    }
    for (path, why) in [
        ("directory", "not a regular file"),
        ("fifo", "not a regular file"),
        ("/dev/zero", "not a regular file"),
        ("missing", "No such file"),
        ("large", "do not fit into guest memory"),
    ] {
        let toml = format!("[boot]\nkernel = \"kernel\"\ninitrd = \"{path}\"\n");
        let machine = among_strange_files(&toml);
        File::create(machine.path("large")).unwrap().set_len(1 << 40).unwrap();
        machine.run(&[]).refuses(HOST, why);
    }
}

#[test]
fn serial_output_to_what_cannot_take_it_is_4() {
    for path in ["directory", "fifo", "missing/below"] {
        let toml = format!("[serial.com1]\nout = {{ file = \"{path}\" }}\n");
        among_strange_files(&toml).run(&[]).refuses(HOST, "serial.com1");
    }
}

#[test]
fn memory_that_the_host_cannot_give_is_4() {
    Machine::new("[machine]\nmemory = \"64T\"\n").run(&[]).refuses(HOST, "machine.memory");
}

#[test]
fn wrong_keys_and_values_are_3_with_place_and_nearest_name_all_at_once() {
    let machine = Machine::new(
        "[machine]\nmemroy = \"1G\"\n[thread.io]\ncpus = \"5-2\"\n\
         [disk.a]\nsize = \"1M\"\nplace = \"oi\"\n",
    );
    let said = machine.run(&[]).refuses(INVALID, "unknown key `machine.memroy`").stderr;
    for part in [
        "vm.toml:2:1",
        "did you mean `memory`?",
        "vm.toml:4:8",
        "runs backwards",
        "vm.toml:7:9",
        "there is no thread `oi`",
        "did you mean `io`?",
    ] {
        assert!(said.contains(part), "not {part:?}: {said}");
    }
}

#[test]
fn queues_that_are_placed_twice_or_do_not_exist_are_3() {
    for (queues, why) in [("1", "queue 1 of `disk.a` placed twice"), ("2-9", "no queues 2-9")] {
        let toml = format!(
            "[machine]\ncpus = 2\n[disk.a]\nsize = \"1M\"\n\
             [[disk.a.place]]\nqueues = \"0-1\"\non = \"main\"\n\
             [[disk.a.place]]\nqueues = \"{queues}\"\non = \"vcpu\"\n"
        );
        Machine::new(&toml).run(&[]).refuses(INVALID, why);
    }
}

#[test]
fn one_image_for_two_writers_is_3() {
    let machine = Machine::new("[disk.a]\npath = \"image\"\n[disk.b]\npath = \"./image\"\n");
    machine.write("image", vec![0; 1 << 20]);
    machine.run(&[]).refuses(INVALID, "uses the same file as disk.a");
    // Under two names, only the host can tell.
    let machine = Machine::new("[disk.a]\npath = \"image\"\n[disk.b]\npath = \"alias\"\n");
    machine.write("image", vec![0; 1 << 20]);
    std::fs::hard_link(machine.path("image"), machine.path("alias")).unwrap();
    machine.run(&[]).refuses(HOST, "disk.b: its image is the same file as that of disk.a");
    assert_eq!(machine.heddle("check").arg("--host").status().unwrap().code(), Some(HOST));
}

#[test]
fn an_existing_image_keeps_its_size_and_heddle_says_so() {
    let machine = Machine::new("[disk.a]\npath = \"image\"\nsize = \"8M\"\n");
    machine.write("image", vec![0; 4 << 20]);
    let said = machine.run(&[]).expect(0);
    assert!(said.stderr.contains("not granted: disk.a: wanted 8388608 bytes"), "{}", said.stderr);
    assert!(said.stderr.contains("exists and has 4194304"), "{}", said.stderr);
}

#[test]
fn a_disk_that_shrinks_fails_the_guest_and_heddle_tells() {
    for (engine, read_only) in [("io_uring", false), ("io_uring", true), ("sync", true)] {
        let machine = Machine::new(&format!(
            "[machine]\ncpus = 2\n[boot]\ncmdline = \"requests=10000000\"\n\
             [disk.data]\npath = \"image\"\nread-only = {read_only}\nengine = \"{engine}\"\n"
        ));
        let image = File::create(machine.path("image")).unwrap();
        image.set_len(16 << 20).unwrap();
        let mut running = machine.start(&["--json"]);
        // The guest has listed its devices and now uses them.
        running.wait_for("virtio-blk");
        // A write makes it longer again, so once may not be enough.
        while !running.has_ended() {
            image.set_len(512).unwrap();
            std::thread::yield_now();
        }
        let outcome = running.wait().expect(1);
        assert!(outcome.took < Duration::from_secs(30), "{:?}", outcome.took);
        let report = outcome.json();
        assert_eq!(report["reason"], "verdict", "{report}");
        assert_eq!(report["guest"]["verdict"], "failed", "{report}");
        // What was written can also come back as zeros, when the image is longer again.
        if read_only {
            let why = report["guest"]["reason"].as_str().unwrap();
            assert!(why.contains("I/O error"), "{why}");
        }
    }
}

// ---------------------------------------------------------------- kernels

/// Loads kernels into 64 MiB of guest memory, which never takes long.
fn loader() -> impl Fn(&[u8]) -> Result<Entry, BootError> {
    let memory = memory::allocate(64 << 20, memory::Backing::Shared).unwrap();
    move |bytes| {
        let began = Instant::now();
        let kernel = Source::Bytes("kernel", bytes);
        let boot =
            Boot { protocol: Protocol::Native, kernel, modules: Vec::new(), cmdline: "".into() };
        let loaded = boot.load(&memory, &Description { apic_ids: &[0], ..Description::default() });
        assert!(began.elapsed() < Duration::from_secs(5), "{:?}: {loaded:?}", began.elapsed());
        loaded
    }
}

/// A good kernel with `bytes` at `at`.
fn changed(at: usize, bytes: &[u8]) -> Vec<u8> {
    let mut file = elf(payload::fault());
    file[at..at + bytes.len()].copy_from_slice(bytes);
    file
}

/// Changes of a good kernel that must be refused, and a part of what must be said.
fn absurd() -> Vec<(Vec<u8>, &'static str)> {
    let long = |at, value: u64| changed(at, &value.to_le_bytes());
    let word = |at, value: u16| changed(at, &value.to_le_bytes());
    let (load, note) = (layout::LOAD, layout::NOTE);
    vec![
        (changed(0, b"MZ"), "an EFI or Windows program"),
        (changed(4, &[1]), "e_phentsize: 0"),
        (changed(4, &[3]), "EI_CLASS"),
        (changed(5, &[2]), "little-endian"),
        (word(18, 183), "x86"),
        (word(54, 0), "e_phentsize"),
        (word(54, 57), "e_phentsize"),
        (word(56, 0), "e_phnum"),
        (word(56, 0xffff), "e_phnum"),
        (word(56, 100), "e_phnum"),
        (long(load + 24, 0x10_0000 - 1), "p_paddr 0xfffff"),
        (long(32, u64::MAX), "e_phoff"),
        (long(32, 1 << 40), "e_phoff"),
        (long(load + 8, u64::MAX), "p_offset"),
        (long(load + 8, 1 << 50), "p_offset"),
        (long(load + 24, u64::MAX - 4), "p_paddr"),
        (long(load + 24, 0xc000_0000), "p_paddr"),
        (long(load + 24, 0xf_ffff), "p_paddr"),
        (long(load + 32, u64::MAX), "p_filesz"),
        (long(load + 32, 1 << 30), "p_filesz"),
        (long(load + 40, 0), "p_memsz"),
        (long(load + 40, u64::MAX), "p_memsz"),
        (long(load + 40, 1 << 40), "p_memsz"),
        (long(note + 8, 1 << 62), "p_offset"),
        (long(note + 32, u64::MAX), "p_filesz"),
        (changed(note, &[6]), "no PVH entry"),
        (changed(layout::NOTE_BYTES, &[5]), "n_descsz: 4 is beyond"),
        (changed(layout::NOTE_BYTES, &[0xff; 4]), "n_namesz: 4294967295 is beyond"),
        (changed(layout::NOTE_BYTES + 4, &[0xff; 4]), "n_descsz: 4294967295 is beyond"),
        (changed(layout::NOTE_BYTES + 8, &[17]), "no PVH entry"),
        (changed(layout::NOTE_BYTES + 12, b"Gnu"), "no PVH entry"),
    ]
}

#[test]
fn absurd_headers_are_refused_and_the_field_is_named() {
    let load = loader();
    assert!(load(&elf(payload::fault())).is_ok(), "the good one");
    for (nth, (file, why)) in absurd().into_iter().enumerate() {
        match load(&file) {
            Ok(entry) => panic!("{nth}, {why}: {entry:?}"),
            Err(error) => assert!(error.to_string().contains(why), "{nth}, not {why:?}: {error}"),
        }
    }
}

#[test]
fn heddle_itself_refuses_absurd_headers_with_4() {
    let machine = Machine::booting(payload::fault(), "", "[machine]\nmemory = \"64M\"\n");
    for (file, why) in absurd().into_iter().step_by(3) {
        machine.write("kernel", &file);
        machine.run(&["--timeout", "10s"]).refuses(HOST, why);
    }
}

#[test]
fn a_kernel_that_ends_too_early_is_refused_wherever_it_ends() {
    let load = loader();
    let file = elf(payload::fault());
    for end in 0..file.len() {
        assert!(load(&file[..end]).is_err(), "{end} of {} bytes", file.len());
    }
}

/// A generator of numbers (xorshift): the same ones each time.
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, end: usize) -> usize {
        (self.next() % end as u64) as usize
    }
}

#[test]
fn headers_with_random_changes_are_loaded_or_refused_and_nothing_worse() {
    const EDGES: [u64; 12] = [
        0,
        1,
        u64::MAX,
        1 << 63,
        0x7fff_ffff_ffff_ffff,
        0xffff_ffff,
        0x8000_0000,
        0xffff,
        0x1000,
        0x10_0000,
        0xe_0000,
        64 << 20,
    ];
    let load = loader();
    let mut numbers = Numbers(0x9e37_79b9_7f4a_7c15);
    let (mut loaded, mut refused) = (0, 0);
    for _ in 0..5000 {
        let mut file = elf(payload::fault());
        for _ in 0..=numbers.below(4) {
            let width = [1, 2, 4, 8][numbers.below(4)];
            let at = numbers.below(layout::CODE / width) * width;
            let value = match numbers.below(3) {
                0 => numbers.next(),
                1 => EDGES[numbers.below(EDGES.len())],
                _ => numbers.next() >> numbers.below(64),
            };
            file[at..at + width].copy_from_slice(&value.to_le_bytes()[..width]);
        }
        match load(&file) {
            Ok(_) => loaded += 1,
            Err(_) => refused += 1,
        }
    }
    assert!(loaded > 100 && refused > 100, "{loaded} loaded and {refused} refused try little");
}

#[test]
fn a_kernel_that_starts_nowhere_is_refused() {
    // The note's last word is the entry.
    let file = changed(layout::CODE - 4, &0xffff_fff0_u32.to_le_bytes());
    let machine = Machine::booting(payload::fault(), "", "");
    machine.write("kernel", file);
    machine.run(&[]).refuses(HOST, "XEN_ELFNOTE_PHYS32_ENTRY: 0xfffffff0 is in no segment");
}
