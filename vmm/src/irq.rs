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
        let msi = kvm_msi {
            address_lo: msi.address as u32,
            address_hi: (msi.address >> 32) as u32,
            data: msi.data,
            ..kvm_msi::default()
        };
        // Fails for an address that is no local APIC's: on hardware, too, such a message is lost.
        let _ = self.0.signal_msi(msi);
    }
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
