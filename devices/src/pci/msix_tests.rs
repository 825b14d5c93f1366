use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, mpsc};
use std::thread;

use iothread::VcpuLoop;
use proptest::prelude::*;

use super::*;

/// Keeps the messages.
struct Channel(mpsc::Sender<Msi>);

impl MsiSender for Channel {
    fn send(&self, msi: Msi) {
        let _ = self.0.send(msi);
    }
}

struct Bench {
    msix: Msix,
    messages: mpsc::Receiver<Msi>,
    vcpu: VcpuLoop,
}

impl Bench {
    fn new(vectors: u16) -> Self {
        let (sender, messages) = mpsc::channel();
        Self {
            msix: Msix::new(vectors, Arc::new(Channel(sender))),
            messages,
            vcpu: VcpuLoop::enter(),
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        self.msix.write(offset, data, &mut self.vcpu.exit());
    }

    fn read(&mut self, offset: u64) -> u32 {
        let mut data = [0; 4];
        self.msix.read(offset, &mut data, &mut self.vcpu.exit());
        u32::from_le_bytes(data)
    }

    fn set(&mut self, vector: u64, msi: Msi, masked: bool) {
        self.write(vector * 16, &msi.address.to_le_bytes());
        self.write(vector * 16 + 8, &msi.data.to_le_bytes());
        self.write(vector * 16 + 12, &u32::from(masked).to_le_bytes());
    }

    fn mask(&mut self, vector: u64, masked: bool) {
        self.write(vector * 16 + 12, &u32::from(masked).to_le_bytes());
    }

    fn pending(&mut self, vector: u32) -> bool {
        let base = u64::from(self.msix.pending_offset());
        self.read(base + u64::from(vector / 32) * 4) >> (vector % 32) & 1 != 0
    }

    fn messages(&mut self) -> Vec<Msi> {
        self.messages.try_iter().collect()
    }
}

const A: Msi = Msi { address: 0xfee0_1000, data: 0x41 };
const B: Msi = Msi { address: 0x1_fee0_2000, data: 0x4242 };

fn enabled(vectors: u16) -> Bench {
    let bench = Bench::new(vectors);
    bench.msix.write_control(ENABLE, u16::MAX);
    bench
}

#[test]
fn after_reset_all_vectors_are_masked_and_nothing_is_enabled() {
    let mut bench = Bench::new(3);
    assert_eq!(bench.msix.control(), 2, "the size is one less than the number");
    for vector in 0..3 {
        assert_eq!(bench.read(vector * 16 + 12), 1);
    }
    bench.msix.trigger(0);
    assert_eq!(bench.messages(), []);
}

#[test]
fn an_open_vector_sends_its_message() {
    let mut bench = enabled(8);
    bench.set(7, B, false);
    bench.msix.trigger(7);
    bench.msix.trigger(7);
    assert_eq!(bench.messages(), [B, B]);
    assert_eq!((bench.msix.sent(), bench.msix.pended()), (2, 0));
}

#[test]
fn a_masked_vector_is_pending_and_sent_once_when_it_is_unmasked() {
    let mut bench = enabled(70);
    bench.set(69, A, true);
    bench.msix.trigger(69);
    bench.msix.trigger(69);
    assert!(bench.pending(69) && bench.messages().is_empty());
    bench.mask(69, false);
    assert_eq!(bench.messages(), [A]);
    assert!(!bench.pending(69));
    bench.mask(69, true);
    bench.mask(69, false);
    assert_eq!(bench.messages(), []);
    assert_eq!((bench.msix.sent(), bench.msix.pended()), (1, 1));
}

#[test]
fn what_is_pending_goes_where_the_vector_points_when_it_is_unmasked() {
    let mut bench = enabled(1);
    bench.set(0, A, true);
    bench.msix.trigger(0);
    bench.set(0, B, false);
    assert_eq!(bench.messages(), [B]);
}

#[test]
fn the_function_mask_and_the_enable_bit_hold_back_all_vectors() {
    for held in [0, FUNCTION_MASK, ENABLE | FUNCTION_MASK] {
        let mut bench = Bench::new(130);
        bench.msix.write_control(held, u16::MAX);
        bench.set(1, A, false);
        bench.set(129, B, false);
        bench.set(64, A, true);
        [1, 64, 129].into_iter().for_each(|vector| bench.msix.trigger(vector));
        assert_eq!(bench.messages(), []);
        bench.msix.write_control(ENABLE, u16::MAX);
        assert_eq!(bench.messages(), [A, B]);
        assert!(bench.pending(64));
    }
}

#[test]
fn only_the_two_control_bits_can_be_written_and_byte_by_byte() {
    let bench = Bench::new(MAX_VECTORS);
    bench.msix.write_control(u16::MAX, 0x00ff);
    assert_eq!(bench.msix.control(), 0x7ff);
    bench.msix.write_control(u16::MAX, 0xff00);
    assert_eq!(bench.msix.control(), 0xc7ff);
    bench.msix.write_control(0, 0x00ff);
    assert_eq!(bench.msix.control(), 0xc7ff);
}

#[test]
fn a_vector_that_does_not_exist_interrupts_nobody() {
    let mut bench = enabled(2);
    bench.msix.trigger(2);
    bench.msix.trigger(u16::MAX);
    assert_eq!(bench.messages(), []);
    assert_eq!(bench.msix.pended(), 0);
}

#[test]
fn the_table_comes_first_then_the_pending_bits_in_a_bar_of_a_power_of_two() {
    for (vectors, pending, size) in [
        (1, 16, 4096),
        (64, 1024, 4096),
        (252, 4032, 4096),
        (256, 4096, 8192),
        (2048, 32768, 65536),
    ] {
        let msix = Bench::new(vectors).msix;
        assert_eq!(
            (msix.table_offset(), msix.pending_offset(), msix.bar_size()),
            (0, pending, size)
        );
    }
}

#[test]
fn entries_are_written_by_4_or_8_bytes_and_nothing_else() {
    let mut bench = Bench::new(2);
    let mut entry = [0; 16];
    bench.write(16, &[0xff; 8]);
    bench.write(24, &[0xff; 8]);
    bench.msix.read(16, &mut entry[..8], &mut bench.vcpu.exit());
    bench.msix.read(24, &mut entry[8..], &mut bench.vcpu.exit());
    assert_eq!(entry, [0xfc, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 1, 0, 0, 0]);
    for (offset, len) in [(16, 1), (16, 2), (17, 4), (20, 8), (30, 4)] {
        bench.write(offset, &[0; 8][..len]);
    }
    bench.msix.read(16, &mut entry[..8], &mut bench.vcpu.exit());
    assert_eq!(entry[..8], [0xfc, 255, 255, 255, 255, 255, 255, 255]);
    let mut byte = [0];
    bench.msix.read(28, &mut byte, &mut bench.vcpu.exit());
    assert_eq!(byte, [1]);
}

#[test]
fn pending_bits_cannot_be_written() {
    let mut bench = enabled(1);
    bench.set(0, A, true);
    bench.msix.trigger(0);
    bench.write(16, &[0; 8]);
    assert!(bench.pending(0));
}

#[test]
fn a_restored_table_sends_what_was_pending_when_it_may() {
    let mut from = enabled(3);
    from.set(0, A, false);
    from.set(1, B, true);
    from.msix.trigger(1);
    let saved = from.msix.save();

    let mut to = Bench::new(3);
    to.msix.accepts(&saved).unwrap();
    to.msix.restore(&saved);
    assert_eq!(to.msix.save(), saved);
    assert_eq!(to.messages(), []);
    to.mask(1, false);
    assert_eq!(to.messages(), [B]);
    to.msix.trigger(0);
    assert_eq!(to.messages(), [A]);
}

#[test]
fn a_state_of_another_table_is_refused() {
    let saved = Bench::new(3).msix.save();
    assert!(Bench::new(4).msix.accepts(&saved).is_err());
    let absurd = Saved { pending: vec![8], ..saved.clone() };
    assert!(Bench::new(3).msix.accepts(&absurd).is_err());
    assert!(Bench::new(3).msix.accepts(&Saved { pending: vec![], ..saved }).is_err());
}

/// Counts, and remembers how many events had happened when the last message was sent.
#[derive(Default)]
struct Observer {
    events: AtomicU64,
    messages: AtomicU64,
    seen: AtomicU64,
    failed: AtomicBool,
}

impl MsiSender for Observer {
    fn send(&self, _: Msi) {
        self.messages.fetch_add(1, SeqCst);
        self.seen.fetch_max(self.events.load(SeqCst), SeqCst);
    }
}

/// Both threads leave at the same time, or nearly.
#[derive(Default)]
struct StartLine(AtomicU64);

impl StartLine {
    fn meet(&self, round: u64) {
        self.0.fetch_add(1, SeqCst);
        for turn in 0_u64.. {
            match self.0.load(SeqCst) < 2 * round {
                true if turn < 10_000 => std::hint::spin_loop(),
                true => thread::yield_now(),
                false => break,
            }
        }
    }
}

/// In each round one trigger meets one `release` of a vector that was held back. Exactly one
/// message must have come of it.
fn duel(hold: impl Fn(&Msix, &mut VcpuLoop), release: impl Fn(&Msix, &mut VcpuLoop)) {
    const ROUNDS: u64 = 10_000;
    let observer = Arc::new(Observer::default());
    let msix = Msix::new(1, Arc::clone(&observer) as Arc<dyn MsiSender>);
    msix.write_control(ENABLE, u16::MAX);
    msix.entries[0].set_masked(false);
    let (start, end) = (StartLine::default(), StartLine::default());
    let mut vcpu = VcpuLoop::enter();
    thread::scope(|scope| {
        scope.spawn(|| {
            for round in 1..=ROUNDS {
                start.meet(round);
                // A different part of one meets a different part of the other.
                (0..round % 32).for_each(|_| std::hint::spin_loop());
                msix.trigger(0);
                end.meet(round);
            }
        });
        for round in 1..=ROUNDS {
            hold(&msix, &mut vcpu);
            start.meet(round);
            (0..round / 32 % 32).for_each(|_| std::hint::spin_loop());
            release(&msix, &mut vcpu);
            end.meet(round);
            // After a failure the other thread must still come to its end.
            if observer.messages.load(SeqCst) != round || msix.pending[0].load(SeqCst) != 0 {
                observer.failed.store(true, SeqCst);
            }
        }
    });
    assert!(!observer.failed.load(SeqCst), "an event was lost or doubled");
    assert_eq!(observer.messages.load(SeqCst), ROUNDS);
}

fn mask(msix: &Msix, vcpu: &mut VcpuLoop) {
    msix.write(12, &1_u32.to_le_bytes(), &mut vcpu.exit());
}

fn unmask(msix: &Msix, vcpu: &mut VcpuLoop) {
    msix.write(12, &0_u32.to_le_bytes(), &mut vcpu.exit());
}

#[test]
fn a_trigger_that_meets_an_unmask_makes_one_message() {
    duel(mask, unmask);
}

#[test]
fn a_trigger_that_meets_the_end_of_a_function_mask_makes_one_message() {
    duel(
        |msix, _| msix.write_control(ENABLE | FUNCTION_MASK, u16::MAX),
        |msix, _| msix.write_control(ENABLE, u16::MAX),
    );
}

#[test]
fn a_trigger_that_meets_the_enable_bit_makes_one_message() {
    duel(|msix, _| msix.write_control(0, u16::MAX), |msix, _| msix.write_control(ENABLE, u16::MAX));
}

/// Two threads trigger while `guest` changes the table again and again, and leaves the vector open.
fn storm(triggers: u64, guest: impl Fn(&Msix, &mut VcpuLoop)) -> Arc<Observer> {
    const THREADS: u64 = 2;
    let observer = Arc::new(Observer::default());
    let msix = Msix::new(1, Arc::clone(&observer) as Arc<dyn MsiSender>);
    msix.write_control(ENABLE, u16::MAX);
    let (done, mut vcpu) = (AtomicU64::new(0), VcpuLoop::enter());
    unmask(&msix, &mut vcpu);
    thread::scope(|scope| {
        for _ in 0..THREADS {
            scope.spawn(|| {
                for _ in 0..triggers {
                    observer.events.fetch_add(1, SeqCst);
                    msix.trigger(0);
                }
                done.fetch_add(1, SeqCst);
            });
        }
        while done.load(SeqCst) < THREADS {
            guest(&msix, &mut vcpu);
        }
    });
    assert_eq!(observer.seen.load(SeqCst), triggers * THREADS, "the last event is lost");
    assert_eq!(msix.pending[0].load(SeqCst), 0);
    observer
}

#[test]
fn no_event_is_lost_or_invented_while_the_guest_masks_and_unmasks() {
    let observer = storm(100_000, |msix, vcpu| {
        mask(msix, vcpu);
        unmask(msix, vcpu);
    });
    assert!(observer.messages.load(SeqCst) <= observer.events.load(SeqCst));
}

fn point_to(entry: &Entry, n: u32) {
    entry.address.store(u64::from(n) << 4, SeqCst);
    entry.set_data(n);
}

/// One thread points a vector here and there with `change`, another takes copies of its message.
fn copies_are_whole(change: impl Fn(&Msix, u32) + Sync) {
    let msix = Msix::new(1, Arc::new(Observer::default()));
    point_to(&msix.entries[0], 0);
    msix.entries[0].set_masked(false);
    msix.write_control(ENABLE, u16::MAX);
    let done = AtomicBool::new(false);
    let (mut copies, mut torn) = (0, 0);
    thread::scope(|scope| {
        scope.spawn(|| {
            (0..500_000_u32).for_each(|n| change(&msix, n % 3));
            done.store(true, SeqCst);
        });
        while !done.load(SeqCst) {
            if let Some(msi) = msix.message(&msix.entries[0]) {
                copies += 1;
                torn += u32::from(msi.address >> 4 != u64::from(msi.data));
            }
        }
    });
    assert_eq!(torn, 0, "of {copies} copies");
}

#[test]
fn a_message_changed_behind_its_mask_is_never_half_of_one_and_half_of_another() {
    copies_are_whole(|msix, n| {
        msix.entries[0].set_masked(true);
        point_to(&msix.entries[0], n);
        msix.entries[0].set_masked(false);
    });
}

#[test]
fn a_message_changed_behind_the_function_mask_is_never_half_of_one_and_half_of_another() {
    copies_are_whole(|msix, n| {
        msix.write_control(ENABLE | FUNCTION_MASK, u16::MAX);
        point_to(&msix.entries[0], n);
        msix.write_control(ENABLE, u16::MAX);
    });
}

/// Points the vector elsewhere while its first message is on the way.
#[derive(Default)]
struct Mover {
    msix: std::sync::OnceLock<Arc<Msix>>,
    sent: crossbeam_queue::SegQueue<Msi>,
}

impl MsiSender for Mover {
    fn send(&self, msi: Msi) {
        self.sent.push(msi);
        if msi == A {
            let entry = &self.msix.get().unwrap().entries[0];
            entry.set_masked(true);
            entry.address.store(B.address, SeqCst);
            entry.set_data(B.data);
            entry.set_masked(false);
        }
    }
}

#[test]
fn a_vector_that_is_pointed_elsewhere_during_a_send_tells_the_new_place_too() {
    let mover = Arc::new(Mover::default());
    let msix = Arc::new(Msix::new(1, Arc::clone(&mover) as Arc<dyn MsiSender>));
    assert!(mover.msix.set(Arc::clone(&msix)).is_ok());
    msix.write_control(ENABLE, u16::MAX);
    msix.entries[0].address.store(A.address, SeqCst);
    msix.entries[0].set_data(A.data);
    msix.entries[0].set_masked(false);
    msix.trigger(0);
    assert_eq!([mover.sent.pop(), mover.sent.pop(), mover.sent.pop()], [Some(A), Some(B), None]);
}

proptest! {
    #[test]
    fn any_accesses_to_the_bar_leave_messages_and_events_in_balance(
        vectors in 1_u16..200,
        steps in proptest::collection::vec((0_u64..4096, 0_usize..4, any::<[u8; 8]>(), any::<u16>()), 1..400),
    ) {
        let mut bench = enabled(vectors);
        let mut triggers = 0;
        for (offset, width, data, word) in steps {
            let len = 1 << width;
            let offset = offset % (bench.msix.bar_size() - 7);
            bench.write(offset, &data[..len]);
            bench.msix.read(offset, &mut [0; 8][..len], &mut bench.vcpu.exit());
            bench.msix.trigger(word);
            triggers += u64::from(word < vectors);
            if word & 7 == 0 {
                bench.msix.write_control(word, u16::MAX);
            }
        }
        let pending: u32 = bench.msix.pending.iter().map(|word| word.load(SeqCst).count_ones()).sum();
        prop_assert!(bench.msix.sent() + u64::from(pending) <= triggers);
        prop_assert_eq!(bench.messages().len() as u64, bench.msix.sent());
    }
}
