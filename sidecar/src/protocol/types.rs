//! What commands, events, and reports share: identities, phases, decisions, and reports.

use std::fmt;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// Which end of a VM's move a sidecar stands at.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, JsonSchema,
)]
#[serde(rename_all = "kebab-case")]
pub enum Role {
    /// The VM runs here before the move.
    Source,
    /// The VM runs here after the move.
    Destination,
}

/// How a VM's migration stream gets from QEMU to QEMU.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Transport {
    /// Through both sidecars, which copy its bytes.
    #[default]
    Relay,
    /// Over a TCP socket that the sidecars connect and hand to their QEMUs.
    Direct,
}

/// How a guest's writes get into the mirror of its disk.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum CopyMode {
    /// They are copied later: the guest does not wait.
    #[default]
    Background,
    /// Each waits until it is at the destination, too.
    WriteBlocking,
}

/// What of a disk that has a backing file is copied.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Chain {
    /// Everything that the guest can read: what comes out needs no backing file.
    #[default]
    Flatten,
    /// The topmost image: both hosts have the backing files.
    Keep,
}

impl fmt::Display for Chain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Flatten => "flatten",
            Self::Keep => "keep",
        })
    }
}

impl fmt::Display for CopyMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Background => "background",
            Self::WriteBlocking => "write-blocking",
        })
    }
}

impl fmt::Display for Transport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Relay => "relay",
            Self::Direct => "direct",
        })
    }
}

/// Whether a QEMU holds by itself.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum QemuBuild {
    /// It is held by its acknowledgement, which the relay keeps back.
    #[default]
    Stock,
    /// It has the capability `switchover-hold` of Muster's patches.
    Patched,
}

impl fmt::Display for QemuBuild {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Stock => "stock",
            Self::Patched => "patched",
        })
    }
}

/// Where a VM is in its move (DESIGN: idle → preparing → precopy → held → switching → arrived →
/// committed, or rolled back).
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, JsonSchema,
)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    /// QEMU is being started, identified and configured.
    Preparing,
    /// Ready for `start` (source) or for the stream (destination).
    Prepared,
    /// Memory is copied in rounds while the VM runs.
    Precopy,
    /// Wait-and-copy: ready to switch over, kept running, dirty pages are still sent.
    Held,
    /// Wait-and-copy at full speed, just before a release.
    Armed,
    /// Released: the VM is paused (pre-switchover), still reversible by the source alone.
    Stopped,
    /// Stop-and-copy: the last pages and the devices cross.
    Switching,
    /// This half is complete: source postmigrate, or destination loaded and paused.
    Arrived,
    /// Commit is recorded; the destination is being continued, the source waits to be quit.
    Committing,
    /// Final: the VM runs at its destination; the source's process is gone.
    Committed,
    /// An abort is under way.
    RollingBack,
    /// Final: the VM runs at its source; the destination's process is gone.
    RolledBack,
    /// Nobody who can be reached knows the decision: paused, alarmed, asking.
    InDoubt,
    /// Final: this half is lost; `error` says what happened and what to do.
    Failed,
}

impl Phase {
    /// Whether nothing more will happen to this half.
    #[must_use]
    pub fn is_final(self) -> bool {
        matches!(self, Self::Committed | Self::RolledBack | Self::Failed)
    }
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = match self {
            Self::Preparing => "preparing",
            Self::Prepared => "prepared",
            Self::Precopy => "precopy",
            Self::Held => "held",
            Self::Armed => "armed",
            Self::Stopped => "stopped",
            Self::Switching => "switching",
            Self::Arrived => "arrived",
            Self::Committing => "committing",
            Self::Committed => "committed",
            Self::RollingBack => "rolling-back",
            Self::RolledBack => "rolled-back",
            Self::InDoubt => "in-doubt",
            Self::Failed => "failed",
        };
        f.pad(text)
    }
}

/// The group's one decision, recorded once.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Decision {
    /// Every VM of the group runs at its destination from now on.
    Commit,
    /// Every VM of the group runs at its source.
    Abort,
}

/// On which side a single VM ends, where that had to be settled apart from the group.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Side {
    /// It runs at its source.
    Source,
    /// It runs at its destination.
    Destination,
}

/// What a record in the register speaks of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum RecordKey {
    /// The group's decision (`commit` or `abort`).
    Group,
    /// The side of one VM (`source` or `destination`).
    Vm(Uuid),
}

/// The value of a record.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum RecordValue {
    /// Group: every VM runs at its destination.
    Commit,
    /// Group: every VM runs at its source.
    Abort,
    /// VM: it runs at its source.
    Source,
    /// VM: it runs at its destination.
    Destination,
}

/// Why a VM entered the hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum HoldReason {
    /// What remains fits its share of the downtime.
    Converged,
    /// Further rounds do not reduce what remains (VMbuddies 4.2).
    Stalled,
    /// A bound on rounds, traffic or time was reached.
    Bounded,
    /// The operator asked for it.
    Asked,
}

/// One pre-copy round as measured (VMbuddies 4.2: pages sent against pages dirtied).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RoundReport {
    /// 1 for the first copy of the whole memory.
    pub round: u64,
    /// Bytes of memory sent in the round.
    pub sent_bytes: u64,
    /// Bytes dirtied meanwhile: what the next round has to send.
    pub dirtied_bytes: u64,
    /// How long the round took, in milliseconds.
    pub duration_ms: u64,
}

/// The state of one half of a VM's move, as `query-run` and STATUS events give it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct VmReport {
    /// The VM's name.
    pub vm: String,
    /// The VM's UUID.
    pub uuid: Uuid,
    /// Which half this is.
    pub role: Role,
    /// Where it stands.
    pub phase: Phase,
    /// Pre-copy round, from 1; 0 before the first.
    pub round: u64,
    /// Size of the guest's RAM in bytes, 0 while unknown.
    pub total_bytes: u64,
    /// How the stream goes.
    #[serde(default)]
    pub transport: Transport,
    /// Whether this half's QEMU is a patched one.
    #[serde(default)]
    pub qemu_build: QemuBuild,
    /// Bytes of the stream that this host has sent (and the other acknowledged) or received.
    pub transferred_bytes: u64,
    /// What the link still has to carry, in bytes: dirty or unsent memory, and what QEMU has sent
    /// and the destination's host has not taken.
    pub remaining_bytes: u64,
    /// Memory dirtied per second, in bytes, as QEMU measures it.
    pub dirty_rate_bytes_per_s: u64,
    /// Measured speed of the stream in bytes per second.
    pub rate_bytes_per_s: u64,
    /// For how long, in milliseconds, bytes of the stream have waited for the path, which took less
    /// than the pace allows (source). Since 1.5.
    #[serde(default)]
    pub link_wait_ms: u64,
    /// The limit set by `pace`, if any, in bytes per second.
    pub limit_bytes_per_s: Option<u64>,
    /// vCPU throttle in percent, 0 when off.
    pub throttle_percent: u8,
    /// Since when each phase holds: unix time in microseconds, in the order they were entered.
    pub history: Vec<PhaseEntry>,
    /// What remained when the VM was paused.
    pub remaining_at_release_bytes: Option<u64>,
    /// QEMU's STOP event: unix time in microseconds.
    pub stopped_at_us: Option<i64>,
    /// QEMU's RESUME event: unix time in microseconds.
    pub resumed_at_us: Option<i64>,
    /// Every finished round.
    pub rounds: Vec<RoundReport>,
    /// Local disks that move with it (source). Since 1.4.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub disks: Vec<DiskReport>,
    /// What was done with its balloon, where that was asked for. Since 1.6.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub balloon: Option<BalloonReport>,
    /// Whether its guest tells QEMU which pages are free, so that they are not sent (source). Since
    /// 1.6.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub free_page_hint: bool,
    /// What went wrong, if anything.
    pub error: Option<String>,
}

impl VmReport {
    /// Of a half of which nothing more is known.
    #[must_use]
    pub fn new(vm: String, uuid: Uuid, role: Role, phase: Phase) -> Self {
        Self {
            vm,
            uuid,
            role,
            phase,
            round: 0,
            total_bytes: 0,
            transport: Transport::Relay,
            qemu_build: QemuBuild::Stock,
            transferred_bytes: 0,
            remaining_bytes: 0,
            dirty_rate_bytes_per_s: 0,
            rate_bytes_per_s: 0,
            link_wait_ms: 0,
            limit_bytes_per_s: None,
            throttle_percent: 0,
            history: Vec::new(),
            remaining_at_release_bytes: None,
            stopped_at_us: None,
            resumed_at_us: None,
            rounds: Vec::new(),
            disks: Vec::new(),
            balloon: None,
            free_page_hint: false,
            error: None,
        }
    }
}

/// What was done with a VM's balloon.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct BalloonReport {
    /// What it left to the guest before the move, in bytes; 0 while unknown.
    pub before_bytes: u64,
    /// What it left to it during the move (source); null: it was not ballooned.
    pub during_bytes: Option<u64>,
    /// How long that took, before the copy of its memory began, in milliseconds.
    pub took_ms: u64,
    /// Whether this half has given back what was taken: the source after an abort, the destination
    /// after a commit.
    pub given_back: bool,
    /// What a person should know: why it was not ballooned, or not given back.
    pub notice: Option<String>,
}

/// How far the copy of a local disk is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct DiskReport {
    /// Its block node.
    pub node: String,
    /// Its size as the guest sees it, in bytes.
    pub size_bytes: u64,
    /// Bytes copied so far, those copied again among them.
    pub copied_bytes: u64,
    /// Bytes that differ, or are not copied yet.
    pub remaining_bytes: u64,
    /// How fast the guest writes to it: distinct blocks of 4 KiB in a second, in bytes.
    #[serde(default)]
    pub dirty_rate_bytes_per_s: u64,
    /// Distinct blocks that it has written since the copy began, in bytes.
    #[serde(default)]
    pub dirty_set_bytes: u64,
    /// Whether all of it was copied once, and what the guest writes follows.
    pub ready: bool,
}

/// When a phase was entered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct PhaseEntry {
    /// The phase.
    pub phase: Phase,
    /// Unix time in microseconds.
    pub at_us: i64,
}

/// What a sidecar found out about one VM (`query-vm`).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct VmInfo {
    /// The VM's name.
    pub vm: String,
    /// The VM's UUID.
    pub uuid: Uuid,
    /// QEMU's run state, such as `running` or `paused`.
    pub status: String,
    /// Guest RAM in bytes.
    pub memory_bytes: u64,
    /// Machine type with its version, such as `pc-i440fx-10.0`.
    pub machine: String,
    /// QEMU's version, such as `10.0.2`.
    pub qemu_version: String,
    /// Whether KVM executes the guest. Under TCG a stock QEMU can lose writes of a guest that
    /// dirties memory faster than it is sent (its dirty tracking has a fault there).
    #[serde(default = "yes")]
    pub kvm: bool,
    /// Whether this QEMU can be held (capability `switchover-ack`, QEMU 8.1, or a patched one).
    pub can_hold: bool,
    /// Whether it is a patched one.
    #[serde(default)]
    pub qemu_build: QemuBuild,
    /// Its block nodes with a name of their own. Since 1.4.
    #[serde(default)]
    pub disks: Vec<DiskInfo>,
    /// Whether it has a virtio-balloon device; null from sidecars before 1.6, which do not say.
    #[serde(default)]
    pub has_balloon: Option<bool>,
}

/// A block node of a VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct DiskInfo {
    /// Its name.
    pub node: String,
    /// Its size as the guest sees it, in bytes.
    pub size_bytes: u64,
    /// QEMU's driver, such as `raw`, `qcow2` or `file`.
    pub format: String,
    /// Whether it cannot be written.
    pub read_only: bool,
}

fn yes() -> bool {
    true
}

/// What `query-vms` says of each VM in the configuration.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct VmEntry {
    /// The VM's name.
    pub vm: String,
    /// Path of its QMP socket, where one is configured or discovered.
    pub qmp: Option<String>,
    /// Whether that socket exists now.
    pub qmp_present: bool,
    /// Whether this host has a template to receive it, or an incoming QEMU to adopt.
    pub can_receive: bool,
    /// What the template starts, once it is known; of an incoming QEMU to adopt it is not.
    #[serde(default)]
    pub incoming_build: Option<QemuBuild>,
    /// Block nodes of the disks that can come with it; null where an incoming QEMU is adopted, which
    /// has them already. Since 1.4.
    #[serde(default)]
    pub disks: Option<Vec<String>>,
}

/// What `query-host` says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct HostInfo {
    /// The host's name from the sidecar's configuration.
    pub host: String,
    /// Memory that a new VM could use, in bytes (MemAvailable).
    pub available_memory_bytes: u64,
    /// Free bytes in the state directory's file system.
    pub state_free_bytes: u64,
    /// Where other sidecars connect with migration streams, such as `10.0.0.2:4601`.
    pub stream_address: String,
    /// Version of the sidecar program.
    pub sidecar_version: String,
    /// Version of the QEMU program that the templates start, once it is known.
    pub qemu_version: Option<String>,
}
