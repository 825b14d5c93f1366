//! How many vCPUs KVM on this host takes, and which APIC ids they may have.

use config::plan::Plan;
use config::{Problem, Severity};
use kvm_ioctls::Kvm;

use crate::cpuid::Topology;
use crate::host_error::HostError;
use crate::kvm;

/// Refuses vCPUs that this KVM cannot have.
pub fn check(kvm: &Kvm, apic_ids: &[u32]) -> Result<(), HostError> {
    fit(apic_ids, kvm.get_max_vcpus(), kvm.get_max_vcpu_id())
}

/// What this host's KVM has against `plan`, for `heddle check --host`. Says nothing of a KVM that
/// cannot be opened: the check of /dev/kvm itself has that.
pub fn problem(plan: &Plan) -> Option<Problem> {
    let kvm = kvm::open().ok()?;
    let message = check(&kvm, &Topology::of(plan).apic_ids(plan.vcpus.len())).err()?.to_string();
    Some(Problem { code: "H06", severity: Severity::Error, message, hint: None })
}

/// `most`: KVM_CAP_MAX_VCPUS; `ids`: KVM_CAP_MAX_VCPU_ID, which all APIC ids must be below.
fn fit(apic_ids: &[u32], most: usize, ids: usize) -> Result<(), HostError> {
    let count = apic_ids.len();
    if count > most {
        let why = format!("{count} vCPUs, and KVM on this host takes {most} at most");
        return Err(HostError::new("machine.cpus", why));
    }
    match apic_ids.iter().max() {
        Some(&highest) if highest as usize >= ids => {
            let why = format!(
                "it spreads the {count} vCPUs over APIC ids up to {highest}, and KVM on this host \
                 takes ids below {ids}: make dies, cores and threads powers of two"
            );
            Err(HostError::new("machine.cpus.topology", why))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn why(apic_ids: &[u32], most: usize, ids: usize) -> String {
        fit(apic_ids, most, ids).unwrap_err().to_string()
    }

    #[test]
    fn what_kvm_does_not_take_is_refused_by_the_key_that_asks_for_it() {
        let ids = [0, 1, 2, 4, 5, 6];
        fit(&ids, 6, 7).unwrap();
        assert!(why(&ids, 5, 7).starts_with("machine.cpus: 6 vCPUs, and KVM"));
        let why = why(&ids, 6, 6);
        assert!(why.starts_with("machine.cpus.topology: ") && why.contains("ids up to 6,"));
    }
}
