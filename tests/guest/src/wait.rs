//! Waiting for completions: by looking, or asleep until the interrupt comes. Never forever.

use alloc::format;
use alloc::string::String;

use crate::apic::{Clock, now};
use crate::cpu::{Cpu, VECTOR_TIMER};
use crate::gate;
use crate::virtio::{Ring, Transport};

/// How long to look before giving the host's CPU to somebody else, who may be the device.
const SPIN_MICROS: u64 = 100;
/// The shortest and the longest nap in between. Each is twice as long as the one before, and the
/// next wait begins with one that would have taken two this time.
const NAP_MICROS: [u64; 2] = [200, 200_000];
/// A sleeper looks around this often even if nothing wakes it.
const TICK_MICROS: u64 = 1_000_000;
/// How long an interrupt may lag behind its completion.
const LAG_MICROS: u64 = 5_000_000;

pub struct Waiter<'a> {
    cpu: &'a Cpu,
    clock: Clock,
    /// Microseconds without a completion until the wait fails.
    patience: u64,
    /// Microseconds of the next nap.
    nap: u64,
    /// Interrupts seen when last asked for one.
    before: u64,
    /// Timer ticks seen when the timer was armed, while it is.
    armed: Option<u64>,
    /// What the interrupts so far were for, where the transport tells it.
    pub causes: Option<u32>,
}

impl<'a> Waiter<'a> {
    pub fn new(cpu: &'a Cpu, clock: Clock, watchdog_seconds: u64) -> Self {
        let patience = watchdog_seconds.saturating_mul(1_000_000);
        Waiter { cpu, clock, patience, nap: NAP_MICROS[0], before: 0, armed: None, causes: None }
    }

    /// Says how the next completions shall be told; to be called before the kick, so that even
    /// one that comes at once is told that way.
    pub fn prepare(&mut self, ring: &mut Ring, interrupts: Option<u8>) {
        match interrupts {
            None => ring.want_quiet(),
            Some(vector) => {
                self.before = self.cpu.count(vector);
                ring.want_interrupt();
            }
        }
    }

    /// Waits until the ring has a completion.
    pub fn wait(
        &mut self,
        ring: &mut Ring,
        transport: &Transport,
        interrupts: Option<u8>,
    ) -> Result<(), String> {
        match interrupts {
            None => self.poll(ring, transport),
            Some(vector) => self.sleep(ring, transport, vector),
        }
    }

    fn poll(&mut self, ring: &mut Ring, transport: &Transport) -> Result<(), String> {
        let begin = now();
        let mut checked = begin;
        let [shortest, longest] = NAP_MICROS;
        while now() - begin < self.clock.ticks(SPIN_MICROS) {
            for _ in 0..32 {
                if ring.has_used() {
                    self.nap = shortest.max(self.nap / 2);
                    return Ok(());
                }
                core::hint::spin_loop();
            }
        }
        while !ring.has_used() {
            self.halt(ring, self.nap);
            self.nap = longest.min(2 * self.nap);
            self.look_around(ring, transport, begin, &mut checked)?;
        }
        self.nap = shortest.max(self.nap / 4);
        Ok(())
    }

    fn sleep(&mut self, ring: &mut Ring, transport: &Transport, vector: u8) -> Result<(), String> {
        let begin = now();
        let mut checked = begin;
        let mut slept = false;
        while !ring.has_used() {
            slept = true;
            if self.halt(ring, TICK_MICROS) {
                if ring.has_used() {
                    // Only the timer woke us: the interrupt must be on its way.
                    self.expect_interrupt(vector, self.before)?;
                }
                self.look_around(ring, transport, begin, &mut checked)?;
            }
        }
        ring.want_quiet();
        if slept {
            self.acknowledge(transport);
        }
        Ok(())
    }

    /// Takes note of an interrupt.
    pub fn acknowledge(&mut self, transport: &Transport) {
        if let Some(causes) = transport.acknowledge() {
            self.causes = Some(causes | self.causes.unwrap_or(0));
        }
    }

    /// Halts until an interrupt, unless the ring moved. True if the timer ticked.
    fn halt(&mut self, ring: &Ring, micros: u64) -> bool {
        let ticks = self.cpu.count(VECTOR_TIMER);
        let armed = self.armed == Some(ticks) && micros == TICK_MICROS;
        let timer = if armed { 0 } else { self.clock.timer(micros) };
        let (counter, seen) = ring.counter();
        // SAFETY: the counter is a word of the ring.
        let halted = unsafe { gate::halt_unless_changed(counter, seen, timer, ticks) };
        let ticked = self.cpu.count(VECTOR_TIMER) != ticks;
        if halted {
            self.armed = (!ticked && micros == TICK_MICROS).then_some(ticks);
        }
        ticked
    }

    /// Waits a little for an interrupt after `before` that is due; fails without it.
    pub fn expect_interrupt(&mut self, vector: u8, before: u64) -> Result<(), String> {
        let begin = now();
        while self.cpu.count(vector) == before {
            if self.clock.micros(now() - begin) > LAG_MICROS {
                return Err("completions came without their interrupt".into());
            }
            core::hint::spin_loop();
        }
        Ok(())
    }

    /// Fails when the device has given up or nothing came for too long.
    fn look_around(
        &self,
        ring: &Ring,
        transport: &Transport,
        begin: u64,
        checked: &mut u64,
    ) -> Result<(), String> {
        let time = now();
        if self.clock.micros(time - *checked) < TICK_MICROS {
            return Ok(());
        }
        *checked = time;
        transport.check()?;
        let waited = self.clock.micros(time - begin);
        if waited > self.patience && !ring.has_used() {
            return Err(format!(
                "no completion for {} s ({})",
                waited / 1_000_000,
                ring.position()
            ));
        }
        Ok(())
    }
}
