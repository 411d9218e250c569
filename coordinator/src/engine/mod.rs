//! The engine: moves one group, as a state machine without sockets or a clock.
//!
//! ```text
//! begin ─► preparing ─► precopy ─► held ⇄ armed ─► stopping ─► switching ─► deciding ─► committing ─► ended
//!              │           │         │       │         │            │           │                      ▲
//!              └───────────┴─────────┴───────┴─────────┴────────────┴───────────┴──► rolling back ─────┘
//! ```
//!
//! Without hold, VMs go from precopy to arrived by themselves and the group to deciding.
//!
//! How to drive it: feed what happens through [`GroupRun::begin`], [`GroupRun::handle_event`],
//! [`GroupRun::handle_reply`], [`GroupRun::handle_lost`], [`GroupRun::handle_connected`],
//! [`GroupRun::interrupt`]; call [`GroupRun::handle_timeout`] when [`GroupRun::poll_timeout`] is
//! reached; after each, carry out [`GroupRun::poll_output`] until it is empty, in order.
//!
//! What it promises:
//! - `commit` is proposed only after both halves of every VM have said ARRIVED and none has failed.
//! - Up to `continue` a failure sends `abort` to every host; from then on too, but there the
//!   sidecars ask the register, and whatever the register answers is obeyed.
//! - After a commit is recorded nothing but finishing forward happens.
//! - Every state but the end has a deadline, and so has every command. A group of two stages
//!   (`stages.rs`) waits without one for its turn: that comes when those before it have ended.

mod advance;
mod balloon;
mod brake;
mod events;
mod group;
mod halves;
mod hosts;
mod measured;
mod record;
mod release;
mod settle;
mod share;
mod stages;
#[cfg(test)]
mod tests;
mod throttle;

use std::fmt;
use std::time::Duration;

use rate_limiter::BytesPerSecond;
use sidecar::protocol::command::{Command, PrepareBalloon, PrepareDisk, Termination};
use sidecar::protocol::types::{Decision, Transport};
use uuid::Uuid;

use crate::application::{HostId, OnNonConvergence, VmId, VmProfile};
use crate::capacity::Capacity;
use crate::report::Outcome;
use crate::scheduler::allot::Scheme;

pub use group::GroupRun;
pub use halves::{Half, VmProgress};

/// One group's move: everything that the engine has to know.
#[derive(Debug, Clone)]
pub struct GroupSpec {
    /// One UUID per group and attempt.
    pub run: Uuid,
    /// Commands of a lower epoch are refused by sidecars that saw this one.
    pub epoch: u64,
    /// The VMs that switch over together.
    pub members: Vec<Member>,
    /// Whose sidecar keeps the decision.
    pub register: HostId,
    /// Its control address, as the sidecars are told it.
    pub register_address: String,
    /// Whether VMs are held until the group is released.
    pub hold: bool,
    /// How the VMs share the bandwidth, and when each starts; without hold all start at once.
    pub scheme: Scheme,
    /// Whether held VMs whose pre-copy is in vain rest while others copy.
    pub rests: bool,
    /// For COMMA's two stages: the rate of a VM that waits for stage two. Its memory is copied once
    /// beside the other groups'; what follows waits for [`GroupRun::give_turn`].
    pub parked: Option<BytesPerSecond>,
    /// Limits and choices.
    pub limits: Limits,
    /// What the streams pass through.
    pub capacity: Capacity,
}

/// One VM of a group.
#[derive(Debug, Clone)]
pub struct Member {
    /// Which VM of the application.
    pub vm: VmId,
    /// Its name.
    pub name: String,
    /// Its identity.
    pub uuid: Uuid,
    /// Host it leaves.
    pub from: HostId,
    /// Host it is to reach.
    pub to: HostId,
    /// One-time token of its stream: 64 hexadecimal digits.
    pub token: String,
    /// Machine type that the destination must offer.
    pub machine: Option<String>,
    /// How its stream goes.
    pub transport: Transport,
    /// Local disks that move with it.
    pub disks: Vec<PrepareDisk>,
    /// Its guest's writes to each of them may be slowed to this.
    pub min_write_rate: Option<BytesPerSecond>,
    /// How much its vCPUs may be slowed at most, in percent.
    pub max_throttle: u8,
    /// How it is ballooned, if it is.
    pub balloon: Option<PrepareBalloon>,
    /// What is known of its load beforehand.
    pub profile: VmProfile,
}

/// Limits and choices of a group, from the application file.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Limits {
    /// The group is released when what remains crosses in so much time.
    pub max_downtime: Duration,
    /// Paused VMs go back when what remains would take longer.
    pub hard_downtime: Duration,
    /// How long until the release.
    pub deadline: Option<Duration>,
    /// Lease of the coordinator at the sidecars.
    pub lease: Duration,
    /// Interval of STATUS.
    pub report_interval: Duration,
    /// A guest's disk stands still no longer than this because of its copy.
    pub disk_stall: Duration,
    /// multifd channels.
    pub multifd_channels: u8,
    /// When pre-copy ends for a VM.
    pub termination: Termination,
    /// How long a held group that does not fit is tried.
    pub horizon: Duration,
    /// What to do with a group that does not fit.
    pub on_non_convergence: OnNonConvergence,
}

/// What the engine wants done.
#[derive(Debug, Clone)]
pub enum Output {
    /// Send a command; the answer comes back through [`GroupRun::handle_reply`] with `ticket`.
    Send {
        /// To whose sidecar.
        host: HostId,
        /// Names the answer.
        ticket: u64,
        /// The command.
        command: Command,
    },
    /// The group has reached a step.
    Step(Step),
}

/// What the group has reached. Observers see each before the engine acts on it further.
#[derive(Debug, Clone, PartialEq)]
pub enum Step {
    /// `prepare` goes out.
    Preparing,
    /// Both halves of every VM are ready.
    Prepared,
    /// `start` was sent: to all VMs, or to the first ones.
    Started,
    /// `start` was sent to VMs whose turn came later.
    StartedLater {
        /// Their names.
        vms: Vec<String>,
    },
    /// Every local disk of a VM was copied once.
    DisksCopied {
        /// Its name.
        vm: String,
    },
    /// Every VM's disks, or memory where it has none, were copied once: the group waits for its turn.
    Copied,
    /// Its turn has come.
    Turn,
    /// A path was found to carry another rate than was thought.
    Bandwidth {
        /// Its source's host.
        from: String,
        /// Its destination's.
        to: String,
        /// What may be used of it from now on; `None`: again all that was told.
        rate: Option<BytesPerSecond>,
    },
    /// What has not started was planned anew: these groups follow, in this order.
    Planned {
        /// Their VMs.
        groups: Vec<Vec<String>>,
    },
    /// Every VM is in wait-and-copy.
    AllHeld,
    /// Every VM is armed; so long would the switchover take now.
    Armed {
        /// Σ remaining / bandwidth.
        predicted: Duration,
    },
    /// It did not fit within the armed second: back to the paced hold.
    Disarmed {
        /// The best seen.
        best: Duration,
    },
    /// A VM's vCPUs are slowed because it, or its group, does not converge; 0: no more.
    Throttled {
        /// The VM.
        vm: String,
        /// In percent.
        percent: u8,
    },
    /// A guest's writes to its disks are slowed because these do not get copied.
    DisksThrottled {
        /// The VM.
        vm: String,
        /// To each disk, in bytes per second.
        bytes_per_s: u64,
    },
    /// `release` was sent.
    Released {
        /// Σ remaining / bandwidth just before.
        predicted: Duration,
    },
    /// Every VM is paused, `continue` not sent yet.
    AllStopped {
        /// Σ of the exact remainders.
        remaining_bytes: u64,
        /// Σ remaining / bandwidth.
        predicted: Duration,
    },
    /// What is left takes too long: the paused VMs run again and are held again.
    SentBack {
        /// Σ remaining / bandwidth.
        predicted: Duration,
    },
    /// `continue` was sent.
    Continued,
    /// Both halves of every VM have arrived; the decision is not proposed yet.
    AllArrived,
    /// The register answered.
    Decided(Decision),
    /// `commit` was written to every destination.
    CommitSent,
    /// Every VM runs at its destination.
    AllRunning,
    /// The group goes back.
    RollingBack {
        /// Why.
        reason: String,
    },
    /// The register cannot be asked; VMs stay paused meanwhile.
    InDoubt {
        /// What is known.
        reason: String,
    },
    /// Something a person should know.
    Notice(String),
    /// The group's move is over.
    Ended(Outcome),
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ms = |d: &Duration| d.as_secs_f64() * 1e3;
        match self {
            Self::Preparing => write!(f, "preparing both sides"),
            Self::Prepared => write!(f, "both sides are ready"),
            Self::Started => write!(f, "pre-copy has begun"),
            Self::StartedLater { vms } => write!(f, "pre-copy of {} has begun", vms.join(", ")),
            Self::DisksCopied { vm } => write!(f, "the disks of {vm} are copied once"),
            Self::Copied => write!(f, "everything is copied once: waiting for stage two"),
            Self::Turn => write!(f, "stage two: what was dirtied meanwhile is sent"),
            Self::Bandwidth { from, to, rate } => match rate {
                Some(rate) => write!(f, "{rate} may be used from {from} to {to}: shared anew"),
                None => write!(f, "{from} to {to} carries what was told again: shared anew"),
            },
            Self::Planned { groups } => {
                let groups: Vec<String> = groups.iter().map(|vms| vms.join(", ")).collect();
                write!(
                    f,
                    "planned anew from what was measured: {}",
                    groups.join("; then ")
                )
            }
            Self::AllHeld => write!(f, "every VM is held in wait-and-copy"),
            Self::Armed { predicted } => {
                write!(
                    f,
                    "armed: the switchover would take {:.0} ms",
                    ms(predicted)
                )
            }
            Self::Disarmed { best } => {
                write!(
                    f,
                    "held on: at best the switchover would take {:.0} ms",
                    ms(best)
                )
            }
            Self::Throttled { vm, percent: 0 } => write!(f, "vCPUs of {vm} at full speed again"),
            Self::Throttled { vm, percent } => write!(f, "vCPUs of {vm} slowed by {percent} %"),
            Self::DisksThrottled { vm, bytes_per_s } => write!(
                f,
                "writes of {vm} to each of its disks slowed to {}",
                BytesPerSecond(*bytes_per_s)
            ),
            Self::Released { predicted } => {
                write!(f, "released, {:.0} ms expected", ms(predicted))
            }
            Self::AllStopped {
                remaining_bytes,
                predicted,
            } => write!(
                f,
                "every VM is paused, {} left, {:.0} ms",
                rate_limiter::Bytes(*remaining_bytes),
                ms(predicted)
            ),
            Self::SentBack { predicted } => write!(
                f,
                "back to the hold: the switchover would take {:.0} ms",
                ms(predicted)
            ),
            Self::Continued => write!(f, "stop-and-copy"),
            Self::AllArrived => write!(f, "every VM has arrived"),
            Self::Decided(Decision::Commit) => write!(f, "decided: commit"),
            Self::Decided(Decision::Abort) => write!(f, "decided: abort"),
            Self::CommitSent => write!(f, "every destination is told to run"),
            Self::AllRunning => write!(f, "every VM runs at its destination"),
            Self::RollingBack { reason } => write!(f, "rolling back: {reason}"),
            Self::InDoubt { reason } => write!(f, "in doubt: {reason}"),
            Self::Notice(text) => f.write_str(text),
            Self::Ended(outcome) => write!(f, "ended: {outcome}"),
        }
    }
}
