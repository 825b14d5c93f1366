//! From the tree to the plan: every name resolved, everything checked that needs no host.

mod devices;
mod machine;
mod numa;
mod placement;
mod test;
mod threads;

use std::path::{Component, Path, PathBuf};

use crate::plan::{DiskSource, Kernel, OnReset, Plan, Policy, SerialOut, Verdict};
use crate::reader::Reader;
use crate::report::Report;
use crate::tree::{Loc, Table};

/// Characters in the machine's name.
pub(crate) const LONGEST_NAME: usize = 64;

/// Reads all of `tree`. What is wrong goes to `report`; the plan counts only if nothing did.
pub(crate) fn plan(report: &Report, tree: &Table, default_name: &str) -> Plan {
    let root = Reader::root(report, tree);
    if let Some(schema) = root.value("schema") {
        schema.int::<u32>();
    }
    // Files had theirs worked in; `--set` may not have any.
    root.value("include");
    let (mut machine, count, size_said) = machine::machine(&root.table("machine"));
    let numa = numa::nodes(&root, count, &mut machine, size_said);
    let boot = machine::boot(&root.table("boot"));
    let vcpus = threads::vcpus(&root.table("vcpu"), count);
    let threads = threads::threads(&root);
    let mut files = Files::default();
    let mut booted = |file: &Path, what| files.add(report, file, what, false, root.loc_of("boot"));
    match &boot.kernel {
        Some(Kernel::Native(file)) => booted(file, "boot.kernel"),
        Some(Kernel::Multiboot(file)) => booted(file, "boot.multiboot"),
        None => {}
    }
    boot.modules.iter().for_each(|module| booted(&module.path, "a module of boot"));
    let disks = devices::disks(&root, &threads, count, &mut files);
    let rngs = devices::rngs(&root, &threads);
    let serials = devices::serials(&root, &mut files);
    devices::check_count(&root, disks.len() + rngs.len(), &machine);
    Plan {
        name: name(&root).unwrap_or_else(|| default_name.to_owned()),
        machine,
        numa,
        boot,
        vcpus,
        test: test::test(&root.table("test"), &threads),
        threads,
        disks,
        rngs,
        serials,
        policy: policy(&root.table("policy")),
    }
}

fn name(root: &Reader<'_>) -> Option<String> {
    root.value("name")?.parse(
        |name| match name.chars().count() {
            0 => Err("is empty"),
            count if count > LONGEST_NAME => Err("is longer than 64 characters"),
            _ if name.chars().any(char::is_control) => Err("has a control character in it"),
            _ => Ok(name.to_owned()),
        },
        |_| None,
    )
}

fn policy(table: &Reader<'_>) -> Policy {
    let verdict = |key| match table.value(key).and_then(|value| value.word()) {
        Some("allow") => Verdict::Allow,
        Some("error") => Verdict::Error,
        _ => Verdict::Warn,
    };
    let on_reset = match table.value("on-reset").and_then(|value| value.word()) {
        Some("exit") => OnReset::Exit,
        _ => OnReset::Restart,
    };
    Policy { on_reset, overlap: verdict("overlap"), fallback: verdict("fallback") }
}

/// Which file is used for what, so that nobody writes what another reads.
#[derive(Default)]
struct Files(std::collections::BTreeMap<PathBuf, (String, bool)>);

impl Files {
    fn add(&mut self, report: &Report, path: &Path, user: &str, writes: bool, at: Loc) {
        // `a//b` and `a/./b` are `a/b`; what links do is for the host to find out.
        let plain: PathBuf = path.components().filter(|part| *part != Component::CurDir).collect();
        match self.0.get(&plain) {
            Some((other, other_writes)) if writes || *other_writes => {
                let hint = "only what is read-only on both sides may share a file";
                report.error(
                    at,
                    format!("{user} uses the same file as {other}"),
                    Some(hint.to_owned()),
                );
            }
            Some(_) => {}
            None => {
                self.0.insert(plain, (user.to_owned(), writes));
            }
        }
    }

    fn add_disk(
        &mut self,
        report: &Report,
        source: &DiskSource,
        user: &str,
        writes: bool,
        at: Loc,
    ) {
        if let DiskSource::File(path) | DiskSource::FileOrCreate(path, _) = source {
            self.add(report, path, user, writes, at);
        }
    }

    fn add_serial(&mut self, report: &Report, out: &SerialOut, user: &str, at: Loc) {
        if let SerialOut::File(path) = out {
            self.add(report, path, user, true, at);
        }
    }
}
