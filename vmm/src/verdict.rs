//! What the built-in guest says of itself, and what its disks say of it.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use serde_json::Value;

use crate::ending::End;

#[path = "../../tests/guest/src/pattern.rs"]
mod pattern;

use pattern::{SECTOR, Stamp};

/// Sectors read at a time.
const CHUNK: u64 = 2048;

/// The end of a run of the built-in guest, seen with its report and with its disks' images.
///
/// Without a good verdict, or with an image that does not hold what the guest says it wrote, the
/// run has failed.
pub fn judge(end: End, report: Option<&Value>, images: &[(String, File)]) -> End {
    if !matches!(end, End::PowerOff | End::DebugExit(_) | End::Reset) {
        return end;
    }
    let Some(report) = report else {
        return End::Verdict("it ended without a verdict".to_owned());
    };
    if report["verdict"] != "ok" {
        let why = report["reason"].as_str().unwrap_or("no reason given");
        return End::Verdict(format!("its verdict is {}: {why}", report["verdict"]));
    }
    match check_disks(report, images) {
        Ok(()) => end,
        Err(why) => End::Verdict(why),
    }
}

/// May the built-in guest have this image, which it overwrites? It may if the first MiB is empty or
/// holds what an earlier run of the guest has left there; an image with a partition table, a file
/// system or a format of its own is somebody's.
pub fn may_overwrite(image: &File) -> io::Result<bool> {
    let mut bytes = vec![0; CHUNK as usize * SECTOR];
    let length = image.read_at(&mut bytes, 0)?;
    let (sectors, rest) = bytes[..length].as_chunks::<SECTOR>();
    let free = |sector: &[u8; SECTOR]| *sector == [0; SECTOR] || Stamp::read(sector).is_some();
    Ok(sectors.iter().all(free) && rest.iter().all(|byte| *byte == 0))
}

fn check_disks(report: &Value, images: &[(String, File)]) -> Result<(), String> {
    let disks = report["disks"].as_array().map_or(&[][..], Vec::as_slice);
    if disks.len() != images.len() {
        return Err(format!("it found {} of {} disks", disks.len(), images.len()));
    }
    for (nth, disk) in disks.iter().enumerate() {
        let id = disk["id"].as_str().unwrap_or_default();
        let Some((name, image)) = images.iter().find(|(name, _)| name == id) else {
            return Err(format!("it found a disk {id:?} that is none of this machine's"));
        };
        let rows = disk["written"].as_array().map_or(&[][..], Vec::as_slice);
        for row in rows {
            let field = |at: usize| row[at].as_u64().ok_or("its report is damaged");
            let written = Written {
                disk: nth as u32,
                vcpu: field(0)? as u32,
                generation: field(1)? as u32,
                sectors: field(2)?..field(2)?.saturating_add(field(3)?),
            };
            written.check(image).map_err(|why| format!("disk.{name}: {why}"))?;
        }
    }
    Ok(())
}

/// A range of sectors that one vCPU wrote.
struct Written {
    disk: u32,
    vcpu: u32,
    generation: u32,
    sectors: std::ops::Range<u64>,
}

impl Written {
    /// Reads the range from the image and compares every byte.
    fn check(&self, image: &File) -> Result<(), String> {
        let mut from = self.sectors.start;
        while from < self.sectors.end {
            let count = CHUNK.min(self.sectors.end - from);
            let mut bytes = vec![0; count as usize * SECTOR];
            let offset = from.saturating_mul(SECTOR as u64);
            image
                .read_exact_at(&mut bytes, offset)
                .map_err(|error: io::Error| error.to_string())?;
            let (sectors, _) = bytes.as_chunks::<SECTOR>();
            for (lba, sector) in (from..).zip(sectors) {
                let (disk, vcpu, generation) = (self.disk, self.vcpu, self.generation);
                let stamp = Stamp { disk, vcpu, generation, lba };
                pattern::check(&stamp, sector).map_err(|at| {
                    format!(
                        "sector {lba}, byte {at} is not what vCPU {vcpu} wrote in generation \
                         {generation} (it claims {:?})",
                        Stamp::read(sector)
                    )
                })?;
            }
            from += count;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn image() -> File {
        let file = tempfile::tempfile().unwrap();
        for lba in 0..10 {
            let mut sector = [0; SECTOR];
            let stamp = Stamp { disk: 0, vcpu: 1, generation: 3, lba };
            pattern::expected(&stamp, &mut sector);
            file.write_all_at(&sector, lba * SECTOR as u64).unwrap();
        }
        file
    }

    fn report(generation: u32, sectors: u64) -> Value {
        let written = json!([[1, generation, 0, sectors]]);
        json!({ "verdict": "ok", "disks": [{ "id": "data", "written": written }] })
    }

    fn judged(report: &Value, image: File) -> End {
        judge(End::PowerOff, Some(report), &[("data".to_owned(), image)])
    }

    #[test]
    fn an_image_with_all_that_was_written_is_good() {
        assert_eq!(judged(&report(3, 10), image()), End::PowerOff);
    }

    #[test]
    fn one_wrong_byte_an_old_generation_or_a_missing_sector_is_not() {
        let damaged = image();
        damaged.write_all_at(&[0x55], 4 * 512 + 99).unwrap();
        assert!(
            matches!(judged(&report(3, 10), damaged), End::Verdict(why) if why.contains("sector 4, byte 99"))
        );
        assert!(matches!(judged(&report(4, 10), image()), End::Verdict(_)));
        assert!(matches!(judged(&report(3, 11), image()), End::Verdict(_)));
    }

    #[test]
    fn an_image_that_is_empty_or_the_guests_own_may_be_overwritten_and_no_other() {
        assert!(may_overwrite(&tempfile::tempfile().unwrap()).unwrap());
        assert!(may_overwrite(&image()).unwrap());
        let somebodys = image();
        somebodys.write_all_at(b"EFI PART", 20 * 512).unwrap();
        assert!(!may_overwrite(&somebodys).unwrap());
    }

    #[test]
    fn silence_is_failure() {
        assert!(matches!(judge(End::PowerOff, None, &[]), End::Verdict(_)));
        let failed = json!({ "verdict": "failed", "reason": "lost" });
        assert!(
            matches!(judge(End::PowerOff, Some(&failed), &[]), End::Verdict(why) if why.contains("lost"))
        );
    }
}
