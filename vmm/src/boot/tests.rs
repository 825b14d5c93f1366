//! Tiny images of every protocol made by hand: what is loaded and handed over, what is refused, and
//! that no change of their bytes does worse.

use std::sync::OnceLock;
use std::time::{Duration, Instant};

use linux_loader::loader::bootparam::boot_params;
use vm_memory::{ByteValued, Bytes, GuestAddress};

use super::image::{half, long, word};
use super::*;
use crate::memory::{self, GuestMemory};

const MEMORY: u64 = 64 << 20;
const CODE: &[u8] = b"\xf4code";
const ONE_CPU: acpi::Description<'_> = acpi::Description {
    apic_ids: &[0],
    rtc: true,
    serials: &[],
    pci_buses: 1,
    mmio: &[],
    nodes: &[],
};

fn put(file: &mut [u8], at: usize, bytes: &[u8]) {
    file[at..at + bytes.len()].copy_from_slice(bytes);
}

/// An ELF64 with one segment at 1 MiB and a PVH note of 8 bytes.
fn pvh() -> Vec<u8> {
    let mut file = elf64(0x10_0000, 0x10_0000);
    let note = file.len();
    put(&mut file, 56, &2u16.to_le_bytes());
    put(&mut file, 120, &4u32.to_le_bytes()); // PT_NOTE
    put(&mut file, 120 + 8, &(note as u64).to_le_bytes());
    put(&mut file, 120 + 32, &24u64.to_le_bytes());
    [4u32, 8, 18].iter().for_each(|value| file.extend(value.to_le_bytes()));
    file.extend(b"Xen\0");
    file.extend(0x10_0001u64.to_le_bytes());
    file
}

/// Its code is behind 0x200 bytes of headers.
fn elf64(vaddr: u64, entry: u64) -> Vec<u8> {
    let mut file = vec![0; 0x200];
    put(&mut file, 0, b"\x7fELF\x02\x01\x01");
    put(&mut file, 18, &62u16.to_le_bytes());
    put(&mut file, 24, &entry.to_le_bytes());
    put(&mut file, 32, &64u64.to_le_bytes());
    put(&mut file, 54, &56u16.to_le_bytes());
    put(&mut file, 56, &1u16.to_le_bytes());
    put(&mut file, 64, &1u32.to_le_bytes());
    let fields = [0x200, vaddr, 0x10_0000, CODE.len() as u64, 0x3000];
    for (nth, field) in fields.into_iter().enumerate() {
        put(&mut file, 72 + nth * 8, &field.to_le_bytes());
    }
    file.extend(CODE);
    file
}

fn elf32() -> Vec<u8> {
    let mut file = vec![0; 0x200];
    put(&mut file, 0, b"\x7fELF\x01\x01\x01");
    put(&mut file, 18, &3u16.to_le_bytes());
    put(&mut file, 24, &0x10_0002u32.to_le_bytes());
    put(&mut file, 28, &52u32.to_le_bytes());
    put(&mut file, 42, &32u16.to_le_bytes());
    put(&mut file, 44, &1u16.to_le_bytes());
    put(&mut file, 52, &1u32.to_le_bytes());
    let fields = [0x200, 0x10_0000, 0x10_0000, CODE.len() as u32, 0x3000];
    for (nth, field) in fields.into_iter().enumerate() {
        put(&mut file, 56 + nth * 4, &field.to_le_bytes());
    }
    file.extend(CODE);
    file
}

/// Puts a Multiboot header at 0x180.
fn multiboot_header(mut file: Vec<u8>, flags: u32) -> Vec<u8> {
    let sum = 0x1bad_b002u32.wrapping_add(flags).wrapping_neg();
    for (nth, field) in [0x1bad_b002, flags, sum].into_iter().enumerate() {
        put(&mut file, 0x180 + nth * 4, &field.to_le_bytes());
    }
    file
}

/// No ELF: the address fields say what to load, from 0x100 of the file on.
fn multiboot_flat() -> Vec<u8> {
    let mut file = vec![0; 0x200];
    file.extend(CODE);
    let end = 0x20_0000 + file.len() as u32 - 0x100;
    // header_addr, load_addr, load_end_addr, bss_end_addr, entry_addr
    for (nth, field) in [0x20_0080, 0x20_0000, end, end + 0x1000, 0x20_0100].iter().enumerate() {
        put(&mut file, 0x18c + nth * 4, &u32::to_le_bytes(*field));
    }
    multiboot_header(file, 0x1_0003)
}

/// One sector of setup code and `CODE` at the 64-bit entry.
fn bzimage() -> Vec<u8> {
    let mut file = vec![0; 1024 + 0x200];
    put(&mut file, 0, b"MZ");
    put(&mut file, 0x1f1, &[1]);
    put(&mut file, 0x1f4, &0x20u32.to_le_bytes()); // syssize
    put(&mut file, 0x1fe, &[0x55, 0xaa, 0xeb, 0x6a]); // boot_flag, jump
    put(&mut file, 0x202, b"HdrS");
    put(&mut file, 0x206, &0x20fu16.to_le_bytes());
    put(&mut file, 0x211, &[1]);
    put(&mut file, 0x22c, &0x1ff_ffffu32.to_le_bytes()); // initrd_addr_max
    put(&mut file, 0x230, &0x20_0000u32.to_le_bytes()); // kernel_alignment
    put(&mut file, 0x236, &1u16.to_le_bytes()); // xloadflags
    put(&mut file, 0x238, &100u32.to_le_bytes()); // cmdline_size
    put(&mut file, 0x258, &0x100_0000u64.to_le_bytes()); // pref_address
    put(&mut file, 0x260, &0x80_0000u32.to_le_bytes()); // init_size
    file.extend(CODE);
    file
}

/// Every good image with how it starts.
fn images() -> [(Protocol, Vec<u8>); 5] {
    [
        (Protocol::Native, pvh()),
        (Protocol::Native, bzimage()),
        (Protocol::Multiboot, multiboot_header(elf32(), 3)),
        (Protocol::Multiboot, multiboot_header(elf64(0x10_0000, 0x10_0000), 0)),
        (Protocol::Multiboot, multiboot_flat()),
    ]
}

fn boot<'a>(protocol: Protocol, file: &'a [u8], modules: &[(&'a [u8], &'a str)]) -> Boot<'a> {
    let module = |&(bytes, cmdline): &(&'a [u8], &'a str)| Module {
        source: Source::Bytes("mod", bytes),
        cmdline,
    };
    Boot {
        protocol,
        kernel: Source::Bytes("kernel", file),
        modules: modules.iter().map(module).collect(),
        cmdline: "hello".into(),
    }
}

fn loaded(boot: &Boot<'_>) -> (GuestMemory, Entry) {
    let memory = memory::allocate(MEMORY, memory::Backing::Shared).unwrap();
    let entry = boot.load(&memory, &ONE_CPU).unwrap();
    (memory, entry)
}

fn refused(protocol: Protocol, file: &[u8]) -> String {
    static MEM: OnceLock<GuestMemory> = OnceLock::new();
    let memory = MEM.get_or_init(|| memory::allocate(MEMORY, memory::Backing::Shared).unwrap());
    boot(protocol, file, &[]).load(memory, &ONE_CPU).unwrap_err().to_string()
}

fn bytes(memory: &GuestMemory, at: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    memory.read_slice(&mut bytes, GuestAddress(at)).unwrap();
    bytes
}

fn text(memory: &GuestMemory, at: u64) -> String {
    let bytes = bytes(memory, at, 4096);
    let end = bytes.iter().position(|byte| *byte == 0).unwrap();
    String::from_utf8(bytes[..end].to_vec()).unwrap()
}

#[test]
fn pvh_gets_its_start_info() {
    let file = pvh();
    let (memory, entry) =
        loaded(&boot(Protocol::Native, &file, &[(b"one", ""), (b"second", "a b")]));
    let Entry::Pvh { rip: 0x10_0001, start_info } = entry else { panic!("{entry:?}") };
    assert_eq!(bytes(&memory, 0x10_0000, 6), b"\xf4code\0");
    let info = bytes(&memory, start_info.into(), 56);
    assert_eq!((word(&info, 0), word(&info, 4), word(&info, 12)), (0x336e_c578, 1, 2));
    assert_eq!(text(&memory, long(&info, 24)), "hello");
    assert_eq!(bytes(&memory, long(&info, 32), 8), b"RSD PTR ");
    let modules = bytes(&memory, long(&info, 16), 64);
    let (first, second) = (long(&modules, 0), long(&modules, 32));
    assert_eq!((first, long(&modules, 8), long(&modules, 16)), (MEMORY - 4096, 3, 0));
    assert_eq!(bytes(&memory, first, 4), b"one\0");
    assert_eq!((second, long(&modules, 40)), (MEMORY - 8192, 6));
    assert_eq!(bytes(&memory, second, 7), b"second\0");
    assert_eq!(text(&memory, long(&modules, 48)), "a b");
    let map = bytes(&memory, long(&info, 40), 24 * word(&info, 48) as usize);
    let areas: Vec<_> =
        map.chunks(24).map(|area| (long(area, 0), long(area, 8), word(area, 16))).collect();
    assert_eq!(
        areas,
        [
            (0, 0xa_0000, 1),
            (0xe_0000, 0x2_0000, 2),
            (0x10_0000, MEMORY - 0x10_0000, 1),
            (0xe000_0000, 0x10_0000, 2)
        ]
    );
}

#[test]
fn linux_gets_its_boot_params() {
    let file = bzimage();
    let initrd = [7; 5000];
    let (memory, entry) = loaded(&boot(Protocol::Native, &file, &[(&initrd, "")]));
    let Entry::Linux64 { rip: 0x100_0200, boot_params: params, page_tables, gdt } = entry else {
        panic!("{entry:?}")
    };
    assert_eq!(bytes(&memory, 0x100_0200, 6), b"\xf4code\0");
    assert_eq!(page_tables & 0xfff, 0);
    assert_eq!(bytes(&memory, gdt.into(), 24)[16..], 0x00af_9b00_0000_ffff_u64.to_le_bytes());
    let page = bytes(&memory, params.into(), 4096);
    assert_eq!(bytes(&memory, long(&page, 0x70), 8), b"RSD PTR ");
    assert_eq!(page[0x1f1..0x202], file[0x1f1..0x202], "the header is copied");
    assert_eq!(page[0x210], 0xff, "type_of_loader");
    assert_eq!(half(&page, 0x206), 0x20f);
    assert_eq!(long(&page, 0x258), 0x100_0000);
    assert_eq!(text(&memory, word(&page, 0x228).into()), "hello");
    // Below initrd_addr_max, not at the end of memory.
    let (image, size) = (u64::from(word(&page, 0x218)), word(&page, 0x21c));
    assert_eq!((image, size), (0x200_0000 - 8192, 5000));
    assert_eq!(bytes(&memory, image, 5001), [initrd.as_slice(), &[0]].concat());
    assert_eq!(page[0x1e8], 4, "e820_entries");
    assert_eq!(long(&page, 0x2d0 + 40), 0x10_0000);
    assert_eq!(long(&page, 0x2d0 + 48), MEMORY - 0x10_0000);
    assert_eq!(word(&page, 0x2d0 + 56), 1);
    assert_eq!(page.len(), boot_params::default().as_slice().len());
}

#[test]
fn multiboot_gets_its_information() {
    let mut to_the_end = multiboot_flat();
    put(&mut to_the_end, 0x194, &[0; 8]);
    for (file, rip, at) in [
        (multiboot_header(elf32(), 3), 0x10_0002, 0x10_0000),
        (multiboot_header(elf64(0x10_0000, 0x10_0001), 0), 0x10_0001, 0x10_0000),
        // A kernel that is linked high and gives its entry there.
        (multiboot_header(elf64(u64::MAX << 20, (u64::MAX << 20) + 3), 0), 0x10_0003, 0x10_0000),
        (multiboot_header(elf64(u64::MAX << 20, 0x10_0004), 0), 0x10_0004, 0x10_0000),
        (multiboot_flat(), 0x20_0100, 0x20_0100),
        // Without load_end_addr and bss_end_addr: the whole file.
        (to_the_end, 0x20_0100, 0x20_0100),
    ] {
        let modules: &[(&[u8], &str)] = &[(b"A=1\n", ""), (b"second", "a b")];
        let (memory, entry) = loaded(&boot(Protocol::Multiboot, &file, modules));
        let Entry::Multiboot { rip: found, info } = entry else { panic!("{entry:?}") };
        assert_eq!(found, rip);
        assert_eq!(bytes(&memory, at, 6), b"\xf4code\0");
        let info = bytes(&memory, info.into(), 116);
        assert_eq!(word(&info, 0), 1 | 4 | 8 | 64 | 512);
        assert_eq!((word(&info, 4), word(&info, 8)), (640, 63 << 10));
        assert_eq!(text(&memory, word(&info, 16).into()), "kernel hello");
        assert_eq!(word(&info, 20), 2);
        let list = bytes(&memory, word(&info, 24).into(), 32);
        for (nth, (content, string)) in
            [(&b"A=1\n"[..], "mod"), (b"second", "mod a b")].into_iter().enumerate()
        {
            let (start, end) = (word(&list, nth * 16), word(&list, nth * 16 + 4));
            assert_eq!(start & 0xfff, 0);
            assert_eq!(bytes(&memory, start.into(), (end - start) as usize), content);
            assert_eq!(text(&memory, word(&list, nth * 16 + 8).into()), string);
        }
        let map = bytes(&memory, word(&info, 48).into(), word(&info, 44) as usize);
        let areas: Vec<_> = map
            .chunks(24)
            .map(|area| (word(area, 0), long(area, 4), long(area, 12), word(area, 20)))
            .collect();
        assert_eq!(areas[2], (20, 0x10_0000, MEMORY - 0x10_0000, 1));
        assert_eq!(areas.len(), 4);
        assert!(text(&memory, word(&info, 64).into()).starts_with("heddle "));
    }
}

#[test]
fn the_field_that_is_wrong_is_named_with_its_value() {
    let with = |mut file: Vec<u8>, at: usize, bytes: &[u8]| {
        put(&mut file, at, bytes);
        file
    };
    let linux = |at, bytes: &[u8]| (Protocol::Native, with(bzimage(), at, bytes));
    let flat =
        |at, value: u32| (Protocol::Multiboot, with(multiboot_flat(), at, &value.to_le_bytes()));
    let flags = |flags| (Protocol::Multiboot, multiboot_header(elf32(), flags));
    let elf = |at, bytes: &[u8]| (Protocol::Native, with(pvh(), at, bytes));
    let note = pvh().len() - 24;
    let cut = |mut file: Vec<u8>, len| {
        file.truncate(len);
        file
    };
    for ((protocol, file), why) in [
        (
            linux(0x1f1, &[200]),
            "setup_sects: 200 sectors of setup code, but the file ends after 1,541 bytes",
        ),
        (linux(0x1f1, &[0]), "setup_sects: 4 sectors"),
        (
            linux(0x1f4, &[0xff]),
            "syssize: 4,080 bytes of kernel behind the setup code, but the file has only 517 bytes",
        ),
        (linux(0x1fe, &[0]), "boot_flag: 0xaa00"),
        (linux(0x201, &[0x61]), "jump: the setup header ends at 0x263, before 0x264"),
        (linux(0x206, &[0x0b]), "version: boot protocol 2.11"),
        (linux(0x211, &[0xfe]), "loadflags: 0xfe without LOADED_HIGH"),
        (linux(0x236, &[0xfe]), "xloadflags: 0xfe without XLF_KERNEL_64"),
        (linux(0x230, &[0; 4]), "kernel_alignment: 0x0"),
        (linux(0x230, &[3]), "kernel_alignment: 0x200003"),
        (linux(0x230, &[0, 0, 0, 2]), "pref_address: 0x1000000 is not a multiple"),
        (linux(0x258, &[0xff; 8]), "pref_address: 0xffffffffffffffff"),
        (linux(0x258, &[0; 8]), "pref_address: 0x0"),
        (linux(0x258, &[0, 0, 0, 0, 1]), "pref_address: 0x100000000 with init_size"),
        (linux(0x260, &[0xff; 4]), "init_size 0xffffffff"),
        (linux(0x263, &[4]), "machine.memory = \"88M\" or more, this machine has 64M"),
        (linux(0x238, &[4, 0, 0, 0]), "cmdline_size: at most 4 bytes, boot.cmdline has 5 bytes"),
        (
            (Protocol::Native, cut(bzimage(), 0x240)),
            "the setup header: 123 bytes at 0x1f1, but the file ends after 576 bytes",
        ),
        (elf(note + 4, &[7]), "n_descsz 7, not 4 or 8"),
        (elf(note + 4, &[0xff; 4]), "n_descsz: 4294967295 is beyond"),
        (elf(note, &[0xff; 4]), "n_namesz: 4294967295 is beyond"),
        (elf(note + 16, &[0xff; 4]), "XEN_ELFNOTE_PHYS32_ENTRY: 0xffffffff is in no segment"),
        (elf(note + 20, &[1]), "XEN_ELFNOTE_PHYS32_ENTRY: 0x100100001 is in no segment"),
        (elf(120, &[1]), "segment 1: p_filesz 0x18 is more than p_memsz 0x0"),
        (elf(104, &[0, 0, 0, 4]), "\"66M\" or more, this machine has 64M"),
        (
            (Protocol::Native, multiboot_header(elf32(), 3)),
            "it has a Multiboot header: name it as boot.multiboot",
        ),
        (
            (Protocol::Multiboot, pvh()),
            "no Multiboot header (magic 0x1badb002) in the first 8 KiB of this ELF",
        ),
        ((Protocol::Multiboot, bzimage()), "this Linux bzImage, which boot.kernel takes"),
        (flags(4), "flags: 0x4 asks for a video mode"),
        (flags(0x80), "flags: 0x80 asks for what"),
        (flat(0x188, 0), "checksum: 0x0 of the Multiboot header at 0x180 makes the sum 0x1bae"),
        (flat(0x18c, 0), "load_addr: 0x200000 is above header_addr 0x0"),
        (
            flat(0x18c, 0x30_0000),
            "load_addr: 0x200000 is 0x100000 bytes before header_addr, but the header is at 0x180",
        ),
        (flat(0x194, 1), "load_end_addr: 0x1 is below load_addr"),
        (
            flat(0x194, 0x20_1000),
            "load_end_addr: 0x201000: 4,096 bytes at 0x100, but the file ends after 517 bytes",
        ),
        (flat(0x198, 0x20_0001), "bss_end_addr: 0x200001 is below"),
        (
            flat(0x198, 0x7000_0000),
            "load_addr 0x200000 with 0x6fe00000 bytes needs machine.memory = \"1792M\"",
        ),
        (flat(0x19c, 0), "entry_addr: 0x0 is not in"),
        (
            (Protocol::Multiboot, cut(multiboot_flat(), 0x190)),
            "promises address fields (bit 16), but the header at 0x180 ends",
        ),
        (
            (Protocol::Multiboot, multiboot_header(vec![0; 0x200], 0)),
            "without addresses (bit 16), and no ELF",
        ),
        (
            (Protocol::Multiboot, multiboot_header(elf64(0x10_0000, 3), 0)),
            "e_entry: 0x3 is in no segment",
        ),
        (
            (Protocol::Native, b"hello\n".to_vec()),
            "this is a text file; boot.kernel takes a Linux bzImage",
        ),
        ((Protocol::Multiboot, b"\x1f\x8b\x08".to_vec()), "of gzip data"),
    ] {
        let said = refused(protocol, &file);
        assert!(said.starts_with("kernel: ") && said.contains(why), "not {why:?}: {said}");
    }
}

#[test]
fn the_tables_of_many_vcpus_leave_room_for_every_protocol() {
    let apic_ids: Vec<u32> = (0..1024).collect();
    let longest = "x".repeat(LONGEST_CMDLINE);
    for (protocol, file) in images() {
        let memory = memory::allocate(MEMORY, memory::Backing::Shared).unwrap();
        let mut boot = boot(protocol, &file, &[]);
        if !file.starts_with(b"MZ") {
            boot.cmdline = longest.as_str().into();
        }
        let entry = boot.load(&memory, &acpi::Description { apic_ids: &apic_ids, ..ONE_CPU });
        assert!(entry.is_ok(), "{protocol:?}: {entry:?}");
    }
}

#[test]
fn segments_may_not_overlap_and_may_be_empty() {
    let mut file = multiboot_header(elf64(0x10_0000, 0x10_0000), 0);
    put(&mut file, 56, &2u16.to_le_bytes());
    let mut second = |paddr: u64, memsz: u64| {
        let header = file[64..120].to_vec();
        put(&mut file, 120, &header);
        put(&mut file, 120 + 24, &paddr.to_le_bytes());
        put(&mut file, 120 + 32, &0u64.to_le_bytes());
        put(&mut file, 120 + 40, &memsz.to_le_bytes());
        let memory = memory::allocate(MEMORY, memory::Backing::Shared).unwrap();
        let loaded = boot(Protocol::Multiboot, &file, &[(b"", "")]).load(&memory, &ONE_CPU);
        loaded.map(|_| ()).map_err(|error| error.to_string())
    };
    assert_eq!(second(0x10_3000, 0x1000), Ok(()));
    assert_eq!(second(u64::MAX, 0), Ok(()));
    for paddr in [0x10_2fff, 0x10_0000] {
        let said = second(paddr, 0x1000).unwrap_err();
        assert!(said.contains(&format!("segment 1: p_paddr {paddr:#x} is in another")), "{said}");
    }
    assert!(second(MEMORY, 1).unwrap_err().contains("machine.memory"));
}

#[test]
fn the_pvh_note_is_found_among_others() {
    let load = |file: &[u8]| {
        let memory = memory::allocate(MEMORY, memory::Backing::Shared).unwrap();
        boot(Protocol::Native, file, &[]).load(&memory, &ONE_CPU).map_err(|error| error.to_string())
    };
    let good = pvh();
    let (headers, note) = good.split_at(good.len() - 24);
    // Five bytes of name and of description, each with its padding.
    let mut other: Vec<u8> = [5u32, 5, 18].iter().flat_map(|word| word.to_le_bytes()).collect();
    other.extend(b"Xen\0\0\0\0\0Xen\0\0");
    let with_notes = |notes: &[&[u8]]| {
        let notes = notes.concat();
        let mut file = headers.to_vec();
        put(&mut file, 120 + 32, &(notes.len() as u64).to_le_bytes());
        [file, notes].concat()
    };
    let entry = load(&with_notes(&[&other, &[0; 3], note])).unwrap();
    assert!(matches!(entry, Entry::Pvh { rip: 0x10_0001, .. }), "{entry:?}");
    for notes in [&[other.as_slice()][..], &[&other, &[0; 3]], &[]] {
        let said = load(&with_notes(notes)).unwrap_err();
        assert!(said.contains("no PVH entry"), "{said}");
    }
    let said = load(&with_notes(&[&other, &[0; 3], &note[..11]])).unwrap_err();
    assert!(said.contains("a note's header ends after 11 bytes"), "{said}");
}

#[test]
fn linux_without_init_size_takes_its_own_size() {
    let mut file = bzimage();
    put(&mut file, 0x260, &0u32.to_le_bytes());
    put(&mut file, 0x22c, &0x100_1000u32.to_le_bytes()); // initrd_addr_max
    let (memory, entry) = loaded(&boot(Protocol::Native, &file, &[(b"initrd", "")]));
    let Entry::Linux64 { boot_params, .. } = entry else { panic!("{entry:?}") };
    let page = bytes(&memory, boot_params.into(), 4096);
    // Not over the kernel, which takes one page.
    assert_eq!(word(&page, 0x218), 0xff_f000);
    assert_eq!(bytes(&memory, 0x100_0200, 5), CODE);
}

#[test]
fn modules_that_do_not_fit_or_are_not_taken_are_refused() {
    let load = |file: &[u8], modules: &[(&[u8], &str)], mib: u64| {
        let memory = memory::allocate(mib << 20, memory::Backing::Shared).unwrap();
        let loaded = boot(Protocol::Native, file, modules).load(&memory, &ONE_CPU);
        loaded.map(|_| ()).map_err(|error| error.to_string())
    };
    let (linux, pvh, large) = (bzimage(), pvh(), vec![1; 15 << 20]);
    // The kernel takes 16 to 24 MiB: 15 MiB are left below.
    assert_eq!(load(&linux, &[(&large, "")], 24), Ok(()));
    let more = [large.as_slice(), &[0]].concat();
    let said = load(&linux, &[(&more, "")], 64).unwrap_err();
    assert!(said.contains("15,728,641 bytes do not fit"), "{said}");
    assert!(said.ends_with("below 0x2000000 (initrd_addr_max)"), "{said}");
    let said = load(&pvh, &[(&more, "")], 16).unwrap_err();
    assert!(said.contains("below 0x1000000 (machine.memory)"), "{said}");
    assert!(said.ends_with("; machine.memory = \"18M\" would do"), "{said}");
    assert_eq!(load(&pvh, &[(&more, "")], 18), Ok(()));
    let said = load(&linux, &[(b"", ""), (b"", "")], 64).unwrap_err();
    assert!(said.contains("takes one initrd, not 2 modules"), "{said}");
    let said = load(&linux, &[(b"", "x")], 64).unwrap_err();
    assert!(said.contains("no command line of its own"), "{said}");
    let text = "x".repeat(4096);
    let said = load(&pvh, &[(b"", &text)], 64).unwrap_err();
    assert_eq!(said, "boot.modules.cmdline: 4,096 bytes, the most is 4095 without a NUL");
    let said = load(&pvh, &[(b"".as_slice(), &text[1..]); 40], 64).unwrap_err();
    assert!(said.contains("of boot data, but only"), "{said}");
}

/// Values that break arithmetic.
const NASTY: [u64; 22] = [
    0,
    1,
    3,
    0x7f,
    0xff,
    0x200,
    0xfff,
    0x1000,
    0x8000,
    0xffff,
    0xa_0000,
    0xe_0000,
    0x10_0000,
    MEMORY,
    MEMORY - 1,
    0x7fff_ffff,
    0x8000_0000,
    0xc000_0000,
    0xffff_f000,
    0xffff_ffff,
    1 << 63,
    u64::MAX,
];

/// A generator of numbers (xorshift): the same ones each time.
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, end: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % end as u64) as usize
    }

    /// Changes a few bits or fields, or cuts the end off.
    fn change(&mut self, file: &mut Vec<u8>) {
        for _ in 0..=self.below(3) {
            let at = self.below(file.len().max(1));
            match self.below(8) {
                0 => file.truncate(at),
                1 | 2 => {
                    let bit = 1 << self.below(8);
                    file.get_mut(at).into_iter().for_each(|byte| *byte ^= bit);
                }
                _ => {
                    let width = 1 << self.below(4);
                    let at = at / width * width;
                    let value = NASTY[self.below(NASTY.len())].to_le_bytes();
                    // The setup header's fields are not all aligned.
                    let at = at + usize::from(file.starts_with(b"MZ") && self.below(4) == 0);
                    if at + width <= file.len() {
                        put(file, at, &value[..width]);
                    }
                }
            }
        }
    }
}

#[test]
fn changed_images_are_loaded_or_refused_and_nothing_worse() {
    const ROUNDS: usize = 6000;
    let memory = memory::allocate(MEMORY, memory::Backing::Shared).unwrap();
    let mut numbers = Numbers(0x9e37_79b9_7f4a_7c15);
    for (protocol, image) in images() {
        let (mut good, mut bad) = (0, 0);
        for _ in 0..ROUNDS {
            let mut file = image.clone();
            numbers.change(&mut file);
            let began = Instant::now();
            let modules: &[(&[u8], &str)] = &[(b"module", "")];
            match boot(protocol, &file, modules).load(&memory, &ONE_CPU) {
                Ok(_) => good += 1,
                Err(error) => {
                    bad += 1;
                    assert!(error.to_string().len() < 400, "{error}");
                }
            }
            assert!(began.elapsed() < Duration::from_secs(5), "{file:?}");
        }
        assert!(good > ROUNDS / 20 && bad > ROUNDS / 20, "{protocol:?}: {good} good, {bad} bad");
    }
}

#[test]
fn images_that_end_too_early_are_refused_wherever_they_end() {
    let memory = memory::allocate(MEMORY, memory::Backing::Shared).unwrap();
    for (protocol, image) in images() {
        // What is loaded ends with the file, so the last bytes are the code's or a note's.
        for end in 0..image.len() - 5 {
            let loaded = boot(protocol, &image[..end], &[]).load(&memory, &ONE_CPU);
            assert!(loaded.is_err(), "{protocol:?}: {end} of {} bytes", image.len());
        }
    }
}
