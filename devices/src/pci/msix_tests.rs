use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Barrier, mpsc};
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
    torn: AtomicBool,
}

impl MsiSender for Observer {
    fn send(&self, msi: Msi) {
        self.messages.fetch_add(1, SeqCst);
        self.seen.fetch_max(self.events.load(SeqCst), SeqCst);
        if msi.address >> 4 != u64::from(msi.data) {
            self.torn.store(true, SeqCst);
        }
    }
}

/// Runs `triggers` on two threads while `guest` changes the table, then lets all through.
fn race(triggers: u64, guest: impl Fn(&Msix, &mut VcpuLoop) + Sync) -> (Arc<Observer>, Msix) {
    const THREADS: u64 = 2;
    let observer = Arc::new(Observer::default());
    let msix = Msix::new(1, Arc::clone(&observer) as Arc<dyn MsiSender>);
    msix.write_control(ENABLE, u16::MAX);
    let (start, done) = (Barrier::new(THREADS as usize + 1), AtomicU64::new(0));
    thread::scope(|scope| {
        for _ in 0..THREADS {
            scope.spawn(|| {
                start.wait();
                for _ in 0..triggers {
                    observer.events.fetch_add(1, SeqCst);
                    msix.trigger(0);
                }
                done.fetch_add(1, SeqCst);
            });
        }
        scope.spawn(|| {
            let mut vcpu = VcpuLoop::enter();
            start.wait();
            while done.load(SeqCst) < THREADS {
                guest(&msix, &mut vcpu);
            }
        });
    });
    msix.entries[0].set_masked(false);
    msix.send_if_pending(0);
    msix.write_control(ENABLE, u16::MAX);
    assert_eq!(observer.events.load(SeqCst), triggers * THREADS);
    (observer, msix)
}

fn no_event_is_lost(observer: &Observer, msix: &Msix) {
    assert_eq!(observer.seen.load(SeqCst), observer.events.load(SeqCst), "the last event is lost");
    assert_eq!(msix.pending[0].load(SeqCst), 0);
    assert_eq!(observer.messages.load(SeqCst), msix.sent());
}

#[test]
fn a_trigger_that_races_with_an_unmask_is_neither_lost_nor_doubled() {
    let write = |msix: &Msix, vcpu: &mut VcpuLoop, masked: u32| {
        msix.write(12, &masked.to_le_bytes(), &mut vcpu.exit());
    };
    // Many short runs: the last event of each is the one that must not be lost.
    for _ in 0..200 {
        let (observer, msix) = race(500, |msix, vcpu| {
            write(msix, vcpu, 1);
            write(msix, vcpu, 0);
        });
        no_event_is_lost(&observer, &msix);
        assert!(msix.sent() <= observer.events.load(SeqCst), "more messages than events");
    }
}

#[test]
fn a_trigger_that_races_with_the_function_mask_is_neither_lost_nor_doubled() {
    for _ in 0..200 {
        let (observer, msix) = race(500, |msix, vcpu| {
            msix.write(12, &[0; 4], &mut vcpu.exit());
            msix.write_control(ENABLE | FUNCTION_MASK, u16::MAX);
            msix.write_control(ENABLE, u16::MAX);
        });
        no_event_is_lost(&observer, &msix);
        assert!(msix.sent() <= observer.events.load(SeqCst), "more messages than events");
    }
}

#[test]
fn a_message_is_never_half_of_one_and_half_of_another() {
    let point_to = |msix: &Msix, vcpu: &mut VcpuLoop, n: u32| {
        msix.write(0, &(u64::from(n) << 4).to_le_bytes(), &mut vcpu.exit());
        msix.write(8, &n.to_le_bytes(), &mut vcpu.exit());
    };
    let (observer, msix) = race(300_000, |msix, vcpu| {
        for n in 1..100_u32 {
            // By turns behind the vector's mask and behind the function's.
            if n % 2 == 0 {
                msix.write(12, &[1, 0, 0, 0], &mut vcpu.exit());
                point_to(msix, vcpu, n);
                msix.write(12, &[0; 4], &mut vcpu.exit());
            } else {
                msix.write_control(ENABLE | FUNCTION_MASK, u16::MAX);
                point_to(msix, vcpu, n);
                msix.write_control(ENABLE, u16::MAX);
            }
        }
    });
    no_event_is_lost(&observer, &msix);
    assert!(!observer.torn.load(SeqCst));
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
