//! virtio-rng: do bytes come, and do they differ?

use alloc::format;
use alloc::string::String;

use crate::apic::Clock;
use crate::cpu::Cpu;
use crate::mem;
use crate::options::Options;
use crate::virtio::{self, Found, Place, Segment, Transport};
use crate::wait::Waiter;

pub const DEVICE: u16 = virtio::MODERN + 4;

const RING: u16 = 8;
const WANTED: usize = 512;
const REQUEST: usize = 64;

/// What came of a random number device.
pub struct Rng {
    pub place: Place,
    pub bytes: u64,
    pub distinct: u64,
    pub requests: u64,
    pub kicks: u64,
    pub interrupts: u64,
}

/// Draws bytes on this CPU, in turn polled and with interrupts, and judges them.
pub fn run(
    found: &Found,
    vector: u8,
    cpu: &Cpu,
    clock: Clock,
    options: &Options,
) -> Result<Rng, String> {
    let transport = Transport::open(found)?;
    let event_idx = if options.event_idx { virtio::F_EVENT_IDX } else { 0 };
    let features = transport.negotiate(event_idx)?;
    let size = transport.queue_size(0).min(RING);
    let vector = transport.route_queue(0, cpu, vector)?;
    let mut ring = transport.start_queue(0, size, features & virtio::F_EVENT_IDX != 0);
    transport.driver_ok();

    let mut waiter = Waiter::new(cpu, clock, options.watchdog);
    let before = cpu.count(vector);
    let buffer = mem::pages(REQUEST);
    let mut seen = [0u32; 256];
    let (mut bytes, mut requests) = (0, 0);
    let mut last = [0u8; REQUEST];
    while bytes < WANTED {
        if requests > 4 * WANTED as u64 {
            return Err(format!("only {bytes} bytes in {requests} requests"));
        }
        buffer[..REQUEST].fill(0);
        let address = buffer.as_ptr() as u64;
        ring.add(&[Segment { address, bytes: REQUEST as u32, device_writes: true }], 0);
        let interrupts = (requests % 2 == 1).then_some(vector);
        waiter.prepare(&mut ring, interrupts);
        ring.kick();
        waiter.wait(&mut ring, &transport, interrupts)?;
        let used = ring.pop()?.ok_or("no completion")?;
        let got = used.bytes as usize;
        if got == 0 || got > REQUEST {
            return Err(format!("{got} bytes for a request of {REQUEST}"));
        }
        // SAFETY: the device wrote behind the compiler's back; the completion was seen with
        // acquire order, and a volatile read takes the bytes as they are now.
        let drawn = unsafe { buffer.as_ptr().cast::<[u8; REQUEST]>().read_volatile() };
        if got == REQUEST && drawn == last {
            return Err("the same bytes twice".into());
        }
        last = drawn;
        drawn[..got].iter().for_each(|&b| seen[usize::from(b)] += 1);
        bytes += got;
        requests += 1;
    }
    // 512 random bytes hit 221 values on average; fewer than 128 never happens.
    let distinct = seen.iter().filter(|&&n| n > 0).count();
    if distinct < 128 {
        return Err(format!("{distinct} different values in {bytes} bytes"));
    }
    waiter.expect_interrupt(vector, before)?;
    waiter.acknowledge(&transport);
    if waiter.causes == Some(0) {
        return Err("interrupts came, and the device told no cause".into());
    }
    transport.check()?;
    transport.reset()?;
    Ok(Rng {
        place: found.place(),
        bytes: bytes as u64,
        distinct: distinct as u64,
        requests,
        kicks: ring.kicks(),
        interrupts: cpu.count(vector) - before,
    })
}
