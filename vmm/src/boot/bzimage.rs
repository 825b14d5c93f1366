//! Linux's bzImage by the 64-bit boot protocol (Linux, Documentation/arch/x86/boot.rst).

use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use vm_memory::ByteValued;

use super::entry::{GDT, IDENTITY_TABLES, identity_tables};
use super::handover::Handover;
use super::image::{Image, Piece, count};
use super::memory_map::Ram;
use super::{BootError, Entry, Placed, Program};
use crate::memory::{LOW_RAM_END, ONE_MIB};

const SECTOR: u64 = 512;
/// Where the setup header is, in the file and in `boot_params`.
const HEADER: u64 = 0x1f1;
/// The byte at 0x201 is the length of what follows 0x202.
const HEADER_REST: u64 = 0x202;
/// Room for the setup header in `boot_params`.
const HEADER_END: u64 = 0x290;
const VERSION: u64 = 0x206;
/// Every field that is used is before this.
const NEEDED_END: u64 = 0x264;
const BOOT_FLAG: u16 = 0xaa55;
/// The first version with `xloadflags`, 2.12.
const OLDEST: u16 = 0x020c;
const LOADED_HIGH: u8 = 1;
const XLF_KERNEL_64: u16 = 1;
/// The 64-bit entry, from where the kernel is loaded.
const ENTRY_64: u64 = 0x200;
/// "Undefined" boot loader: heddle has no number of its own.
const LOADER: u8 = 0xff;

#[derive(Debug)]
pub(super) struct BzImage {
    /// The header as it is in the file, to its own end.
    raw: Vec<u8>,
    header: setup_header,
    pieces: [Piece; 1],
}

impl BzImage {
    pub(super) fn parse(image: &Image<'_>, ram: Ram) -> Result<Self, BootError> {
        let [rest]: [u8; 1] = image.array(HEADER_REST - 1, "jump (the header's length)")?;
        let end = (HEADER_REST + u64::from(rest)).min(HEADER_END);
        let version = u16::from_le_bytes(image.array(VERSION, "version")?);
        if version < OLDEST {
            let (major, minor) = (version >> 8, version & 0xff);
            return image.fail(format!(
                "version: boot protocol {major}.{minor:02}, but a 64-bit entry came with 2.12"
            ));
        }
        if end < NEEDED_END {
            return image.fail(format!(
                "jump: the setup header ends at {end:#x}, before {NEEDED_END:#x}, where init_size does"
            ));
        }
        let mut raw = vec![0; (end - HEADER) as usize];
        image.read(HEADER, &mut raw, "the setup header")?;
        let mut header = setup_header::default();
        let known = raw.len().min(size_of::<setup_header>());
        header.as_mut_slice()[..known].copy_from_slice(&raw[..known]);
        check_header(image, &header)?;
        let pieces = [place(image, &header, ram)?];
        Ok(Self { raw, header, pieces })
    }
}

fn check_header(image: &Image<'_>, header: &setup_header) -> Result<(), BootError> {
    let setup_header { boot_flag, loadflags, xloadflags, kernel_alignment, .. } = *header;
    if boot_flag != BOOT_FLAG {
        return image.fail(format!("boot_flag: {boot_flag:#x}, not {BOOT_FLAG:#x}"));
    }
    if loadflags & LOADED_HIGH == 0 {
        return image.fail(format!(
            "loadflags: {loadflags:#x} without LOADED_HIGH (bit 0): a zImage, not a bzImage"
        ));
    }
    if xloadflags & XLF_KERNEL_64 == 0 {
        return image.fail(format!(
            "xloadflags: {xloadflags:#x} without XLF_KERNEL_64 (bit 0): a 32-bit kernel, and \
             heddle starts 64-bit ones"
        ));
    }
    if !kernel_alignment.is_power_of_two() {
        return image.fail(format!("kernel_alignment: {kernel_alignment:#x} is no power of two"));
    }
    Ok(())
}

/// Finds the kernel behind its setup code, and its place in memory.
fn place(image: &Image<'_>, header: &setup_header, ram: Ram) -> Result<Piece, BootError> {
    let setup_header { setup_sects, syssize, pref_address, init_size, kernel_alignment, .. } =
        *header;
    // As old kernels have it.
    let sectors = if setup_sects == 0 { 4 } else { u64::from(setup_sects) };
    let offset = (sectors + 1) * SECTOR;
    let Some(len) = image.len.checked_sub(offset).filter(|len| *len > ENTRY_64) else {
        let len = count(image.len);
        return image.fail(format!(
            "setup_sects: {sectors} sectors of setup code, but the file ends after {len}"
        ));
    };
    let promised = u64::from(syssize) * 16;
    if promised > len {
        let (promised, len) = (count(promised), count(len));
        return image.fail(format!(
            "syssize: {promised} of kernel behind the setup code, but the file has only {len}"
        ));
    }
    if pref_address < ONE_MIB || !pref_address.is_multiple_of(kernel_alignment.into()) {
        return image.fail(format!(
            "pref_address: {pref_address:#x} is not a multiple of kernel_alignment \
             {kernel_alignment:#x} above 1 MiB"
        ));
    }
    let room = u64::from(init_size).max(len);
    if pref_address.checked_add(room).is_none_or(|end| end > LOW_RAM_END) {
        return image.fail(format!(
            "pref_address: {pref_address:#x} with init_size {init_size:#x} ends beyond \
             {LOW_RAM_END:#x}"
        ));
    }
    ram.check(pref_address, room).or_else(|why| {
        let what = format!("pref_address {pref_address:#x} with init_size {init_size:#x}");
        image.fail(format!("{what} {why}"))
    })?;
    Ok(Piece { offset, len, at: pref_address, room })
}

impl Program for BzImage {
    fn pieces(&self) -> &[Piece] {
        &self.pieces
    }

    fn check(&self, image: &Image<'_>, cmdline: &str, modules: &[&str]) -> Result<(), BootError> {
        let most = self.header.cmdline_size;
        if cmdline.len() > most as usize {
            let len = count(cmdline.len() as u64);
            return image
                .fail(format!("cmdline_size: at most {most} bytes, boot.cmdline has {len}"));
        }
        match modules {
            [] | [""] => Ok(()),
            [_] => image.fail("the initrd of a bzImage takes no command line of its own"),
            more => image.fail(format!("a bzImage takes one initrd, not {} modules", more.len())),
        }
    }

    fn modules_below(&self) -> (u64, &'static str) {
        (u64::from(self.header.initrd_addr_max) + 1, "initrd_addr_max")
    }

    fn hand_over(&self, placed: &Placed<'_>, to: &mut Handover<'_>) -> Result<Entry, BootError> {
        let mut params = boot_params { acpi_rsdp_addr: placed.rsdp.into(), ..Default::default() };
        let at = HEADER as usize;
        params.as_mut_slice()[at..at + self.raw.len()].copy_from_slice(&self.raw);
        params.hdr.type_of_loader = LOADER;
        params.hdr.cmd_line_ptr = to.put_text("boot.cmdline", placed.cmdline)?;
        if let Some(initrd) = placed.modules.first() {
            // Both fit: it lies below 4 GiB.
            params.hdr.ramdisk_image = initrd.at as u32;
            params.hdr.ramdisk_size = initrd.size as u32;
        }
        let mut table = params.e820_table;
        let map = placed.ram.map(placed.pci_buses);
        params.e820_entries = map.len() as u8;
        for (entry, (area, kind)) in table.iter_mut().zip(map) {
            let size = area.end - area.start;
            *entry = boot_e820_entry { addr: area.start, size, r#type: kind as u32 };
        }
        params.e820_table = table;
        let boot_params = to.put("boot_params", params.as_slice(), 4096)?;
        let page_tables = to.put_with("page tables", IDENTITY_TABLES, 4096, identity_tables)?;
        let descriptors: Vec<u8> = GDT.iter().flat_map(|entry| entry.to_le_bytes()).collect();
        let gdt = to.put("GDT", &descriptors, 8)?;
        let rip = self.pieces[0].at + ENTRY_64;
        Ok(Entry::Linux64 { rip, boot_params, page_tables, gdt })
    }
}
