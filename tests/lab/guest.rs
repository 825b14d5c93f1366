//! The guest's side of a job: a disk with something on it, and what the guest left there.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::Path;
use std::process::Command;

use crate::kit::{program, run};
use crate::{At, Result};

/// Where the guest finds its kernels and its initrd in L1.
pub const VMLINUX: &str = "/lab/vmlinux";
pub const VMLINUZ: &str = "/lab/vmlinuz";
pub const INITRD: &str = "/lab/initrd";

/// The guest's command line.
pub fn cmdline(what: &str, end: &str, more: &str) -> String {
    let line = "console=ttyS0 quiet panic=-1 mitigations=off";
    // An emulated CPU on a busy machine may stand still for long; a guest that does is timed out.
    let patience = match what {
        "check" => " rcupdate.rcu_cpu_stall_suppress=1 nosoftlockup",
        _ => "",
    };
    format!("{line}{patience} LAB_DO={what} LAB_END={end} {more}").trim_end().to_owned()
}

/// Makes a disk with an ext4 that has one file, `source`, of `mib` MiB, and room for a copy of it.
/// Gives the MD5 of that file.
pub fn make_disk(image: &Path, mib: u32, seed: u64) -> Result<String> {
    let directory = tempfile::tempdir().at("temporary directory")?;
    let source = directory.path().join("source");
    let mut file = File::create(&source).at(source.display())?;
    let mut numbers = Numbers(seed);
    let mut block = vec![0; 1 << 20];
    for _ in 0..mib {
        block.chunks_exact_mut(8).for_each(|word| word.copy_from_slice(&numbers.next()));
        file.write_all(&block).at(source.display())?;
    }
    drop(file);
    make_ext4(image, directory.path(), u64::from(mib) * 2 + 32, &[])?;
    md5(File::open(&source).at(source.display())?)
}

/// Makes an ext4 of `mib` MiB with the files of a directory.
pub fn make_ext4(image: &Path, files: &Path, mib: u64, options: &[&str]) -> Result<()> {
    let mut mkfs = program("mkfs.ext4");
    mkfs.args(["-q", "-F", "-E", "root_owner=0:0"]).args(options).arg("-d").arg(files);
    run(mkfs.arg(image).arg(format!("{mib}M"))).map(drop)
}

/// SplitMix64: numbers that look random, the same for the same seed.
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> [u8; 8] {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ mixed >> 31).to_le_bytes()
    }
}

/// MD5 in hexadecimal, by `md5sum`, which the guest has too.
fn md5(file: File) -> Result<String> {
    let output = Command::new("md5sum").stdin(file).output().at("md5sum")?;
    let said = String::from_utf8_lossy(&output.stdout);
    said.split_whitespace().next().map(str::to_owned).ok_or("md5sum says nothing".into())
}

/// The disk of a guest that has ended.
pub struct Disk<'a>(pub &'a Path);

impl Disk<'_> {
    /// Is the file system without a fault?
    pub fn check(&self) -> Result<()> {
        run(program("e2fsck").arg("-fn").arg(self.0)).map(drop)
    }

    /// MD5 of a file in it.
    pub fn md5(&self, name: &str) -> Result<String> {
        md5(self.dump(name)?)
    }

    /// A file in it, as text.
    pub fn text(&self, name: &str) -> Result<String> {
        let mut bytes = Vec::new();
        self.dump(name)?.read_to_end(&mut bytes).at(name)?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    fn dump(&self, name: &str) -> Result<File> {
        let directory = tempfile::tempdir().at("temporary directory")?;
        let out = directory.path().join("out");
        // debugfs has no exit status for a file that is not there.
        let request = format!("dump {name} {}", out.display());
        run(program("debugfs").arg("-R").arg(request).arg(self.0))?;
        File::open(&out).at(format_args!("{name} on the guest's disk"))
    }

    /// Takes directories out of it, with all below. Those that are there already are replaced.
    pub fn take(&self, names: &[String], into: &Path) -> Result<()> {
        fs::create_dir_all(into).at(into.display())?;
        for name in names {
            let path = Path::new(name);
            let _ = fs::remove_dir_all(into.join(path.file_name().unwrap_or_default()));
            let request = format!("rdump {name} {}", into.display());
            run(program("debugfs").arg("-R").arg(request).arg(self.0))?;
        }
        Ok(())
    }
}
