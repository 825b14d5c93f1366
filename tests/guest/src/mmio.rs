//! Virtio over MMIO (virtio 1.2, 4.2): where the command line says the devices are, their
//! registers, and their interrupt lines.

use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;
use core::sync::atomic::Ordering;

use crate::cpu::{Cpu, LINES, VECTOR_LINES, VECTOR_SHARED};
use crate::mem::{self, Mmio};
use crate::virtio::{Notify, Registers, RingAddresses};

const PAGE: u64 = 0x1000;
const MAGIC: u32 = 0x7472_6976;

const DEVICE_ID: usize = 0x008;
const DEVICE_FEATURES: usize = 0x010;
const DEVICE_FEATURES_SEL: usize = 0x014;
const DRIVER_FEATURES: usize = 0x020;
const DRIVER_FEATURES_SEL: usize = 0x024;
const QUEUE_SEL: usize = 0x030;
const QUEUE_NUM_MAX: usize = 0x034;
const QUEUE_NUM: usize = 0x038;
const QUEUE_READY: usize = 0x044;
const QUEUE_NOTIFY: usize = 0x050;
const INTERRUPT_STATUS: usize = 0x060;
const INTERRUPT_ACK: usize = 0x064;
const STATUS: usize = 0x070;
const QUEUE_DESC: usize = 0x080;
const QUEUE_DRIVER: usize = 0x090;
const QUEUE_DEVICE: usize = 0x0a0;
const CONFIG_GENERATION: usize = 0x0fc;
const CONFIG: u64 = 0x100;

/// What the command line says of a device.
#[derive(Clone, Copy)]
pub struct Slot {
    pub address: u64,
    /// The input of the IOAPIC.
    pub line: u8,
}

impl Slot {
    /// Reads `ADDRESS,LINE:ADDRESS,LINE`, the addresses in hexadecimal digits after `0x`.
    pub fn parse_all(text: &str) -> Option<Vec<Slot>> {
        let parse = |text: &str| {
            let (address, line) = text.split_once(',')?;
            let address = u64::from_str_radix(address.strip_prefix("0x")?, 16).ok()?;
            let line = line.parse().ok().filter(|line| usize::from(*line) < LINES)?;
            address.is_multiple_of(PAGE).then_some(Slot { address, line })
        };
        text.split(':').map(parse).collect()
    }
}

/// A device that answers at its slot.
pub struct Device {
    pub slot: Slot,
    page: Mmio,
    io_apic: IoApic,
}

impl Device {
    /// Looks whether there is one.
    pub fn find(slot: Slot, io_apic: IoApic) -> Result<Self, String> {
        if !mem::map(slot.address, PAGE) {
            return Err("out of reach".into());
        }
        // SAFETY: just mapped, and the command line says that it is a device's.
        let page = unsafe { Mmio::new(slot.address, PAGE as usize) };
        let (magic, version) = (page.read32(0), page.read32(4));
        if magic != MAGIC || version != 2 {
            return Err(format!("magic {magic:#x} and version {version}: no virtio 1 device"));
        }
        Ok(Device { slot, page, io_apic })
    }

    /// The kind of device, virtio 1.2, 5.
    pub fn id(&self) -> u16 {
        self.page.read32(DEVICE_ID) as u16
    }

    pub fn open(&self) -> impl Registers + use<> {
        Page { page: self.page, line: self.slot.line, io_apic: self.io_apic }
    }
}

/// The registers of a device.
struct Page {
    page: Mmio,
    line: u8,
    io_apic: IoApic,
}

impl Registers for Page {
    fn status(&self) -> u8 {
        self.page.read32(STATUS) as u8
    }

    fn set_status(&self, status: u8) {
        self.page.write32(STATUS, status.into());
    }

    fn offered(&self, half: u32) -> u32 {
        self.page.write32(DEVICE_FEATURES_SEL, half);
        self.page.read32(DEVICE_FEATURES)
    }

    fn accept(&self, half: u32, features: u32) {
        self.page.write32(DRIVER_FEATURES_SEL, half);
        self.page.write32(DRIVER_FEATURES, features);
    }

    fn config(&self) -> Option<Mmio> {
        Some(self.page.part(CONFIG as usize))
    }

    fn generation(&self) -> u32 {
        self.page.read32(CONFIG_GENERATION)
    }

    fn num_queues(&self) -> u16 {
        (0..u16::MAX).take_while(|&queue| self.queue_size(queue) != 0).count() as u16
    }

    fn queue_size(&self, queue: u16) -> u16 {
        self.page.write32(QUEUE_SEL, queue.into());
        self.page.read32(QUEUE_NUM_MAX) as u16
    }

    /// The line is for everything.
    fn route_config(&self, _: &Cpu) -> Result<(), String> {
        Ok(())
    }

    /// The line goes to CPU 0, which is there until the end and passes its interrupts on.
    fn route_queue(&self, _: u16, cpu: &Cpu, _: u8) -> Result<u8, String> {
        if cpu.index.load(Ordering::Relaxed) != 0 {
            return Ok(VECTOR_SHARED);
        }
        let vector = VECTOR_LINES + self.line;
        self.io_apic.route(self.line, cpu.apic_id.load(Ordering::Relaxed), vector)?;
        Ok(vector)
    }

    fn enable_queue(&self, queue: u16, size: u16, at: RingAddresses) {
        self.page.write32(QUEUE_SEL, queue.into());
        self.page.write32(QUEUE_NUM, size.into());
        self.page.write64(QUEUE_DESC, at.desc);
        self.page.write64(QUEUE_DRIVER, at.driver);
        self.page.write64(QUEUE_DEVICE, at.device);
        self.page.write32(QUEUE_READY, 1);
    }

    fn notify(&self, _: u16) -> Notify {
        Notify { registers: self.page, offset: QUEUE_NOTIFY, wide: true }
    }

    fn acknowledge(&self) -> Option<u32> {
        let causes = self.page.read32(INTERRUPT_STATUS);
        if causes != 0 {
            self.page.write32(INTERRUPT_ACK, causes);
        }
        Some(causes)
    }
}

/// The first I/O APIC (Intel 82093AA).
#[derive(Clone, Copy)]
pub struct IoApic(Mmio);

impl IoApic {
    const SELECT: usize = 0x00;
    const WINDOW: usize = 0x10;
    const MASKED: u32 = 1 << 16;

    /// The one at `address`.
    pub fn new(address: u64) -> Result<Self, String> {
        if !mem::map(address, PAGE) {
            return Err("the I/O APIC is out of reach".into());
        }
        // SAFETY: just mapped, and the firmware says that it is the I/O APIC.
        Ok(IoApic(unsafe { Mmio::new(address, 0x20) }))
    }

    fn write(&self, register: u32, value: u32) {
        self.0.write32(Self::SELECT, register);
        self.0.write32(Self::WINDOW, value);
    }

    /// Sends the rising edges of an input to a vector of one CPU.
    fn route(&self, line: u8, apic_id: u32, vector: u8) -> Result<(), String> {
        if apic_id > 0xfe {
            return Err(format!("no line reaches the CPU with APIC id {apic_id}"));
        }
        let entry = 0x10 + 2 * u32::from(line);
        self.write(entry, Self::MASKED);
        self.write(entry + 1, apic_id << 24);
        self.write(entry, vector.into());
        Ok(())
    }
}
