//! Devices of the PC that have no bus to be found on: fixed ports, and small.
//!
//! Each has its first port as `PORT` and the number of its ports as `SIZE`. Port 0xcf9, the reset
//! control register, is in [`ConfigPorts`](crate::pci::ConfigPorts), whose ports it lies among.

pub mod debug_exit;
pub mod i8042;
pub mod panic_port;
pub mod power_ports;
pub mod rtc;
pub mod serial;

pub use debug_exit::DebugExit;
pub use i8042::I8042;
pub use panic_port::PanicPort;
pub use power_ports::PowerPorts;
pub use rtc::Rtc;
pub use serial::Serial;

#[cfg(test)]
mod testing {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering::SeqCst};

    use crossbeam_queue::SegQueue;
    use iothread::VcpuLoop;

    use crate::device::Device;
    use crate::irq::IrqLine;
    use crate::power::{Power, PowerRequest};

    /// A line of which only the level is known.
    #[derive(Default)]
    pub struct Wire(AtomicBool);

    impl IrqLine for Wire {
        fn set(&self, high: bool) {
            self.0.store(high, SeqCst);
        }
    }

    impl Wire {
        pub fn is_high(&self) -> bool {
            self.0.load(SeqCst)
        }
    }

    /// Keeps the requests.
    #[derive(Default)]
    pub struct Requests(SegQueue<PowerRequest>);

    impl Power for Requests {
        fn request(&self, request: PowerRequest) {
            self.0.push(request);
        }
    }

    impl Requests {
        pub fn take(&self) -> Vec<PowerRequest> {
            std::iter::from_fn(|| self.0.pop()).collect()
        }
    }

    /// A device with the power switch it works, as a guest sees it.
    pub struct Bench<D> {
        pub device: D,
        pub requests: Arc<Requests>,
        vcpu: VcpuLoop,
    }

    impl<D: Device> Bench<D> {
        pub fn new(make: impl FnOnce(Arc<dyn Power>) -> D) -> Self {
            let requests = Arc::new(Requests::default());
            let device = make(Arc::clone(&requests) as Arc<dyn Power>);
            Self { device, requests, vcpu: VcpuLoop::enter() }
        }

        pub fn read(&mut self, offset: u64, len: usize) -> Vec<u8> {
            let mut data = vec![0xaa; len];
            self.device.read(offset, &mut data, &mut self.vcpu.exit());
            data
        }

        pub fn write(&mut self, offset: u64, data: &[u8]) {
            self.device.write(offset, data, &mut self.vcpu.exit());
        }

        /// Accesses of every width at every offset of a range of `size`.
        pub fn access_all(&mut self, size: u64, fill: u8) {
            for len in [1, 2, 4, 8] {
                for offset in 0..(size + 1).saturating_sub(len as u64) {
                    self.write(offset, &[fill; 8][..len]);
                    self.read(offset, len);
                }
            }
        }
    }
}
