//! A value that is read by many threads and replaced as a whole.

use std::sync::Arc;

use arc_swap::ArcSwapAny;

/// A value that is read by many threads and replaced as a whole, with [`ArcSwapAny::rcu`].
///
/// A reader waits only while a writer exchanges the pointer; what it has read stays as it was. Who
/// reads again and again has an [`arc_swap::Cache`], which waits only after a change. The
/// lock-free strategy of `arc-swap` would not make it wait at all, but as of 1.9.3 it frees what is
/// still being read (<https://github.com/vorner/arc-swap/issues/210>): `transport_random` has
/// died of it.
#[expect(clippy::disallowed_types, reason = "held for the time of counting a reference")]
pub type Snapshot<T> = ArcSwapAny<Arc<T>, std::sync::RwLock<()>>;
