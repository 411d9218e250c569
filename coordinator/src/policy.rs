//! Policies: from an application to groups of VMs, the order they move in, and how the VMs of a
//! group share the bandwidth.
//!
//! `muster` and `comma` ask the scheduler ([`scheduler::plan`](crate::scheduler::plan)) where the file
//! says enough of the VMs; else all are one group, and what they do is measured while they move.

use crate::application::{Application, Policy, VmId};
use crate::scheduler::allot::Scheme;
use crate::scheduler::order::Search;
use crate::scheduler::plan::{self as planner, Inputs, Stage};

/// Which VMs switch over together, and when each group starts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// The groups. Every VM of the application is in exactly one.
    pub groups: Vec<PlannedGroup>,
    /// Whether groups follow each other.
    pub concurrency: Concurrency,
    /// Whether VMs are held until their group is released; without it each switches over as soon
    /// as it converges.
    pub hold: bool,
    /// Whether held VMs whose pre-copy is in vain rest while others copy. Those of the papers' policies go
    /// on sending what they dirty (VMbuddies 3.2).
    pub rests: bool,
    /// Whether groups that have not started may be made anew in the move, from what was measured: those
    /// of `muster`, where the scheduler made them.
    pub may_change: bool,
    /// What a person should know of how it was made.
    pub notes: Vec<String>,
}

/// A group of a plan.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PlannedGroup {
    /// Its VMs.
    pub vms: Vec<VmId>,
    /// How they share the bandwidth.
    pub scheme: Scheme,
}

/// How the groups of a plan relate in time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Concurrency {
    /// A group starts when the one before it has been committed.
    OneAfterAnother,
    /// All groups start at once and share the bandwidth.
    AllAtOnce,
    /// COMMA's two stages: all groups start at once, and everything is copied once; then they take
    /// turns, in their order, with what was dirtied meanwhile.
    TwoStages,
}

/// Why a policy cannot be carried out.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CannotRun {
    /// Replica groups belong to the groups that the scheduler makes.
    #[error(
        "replica-groups goes with policy muster or comma, not with {policy}; leave it out of the \
         file, or set policy = \"muster\""
    )]
    ReplicaGroups {
        /// The policy.
        policy: Policy,
    },
    /// Replica groups are asked for, and no groups can be made.
    #[error("replica-groups: {reason}")]
    NoReplicaGroups {
        /// Why there are none.
        reason: String,
    },
}

/// Whether a policy can be carried out, without making its plan.
///
/// # Errors
/// What the file asks for does not go with the policy.
pub fn can_run(app: &Application, policy: Policy) -> Result<(), CannotRun> {
    if app.replica_groups && !matches!(policy, Policy::Muster | Policy::Comma) {
        return Err(CannotRun::ReplicaGroups { policy });
    }
    Ok(())
}

/// The plan of a policy.
///
/// # Errors
/// As for [`can_run`]; or replica groups are asked for and there are none.
pub fn plan(app: &Application, policy: Policy) -> Result<Plan, CannotRun> {
    can_run(app, policy)?;
    let plan = match policy {
        Policy::Sequential => each_alone(app, Concurrency::OneAfterAnother),
        Policy::Parallel => each_alone(app, Concurrency::AllAtOnce),
        Policy::Lll => {
            let mut plan = one_group(app, Scheme::InTurn);
            let unknown = app.vms.iter().filter(|vm| {
                let known = &vm.profile;
                known.dirty_rate.is_none() && known.max_dirty_rate.is_none()
            });
            let names: Vec<&str> = unknown.map(|vm| vm.name.as_str()).collect();
            if !names.is_empty() {
                plan.notes.push(format!(
                    "lll: the dirty rate of {} is not known beforehand: it counts as 0 in the order; \
                     give `dirty-rate`",
                    names.join(", ")
                ));
            }
            plan
        }
        Policy::Vmbuddies => one_group(app, Scheme::Together),
        Policy::Comma => Plan {
            concurrency: Concurrency::TwoStages,
            ..by_scheduler(app, policy, Scheme::Delayed)?
        },
        Policy::Muster => {
            let plan = by_scheduler(app, policy, Scheme::Together)?;
            // While disks are copied, memory only gets dirty again.
            let concurrency = match app.has_disks() {
                true => Concurrency::TwoStages,
                false => plan.concurrency,
            };
            Plan {
                concurrency,
                rests: true,
                ..plan
            }
        }
    };
    Ok(plan)
}

fn each_alone(app: &Application, concurrency: Concurrency) -> Plan {
    let alone = |vm| PlannedGroup {
        vms: vec![vm],
        scheme: Scheme::Together,
    };
    Plan {
        groups: app.vm_ids().map(alone).collect(),
        concurrency,
        hold: app.ends_by_rule || app.has_disks(),
        rests: true,
        may_change: false,
        notes: Vec::new(),
    }
}

fn one_group(app: &Application, scheme: Scheme) -> Plan {
    Plan {
        groups: vec![PlannedGroup {
            vms: app.vm_ids().collect(),
            scheme,
        }],
        concurrency: Concurrency::OneAfterAnother,
        hold: true,
        rests: false,
        may_change: false,
        notes: Vec::new(),
    }
}

/// What the scheduler makes of what the file says; one group with this scheme where that is not
/// enough.
fn by_scheduler(app: &Application, policy: Policy, scheme: Scheme) -> Result<Plan, CannotRun> {
    let together = || one_group(app, scheme);
    let outline = app.outline();
    let known = |reason: &dyn ToString| {
        if app.replica_groups {
            let reason = reason.to_string();
            return Err(CannotRun::NoReplicaGroups { reason });
        }
        Ok(together())
    };
    let inputs = match Inputs::new(&outline, Stage::Whole) {
        Ok(inputs) => inputs,
        Err(missing) => return known(&missing),
    };
    let found = match planner::plan(&inputs, policy, Search::Auto) {
        Ok(found) => found,
        Err(error) => return known(&error),
    };
    if !found.converges {
        let reason = found.reason.unwrap_or_default();
        let mut plan = known(&reason)?;
        plan.notes.push(format!(
            "as the file describes the VMs, {reason}; all move as one group, and \
             on-non-convergence decides"
        ));
        plan.notes.extend(found.notes);
        return Ok(plan);
    }
    let mut plan = together();
    let id = |name: &String| app.vm_ids().find(|&id| app.vm(id).name == *name);
    plan.groups = found
        .groups
        .iter()
        .map(|group| PlannedGroup {
            vms: group.vms.iter().filter_map(id).collect(),
            scheme: group.scheme,
        })
        .collect();
    plan.notes = found.notes;
    // Which groups hold a VM of every tier depends on all of them.
    plan.may_change = policy == Policy::Muster && !app.replica_groups;
    Ok(plan)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use sidecar::protocol::types::{Chain, CopyMode};

    use super::*;

    const APP: &str = r#"
        version = 1
        [application]
        name = "shop"
        bandwidth = "32MB/s"
        [[host]]
        name = "a"
        control = "unix:/a"
        [[host]]
        name = "b"
        control = "unix:/b"
    "#;

    /// `vms`: name, tier, dirty rate and highest dirty rate in MB/s, or nothing.
    fn app(policy: &str, vms: &[(&str, Option<(u32, u32)>)]) -> Application {
        let mut text = APP.replace("name = \"shop\"", &format!("name = \"shop\"\n{policy}"));
        for (index, (name, rates)) in vms.iter().enumerate() {
            text += &format!(
                "[[vm]]\nname = \"{name}\"\ntier = \"{}\"\nfrom = \"a\"\nto = \"b\"\n\
                 uuid = \"6f1c1c1e-8a52-4b6e-9a4e-3f0b3a6c1d{index:02}\"\n",
                name.trim_end_matches(char::is_numeric)
            );
            if let Some((mean, most)) = rates {
                text += &format!(
                    "memory = \"1GB\"\ndirty-rate = \"{mean}MB/s\"\n\
                     max-dirty-rate = \"{most}MB/s\"\n"
                );
            }
        }
        Application::parse(&text, Path::new("shop.toml")).expect("good")
    }

    fn sizes(plan: &Plan) -> Vec<usize> {
        plan.groups.iter().map(|group| group.vms.len()).collect()
    }

    #[test]
    fn what_cannot_be_carried_out_is_refused() {
        let mut app = app("", &[("web", None), ("db", None)]);
        for policy in Policy::ALL {
            assert!(plan(&app, policy).is_ok(), "{policy}");
        }
        app.replica_groups = true;
        assert!(matches!(
            plan(&app, Policy::Lll),
            Err(CannotRun::ReplicaGroups { .. })
        ));
        let error = plan(&app, Policy::Muster).expect_err("nothing is known of the VMs");
        assert!(error.to_string().contains("dirty-rate"), "{error}");
    }

    #[test]
    fn muster_makes_groups_where_the_file_says_enough() {
        let unknown = app("", &[("web", None), ("db", Some((1, 2)))]);
        let found = plan(&unknown, Policy::Muster).expect("a plan");
        assert_eq!(sizes(&found), [2]);
        assert_eq!(found.groups[0].scheme, Scheme::Together);

        let light = app("", &[("web", Some((1, 2))), ("db", Some((7, 15)))]);
        let found = plan(&light, Policy::Muster).expect("a plan");
        assert_eq!(sizes(&found), [2]);
        assert!(found.hold && found.rests);

        // Two of these do not fit 32 MB/s together.
        let heavy = app("", &[("db1", Some((20, 22))), ("db2", Some((20, 22)))]);
        let found = plan(&heavy, Policy::Muster).expect("a plan");
        assert_eq!(sizes(&found), [1, 1]);
        assert_eq!(found.concurrency, Concurrency::OneAfterAnother);
    }

    #[test]
    fn comma_makes_valid_groups_and_moves_them_in_two_stages() {
        let heavy = app("", &[("db1", Some((20, 22))), ("db2", Some((20, 22)))]);
        let found = plan(&heavy, Policy::Comma).expect("a plan");
        assert_eq!(sizes(&found), [1, 1]);
        let unknown = app("", &[("web", None), ("db", None)]);
        let whole = plan(&unknown, Policy::Comma).expect("a plan");
        assert_eq!(sizes(&whole), [2]);
        for plan in [found, whole] {
            assert_eq!(plan.concurrency, Concurrency::TwoStages);
            assert!(
                plan.groups
                    .iter()
                    .all(|group| group.scheme == Scheme::Delayed)
            );
            assert!(plan.hold);
        }
    }

    #[test]
    fn a_vm_that_does_not_fit_alone_is_said_and_left_to_the_move() {
        let hot = app("", &[("web", Some((1, 2))), ("db", Some((50, 60)))]);
        let found = plan(&hot, Policy::Muster).expect("a plan");
        assert_eq!(sizes(&found), [2]);
        assert!(found.notes[0].contains("db"), "{:?}", found.notes);
    }

    #[test]
    fn local_disks_are_copied_in_a_stage_of_their_own() {
        let mut app = app("", &[("web", None), ("db", None)]);
        app.vms[0].disks = vec![crate::application::Disk {
            node: "disk0".into(),
            copy_mode: CopyMode::Background,
            chain: Chain::Flatten,
        }];
        let found = plan(&app, Policy::Muster).expect("a plan");
        assert_eq!(found.concurrency, Concurrency::TwoStages);
        for policy in Policy::ALL {
            assert!(plan(&app, policy).expect("a plan").hold, "{policy}");
        }
        let alone = plan(&app, Policy::Parallel).expect("a plan");
        assert_eq!(sizes(&alone), [1, 1]);
    }

    #[test]
    fn lll_says_whose_rate_it_does_not_know() {
        let app = app("", &[("web", None), ("db", Some((1, 2)))]);
        let found = plan(&app, Policy::Lll).expect("a plan");
        assert_eq!(found.groups[0].scheme, Scheme::InTurn);
        assert!(!found.rests, "as published");
        assert!(found.notes[0].contains("web"), "{:?}", found.notes);
        assert!(!found.notes[0].contains("db"), "{:?}", found.notes);
    }
}
