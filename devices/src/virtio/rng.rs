//! virtio-rng (virtio 1.2 §5.4): the host's random bytes.

use std::sync::Arc;

use iothread::{Cx, Port, Progress};
use vm_memory::Bytes;

use super::queue::{Segment, VirtQueue};
use super::{QueueHandler, VirtioDevice};

const QUEUE_SIZE: u16 = 64;

/// Random bytes made at a time, on the stack.
const CHUNK: usize = 256;

/// Random bytes for one request; a driver that wants more asks again.
const MOST: usize = 64 * 1024;

/// The shared half. It has no state and no configuration.
#[derive(Debug, Default)]
pub struct Rng;

impl VirtioDevice for Rng {
    fn device_id(&self) -> u16 {
        4
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn read_config(&self, _: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn start(&self, queues: Vec<Option<VirtQueue>>, _: u64, _: Arc<Port>) -> Box<dyn QueueHandler> {
        let queues = queues.into_iter().flatten().collect();
        let segments = Vec::with_capacity(usize::from(QUEUE_SIZE));
        Box::new(RngQueue { queues, segments })
    }
}

struct RngQueue {
    queues: Vec<VirtQueue>,
    segments: Vec<Segment>,
}

impl QueueHandler for RngQueue {
    fn kick(&mut self, cx: &mut Cx<'_>) -> Progress {
        let Some(queue) = self.queues.first_mut() else { return Progress::Idle };
        let mut budget = QUEUE_SIZE;
        loop {
            queue.begin();
            while budget > 0
                && let Some(chain) = queue.pop(&mut self.segments)
            {
                budget -= 1;
                cx.counters().requests.add(1);
                let written = fill(queue, &self.segments);
                cx.counters().completions.add(1);
                queue.complete(chain, written);
            }
            let more = budget > 0 && queue.end(cx);
            if !more {
                queue.signal(cx);
                return if budget == 0 { Progress::More } else { Progress::Idle };
            }
        }
    }

    fn completed(&mut self, _: &mut Cx<'_>) -> Progress {
        Progress::Idle
    }

    fn in_flight(&self) -> usize {
        0
    }

    fn queues(&mut self) -> &mut [VirtQueue] {
        &mut self.queues
    }
}

/// Fills the writable segments; the bytes written.
fn fill(queue: &mut VirtQueue, segments: &[Segment]) -> u32 {
    let mut written = 0;
    for segment in segments.iter().filter(|segment| segment.writable) {
        let len = (segment.len as usize).min(MOST - written);
        for at in (0..len).step_by(CHUNK) {
            let mut bytes = [0; CHUNK];
            let part = &mut bytes[..CHUNK.min(len - at)];
            let address = segment.address.0.checked_add(at as u64).map(vm_memory::GuestAddress);
            let stored = random(part)
                .then_some(address)
                .flatten()
                .is_some_and(|address| queue.mem().write_slice(part, address).is_ok());
            if !stored {
                queue.retire("a buffer lies outside guest memory");
                return written as u32;
            }
            written += part.len();
        }
    }
    written as u32
}

/// Never waits once the host has booted.
fn random(bytes: &mut [u8]) -> bool {
    #[expect(unsafe_code, reason = "getrandom")]
    // SAFETY: the kernel writes at most `bytes.len()` bytes.
    let count = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), bytes.len(), 0) };
    count == bytes.len() as isize
}
