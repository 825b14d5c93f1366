//! The debug exit port: a test guest ends its machine with a value.

use std::fmt;
use std::sync::Arc;

use iothread::ExitCx;

use crate::device::Device;
use crate::power::{Power, PowerRequest};

/// A write of 1, 2 or 4 bytes ends the machine with the value that was written. Reads give 0.
pub struct DebugExit {
    power: Arc<dyn Power>,
}

impl fmt::Debug for DebugExit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("DebugExit")
    }
}

impl DebugExit {
    /// The first port.
    pub const PORT: u64 = 0xf4;
    /// How many ports there are.
    pub const SIZE: u64 = 4;

    /// A port that asks `power` for the end.
    pub fn new(power: Arc<dyn Power>) -> Self {
        Self { power }
    }
}

impl Device for DebugExit {
    fn read(&self, _: u64, data: &mut [u8], _: &mut ExitCx<'_>) {
        data.fill(0);
    }

    fn write(&self, offset: u64, data: &[u8], _: &mut ExitCx<'_>) {
        if offset == 0 && matches!(data.len(), 1 | 2 | 4) {
            let mut value = [0; 4];
            value[..data.len()].copy_from_slice(data);
            self.power.request(PowerRequest::DebugExit(u32::from_le_bytes(value)));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::legacy::testing::Bench;

    #[test]
    fn the_value_is_as_wide_as_the_write() {
        let mut bench = Bench::new(DebugExit::new);
        for (data, value) in
            [(&[0xfe][..], 0xfe), (&[1, 2], 0x0201), (&[1, 2, 3, 0x84], 0x8403_0201)]
        {
            bench.write(0, data);
            assert_eq!(bench.requests.take(), [PowerRequest::DebugExit(value)]);
        }
    }

    #[test]
    fn reads_and_the_ports_behind_the_first_do_nothing() {
        let mut bench = Bench::new(DebugExit::new);
        assert_eq!(bench.read(0, 4), [0; 4]);
        bench.write(1, &[1]);
        bench.write(2, &[1, 1]);
        assert_eq!(bench.requests.take(), []);
        bench.access_all(DebugExit::SIZE, 3);
    }
}
