//! The real-time clock of the PC with its CMOS memory (MC146818), without interrupts.

use std::fmt;
use std::time::SystemTime;

use iothread::ExitCx;
use time::{Date, Month, OffsetDateTime, Time};

use crate::device::Device;

/// Registers.
const SECONDS: u8 = 0;
const MINUTES: u8 = 2;
const HOURS: u8 = 4;
const WEEKDAY: u8 = 6;
const DAY: u8 = 7;
const MONTH: u8 = 8;
const YEAR: u8 = 9;
const A: u8 = 10;
const B: u8 = 11;
const C: u8 = 12;
const D: u8 = 13;

/// Register A: the oscillator runs, at the usual rate. No update is ever in progress.
const RUNNING: u8 = 0x26;
/// Register B: updates are stopped while the time is set.
const SET: u8 = 1 << 7;
/// Register B: numbers are binary, not BCD; hours count to 24, not 12.
const BINARY: u8 = 1 << 2;
const HOURS_24: u8 = 1 << 1;
/// Register D: the battery is fine.
const VALID: u8 = 1 << 7;
/// Hours: after noon, where they count to 12.
const PM: u8 = 1 << 7;

/// A time as the guest sees it; while it is being set, not always one that exists.
#[derive(Clone, Copy)]
struct Fields {
    year: i32,
    month: u8,
    day: u8,
    hour: u8,
    minute: u8,
    second: u8,
}

impl From<OffsetDateTime> for Fields {
    fn from(time: OffsetDateTime) -> Self {
        let (year, month, day) = time.to_calendar_date();
        let (hour, minute, second) = time.to_hms();
        Self { year, month: month.into(), day, hour, minute, second }
    }
}

impl Fields {
    fn time(self) -> Option<OffsetDateTime> {
        let month = Month::try_from(self.month).ok()?;
        let date = Date::from_calendar_date(self.year, month, self.day).ok()?;
        let time = Time::from_hms(self.hour, self.minute, self.second).ok()?;
        Some(date.with_time(time).assume_utc())
    }
}

struct Clock {
    selected: u8,
    /// Register B.
    mode: u8,
    /// What the guest has set its time ahead of ours, in seconds.
    ahead: i64,
    /// The time while it is being set.
    stopped: Option<Fields>,
    memory: [u8; 128],
}

/// Ports 0x70 and 0x71: which register, and the register. The time is the host's, in UTC, until the
/// guest sets it.
pub struct Rtc {
    #[expect(clippy::disallowed_types, reason = "a clock that is read once and set never")]
    clock: std::sync::Mutex<Clock>,
}

impl fmt::Debug for Rtc {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Rtc")
    }
}

impl Default for Rtc {
    fn default() -> Self {
        let clock =
            Clock { selected: 0, mode: HOURS_24, ahead: 0, stopped: None, memory: [0; 128] };
        Self { clock: clock.into() }
    }
}

impl Rtc {
    /// The first port.
    pub const PORT: u64 = 0x70;
    /// How many ports there are.
    pub const SIZE: u64 = 2;
    /// The register of the century, as the FADT tells it.
    pub const CENTURY: u8 = 0x32;
}

impl Clock {
    fn now(&self) -> Fields {
        let now = OffsetDateTime::from(SystemTime::now());
        let ahead = time::Duration::seconds(self.ahead);
        self.stopped.unwrap_or_else(|| now.checked_add(ahead).unwrap_or(now).into())
    }

    /// Lets the clock run on from this time, if there is such a time.
    fn set(&mut self, fields: Fields) {
        let real = OffsetDateTime::from(SystemTime::now());
        if let Some(time) = fields.time() {
            self.ahead = time.unix_timestamp() - real.unix_timestamp();
        }
    }

    fn encode(&self, number: u8) -> u8 {
        if self.mode & BINARY != 0 { number } else { ((number / 10) << 4) | (number % 10) }
    }

    fn decode(&self, value: u8) -> u8 {
        if self.mode & BINARY != 0 {
            value
        } else {
            (value >> 4).wrapping_mul(10).wrapping_add(value & 0xf)
        }
    }

    fn read(&self, register: u8) -> u8 {
        let now = self.now();
        let number = match register {
            SECONDS => now.second,
            MINUTES => now.minute,
            HOURS if self.mode & HOURS_24 == 0 => {
                let (pm, hour) = (now.hour >= 12, (now.hour % 24 + 11) % 12 + 1);
                return self.encode(hour) | if pm { PM } else { 0 };
            }
            HOURS => now.hour,
            WEEKDAY => now.time().map_or(1, |time| time.weekday().number_from_sunday()),
            DAY => now.day,
            MONTH => now.month,
            YEAR => now.year.rem_euclid(100) as u8,
            Rtc::CENTURY => (now.year.rem_euclid(10_000) / 100) as u8,
            A => return RUNNING,
            B => return self.mode,
            C => return 0,
            D => return VALID,
            other => return self.memory[usize::from(other)],
        };
        self.encode(number)
    }

    fn write(&mut self, register: u8, value: u8) {
        match register {
            B => {
                if self.mode & SET == 0 && value & SET != 0 {
                    self.stopped = Some(self.now());
                }
                if value & SET == 0
                    && let Some(fields) = self.stopped.take()
                {
                    self.set(fields);
                }
                self.mode = value & (SET | BINARY | HOURS_24);
            }
            A | C | D => {}
            SECONDS | MINUTES | HOURS | WEEKDAY | DAY | MONTH | YEAR | Rtc::CENTURY => {
                let fields = self.with(self.now(), register, value);
                if self.stopped.is_some() { self.stopped = Some(fields) } else { self.set(fields) }
            }
            other => self.memory[usize::from(other)] = value,
        }
    }

    /// `fields` with one register written.
    fn with(&self, mut fields: Fields, register: u8, value: u8) -> Fields {
        let number = self.decode(value);
        let year = fields.year.rem_euclid(10_000);
        match register {
            SECONDS => fields.second = number,
            MINUTES => fields.minute = number,
            HOURS if self.mode & HOURS_24 == 0 => {
                let noon = if value & PM != 0 { 12 } else { 0 };
                fields.hour = self.decode(value & !PM) % 12 + noon;
            }
            HOURS => fields.hour = number,
            DAY => fields.day = number,
            MONTH => fields.month = number,
            YEAR => fields.year = year / 100 * 100 + i32::from(number % 100),
            Rtc::CENTURY => fields.year = i32::from(number % 100) * 100 + year % 100,
            _ => {} // the weekday follows from the date
        }
        fields
    }
}

impl Device for Rtc {
    fn read(&self, offset: u64, data: &mut [u8], _: &mut ExitCx<'_>) {
        data.fill(0xff);
        if offset == 1 {
            let clock = self.clock.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            data[0] = clock.read(clock.selected);
        }
    }

    fn write(&self, offset: u64, data: &[u8], _: &mut ExitCx<'_>) {
        let mut clock = self.clock.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        // A write of two bytes to the first port selects and writes.
        for (&byte, port) in data.iter().zip(offset..) {
            match port {
                0 => clock.selected = byte & 0x7f, // the top bit masks NMIs on real PCs
                1 => {
                    let register = clock.selected;
                    clock.write(register, byte);
                }
                _ => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::legacy::testing::Bench;

    fn bench() -> Bench<Rtc> {
        Bench::new(|_| Rtc::default())
    }

    fn get(bench: &mut Bench<Rtc>, register: u8) -> u8 {
        bench.write(0, &[register]);
        bench.read(1, 1)[0]
    }

    fn put(bench: &mut Bench<Rtc>, register: u8, value: u8) {
        bench.write(0, &[register]);
        bench.write(1, &[value]);
    }

    fn date(bench: &mut Bench<Rtc>) -> [u8; 6] {
        [Rtc::CENTURY, YEAR, MONTH, DAY, HOURS, MINUTES].map(|register| get(bench, register))
    }

    #[test]
    fn the_time_is_that_of_the_host_in_bcd() {
        let mut bench = bench();
        let before = OffsetDateTime::from(SystemTime::now());
        let seen = date(&mut bench);
        let after = OffsetDateTime::from(SystemTime::now());
        let bcd = |number: u8| ((number / 10) << 4) | (number % 10);
        let of = |at: OffsetDateTime| {
            let year = at.year() as u16;
            let year = [(year / 100) as u8, (year % 100) as u8];
            [year[0], year[1], at.month().into(), at.day(), at.hour(), at.minute()].map(bcd)
        };
        assert!(seen == of(before) || seen == of(after), "{seen:x?}");
        assert_eq!(get(&mut bench, A) & 0x80, 0, "no update in progress");
        assert_eq!(get(&mut bench, D), VALID);
    }

    #[test]
    fn the_time_can_be_set_and_goes_on_from_there() {
        let mut bench = bench();
        put(&mut bench, B, SET | HOURS_24);
        for (register, value) in [
            (SECONDS, 0x00),
            (MINUTES, 0x59),
            (HOURS, 0x23),
            (DAY, 0x29),
            (MONTH, 0x02),
            (YEAR, 0x24),
            (Rtc::CENTURY, 0x20),
        ] {
            put(&mut bench, register, value);
        }
        assert_eq!(get(&mut bench, SECONDS), 0, "it stands still");
        put(&mut bench, B, HOURS_24);
        assert_eq!(date(&mut bench), [0x20, 0x24, 0x02, 0x29, 0x23, 0x59]);
        assert_eq!(get(&mut bench, WEEKDAY), 5);
        put(&mut bench, B, 0);
        assert_eq!(get(&mut bench, HOURS), 0x11 | PM);
        put(&mut bench, B, BINARY);
        assert_eq!(get(&mut bench, HOURS), 11 | PM);
        put(&mut bench, HOURS, 12);
        assert_eq!(get(&mut bench, HOURS), 12, "midnight");
        put(&mut bench, HOURS, 12 | PM);
        put(&mut bench, B, BINARY | HOURS_24);
        assert_eq!(get(&mut bench, HOURS), 12);
    }

    #[test]
    fn a_time_that_does_not_exist_changes_nothing_and_memory_is_memory() {
        let mut bench = bench();
        let before = get(&mut bench, MONTH);
        for (register, value) in [(MONTH, 0x13), (MONTH, 0), (HOURS, 0x24), (SECONDS, 0xff)] {
            put(&mut bench, register, value);
        }
        assert_eq!(get(&mut bench, MONTH), before);
        put(&mut bench, 0x40, 0xa5);
        assert_eq!(get(&mut bench, 0xc0), 0xa5, "the top bit of the index is not part of it");
        assert_eq!(bench.read(0, 1), [0xff]);
        for fill in [0, 1, 0x80, 0xff] {
            for register in 0..=255 {
                put(&mut bench, register, fill);
                get(&mut bench, register);
            }
            bench.access_all(Rtc::SIZE, fill);
        }
    }
}
