//! An explanation as a table for people.

use super::{Explanation, NodeReport, Role, ThreadReport, WORKERS_OF_A_RING};
use crate::cpuset::CpuSet;
use crate::diagnostics::Severity;
use crate::units::format_size;

/// Below this, names and policies could not be kept whole.
const NARROWEST: usize = 80;
/// Names that have a number behind them.
const VCPU: &str = "vcpu";
const PREALLOC: &str = crate::prealloc::NAME;
const HEADER: [&str; 5] = ["THREAD", "CPUS", "NODES", "POLICY", "POLL"];

pub(super) fn render(explanation: &Explanation, width: usize) -> String {
    let width = width.max(NARROWEST);
    let rows = rows(&explanation.threads);
    let mut widths = HEADER.map(str::len);
    // Lists that are longer go on in a line below.
    let longest = (width - 2 * HEADER.len()) / HEADER.len();
    for (cells, _) in &rows {
        for (cell, width) in cells.iter().zip(&mut widths) {
            *width = (*width).max(cell.chars().count().min(longest));
        }
    }
    let mut text = String::new();
    line(&mut text, &HEADER.map(str::to_owned), &widths);
    for (cells, reasons) in &rows {
        line(&mut text, cells, &widths);
        for reason in reasons {
            wrap(&mut text, reason, "    ", "      ", width);
        }
    }
    nodes(&mut text, explanation, width);
    hotplug_slots(&mut text, explanation.hotplug_slots, width);
    totals(&mut text, explanation, width);
    for problem in &explanation.warnings {
        let kind = match problem.severity {
            Severity::Warning => "warning",
            Severity::Error => "error",
        };
        text.push('\n');
        wrap(
            &mut text,
            &format!("{kind} {}: {}", problem.code, problem.message),
            "",
            "    ",
            width,
        );
        if let Some(hint) = &problem.hint {
            wrap(&mut text, hint, "    ", "    ", width);
        }
    }
    text
}

/// One line per node of the guest.
fn nodes(text: &mut String, explanation: &Explanation, width: usize) {
    if !explanation.nodes.is_empty() {
        text.push('\n');
    }
    for NodeReport { node, vcpus, memory, host_node } in &explanation.nodes {
        let vcpus = match vcpus.is_empty() {
            true => "no vCPUs".to_owned(),
            false => vcpus.counted("vCPU"),
        };
        let from = match host_node {
            Some(host) => format!("of host node {host}"),
            None => "of any host node".to_owned(),
        };
        let memory = format_size(*memory);
        wrap(text, &format!("guest node {node}: {vcpus}, {memory} {from}"), "", "    ", width);
    }
}

/// The slots, and where the guest finds what is plugged into them.
fn hotplug_slots(text: &mut String, slots: u8, width: usize) {
    let words = match slots {
        0 => return,
        1 => {
            "1 hot-plug slot, empty at the start: a PCIe root port with bus 1 behind it".to_owned()
        }
        _ => format!(
            "{slots} hot-plug slots, empty at the start: PCIe root ports with buses 1-{slots} \
             behind them"
        ),
    };
    text.push('\n');
    wrap(text, &words, "", "    ", width);
}

/// One row per thread, vCPUs that differ only in their number together.
fn rows(threads: &[ThreadReport]) -> Vec<([String; 5], Vec<String>)> {
    let mut rows: Vec<(ThreadReport, CpuSet)> = Vec::new();
    for thread in threads {
        // Only these have numbers.
        let number = match thread.role {
            Role::Vcpu => thread.name.strip_prefix(VCPU),
            Role::Prealloc => thread.name.strip_prefix(PREALLOC),
            _ => None,
        };
        let number = number.and_then(|number| number.parse().ok());
        let plain = ThreadReport { name: String::new(), ..thread.clone() };
        match (number, rows.iter_mut().find(|(row, _)| *row == plain)) {
            (Some(number), Some((_, numbers))) => numbers.insert(number),
            (Some(number), None) => rows.push((plain, CpuSet::from_iter([number]))),
            (None, _) => rows.push((thread.clone(), CpuSet::new())),
        }
    }
    rows.into_iter().map(|(thread, numbers)| row(thread, &numbers)).collect()
}

fn row(thread: ThreadReport, numbers: &CpuSet) -> ([String; 5], Vec<String>) {
    let name = match thread.role {
        Role::Vcpu => format!("{VCPU} {numbers}"),
        Role::Prealloc => format!("{PREALLOC} {numbers}"),
        _ => thread.name,
    };
    let mut reasons = thread.reasons;
    let mut cost = format!("costs {}", plural(thread.fds, "fd"));
    if numbers.len() > 1 {
        cost += " each";
    }
    if thread.rings > 0 {
        let workers = thread.rings * WORKERS_OF_A_RING;
        cost += &format!(", {} (up to {workers} kernel threads)", plural(thread.rings, "ring"));
    }
    if let Some(poll) = &thread.poll {
        cost += &format!(", up to {poll} of CPU time before each sleep");
    }
    reasons.push(match thread.role {
        Role::Prealloc => "ends before the guest starts".to_owned(),
        _ => cost,
    });
    let cells = [
        name,
        thread.cpus.map_or_else(|| "any".to_owned(), |cpus| cpus.to_string()),
        if thread.nodes.is_empty() { "-".to_owned() } else { thread.nodes.to_string() },
        thread.policy,
        thread.poll.unwrap_or_else(|| "-".to_owned()),
    ];
    (cells, reasons)
}

fn plural(count: u64, what: &str) -> String {
    format!("{count} {what}{}", if count == 1 { "" } else { "s" })
}

fn totals(text: &mut String, explanation: &Explanation, width: usize) {
    let vcpus = explanation.count(Role::Vcpu);
    let iothreads = explanation.count(Role::Iothread);
    let threads = explanation.lasting();
    let fds = explanation.fds();
    let memory = format_size(explanation.memory);
    let cpus = explanation.host_cpus;
    text.push('\n');
    let one = format!(
        "{}: {threads} threads (heddle, main, {}, {}), {fds} fds, {memory} of memory, on {cpus} host CPUs",
        explanation.name,
        plural(iothreads as u64, "iothread"),
        plural(vcpus as u64, "vCPU"),
    );
    wrap(text, &one, "", "    ", width);
    if explanation.vms > 1 {
        let vms = explanation.vms as usize;
        let memory = match explanation.memory.checked_mul(u64::from(explanation.vms)) {
            Some(memory) => format_size(memory),
            None => "more than 16 EiB".to_owned(),
        };
        let all = format!(
            "{vms} such machines: {} threads ({} vCPUs), {} fds, {memory} of memory, on {cpus} host CPUs",
            threads * vms,
            vcpus * vms,
            fds * vms as u64
        );
        wrap(text, &all, "", "    ", width);
    }
}

/// The cells in their columns; those that are too long break at commas and go on below.
fn line(text: &mut String, cells: &[String; 5], widths: &[usize; 5]) {
    let columns: Vec<Vec<String>> =
        cells.iter().zip(widths).map(|(cell, width)| pieces(cell, *width)).collect();
    for part in 0..columns.iter().map(Vec::len).max().unwrap_or(0) {
        let mut line = String::new();
        for (column, width) in columns.iter().zip(widths) {
            line += &format!("{:<width$}  ", column.get(part).map_or("", String::as_str));
        }
        *text += line.trim_end();
        text.push('\n');
    }
}

/// `cell` in pieces that fit `width`, broken after commas where there are any.
fn pieces(cell: &str, width: usize) -> Vec<String> {
    let mut pieces = vec![String::new()];
    for word in cell.split_inclusive(',') {
        let last = pieces.len() - 1;
        if !pieces[last].is_empty() && pieces[last].chars().count() + word.chars().count() > width {
            pieces.push(word.trim_start().to_owned());
        } else {
            pieces[last].push_str(word);
        }
    }
    pieces
}

/// Appends `words`, the first line after `first`, the others after `rest`.
fn wrap(text: &mut String, words: &str, first: &str, rest: &str, width: usize) {
    let mut line = first.to_owned();
    let mut empty = true;
    // Long lists have commas, but no spaces, to break at.
    let words = words.split(' ').flat_map(|word| {
        let parts =
            if word.len() > width / 2 { pieces(word, width / 2) } else { vec![word.to_owned()] };
        let count = parts.len();
        parts.into_iter().enumerate().map(move |(at, part)| (part, at > 0 && count > 1))
    });
    for (word, glued) in words {
        let space = if empty || glued { "" } else { " " };
        if !empty && line.chars().count() + space.len() + word.chars().count() > width {
            *text += line.trim_end();
            text.push('\n');
            line = format!("{rest}{word}");
        } else {
            line += space;
            line += &word;
        }
        empty = false;
    }
    *text += line.trim_end();
    text.push('\n');
}
