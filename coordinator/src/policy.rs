//! Policies: from an application to groups of VMs and the order they move in.
//!
//! These need no prediction. Policies that do (LLL, OBA, COMMA's groups) are planned by
//! [`scheduler::plan`](crate::scheduler::plan), and not yet carried out.

use crate::application::{Application, Policy, VmId};

/// Which VMs switch over together, and when each group starts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// The groups. Every VM of the application is in exactly one.
    pub groups: Vec<Vec<VmId>>,
    /// Whether groups follow each other.
    pub concurrency: Concurrency,
    /// Whether VMs are held until their group is released; without it each switches over as soon
    /// as it converges.
    pub hold: bool,
}

/// How the groups of a plan relate in time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Concurrency {
    /// A group starts when the one before it has been committed.
    OneAfterAnother,
    /// All groups start at once and share the bandwidth.
    AllAtOnce,
}

/// Why a policy cannot be carried out.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CannotRun {
    /// It is only planned so far.
    #[error(
        "policy {policy} can be planned (muster plan), but not yet carried out; use sequential, \
         parallel or muster"
    )]
    Policy {
        /// The policy.
        policy: Policy,
    },
    /// Replica groups are only planned so far.
    #[error(
        "replica-groups can be planned (muster plan), but not yet carried out; leave it out of the \
         file"
    )]
    ReplicaGroups,
}

/// The plan of a policy.
///
/// # Errors
/// The policy, or what the file asks for, can only be planned.
pub fn plan(app: &Application, policy: Policy) -> Result<Plan, CannotRun> {
    if app.replica_groups {
        return Err(CannotRun::ReplicaGroups);
    }
    let each_alone = || app.vm_ids().map(|vm| vec![vm]).collect();
    let plan = match policy {
        Policy::Sequential => Plan {
            groups: each_alone(),
            concurrency: Concurrency::OneAfterAnother,
            hold: false,
        },
        Policy::Parallel => Plan {
            groups: each_alone(),
            concurrency: Concurrency::AllAtOnce,
            hold: false,
        },
        Policy::Muster => Plan {
            groups: vec![app.vm_ids().collect()],
            concurrency: Concurrency::OneAfterAnother,
            hold: true,
        },
        Policy::Lll | Policy::Vmbuddies | Policy::Comma => {
            return Err(CannotRun::Policy { policy });
        }
    };
    Ok(plan)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn what_cannot_be_carried_out_is_refused() {
        let text = include_str!("../../examples/shop.toml");
        let mut app = Application::parse(text, Path::new("shop.toml")).expect("good");
        for policy in Policy::ALL {
            let runs = plan(&app, policy).is_ok();
            assert_eq!(runs, Policy::RUNNABLE.contains(&policy), "{policy}");
        }
        app.replica_groups = true;
        assert_eq!(plan(&app, Policy::Muster), Err(CannotRun::ReplicaGroups));
    }
}
