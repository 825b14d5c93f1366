//! The built-in guest of heddle: brings up all CPUs, drives every virtio-blk disk from every CPU
//! and every virtio-rng device, checks all that comes back, says so on COM1 and powers off.
//!
//! CPU 0 finds and sets up everything, starts the other CPUs, does its own share and collects the
//! results. All Rust code runs in ring 3; `boot.s` is all of ring 0.

#![no_std]
#![no_main]

extern crate alloc;

mod acpi;
mod apic;
mod blk;
mod boot;
mod console;
mod cpu;
mod gate;
mod json;
mod loader;
mod mailbox;
mod mem;
mod mmio;
mod options;
mod pattern;
mod pci;
mod plan;
mod power;
mod report;
mod rng;
mod virtio;
mod wait;

use alloc::boxed::Box;
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;
use core::panic::PanicInfo;
use core::sync::atomic::{AtomicPtr, AtomicU16, Ordering};

use acpi::Acpi;
use apic::{Apic, Clock, now};
use blk::{Buffers, Disk, Driver, Lane};
use console::Console;
use cpu::Cpu;
use loader::Loader;
use mailbox::Mailbox;
use mmio::IoApic;
use options::Options;
use virtio::{Found, Place};

/// Where a PC has its I/O APIC, unless the firmware says something else.
const IO_APIC: u64 = 0xfec0_0000;

/// What all CPUs share.
struct Shared {
    cpus: &'static [Cpu],
    apic: Apic,
    clock: Clock,
    options: Options,
    disks: Vec<Disk>,
    /// Work for each CPU, and the same back when it is done.
    todo: Vec<Mailbox<Work>>,
    done: Vec<Mailbox<Work>>,
    /// Counts CPUs that are done; CPU 0 halts on it.
    finished: AtomicU16,
}

static SHARED: AtomicPtr<Shared> = AtomicPtr::new(core::ptr::null_mut());

fn shared() -> Option<&'static Shared> {
    // SAFETY: null, or a leaked box that was complete before its address was stored.
    unsafe { SHARED.load(Ordering::Acquire).as_ref() }
}

/// One CPU's queues, one per disk at most, and the memory for its requests.
struct Work {
    lanes: Vec<(usize, Lane)>,
    buffers: Buffers,
    failures: Vec<String>,
}

impl Work {
    fn run(&mut self, shared: &Shared, cpu: &Cpu) {
        // Begin with different disks, so that all of them are busy at once.
        let lanes = self.lanes.len();
        let first = cpu.index.load(Ordering::Relaxed) as usize % lanes.max(1);
        for i in 0..lanes {
            let (disk, lane) = &mut self.lanes[(first + i) % lanes];
            let disk = &shared.disks[*disk];
            let mut driver = Driver {
                cpu,
                clock: shared.clock,
                options: &shared.options,
                disk,
                buffers: &mut self.buffers,
            };
            if let Err(error) = driver.run(lane) {
                let vcpu = cpu.index.load(Ordering::Relaxed);
                let queue = lane.queue();
                let at = disk.place;
                self.failures.push(format!("vCPU {vcpu}, disk {at} queue {queue}: {error}"));
                // Requests may still be in flight into the buffers.
                return;
            }
        }
    }
}

/// Where `boot.s` enters ring 3.
unsafe extern "C" fn boot_main(info: u64) -> ! {
    let mut console = Console::open();
    // SAFETY: `boot.s` passes on what the loader gave it, and nothing has used the heap yet.
    match unsafe { Loader::read(info) } {
        Ok(loader) => run(&mut console, &loader),
        Err(reason) => give_up(format_args!("{reason}")),
    }
}

fn run(console: &mut Console, loader: &Loader) -> ! {
    let begin = now();
    let mut options = Options::parse(&loader.cmdline);
    let acpi = Acpi::read(loader.rsdp);
    power::remember(acpi.power_off, options.debug_exit);
    let apic = Apic::init();
    let me = apic.id();
    let mut ids = Vec::from([me]);
    ids.extend(acpi.apic_ids.iter().filter(|&&id| id != me && (apic.x2apic() || id < 255)));
    let cpus = cpu::init(&ids, apic.x2apic());
    cpus[0].state.store(cpu::AT_WORK, Ordering::Relaxed);
    let clock = Clock::find(&apic);
    let functions = pci::scan();
    if !options.quiet {
        let machine = report::Machine {
            loader,
            cpus: cpus.len(),
            apic: &apic,
            clock,
            ecam: acpi.ecam,
            functions: &functions,
        };
        report::machine(console, &machine, &options);
    }

    fit_memory(&mut options, cpus.len());
    let mut failures = Vec::new();
    if let Some(Err(error)) = acpi.ecam.map(|ecam| pci::check_ecam(ecam, &functions)) {
        failures.push(format!("MCFG: {error}"));
    }
    let mut devices = Devices::default();
    for function in functions.iter().filter(|f| f.vendor == virtio::VENDOR) {
        if let Err(error) = devices.start(&Found::Pci(function), cpus, clock, &options) {
            failures.push(format!("device {}: {error}", function.address));
        }
    }
    for &slot in &options.mmio {
        let started = IoApic::new(acpi.io_apic.unwrap_or(IO_APIC))
            .and_then(|io_apic| mmio::Device::find(slot, io_apic))
            .and_then(|device| devices.start(&Found::Mmio(&device), cpus, clock, &options));
        if let Err(error) = started {
            failures.push(format!("device {}: {error}", Place::Mmio(slot.address)));
        }
    }
    let Devices { disks, lanes, rngs } = devices;
    let shared = share(cpus, apic, clock, options, disks, lanes);
    SHARED.store(core::ptr::from_ref(shared).cast_mut(), Ordering::Release);

    if let Some(page) = loader.low_page() {
        cpu::install_trampoline(page);
        cpu::start_others(cpus, &shared.apic, page);
    } else {
        failures.push("no memory below 640 KiB to start the other CPUs from".into());
    }
    let work_begin = now();
    work(shared, &cpus[0]);
    wait_for_all(shared, loader.low_page(), &mut failures);

    let mut results: Vec<Option<Box<Work>>> = shared.done.iter().map(Mailbox::take).collect();
    for work in results.iter_mut().flatten() {
        failures.append(&mut work.failures);
    }
    let lines = !shared.options.mmio.is_empty();
    let strays: u64 = cpus.iter().map(|cpu| cpu.strays(lines)).sum();
    if strays > 0 {
        failures.push(format!("{strays} interrupts with vectors nobody asked for"));
    }
    for disk in &shared.disks {
        if let Err(error) = disk.stop() {
            failures.push(format!("disk {}: {error}", disk.place));
        }
    }
    let lanes = |disk: usize| {
        results
            .iter()
            .enumerate()
            .filter_map(move |(vcpu, work)| Some((vcpu, work.as_ref()?)))
            .flat_map(move |(vcpu, work)| work.lanes.iter().map(move |lane| (vcpu, lane)))
            .filter(move |(_, lane)| lane.0 == disk)
            .map(|(vcpu, lane)| (vcpu, &lane.1))
            .collect::<Vec<_>>()
    };
    let outcome = report::Outcome {
        cpus,
        x2apic: shared.apic.x2apic(),
        ecam: acpi.ecam,
        clock,
        options: &shared.options,
        cmdline: &loader.cmdline,
        memory: loader.ram.iter().map(mem::Region::size).sum(),
        disks: shared.disks.iter().enumerate().map(|(i, disk)| (disk, lanes(i))).collect(),
        rngs: &rngs,
        failures: &failures,
        setup: work_begin - begin,
        work: now() - work_begin,
    };
    report::outcome(console, &outcome);
    power::off(failures.is_empty())
}

/// Makes requests smaller, then fewer, until the buffers of all CPUs fit well into memory.
fn fit_memory(options: &mut Options, cpus: usize) {
    let budget = mem::free() / 4 * 3 / cpus as u64;
    options.depth = options.depth.min(blk::MAX_DEPTH);
    let need = |options: &Options| Buffers::bytes(options.depth, u64::from(options.size) / 512);
    while options.size > 512 && need(options) > budget {
        options.size /= 2;
    }
    while options.depth > 1 && need(options) > budget {
        options.depth /= 2;
    }
}

/// The virtio devices found, set up.
#[derive(Default)]
struct Devices {
    disks: Vec<Disk>,
    /// Queues, by CPU, each with the index of its disk.
    lanes: Vec<Vec<(usize, Lane)>>,
    rngs: Vec<rng::Rng>,
}

impl Devices {
    fn start(
        &mut self,
        found: &Found,
        cpus: &[Cpu],
        clock: Clock,
        options: &Options,
    ) -> Result<(), String> {
        let count = self.disks.len() + self.rngs.len();
        let vector = cpu::VECTOR_QUEUES + (count % cpu::VECTOR_COUNT) as u8;
        match found.device() {
            blk::DEVICE => {
                let index = self.disks.len();
                let (disk, lanes) = Disk::start(found, index as u32, vector, cpus, options)?;
                self.disks.push(disk);
                self.lanes.resize_with(cpus.len(), Vec::new);
                for (vcpu, lane) in lanes.into_iter().enumerate() {
                    self.lanes[vcpu].push((index, lane));
                }
            }
            rng::DEVICE => {
                self.rngs.push(rng::run(found, vector, &cpus[0], clock, options)?);
            }
            _ => {}
        }
        Ok(())
    }
}

/// Puts everything where all CPUs find it.
fn share(
    cpus: &'static [Cpu],
    apic: Apic,
    clock: Clock,
    options: Options,
    disks: Vec<Disk>,
    mut lanes: Vec<Vec<(usize, Lane)>>,
) -> &'static Shared {
    let depth = disks.iter().map(|d| d.depth).max().unwrap_or(1);
    let chunk = disks.iter().map(|d| d.chunk).max().unwrap_or(1);
    lanes.resize_with(cpus.len(), Vec::new);
    let todo = lanes.into_iter().map(|lanes| {
        let mailbox = Mailbox::new();
        if !lanes.is_empty() {
            let buffers = Buffers::new(depth, chunk);
            mailbox.put(Box::new(Work { lanes, buffers, failures: Vec::new() }));
        }
        mailbox
    });
    Box::leak(Box::new(Shared {
        cpus,
        apic,
        clock,
        options,
        disks,
        todo: todo.collect(),
        done: cpus.iter().map(|_| Mailbox::new()).collect(),
        finished: AtomicU16::new(0),
    }))
}

/// Where `boot.s` lets another CPU enter ring 3.
unsafe extern "C" fn ap_main(cpu: *const Cpu) -> ! {
    // SAFETY: `boot.s` passes this CPU's entry of the array, which is there for good.
    let cpu = unsafe { &*cpu };
    cpu.state.store(cpu::AT_WORK, Ordering::Release);
    if let Some(shared) = shared() {
        work(shared, cpu);
        finish(shared, cpu);
    }
    gate::park()
}

/// A CPU's share of the work.
fn work(shared: &Shared, cpu: &Cpu) {
    let index = cpu.index.load(Ordering::Relaxed) as usize;
    if let Some(mut work) = shared.todo[index].take() {
        work.run(shared, cpu);
        shared.done[index].put(work);
    }
}

/// The last act of a CPU other than 0: stop its clock, tell CPU 0.
fn finish(shared: &Shared, cpu: &Cpu) {
    shared.apic.stop_timer();
    cpu.state.store(cpu::DONE, Ordering::Release);
    shared.finished.fetch_add(1, Ordering::SeqCst);
    shared.apic.wake(shared.cpus[0].apic_id.load(Ordering::Relaxed));
}

/// CPU 0 sleeps until all others are done, or none gets on any more.
fn wait_for_all(shared: &Shared, page: Option<u64>, failures: &mut Vec<String>) {
    let cpu = &shared.cpus[0];
    let clock = shared.clock;
    let patience = (shared.options.watchdog + 5) * 1_000_000;
    let others = shared.cpus.len() as u16 - 1;
    let progress = || shared.cpus.iter().map(|c| c.progress.load(Ordering::Relaxed)).sum::<u64>();
    let mut last = (progress(), 0);
    let mut since = now();
    let mut asked_again = false;
    loop {
        let ticks = cpu.count(cpu::VECTOR_TIMER);
        let finished = shared.finished.load(Ordering::SeqCst);
        if finished == others {
            break;
        }
        if (progress(), finished) != last {
            last = (progress(), finished);
            since = now();
        }
        let waited = clock.micros(now() - since);
        if waited > patience {
            break;
        }
        if let Some(page) = page.filter(|_| waited > 1_000_000 && !asked_again) {
            asked_again = true;
            cpu::restart_missing(shared.cpus, &shared.apic, page);
        }
        let timer = clock.timer(500_000);
        // SAFETY: the counter lives as long as the program.
        unsafe { gate::halt_unless_changed(shared.finished.as_ptr(), finished, timer, ticks) };
    }
    shared.apic.stop_timer();
    failures.extend(shared.cpus.iter().skip(1).filter_map(|c| state_failure(shared, c)));
}

/// What is wrong with a CPU that should be done.
fn state_failure(shared: &Shared, cpu: &Cpu) -> Option<String> {
    let (index, id) = (cpu.index.load(Ordering::Relaxed), cpu.apic_id.load(Ordering::Relaxed));
    match cpu.state.load(Ordering::Acquire) {
        cpu::DONE => None,
        cpu::ABSENT => Some(format!("vCPU {index} (APIC id {id}) did not start")),
        cpu::CRASHED => Some(crash_text(cpu)),
        _ => {
            let at = cpu.at.load(Ordering::Relaxed);
            let disk = (at as usize >> 16).checked_sub(1).and_then(|d| shared.disks.get(d));
            let Some(disk) = disk else {
                return Some(format!("vCPU {index} started and did nothing"));
            };
            let phase =
                plan::PHASES.get(at as usize & 0xffff).map_or("get-id or flush", |p| p.name);
            Some(format!("vCPU {index} is stuck, disk {} queue {index}: {phase}", disk.place))
        }
    }
}

fn crash_text(cpu: &Cpu) -> String {
    let crash = |v: &core::sync::atomic::AtomicU64| v.load(Ordering::Acquire);
    let index = cpu.index.load(Ordering::Relaxed);
    let c = &cpu.crash;
    let (vector, error) = (crash(&c.vector), crash(&c.error));
    let (rip, address) = (crash(&c.rip), crash(&c.address));
    if vector == cpu::PANIC {
        return format!("vCPU {index} panicked: {}", report::panic_text());
    }
    format!("vCPU {index}: fault {vector} ({error:#x}) at {rip:#x}, address {address:#x}")
}

/// Where `boot.s` goes on after a fault, on a fresh stack.
unsafe extern "C" fn crashed(cpu: *const Cpu) -> ! {
    // SAFETY: `boot.s` passes the CPU structure of the slot, or null before there is one.
    let cpu = unsafe { cpu.as_ref() };
    die(cpu)
}

/// Ends this CPU; if it is the first one, the machine.
fn die(cpu: Option<&Cpu>) -> ! {
    match (cpu, shared()) {
        (Some(cpu), Some(shared)) if cpu.index.load(Ordering::Relaxed) != 0 => {
            cpu.state.store(cpu::CRASHED, Ordering::Release);
            shared.finished.fetch_add(1, Ordering::SeqCst);
            shared.apic.wake(shared.cpus[0].apic_id.load(Ordering::Relaxed));
            gate::park()
        }
        (Some(cpu), _) => give_up(format_args!("{}", crash_text(cpu))),
        (None, _) => give_up(format_args!("a fault before anything was set up")),
    }
}

/// The short way out: a verdict and little else.
fn give_up(reason: core::fmt::Arguments) -> ! {
    let mut console = Console::reopen();
    report::failure(&mut console, reason);
    console.flush();
    power::off(false)
}

#[panic_handler]
fn panic(info: &PanicInfo) -> ! {
    report::keep_panic(|text| match info.location() {
        Some(at) => write!(text, "{} ({}:{})", info.message(), at.file(), at.line()),
        None => write!(text, "{}", info.message()),
    });
    let here = 0u8;
    let here = core::ptr::from_ref(&here) as u64;
    match shared().and_then(|s| s.cpus.iter().skip(1).find(|c| c.owns_stack(here))) {
        Some(cpu) => {
            cpu.crash.vector.store(cpu::PANIC, Ordering::Release);
            die(Some(cpu))
        }
        None => give_up(format_args!("panicked: {}", report::panic_text())),
    }
}
