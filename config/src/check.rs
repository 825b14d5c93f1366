//! What this host lacks for a plan. Opens files, changes nothing.

use std::collections::BTreeMap;
use std::fs::{self, Metadata, OpenOptions};
use std::io::{Error, ErrorKind};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::Path;

use crate::diagnostics::Severity;
use crate::explain::{Problem, explain};
use crate::plan::{Disk, DiskSource, Plan, SerialOut};
use crate::topology::Host;

/// Everything that keeps `plan` from running on this host as it is, and what is doubtful.
///
/// Asks `host` about CPUs, memory and limits, and the file system about files and /dev/kvm; what
/// KVM itself can do is not asked.
///
/// Codes: `H01` a disk, `H02` a boot file, `H03` a serial port's file, `H04` open files,
/// `H05` /dev/kvm; those of [`explain()`] are errors where the host lacks something.
pub fn check_host(plan: &Plan, host: &Host) -> Vec<Problem> {
    let explanation = explain(plan, host);
    let mut problems = Vec::new();
    check_kvm(&mut problems, Path::new("/dev/kvm"));
    plan.boot.files().for_each(|file| check_boot(&mut problems, file));
    let mut inodes = BTreeMap::new();
    for disk in &plan.disks {
        check_disk(&mut problems, disk, &mut inodes);
    }
    for serial in &plan.serials {
        if let SerialOut::File(path) = &serial.out {
            check_serial(&mut problems, &serial.name, path);
        }
    }
    let need = explanation.fds();
    if let Some(limits) = host.limits.filter(|limits| need > limits.nofile) {
        let message = format!("{need} open files are needed, the hard limit is {}", limits.nofile);
        problems.push(Problem::error("H04", message, "raise it: ulimit -Hn, or limits.conf"));
    }
    for problem in explanation.warnings {
        let lacking = matches!(problem.code, "W07" | "W08" | "W09" | "W10" | "W11" | "W20" | "W21");
        let severity = if lacking { Severity::Error } else { problem.severity };
        problems.push(Problem { severity, ..problem });
    }
    problems.sort_by_key(|problem| std::cmp::Reverse(problem.severity));
    problems
}

fn check_kvm(problems: &mut Vec<Problem>, path: &Path) {
    let Err(error) = open(path, true) else { return };
    let hint = match error.kind() {
        ErrorKind::PermissionDenied => "join its group (usually kvm), or run as root",
        _ => "load kvm_intel or kvm_amd; in a virtual machine, it needs nested virtualisation",
    };
    problems.push(Problem::error("H05", format!("{}: {}", path.display(), plain(&error)), hint));
}

fn check_boot(problems: &mut Vec<Problem>, path: &Path) {
    let name = path.display();
    let wrong = match fs::metadata(path) {
        Ok(metadata) if !metadata.is_file() => format!("{name} is {}", kind(&metadata)),
        Ok(_) => match open(path, false) {
            Ok(()) => return,
            Err(error) => format!("{name}: {}", plain(&error)),
        },
        Err(error) => format!("{name}: {}", plain(&error)),
    };
    problems.push(Problem::error("H02", wrong, "[boot] needs a file that can be read"));
}

fn check_disk(
    problems: &mut Vec<Problem>,
    disk: &Disk,
    inodes: &mut BTreeMap<(u64, u64), (String, bool)>,
) {
    let (path, size) = match &disk.source {
        DiskSource::File(path) => (path, None),
        DiskSource::FileOrCreate(path, size) => (path, Some(size)),
        DiskSource::Scratch(_) => return,
    };
    let name = format!("disk.{}: {}", disk.name, path.display());
    let mut error =
        |message: String, hint: &str| problems.push(Problem::error("H01", message, hint));
    let metadata = match fs::metadata(path) {
        Ok(metadata) => metadata,
        Err(missing) if missing.kind() == ErrorKind::NotFound => {
            let dir = path.parent().unwrap_or(Path::new("/"));
            if size.is_none() {
                let hint = "add `size` to have it made, or make it: truncate -s 4G FILE";
                error(format!("{name} does not exist"), hint);
            } else if !dir.is_dir() {
                error(
                    format!("{name} cannot be made: its directory does not exist"),
                    "make the directory",
                );
            }
            return;
        }
        Err(other) => return error(format!("{name}: {}", plain(&other)), "check the path"),
    };
    if !metadata.is_file() && !metadata.file_type().is_block_device() {
        let hint = "a disk is a raw image file or a block device";
        return error(format!("{name} is {}", kind(&metadata)), hint);
    }
    if let Err(denied) = open(path, !disk.read_only) {
        let hint = match disk.read_only {
            true => "heddle must be able to read it",
            false => "heddle must be able to read and write it; or set read-only = true",
        };
        return error(format!("{name}: {}", plain(&denied)), hint);
    }
    let writes = !disk.read_only;
    let inode = (metadata.dev(), metadata.ino());
    match inodes.get(&inode) {
        Some((other, other_writes)) if writes || *other_writes => {
            error(
                format!("{name} is the same file as {other}"),
                "only disks that are all read-only may share a file",
            );
        }
        Some(_) => {}
        None => {
            inodes.insert(inode, (name.clone(), writes));
        }
    }
    let (bytes, size_given) = (metadata.len(), size.copied());
    if metadata.is_file() && (bytes == 0 || bytes % 512 != 0) {
        let message = format!("{name}: its size, {bytes} bytes, is no positive multiple of 512");
        problems.push(Problem::error("H01", message, "is it a raw image? truncate -s SIZE FILE"));
    } else if metadata.is_file() && size_given.is_some_and(|given| given != bytes) {
        let message = format!("{name} exists and has {bytes} bytes; `size` does not change that");
        let hint = "resize it: qemu-img resize -f raw FILE SIZE; or leave `size` out";
        problems.push(Problem::warning("H01", message, hint));
    }
}

fn check_serial(problems: &mut Vec<Problem>, port: &str, path: &Path) {
    let name = format!("serial.{port}: {}", path.display());
    let wrong = match fs::metadata(path) {
        Ok(metadata) if !metadata.is_file() && !metadata.file_type().is_char_device() => {
            format!("{name} is {}", kind(&metadata))
        }
        Ok(_) => match OpenOptions::new().write(true).custom_flags(libc::O_NONBLOCK).open(path) {
            Ok(_) => return,
            Err(error) => format!("{name}: {}", plain(&error)),
        },
        Err(error) if error.kind() == ErrorKind::NotFound => {
            match path.parent().unwrap_or(Path::new("/")).is_dir() {
                true => return,
                false => format!("{name} cannot be made: its directory does not exist"),
            }
        }
        Err(error) => format!("{name}: {}", plain(&error)),
    };
    problems.push(Problem::error("H03", wrong, "the output needs a file that can be written"));
}

/// Can it be opened? Never waits for the other end of a pipe, never creates.
fn open(path: &Path, write: bool) -> Result<(), Error> {
    let flags = libc::O_NONBLOCK | libc::O_NOCTTY;
    OpenOptions::new().read(true).write(write).custom_flags(flags).open(path).map(drop)
}

/// The error without its number.
fn plain(error: &Error) -> String {
    let text = error.to_string();
    text.split(" (os error").next().unwrap_or_default().to_lowercase()
}

fn kind(metadata: &Metadata) -> &'static str {
    let kind = metadata.file_type();
    if kind.is_dir() {
        "a directory"
    } else if kind.is_fifo() {
        "a named pipe"
    } else if kind.is_socket() {
        "a socket"
    } else if kind.is_char_device() {
        "a character device"
    } else if kind.is_block_device() {
        "a block device"
    } else {
        "a regular file"
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_without_kvm_is_told_what_to_do() {
        let mut problems = Vec::new();
        check_kvm(&mut problems, Path::new("/nowhere/kvm"));
        assert_eq!(problems[0].message, "/nowhere/kvm: no such file or directory");
        assert!(problems[0].hint.as_ref().is_some_and(|hint| hint.contains("kvm_intel")));
        check_kvm(&mut problems, Path::new("/dev/null"));
        assert_eq!(problems.len(), 1);
    }
}
