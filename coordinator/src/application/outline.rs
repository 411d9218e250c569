//! What a planner needs of an application: everything but where its sidecars are.

use std::path::Path;
use std::time::Duration;

use rate_limiter::BytesPerSecond;
use sidecar::protocol::command::Termination;

use crate::capacity::Allowance;

use super::{
    Application, ApplicationError, HostId, Link, Policy, Traffic, VmProfile, load, parse, read,
};

/// An application as a planner sees it. Hosts, UUIDs and the ends of a VM's way may be left out.
#[derive(Debug, Clone, PartialEq)]
pub struct Outline {
    /// Its name.
    pub name: String,
    /// How its VMs are moved.
    pub policy: Policy,
    /// Rate that the migration may use in all, and what is kept for the application.
    pub allowance: Allowance,
    /// A group is released when what remains crosses in so much time.
    pub max_downtime: Duration,
    /// How long a group may take until it is released.
    pub deadline: Option<Duration>,
    /// How much vCPUs may be slowed at most, in percent, where that is allowed.
    pub throttle: Option<u8>,
    /// When pre-copy ends for a VM.
    pub termination: Termination,
    /// Whether every tier is to be on both sites while the application is split.
    pub replica_groups: bool,
    /// The hosts, where the file names them.
    pub hosts: Vec<OutlineHost>,
    /// The links between them, where one limits more than `bandwidth`.
    pub links: Vec<Link>,
    /// The VMs.
    pub vms: Vec<OutlineVm>,
    /// How much the VMs talk to each other, by their position in `vms`.
    pub traffic: Vec<Traffic>,
}

/// A host, as far as it limits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OutlineHost {
    /// Its name.
    pub name: String,
    /// Rate of its network interface, where it limits.
    pub nic: Option<BytesPerSecond>,
    /// Rate of its disk, where it limits.
    pub disk: Option<BytesPerSecond>,
}

/// A VM, as far as it matters when and how fast it moves.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OutlineVm {
    /// Its name.
    pub name: String,
    /// Its tier.
    pub tier: Option<String>,
    /// The host it runs on, where the file says so.
    pub from: Option<HostId>,
    /// The host it is to run on, where the file says so.
    pub to: Option<HostId>,
    /// How much its vCPUs may be slowed at most, in percent, where it says so itself.
    pub max_throttle: Option<u8>,
    /// What is known of its memory and disk.
    pub profile: VmProfile,
}

impl Outline {
    /// Reads the file at `path`.
    ///
    /// # Errors
    /// It cannot be read, or something in it is wrong: then every problem is named with its line.
    pub fn load(path: &Path) -> Result<Self, ApplicationError> {
        load(path, parse::parse_outline)
    }

    /// Reads `text`; `path` is for messages.
    ///
    /// # Errors
    /// Something in it is wrong: every problem is named with its line.
    pub fn parse(text: &str, path: &Path) -> Result<Self, ApplicationError> {
        read(text, path, parse::parse_outline)
    }

    pub(super) fn of(app: &Application) -> Self {
        let hosts = app.hosts.iter().map(|host| OutlineHost {
            name: host.name.clone(),
            nic: host.nic,
            disk: host.disk,
        });
        let vms = app.vms.iter().map(|vm| OutlineVm {
            name: vm.name.clone(),
            tier: vm.tier.clone(),
            from: Some(vm.from),
            to: Some(vm.to),
            max_throttle: vm.max_throttle,
            profile: app.moved_profile(vm),
        });
        Self {
            name: app.name.clone(),
            policy: app.policy,
            allowance: app.allowance,
            max_downtime: app.max_downtime,
            deadline: app.deadline,
            throttle: app.throttle(),
            termination: app.termination,
            replica_groups: app.replica_groups,
            hosts: hosts.collect(),
            links: app.links.clone(),
            vms: vms.collect(),
            traffic: app.traffic.clone(),
        }
    }
}
