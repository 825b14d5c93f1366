//! Sizes and times. Both are written with a unit, always.

use std::time::Duration;

use serde::Serializer;

use crate::cpuset::excerpt;

/// Binary units, smallest first; `MiB` is another spelling of `M`.
const SIZES: [(&str, &str, u64); 5] = [
    ("K", "KiB", 1 << 10),
    ("M", "MiB", 1 << 20),
    ("G", "GiB", 1 << 30),
    ("T", "TiB", 1 << 40),
    ("P", "PiB", 1 << 50),
];

/// Units of time in nanoseconds, smallest first.
const TIMES: [(&str, u64); 4] = [("ns", 1), ("us", 1_000), ("ms", 1_000_000), ("s", 1_000_000_000)];

/// Why a text is not a size or a time.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum UnitError {
    /// A number without a unit.
    #[error("`{0}` has no unit")]
    NoUnit(String),
    /// Something else than a number in front of the unit.
    #[error("`{0}` is not a number with a unit")]
    Garbage(String),
    /// A number with a unit that there is not.
    #[error("`{0}`: there is no unit `{1}`, only {2}")]
    Unit(String, String, &'static str),
    /// A fraction of a byte or of a nanosecond.
    #[error("`{0}` is not a whole number of {1}")]
    Fraction(String, &'static str),
    /// More than 64 bits.
    #[error("`{0}` is too large")]
    TooBig(String),
}

/// Reads a size like `512M` or `1.5GiB`, in bytes. Units are binary.
///
/// # Errors
/// Anything but a non-negative decimal number and a unit, and sizes of 16 EiB or more.
pub fn parse_size(text: &str) -> Result<u64, UnitError> {
    parse(text, "bytes", |unit| {
        SIZES.iter().find(|size| size.0 == unit || size.1 == unit).map(|size| size.2)
    })
}

/// Reads a time like `32us`, `1.5ms` or `2s`.
///
/// # Errors
/// Anything but a non-negative decimal number and a unit, and times of 584 years or more.
pub fn parse_time(text: &str) -> Result<Duration, UnitError> {
    parse(text, "nanoseconds", |unit| {
        // Both letters that people use for micro.
        let unit = if matches!(unit, "µs" | "μs") { "us" } else { unit };
        TIMES.iter().find(|time| time.0 == unit).map(|time| time.1)
    })
    .map(Duration::from_nanos)
}

/// Reads `<number>[ ]<unit>` as a whole number of the smallest unit, without rounding.
fn parse(
    text: &str,
    smallest: &'static str,
    factor_of: impl Fn(&str) -> Option<u64>,
) -> Result<u64, UnitError> {
    let garbage = || UnitError::Garbage(excerpt(text));
    let trimmed = text.trim();
    let split = trimmed.find(|c: char| c != '.' && !c.is_ascii_digit()).unwrap_or(trimmed.len());
    let (number, unit) = trimmed.split_at(split);
    let (whole, fraction) = number.split_once('.').unwrap_or((number, "0"));
    if whole.is_empty() || fraction.is_empty() || fraction.contains('.') {
        return Err(garbage());
    }
    let unit = unit.trim_start();
    if unit.is_empty() {
        return Err(UnitError::NoUnit(excerpt(text)));
    }
    if !unit.chars().all(char::is_alphabetic) {
        return Err(garbage());
    }
    let units = if smallest == "bytes" { "K, M, G, T, P" } else { "ns, us, ms, s" };
    let factor =
        factor_of(unit).ok_or_else(|| UnitError::Unit(excerpt(text), excerpt(unit), units))?;

    let too_big = || UnitError::TooBig(excerpt(text));
    let whole = whole.parse::<u64>().map_err(|_| too_big())?;
    let fraction = fraction.trim_end_matches('0');
    // Eighteen decimals are finer than the smallest part of any unit here.
    if fraction.len() > 18 {
        return Err(UnitError::Fraction(excerpt(text), smallest));
    }
    let numerator = format!("0{fraction}").parse::<u128>().map_err(|_| garbage())?;
    let scaled = numerator * u128::from(factor);
    let denominator = 10u128.pow(fraction.len() as u32);
    if !scaled.is_multiple_of(denominator) {
        return Err(UnitError::Fraction(excerpt(text), smallest));
    }
    let sum = u128::from(whole) * u128::from(factor) + scaled / denominator;
    u64::try_from(sum).map_err(|_| too_big())
}

/// Writes a size so that [`parse_size`] reads it back: the largest unit that divides it.
/// A size that is no multiple of 1 KiB is written as a fraction of it.
pub fn format_size(bytes: u64) -> String {
    match SIZES.iter().rev().find(|size| bytes != 0 && bytes.is_multiple_of(size.2)) {
        Some((unit, _, factor)) => format!("{}{unit}", bytes / factor),
        None => {
            // 1/1024 has exactly ten decimals.
            let number = format!("{}.{:010}", bytes / 1024, bytes % 1024 * 10_000_000_000 / 1024);
            format!("{}K", number.trim_end_matches('0').trim_end_matches('.'))
        }
    }
}

/// Writes a time so that [`parse_time`] reads it back: the largest unit that divides it.
/// Times beyond 584 years are cut there.
pub fn format_time(time: Duration) -> String {
    let ns = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
    let (unit, factor) =
        TIMES.iter().rev().find(|unit| ns.is_multiple_of(unit.1)).unwrap_or(&TIMES[0]);
    format!("{}{unit}", ns / factor)
}

/// Serialises a time as text with its unit, or "off".
///
/// # Errors
/// Those of the serialiser.
pub fn as_time_or_off<S: Serializer>(
    time: &Option<Duration>,
    serializer: S,
) -> Result<S::Ok, S::Error> {
    match time {
        Some(time) => as_time(time, serializer),
        None => serializer.serialize_str("off"),
    }
}

/// Serialises a time as text with its unit.
///
/// # Errors
/// Those of the serialiser.
pub fn as_time<S: Serializer>(time: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&format_time(*time))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn reads_sizes() {
        assert_eq!(parse_size("64K"), Ok(64 << 10));
        assert_eq!(parse_size("512M"), Ok(512 << 20));
        assert_eq!(parse_size(" 4 GiB "), Ok(4 << 30));
        assert_eq!(parse_size("1.5G"), Ok(3 << 29));
        assert_eq!(parse_size("2T"), Ok(2 << 40));
        assert_eq!(parse_size("0.5K"), Ok(512));
    }

    #[test]
    fn reads_times() {
        assert_eq!(parse_time("30us"), Ok(Duration::from_micros(30)));
        assert_eq!(parse_time("30µs"), Ok(Duration::from_micros(30)));
        assert_eq!(parse_time("1.5ms"), Ok(Duration::from_micros(1500)));
        assert_eq!(parse_time("2s"), Ok(Duration::from_secs(2)));
        assert_eq!(parse_time("100ns"), Ok(Duration::from_nanos(100)));
    }

    #[test]
    fn refuses_the_rest() {
        assert_eq!(parse_size("512"), Err(UnitError::NoUnit("512".into())));
        assert_eq!(parse_time("1.5ns"), Err(UnitError::Fraction("1.5ns".into(), "nanoseconds")));
        assert_eq!(parse_size("16384P"), Err(UnitError::TooBig("16384P".into())));
        let long = format!("{}M", "9".repeat(30));
        assert_eq!(parse_size(&long), Err(UnitError::TooBig(long.clone())));
        assert_eq!(parse_size("16383P").map(|size| size >> 50), Ok(16383));
        assert!(matches!(parse_size(&"9".repeat(1000)), Err(UnitError::NoUnit(_))));
        for garbage in
            ["", "M", "-1M", "+1M", "1e3M", "1.M", ".5M", "1.2.3M", "1m", "1MB", "inf", "1 M M"]
        {
            let refused = parse_size(garbage);
            let expected = matches!(refused, Err(UnitError::Garbage(_) | UnitError::Unit(..)));
            assert!(expected, "{garbage}: {refused:?}");
        }
        let unknown = parse_time("1h").unwrap_err().to_string();
        assert_eq!(unknown, "`1h`: there is no unit `h`, only ns, us, ms, s");
        let fine = format!("1.{}1G", "0".repeat(40));
        assert!(matches!(parse_size(&fine), Err(UnitError::Fraction(..))));
    }

    #[test]
    fn writes_the_largest_unit() {
        assert_eq!(format_size(512 << 20), "512M");
        assert_eq!(format_size(512), "0.5K");
        assert_eq!(format_size(0), "0K");
        assert_eq!(format_time(Duration::from_micros(32)), "32us");
        assert_eq!(format_time(Duration::from_micros(1500)), "1500us");
        assert_eq!(format_time(Duration::ZERO), "0s");
    }

    proptest! {
        #[test]
        fn survive_a_round_trip(number: u64) {
            prop_assert_eq!(parse_size(&format_size(number)), Ok(number));
            let time = Duration::from_nanos(number);
            prop_assert_eq!(parse_time(&format_time(time)), Ok(time));
        }

        #[test]
        fn never_panic(text in "[-+0-9.eKMGTPiBnums ]{0,40}") {
            drop(parse_size(&text));
            drop(parse_time(&text));
        }
    }
}
