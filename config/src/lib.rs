//! From a TOML file to a validated [`plan::Plan`], with all that is wrong said at once.
//!
//! Everything here is pure: no KVM, no threads, no side effects. [`load`] reads a file and its
//! includes; [`explain()`] says what each thread of the plan will do on a [`Host`] and why;
//! [`check_host`] says what this host lacks.

#![forbid(unsafe_code)]

mod check;
pub mod cpuset;
pub mod diagnostics;
mod effective;
mod explain;
mod init;
mod keys;
mod load;
pub mod plan;
pub mod prealloc;
mod read;
mod reader;
mod report;
mod schema;
mod synthetic;
mod topology;
mod tree;
pub mod units;
mod value;

pub use check::check_host;
pub use cpuset::CpuSet;
pub use diagnostics::{Diagnostic, Diagnostics, Severity};
pub use explain::{
    Explanation, NodeReport, Problem, Role, ThreadReport, WORKERS_OF_A_RING, explain,
};
pub use init::{template, template_names};
pub use load::{Loaded, Provenance, load, load_str};
pub use schema::{json_schema, schema_text};
pub use synthetic::Synthetic;
pub use topology::{Host, HostCpu, HugePages, Limits, NodeMemory, TopologyError};
