//! Where virtio-mmio devices are: an address and an interrupt line for each.

use devices::virtio::mmio::SIZE;

use crate::memory::MMIO_DEVICES;

/// The inputs of the IOAPIC that no other device has. Taken are 0 (PIT), 1 (i8042), 2 (cascade),
/// 3 and 4 (serial ports), 8 (RTC), 9 (SCI), 12 (mouse) and 13 (FPU).
const LINES: [u32; 15] = [5, 6, 7, 10, 11, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23];

/// There is no line left: no two devices share one.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "\"mmio\" has interrupt lines for {} devices, and {name} is one more: use \"pci\"",
    LINES.len()
)]
pub struct NoLine {
    name: String,
}

/// One virtio-mmio device, as ACPI describes it and as the built-in guest is told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MmioSlot {
    /// The device's name in the VM file, for example `disk.data`.
    pub name: String,
    /// The first address of its registers, [`SIZE`] bytes.
    pub base: u64,
    /// Its input of the IOAPIC: edge-triggered, active high, not shared.
    pub gsi: u32,
}

impl MmioSlot {
    /// The slot of the `nth` device.
    pub fn new(nth: usize, name: &str) -> Result<Self, NoLine> {
        let name = name.to_owned();
        let Some(&gsi) = LINES.get(nth) else { return Err(NoLine { name }) };
        Ok(Self { name, base: MMIO_DEVICES.start + SIZE * nth as u64, gsi })
    }
}

/// The word of the built-in guest's command line that says where the devices are:
/// `mmio=ADDRESS,GSI:ADDRESS,GSI`.
pub fn cmdline(slots: &[MmioSlot]) -> String {
    let slots: Vec<_> = slots.iter().map(|slot| format!("{:#x},{}", slot.base, slot.gsi)).collect();
    format!("mmio={}", slots.join(":"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_slot_has_a_page_and_a_line_of_its_own_until_there_are_no_more() {
        let slots: Vec<_> = (0..15).map(|nth| MmioSlot::new(nth, "disk.d").unwrap()).collect();
        let error = MmioSlot::new(15, "disk.d").unwrap_err().to_string();
        assert!(error.contains("15 devices, and disk.d is one more: use \"pci\""), "{error}");
        for (slot, next) in slots.iter().zip(&slots[1..]) {
            assert_eq!(slot.base + SIZE, next.base);
            assert!(slot.gsi < next.gsi && next.gsi < 24);
        }
        assert!(MMIO_DEVICES.contains(&(slots[14].base + SIZE - 1)));
        assert_eq!(cmdline(&slots[..2]), "mmio=0xfeb00000,5:0xfeb01000,6");
    }
}
