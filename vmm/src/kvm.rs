//! The virtual machine as KVM makes it: still without memory, devices and vCPUs.

use std::sync::Arc;

use kvm_bindings::{
    KVM_CAP_X2APIC_API, KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK, KVM_X2APIC_API_USE_32BIT_IDS,
    kvm_enable_cap, kvm_pit_config,
};
use kvm_ioctls::{Kvm, VmFd};

use crate::host_error::HostError;
use crate::memory::KVM_PAGES;

/// Opens /dev/kvm.
pub fn open() -> Result<Kvm, HostError> {
    let kvm = Kvm::new().map_err(|error| {
        let advice = match error.errno() {
            libc::ENOENT => "this host has no KVM, or its module is not loaded",
            libc::EACCES => "not permitted: become a member of the group that owns it (kvm)",
            _ => "it cannot be used",
        };
        HostError::new("/dev/kvm", format!("{advice} ({error})"))
    })?;
    match kvm.get_api_version() {
        12 => Ok(kvm),
        other => Err(HostError::new("/dev/kvm", format!("API version {other}, not 12"))),
    }
}

/// Makes the machine, with the interrupt controllers and the timer that KVM has.
pub fn create_vm(kvm: &Kvm) -> Result<Arc<VmFd>, HostError> {
    let step = |what: &'static str| move |error| HostError::new(format!("KVM: {what}"), error);
    // Work that the kernel has left for this thread (of a ring that was closed, say) interrupts it.
    let vm = loop {
        match kvm.create_vm() {
            Err(error) if error.errno() == libc::EINTR => {}
            other => break other.map_err(step("KVM_CREATE_VM"))?,
        }
    };
    vm.set_identity_map_address(KVM_PAGES).map_err(step("KVM_SET_IDENTITY_MAP_ADDR"))?;
    vm.set_tss_address(KVM_PAGES as usize + 0x1000).map_err(step("KVM_SET_TSS_ADDR"))?;
    // Destinations of interrupts have 32 bits, and 255 of them is a CPU like any other.
    let wide_ids = kvm_enable_cap {
        cap: KVM_CAP_X2APIC_API,
        args: [
            (KVM_X2APIC_API_USE_32BIT_IDS | KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK).into(),
            0,
            0,
            0,
        ],
        ..kvm_enable_cap::default()
    };
    vm.enable_cap(&wide_ids).map_err(step("KVM_CAP_X2APIC_API"))?;
    vm.create_irq_chip().map_err(step("KVM_CREATE_IRQCHIP"))?;
    let pit = kvm_pit_config { flags: kvm_bindings::KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
    vm.create_pit2(pit).map_err(step("KVM_CREATE_PIT2"))?;
    Ok(Arc::new(vm))
}
