//! What the guest is told about its CPUs (Intel SDM vol. 2, CPUID; AMD APM vol. 3, appendix E).

use config::plan::{self, Plan};
use kvm_bindings::{CpuId, kvm_cpuid_entry2};

/// Counts per level; their product is the number of vCPUs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Topology {
    /// Dies in a socket.
    pub dies: u32,
    /// Cores in a die.
    pub cores: u32,
    /// Threads in a core.
    pub threads: u32,
}

impl Topology {
    /// What the guest is told about its CPUs.
    pub fn of(plan: &Plan) -> Self {
        let plan::Topology { dies, cores, threads, .. } = plan.machine.topology;
        Self { dies, cores, threads }
    }
}

/// Bits an id of `count` siblings takes.
fn bits(count: u32) -> u32 {
    count.next_power_of_two().trailing_zeros()
}

impl Topology {
    fn thread_bits(self) -> u32 {
        bits(self.threads)
    }

    fn core_bits(self) -> u32 {
        self.thread_bits() + bits(self.cores)
    }

    /// Bits of an APIC id below the socket.
    fn socket_bits(self) -> u32 {
        self.core_bits() + bits(self.dies)
    }

    /// The APIC id of a vCPU: each level has whole bits, so ids may have gaps.
    pub fn apic_id(self, vcpu: u32) -> u32 {
        let (thread, rest) = (vcpu % self.threads, vcpu / self.threads);
        let (core, rest) = (rest % self.cores, rest / self.cores);
        let (die, socket) = (rest % self.dies, rest / self.dies);
        thread | core << self.thread_bits() | die << self.core_bits() | socket << self.socket_bits()
    }

    /// The APIC ids of this many vCPUs, ascending.
    pub fn apic_ids(self, vcpus: usize) -> Vec<u32> {
        (0..vcpus as u32).map(|vcpu| self.apic_id(vcpu)).collect()
    }

    fn per_die(self) -> u32 {
        self.cores * self.threads
    }

    fn per_socket(self) -> u32 {
        self.dies * self.per_die()
    }
}

/// Adapts what KVM supports to one vCPU.
pub fn for_vcpu(supported: &CpuId, topology: Topology, apic_id: u32) -> CpuId {
    let mut entries: Vec<kvm_cpuid_entry2> = supported.as_slice().to_vec();
    // The topology leaves are written anew: their subleaves depend on the levels there are.
    entries.retain(|entry| !matches!(entry.function, 0xb | 0x1f | 0x8000_0026));
    for entry in &mut entries {
        adapt(entry, topology, apic_id);
    }
    let top = entries.iter().find(|entry| entry.function == 0).map_or(0, |entry| entry.eax);
    if top >= 0xb {
        entries.extend(extended_topology(0xb, topology, apic_id));
    }
    if top >= 0x1f && topology.dies > 1 {
        entries.extend(extended_topology(0x1f, topology, apic_id));
    }
    CpuId::from_entries(&entries).expect("no more entries than KVM_MAX_CPUID_ENTRIES")
}

fn adapt(entry: &mut kvm_cpuid_entry2, topology: Topology, apic_id: u32) {
    const HTT: u32 = 1 << 28;
    const X2APIC: u32 = 1 << 21;
    const TSC_DEADLINE: u32 = 1 << 24;
    const HYPERVISOR: u32 = 1 << 31;
    const KVM_FEATURE_MSI_EXT_DEST_ID: u32 = 1 << 15;
    match entry.function {
        1 => {
            let logical = topology.per_socket().min(255);
            entry.ebx = entry.ebx & 0xff00 | logical << 16 | (apic_id & 0xff) << 24;
            entry.ecx |= X2APIC | TSC_DEADLINE | HYPERVISOR;
            if topology.per_socket() > 1 { entry.edx |= HTT } else { entry.edx &= !HTT }
        }
        // Cache topology: who shares L1/L2 (a core) and L3 (a die), and cores in a socket.
        4 | 0x8000_001d if entry.eax & 0x1f != 0 => {
            let sharing = match entry.eax >> 5 & 7 {
                1 | 2 => topology.thread_bits(),
                _ => topology.core_bits(),
            };
            entry.eax = entry.eax & 0x3fff | ((1 << sharing) - 1) << 14;
            if entry.function == 4 {
                let cores = 1u32 << (topology.socket_bits() - topology.thread_bits());
                entry.eax |= (cores - 1).min(63) << 26;
            }
        }
        // The hypervisor's leaf: see `irq` for what it promises.
        0x4000_0001 => entry.eax |= KVM_FEATURE_MSI_EXT_DEST_ID,
        0x8000_0008 => {
            let threads = (topology.per_socket() - 1).min(255);
            entry.ecx = threads | topology.socket_bits().min(15) << 12;
        }
        0x8000_001e => {
            entry.eax = apic_id;
            let core = apic_id >> topology.thread_bits() & 0xff;
            entry.ebx = core | (topology.threads - 1) << 8;
            entry.ecx = apic_id >> topology.core_bits() & 0xff;
        }
        _ => {}
    }
}

/// Leaf 0xb or 0x1f: one subleaf per level, then an empty one.
fn extended_topology(leaf: u32, topology: Topology, apic_id: u32) -> Vec<kvm_cpuid_entry2> {
    const SMT: u32 = 1;
    const CORE: u32 = 2;
    const DIE: u32 = 5;
    let socket = topology.socket_bits();
    let mut levels = vec![(SMT, topology.thread_bits(), topology.threads)];
    if leaf == 0x1f {
        levels.push((CORE, topology.core_bits(), topology.per_die()));
        levels.push((DIE, socket, topology.per_socket()));
    } else {
        levels.push((CORE, socket, topology.per_socket()));
    }
    levels.push((0, 0, 0));
    let entry = |(index, (kind, shift, count)): (usize, (u32, u32, u32))| kvm_cpuid_entry2 {
        function: leaf,
        index: index as u32,
        flags: kvm_bindings::KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
        eax: shift,
        ebx: count,
        ecx: index as u32 | kind << 8,
        edx: apic_id,
        ..kvm_cpuid_entry2::default()
    };
    levels.into_iter().enumerate().map(entry).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn apic_ids_count_up_when_every_level_is_a_power_of_two() {
        let topology = Topology { dies: 2, cores: 4, threads: 2 };
        let ids: Vec<u32> = (0..32).map(|vcpu| topology.apic_id(vcpu)).collect();
        assert_eq!(ids, (0..32).collect::<Vec<_>>());
    }

    #[test]
    fn apic_ids_leave_gaps_so_that_each_level_has_whole_bits() {
        let topology = Topology { dies: 1, cores: 3, threads: 2 };
        let ids: Vec<u32> = (0..8).map(|vcpu| topology.apic_id(vcpu)).collect();
        assert_eq!(ids, [0, 1, 2, 3, 4, 5, 8, 9]);
    }

    #[test]
    fn the_hypervisor_offers_extended_destinations_beside_what_it_has() {
        let leaf = |function| kvm_cpuid_entry2 { function, eax: 1, ..kvm_cpuid_entry2::default() };
        let supported = CpuId::from_entries(&[leaf(0x4000_0000), leaf(0x4000_0001)]).unwrap();
        let told = for_vcpu(&supported, Topology { dies: 1, cores: 1, threads: 1 }, 0);
        let eax: Vec<_> = told.as_slice().iter().map(|entry| entry.eax).collect();
        assert_eq!(eax, [1, 1 | 1 << 15]);
    }

    #[test]
    fn leaf_b_tells_the_levels_and_the_id() {
        let topology = Topology { dies: 1, cores: 4, threads: 2 };
        let leaves = extended_topology(0xb, topology, 5);
        let told: Vec<_> = leaves.iter().map(|leaf| (leaf.eax, leaf.ebx, leaf.ecx)).collect();
        assert_eq!(told, [(1, 2, 0x100), (3, 8, 0x201), (0, 0, 2)]);
        assert!(leaves.iter().all(|leaf| leaf.edx == 5));
    }
}
