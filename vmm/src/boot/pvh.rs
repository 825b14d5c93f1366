//! PVH: an ELF whose note says where to start it in 32-bit mode, with an `hvm_start_info` in EBX
//! (Xen, docs/misc/pvh.pandoc).

use linux_loader::loader::elf::start_info::{
    hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info,
};
use vm_memory::ByteValued;

use super::elf::Elf;
use super::handover::Handover;
use super::image::{Image, Piece};
use super::memory_map::Ram;
use super::{BootError, Entry, Placed, Program, multiboot};

const XEN_ELFNOTE_PHYS32_ENTRY: u32 = 18;
/// hvm_start_info: "xEn3" and the first version with a memory map.
const XEN_START_MAGIC: u32 = 0x336e_c578;
const XEN_START_VERSION: u32 = 1;

#[derive(Debug)]
pub(super) struct Pvh {
    rip: u32,
    pieces: Vec<Piece>,
}

impl Pvh {
    pub(super) fn parse(image: &Image<'_>, ram: Ram) -> Result<Self, BootError> {
        let elf = Elf::parse(image)?;
        let Some((desc, descsz)) = elf.note(image, b"Xen\0", XEN_ELFNOTE_PHYS32_ENTRY)? else {
            let hint = match multiboot::is_there(image)? {
                true => "it has a Multiboot header: name it as boot.multiboot",
                false => "Linux has one with CONFIG_PVH=y; a bzImage does without",
            };
            return image.fail(format!("no PVH entry (ELF note XEN_ELFNOTE_PHYS32_ENTRY); {hint}"));
        };
        if descsz != 4 && descsz != 8 {
            return image.fail(format!("XEN_ELFNOTE_PHYS32_ENTRY: n_descsz {descsz}, not 4 or 8"));
        }
        let pieces = elf.pieces(image, ram)?;
        let entry = u64::from_le_bytes(desc);
        let rip = u32::try_from(entry)
            .ok()
            .filter(|_| pieces.iter().any(|piece| entry.wrapping_sub(piece.at) < piece.room));
        match rip {
            Some(rip) => Ok(Self { rip, pieces }),
            None => {
                let what = "XEN_ELFNOTE_PHYS32_ENTRY";
                image.fail(format!("{what}: {entry:#x} is in no segment"))
            }
        }
    }
}

impl Program for Pvh {
    fn pieces(&self) -> &[Piece] {
        &self.pieces
    }

    fn hand_over(&self, placed: &Placed<'_>, to: &mut Handover<'_>) -> Result<Entry, BootError> {
        let mut modules = Vec::new();
        for module in &placed.modules {
            let cmdline = match module.cmdline {
                "" => 0,
                text => to.put_text("boot.modules.cmdline", text)?,
            };
            let entry = hvm_modlist_entry {
                paddr: module.at,
                size: module.size,
                cmdline_paddr: cmdline.into(),
                ..hvm_modlist_entry::default()
            };
            modules.extend_from_slice(entry.as_slice());
        }
        let map = placed.ram.map(placed.pci_buses);
        let mut areas = Vec::new();
        for (area, kind) in &map {
            let entry = hvm_memmap_table_entry {
                addr: area.start,
                size: area.end - area.start,
                type_: *kind as u32,
                ..hvm_memmap_table_entry::default()
            };
            areas.extend_from_slice(entry.as_slice());
        }
        let cmdline = to.put_text("boot.cmdline", placed.cmdline)?;
        let modlist = match placed.modules.as_slice() {
            [] => 0,
            _ => to.put("module list", &modules, 8)?,
        };
        let memmap = to.put("memory map", &areas, 8)?;
        let info = hvm_start_info {
            magic: XEN_START_MAGIC,
            version: XEN_START_VERSION,
            nr_modules: placed.modules.len() as u32,
            modlist_paddr: modlist.into(),
            cmdline_paddr: cmdline.into(),
            rsdp_paddr: placed.rsdp.into(),
            memmap_paddr: memmap.into(),
            memmap_entries: map.len() as u32,
            ..hvm_start_info::default()
        };
        let start_info = to.put("start info", info.as_slice(), 8)?;
        Ok(Entry::Pvh { rip: self.rip, start_info })
    }
}
