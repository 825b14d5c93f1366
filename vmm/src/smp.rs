//! All vCPUs of a machine: made in parallel, let go and stopped together.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering::*;
use std::sync::mpsc::{Sender, channel};
use std::time::{Duration, Instant};

use config::plan::Plan;
use iothread::ThreadSpec;
use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};

use crate::boot;
use crate::cpuid::{self, Topology};
use crate::host_error::HostError;
use crate::machine::ThreadInfo;
use crate::resources::{Fallback, cpu_ids, join, refusals, sched, worker_cpus};
use crate::vcpu::{self, Vcpu};

/// The first APIC id that xAPIC mode cannot have: there, 255 is all CPUs.
const FIRST_WIDE_ID: u32 = 255;

/// How long a vCPU may take to leave the guest and end.
const STOP_LIMIT: Duration = Duration::from_secs(5);

/// The vCPUs and their threads. Nothing of the guest runs before [`Smp::start`].
#[derive(Debug)]
pub struct Smp {
    vcpus: Vec<Vcpu>,
    /// Dropped to let each vCPU run.
    start: Vec<Sender<()>>,
    shared: Arc<vcpu::Shared>,
}

/// What a vCPU is made of.
struct Maker<'a> {
    vm: &'a Arc<VmFd>,
    plan: &'a Plan,
    apic_ids: &'a [u32],
    supported: Arc<CpuId>,
    shared: &'a Arc<vcpu::Shared>,
}

impl Maker<'_> {
    /// Starts the thread of vCPU `nth`, which makes the vCPU and waits for `start`. The first one
    /// begins at `entry`.
    fn start(
        &self,
        nth: usize,
        entry: Option<boot::Entry>,
    ) -> (Sender<()>, io::Result<vcpu::Starting>) {
        let (vcpu, apic_id) = (&self.plan.vcpus[nth], self.apic_ids[nth]);
        let (start, wait) = channel();
        let cpus = vcpu.cpus.as_ref().map(cpu_ids);
        let (sched, runaway) = sched(vcpu.sched);
        let spec = ThreadSpec { cpus, sched, runaway, ..ThreadSpec::new(format!("vcpu{nth}")) };
        let (vm, supported) = (Arc::clone(self.vm), Arc::clone(&self.supported));
        let topology = Topology::of(self.plan);
        let wide_ids = self.apic_ids.last() >= Some(&FIRST_WIDE_ID);
        let elsewhere = vcpu.cpus.is_some().then(|| worker_cpus(None, &self.plan.vcpus));
        let make = move || {
            let mut fd = vm.create_vcpu(apic_id.into()).map_err(ioctl("KVM_CREATE_VCPU"))?;
            let cpuid = cpuid::for_vcpu(&supported, topology, apic_id);
            fd.set_cpuid2(&cpuid).map_err(ioctl("KVM_SET_CPUID2"))?;
            if wide_ids {
                enter_x2apic_mode(&fd)?;
            }
            if let Some(entry) = entry {
                entry.enter(&fd).map_err(ioctl("KVM_SET_SREGS"))?;
                elsewhere.iter().for_each(|cpus| vcpu::make_threads_of_kvm(&mut fd, cpus));
            }
            Ok(fd)
        };
        let started = Vcpu::start(spec, make, Arc::clone(self.shared), wait).map_err(|error| {
            let limits = "see ulimit -u, and pids.max of its cgroup";
            io::Error::other(format!("its thread cannot be started: {error}; {limits}"))
        });
        (start, started)
    }
}

impl Smp {
    /// Makes the vCPUs of the plan, each on its own thread; the first one begins at `entry`.
    pub fn spawn(
        kvm: &Kvm,
        vm: &Arc<VmFd>,
        plan: &Plan,
        apic_ids: &[u32],
        entry: boot::Entry,
        shared: Arc<vcpu::Shared>,
    ) -> Result<Self, HostError> {
        vcpu::install_kick().map_err(|error| HostError::new("signal handler", error))?;
        let supported = kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(|error| HostError::new("KVM: KVM_GET_SUPPORTED_CPUID", error))?;
        let maker = Maker { vm, plan, apic_ids, supported: Arc::new(supported), shared: &shared };
        // Until a CPU is in x2APIC mode, KVM knows it by the low 8 bits of its id, and of several
        // with the same bits by the first that was made: those with small ids are made first.
        let small = apic_ids.partition_point(|&id| id <= 0xff);
        let (mut entry, mut start, mut made) = (Some(entry), Vec::new(), Vec::new());
        for batch in [0..small, small..apic_ids.len()] {
            let (starts, starting): (Vec<_>, Vec<_>) =
                batch.map(|nth| maker.start(nth, entry.take())).unzip();
            start.extend(starts);
            made.extend(starting.into_iter().map(|it| it.and_then(vcpu::Starting::wait)));
        }
        let mut vcpus = Vec::new();
        let mut failed = None;
        for (nth, made) in made.into_iter().enumerate() {
            match made {
                Ok(vcpu) => vcpus.push(vcpu),
                Err(error) => failed = failed.or(Some(HostError::new(format!("vcpu{nth}"), error))),
            }
        }
        let smp = Self { vcpus, start, shared };
        match failed {
            None => Ok(smp),
            // What starts now must not run.
            Some(error) => {
                let _ = smp.stop();
                Err(error)
            }
        }
    }

    /// Wishes that this host did not grant.
    pub fn fallbacks(&self) -> impl Iterator<Item = Fallback> {
        self.vcpus.iter().flat_map(|vcpu| refusals(&vcpu.thread.granted.name, &vcpu.thread.granted))
    }

    /// Lets the guest run.
    pub fn start(&mut self) {
        self.start.clear();
    }

    /// The threads.
    pub fn threads(&self) -> impl Iterator<Item = ThreadInfo> {
        self.vcpus.iter().map(|vcpu| ThreadInfo {
            granted: vcpu.thread.granted.clone(),
            counters: Arc::clone(&vcpu.counters),
        })
    }

    /// Makes all vCPUs leave the guest, and waits for their threads. The error names one that does
    /// not: then all they use is still in use, and is left behind.
    pub fn stop(self) -> Result<(), String> {
        let Self { vcpus, start, shared } = self;
        shared.stop.store(true, Release);
        drop(start);
        vcpus.iter().for_each(Vcpu::kick);
        let deadline = Instant::now() + STOP_LIMIT;
        for vcpu in vcpus {
            if !vcpu.ends_by(deadline) {
                let name = &vcpu.thread.granted.name;
                return Err(format!("thread {name} is still serving an exit after {STOP_LIMIT:?}"));
            }
            join(vcpu.thread)?;
        }
        Ok(())
    }
}

/// Firmware does this if there are ids that xAPIC mode cannot have, and Linux ignores CPUs with such
/// ids if it did not (Intel SDM vol. 3, 11.12.5).
fn enter_x2apic_mode(vcpu: &VcpuFd) -> io::Result<()> {
    const EXTD: u64 = 1 << 10;
    let mut sregs = vcpu.get_sregs().map_err(ioctl("KVM_GET_SREGS"))?;
    sregs.apic_base |= EXTD;
    vcpu.set_sregs(&sregs).map_err(ioctl("KVM_SET_SREGS"))
}

/// Says which request to KVM failed.
fn ioctl(what: &'static str) -> impl Fn(kvm_ioctls::Error) -> io::Error {
    move |error| io::Error::other(format!("{what}: {error}"))
}
