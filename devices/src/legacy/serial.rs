//! A 16550 serial port. The registers are those of the `vm-superio` crate.
//!
//! What the guest writes goes into a bounded ring that some other thread empties, so a slow
//! terminal never stops a vCPU. When the ring is nearly full the port says that its transmitter is
//! busy, as a real one does most of the time, and says so no longer when there is room.

use std::convert::Infallible;
use std::fmt;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::*};

use crossbeam_queue::ArrayQueue;
use iothread::{ExitCx, Reply};
use serde::{Deserialize, Serialize};
use vm_superio::serial::{NoEvents, SerialState};
use vm_superio::{Serial as Uart, Trigger};

use crate::device::{Body, Device, Lifecycle, Paused, RestoreError, State};
use crate::irq::IrqLine;

/// Output that can wait to be fetched, in bytes.
pub const OUTPUT_ROOM: usize = 4096;

/// Free bytes below which the transmitter is busy. A guest that saw it ready may write a whole
/// FIFO (16 bytes) before it looks again; several guests' worth of that.
const RESERVE: usize = 256;

/// Registers, by offset from the first port.
const INTERRUPT_ENABLE: u8 = 1;
const LINE_CONTROL: u8 = 3;
const LINE_STATUS: u8 = 5;

/// Line control: offsets 0 and 1 are the divisor.
const DIVISOR_ACCESS: u8 = 0x80;
/// Line status: holding register empty, and shift register empty as well.
const TRANSMITTER_READY: u8 = 0x60;

/// What is kept of a port when the machine stands still: its registers.
#[derive(Debug, Serialize, Deserialize)]
struct Saved {
    divisor: [u8; 2],
    interrupt_enable: u8,
    interrupt_identification: u8,
    line_control: u8,
    line_status: u8,
    modem_control: u8,
    modem_status: u8,
    scratch: u8,
    input: Vec<u8>,
}

impl From<SerialState> for Saved {
    fn from(state: SerialState) -> Self {
        Self {
            divisor: [state.baud_divisor_low, state.baud_divisor_high],
            interrupt_enable: state.interrupt_enable,
            interrupt_identification: state.interrupt_identification,
            line_control: state.line_control,
            line_status: state.line_status,
            modem_control: state.modem_control,
            modem_status: state.modem_status,
            scratch: state.scratch,
            input: state.in_buffer,
        }
    }
}

impl Body for Saved {
    const KIND: &'static str = "serial";
    const VERSION: u32 = 1;
}

impl From<Saved> for SerialState {
    fn from(saved: Saved) -> Self {
        Self {
            baud_divisor_low: saved.divisor[0],
            baud_divisor_high: saved.divisor[1],
            interrupt_enable: saved.interrupt_enable,
            interrupt_identification: saved.interrupt_identification,
            line_control: saved.line_control,
            line_status: saved.line_status,
            modem_control: saved.modem_control,
            modem_status: saved.modem_status,
            scratch: saved.scratch,
            in_buffer: saved.input,
        }
    }
}

/// An interrupt by a rising edge.
#[derive(Clone)]
struct Edge(Arc<dyn IrqLine>);

impl Trigger for Edge {
    type E = Infallible;

    fn trigger(&self) -> Result<(), Infallible> {
        self.0.set(true);
        self.0.set(false);
        Ok(())
    }
}

/// What the guest has written and nobody has fetched yet.
struct Output {
    ring: ArrayQueue<u8>,
    /// Someone was told that there is output, and has not come for it yet.
    woken: AtomicBool,
    /// The guest was told that the transmitter is busy.
    busy: AtomicBool,
    dropped: AtomicU64,
    wake: Box<dyn Fn() + Send + Sync>,
}

impl Output {
    fn has_room(&self) -> bool {
        self.ring.capacity() - self.ring.len() >= RESERVE
    }

    /// There is output: says so, unless it has been said.
    fn announce(&self) {
        if !self.woken.swap(true, SeqCst) {
            (self.wake)();
        }
    }

    /// Is the transmitter busy? If so, [`Serial::drain`] will interrupt when it is no longer.
    fn is_busy(&self) -> bool {
        if self.has_room() {
            return false;
        }
        // First the flag, then another look; `drain` first makes room, then looks at the flag.
        self.busy.store(true, SeqCst);
        !self.has_room()
    }
}

/// The end of the UART that the ring hangs on.
struct Writer(Arc<Output>);

impl io::Write for Writer {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        for &byte in bytes {
            if self.0.ring.push(byte).is_err() {
                self.0.dropped.fetch_add(1, Relaxed);
            }
        }
        self.0.announce();
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

struct Registers {
    uart: Uart<Edge, NoEvents, Writer>,
    /// Input was refused because there was no room for it.
    refused: bool,
}

/// One serial port.
///
/// One thread is expected to fetch the output and to bring input. `wake` tells it when there is
/// something to do: output to [`drain`](Self::drain), or room for input that
/// [`push_input`](Self::push_input) had refused. Each is told once, until that method is called.
pub struct Serial {
    name: String,
    irq: Edge,
    output: Arc<Output>,
    #[expect(clippy::disallowed_types, reason = "a serial port has no queue that could be kicked")]
    registers: std::sync::Mutex<Registers>,
}

impl fmt::Debug for Serial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Serial").field("name", &self.name).finish_non_exhaustive()
    }
}

impl Serial {
    /// The first ports of COM1 to COM4.
    pub const PORTS: [u64; 4] = [0x3f8, 0x2f8, 0x3e8, 0x2e8];
    /// The interrupt lines of COM1 to COM4.
    pub const IRQS: [u32; 4] = [4, 3, 4, 3];
    /// How many ports each has.
    pub const SIZE: u64 = 8;

    /// A port as it is after a reset. `wake` may be called by any thread and in the midst of an
    /// access; it must not wait, nor enter the port.
    pub fn new(name: &str, irq: Arc<dyn IrqLine>, wake: impl Fn() + Send + Sync + 'static) -> Self {
        let output = Arc::new(Output {
            ring: ArrayQueue::new(OUTPUT_ROOM),
            woken: AtomicBool::new(false),
            busy: AtomicBool::new(false),
            dropped: AtomicU64::new(0),
            wake: Box::new(wake),
        });
        let irq = Edge(irq);
        let uart = Uart::new(irq.clone(), Writer(Arc::clone(&output)));
        let registers = Registers { uart, refused: false }.into();
        Self { name: name.to_owned(), irq, output, registers }
    }

    /// Takes out at most `max` bytes of output. When it returns as many as that there may be more,
    /// and nobody will be woken for them.
    pub fn drain(&self, max: usize) -> Vec<u8> {
        self.output.woken.store(false, SeqCst);
        let bytes: Vec<_> = std::iter::from_fn(|| self.output.ring.pop()).take(max).collect();
        if self.output.has_room() && self.output.busy.swap(false, SeqCst) {
            self.registers().transmitter_is_ready();
        }
        bytes
    }

    /// Gives the guest input and returns how many bytes of it were taken: the port has room for
    /// 64. `wake` is called when the guest has made room for the rest.
    pub fn push_input(&self, bytes: &[u8]) -> usize {
        let mut registers = self.registers();
        let taken = registers.uart.enqueue_raw_bytes(bytes).unwrap_or(0);
        registers.refused = taken < bytes.len();
        taken
    }

    /// Bytes the guest wrote although the transmitter was busy, and that found no room.
    pub fn dropped(&self) -> u64 {
        self.output.dropped.load(Relaxed)
    }

    fn registers(&self) -> std::sync::MutexGuard<'_, Registers> {
        self.registers.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Lets `f` access the registers, and looks afterwards if input can be taken again.
    fn access(&self, f: impl FnOnce(&mut Registers)) {
        let mut registers = self.registers();
        f(&mut registers);
        let room = registers.uart.fifo_capacity();
        if registers.refused && room > 0 {
            registers.refused = false;
            drop(registers);
            (self.output.wake)();
        }
    }
}

impl Registers {
    fn read(&mut self, offset: u8, output: &Output) -> u8 {
        let value = self.uart.read(offset);
        match offset {
            LINE_STATUS if output.is_busy() => value & !TRANSMITTER_READY,
            _ => value,
        }
    }

    fn write(&mut self, offset: u8, value: u8) {
        // It can fail neither to interrupt nor to write, see `Edge` and `Writer`.
        let _ = self.uart.write(offset, value);
    }

    /// Raises the interrupt of an empty transmitter, if the guest wants one. The UART does that
    /// when interrupts are enabled, so they are enabled once more as they are.
    fn transmitter_is_ready(&mut self) {
        let line_control = self.uart.read(LINE_CONTROL);
        self.write(LINE_CONTROL, line_control & !DIVISOR_ACCESS);
        let enabled = self.uart.read(INTERRUPT_ENABLE);
        self.write(INTERRUPT_ENABLE, enabled);
        self.write(LINE_CONTROL, line_control);
    }
}

/// An access of several bytes is one of one byte to each of as many ports, as on the ISA bus.
impl Device for Serial {
    fn read(&self, offset: u64, data: &mut [u8], _: &mut ExitCx<'_>) {
        self.access(|registers| {
            for (byte, port) in data.iter_mut().zip(offset..) {
                *byte = registers.read(port as u8, &self.output);
            }
        });
    }

    fn write(&self, offset: u64, data: &[u8], _: &mut ExitCx<'_>) {
        self.access(|registers| {
            for (&byte, port) in data.iter().zip(offset..) {
                registers.write(port as u8, byte);
            }
        });
    }
}

/// Output that was not fetched yet is not part of the state: it still is fetched from here.
impl Lifecycle for Serial {
    fn name(&self) -> &str {
        &self.name
    }

    fn pause(&self) -> Vec<(String, Reply<()>)> {
        Vec::new()
    }

    fn resume(&self) {}

    fn save(&self, _: &Paused<'_>) -> State {
        State::of(&Saved::from(self.registers().uart.state()))
    }

    fn restore(&self, _: &Paused<'_>, state: &State) -> Result<(), RestoreError> {
        let refuse = |why: String| RestoreError { device: self.name.clone(), why };
        let saved: Saved = state.body().map_err(refuse)?;
        let writer = Writer(Arc::clone(&self.output));
        let uart = Uart::from_state(&saved.into(), self.irq.clone(), NoEvents, writer)
            .map_err(|e| refuse(e.to_string()))?;
        let mut registers = self.registers();
        registers.uart = uart;
        // The guest may be waiting for a transmitter that was busy where it came from.
        registers.transmitter_is_ready();
        Ok(())
    }
}

#[cfg(test)]
#[path = "serial_tests.rs"]
mod tests;
