//! What the guest leaves on a disk, and how to check it. Shared with the host: no dependencies,
//! no `std`, nothing but arithmetic.
//!
//! # Contract
//! Every vCPU `v` that drives a disk owns a range of it and writes only there. Each 512-byte
//! sector it writes is exactly [`expected`]`(stamp)`, where the stamp says which disk (its index
//! in the guest's JSON), which vCPU, which LBA and which generation. A generation is one pass of
//! writes of a vCPU over one window of its range, counted from 1; later passes overwrite earlier
//! ones.
//!
//! After a run with `verdict: ok` the image holds, for each row
//! `[vcpu, generation, start, sectors]` of the disk's `written` list in the JSON line, the sectors
//! `start .. start + sectors` with exactly that generation. Rows never overlap, and together they
//! are everything the guest wrote: all other sectors are as they were before.

/// Bytes of a sector.
pub const SECTOR: usize = 512;

/// The first eight bytes of every sector written.
pub const MAGIC: [u8; 8] = *b"hdlwarp1";

/// Bytes of a sector that name its stamp: the magic, then disk, vCPU, generation, a zero word and
/// the LBA, little-endian.
pub const HEADER: usize = 32;

/// Who wrote a sector, where and when.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stamp {
    pub disk: u32,
    pub vcpu: u32,
    pub generation: u32,
    pub lba: u64,
}

impl Stamp {
    fn header(&self) -> [u64; 4] {
        [
            u64::from_le_bytes(MAGIC),
            u64::from(self.disk) | u64::from(self.vcpu) << 32,
            u64::from(self.generation),
            self.lba,
        ]
    }

    /// The value the words after the header start from.
    fn seed(&self) -> u64 {
        let [_, who, when, lba] = self.header();
        mix(who ^ mix(when ^ mix(lba)))
    }

    /// The stamp a sector claims to have; `None` if it was not written by the guest.
    pub fn read(sector: &[u8; SECTOR]) -> Option<Stamp> {
        let word = |i: usize| {
            let mut bytes = [0; 8];
            bytes.copy_from_slice(&sector[8 * i..8 * i + 8]);
            u64::from_le_bytes(bytes)
        };
        let stamp = Stamp {
            disk: word(1) as u32,
            vcpu: (word(1) >> 32) as u32,
            generation: word(2) as u32,
            lba: word(3),
        };
        (word(0) == u64::from_le_bytes(MAGIC) && word(2) >> 32 == 0).then_some(stamp)
    }
}

/// A bijection that spreads every bit over the word (the finaliser of splitmix64).
fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// The words of the sector with this stamp, in order.
fn words(stamp: &Stamp) -> impl Iterator<Item = u64> {
    let mut state = stamp.seed();
    let body = (0..(SECTOR - HEADER) / 8).map(move |_| {
        state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
        state ^ (state >> 29)
    });
    stamp.header().into_iter().chain(body)
}

/// Fills `out` with the sector that has this stamp.
pub fn expected(stamp: &Stamp, out: &mut [u8; SECTOR]) {
    for (to, word) in out.chunks_exact_mut(8).zip(words(stamp)) {
        to.copy_from_slice(&word.to_le_bytes());
    }
}

/// Compares all bytes of a sector; the offset of the first wrong one if any.
pub fn check(stamp: &Stamp, sector: &[u8; SECTOR]) -> Result<(), usize> {
    let mut wrong = 0;
    for (have, word) in sector.chunks_exact(8).zip(words(stamp)) {
        let mut bytes = [0; 8];
        bytes.copy_from_slice(have);
        wrong |= u64::from_le_bytes(bytes) ^ word;
    }
    if wrong == 0 {
        return Ok(());
    }
    let mut right = [0; SECTOR];
    expected(stamp, &mut right);
    Err(right.iter().zip(sector).position(|(a, b)| a != b).unwrap_or(0))
}
