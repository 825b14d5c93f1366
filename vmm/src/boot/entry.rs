//! The state the first vCPU starts in, by protocol.

use kvm_bindings::{kvm_dtable, kvm_regs, kvm_segment, kvm_sregs};
use kvm_ioctls::VcpuFd;

/// Where and how the first vCPU starts. What a protocol wants of registers follows from its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Entry {
    /// 32-bit protected mode without paging.
    Pvh {
        /// Instruction pointer.
        rip: u32,
        /// Address of the `hvm_start_info`, for EBX.
        start_info: u32,
    },
    /// 32-bit protected mode without paging, EAX with Multiboot's number.
    Multiboot {
        /// Instruction pointer.
        rip: u32,
        /// Address of the Multiboot information, for EBX.
        info: u32,
    },
    /// 64-bit mode, the first 4 GiB mapped one to one.
    Linux64 {
        /// Instruction pointer.
        rip: u64,
        /// Address of the `boot_params`, for RSI.
        boot_params: u32,
        /// Address of [`identity_tables`].
        page_tables: u32,
        /// Address of [`GDT`].
        gdt: u32,
    },
}

/// What EAX holds when a Multiboot kernel starts.
const MULTIBOOT_LOADED: u64 = 0x2bad_b002;

const CODE: u16 = 0x10;
const DATA: u16 = 0x18;
/// Null, unused, 64-bit code (0x10) and data (0x18), as Linux's 64-bit entry wants them.
pub(super) const GDT: [u64; 4] = [0, 0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff];

const PAGE: usize = 4096;
/// Bytes of [`identity_tables`]: one table of level 4, one of level 3, four of level 2.
pub(super) const IDENTITY_TABLES: usize = 6 * PAGE;
const PRESENT_WRITABLE: u64 = 3;
const LARGE: u64 = 0x80;

// Intel SDM, volume 3, 2.5 (CR0, CR4) and 2.2.1 (EFER).
const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;

/// Page tables to be put at `at`: the first 4 GiB one to one, by pages of 2 MiB.
pub(super) fn identity_tables(at: u64) -> Vec<u8> {
    let table = |nth: u64| (at + nth * PAGE as u64) | PRESENT_WRITABLE;
    let mut entries = vec![0; IDENTITY_TABLES / 8];
    entries[0] = table(1);
    for gib in 0..4 {
        entries[512 + gib] = table(2 + gib as u64);
    }
    for (nth, entry) in (0..).zip(&mut entries[1024..]) {
        *entry = nth << 21 | LARGE | PRESENT_WRITABLE;
    }
    entries.iter().flat_map(|entry: &u64| entry.to_le_bytes()).collect()
}

impl Entry {
    /// Puts a vCPU into this state.
    pub fn enter(self, vcpu: &VcpuFd) -> Result<(), kvm_ioctls::Error> {
        let mut sregs = vcpu.get_sregs()?;
        self.set_sregs(&mut sregs);
        vcpu.set_sregs(&sregs)?;
        vcpu.set_regs(&self.regs())
    }

    fn regs(self) -> kvm_regs {
        let regs = kvm_regs { rflags: 2, ..kvm_regs::default() };
        match self {
            Self::Pvh { rip, start_info } => {
                kvm_regs { rip: rip.into(), rbx: start_info.into(), ..regs }
            }
            Self::Multiboot { rip, info } => {
                kvm_regs { rip: rip.into(), rax: MULTIBOOT_LOADED, rbx: info.into(), ..regs }
            }
            Self::Linux64 { rip, boot_params, .. } => {
                kvm_regs { rip, rsi: boot_params.into(), ..regs }
            }
        }
    }

    fn set_sregs(self, sregs: &mut kvm_sregs) {
        let (code, data) = match self {
            Self::Pvh { .. } | Self::Multiboot { .. } => {
                (sregs.cr0, sregs.cr4, sregs.efer) = (CR0_PE | CR0_ET, 0, 0);
                (flat(0x08, 11), flat(0x10, 3))
            }
            Self::Linux64 { page_tables, gdt, .. } => {
                sregs.cr3 = page_tables.into();
                sregs.cr4 = CR4_PAE;
                sregs.efer = EFER_LME | EFER_LMA;
                sregs.cr0 = CR0_PE | CR0_ET | CR0_PG;
                let limit = size_of_val(&GDT) as u16 - 1;
                sregs.gdt = kvm_dtable { base: gdt.into(), limit, ..kvm_dtable::default() };
                sregs.idt = kvm_dtable::default();
                (kvm_segment { l: 1, db: 0, ..flat(CODE, 11) }, flat(DATA, 3))
            }
        };
        sregs.cs = code;
        (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
        // A busy TSS of the smallest size.
        sregs.tr = kvm_segment { limit: 0x67, type_: 11, s: 0, db: 0, g: 0, ..flat(0x20, 11) };
    }
}

/// A segment of all 4 GiB.
fn flat(selector: u16, type_: u8) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector,
        type_,
        present: 1,
        dpl: 0,
        db: 1,
        s: 1,
        l: 0,
        g: 1,
        ..kvm_segment::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_protocol_has_its_registers() {
        let state = |entry: Entry| {
            let mut sregs = kvm_sregs::default();
            entry.set_sregs(&mut sregs);
            (entry.regs(), sregs)
        };
        let (regs, sregs) = state(Entry::Pvh { rip: 1, start_info: 2 });
        assert_eq!((regs.rip, regs.rbx, regs.rax, regs.rflags), (1, 2, 0, 2));
        assert_eq!((sregs.cr0, sregs.efer, sregs.cs.db, sregs.cs.l), (0x11, 0, 1, 0));
        let (regs, sregs) = state(Entry::Multiboot { rip: 1, info: 2 });
        assert_eq!((regs.rip, regs.rbx, regs.rax), (1, 2, 0x2bad_b002));
        assert_eq!((sregs.cr0, sregs.cr4, sregs.cs.db), (0x11, 0, 1));
        let (regs, sregs) =
            state(Entry::Linux64 { rip: 1, boot_params: 2, page_tables: 0x3000, gdt: 4 });
        assert_eq!((regs.rip, regs.rsi, regs.rbx), (1, 2, 0));
        assert_eq!((sregs.cr0, sregs.cr3, sregs.cr4), (0x8000_0011, 0x3000, 0x20));
        assert_eq!((sregs.efer, sregs.cs.l, sregs.cs.db, sregs.cs.selector), (0x500, 1, 0, 0x10));
        assert_eq!((sregs.ss.selector, sregs.gdt.base, sregs.gdt.limit), (0x18, 4, 31));
    }

    /// Walks the tables as a CPU does.
    #[test]
    fn the_first_4_gib_are_mapped_to_themselves() {
        let base = 0xf_0000;
        let tables = identity_tables(base);
        let entry = |table: u64, nth: u64| {
            let at = (table - base + nth * 8) as usize;
            u64::from_le_bytes(tables[at..at + 8].try_into().unwrap())
        };
        for address in [0, 0x10_0000, 0x1ff_ffff, 0xbfff_ffff, 0xffff_ffff_u64] {
            let third = entry(base, address >> 39 & 511);
            let second = entry(third & !0xfff, address >> 30 & 511);
            let page = entry(second & !0xfff, address >> 21 & 511);
            assert!([third, second, page].iter().all(|entry| entry & 3 == 3));
            assert_eq!(page & 0x80, 0x80);
            assert_eq!((page & !0x1f_ffff) + (address & 0x1f_ffff), address);
        }
        assert_eq!(entry(entry(base, 0) & !0xfff, 4), 0, "nothing above");
    }
}
