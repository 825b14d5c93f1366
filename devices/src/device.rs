//! What every device is: re-entrant towards the guest, and able to stand still.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use iothread::{Blocking, ExitCx, Reply};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// Something that answers on a range of addresses.
///
/// Any vCPU may be in any method at any time: a device that needs `&mut` cannot be put on the
/// bus. Accesses are 1, 2, 4 or 8 bytes and lie wholly inside the range.
///
/// ```compile_fail
/// struct Counter(std::cell::Cell<u64>);
/// impl devices::device::Device for Counter {
///     fn read(&self, _: u64, _: &mut [u8], _: &mut iothread::ExitCx<'_>) {}
///     fn write(&self, _: u64, _: &[u8], _: &mut iothread::ExitCx<'_>) {}
/// }
/// ```
pub trait Device: Send + Sync {
    /// The guest reads `data.len()` bytes at `offset` from the start of the range.
    fn read(&self, offset: u64, data: &mut [u8], exit: &mut ExitCx<'_>);

    /// The guest writes `data` at `offset` from the start of the range.
    fn write(&self, offset: u64, data: &[u8], exit: &mut ExitCx<'_>);
}

/// What a device has to remember when the machine stands still.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct State {
    /// Which kind of device this is the state of.
    pub kind: String,
    /// Version of `body` for this kind.
    pub version: u32,
    /// Plain data, see the kind's own module.
    pub body: serde_json::Value,
}

/// The body of a [`State`] of one kind.
pub trait Body: Serialize + DeserializeOwned {
    /// Names the kind.
    const KIND: &'static str;
    /// Raised with every change of the shape.
    const VERSION: u32;
}

impl State {
    /// The state that `body` tells.
    pub fn of<T: Body>(body: &T) -> Self {
        let body = serde_json::to_value(body).unwrap_or_default();
        Self { kind: T::KIND.to_owned(), version: T::VERSION, body }
    }

    /// What it tells; else why it is not such a state.
    pub fn body<T: Body>(&self) -> Result<T, String> {
        if (self.kind.as_str(), self.version) != (T::KIND, T::VERSION) {
            let Self { kind, version, .. } = self;
            return Err(format!("{kind} version {version}, not {} {}", T::KIND, T::VERSION));
        }
        T::deserialize(&self.body).map_err(|error| error.to_string())
    }
}

/// A state that cannot be taken on.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{device}: cannot restore: {why}")]
pub struct RestoreError {
    /// The device's name.
    pub device: String,
    /// What is wrong with the state.
    pub why: String,
}

/// A device as a whole: it can stand still, and say what it remembers.
pub trait Lifecycle: Send + Sync {
    /// The device's name in the VM file, for example `disk.data`.
    fn name(&self) -> &str;

    /// Takes no new work. Each reply answers when one part of the device has nothing in flight;
    /// the string names the part, for example `disk.data:q3`.
    fn pause(&self) -> Vec<(String, Reply<()>)>;

    /// Takes work again, starting with all that arrived meanwhile.
    fn resume(&self);

    /// What the device remembers.
    fn save(&self, proof: &Paused<'_>) -> State;

    /// Takes on a saved state. A state that is refused changes nothing.
    fn restore(&self, proof: &Paused<'_>, state: &State) -> Result<(), RestoreError>;
}

/// Proof that a set of devices stands still. There is no other way to it than [`Paused::pause`].
///
/// ```compile_fail
/// fn forge(devices: &[std::sync::Arc<dyn devices::device::Lifecycle>]) {
///     let proof = devices::device::Paused { devices };
/// }
/// ```
pub struct Paused<'a> {
    devices: &'a [Arc<dyn Lifecycle>],
}

impl fmt::Debug for Paused<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.devices.iter().map(|device| device.name())).finish()
    }
}

/// A part of a device that did not come to rest in time.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{part} still has requests in flight after {waited:?}; the machine runs on")]
pub struct PauseError {
    /// The part, for example `disk.data:q3`.
    pub part: String,
    /// How long the pause waited for it.
    pub waited: Duration,
}

impl<'a> Paused<'a> {
    /// Brings all devices to rest, in parallel. If one does not come to rest within `limit`, all
    /// of them run again and the error names the culprit.
    pub fn pause(
        devices: &'a [Arc<dyn Lifecycle>],
        blocking: &Blocking,
        limit: Duration,
    ) -> Result<Self, PauseError> {
        let proof = Self { devices };
        let began = Instant::now();
        let parts: Vec<_> = devices.iter().flat_map(|device| device.pause()).collect();
        for (part, reply) in parts {
            let left = limit.saturating_sub(began.elapsed());
            // A part whose loop has ended has nothing in flight either.
            if let Ok(None) = reply.wait_for(blocking, left) {
                proof.resume();
                return Err(PauseError { part, waited: began.elapsed() });
            }
        }
        Ok(proof)
    }

    /// What each device remembers, in their order.
    pub fn save(&self) -> Vec<State> {
        self.devices.iter().map(|device| device.save(self)).collect()
    }

    /// Lets all devices run again.
    pub fn resume(self) {
        self.devices.iter().for_each(|device| device.resume());
    }
}
