//! `[machine]` and `[boot]`.

use crate::keys::MAX_VCPUS;
use crate::plan::{Boot, Kernel, Machine, Module, Prealloc, Topology, Transport};
use crate::reader::Reader;
use crate::units::format_size;
use crate::value::Value;

/// Memory is made of pieces of this size.
pub(super) const PIECE: u64 = 2 << 20;
/// As much as 46 bits of address can hold, which every host has.
pub(super) const MOST_MEMORY: u64 = 64 << 40;
const DEFAULT_MEMORY: u64 = 256 << 20;
const LONGEST_CMDLINE: usize = 4095;
const MOST_MODULES: usize = 64;

/// The machine, the number of its vCPUs, and whether the file says how much memory it has.
pub(super) fn machine(table: &Reader<'_>) -> (Machine, u32, bool) {
    let memory_table = table.table("memory");
    let (memory, hugepages) = memory(&memory_table);
    let rtc = table.value("rtc").and_then(|value| value.bool()).unwrap_or(true);
    let shared = memory_table.value("shared").and_then(|value| value.bool()).unwrap_or(false);
    let prealloc = prealloc(&memory_table);
    let topology = topology(&table.table("cpus"));
    let transport = match table.value("transport").and_then(|value| value.word()) {
        Some("mmio") => Transport::Mmio,
        _ => Transport::Pci,
    };
    let hotplug_slots = hotplug_slots(table, transport);
    let debug_exit = table.value("debug-exit").and_then(|value| value.bool()).unwrap_or(false);
    let Topology { sockets, dies, cores, threads } = topology;
    let machine = Machine {
        rtc,
        memory,
        hugepages,
        shared,
        prealloc,
        topology,
        transport,
        hotplug_slots,
        debug_exit,
    };
    (machine, sockets * dies * cores * threads, memory_table.has("size"))
}

fn hotplug_slots(table: &Reader<'_>, transport: Transport) -> u8 {
    let Some(value) = table.value("hotplug-slots") else { return 0 };
    let slots = value.int().unwrap_or(0);
    if slots > 0 && transport == Transport::Mmio {
        value.error(
            "hot-plug slots are PCIe ports, and with `transport = \"mmio\"` there is no PCI",
            Some("leave one of the two out".to_owned()),
        );
    }
    slots
}

fn memory(table: &Reader<'_>) -> (u64, Option<u64>) {
    let hugepages =
        table.value("hugepages").and_then(|value| value.word()).map(|size| match size {
            "1G" => 1 << 30,
            _ => 2 << 20,
        });
    let piece = hugepages.unwrap_or(PIECE);
    let Some(value) = table.value("size") else {
        return (DEFAULT_MEMORY, hugepages);
    };
    let Some(size) = value.size() else {
        return (DEFAULT_MEMORY, hugepages);
    };
    check_size(&value, size, piece);
    (size, hugepages)
}

/// Is `size` memory that can be made of such pieces?
pub(super) fn check_size(value: &Value<'_>, size: u64, piece: u64) {
    if size == 0 || !size.is_multiple_of(piece) {
        let rounded = format_size(size.next_multiple_of(piece).max(piece).min(MOST_MEMORY));
        value.error(
            format!("the memory must be a multiple of {}", format_size(piece)),
            Some(format!("the next is \"{rounded}\"")),
        );
    } else if size > MOST_MEMORY {
        value.error(format!("the most memory is {}", format_size(MOST_MEMORY)), None);
    }
}

fn prealloc(table: &Reader<'_>) -> Option<Prealloc> {
    let value = table.value("prealloc")?.alternative()?;
    if !value.is_table() {
        return value.bool()?.then(Prealloc::default);
    }
    let table = value.into_table();
    let threads = table.value("threads").and_then(|value| value.int());
    let near = table.value("near").and_then(|value| value.bool()).unwrap_or(false);
    Some(Prealloc { threads, near })
}

fn topology(cpus: &Reader<'_>) -> Topology {
    let count: Option<u32> = cpus.value("count").and_then(|value| value.int());
    let table = cpus.table("topology");
    let level = |key| table.value(key).and_then(|value| value.int()).unwrap_or(1u32);
    let [sockets, dies, cores, threads] = ["sockets", "dies", "cores", "threads"].map(level);
    let topology = Topology { sockets, dies, cores, threads };
    let flat = Topology { sockets: 1, dies: 1, cores: count.unwrap_or(1), threads: 1 };
    if !cpus.has("topology") {
        return flat;
    }
    let product: u64 = [sockets, dies, cores, threads].into_iter().map(u64::from).product();
    if let Some(count) = count.filter(|count| product != u64::from(*count)) {
        table.error(
            format!("this topology makes {product} CPUs, but `machine.cpus.count` is {count}"),
            Some(
                "sockets x dies x cores x threads must be the count; leave one of them out"
                    .to_owned(),
            ),
        );
        return flat;
    }
    if product > MAX_VCPUS as u64 {
        table.error(format!("this topology makes {product} CPUs, the most is {MAX_VCPUS}"), None);
        return flat;
    }
    topology
}

pub(super) fn boot(table: &Reader<'_>) -> Boot {
    let kernel = kernel(table);
    let initrd = table.value("initrd").and_then(|value| value.path());
    let initrd = initrd.map(|path| Module { path, cmdline: String::new() });
    let mut modules: Vec<Module> = initrd.into_iter().collect();
    if let Some(list) = table.value("modules") {
        modules.extend(list.tables().flatten().filter_map(|table| module(&table)));
    }
    let takes_modules = table.has("kernel") || table.has("multiboot");
    for key in ["initrd", "modules"] {
        if table.has(key) && !takes_modules {
            let message = format!("the built-in guest takes no {key}");
            table.report.error(table.loc_of(key), message, Some("add `kernel = ...`".to_owned()));
        }
    }
    if modules.len() > MOST_MODULES {
        let message = format!("{} modules are too many, the most is {MOST_MODULES}", modules.len());
        table.report.error(table.loc_of("modules"), message, None);
    }
    Boot { kernel, modules, cmdline: cmdline(table) }
}

fn kernel(table: &Reader<'_>) -> Option<Kernel> {
    let native = table.value("kernel").and_then(|value| value.path());
    let multiboot = table.value("multiboot").and_then(|value| value.path());
    if table.has("kernel") && table.has("multiboot") {
        table.report.error(
            table.loc_of("multiboot"),
            "`boot.kernel` and `boot.multiboot` exclude each other",
            Some("a bzImage or a PVH ELF is a `kernel`; leave the other out".to_owned()),
        );
    }
    native.map(Kernel::Native).or(multiboot.map(Kernel::Multiboot))
}

fn module(table: &Reader<'_>) -> Option<Module> {
    let path = table.value("path").and_then(|value| value.path());
    let cmdline = cmdline(table);
    Some(Module { path: path?, cmdline })
}

fn cmdline(table: &Reader<'_>) -> String {
    let cmdline = table.value("cmdline").and_then(|value| {
        let fits = |text: &str| match text {
            _ if text.contains('\0') => Err("has a NUL in it"),
            _ if text.len() > LONGEST_CMDLINE => Err("is longer than 4095 bytes"),
            _ => Ok(text.to_owned()),
        };
        value.parse(fits, |_| None)
    });
    cmdline.unwrap_or_default()
}
