//! From a kernel file to the first vCPU's first instruction.
//!
//! [`inspect`] and [`Boot::load`] go the same way: the file is recognised by its content and
//! checked field by field, and the modules get their places. Only then `load` touches memory: it
//! copies kernel and modules and hands over what the protocol wants, which ends in the [`Entry`].
//!
//! | what | file |
//! | --- | --- |
//! | protocols | `pvh`, `bzimage`, `multiboot` |
//! | the vCPU's state at the start | `entry` |
//! | bytes of files, what a file is, ELF headers | `image`, `kind`, `elf` |
//! | what memory there is, and what is where | `memory_map`, `handover` |

mod bzimage;
mod elf;
mod entry;
mod handover;
mod image;
mod kind;
mod memory_map;
mod multiboot;
mod pvh;
#[cfg(test)]
mod tests;

use std::borrow::Cow;
use std::path::Path;

use config::plan::{self, Plan};
use config::units::format_size;
use vm_memory::GuestMemoryMmap;

pub use entry::Entry;

use crate::acpi;
use crate::machine::BUILT_IN_GUEST;
use crate::memory::{BOOT_DATA, LOW_RAM_END};
use handover::Handover;
use image::{Image, Piece, count};
use kind::{Kind, kind};
use memory_map::{Ram, Space};

/// What is wrong with what should be booted.
#[derive(Debug, thiserror::Error)]
#[error("{what}: {why}")]
pub struct BootError {
    what: String,
    why: String,
}

/// Where to take bytes from.
#[derive(Debug, Clone, Copy)]
pub enum Source<'a> {
    /// A regular file.
    File(&'a Path),
    /// Memory, and what to call it.
    Bytes(&'a str, &'a [u8]),
}

/// How a kernel starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protocol {
    /// As its content says: a bzImage, or an ELF with a PVH note.
    Native,
    /// Multiboot 1.
    Multiboot,
}

/// A file that the kernel finds in memory.
#[derive(Debug, Clone, Copy)]
pub struct Module<'a> {
    /// The file.
    pub source: Source<'a>,
    /// Its command line.
    pub cmdline: &'a str,
}

/// What to boot.
#[derive(Debug, Clone)]
pub struct Boot<'a> {
    /// How.
    pub protocol: Protocol,
    /// The kernel.
    pub kernel: Source<'a>,
    /// Its modules; the first is the initrd.
    pub modules: Vec<Module<'a>>,
    /// Its command line.
    pub cmdline: Cow<'a, str>,
}

/// Longest command line, without its final NUL.
const LONGEST_CMDLINE: usize = 4095;

/// A kernel of some protocol, found good.
trait Program {
    /// What to copy where.
    fn pieces(&self) -> &[Piece];

    /// Does it take this command line, and modules with these?
    fn check(&self, _: &Image<'_>, _cmdline: &str, _modules: &[&str]) -> Result<(), BootError> {
        Ok(())
    }

    /// Modules lie below this address, and who says so.
    fn modules_below(&self) -> (u64, &'static str) {
        (LOW_RAM_END, "the end of low memory")
    }

    /// Writes what the protocol hands over.
    fn hand_over(&self, placed: &Placed<'_>, to: &mut Handover<'_>) -> Result<Entry, BootError>;
}

/// What there is to hand over.
struct Placed<'a> {
    /// The kernel's file name.
    name: &'a str,
    cmdline: &'a str,
    modules: Vec<PlacedModule<'a>>,
    ram: Ram,
    pci_buses: u8,
    /// Where the ACPI tables begin.
    rsdp: u32,
}

struct PlacedModule<'a> {
    name: &'a str,
    cmdline: &'a str,
    at: u64,
    size: u64,
}

/// A kernel and modules that are good and have their places.
struct Prepared<'a> {
    kernel: Image<'a>,
    program: Box<dyn Program>,
    modules: Vec<(Image<'a>, u64)>,
}

/// Says what is wrong with the plan's kernel and modules. Reads their headers and changes nothing.
pub fn inspect(plan: &Plan) -> Result<(), BootError> {
    Boot::of(plan).prepare(Ram::with_size(plan.machine.memory)).map(drop)
}

impl<'a> Boot<'a> {
    /// What a plan wants to boot.
    pub fn of(plan: &'a Plan) -> Self {
        let boot = &plan.boot;
        let cmdline = Cow::Borrowed(boot.cmdline.as_str());
        let (protocol, kernel, cmdline) = match &boot.kernel {
            Some(plan::Kernel::Native(path)) => (Protocol::Native, Source::File(path), cmdline),
            Some(plan::Kernel::Multiboot(path)) => {
                (Protocol::Multiboot, Source::File(path), cmdline)
            }
            None => {
                let source = Source::Bytes("the built-in guest", BUILT_IN_GUEST);
                let ends = if plan.machine.debug_exit { " debug-exit" } else { "" };
                (Protocol::Native, source, cmdline + ends)
            }
        };
        let module = |module: &'a plan::Module| Module {
            source: Source::File(&module.path),
            cmdline: &module.cmdline,
        };
        Self { protocol, kernel, modules: boot.modules.iter().map(module).collect(), cmdline }
    }

    /// Puts kernel, modules, ACPI tables and boot data into memory, which is zero before.
    pub fn load(
        &self,
        memory: &GuestMemoryMmap,
        machine: &acpi::Description<'_>,
    ) -> Result<Entry, BootError> {
        let ram = Ram::of(memory);
        let Prepared { kernel, program, modules } = self.prepare(ram)?;
        for piece in program.pieces() {
            kernel.copy(*piece, memory)?;
        }
        for (image, at) in &modules {
            image.copy(Piece { offset: 0, len: image.len, at: *at, room: image.len }, memory)?;
        }
        let mut handover = Handover::new(memory);
        let rsdp = handover.put("ACPI tables", &acpi::tables(BOOT_DATA, machine), 64)?;
        let placed_modules = modules.iter().zip(&self.modules);
        let placed_modules = placed_modules.map(|((image, at), module)| PlacedModule {
            name: &image.name,
            cmdline: module.cmdline,
            at: *at,
            size: image.len,
        });
        let placed = Placed {
            name: &kernel.name,
            cmdline: &self.cmdline,
            modules: placed_modules.collect(),
            ram,
            pci_buses: machine.pci_buses,
            rsdp,
        };
        program.hand_over(&placed, &mut handover)
    }

    /// Finds kernel and modules good, and places for them.
    fn prepare(&self, ram: Ram) -> Result<Prepared<'a>, BootError> {
        check_cmdline("boot.cmdline", &self.cmdline)?;
        let kernel = Image::open(self.kernel)?;
        let program: Box<dyn Program> = match self.protocol {
            Protocol::Multiboot => Box::new(multiboot::Multiboot::parse(&kernel, ram)?),
            Protocol::Native => match kind(&kernel)? {
                Kind::Elf => Box::new(pvh::Pvh::parse(&kernel, ram)?),
                Kind::BzImage => Box::new(bzimage::BzImage::parse(&kernel, ram)?),
                Kind::Other(what) => {
                    return kernel.fail(format!(
                        "this is {what}; boot.kernel takes a Linux bzImage (vmlinuz) for x86-64 or \
                         an x86 ELF with a PVH entry"
                    ));
                }
            },
        };
        let cmdlines: Vec<_> = self.modules.iter().map(|module| module.cmdline).collect();
        program.check(&kernel, &self.cmdline, &cmdlines)?;
        let modules = self.place_modules(&*program, ram)?;
        Ok(Prepared { kernel, program, modules })
    }

    /// Opens the modules and finds places for them, as high as they can lie.
    fn place_modules(
        &self,
        program: &dyn Program,
        ram: Ram,
    ) -> Result<Vec<(Image<'a>, u64)>, BootError> {
        let (below, who) = program.modules_below();
        let mut space = Space::new(ram, below);
        let mut need = 0;
        for piece in program.pieces() {
            let end = piece.at + piece.room;
            space.take(piece.at..end);
            need = need.max(end.min(LOW_RAM_END));
        }
        let mut modules = Vec::new();
        for module in &self.modules {
            check_cmdline("boot.modules.cmdline", module.cmdline)?;
            let image = Image::open(module.source)?;
            need = image.len.saturating_add(need).saturating_add(0xfff) & !0xfff;
            let Some(at) = space.take_highest(image.len) else {
                let len = count(image.len);
                let end = below.min(ram.low_end());
                let advice = match need <= below.min(LOW_RAM_END) {
                    true => {
                        let need = format_size(need.next_multiple_of(2 << 20));
                        format!("; machine.memory = \"{need}\" would do")
                    }
                    false => String::new(),
                };
                let who = if end == below { who } else { "machine.memory" };
                return image.fail(format!(
                    "its {len} do not fit into guest memory below {end:#x} ({who}){advice}"
                ));
            };
            modules.push((image, at));
        }
        Ok(modules)
    }
}

fn check_cmdline(what: &str, cmdline: &str) -> Result<(), BootError> {
    if cmdline.len() <= LONGEST_CMDLINE && !cmdline.contains('\0') {
        return Ok(());
    }
    let len = count(cmdline.len() as u64);
    let why = format!("{len}, the most is {LONGEST_CMDLINE} without a NUL");
    Err(BootError { what: what.to_owned(), why })
}
