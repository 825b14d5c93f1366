//! Order by lot, for tests: whatever has no order by promise comes in any.

use std::time::Duration;

use crate::handle::Task;
use crate::inbox::Batch;

#[derive(Debug)]
pub(crate) struct Shuffle(u64);

impl Shuffle {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    /// xorshift64*
    fn roll(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 32
    }

    /// From 1 to `most`.
    pub(crate) fn below(&mut self, most: u32) -> u32 {
        1 + (self.roll() % u64::from(most)) as u32
    }

    pub(crate) fn order<T>(&mut self, items: &mut [T]) {
        for last in (1..items.len()).rev() {
            items.swap(last, self.roll() as usize % (last + 1));
        }
    }

    /// Once in a while, does nothing for up to a millisecond.
    pub(crate) fn dawdle(&mut self) {
        if self.roll().is_multiple_of(256) {
            std::thread::sleep(Duration::from_micros(self.roll() % 1000));
        }
    }

    /// Objects change places; changes of the loop itself do not, nor does anything pass them.
    pub(crate) fn batch(&mut self, batch: Batch<Task>) -> Batch<Task> {
        let mut nodes = batch.into_nodes();
        let is_admin = |node: &std::sync::Arc<crate::inbox::Node<Task>>| {
            matches!(node.value, Task::Admin(_) | Task::Arm(_))
        };
        nodes.split_mut(is_admin).for_each(|objects| self.order(objects));
        Batch::from_nodes(nodes)
    }
}
