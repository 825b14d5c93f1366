//! MSI-X: interrupts as messages, one table entry per vector (PCI 3.0 §6.8.2).

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::*};

use iothread::ExitCx;
use serde::{Deserialize, Serialize};

use super::function::{read_registers, write_registers};
use crate::device::Device;
use crate::irq::{Msi, MsiSender};

/// The largest table (PCI 3.0 §6.8.2.3).
pub const MAX_VECTORS: u16 = 2048;

/// Message control, PCI 3.0 §6.8.2.3.
const ENABLE: u16 = 1 << 15;
const FUNCTION_MASK: u16 = 1 << 14;

/// Vector control, PCI 3.0 §6.8.2.9.
const MASKED: u32 = 1;

/// Registers of 4 bytes in a table entry.
const ENTRY: u64 = 4;

/// One entry of the table. `word` is, from the top: 32 bits of message data, 31 bits that count
/// the changes, and the mask bit. The count makes a consistent copy possible without a lock: if
/// `word` is the same before and after `address` was read, the three belong together.
#[derive(Debug)]
struct Entry {
    address: AtomicU64,
    word: AtomicU64,
}

impl Entry {
    fn new() -> Self {
        Self { address: AtomicU64::new(0), word: AtomicU64::new(MASKED.into()) }
    }

    /// The message, and whether it is masked.
    fn load(&self) -> (Msi, bool) {
        let mut word = self.word.load(SeqCst);
        loop {
            let address = self.address.load(SeqCst);
            let after = self.word.load(SeqCst);
            if after == word {
                let masked = word as u32 & MASKED != 0;
                return (Msi { address, data: (word >> 32) as u32 }, masked);
            }
            word = after;
        }
    }

    fn set_data(&self, data: u32) {
        self.change(|word| u64::from(data) << 32 | word & u64::from(u32::MAX));
    }

    fn set_masked(&self, masked: bool) {
        self.change(|word| word & !u64::from(MASKED) | u64::from(masked));
    }

    fn change(&self, f: impl Fn(u64) -> u64) {
        update(&self.word, |word| {
            let count = (word as u32 >> 1).wrapping_add(1) << 1;
            f(word & !0xffff_fffe | u64::from(count))
        });
    }

    fn read(&self, register: u64) -> u32 {
        let (Msi { address, data }, masked) = self.load();
        match register {
            0 => address as u32,
            1 => (address >> 32) as u32,
            2 => data,
            _ => masked.into(),
        }
    }

    fn write(&self, register: u64, value: u32) {
        let value_64 = u64::from(value);
        match register {
            // The lowest two bits are always 0.
            0 => update(&self.address, |address| address >> 32 << 32 | value_64 & !3),
            1 => update(&self.address, |address| value_64 << 32 | u64::from(address as u32)),
            2 => self.set_data(value),
            _ => self.set_masked(value & MASKED != 0),
        }
    }
}

/// Sets an atomic to what `f` makes of it.
fn update(atomic: &AtomicU64, f: impl Fn(u64) -> u64) {
    // Cannot fail: there is always a new value.
    let _ = atomic.fetch_update(SeqCst, SeqCst, |value| Some(f(value)));
}

/// What a table remembers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Saved {
    /// Message control: enable and function mask.
    control: u16,
    /// By vector: address, data, masked.
    entries: Vec<(u64, u32, bool)>,
    /// Pending bits, 64 vectors in each.
    pending: Vec<u64>,
}

/// The vectors of a function: table, pending bits and message control.
///
/// As a [`Device`] it is the BAR with the table, and behind that the pending bits. No method waits
/// or allocates, [`save`](Self::save) apart.
///
/// A vector that may not be sent is left as its pending bit, and whoever clears the bit sends it.
/// After setting the bit the sender looks again whether it may be sent; after unmasking the guest's
/// write looks at the bit: one of the two sees the other, and only one of them clears the bit.
pub struct Msix {
    entries: Box<[Entry]>,
    pending: Box<[AtomicU64]>,
    /// From the top: 48 bits that count the changes, and 16 bits of message control.
    control: AtomicU64,
    sender: Arc<dyn MsiSender>,
    sent: AtomicU64,
    pended: AtomicU64,
}

impl fmt::Debug for Msix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut out = f.debug_struct("Msix");
        out.field("vectors", &self.entries.len()).field("sent", &self.sent());
        out.field("pended", &self.pended()).finish_non_exhaustive()
    }
}

impl Msix {
    /// A table of `vectors` vectors, all of them masked, and disabled as a whole.
    ///
    /// # Panics
    /// If there are no vectors, or more than [`MAX_VECTORS`].
    pub fn new(vectors: u16, sender: Arc<dyn MsiSender>) -> Self {
        assert!((1..=MAX_VECTORS).contains(&vectors), "no MSI-X table has {vectors} vectors");
        let words = usize::from(vectors).div_ceil(64);
        Self {
            entries: (0..vectors).map(|_| Entry::new()).collect(),
            pending: (0..words).map(|_| AtomicU64::new(0)).collect(),
            control: AtomicU64::new(0),
            sender,
            sent: AtomicU64::new(0),
            pended: AtomicU64::new(0),
        }
    }

    /// How many vectors there are.
    pub fn vectors(&self) -> u16 {
        self.entries.len() as u16
    }

    /// Interrupts by `vector`: sends its message, or leaves it pending until the guest lets it
    /// through. A vector that does not exist interrupts nobody. Any thread may call this at any
    /// time.
    ///
    /// One call makes one message or sets the pending bit, with one exception: where the guest
    /// points the vector elsewhere *while* its message is being sent, the new place is told as
    /// well, for the old one may not be listening any more. A message may still come right after
    /// the guest has masked its vector.
    pub fn trigger(&self, vector: u16) {
        let Some(entry) = self.entries.get(usize::from(vector)) else { return };
        // Goes round only if the guest has changed the table meanwhile.
        loop {
            match self.message(entry) {
                Some(msi) => {
                    self.sender.send(msi);
                    self.sent.fetch_add(1, Relaxed);
                    if entry.load().0 == msi {
                        return;
                    }
                }
                None => {
                    let (word, bit) = self.pending_bit(vector);
                    if word.fetch_or(bit, SeqCst) & bit == 0 {
                        self.pended.fetch_add(1, Relaxed);
                    }
                    if !self.claim(vector) {
                        return;
                    }
                }
            }
        }
    }

    /// Are interrupts messages now? Else the function has its pin.
    pub fn is_enabled(&self) -> bool {
        self.control.load(SeqCst) as u16 & ENABLE != 0
    }

    /// Messages sent so far.
    pub fn sent(&self) -> u64 {
        self.sent.load(Relaxed)
    }

    /// How often a message had to be left pending.
    pub fn pended(&self) -> u64 {
        self.pended.load(Relaxed)
    }

    /// Message control (PCI 3.0 §6.8.2.3): enable, function mask, and the size of the table.
    pub fn control(&self) -> u16 {
        self.control.load(SeqCst) as u16 | (self.vectors() - 1)
    }

    /// The guest writes those bits of message control that are set in `lanes`.
    pub fn write_control(&self, value: u16, lanes: u16) {
        let mask = u64::from(lanes & (ENABLE | FUNCTION_MASK));
        update(&self.control, |old| {
            let count = (old >> 16).wrapping_add(1) << 16;
            count | old & 0xffff & !mask | u64::from(value) & mask
        });
        self.send_pending();
    }

    /// Where the table is in the BAR, in bytes.
    pub fn table_offset(&self) -> u32 {
        0
    }

    /// Where the pending bits are in the BAR, in bytes.
    pub fn pending_offset(&self) -> u32 {
        u32::from(self.vectors()) * 16
    }

    /// The size of the BAR in bytes: a power of two, and whole pages.
    pub fn bar_size(&self) -> u64 {
        let size = u64::from(self.pending_offset()) + self.pending.len() as u64 * 8;
        size.next_power_of_two().max(4096)
    }

    /// What the table remembers.
    pub fn save(&self) -> Saved {
        let entries = self.entries.iter().map(|entry| {
            let (msi, masked) = entry.load();
            (msi.address, msi.data, masked)
        });
        Saved {
            control: self.control.load(SeqCst) as u16,
            entries: entries.collect(),
            pending: self.pending.iter().map(|word| word.load(SeqCst)).collect(),
        }
    }

    /// Could this be the state of this table? Else says why not.
    pub fn accepts(&self, saved: &Saved) -> Result<(), String> {
        let (vectors, here) = (saved.entries.len(), self.entries.len());
        let beyond = |(nth, word): (usize, &u64)| {
            let valid = here.saturating_sub(nth * 64);
            valid < 64 && word >> valid != 0
        };
        if vectors != here {
            Err(format!("{vectors} MSI-X vectors, not {here}"))
        } else if saved.pending.len() != self.pending.len()
            || saved.pending.iter().enumerate().any(beyond)
        {
            Err("pending bits of MSI-X vectors that do not exist".to_owned())
        } else {
            Ok(())
        }
    }

    /// Takes on a state that it [`accepts`](Self::accepts). What was pending and may be sent now
    /// is sent.
    pub fn restore(&self, saved: &Saved) {
        for (entry, &(address, data, masked)) in self.entries.iter().zip(&saved.entries) {
            entry.set_masked(true);
            entry.address.store(address & !3, SeqCst);
            entry.set_data(data);
            entry.set_masked(masked);
        }
        for (word, &bits) in self.pending.iter().zip(&saved.pending) {
            word.store(bits, SeqCst);
        }
        self.write_control(saved.control, u16::MAX);
    }

    /// The message of a vector as it is now, if it may be sent.
    fn message(&self, entry: &Entry) -> Option<Msi> {
        loop {
            let control = self.control.load(SeqCst);
            if control as u16 & (ENABLE | FUNCTION_MASK) != ENABLE {
                return None;
            }
            let (msi, masked) = entry.load();
            // Behind a function mask the guest may change an entry that is not masked itself.
            if self.control.load(SeqCst) == control {
                return (!masked).then_some(msi);
            }
        }
    }

    /// Clears the pending bit of a vector that may be sent; true: then the caller has to send it.
    fn claim(&self, vector: u16) -> bool {
        let (word, bit) = self.pending_bit(vector);
        self.message(&self.entries[usize::from(vector)]).is_some()
            && word.fetch_and(!bit, SeqCst) & bit != 0
    }

    /// Sends all that is pending and may be sent.
    fn send_pending(&self) {
        for (nth, word) in self.pending.iter().enumerate() {
            let mut bits = word.load(SeqCst);
            while bits != 0 {
                self.send_if_pending((nth * 64) as u16 + bits.trailing_zeros() as u16);
                bits &= bits - 1;
            }
        }
    }

    fn send_if_pending(&self, vector: u16) {
        if self.claim(vector) {
            self.trigger(vector);
        }
    }

    fn pending_bit(&self, vector: u16) -> (&AtomicU64, u64) {
        (&self.pending[usize::from(vector / 64)], 1 << (vector % 64))
    }

    fn read_register(&self, register: u64) -> u32 {
        let table = self.entries.len() as u64 * ENTRY;
        let entry = usize::try_from(register / ENTRY).ok().and_then(|nth| self.entries.get(nth));
        if let Some(entry) = entry {
            return entry.read(register % ENTRY);
        }
        let pending = usize::try_from((register - table) / 2).unwrap_or(usize::MAX);
        let word = self.pending.get(pending).map_or(0, |word| word.load(SeqCst));
        (word >> (register % 2 * 32)) as u32
    }

    fn write_register(&self, register: u64, value: u32) {
        let Some(vector) = u16::try_from(register / ENTRY).ok().filter(|&n| n < self.vectors())
        else {
            return;
        };
        self.entries[usize::from(vector)].write(register % ENTRY, value);
        self.send_if_pending(vector);
    }
}

/// The guest has to use aligned accesses of 4 or 8 bytes (PCI 3.0 §6.8.2). Other writes do nothing;
/// other reads give the bytes that are there. The pending bits cannot be written.
impl Device for Msix {
    fn read(&self, offset: u64, data: &mut [u8], _: &mut ExitCx<'_>) {
        read_registers(offset, data, |register| self.read_register(register));
    }

    fn write(&self, offset: u64, data: &[u8], _: &mut ExitCx<'_>) {
        if matches!(data.len(), 4 | 8) && offset.is_multiple_of(data.len() as u64) {
            write_registers(offset, data, |register, value, _| {
                self.write_register(register, value);
            });
        }
    }
}

#[cfg(test)]
#[path = "msix_tests.rs"]
mod tests;
