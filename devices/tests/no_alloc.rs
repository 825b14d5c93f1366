//! Between kick and used ring nobody allocates: not the loop, not the vCPU, with no engine.

#![expect(unsafe_code, reason = "a global allocator")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::backtrace::Backtrace;
use std::cell::Cell;
use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::*};
use std::time::{Duration, Instant};

use devices::block::raw::{Engine, Options, RawImage};
use devices::pci::Msix;
use devices::virtio::VirtioDevice;
use devices::virtio::blk::Blk;
use devices::virtio::rng::Rng;
use devices::virtio::seat::Placement;
use devices::virtio::testing::{Buffer, Count, Ring, TestLoop, memory};
use devices::virtio::transport::{InterruptSink, Transport};
use devices::virtio::{F_EVENT_IDX, F_INDIRECT_DESC, F_VERSION_1, Mem};
use iothread::{Blocking, PollPolicy, Strand, VcpuLoop};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// Counts the allocations of the threads that have it, while it is armed.
#[derive(Default)]
struct Watch {
    armed: AtomicBool,
    allocations: AtomicU64,
}

thread_local! {
    static WATCH: Cell<Option<&'static Watch>> = const { Cell::new(None) };
}

struct Watched;

#[global_allocator]
static ALLOCATOR: Watched = Watched;

// SAFETY: all calls go to the system's allocator as they are.
unsafe impl GlobalAlloc for Watched {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        note();
        // SAFETY: the caller keeps the contract of this same function.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: as for `alloc`.
        unsafe { System.dealloc(at, layout) }
    }

    unsafe fn realloc(&self, at: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        note();
        // SAFETY: as for `alloc`.
        unsafe { System.realloc(at, layout, size) }
    }
}

fn note() {
    // A thread that is ending has no watch any more.
    let Ok(Some(watch)) = WATCH.try_with(Cell::get) else { return };
    if watch.armed.load(Relaxed) && watch.allocations.fetch_add(1, Relaxed) == 0 {
        WATCH.set(None); // a backtrace allocates, too
        let _ =
            writeln!(std::io::stderr(), "the first allocation:\n{}", Backtrace::force_capture());
        WATCH.set(Some(watch));
    }
}

const HEADER: u64 = 0x10_0000;
const STATUS: u64 = 0x12_0000;
const DATA: u64 = 0x14_0000;
const SECTORS: u64 = 2048;
const RING_SIZE: u16 = 256;

/// VIRTIO_BLK_F_FLUSH: without it every write waits for the disk.
const BLK_FLUSH: u64 = 1 << 9;

/// Interrupts go the whole way to where KVM would take over.
struct Vectors(Msix);

impl InterruptSink for Vectors {
    fn queue(&self, queue: u16) {
        self.0.trigger(queue);
    }
    fn config(&self) {}
    fn reset(&self) {}
}

#[derive(Debug, Clone, Copy)]
struct Case {
    on_vcpu: bool,
    engine: Engine,
    /// At most this many chains at once, or as many as the ring takes.
    depth: u16,
    features: u64,
    polls: bool,
    /// Kick by eventfd, not by an exit.
    doorbell: bool,
}

fn each_case(test: impl Fn(Case)) {
    for (on_vcpu, polls, doorbell) in
        [(false, false, true), (false, true, true), (false, false, false), (true, false, false)]
    {
        for engine in [Engine::IoUring, Engine::Sync] {
            for features in [0, F_INDIRECT_DESC, F_EVENT_IDX, F_INDIRECT_DESC | F_EVENT_IDX] {
                for depth in [1, RING_SIZE] {
                    test(Case { on_vcpu, engine, depth, features, polls, doorbell });
                }
            }
        }
    }
}

/// Runs rounds of `depth` chains and gives the allocations of the threads that serve them.
fn allocations(case: Case, device: impl VirtioDevice, chain: fn(&Mem, u64) -> Vec<Buffer>) -> u64 {
    let watch: &'static Watch = Box::leak(Box::default());
    let home =
        TestLoop::in_order("io0", if case.polls { PollPolicy::default() } else { PollPolicy::OFF });
    let handle = home.handle.clone();
    std::thread::spawn(move || {
        let blocking = Blocking::on_this_thread().unwrap();
        let on_loop = Strand::new("test", &handle, ());
        on_loop.call(|_, _| WATCH.set(Some(watch))).wait(&blocking).unwrap();
        let mut vcpu = VcpuLoop::enter();
        let placement = match case.on_vcpu {
            true => Placement::Vcpu { home: handle },
            false => Placement::Loop(handle),
        };
        let (mem, messages) = (memory(4 << 20), Arc::<Count>::default());
        let msix = Msix::new(2, Arc::clone(&messages) as _);
        msix.write_control(1 << 15, !0);
        devices::device::Device::write(&msix, 12, &[0; 4], &mut vcpu.exit());
        let transport = Transport::new(
            "test",
            Arc::new(device),
            &[placement],
            Arc::clone(&mem),
            Arc::new(Vectors(msix)),
        );
        let eventfd = EventFd::new(EFD_NONBLOCK).unwrap();
        let _source = transport.seat(0).unwrap().watch(owned(&eventfd));
        let features = transport.features() & (case.features | F_VERSION_1 | BLK_FLUSH);
        transport.set_driver_features(features);
        transport.set_status(11);
        let mut ring = Ring::new(&mem, 0x1000, transport.queue(0).unwrap().0.size, features);
        transport.set_rings(0, |rings| *rings = ring.addresses());
        transport.enable_queue(0);
        transport.set_status(15);

        let mut round = || {
            let before = messages.get();
            ring.want_interrupt();
            let slots = 0..u64::from(case.depth);
            let added = slots.map_while(|slot| ring.add(&chain(&mem, slot))).count();
            if ring.wants_kick() {
                if case.doorbell {
                    eventfd.write(1).unwrap();
                } else {
                    WATCH.set(Some(watch));
                    transport.notify(0, &mut vcpu.exit());
                    WATCH.set(None);
                }
            }
            let began = Instant::now();
            let mut back = 0;
            while back < added || messages.get() == before {
                match ring.take_used() {
                    Some(_) => back += 1,
                    None => std::thread::yield_now(),
                }
                assert!(began.elapsed() < Duration::from_secs(30), "{case:?}: {back} came back");
            }
        };
        (0..8).for_each(|_| round());
        watch.armed.store(true, SeqCst);
        (0..8).for_each(|_| round());
        watch.armed.store(false, SeqCst);
        drop(home);
        watch.allocations.load(SeqCst)
    })
    .join()
    .unwrap()
}

fn owned(eventfd: &EventFd) -> std::os::fd::OwnedFd {
    use std::os::fd::{AsRawFd, BorrowedFd};
    // SAFETY: the eventfd is open while it is borrowed.
    unsafe { BorrowedFd::borrow_raw(eventfd.as_raw_fd()) }.try_clone_to_owned().unwrap()
}

/// Writes, reads and questions for the id in turn, and one flush, which takes its time.
fn blk_chain(mem: &Mem, slot: u64) -> Vec<Buffer> {
    let kind = if slot == 2 { 4u32 } else { [1, 0, 8][slot as usize % 3] };
    let mut header = [0; 16];
    header[..4].copy_from_slice(&kind.to_le_bytes());
    header[8..].copy_from_slice(&slot.to_le_bytes());
    mem.write_slice(&header, GuestAddress(HEADER + 16 * slot)).unwrap();
    let data = (DATA + 1024 * slot, 512, kind != 1);
    let (header, status) = ((HEADER + 16 * slot, 16, false), (STATUS + slot, 1, true));
    if kind == 4 { vec![header, status] } else { vec![header, data, status] }
}

fn rng_chain(_: &Mem, slot: u64) -> Vec<Buffer> {
    vec![(DATA + 1024 * slot, 300, true), (DATA + 1024 * slot + 512, 20, true)]
}

#[test]
fn a_disk_serves_requests_without_allocating() {
    each_case(|case| {
        let file = tempfile::tempfile().unwrap();
        file.set_len(SECTORS * 512).unwrap();
        let options = Options { engine: case.engine, read_only: false, direct: false };
        let image = RawImage::from_file(file, options).unwrap();
        let blk = Blk::new(Arc::new(image), "test", 1, RING_SIZE);
        assert_eq!(allocations(case, blk, blk_chain), 0, "{case:?}");
    });
}

#[test]
fn random_bytes_are_served_without_allocating() {
    each_case(|case| {
        assert_eq!(allocations(case, Rng, rng_chain), 0, "{case:?}");
    });
}

#[test]
fn an_allocation_on_a_watched_thread_is_counted() {
    // Not the first one, whose origin would be printed.
    let watch: &'static Watch =
        Box::leak(Box::new(Watch { allocations: 1.into(), armed: true.into() }));
    WATCH.set(Some(watch));
    drop(std::hint::black_box(vec![1]));
    WATCH.set(None);
    assert_eq!(watch.allocations.load(SeqCst), 2);
}
