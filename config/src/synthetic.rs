//! Hosts that do not exist, written as a /sys tree: to plan for them, and for tests.

use std::fs;
use std::io::Result;
use std::path::Path;

/// A regular host: every socket is a NUMA node with a last level cache of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Synthetic {
    /// Sockets.
    pub sockets: u32,
    /// Cores in a socket.
    pub cores: u32,
    /// Hardware threads in a core.
    pub threads: u32,
    /// Bytes of memory in a node; a quarter of it is used.
    pub memory: u64,
    /// Free huge pages of 2 MiB in a node.
    pub hugepages: u64,
}

impl Synthetic {
    /// Writes what [`Host::from_sysfs`](crate::Host::from_sysfs) reads below `root`. CPUs are
    /// numbered as on real hosts: the first threads of all cores, then the second ones.
    ///
    /// # Errors
    /// A file or directory cannot be made.
    pub fn write(self, root: &Path) -> Result<()> {
        let Self { sockets, cores, threads, .. } = self;
        let system = root.join("devices/system");
        let cpu = |socket, core, thread| thread * sockets * cores + socket * cores + core;
        let list = |cpus: Vec<u32>| cpus.iter().map(u32::to_string).collect::<Vec<_>>().join(",");
        write(&system.join("cpu/online"), &format!("0-{}", sockets * cores * threads - 1))?;
        for socket in 0..sockets {
            let all = (0..cores).flat_map(|core| (0..threads).map(move |thread| (core, thread)));
            let all = list(all.map(|(core, thread)| cpu(socket, core, thread)).collect());
            for core in 0..cores {
                let siblings = list((0..threads).map(|thread| cpu(socket, core, thread)).collect());
                for thread in 0..threads {
                    let dir = system.join(format!("cpu/cpu{}", cpu(socket, core, thread)));
                    write(&dir.join("topology/physical_package_id"), &socket.to_string())?;
                    write(&dir.join("topology/die_id"), "0")?;
                    write(&dir.join("topology/core_id"), &core.to_string())?;
                    write(&dir.join("topology/core_cpus_list"), &siblings)?;
                    for (index, level, sharers) in [(0, "1", &siblings), (1, "3", &all)] {
                        let cache = dir.join(format!("cache/index{index}"));
                        write(&cache.join("level"), level)?;
                        write(&cache.join("shared_cpu_list"), sharers)?;
                    }
                }
            }
            let node = system.join(format!("node/node{socket}"));
            write(&node.join("cpulist"), &all)?;
            let kib = self.memory / 1024;
            let meminfo = format!(
                "Node {socket} MemTotal: {kib} kB\nNode {socket} MemFree: {} kB",
                kib / 4 * 3
            );
            write(&node.join("meminfo"), &meminfo)?;
            let pool = node.join("hugepages/hugepages-2048kB");
            write(&pool.join("nr_hugepages"), &self.hugepages.to_string())?;
            write(&pool.join("free_hugepages"), &self.hugepages.to_string())?;
        }
        Ok(())
    }
}

fn write(path: &Path, text: &str) -> Result<()> {
    fs::create_dir_all(path.parent().unwrap_or(Path::new("/")))?;
    fs::write(path, format!("{text}\n"))
}
