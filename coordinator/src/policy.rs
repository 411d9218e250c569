//! Policies: from an application to groups of VMs and the order they move in.
//!
//! This is the scheduler's place. Today's three policies need no prediction; one that groups and
//! orders by cost (COMMA's two stages, LLL, OBA) produces the same [`Plan`].

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

/// The plan of a policy.
#[must_use]
pub fn plan(app: &Application, policy: Policy) -> Plan {
    let each_alone = || app.vm_ids().map(|vm| vec![vm]).collect();
    match policy {
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
    }
}
