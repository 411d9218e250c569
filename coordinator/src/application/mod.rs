//! The application file: which VMs move together, from where to where, over what, and under which
//! limits.
//!
//! [`Application::load`] reads TOML and hands out a value in which every reference is resolved and
//! every quantity has its unit: nothing after it has to check again. Whatever is wrong with a file
//! is named at once, each with its line and key ([`ApplicationError::Invalid`]).
//!
//! ```toml
//! version = 1
//! [application]
//! name = "shop"
//! bandwidth = "400Mbit/s"
//! max-downtime = "300ms"
//! [[host]]
//! name = "a"
//! control = "unix:/run/muster/control"
//! [[host]]
//! name = "b"
//! control = "tcp:10.0.0.2:4600"
//! [[vm]]
//! name = "web"
//! uuid = "6f1c1c1e-8a52-4b6e-9a4e-3f0b3a6c1d01"
//! from = "a"
//! to = "b"
//! ```

mod balloon;
mod control;
mod mac;
mod outline;
mod parse;
mod reader;

use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rate_limiter::{Bytes, BytesPerSecond};
use sidecar::protocol::command::Termination;
use sidecar::protocol::types::{Chain, CopyMode};
use uuid::Uuid;

use crate::capacity::Allowance;
pub use balloon::Ballooning;
pub use control::{ControlAddress, ParseControlAddressError};
pub use mac::{Mac, NoMac};
pub use outline::{Outline, OutlineHost, OutlineVm};
pub use reader::Problem;

/// Version of the file that this program reads.
pub const FILE_VERSION: i64 = 1;

/// Index into [`Application::hosts`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct HostId(pub usize);

/// Index into [`Application::vms`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct VmId(pub usize);

/// An application: everything its file says, checked and resolved.
#[derive(Debug, Clone, PartialEq)]
pub struct Application {
    /// Its name.
    pub name: String,
    /// How its VMs are moved, unless the command line says otherwise.
    pub policy: Policy,
    /// Rate that the migration may use in all, and what is kept for the application.
    pub allowance: Allowance,
    /// Whether the bandwidth is probed before a plan or a move.
    pub probe: bool,
    /// Whether what the file does not say of the VMs is measured before a plan or a move.
    pub measure: bool,
    /// A group is released when what remains crosses in so much time.
    pub max_downtime: Duration,
    /// What `on-non-convergence` may at most cost, and what a paused group may at most take.
    pub hard_downtime: Duration,
    /// How long a group may take until it is released.
    pub deadline: Option<Duration>,
    /// After so long without a word from the coordinator, a sidecar asks the register.
    pub lease: Duration,
    /// The host whose sidecar keeps the decision.
    pub register: HostId,
    /// How long a held group that does not fit `max-downtime` is tried.
    pub horizon: Duration,
    /// What to do with a group that never fits `max-downtime`.
    pub on_non_convergence: OnNonConvergence,
    /// How much a VM's vCPUs may be slowed at most, in percent, unless it says otherwise.
    pub max_throttle: u8,
    /// What to do with the groups already moved when a later one fails.
    pub on_partial: OnPartial,
    /// Interval of the sidecars' reports.
    pub report_interval: Duration,
    /// A guest's disk stands still no longer than this because of its copy, or the group goes back.
    pub disk_stall: Duration,
    /// Whether what guests do not use is taken from them while they move, unless a VM says otherwise,
    /// and how.
    pub ballooning: Ballooning,
    /// multifd channels, 0 for none.
    pub multifd_channels: u8,
    /// How the streams go, unless a VM says otherwise.
    pub transport: TransportChoice,
    /// When pre-copy ends for a VM.
    pub termination: Termination,
    /// Whether the file asks for a rule by which pre-copy ends that QEMU does not have itself: then the
    /// VMs of every policy are held, those of `sequential` and `parallel` each by itself.
    pub ends_by_rule: bool,
    /// Whether every tier is to be on both sites while the application is split.
    pub replica_groups: bool,
    /// The hosts.
    pub hosts: Vec<Host>,
    /// The links between them, where one limits more than `bandwidth`.
    pub links: Vec<Link>,
    /// The VMs.
    pub vms: Vec<Vm>,
    /// How much the VMs talk to each other.
    pub traffic: Vec<Traffic>,
}

/// A host with its sidecar.
#[derive(Debug, Clone, PartialEq)]
pub struct Host {
    /// Its name.
    pub name: String,
    /// The control socket of its sidecar.
    pub control: ControlAddress,
    /// Rate of its network interface, where it limits.
    pub nic: Option<BytesPerSecond>,
    /// Rate of its disk, where it limits.
    pub disk: Option<BytesPerSecond>,
}

/// A link between two hosts.
#[derive(Debug, Clone, PartialEq)]
pub struct Link {
    /// Its ends.
    pub between: [HostId; 2],
    /// Its rate.
    pub rate: BytesPerSecond,
    /// Its round-trip time.
    pub rtt: Option<Duration>,
}

/// A VM that is to move.
#[derive(Debug, Clone, PartialEq)]
pub struct Vm {
    /// Its name, as the sidecars on both hosts know it.
    pub name: String,
    /// Its identity: QEMU must report the same.
    pub uuid: Uuid,
    /// The hardware address of its network card, by which its traffic is counted.
    pub mac: Option<Mac>,
    /// Its tier, such as `web` or `db`.
    pub tier: Option<String>,
    /// The host it runs on.
    pub from: HostId,
    /// The host it is to run on.
    pub to: HostId,
    /// How its stream goes, where it says so itself.
    pub transport: Option<TransportChoice>,
    /// How much its vCPUs may be slowed at most, in percent, where it says so itself.
    pub max_throttle: Option<u8>,
    /// Local disks that move with it; its other disks are on both hosts already.
    pub disks: Vec<Disk>,
    /// Where they are not copied otherwise, its guest may be slowed to so many bytes per second to each.
    pub min_write_rate: Option<BytesPerSecond>,
    /// Whether what its guest does not use is taken from it while it moves, where it says so itself.
    pub balloon: Option<bool>,
    /// What its guest keeps then beyond what it uses, where it says so itself.
    pub balloon_reserve: Option<Bytes>,
    /// What is known of its memory and disk, for the planner.
    pub profile: VmProfile,
}

/// A local disk of a VM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Disk {
    /// Its block node, by the same name on both hosts.
    pub node: String,
    /// How the guest's writes follow its copy.
    pub copy_mode: CopyMode,
    /// What of it is copied, where it has a backing file.
    pub chain: Chain,
}

/// What is known of a VM's load: what the file says, and what was measured where it says nothing. The
/// planner uses it; a move measures for itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct VmProfile {
    /// Guest RAM.
    pub memory: Option<Bytes>,
    /// What of it the guest uses.
    pub used_memory: Option<Bytes>,
    /// Mean dirty rate.
    pub dirty_rate: Option<BytesPerSecond>,
    /// Highest dirty rate.
    pub max_dirty_rate: Option<BytesPerSecond>,
    /// Dirty data left at the end of pre-copy.
    pub dirty_set: Option<Bytes>,
    /// Writable working set.
    pub writable_working_set: Option<Bytes>,
    /// Size of its disk.
    pub disk: Option<Bytes>,
}

/// Traffic between two VMs (one entry of the traffic matrix).
#[derive(Debug, Clone, PartialEq)]
pub struct Traffic {
    /// The two VMs.
    pub between: [VmId; 2],
    /// Both directions together.
    pub rate: BytesPerSecond,
}

/// How the VMs of an application are moved.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Policy {
    /// One VM after another, each as soon as it converges.
    Sequential,
    /// All VMs at once, each switching over as soon as it converges.
    Parallel,
    /// One VM after another by dirty rate, the largest last; each held until the last is ready
    /// (VMbuddies 3.2).
    Lll,
    /// All VMs at once, with the bandwidth that lets them finish together (VMbuddies 3.3).
    Vmbuddies,
    /// All memory once, then valid groups in the order of least impact, with delayed starts (COMMA
    /// 3).
    Comma,
    /// All VMs held until they can switch over together; committed together.
    Muster,
}

impl Policy {
    /// All policies.
    pub const ALL: [Self; 6] = [
        Self::Sequential,
        Self::Parallel,
        Self::Lll,
        Self::Vmbuddies,
        Self::Comma,
        Self::Muster,
    ];

    /// Whether VMs are held until their group switches over together.
    #[must_use]
    pub fn holds(self) -> bool {
        !matches!(self, Self::Sequential | Self::Parallel)
    }

    /// As files and flags write it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Sequential => "sequential",
            Self::Parallel => "parallel",
            Self::Lll => "lll",
            Self::Vmbuddies => "vmbuddies",
            Self::Comma => "comma",
            Self::Muster => "muster",
        }
    }
}

impl fmt::Display for Policy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

impl std::str::FromStr for Policy {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Self::ALL
            .into_iter()
            .find(|policy| policy.as_str() == text)
            .ok_or_else(|| {
                let names = Self::ALL.map(Self::as_str).join(", ");
                format!("`{text}` is no policy; expected one of {names}")
            })
    }
}

/// How a migration stream is to go.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub enum TransportChoice {
    /// Direct where both QEMUs are patched, else through the relay.
    #[default]
    Auto,
    /// Through both sidecars.
    Relay,
    /// Over a socket that the QEMUs get from their sidecars.
    Direct,
}

/// What happens to a group whose remaining memory never fits `max-downtime`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum OnNonConvergence {
    /// It goes back to its sources.
    Abort,
    /// The vCPUs of the VMs that dirty most are slowed in steps.
    Throttle,
    /// It is released at the best moment within the hard limit.
    Force,
}

/// What happens to the groups already moved when a later one fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum OnPartial {
    /// The failed group is tried once more; the moved ones stay.
    Retry,
    /// The moved ones are moved back.
    Return,
    /// They stay where they are.
    Stay,
}

/// Why an application file was refused.
#[derive(Debug, thiserror::Error)]
pub enum ApplicationError {
    /// The file cannot be read.
    #[error("{path}: cannot read the application file: {source}", path = path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The file is wrong; every problem is named.
    #[error("{}", problem_list(path, problems))]
    Invalid {
        /// The file.
        path: PathBuf,
        /// What is wrong, in the file's order.
        problems: Vec<Problem>,
    },
}

fn problem_list(path: &Path, problems: &[Problem]) -> String {
    let lines: Vec<String> = problems
        .iter()
        .map(|problem| format!("{}:{}: {}", path.display(), problem.line, problem.text))
        .collect();
    lines.join("\n")
}

/// Reads the file at `path` with `parse`.
fn load<T>(
    path: &Path,
    parse: impl FnOnce(&str) -> Result<T, Vec<Problem>>,
) -> Result<T, ApplicationError> {
    let text = std::fs::read_to_string(path).map_err(|source| ApplicationError::Read {
        path: path.to_owned(),
        source,
    })?;
    read(&text, path, parse)
}

/// Reads `text` with `parse`; `path` is for messages.
fn read<T>(
    text: &str,
    path: &Path,
    parse: impl FnOnce(&str) -> Result<T, Vec<Problem>>,
) -> Result<T, ApplicationError> {
    parse(text).map_err(|problems| ApplicationError::Invalid {
        path: path.to_owned(),
        problems,
    })
}

impl Application {
    /// Whether VMs are held: by the policy, or because the file asks for it, or for their disks. What
    /// is written to those until a VM is paused has to follow; by the baselines each by itself.
    #[must_use]
    pub fn holds(&self, policy: Policy) -> bool {
        policy.holds() || self.ends_by_rule || self.has_disks()
    }

    /// Whether local disks move.
    #[must_use]
    pub fn has_disks(&self) -> bool {
        self.vms.iter().any(|vm| !vm.disks.is_empty())
    }

    /// How much vCPUs may be slowed at most, in percent, where that is allowed.
    #[must_use]
    pub fn throttle(&self) -> Option<u8> {
        let may = self.on_non_convergence == OnNonConvergence::Throttle;
        may.then_some(self.max_throttle)
    }

    /// Reads the file at `path`.
    ///
    /// # Errors
    /// It cannot be read, or something in it is wrong: then every problem is named with its line.
    pub fn load(path: &Path) -> Result<Self, ApplicationError> {
        load(path, parse::parse)
    }

    /// Reads `text`; `path` is for messages.
    ///
    /// # Errors
    /// Something in it is wrong: every problem is named with its line.
    pub fn parse(text: &str, path: &Path) -> Result<Self, ApplicationError> {
        read(text, path, parse::parse)
    }

    /// What a planner needs to know of it.
    #[must_use]
    pub fn outline(&self) -> Outline {
        Outline::of(self)
    }

    /// The host with this index.
    #[must_use]
    pub fn host(&self, host: HostId) -> &Host {
        &self.hosts[host.0]
    }

    /// The VM with this index.
    #[must_use]
    pub fn vm(&self, vm: VmId) -> &Vm {
        &self.vms[vm.0]
    }

    /// The host with this name.
    #[must_use]
    pub fn host_named(&self, name: &str) -> Option<HostId> {
        self.hosts.iter().position(|h| h.name == name).map(HostId)
    }

    /// How the stream of this VM is to go.
    #[must_use]
    pub fn transport_of(&self, vm: VmId) -> TransportChoice {
        self.vm(vm).transport.unwrap_or(self.transport)
    }

    /// All VMs, in the file's order.
    pub fn vm_ids(&self) -> impl Iterator<Item = VmId> + use<> {
        (0..self.vms.len()).map(VmId)
    }

    /// Hosts that take part: those with a VM coming or going, and the register's.
    #[must_use]
    pub fn hosts_involved(&self) -> Vec<HostId> {
        (0..self.hosts.len())
            .map(HostId)
            .filter(|&host| {
                host == self.register || self.vms.iter().any(|vm| vm.from == host || vm.to == host)
            })
            .collect()
    }
}
