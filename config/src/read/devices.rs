//! `[disk.NAME]`, `[rng.NAME]` and `[serial.NAME]`.

use super::Files;
use super::placement::{placement, placements};
use crate::keys::{MAX_DEVICES, PCI_PLACES};
use crate::plan::{
    Disk, DiskSource, Engine, MAIN, Machine, Placement, Rng, Serial, SerialOut, Thread,
};
use crate::reader::Reader;
use crate::value::Value;

/// Sizes of disks are counted in these.
const SECTOR: u64 = 512;
/// Files cannot be larger than a signed 64-bit offset.
const LARGEST_DISK: u64 = i64::MAX as u64;
const SERIAL_PORTS: [&str; 4] = ["com1", "com2", "com3", "com4"];

pub(super) fn check_count(root: &Reader<'_>, count: usize, machine: &Machine) {
    let slots = usize::from(machine.hotplug_slots);
    if slots > 0 && count + slots > PCI_PLACES {
        let message = format!(
            "{count} disks and rngs and {slots} hot-plug slots are too many for a PCI bus, which has \
             {PCI_PLACES} places"
        );
        root.report.error(root.loc_of("machine"), message, None);
    }
    if count > MAX_DEVICES {
        let message =
            format!("{count} disks and rngs together are too many, the most is {MAX_DEVICES}");
        root.report.error(root.loc_of("disk"), message, None);
    }
}

pub(super) fn disks(
    root: &Reader<'_>,
    threads: &[Thread],
    vcpus: u32,
    files: &mut Files,
) -> Vec<Disk> {
    let tables = root.named("disk");
    tables
        .into_iter()
        .filter_map(|(name, table)| disk(name, &table, threads, vcpus, files))
        .collect()
}

fn disk(
    name: String,
    table: &Reader<'_>,
    threads: &[Thread],
    vcpus: u32,
    files: &mut Files,
) -> Option<Disk> {
    let flag = |key| table.value(key).and_then(|value| value.bool()).unwrap_or(false);
    let read_only = flag("read-only");
    let direct = flag("direct");
    let source = source(table, read_only);
    let engine = match table.value("engine").and_then(|value| value.word()) {
        Some("sync") => Engine::Sync,
        _ => Engine::IoUring,
    };
    let queue_size = table.value("queue-size").and_then(|value| {
        let size: u16 = value.int()?;
        if !size.is_power_of_two() {
            let hint = Some(format!("{} is one", size.next_power_of_two()));
            value.error(format!("`{}.queue-size` must be a power of two", table.path), hint);
        }
        Some(size)
    });
    let count = table
        .value("queues")
        .and_then(Value::alternative)
        .and_then(|value| if value.is_text() { value.word().map(|_| vcpus) } else { value.int() });
    let place = table.value("place").and_then(Value::alternative);
    let queues = place.map(|place| placements(table, &place, threads, count));
    let source = source?;
    files.add_disk(table.report, &source, &table.path, !read_only, table.loc_of("path"));
    Some(Disk {
        name,
        source,
        engine,
        read_only,
        direct,
        queue_size: queue_size.unwrap_or_default(),
        queues: queues.unwrap_or_default(),
    })
}

fn source(table: &Reader<'_>, read_only: bool) -> Option<DiskSource> {
    let path = table.value("path").map(|value| value.path());
    let size = table.value("size").map(|value| {
        let size = value.size()?;
        if size == 0 || !size.is_multiple_of(SECTOR) || size > LARGEST_DISK {
            value.error("the size of a disk must be a multiple of 512 bytes, up to 8191P", None);
        }
        Some(size)
    });
    match (path, size) {
        (Some(path), None) => Some(DiskSource::File(path?)),
        (Some(path), Some(size)) => Some(DiskSource::FileOrCreate(path?, size?)),
        (None, Some(size)) => {
            if read_only {
                let message = format!("`{}` is empty and read-only", table.path);
                let hint = "give it a `path`, or let the guest write to it".to_owned();
                table.report.warning(table.loc_of("read-only"), message, Some(hint));
            }
            Some(DiskSource::Scratch(size?))
        }
        (None, None) => {
            table.error(
                format!("`{}` has neither a `path` nor a `size`", table.path),
                Some("`path` takes a file, `size` alone makes a temporary one".to_owned()),
            );
            None
        }
    }
}

pub(super) fn rngs(root: &Reader<'_>, threads: &[Thread]) -> Vec<Rng> {
    let rng = |(name, table): (String, Reader<'_>)| {
        let place = table.value("place").and_then(|value| placement(&value, threads));
        Rng { name, place: place.unwrap_or(Placement::Loop(MAIN)) }
    };
    root.named("rng").into_iter().map(rng).collect()
}

pub(super) fn serials(root: &Reader<'_>, files: &mut Files) -> Vec<Serial> {
    let mut serials: Vec<Serial> = Vec::new();
    for (name, table) in root.named("serial") {
        if !SERIAL_PORTS.contains(&name.as_str()) {
            let message = format!("there is no serial port `{name}`");
            table.error(message, Some("the ports are com1, com2, com3 and com4".to_owned()));
        }
        let at = table.loc_of("out");
        let Some(out) = table.value("out").and_then(Value::alternative).and_then(serial_out) else {
            continue;
        };
        files.add_serial(table.report, &out, &table.path, at);
        if let Some(other) =
            serials.iter().find(|other| out == SerialOut::Stdio && other.out == out)
        {
            let message =
                format!("`{}` is on stdio, and so is `serial.{}`", table.path, other.name);
            let hint =
                "one port can have the terminal; give the other \"null\" or a file".to_owned();
            table.report.error(at, message, Some(hint));
        }
        serials.push(Serial { name, out });
    }
    if serials.is_empty() && !root.has("serial") {
        serials.push(Serial { name: SERIAL_PORTS[0].to_owned(), out: SerialOut::Stdio });
    }
    serials
}

fn serial_out(value: Value<'_>) -> Option<SerialOut> {
    if value.is_table() {
        return value.into_table().value("file")?.path().map(SerialOut::File);
    }
    Some(if value.word()? == "null" { SerialOut::Null } else { SerialOut::Stdio })
}
