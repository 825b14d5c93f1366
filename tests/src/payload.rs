//! Guests of a few instructions, and the ELF around them.

#![expect(unsafe_code, reason = "assembly, read as bytes")]

use std::arch::global_asm;

global_asm!(include_str!("payload.s"));

macro_rules! payloads {
    ($($(#[$doc:meta])* $name:ident = $symbol:ident;)*) => {$(
        $(#[$doc])*
        pub fn $name() -> &'static [u8] {
            unsafe extern "C" { safe static $symbol: u32; }
            let length = $symbol as usize;
            // SAFETY: payload.s puts this many bytes behind each length.
            unsafe { std::slice::from_raw_parts((&raw const $symbol).add(1).cast(), length) }
        }
    )*};
}

payloads! {
    /// Never leaves the CPU.
    spin = payload_spin;
    /// Ends by a triple fault.
    fault = payload_fault;
    /// Sends its command line by COM1 and powers off.
    cmdline = payload_cmdline;
    /// Sends "ready", then what it gets, by COM1; "q" powers off, Ctrl-R resets, "t" is a
    /// triple fault.
    echo = payload_echo;
    /// Sends "ready" by COM1; when the power button is pressed, sends "!" and powers off.
    button = payload_button;
    /// Sends by COM1 without end.
    flood = payload_flood;
    /// Powers off by what the ACPI tables say.
    acpi_power_off = payload_acpi_power_off;
    /// Resets by what the ACPI tables say.
    acpi_reset = payload_acpi_reset;
    /// Sends what it finds on PCI, see [`PciFunction`], and powers off.
    pci = payload_pci;
    /// Started by Multiboot: sends what it got by COM1, see [`parts`], and ends by debug-exit 5.
    multiboot = payload_multiboot;
    /// Starts a second CPU; sends "A" from that and then "B" from the first, and powers off.
    two_cpus = payload_two_cpus;
}

/// Code that writes to ports and then sleeps for good: `(port, bytes, value)`.
pub fn port_writes(writes: &[(u16, usize, u32)]) -> Vec<u8> {
    let mut code = Vec::new();
    for &(port, bytes, value) in writes {
        code.push(0xba); // mov edx, port
        code.extend(u32::from(port).to_le_bytes());
        code.push(0xb8); // mov eax, value
        code.extend(value.to_le_bytes());
        code.extend::<&[u8]>(match bytes {
            1 => &[0xee],       // out dx, al
            2 => &[0x66, 0xef], // out dx, ax
            _ => &[0xef],       // out dx, eax
        });
    }
    code.extend([0xfa, 0xf4, 0xeb, 0xfc]); // cli; hlt; back to cli
    code
}

/// Understands the output of [`multiboot`]: EAX, then command line, string and content of each
/// module, boot loader's name, memory map.
pub fn parts(mut said: &[u8]) -> (u32, Vec<&[u8]>) {
    let long = |said: &mut &[u8]| {
        let (bytes, rest) = said.split_first_chunk().expect("four bytes");
        *said = rest;
        u32::from_le_bytes(*bytes)
    };
    let eax = long(&mut said);
    let mut parts = Vec::new();
    while !said.is_empty() {
        let length = long(&mut said) as usize;
        let (part, rest) = said.split_at(length);
        parts.push(part);
        said = rest;
    }
    (eax, parts)
}

/// What [`pci`] says of one function.
#[derive(Debug)]
pub struct PciFunction<'a> {
    /// Its device number on bus 0.
    pub device: u8,
    /// Its configuration space.
    pub config: &'a [u8],
    /// `num_queues` of a virtio device, read from the start of BAR 0.
    pub queues: u16,
}

impl<'a> PciFunction<'a> {
    /// Understands the output of [`pci`].
    pub fn parse(said: &'a [u8]) -> Vec<Self> {
        let (records, rest) = said.as_chunks::<{ 1 + 256 + 2 }>();
        assert!(rest.is_empty(), "{} bytes too many", rest.len());
        let function = |record: &'a [u8; 259]| Self {
            device: record[0],
            config: &record[1..257],
            queues: u16::from_le_bytes([record[257], record[258]]),
        };
        records.iter().map(function).collect()
    }

    /// The 16 bits at `at`.
    pub fn word(&self, at: usize) -> u16 {
        u16::from_le_bytes([self.config[at], self.config[at + 1]])
    }

    /// The 32 bits at `at`.
    pub fn long(&self, at: usize) -> u32 {
        u32::from(self.word(at)) | u32::from(self.word(at + 2)) << 16
    }

    /// Where its capabilities with this id are.
    pub fn capabilities(&self, id: u8) -> Vec<usize> {
        let next = |at: &usize| Some(usize::from(self.config[at + 1]));
        // 48 of them fill the space: a list that is longer has a loop.
        std::iter::successors(Some(usize::from(self.config[0x34])), next)
            .take_while(|at| *at != 0)
            .take(48)
            .filter(|at| self.config[*at] == id)
            .collect()
    }
}

/// Offsets in the file that [`elf`] makes.
pub mod layout {
    /// The ELF header.
    pub const HEADER: usize = 0;
    /// The program header of the code, PT_LOAD.
    pub const LOAD: usize = 64;
    /// The program header of the note, PT_NOTE.
    pub const NOTE: usize = LOAD + 56;
    /// The note.
    pub const NOTE_BYTES: usize = NOTE + 56;
    /// The code.
    pub const CODE: usize = NOTE_BYTES + 20;
}

/// Where the code is loaded and starts.
pub const ENTRY: u32 = 0x10_0000;

/// An ELF64 with a PVH note, whose only segment is `code` at [`ENTRY`].
pub fn elf(code: &[u8]) -> Vec<u8> {
    let mut file = b"\x7fELF\x02\x01\x01".to_vec();
    file.resize(16, 0);
    let put16 = |file: &mut Vec<u8>, value: u16| file.extend(value.to_le_bytes());
    let put32 = |file: &mut Vec<u8>, value: u32| file.extend(value.to_le_bytes());
    let put64 = |file: &mut Vec<u8>, value: usize| file.extend((value as u64).to_le_bytes());
    put16(&mut file, 2); // ET_EXEC
    put16(&mut file, 62); // EM_X86_64
    put32(&mut file, 1); // e_version
    put64(&mut file, ENTRY as usize); // e_entry
    put64(&mut file, layout::LOAD); // e_phoff
    put64(&mut file, 0); // e_shoff
    put32(&mut file, 0); // e_flags
    [64, 56, 2, 64, 0, 0].into_iter().for_each(|half| put16(&mut file, half));
    let segments = [(1, layout::CODE, ENTRY, code.len()), (4, layout::NOTE_BYTES, 0, 20)];
    for (kind, offset, address, size) in segments {
        put32(&mut file, kind); // p_type
        put32(&mut file, 7); // p_flags
        // p_offset, p_vaddr, p_paddr, p_filesz, p_memsz, p_align
        [offset, address as usize, address as usize, size, size, 4]
            .into_iter()
            .for_each(|value| put64(&mut file, value));
    }
    [4, 4, 18].into_iter().for_each(|value| put32(&mut file, value));
    file.extend(b"Xen\0");
    put32(&mut file, ENTRY);
    assert_eq!(file.len(), layout::CODE);
    file.extend(code);
    file
}

/// A file with a Multiboot 1 header in front of `code`, whose address fields put all of it at
/// [`ENTRY`].
pub fn multiboot_file(code: &[u8]) -> Vec<u8> {
    const MAGIC: u32 = 0x1bad_b002;
    const FLAGS: u32 = 1 << 16;
    const HEADER: u32 = 32;
    let end = ENTRY + HEADER + code.len() as u32;
    // magic, flags, checksum, header_addr, load_addr, load_end_addr, bss_end_addr, entry_addr
    let sum = MAGIC.wrapping_add(FLAGS).wrapping_neg();
    let header = [MAGIC, FLAGS, sum, ENTRY, ENTRY, end, 0, ENTRY + HEADER];
    let mut file: Vec<u8> = header.into_iter().flat_map(u32::to_le_bytes).collect();
    file.extend(code);
    file
}
