//! What is left of the keyboard controller: the wire from it to the CPU's reset.

use std::fmt;
use std::sync::Arc;

use iothread::ExitCx;

use crate::device::Device;
use crate::power::{Power, PowerRequest};

/// Pulses the reset line, output bit 0 (command 0xf0 to 0xff: the low bits that are 0 are pulsed).
const RESET: u8 = 0xfe;

/// Status: output buffer full (bit 0), input buffer empty (bit 1 is 0).
///
/// A guest that resets waits until the input buffer is empty, so that bit must not read as set;
/// with nothing at the port at all Linux would wait for 65,536 reads of it. A guest that probes for
/// a keyboard first empties the output buffer; one that cannot be emptied tells it after a few
/// reads (16 in Linux) that there is no controller, while a quiet one would have it wait half a
/// second for the answer to its first command.
const STATUS: u8 = 1;

/// The command and status port of a keyboard controller that has no keyboard. The data port, 0x60,
/// is left empty.
pub struct I8042 {
    power: Arc<dyn Power>,
}

impl fmt::Debug for I8042 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("I8042")
    }
}

impl I8042 {
    /// The first port.
    pub const PORT: u64 = 0x64;
    /// How many ports there are.
    pub const SIZE: u64 = 1;

    /// A port that asks `power` for a reset.
    pub fn new(power: Arc<dyn Power>) -> Self {
        Self { power }
    }
}

impl Device for I8042 {
    fn read(&self, _: u64, data: &mut [u8], _: &mut ExitCx<'_>) {
        data.fill(STATUS);
    }

    fn write(&self, _: u64, data: &[u8], _: &mut ExitCx<'_>) {
        if data == [RESET] {
            self.power.request(PowerRequest::Reset);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::legacy::testing::Bench;

    #[test]
    fn only_the_reset_command_resets() {
        let mut bench = Bench::new(I8042::new);
        for command in (0..=255).filter(|&command| command != RESET) {
            bench.write(0, &[command]);
        }
        assert_eq!(bench.requests.take(), []);
        bench.write(0, &[RESET]);
        assert_eq!(bench.requests.take(), [PowerRequest::Reset]);
    }

    #[test]
    fn a_guest_that_resets_need_not_wait_and_one_that_probes_finds_no_end() {
        let mut bench = Bench::new(I8042::new);
        let status = bench.read(0, 1)[0];
        assert_eq!(status & 2, 0, "commands are taken");
        assert_eq!(status & 1, 1, "there is always one more byte to read");
        bench.access_all(I8042::SIZE, RESET);
    }
}
