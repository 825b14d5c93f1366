//! What the lab is made of: programs of this machine, a kernel, its modules, a busybox, heddle.

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::cpio::Archive;
use crate::modules::Modules;
use crate::{At, Result, With, kernel};

/// Programs that must be here, and Debian's packages that have them.
const PROGRAMS: [(&str, &str); 5] = [
    ("qemu-system-x86_64", "qemu-system-x86"),
    ("mkfs.ext4", "e2fsprogs"),
    ("e2fsck", "e2fsprogs"),
    ("debugfs", "e2fsprogs"),
    ("dpkg-deb", "dpkg"),
];
/// The package that depends on the newest kernel.
const KERNEL: &str = "linux-image-cloud-amd64";
const BUSYBOX: &str = "busybox-static";

/// What L1 needs to find its disk, and then to be a host.
const L1_DISK: [&str; 2] = ["virtio_pci", "virtio_blk"];
const L1_HOST: [&str; 1] = ["kvm_amd"];
/// What a guest needs.
const L2: [&str; 6] =
    ["virtio_pci", "virtio_mmio", "virtio_blk", "virtio_rng", "virtio_net", "virtio_console"];

/// Says on standard error what is being done.
pub fn say(what: &str) {
    eprintln!("lab: {what}");
}

/// Runs a program to its end, and gives what it says on standard output.
pub fn run(command: &mut Command) -> Result<String> {
    let name = command.get_program().to_string_lossy().into_owned();
    let output = command.stdin(Stdio::null()).output().at(&name)?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        return Err(format!("{name}: {}: {}", output.status, said.trim_end()));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// A program, where administrators' programs are found, too.
pub fn program(name: &str) -> Command {
    let mut command = Command::new(name);
    let path = std::env::var("PATH").unwrap_or_default();
    command.env("PATH", format!("{path}:/usr/sbin:/sbin"));
    command
}

/// Installs programs that are missing.
fn install() -> Result<()> {
    let path = std::env::var("PATH").unwrap_or_default() + ":/usr/sbin:/sbin";
    let there = |name: &&str| path.split(':').any(|part| Path::new(part).join(name).exists());
    let missing = PROGRAMS.iter().filter(|(name, _)| !there(name));
    let mut packages: Vec<&str> = missing.map(|(_, package)| *package).collect();
    packages.dedup();
    if packages.is_empty() {
        return Ok(());
    }
    say(&format!("installing {} with apt-get", packages.join(", ")));
    #[expect(unsafe_code, reason = "geteuid")]
    // SAFETY: always succeeds and touches no memory.
    let is_root = unsafe { libc::geteuid() } == 0;
    let mut command = match is_root {
        true => Command::new("apt-get"),
        false => {
            let mut sudo = Command::new("sudo");
            sudo.args(["-n", "apt-get"]);
            sudo
        }
    };
    command.env("DEBIAN_FRONTEND", "noninteractive");
    command.args(["install", "-qq", "-y", "--no-install-recommends"]).args(&packages);
    run(&mut command)
        .map(drop)
        .map_err(|error| format!("{error}\nlab: please install {}", packages.join(", ")))
}

/// The target directory this program lies in.
fn target() -> Result<PathBuf> {
    // TARGET/PROFILE/lab
    let exe = std::env::current_exe().at("this program")?;
    exe.ancestors().nth(2).map(Path::to_owned).ok_or("this program lies in no target/".into())
}

/// A kernel with what is made of it, in a directory of its own.
pub struct Kit {
    /// Where it lies; below it are `vmlinuz`, `vmlinux`, `l1.cpio`, `l2.cpio`, `busybox` and the
    /// directory `host` with the modules that make L1 a host, their names in order in `host/order`.
    pub directory: PathBuf,
    /// What is booted.
    pub release: String,
}

impl Kit {
    /// A kit; the newest kernel is fetched if there is none yet.
    pub fn get() -> Result<Self> {
        install()?;
        let lab = target()?.join("lab");
        let current = fs::read_to_string(lab.join("current")).unwrap_or_default();
        let complete = |release: &str| lab.join(release).join("complete").exists();
        if !current.is_empty() && !complete(&current) {
            say(&format!("target/lab/{current} is not complete"));
        }
        match !current.is_empty() && complete(&current) {
            true => Self::at(&lab, &current),
            false => fetch(&lab),
        }
    }

    fn at(lab: &Path, release: &str) -> Result<Self> {
        let kit = Self { directory: lab.join(release), release: release.to_owned() };
        // The scripts are part of this program, so the initrds are made with it.
        kit.make_initrds()?;
        Ok(kit)
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    fn make_initrds(&self) -> Result<()> {
        let init = include_bytes!("l1-init.sh");
        self.make_initrd("l1", "disk", init)?;
        self.make_initrd("l2", "guest", include_bytes!("l2.sh"))
    }

    fn make_initrd(&self, name: &str, modules: &str, init: &[u8]) -> Result<()> {
        let mut archive = Archive::new();
        for directory in ["bin", "dev", "proc", "sys", "mnt", "tmp", "modules"] {
            archive.directory(directory);
        }
        archive.device("dev/console", 5, 1);
        let mut add = |name: &str, path: PathBuf| {
            fs::read(&path).at(path.display()).map(|bytes| archive.file(name, &bytes))
        };
        add("bin/busybox", self.path("busybox"))?;
        for entry in fs::read_dir(self.path(modules)).at(modules)? {
            let entry = entry.at(modules)?;
            add(&format!("modules/{}", entry.file_name().to_string_lossy()), entry.path())?;
        }
        archive.file("init", init);
        put(&self.path(&format!("{name}.cpio")), &archive.finish())
    }
}

/// Writes a file as a whole, so that another process that runs beside this one never sees a part.
fn put(path: &Path, bytes: &[u8]) -> Result<()> {
    if fs::read(path).is_ok_and(|old| old == bytes) {
        return Ok(());
    }
    let new = path.with_extension(format!("{}.new", std::process::id()));
    fs::write(&new, bytes).and_then(|()| fs::rename(&new, path)).at(path.display())
}

/// Fetches the newest kernel.
pub fn update() -> Result<Kit> {
    install()?;
    fetch(&target()?.join("lab"))
}

fn fetch(lab: &Path) -> Result<Kit> {
    fs::create_dir_all(lab).at(lab.display())?;
    let depends = run(Command::new("apt-cache").args(["depends", "--no-recommends", KERNEL]))?;
    let package = depends
        .lines()
        .filter_map(|line| line.trim().strip_prefix("Depends: "))
        .find(|name| name.starts_with("linux-image-"))
        .ok_or_else(|| format!("apt knows no {KERNEL}: run apt-get update"))?;
    let version = run(Command::new("apt-cache").args(["show", "--no-all-versions", package]))?;
    let version = version.lines().find_map(|line| line.strip_prefix("Version: "));
    let version = version.ok_or_else(|| format!("apt knows no version of {package}"))?;
    let release = format!("{package}_{}", version.replace(':', "."));
    if !lab.join(&release).join("complete").exists() {
        say(&format!("fetching {package} {version} and {BUSYBOX} with apt-get"));
        let new = tempfile::tempdir_in(lab).at(lab.display())?;
        unpack(new.path(), package)?;
        let directory = lab.join(&release);
        let _ = fs::remove_dir_all(&directory);
        fs::rename(new.keep(), &directory).at(directory.display())?;
    }
    put(&lab.join("current"), release.as_bytes())?;
    Kit::at(lab, &release)
}

/// Downloads the packages, and makes of them what a [`Kit`] has.
fn unpack(kit: &Path, package: &str) -> Result<()> {
    let mut apt = Command::new("apt-get");
    run(apt.args(["download", "-q", package, BUSYBOX]).current_dir(kit))
        .map_err(|error| format!("{error}\nlab: is apt-get update needed?"))?;
    let all = kit.join("all");
    for entry in fs::read_dir(kit).at(kit.display())? {
        let path = entry.at(kit.display())?.path();
        if path.extension() == Some(OsStr::new("deb")) {
            run(Command::new("dpkg-deb").arg("-x").arg(&path).arg(&all))?;
            fs::remove_file(&path).at(path.display())?;
        }
    }
    let boot = all.join("boot");
    let mut names = fs::read_dir(&boot).at(boot.display())?.flatten().map(|entry| entry.path());
    let vmlinuz = names
        .find(|path| {
            path.file_name().unwrap_or_default().as_encoded_bytes().starts_with(b"vmlinuz")
        })
        .ok_or("the kernel's package has no vmlinuz")?;
    let bytes = fs::read(&vmlinuz).at(vmlinuz.display())?;
    say("unpacking the ELF in its bzImage");
    put(&kit.join("vmlinux"), &kernel::vmlinux(&bytes).at(vmlinuz.display())?)?;
    put(&kit.join("vmlinuz"), &bytes)?;
    let busybox = ["bin/busybox", "usr/bin/busybox"].map(|name| all.join(name));
    let busybox = busybox.iter().find(|path| path.exists()).ok_or("no busybox in its package")?;
    fs::copy(busybox, kit.join("busybox")).at("busybox")?;
    let modules = ["lib/modules", "usr/lib/modules"].map(|name| all.join(name));
    let modules = modules.iter().find(|path| path.exists()).ok_or("the kernel has no modules")?;
    let modules = Modules::find(modules)?;
    for (name, wanted) in [("disk", &L1_DISK[..]), ("host", &L1_HOST), ("guest", &L2)] {
        let directory = kit.join(name);
        fs::create_dir(&directory).at(directory.display())?;
        let mut order = String::new();
        for path in modules.ordered(wanted)? {
            let file = path.file_name().unwrap_or_default();
            fs::copy(&path, directory.join(file)).at(path.display())?;
            order += &format!("{}\n", file.to_string_lossy());
        }
        put(&directory.join("order"), order.as_bytes())?;
    }
    fs::remove_dir_all(&all).at(all.display())?;
    put(&kit.join("complete"), b"")
}

/// The `heddle` to be tried.
pub fn heddle(with: &With) -> Result<PathBuf> {
    if let Some(path) = &with.heddle {
        return fs::canonicalize(path).at(path.display());
    }
    say("building heddle");
    let target = target()?;
    let status = Command::new(env!("CARGO"))
        .args(["build", "--release", "--quiet", "--locked", "-p", "vmm", "--bin", "heddle"])
        .arg("--target-dir")
        .arg(&target)
        .arg("--manifest-path")
        .arg(tests::program::root().join("Cargo.toml"))
        .status()
        .at("cargo")?;
    match status.success() {
        true => Ok(target.join("release/heddle")),
        false => Err(format!("heddle does not build: {status}")),
    }
}

/// The libraries that a program is linked with, by `ldd`.
pub fn libraries(program: &Path) -> Result<Vec<PathBuf>> {
    let output = Command::new("ldd").arg(program).output().at("ldd")?;
    let said = String::from_utf8_lossy(&output.stdout);
    // "not a dynamic executable" is no error here.
    let words = said.lines().flat_map(|line| line.split_whitespace().find(|w| w.starts_with('/')));
    Ok(words.map(PathBuf::from).collect())
}
