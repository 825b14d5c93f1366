//! Interrupts and doorbells by KVM.

#![expect(unsafe_code, reason = "a borrowed eventfd is shown to kvm-ioctls as its own type")]

use std::io;
use std::mem::ManuallyDrop;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd};
use std::sync::Arc;

use devices::irq::{Doorbell, Doorbells, IrqEdge, IrqLine, Msi, MsiSender};
use kvm_bindings::kvm_msi;
use kvm_ioctls::{IoEventAddress, NoDatamatch, VmFd};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// The interrupt controllers in the kernel.
#[derive(Debug, Clone)]
pub struct KvmIrq(pub Arc<VmFd>);

impl MsiSender for KvmIrq {
    fn send(&self, msi: Msi) {
        // Fails if no CPU takes it: on hardware, too, such a message is lost.
        let _ = for_kvm(msi).map(|msi| self.0.signal_msi(msi));
    }
}

/// A guest's message as KVM takes it with `KVM_X2APIC_API_USE_32BIT_IDS`: bits 7:0 of the
/// destination in address bits 19:12, bits 31:8 in the same bits of the upper half.
///
/// A guest without interrupt remapping has room for 8 bits only (Intel SDM vol. 3, §11.11.1). Where
/// [`cpuid`](crate::cpuid) offers KVM_FEATURE_MSI_EXT_DEST_ID, bits 14:8 are in address bits 11:5,
/// which hardware reserves. `None`: another address, which is no local APIC's.
fn for_kvm(msi: Msi) -> Option<kvm_msi> {
    const LOCAL_APICS: u64 = 0xfee;
    const EXTENDED: u32 = 0xfe0;
    if msi.address >> 20 != LOCAL_APICS {
        return None;
    }
    let address = msi.address as u32;
    Some(kvm_msi {
        address_lo: address & !EXTENDED,
        address_hi: (address & EXTENDED) << 3,
        data: msi.data,
        ..kvm_msi::default()
    })
}

impl Doorbells for KvmIrq {
    fn connect(&self, doorbell: Doorbell, fd: BorrowedFd<'_>) -> io::Result<()> {
        let at = IoEventAddress::Mmio(doorbell.address);
        borrowed(fd, |fd| match doorbell.value {
            Some(value) => self.0.register_ioevent(fd, &at, value),
            None => self.0.register_ioevent(fd, &at, NoDatamatch),
        })
    }

    fn disconnect(&self, doorbell: Doorbell, fd: BorrowedFd<'_>) -> io::Result<()> {
        let at = IoEventAddress::Mmio(doorbell.address);
        borrowed(fd, |fd| match doorbell.value {
            Some(value) => self.0.unregister_ioevent(fd, &at, value),
            None => self.0.unregister_ioevent(fd, &at, NoDatamatch),
        })
    }
}

fn borrowed(
    fd: BorrowedFd<'_>,
    f: impl FnOnce(&EventFd) -> Result<(), kvm_ioctls::Error>,
) -> io::Result<()> {
    // SAFETY: the fd stays open while it is borrowed, and is not closed here.
    let fd = ManuallyDrop::new(unsafe { EventFd::from_raw_fd(fd.as_raw_fd()) });
    f(&fd).map_err(|error| io::Error::from_raw_os_error(error.errno()))
}

/// One input of the interrupt controllers.
#[derive(Debug, Clone)]
pub struct KvmLine {
    /// The machine.
    pub vm: Arc<VmFd>,
    /// Which input.
    pub gsi: u32,
}

impl IrqLine for KvmLine {
    fn set(&self, high: bool) {
        // Fails only without an irqchip, and this machine has one.
        let _ = self.vm.set_irq_line(self.gsi, high);
    }
}

/// One input of the IOAPIC that takes edges, behind an irqfd: an interrupt is one `write`.
#[derive(Debug)]
pub struct KvmEdge(EventFd);

impl KvmEdge {
    /// Connects a new eventfd with the input `gsi`, for as long as it lives.
    pub fn new(vm: &VmFd, gsi: u32) -> io::Result<Self> {
        let eventfd = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        vm.register_irqfd(&eventfd, gsi)
            .map_err(|error| io::Error::from_raw_os_error(error.errno()))?;
        Ok(Self(eventfd))
    }
}

impl IrqEdge for KvmEdge {
    fn pulse(&self) {
        // Fails only if KVM leaves 2^64 - 2 signals lying, and then one more says nothing new.
        let _ = self.0.write(1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The destination as the kernel's `x86_msi_msg_get_destid` puts it together.
    fn destination(address: u64) -> Option<u32> {
        let msi = for_kvm(Msi { address, data: 0x40 })?;
        assert_eq!((msi.data, msi.address_hi & 0xff), (0x40, 0));
        Some(msi.address_lo >> 12 & 0xff | msi.address_hi)
    }

    #[test]
    fn fifteen_bits_of_the_destination_reach_kvm() {
        for id in [0, 1, 0x7f, 0xff, 0x100, 0x101, 0x1ff, 0x3ff, 0x400, 0x5aa5, 0x7fff] {
            let address = 0xfee0_0000 | (id & 0xff) << 12 | (id >> 8) << 5;
            assert_eq!(destination(address.into()), Some(id), "{address:#x}");
        }
    }

    #[test]
    fn redirection_hint_and_destination_mode_stay() {
        let msi = for_kvm(Msi { address: 0xfee0_102c, data: 0 }).unwrap();
        assert_eq!((msi.address_lo, msi.address_hi), (0xfee0_100c, 0x100));
    }

    #[test]
    fn a_message_to_another_address_goes_nowhere() {
        for address in [0, 0xfed0_0000, 0xfef0_0000, 0x1_fee0_0000, 0x100_fee0_1000] {
            assert_eq!(destination(address), None, "{address:#x}");
        }
    }
}
