//! What a move did: the one record that tables, pictures, JSON and tests read.

pub mod assemble;
#[cfg(test)]
pub(crate) mod example;
pub mod planned;
pub mod predicted;
pub mod simulated;
pub mod table;
pub mod timeline;

use std::fmt;

use serde::ser::SerializeMap;
use serde::{Serialize, Serializer};
use sidecar::protocol::types::{
    HoldReason, Phase, PhaseEntry, QemuBuild, RoundReport, Side, Transport,
};
use uuid::Uuid;

use crate::engine::Step;
use predicted::Prediction;

/// Version of the JSON form.
pub const SCHEMA_VERSION: u32 = 2;

/// How a move (or one of its groups) ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// Every VM runs at its destination (exit 0).
    Committed,
    /// Every VM runs at its source (exit 2).
    RolledBack,
    /// Something is left for a person (exit 3).
    NeedsAttention,
    /// Some groups moved, others did not (exit 4).
    PartlyMoved,
}

impl Outcome {
    /// The program's exit code.
    #[must_use]
    pub fn exit_code(self) -> u8 {
        match self {
            Self::Committed => 0,
            Self::RolledBack => 2,
            Self::NeedsAttention => 3,
            Self::PartlyMoved => 4,
        }
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Committed => "committed",
            Self::RolledBack => "rolled back",
            Self::NeedsAttention => "needs attention",
            Self::PartlyMoved => "partly moved",
        })
    }
}

/// A whole move of an application.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct MoveReport {
    /// [`SCHEMA_VERSION`].
    pub schema_version: u32,
    /// The application's name.
    pub application: String,
    /// The policy, such as `muster`.
    pub policy: String,
    /// How it ended.
    pub result: Outcome,
    /// Why, where it was not committed.
    pub reason: Option<String>,
    /// When the first `start` was sent: unix time in microseconds.
    pub started_at_us: i64,
    /// From the first `start` to the last VM running at its destination, in seconds.
    pub total_s: f64,
    /// Bytes of all streams.
    pub sent_bytes: u64,
    /// How long VMs of the application ran on different sides, in seconds.
    pub split_s: f64,
    /// Unsynchronised time (VMbuddies 4.4, Figure 12): the same as `split_s`.
    pub unsynchronised_s: f64,
    /// Synchronised time: the rest of `total_s`, with all VMs on one side, in seconds.
    pub synchronised_s: f64,
    /// Between the first and the last STOP, in seconds.
    pub stop_skew_s: f64,
    /// Between the first and the last RESUME, in seconds.
    pub resume_skew_s: f64,
    /// Communication impact in bytes: Σ `|t_i − t_j|·TM[i,j]` (COMMA 2.2, Eq. 1), t = RESUME.
    pub impact_bytes: f64,
    /// One entry per VM, in the application file's order.
    pub vms: Vec<VmMove>,
    /// The groups, in the order they were started.
    pub groups: Vec<GroupMove>,
    /// What was to be expected beforehand, and the error.
    pub prediction: Prediction,
    /// What was changed in the course of the move because of what was measured.
    pub adaptations: Vec<Adaptation>,
    /// Everything a person should know: lost leases, doubts, stock QEMU's costs.
    pub notices: Vec<String>,
}

/// Something that was changed because of what was measured.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Adaptation {
    /// Since the first `start`, in seconds.
    pub at_s: f64,
    /// What kind of change it was.
    pub kind: AdaptationKind,
    /// In words.
    pub what: String,
}

/// Kinds of changes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum AdaptationKind {
    /// A path carries another rate than was thought.
    Bandwidth,
    /// Groups that had not started were made, or ordered, anew.
    Plan,
    /// vCPUs were slowed, or are at full speed again.
    Throttle,
}

impl AdaptationKind {
    /// That of a step, if it is one.
    #[must_use]
    pub fn of(step: &Step) -> Option<Self> {
        match step {
            Step::Bandwidth { .. } => Some(Self::Bandwidth),
            Step::Planned { .. } => Some(Self::Plan),
            Step::Throttled { .. } => Some(Self::Throttle),
            _ => None,
        }
    }
}

/// One group: VMs that switch over together.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct GroupMove {
    /// The run's UUID.
    pub run: Uuid,
    /// Names of its VMs.
    pub vms: Vec<String>,
    /// How it ended.
    pub result: Outcome,
    /// Link bandwidth that the release was decided with, in bytes per second.
    pub bandwidth_bytes_per_s: u64,
    /// Σ remaining / bandwidth when all were paused, in seconds.
    pub predicted_downtime_s: Option<f64>,
}

/// One VM's move.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct VmMove {
    /// The VM's name.
    pub name: String,
    /// Host it left.
    pub from: String,
    /// Host it was to reach.
    pub to: String,
    /// Where it runs now.
    pub side: Option<Side>,
    /// Guest RAM in bytes.
    pub memory_bytes: u64,
    /// How its stream went.
    pub transport: Transport,
    /// Whether the QEMU that it left is a patched one.
    pub qemu_build: QemuBuild,
    /// Why it was held.
    pub hold_reason: Option<HoldReason>,
    /// Wait-and-copy, in seconds.
    pub held_s: f64,
    /// Finished rounds; as JSON `rounds` is their number and `round_details` has them.
    #[serde(flatten, serialize_with = "rounds_and_details")]
    pub rounds: Vec<RoundReport>,
    /// Bytes of its stream.
    pub sent_bytes: u64,
    /// What remained when it was paused.
    pub remaining_at_release_bytes: Option<u64>,
    /// From QEMU's STOP at the source to its RESUME at the destination, in seconds.
    pub downtime_s: Option<f64>,
    /// STOP: unix time in microseconds.
    pub stopped_at_us: Option<i64>,
    /// RESUME: unix time in microseconds.
    pub resumed_at_us: Option<i64>,
    /// When each phase was entered at the source.
    pub history: Vec<PhaseEntry>,
    /// STATUS reports over time.
    pub samples: Vec<Sample>,
    /// What was done with its balloon; null: nothing was to be done.
    pub balloon: Option<BalloonMove>,
    /// Whether its guest told QEMU which pages are free, so that they were not sent.
    pub free_page_hint: bool,
    /// What went wrong, if anything.
    pub error: Option<String>,
}

/// What was taken from a guest while it moved, and given back.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct BalloonMove {
    /// What it had before, in bytes; 0: that is not known.
    pub before_bytes: u64,
    /// What it had while it moved, in bytes; null: nothing was taken.
    pub during_bytes: Option<u64>,
    /// How long that took, before the copy of its memory began, in milliseconds.
    pub took_ms: u64,
    /// Whether it has got back what was taken.
    pub given_back: bool,
}

fn rounds_and_details<S: Serializer>(rounds: &[RoundReport], to: S) -> Result<S::Ok, S::Error> {
    let mut map = to.serialize_map(Some(2))?;
    map.serialize_entry("rounds", &rounds.len())?;
    map.serialize_entry("round_details", rounds)?;
    map.end()
}

/// One STATUS report of a VM's source.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Sample {
    /// Unix time in microseconds.
    pub at_us: i64,
    /// Phase.
    pub phase: Phase,
    /// Round.
    pub round: u64,
    /// Dirty or unsent memory in bytes.
    pub remaining_bytes: u64,
    /// Speed of the stream.
    pub rate_bytes_per_s: u64,
    /// As QEMU measures it.
    pub dirty_rate_bytes_per_s: u64,
    /// Bytes of the stream so far.
    pub transferred_bytes: u64,
}
