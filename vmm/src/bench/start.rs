//! `heddle bench start`: start-up time and private memory.

use std::ffi::OsStr;
use std::io::Write;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use serde_json::{Value, json};

/// Starts a one-vCPU machine again and again, each time in a process of its own.
pub(super) fn start(runs: u32, as_json: bool) -> Result<(), String> {
    let machine = "[machine]\nmemory = \"256M\"\ncpus = 1\n[disk.scratch]\nsize = \"8M\"\n";
    let file = MachineFile::write(machine)?;
    let heddle = std::env::current_exe().map_err(|error| error.to_string())?;
    let mut results: Vec<Value> = Vec::new();
    for nth in 0..runs.max(1) {
        let output = Command::new(&heddle)
            .args([OsStr::new("run"), file.0.as_os_str(), OsStr::new("--json")])
            .stdin(Stdio::null())
            .stderr(Stdio::null())
            .output()
            .map_err(|error| error.to_string())?;
        let report: Value = serde_json::from_slice(&output.stdout)
            .map_err(|error| format!("run {nth} ended with {}: {error}", output.status))?;
        if report["exit"] != 0 {
            return Err(format!("run {nth}: {}", report["message"]));
        }
        results.push(report["timing"].clone());
    }
    let column = |name: &str| {
        let mut values: Vec<f64> =
            results.iter().filter_map(|timing| timing[name].as_f64()).collect();
        values.sort_by(f64::total_cmp);
        [values[0], values[values.len() / 2], values[values.len() - 1]]
    };
    let (time, memory) = (column("total-ms"), column("private-kib"));
    if as_json {
        let named =
            |[min, median, max]: [f64; 3]| json!({ "min": min, "median": median, "max": max });
        let effective = Value::String(machine.to_owned());
        let result = json!({ "runs": runs, "machine": effective,
            "start-ms": named(time), "private-kib": named(memory) });
        super::print_json(&result);
    } else {
        println!("{} starts of a one-vCPU machine, heddle's own part", results.len());
        println!("{:<18} {:>10} {:>10} {:>10}", "", "min", "median", "max");
        println!(
            "{:<18} {:>7.2} ms {:>7.2} ms {:>7.2} ms",
            "to the first KVM_RUN", time[0], time[1], time[2]
        );
        println!(
            "{:<18} {:>6} KiB {:>6} KiB {:>6} KiB",
            "private memory", memory[0], memory[1], memory[2]
        );
    }
    Ok(())
}

/// A machine file that is gone when this is dropped.
struct MachineFile(PathBuf);

impl MachineFile {
    fn write(text: &str) -> Result<Self, String> {
        let name = format!("heddle-bench-{}.toml", std::process::id());
        let file = Self(std::env::temp_dir().join(name));
        let mut options = std::fs::File::options();
        let opened = options.write(true).create_new(true).open(&file.0);
        let written = opened.and_then(|mut file| file.write_all(text.as_bytes()));
        written.map_err(|error| format!("{}: {error}", file.0.display()))?;
        Ok(file)
    }
}

impl Drop for MachineFile {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}
