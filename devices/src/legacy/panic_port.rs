//! The port by which a guest says that it has panicked: the pvpanic device of QEMU.

use std::fmt;
use std::sync::Arc;

use iothread::ExitCx;

use crate::device::Device;
use crate::power::{Power, PowerRequest};

/// The guest panicked, and nothing in it will go on.
const PANICKED: u8 = 1 << 0;
/// The guest panicked, and another kernel in it takes over to write a dump.
const CRASH_LOADED: u8 = 1 << 1;

/// One port: reads tell which events it knows, writes are events.
pub struct PanicPort {
    power: Arc<dyn Power>,
}

impl fmt::Debug for PanicPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PanicPort")
    }
}

impl PanicPort {
    /// The first port.
    pub const PORT: u64 = 0x505;
    /// How many ports there are.
    pub const SIZE: u64 = 1;

    /// A port that tells `power` of a panic.
    pub fn new(power: Arc<dyn Power>) -> Self {
        Self { power }
    }
}

impl Device for PanicPort {
    fn read(&self, _: u64, data: &mut [u8], _: &mut ExitCx<'_>) {
        data.fill(0);
        data[0] = PANICKED | CRASH_LOADED;
    }

    fn write(&self, _: u64, data: &[u8], _: &mut ExitCx<'_>) {
        if data[0] & PANICKED != 0 {
            self.power.request(PowerRequest::Panic);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::legacy::testing::Bench;

    #[test]
    fn only_a_panic_that_nothing_survives_ends_the_machine() {
        let mut bench = Bench::new(PanicPort::new);
        assert_eq!(bench.read(0, 1), [3]);
        for event in [0, CRASH_LOADED, 0xfc] {
            bench.write(0, &[event]);
        }
        assert_eq!(bench.requests.take(), []);
        bench.write(0, &[PANICKED]);
        assert_eq!(bench.requests.take(), [PowerRequest::Panic]);
        bench.access_all(PanicPort::SIZE, 0);
    }
}
