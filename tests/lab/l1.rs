//! L1: the emulated machine in which heddle runs.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use config::plan::DiskSource;
use tempfile::TempDir;

use crate::guest::{Disk, make_ext4};
use crate::job::{self, Content, Job, Outcome};
use crate::kit::{self, Kit};
use crate::{At, Result, With};

/// L1 must be up, or down, after this time. It takes 3 seconds where nothing else runs.
const PATIENCE: Duration = Duration::from_secs(120);

/// How to run L1.
pub struct L1<'a> {
    pub kit: &'a Kit,
    pub heddle: &'a Path,
    pub smp: u32,
    /// In MiB.
    pub memory: u32,
    /// Count instructions as time, which takes a single CPU.
    pub icount: bool,
    /// Files for the whole of L1: where they are here, and where there.
    pub more: Vec<(PathBuf, PathBuf)>,
}

impl<'a> L1<'a> {
    pub fn new(with: &With, kit: &'a Kit, heddle: &'a Path) -> Self {
        Self { kit, heddle, smp: with.smp, memory: 2048, icount: false, more: Vec::new() }
    }

    /// Makes the disk with all that L1 has.
    fn make_disk(&self, scratch: &Path, jobs: &[&Job]) -> Result<PathBuf> {
        let root = scratch.join("root");
        let lab = root.join("lab");
        for name in ["bin", "dev", "proc", "sys", "tmp", "lab/job", "lab/host"] {
            let path = root.join(name);
            fs::create_dir_all(&path).at(path.display())?;
        }
        let put = |from: &Path, to: &Path| {
            let to = root.join(to.strip_prefix("/").unwrap_or(to));
            fs::create_dir_all(to.parent().unwrap_or(&root)).at(to.display())?;
            fs::copy(from, &to).map(drop).at(from.display())
        };
        for (from, to) in [("vmlinux", "vmlinux"), ("vmlinuz", "vmlinuz"), ("l2.cpio", "initrd")] {
            put(&self.kit.path(from), &Path::new("/lab").join(to))?;
        }
        put(&self.kit.path("busybox"), Path::new("/lab/busybox"))?;
        put(self.heddle, Path::new("/lab/heddle"))?;
        for library in kit::libraries(self.heddle)? {
            put(&library, &library)?;
        }
        for entry in fs::read_dir(self.kit.path("host")).at("host")?.flatten() {
            put(&entry.path(), &Path::new("/lab/host").join(entry.file_name()))?;
        }
        for (from, to) in &self.more {
            put(from, to)?;
        }
        let script = lab.join("l1.sh");
        fs::write(&script, include_bytes!("l1.sh")).at("l1.sh")?;
        executable(&script)?;
        let mut names = String::new();
        for job in jobs {
            job::write(job, &lab.join("job").join(&job.name))?;
            names += &format!("{}\n", job.name);
        }
        fs::write(lab.join("jobs"), names).at("jobs")?;
        let disk = scratch.join("l1.img");
        // No journal: what matters is there only if L1 came to its end. Room for what jobs write.
        let size = mib(&root)? + 1024;
        make_ext4(&disk, &root, size, &["-O", "^has_journal", "-m", "0"])?;
        fs::remove_dir_all(&root).at(root.display())?;
        Ok(disk)
    }

    fn qemu(&self, disk: &Path, console: &Path) -> Command {
        let mut qemu = Command::new("qemu-system-x86_64");
        let accel = if self.icount { "tcg,thread=single" } else { "tcg,thread=multi" };
        qemu.args(["-M", "q35", "-accel", accel, "-cpu", "max,+svm,-la57"])
            .args(["-m", &self.memory.to_string(), "-smp", &self.smp.to_string()])
            .args(["-nodefaults", "-display", "none", "-no-reboot"])
            .arg("-kernel")
            .arg(self.kit.path("vmlinuz"))
            .arg("-initrd")
            .arg(self.kit.path("l1.cpio"))
            .args(["-append", "console=ttyS0 reboot=t panic=-1 mitigations=off quiet"])
            .arg("-drive")
            .arg(format!("if=none,id=disk,format=raw,cache=unsafe,file={}", disk.display()))
            .args(["-device", "virtio-blk-pci,drive=disk"])
            .arg("-serial")
            .arg(format!("file:{}", console.display()));
        if self.icount {
            qemu.args(["-icount", "shift=0,sleep=off"]);
        }
        qemu
    }

    /// Runs jobs one after the other, each with its time limit; `ended` hears of each as soon as
    /// it is over, but the files of jobs come only with the end of L1. What was not begun because
    /// L1 died before is left out.
    fn boot(
        &self,
        jobs: &[&Job],
        into: &Path,
        scratch: &TempDir,
        mut ended: impl FnMut(usize, Option<i32>, u64),
    ) -> Result<Vec<Outcome>> {
        let disk = self.make_disk(scratch.path(), jobs)?;
        let console = scratch.path().join("l1-console");
        let mut qemu = self.qemu(&disk, &console);
        let machine = Machine::start(qemu.args(["-serial", "stdio"]))?;
        let mut codes = Vec::new();
        let mut began = 0;
        let mut why = None;
        let mut deadline = Instant::now() + PATIENCE;
        loop {
            let line = match machine.line(deadline) {
                Ok(Some(line)) => line,
                Ok(None) => break,
                Err(error) => {
                    why = Some(error);
                    break;
                }
            };
            let words: Vec<&str> = line.split_whitespace().collect();
            let number = |nth: usize| words.get(nth).and_then(|word| word.parse::<u64>().ok());
            match words.first() {
                Some(&"begin") => {
                    began = number(2).unwrap_or(0);
                    let job = jobs.get(codes.len());
                    deadline = Instant::now() + job.map_or(PATIENCE, |job| job.limit);
                }
                Some(&"end") => {
                    let code = number(2).map(|code| code as i32);
                    let seconds = number(3).unwrap_or(0).saturating_sub(began);
                    if codes.len() < jobs.len() {
                        ended(codes.len(), code, seconds);
                        codes.push((code, seconds));
                    }
                    deadline = Instant::now() + PATIENCE;
                }
                Some(&"nokvm") => why = Some("kvm-amd finds no SVM in L1".to_owned()),
                _ => {}
            }
        }
        drop(machine);
        if codes.len() < jobs.len() {
            let last = why.unwrap_or_else(|| "L1 ended before its jobs".to_owned());
            let console =
                String::from_utf8_lossy(&fs::read(&console).unwrap_or_default()).into_owned();
            let tail: Vec<&str> = console.lines().rev().take(20).collect();
            let tail: Vec<&str> = tail.into_iter().rev().collect();
            if codes.is_empty() && began == 0 {
                return Err(format!("{last}; its console:\n{}", tail.join("\n")));
            }
            codes.push((None, 0));
            ended(codes.len() - 1, None, 0);
            kit::say(&format!("{last}; its console:\n{}", tail.join("\n")));
            // It was cut off.
            let _ = kit::run(kit::program("e2fsck").arg("-fy").arg(&disk));
        }
        let names = jobs[..codes.len()].iter().map(|job| format!("/lab/job/{}", job.name));
        Disk(&disk).take(&names.collect::<Vec<_>>(), into)?;
        let outcome = |(nth, (code, seconds)): (usize, (Option<i32>, u64))| Outcome {
            code,
            seconds,
            files: into.join(&jobs[nth].name),
        };
        Ok(codes.into_iter().enumerate().map(outcome).collect())
    }

    /// Runs all jobs, in as many boots of L1 as that takes. What comes of the job with this index
    /// is handed to `judge`, and its files are removed afterwards.
    pub fn run(
        &self,
        jobs: &[&Job],
        keep: Option<&Path>,
        mut judge: impl FnMut(usize, Outcome),
    ) -> Result<()> {
        let mut done = 0;
        while done < jobs.len() {
            let scratch = tempfile::tempdir().at("temporary directory")?;
            let left = &jobs[done..];
            let into = keep.unwrap_or(scratch.path());
            let said = |nth: usize, code: Option<i32>, seconds: u64| {
                let name = &left[nth].name;
                let code = code.map_or("lost".to_owned(), |code| format!("exit {code}"));
                kit::say(&format!(
                    "{:>3}/{} {name}: {code} after {seconds} s",
                    done + nth + 1,
                    jobs.len()
                ));
            };
            let outcomes = self.boot(left, into, &scratch, said)?;
            let count = outcomes.len();
            outcomes.into_iter().enumerate().for_each(|(nth, outcome)| judge(done + nth, outcome));
            done += count;
        }
        Ok(())
    }
}

fn executable(path: &Path) -> Result<()> {
    use std::os::unix::fs::PermissionsExt;
    fs::set_permissions(path, fs::Permissions::from_mode(0o755)).at(path.display())
}

/// MiB that the files below a directory take, rounded up.
fn mib(directory: &Path) -> Result<u64> {
    let mut bytes = 0;
    for entry in fs::read_dir(directory).at(directory.display())? {
        let path = entry.at(directory.display())?.path();
        bytes += match path.is_dir() {
            true => mib(&path)? << 20,
            false => path.metadata().at(path.display())?.len(),
        };
    }
    Ok(bytes.div_ceil(1 << 20))
}

/// A QEMU, and the lines it writes. Dropping it ends it.
struct Machine {
    child: Child,
    lines: Receiver<String>,
}

impl Machine {
    fn start(qemu: &mut Command) -> Result<Self> {
        let mut child =
            qemu.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().at("qemu-system-x86_64")?;
        let stdout = child.stdout.take().ok_or("no pipe")?;
        let (sender, lines) = channel();
        std::thread::spawn(move || {
            let mut reader = BufReader::new(stdout);
            let mut line = Vec::new();
            while let Ok(1..) = reader.read_until(b'\n', &mut line) {
                if sender.send(String::from_utf8_lossy(&line).trim().to_owned()).is_err() {
                    return;
                }
                line.clear();
            }
        });
        Ok(Self { child, lines })
    }

    /// The next line; `None`: there is none any more.
    fn line(&self, deadline: Instant) -> Result<Option<String>> {
        match self.lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok(line) => Ok(Some(line)),
            Err(RecvTimeoutError::Disconnected) => Ok(None),
            Err(RecvTimeoutError::Timeout) => Err("L1 says nothing for too long".to_owned()),
        }
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // Fails if it has ended, which is as good.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Runs somebody's machine file, with its console on this terminal.
pub fn boot(with: &With, file: &Path, set: &[String], memory: u32) -> Result<bool> {
    let loaded = config::load(file, set).map_err(|bad| bad.render(false))?;
    let kit = Kit::get()?;
    let heddle = kit::heddle(with)?;
    let mut l1 = L1::new(with, &kit, &heddle);
    l1.memory = memory;
    let here = std::path::absolute(file).at(file.display())?;
    let beside = here.parent().unwrap_or(Path::new("/")).to_owned();
    let plan = &loaded.plan;
    let kernel = plan.boot.kernel.iter().map(|kernel| kernel.path().to_owned());
    let modules = plan.boot.modules.iter().map(|module| module.path.clone());
    let mut named: Vec<PathBuf> = kernel.chain(modules).collect();
    named.extend(plan.disks.iter().filter_map(|disk| match &disk.source {
        DiskSource::File(path) | DiskSource::FileOrCreate(path, _) => Some(path.clone()),
        DiskSource::Scratch(_) => None,
    }));
    for path in named {
        let path = beside.join(path);
        if path.exists() && !path.starts_with("/lab") {
            l1.more.push((path.clone(), path));
        }
    }
    // With includes and --set worked in; relative paths stay relative to where the file is.
    let toml = beside.join(".lab.toml");
    let run = format!(
        "cd '{}'\nexec setsid -c /lab/heddle run .lab.toml <>/dev/ttyS2 >&0 2>&0\n",
        beside.display()
    );
    let scratch = tempfile::tempdir().at("temporary directory")?;
    let effective = scratch.path().join("vm.toml");
    fs::write(&effective, &loaded.effective).at(effective.display())?;
    l1.more.push((effective, toml));
    let job = Job {
        name: "boot".to_owned(),
        files: vec![("run", Content::Text(run))],
        limit: Duration::MAX,
    };
    kit::say("making L1's disk");
    let disk = l1.make_disk(scratch.path(), &[&job])?;
    let console = scratch.path().join("l1-console");
    let status = scratch.path().join("status");
    let mut qemu = l1.qemu(&disk, &console);
    qemu.arg("-serial").arg(format!("file:{}", status.display()));
    qemu.args(["-chardev", "stdio,id=terminal,signal=off", "-serial", "chardev:terminal"]);
    kit::say("starting L1; heddle's console follows (Ctrl-A X ends)");
    let ended = qemu.status().at("qemu-system-x86_64")?;
    let status = fs::read_to_string(&status).unwrap_or_default();
    let code = status.lines().find_map(|line| line.trim().strip_prefix("end boot "));
    let code = code.and_then(|rest| rest.split_whitespace().next());
    match code {
        Some(code) => kit::say(&format!("heddle's exit code is {code}")),
        None => {
            let said = fs::read(&console).unwrap_or_default();
            return Err(format!("L1 ended ({ended}): {}", String::from_utf8_lossy(&said)));
        }
    }
    Ok(code == Some("0"))
}
