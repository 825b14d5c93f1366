//! What a host has: CPUs and how they hang together, memory, huge pages, and what we may use.

use std::collections::BTreeMap;
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::cpuset::CpuSet;

/// A host, this one or one that was recorded.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Host {
    /// The online CPUs by their numbers.
    pub cpus: BTreeMap<u32, HostCpu>,
    /// The NUMA nodes by their numbers; empty: a host without.
    pub nodes: BTreeMap<u32, NodeMemory>,
    /// Memory in bytes; `None`: unknown.
    pub memory: Option<u64>,
    /// The pools of huge pages, by size and node.
    pub hugepages: Vec<HugePages>,
    /// The CPUs this process may use; `None`: unknown, because it is another host.
    pub allowed: Option<CpuSet>,
    /// The limits of this process; `None`: unknown, because it is another host.
    pub limits: Option<Limits>,
}

/// One logical CPU.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct HostCpu {
    /// Physical package (socket).
    pub package: u32,
    /// Die in the package.
    pub die: u32,
    /// Core in the package.
    pub core: u32,
    /// The CPUs of its core, itself included.
    pub siblings: CpuSet,
    /// The CPUs that share its last level cache, itself included; `None`: unknown.
    pub llc: Option<CpuSet>,
    /// NUMA node.
    pub node: u32,
}

/// The memory of a NUMA node, in bytes. `None`: unknown.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct NodeMemory {
    /// All of it.
    pub total: Option<u64>,
    /// What nobody uses, and the file cache, which gives way.
    pub available: Option<u64>,
}

/// A pool of huge pages of one size on one node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct HugePages {
    /// NUMA node.
    pub node: u32,
    /// Bytes in a page.
    pub size: u64,
    /// Pages in the pool.
    pub total: u64,
    /// Pages nobody uses.
    pub free: u64,
}

/// What this process may ask of the kernel. [`u64::MAX`] is "unlimited".
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Limits {
    /// Effective user id.
    pub uid: u32,
    /// May it set any priority (CAP_SYS_NICE)?
    pub sys_nice: bool,
    /// The most open files, after raising the limit as far as allowed.
    pub nofile: u64,
    /// The highest real-time priority.
    pub rtprio: u64,
    /// The lowest nice value, at most 0.
    pub nice: i8,
    /// Bytes it may lock in memory.
    pub memlock: u64,
}

/// A file of the host that is missing or is not what it should be.
#[derive(Debug, thiserror::Error)]
pub enum TopologyError {
    /// It cannot be read.
    #[error("cannot read {path}: {source}", path = path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// It holds something else.
    #[error("{path} holds `{found}`, which is not {expected}", path = path.display())]
    Content {
        /// The file.
        path: PathBuf,
        /// The start of what it holds.
        found: String,
        /// What it should hold.
        expected: &'static str,
    },
}

impl Host {
    /// This host and what this process may do on it.
    ///
    /// # Errors
    /// A file of /sys or /proc that must be there is missing or damaged.
    pub fn live() -> Result<Self, TopologyError> {
        let mut host = Self::from_sysfs(Path::new("/sys"))?;
        let status = Proc::open("/proc/self/status")?;
        let meminfo = Proc::open("/proc/meminfo")?;
        let limits = Proc::open("/proc/self/limits")?;
        host.memory = Some(meminfo.memory("MemTotal:")?);
        let allowed = status.field("Cpus_allowed_list:", "a CPU set", |text| text.parse().ok())?;
        host.allowed = Some(allowed);
        host.limits = Some(Limits {
            uid: status
                .field("Uid:", "user ids", |ids| ids.split_whitespace().nth(1)?.parse().ok())?,
            sys_nice: status.field("CapEff:", "a set of capabilities", |mask| {
                const CAP_SYS_NICE: u32 = 23;
                Some(u64::from_str_radix(mask, 16).ok()? >> CAP_SYS_NICE & 1 == 1)
            })?,
            nofile: limits.hard_limit("Max open files")?,
            rtprio: limits.limit("Max realtime priority")?,
            // The limit is written as 20 - nice, so that it cannot be negative.
            nice: 0.min(20 - limits.limit("Max nice priority")?.min(40) as i8),
            memlock: limits.limit("Max locked memory")?,
        });
        Ok(host)
    }

    /// The host whose /sys is under `root`: /sys itself, or a copy of
    /// `devices/system/{cpu,node}` from another host.
    ///
    /// What a kernel may leave out has a default: a CPU without topology is a core of its own in
    /// package 0, a host without nodes is one node.
    ///
    /// # Errors
    /// The list of online CPUs is missing, or a file is damaged.
    pub fn from_sysfs(root: &Path) -> Result<Self, TopologyError> {
        let system = root.join("devices/system");
        let online: CpuSet = parse_file(&system.join("cpu/online"), "a CPU set")?;
        let nodes = nodes(&system.join("node"))?;
        let mut node_of = BTreeMap::new();
        for (node, path) in &nodes {
            // A node without CPUs has an empty file.
            let cpus = optional(&path.join("cpulist"))?.filter(|text| !text.is_empty());
            if let Some(cpus) = cpus {
                let cpus: CpuSet =
                    content(&path.join("cpulist"), &cpus, "a CPU set", |t| t.parse().ok())?;
                node_of.extend(cpus.iter().map(|cpu| (cpu, *node)));
            }
        }
        let mut cpus = BTreeMap::new();
        for cpu in online.iter() {
            let node = node_of.get(&cpu).copied().unwrap_or(0);
            cpus.insert(cpu, host_cpu(&system.join(format!("cpu/cpu{cpu}")), cpu, node)?);
        }
        let mut hugepages = Vec::new();
        let mut memory = None;
        let mut memory_of = BTreeMap::new();
        for (node, path) in &nodes {
            hugepages.extend(huge_pages(&path.join("hugepages"), *node)?);
            let of_node = node_memory(&path.join("meminfo"))?;
            memory_of.insert(*node, of_node);
            if let Some(total) = of_node.total {
                memory = Some(memory.unwrap_or(0u64).saturating_add(total));
            }
        }
        if nodes.is_empty() {
            hugepages = huge_pages(&root.join("kernel/mm/hugepages"), 0)?;
        }
        Ok(Self { cpus, nodes: memory_of, memory, hugepages, allowed: None, limits: None })
    }

    /// The numbers of the online CPUs.
    pub fn online(&self) -> CpuSet {
        self.cpus.keys().copied().collect()
    }

    /// The CPUs a thread without a CPU set of its own may use.
    pub fn usable(&self) -> CpuSet {
        match &self.allowed {
            Some(allowed) => allowed.intersection(&self.online()),
            None => self.online(),
        }
    }

    /// The NUMA nodes of `cpus`.
    pub fn nodes_of(&self, cpus: &CpuSet) -> CpuSet {
        cpus.iter().filter_map(|cpu| Some(self.cpus.get(&cpu)?.node)).collect()
    }

    /// The CPUs of a NUMA node that a thread may use.
    pub fn usable_on(&self, node: u32) -> CpuSet {
        let is_there = |cpu: &u32| self.cpus.get(cpu).is_some_and(|cpu| cpu.node == node);
        self.usable().iter().filter(is_there).collect()
    }

    /// Is there such a NUMA node? A host without nodes is node 0.
    pub fn has_node(&self, node: u32) -> bool {
        self.nodes.contains_key(&node) || (self.nodes.is_empty() && node == 0)
    }

    /// `cpus` with all CPUs of their cores.
    pub fn with_siblings(&self, cpus: &CpuSet) -> CpuSet {
        let siblings = |cpu| self.cpus.get(&cpu).map(|cpu| cpu.siblings.iter());
        cpus.iter().chain(cpus.iter().filter_map(siblings).flatten()).collect()
    }

    /// Bytes of free huge pages of `size` bytes.
    pub fn free_hugepages(&self, size: u64) -> u64 {
        self.free_pools(|pool| pool.size == size)
    }

    /// Bytes of free huge pages of `size` bytes on a NUMA node.
    pub fn free_hugepages_on(&self, node: u32, size: u64) -> u64 {
        self.free_pools(|pool| pool.size == size && pool.node == node)
    }

    fn free_pools(&self, which: impl Fn(&HugePages) -> bool) -> u64 {
        let pools = self.hugepages.iter().filter(|pool| which(pool));
        pools.fold(0, |sum, pool| pool.free.saturating_mul(pool.size).saturating_add(sum))
    }
}

/// What the `meminfo` of a node says; nothing, if it is not there.
fn node_memory(path: &Path) -> Result<NodeMemory, TopologyError> {
    let Some(text) = optional(path)? else { return Ok(NodeMemory::default()) };
    let meminfo = Proc { path: path.to_owned(), text };
    let mut available = None;
    for name in ["MemFree:", "Active(file):", "Inactive(file):"] {
        // Recorded hosts may have only some of the lines.
        if meminfo.text.contains(name) {
            let bytes = meminfo.memory(name)?;
            available = Some(available.unwrap_or(0u64).saturating_add(bytes));
        }
    }
    Ok(NodeMemory { total: Some(meminfo.memory("MemTotal:")?), available })
}

fn host_cpu(path: &Path, cpu: u32, node: u32) -> Result<HostCpu, TopologyError> {
    let number = |file: &str, default| {
        let path = path.join("topology").join(file);
        match optional(&path)? {
            // Kernels and hypervisors that know no package or die say -1.
            Some(text) if text == "-1" => Ok(0),
            Some(text) => content(&path, &text, "a number", |text| text.parse().ok()),
            None => Ok(default),
        }
    };
    let cpus = |file: &str| {
        let path = path.join(file);
        match optional(&path)? {
            Some(text) => content(&path, &text, "a CPU set", |text| text.parse().ok()).map(Some),
            None => Ok(None),
        }
    };
    let siblings = match cpus("topology/core_cpus_list")? {
        Some(siblings) => siblings,
        // The name before Linux 5.3.
        None => cpus("topology/thread_siblings_list")?.unwrap_or_else(|| CpuSet::from_iter([cpu])),
    };
    Ok(HostCpu {
        package: number("physical_package_id", 0)?,
        die: number("die_id", 0)?,
        core: number("core_id", cpu)?,
        siblings,
        llc: match last_level_cache(path)? {
            Some(index) => cpus(&format!("cache/{index}/shared_cpu_list"))?,
            None => None,
        },
        node,
    })
}

/// The name of the directory of the CPU's highest cache.
fn last_level_cache(path: &Path) -> Result<Option<String>, TopologyError> {
    let mut highest = None;
    for index in 0..16 {
        let name = format!("index{index}");
        let level = path.join("cache").join(&name).join("level");
        let Some(text) = optional(&level)? else { break };
        let level: u32 = content(&level, &text, "a number", |text| text.parse().ok())?;
        if highest.as_ref().is_none_or(|(highest, _)| level > *highest) {
            highest = Some((level, name));
        }
    }
    Ok(highest.map(|(_, name)| name))
}

/// The directories `node<N>` in ascending order.
fn nodes(path: &Path) -> Result<BTreeMap<u32, PathBuf>, TopologyError> {
    numbered(path, |name| name.strip_prefix("node")?.parse().ok())
}

fn huge_pages(path: &Path, node: u32) -> Result<Vec<HugePages>, TopologyError> {
    let pools =
        numbered(path, |name| name.strip_prefix("hugepages-")?.strip_suffix("kB")?.parse().ok())?;
    let pool = |(kib, path): (u64, PathBuf)| {
        Ok(HugePages {
            node,
            size: kib.saturating_mul(1024),
            total: parse_file(&path.join("nr_hugepages"), "a number")?,
            free: parse_file(&path.join("free_hugepages"), "a number")?,
        })
    };
    pools.into_iter().map(pool).collect()
}

/// The entries of a directory whose names have a number; none if there is no such directory.
fn numbered<N: Ord>(
    path: &Path,
    number: impl Fn(&str) -> Option<N>,
) -> Result<BTreeMap<N, PathBuf>, TopologyError> {
    let entries = match fs::read_dir(path) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(BTreeMap::new()),
        Err(source) => {
            return Err(TopologyError::Read { path: path.to_owned(), source });
        }
    };
    let numbered = |entry: fs::DirEntry| Some((number(entry.file_name().to_str()?)?, entry.path()));
    Ok(entries.filter_map(|entry| numbered(entry.ok()?)).collect())
}

/// The trimmed text of a small file; `None` if there is no such file. Archives pad the files of
/// /sys with zeros to the size they claim to have.
fn optional(path: &Path) -> Result<Option<String>, TopologyError> {
    match read(path) {
        Ok(bytes) => Ok(Some({
            let text = String::from_utf8_lossy(&bytes);
            text.trim_end_matches('\0').trim().to_owned()
        })),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(TopologyError::Read { path: path.to_owned(), source }),
    }
}

/// The start of a file; a recorded tree may hold anything, pipes and endless files included.
fn read(path: &Path) -> std::io::Result<Vec<u8>> {
    if !fs::metadata(path)?.is_file() {
        return Err(std::io::Error::other("it is not a regular file"));
    }
    let mut bytes = Vec::new();
    fs::File::open(path)?.take(1 << 20).read_to_end(&mut bytes)?;
    Ok(bytes)
}

fn parse_file<T: std::str::FromStr>(
    path: &Path,
    expected: &'static str,
) -> Result<T, TopologyError> {
    let text = optional(path)?.ok_or_else(|| TopologyError::Read {
        path: path.to_owned(),
        source: std::io::ErrorKind::NotFound.into(),
    })?;
    content(path, &text, expected, |text| text.parse().ok())
}

fn content<T>(
    path: &Path,
    text: &str,
    expected: &'static str,
    parse: impl FnOnce(&str) -> Option<T>,
) -> Result<T, TopologyError> {
    parse(text).ok_or_else(|| TopologyError::Content {
        path: path.to_owned(),
        found: crate::cpuset::excerpt(text),
        expected,
    })
}

/// A file of lines that begin with a name.
struct Proc {
    path: PathBuf,
    text: String,
}

impl Proc {
    fn open(path: &str) -> Result<Self, TopologyError> {
        let path = PathBuf::from(path);
        Ok(Self { text: parse_file(&path, "text")?, path })
    }

    /// What follows `name` in its line.
    fn field<T>(
        &self,
        name: &str,
        expected: &'static str,
        parse: impl FnOnce(&str) -> Option<T>,
    ) -> Result<T, TopologyError> {
        let line = self.text.lines().find_map(|line| Some(line.split_once(name)?.1.trim()));
        content(&self.path, line.unwrap_or_default(), expected, parse)
    }

    /// A number of KiB, in bytes.
    fn memory(&self, name: &str) -> Result<u64, TopologyError> {
        self.field(name, "a size in kB", |text| {
            text.strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
        })
    }

    fn limit(&self, name: &str) -> Result<u64, TopologyError> {
        self.limit_column(name, 0)
    }

    fn hard_limit(&self, name: &str) -> Result<u64, TopologyError> {
        self.limit_column(name, 1)
    }

    fn limit_column(&self, name: &str, column: usize) -> Result<u64, TopologyError> {
        self.field(name, "limits", |text| match text.split_whitespace().nth(column)? {
            "unlimited" => Some(u64::MAX),
            number => number.parse().ok(),
        })
    }
}
