//! `[test]`: troubles made on purpose.

use std::time::Duration;

use super::placement::thread;
use crate::plan::{Stall, Test, Thread};
use crate::reader::Reader;
use crate::units::parse_time;

/// A guest that waits longer gives up on its disk.
const LONGEST_STALL: Duration = Duration::from_secs(10);
const LONGEST_PERIOD: Duration = Duration::from_secs(1000);

pub(super) fn test(table: &Reader<'_>, threads: &[Thread]) -> Test {
    let shuffle = table.value("shuffle").and_then(|value| value.int());
    let mut stalls = Vec::new();
    if let Some(value) = table.value("stall") {
        if value.is_array() {
            let tables = value.tables();
            stalls.extend(tables.into_iter().flatten().filter_map(|table| stall(&table, threads)));
        } else {
            let hint = "write [[test.stall]] for each of them".to_owned();
            value.error("`stall` must be tables", Some(hint));
        }
    }
    Test { shuffle, stalls }
}

fn stall(table: &Reader<'_>, threads: &[Thread]) -> Option<Stall> {
    let thread = table.value("thread").and_then(|value| thread(&value, threads, None));
    let time = |key, longest: Duration, limit: &str| {
        let value = table.value(key)?;
        let time = value.parse(parse_time, |_| Some("write a time like \"20ms\"".to_owned()))?;
        if time.is_zero() || time > longest {
            value.error(format!("from 1ns to {limit}"), None);
        }
        Some((value, time))
    };
    let (time, every) =
        (time("time", LONGEST_STALL, "10s"), time("every", LONGEST_PERIOD, "1000s"));
    let (thread, (_, time), (value, every)) = (thread?, time?, every?);
    if every < time {
        let hint = "make it longer than `time`".to_owned();
        value.error("the next one would begin before the last has ended", Some(hint));
    }
    Some(Stall { thread, time, every })
}
