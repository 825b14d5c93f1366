//! Text on the serial port.

use core::fmt;

use crate::gate;

/// Collects text and hands it to ring 0 in large pieces. Needs no heap.
pub struct Console {
    text: [u8; 1024],
    length: usize,
}

impl Console {
    /// Sets the port up: 115200 baud, 8 bits, FIFOs on, no interrupts.
    pub fn open() -> Self {
        const COM1: u16 = 0x3f8;
        gate::out8(COM1 + 3, 0x80);
        gate::out8(COM1, 1);
        gate::out8(COM1 + 1, 0);
        gate::out8(COM1 + 3, 3);
        gate::out8(COM1 + 1, 0);
        gate::out8(COM1 + 2, 7);
        Self::reopen()
    }

    /// The port as it is, for the last words of a guest that fails.
    pub fn reopen() -> Self {
        Console { text: [0; 1024], length: 0 }
    }

    pub fn flush(&mut self) {
        gate::emit(&self.text[..self.length]);
        self.length = 0;
    }

    fn put(&mut self, byte: u8) {
        if self.length == self.text.len() {
            self.flush();
        }
        self.text[self.length] = byte;
        self.length += 1;
    }
}

impl fmt::Write for Console {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for byte in text.bytes() {
            if byte == b'\n' {
                self.put(b'\r');
            }
            self.put(byte);
        }
        Ok(())
    }
}
