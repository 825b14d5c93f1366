//! Every key of the file, once: its name, type, default and meaning.
//!
//! The reader takes ranges, words and defaults from here and complains about keys that are not
//! here; `heddle schema` prints it. So what is documented is what is read.

/// The keys of one table.
pub(crate) struct Table {
    pub(crate) keys: &'static [Key],
    /// Keys that a later version will have; they are refused with a message of their own.
    pub(crate) later: &'static [&'static str],
}

/// One key.
pub(crate) struct Key {
    pub(crate) name: &'static str,
    pub(crate) shape: Shape,
    pub(crate) default: Default,
    /// One line, for people.
    pub(crate) doc: &'static str,
}

/// What a value looks like.
pub(crate) enum Shape {
    Bool,
    Int(i64, i64),
    /// A string; the text says which.
    Text(&'static str),
    /// One of these strings.
    Words(&'static [&'static str]),
    Size,
    Cpus,
    Path,
    Table(&'static Table),
    /// A table, or the value of the table's first key alone: `cpus = 4` is `cpus = { count = 4 }`.
    Lift(&'static Table),
    /// Tables with names the user chooses: `[disk.NAME]`.
    Named(&'static Table, Names),
    /// Keys the user chooses (the text says which) with values of one shape.
    Map(&'static str, &'static Shape),
    List(&'static Shape),
    Either(&'static [Shape]),
}

/// The names of [`Shape::Named`].
pub(crate) struct Names {
    /// Bytes in a name.
    pub(crate) longest: usize,
    /// How many names.
    pub(crate) most: usize,
}

/// What holds when the key is absent.
pub(crate) enum Default {
    Required,
    /// Nothing.
    Absent,
    /// This TOML value.
    Value(&'static str),
    /// What the words say.
    Says(&'static str),
    /// The defaults of the keys in the table.
    Inside,
}

use Default::{Absent, Inside, Required, Says, Value};
use Shape::{Bool, Cpus, Either, Int, Lift, List, Map, Named, Path, Size, Text, Words};

impl Table {
    pub(crate) fn key(&self, name: &str) -> Option<&'static Key> {
        self.keys.iter().find(|key| key.name == name)
    }
}

const fn key(name: &'static str, shape: Shape, default: Default, doc: &'static str) -> Key {
    Key { name, shape, default, doc }
}

const fn table(keys: &'static [Key]) -> Table {
    Table { keys, later: &[] }
}

/// The most vCPUs, and the most queues of a device.
pub(crate) const MAX_VCPUS: i64 = 1024;
/// The most threads that touch memory.
const MAX_PREALLOC_THREADS: i64 = 256;
/// Linux has room for so many nodes (`NODES_SHIFT` is at most 10).
const MAX_HOST_NODE: i64 = 1023;
/// The most devices with a name.
pub(crate) const MAX_DEVICES: usize = 255;
/// Each is a function of its own on PCI bus 0 and a bus behind it.
const MAX_HOTPLUG_SLOTS: i64 = 31;
/// Places on PCI bus 0: 8 functions in each of 32 slots, without the host bridge's slot.
pub(crate) const PCI_PLACES: usize = 31 * 8;
/// The kernel cuts thread names there.
const THREADS: Names = Names { longest: 15, most: 4096 };
/// A virtio-blk device tells the guest its name in so many bytes.
const DEVICES: Names = Names { longest: 20, most: MAX_DEVICES };

const PLACE_TYPE: Shape = Text(r#""main" | "vcpu" | THREAD"#);
const VERDICT: Shape = Words(&["allow", "warn", "error"]);

pub(crate) static ROOT: Table = table(&[
    key("schema", Int(1, 1), Value("1"), "Version of this grammar."),
    key("name", Text("text"), Says("the file's name"), "What the virtual machine is called."),
    key(
        "include",
        List(&Path),
        Value("[]"),
        "Files to start from, merged key by key; later ones win, and this file wins over all.",
    ),
    key("machine", Shape::Table(&MACHINE), Inside, "Memory and CPUs."),
    key(
        "numa",
        List(&Shape::Table(&NUMA)),
        Says("no nodes"),
        "The guest's NUMA nodes, in the order of their numbers.",
    ),
    key("boot", Shape::Table(&BOOT), Inside, "What to start."),
    key("vcpu", Shape::Table(&VCPU), Inside, "The threads that run the guest's CPUs."),
    key(
        "thread",
        Named(&THREAD, THREADS),
        Absent,
        "Event loops, each with a thread; `main` is always there and may be configured.",
    ),
    key("disk", Named(&DISK, DEVICES), Absent, "Disks (virtio-blk)."),
    key("rng", Named(&RNG, DEVICES), Absent, "Sources of random numbers (virtio-rng)."),
    key(
        "serial",
        Named(&SERIAL, DEVICES),
        Says("com1 on stdio"),
        "Serial ports; the names com1 to com4 choose the port.",
    ),
    key("policy", Shape::Table(&POLICY), Inside, "What to do about doubtful plans."),
    key(
        "test",
        Shape::Table(&TEST),
        Inside,
        "Troubles made on purpose, for experiments and tests.",
    ),
]);

static MACHINE: Table = table(&[
    key("memory", Lift(&MEMORY), Inside, "The guest's memory."),
    key("cpus", Lift(&CPUS), Inside, "The guest's CPUs."),
    key(
        "transport",
        Words(&["pci", "mmio"]),
        Value("\"pci\""),
        "How the guest reaches its virtio devices.",
    ),
    key(
        "hotplug-slots",
        Int(0, MAX_HOTPLUG_SLOTS),
        Value("0"),
        "PCIe root ports, empty at the start, to plug devices into while the guest runs.",
    ),
    key("rtc", Bool, Value("true"), "A real-time clock; Linux does without it, by KVM's clock."),
    key("debug-exit", Bool, Value("false"), "A port at 0xf4 where the guest can end the run."),
]);

static MEMORY: Table = table(&[
    key(
        "size",
        Size,
        Says("the sum of [[numa]], or \"256M\""),
        "How much; a multiple of 2M, or of the huge pages.",
    ),
    key("hugepages", Words(&["2M", "1G"]), Absent, "Take it from the host's pool of huge pages."),
    key("shared", Bool, Value("false"), "Keep it in a memfd, which can be given to others."),
    key(
        "prealloc",
        Either(&[Bool, Shape::Table(&PREALLOC)]),
        Value("false"),
        "Touch all of it before the guest starts.",
    ),
]);

static PREALLOC: Table = table(&[
    key(
        "threads",
        Int(1, MAX_PREALLOC_THREADS),
        Says("as many as usable CPUs, at most 16"),
        "How many threads touch it; they end before the guest starts.",
    ),
    key(
        "near",
        Bool,
        Value("false"),
        "Each on the CPUs of the host node whose memory it touches, at least one per node.",
    ),
]);

static NUMA: Table = table(&[
    key("vcpus", Cpus, Says("none: memory only"), "Its vCPUs; every vCPU is in one node."),
    key("memory", Size, Required, "Its memory; the nodes' sum is `machine.memory`."),
    key("host-node", Int(0, MAX_HOST_NODE), Absent, "Take its memory from this host node."),
    key(
        "distances",
        List(&Int(10, 254)),
        Says("10 to itself, 20 to others"),
        "How far each node is, in the order of the nodes; all nodes say it, or none.",
    ),
]);

static CPUS: Table = table(&[
    key("count", Int(1, MAX_VCPUS), Says("what the topology makes, or 1"), "How many vCPUs."),
    key(
        "topology",
        Shape::Table(&TOPOLOGY),
        Says("one socket of single cores"),
        "What the guest is told; the product must be the count.",
    ),
]);

static TOPOLOGY: Table = table(&[
    key("sockets", Int(1, MAX_VCPUS), Value("1"), "Sockets in the machine."),
    key("dies", Int(1, MAX_VCPUS), Value("1"), "Dies in a socket."),
    key("cores", Int(1, MAX_VCPUS), Value("1"), "Cores in a die."),
    key("threads", Int(1, MAX_VCPUS), Value("1"), "Hardware threads in a core."),
]);

static BOOT: Table = table(&[
    key(
        "kernel",
        Path,
        Says("the built-in guest"),
        "A Linux bzImage (vmlinuz), or an ELF file with a PVH entry.",
    ),
    key("multiboot", Path, Absent, "Instead of `kernel`: a file with a Multiboot 1 header."),
    key("initrd", Path, Absent, "The first module; a bzImage takes no other."),
    key("modules", List(&Lift(&MODULE)), Value("[]"), "Files that the kernel finds in memory."),
    key("cmdline", Text("text"), Value("\"\""), "The kernel's command line."),
]);

static MODULE: Table = table(&[
    key("path", Path, Required, "The file."),
    key("cmdline", Text("text"), Value("\"\""), "A command line of its own."),
]);

static VCPU: Table = table(&[
    key(
        "affinity",
        Text(r#""none" | CPUS | "1:1@CPUS""#),
        Value("\"none\""),
        "CPUs for all vCPUs together, or one CPU for each in ascending order.",
    ),
    key("sched", Shape::Table(&SCHED), Inside, "Scheduling of the vCPU threads."),
    key("pin", Map("VCPUS", &Cpus), Absent, "CPUs for some vCPUs, over `affinity`."),
]);

static SCHED: Table = table(&[
    key(
        "policy",
        Words(&["other", "batch", "idle", "fifo", "rr"]),
        Value("\"other\""),
        "The host's scheduling policy.",
    ),
    key("nice", Int(-20, 19), Says("0"), "Of other and batch: -20 runs first, 19 last."),
    key("priority", Int(1, 99), Absent, "Of fifo and rr, which need it: higher runs first."),
    key(
        "runaway",
        Text(r#""off" | TIME"#),
        Says("\"200ms\"; of vCPUs \"off\""),
        "Of fifo and rr: becomes `other` after so much CPU time without a pause; 10ms to 10s.",
    ),
]);

static THREAD: Table = table(&[
    key("cpus", Cpus, Says("heddle's own"), "Host CPUs the thread may use."),
    key("sched", Shape::Table(&SCHED), Inside, "Scheduling of the thread."),
    key("poll", Lift(&POLL), Inside, "Polling before sleep; a higher `max` costs CPU time."),
]);

static POLL: Table = table(&[
    key("max", Text(r#""off" | TIME"#), Value("\"32us\""), "Poll at most so long before a sleep."),
    key("grow", Int(2, 1000), Value("2"), "Factor by which the polling time grows."),
    key("shrink", Int(0, 1000), Value("0"), "Divisor by which it shrinks; 0: to nothing at once."),
    key(
        "share",
        Int(1, 100),
        Value("100"),
        "Percent of a CPU's time that polling takes at the most.",
    ),
]);

static TEST: Table = table(&[
    key(
        "shuffle",
        Int(0, u32::MAX as i64),
        Absent,
        "With this seed, threads draw lots for the order of all that has none by promise.",
    ),
    key(
        "stall",
        List(&Shape::Table(&STALL)),
        Says("none"),
        "Callbacks that keep a thread busy for far too long.",
    ),
]);

static STALL: Table = table(&[
    key("thread", Text("THREAD"), Required, "The thread to keep busy."),
    key("time", Text("TIME"), Required, "How long each time, at most 10s."),
    key("every", Text("TIME"), Required, "From one begin to the next, at most 1000s."),
]);

static DISK: Table = table(&[
    key("path", Path, Absent, "A raw file or a block device; without it, a temporary file."),
    key(
        "size",
        Size,
        Absent,
        "Of the temporary file; with `path`, of the file if it is to be made.",
    ),
    key("read-only", Bool, Value("false"), "The guest may only read."),
    key("direct", Bool, Value("false"), "Bypass the host's page cache (O_DIRECT)."),
    key("engine", Words(&["io_uring", "sync"]), Value("\"io_uring\""), "How bytes are moved."),
    key(
        "queues",
        Either(&[Words(&["per-vcpu"]), Int(1, MAX_VCPUS)]),
        Value("\"per-vcpu\""),
        "How many queues.",
    ),
    key("queue-size", Int(2, 1024), Value("256"), "Descriptors in a queue; a power of two."),
    key(
        "place",
        Either(&[PLACE_TYPE, List(&Shape::Table(&PLACE))]),
        Value("\"main\""),
        "The thread that serves the queues; or [[disk.NAME.place]] for some queues each.",
    ),
]);

static PLACE: Table = Table {
    keys: &[
        key("queues", Text("QUEUES"), Required, "Queues, written like CPUs: \"0-3,5\"."),
        key("on", PLACE_TYPE, Required, "The thread that serves them."),
        key(
            "home",
            Text(r#""main" | THREAD"#),
            Says("\"main\""),
            "With `on = \"vcpu\"`: the loop of their completions and timers.",
        ),
    ],
    later: &["complete"],
};

static RNG: Table =
    table(&[key("place", PLACE_TYPE, Value("\"main\""), "The thread that serves it.")]);

static SERIAL: Table = table(&[key(
    "out",
    Either(&[Words(&["stdio", "null"]), Shape::Table(&SERIAL_FILE)]),
    Value("\"stdio\""),
    "Where its output goes.",
)]);

static SERIAL_FILE: Table = table(&[key("file", Path, Required, "Truncated at the start.")]);

static POLICY: Table = table(&[
    key("on-reset", Words(&["restart", "exit"]), Value("\"restart\""), "The guest resets."),
    key("overlap", VERDICT, Value("\"warn\""), "A thread shares a CPU with a pinned vCPU."),
    key("fallback", VERDICT, Value("\"warn\""), "This host cannot give what the file asks for."),
]);
