//! The commands of the control protocol and their arguments.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::dirty::{DirtyStartArgs, DirtyVmArgs};
use super::probe::{ProbeArgs, ProbeListenArgs};
use super::traffic::QueryTrafficArgs;
use super::types::{Chain, CopyMode, RecordValue, Role, Transport};

/// Names the run that a command belongs to. Every mutating command carries both.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RunArgs {
    /// The run (one per group and attempt).
    pub run: Uuid,
    /// The coordinator's epoch; commands of an older one are refused.
    pub epoch: u64,
}

/// `prepare`: takes part in a run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct PrepareArgs {
    /// The run.
    pub run: Uuid,
    /// The coordinator's epoch.
    pub epoch: u64,
    /// Which end this sidecar is for these VMs.
    pub role: Role,
    /// Control address of the sidecar that keeps the decision: `unix:PATH` or `tcp:HOST:PORT`.
    pub register: String,
    /// After so long without a word from the coordinator the register is asked, in ms.
    #[serde(default = "default_lease_ms")]
    pub lease_ms: u64,
    /// Interval of STATUS events in ms.
    #[serde(default = "default_report_interval_ms")]
    pub report_interval_ms: u64,
    /// The group's downtime limit in ms.
    #[serde(default = "default_max_downtime_ms")]
    pub max_downtime_ms: u64,
    /// Keep the VMs in wait-and-copy until `release`; without it each switches over by itself as
    /// soon as it converges (the sequential and parallel baselines).
    #[serde(default = "default_true")]
    pub hold: bool,
    /// Whether VMs that are held because more pre-copy is in vain go on sending all that they dirty,
    /// as VMbuddies has it (3.2); without it a QEMU that holds by itself rests between two
    /// transfers. Since 1.6.
    #[serde(default, skip_serializing_if = "is_false")]
    pub resend: bool,
    /// Whether `throttle` may be used in this run (auto-converge is switched on for it).
    #[serde(default)]
    pub throttle: bool,
    /// multifd channels, 0 for none.
    #[serde(default)]
    pub multifd_channels: u8,
    /// When pre-copy ends for a VM.
    #[serde(default)]
    pub termination: Termination,
    /// A guest's disk stands still no longer than this because of its mirror, in ms: a write to that
    /// which is not answered in three quarters of it has the move given up. Since 1.4.
    #[serde(
        default = "default_disk_stall_ms",
        skip_serializing_if = "is_default_disk_stall"
    )]
    pub disk_stall_ms: u64,
    /// The VMs.
    pub vms: Vec<PrepareVm>,
}

/// One VM in `prepare`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct PrepareVm {
    /// The name in this host's configuration.
    pub vm: String,
    /// The UUID that QEMU must report.
    pub uuid: Uuid,
    /// One-time token: 64 hexadecimal digits, the same at both ends.
    pub token: String,
    /// Expected machine type (destination: refused where it differs).
    #[serde(default)]
    pub machine: Option<String>,
    /// How its stream goes; the same at both ends.
    #[serde(default, skip_serializing_if = "is_relay")]
    pub transport: Transport,
    /// Local disks that move with it; the same at both ends. Since 1.4.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub disks: Vec<PrepareDisk>,
    /// What the guest does not use is taken from it while it moves; the same at both ends. Since 1.6.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub balloon: Option<PrepareBalloon>,
}

/// Allowed for [`PrepareBalloon::reserve_bytes`].
pub const RESERVE_BYTES: RangeInclusive<u64> = 1 << 20..=1 << 40;
/// Allowed for [`PrepareBalloon::wait_ms`].
pub const BALLOON_WAIT_MS: RangeInclusive<u64> = 100..=60_000;

/// How a VM is ballooned, in `prepare`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct PrepareBalloon {
    /// What the guest keeps beyond what it uses, in bytes.
    pub reserve_bytes: u64,
    /// How long it may take before the memory is copied, in ms.
    pub wait_ms: u64,
}

/// One local disk in `prepare`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct PrepareDisk {
    /// Its block node: the same name in both QEMUs.
    pub node: String,
    /// Its size as the guest sees it, in bytes.
    pub size_bytes: u64,
    /// How the guest's writes follow.
    #[serde(default, skip_serializing_if = "is_background")]
    pub copy_mode: CopyMode,
    /// What of it is copied, where it has a backing file.
    #[serde(default, skip_serializing_if = "is_flatten")]
    pub chain: Chain,
    /// The guest cannot write to it: it is copied once.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub read_only: bool,
}

/// Bounds of intelligent pre-copy termination (VMbuddies 4.2).
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Termination {
    /// Stalled when a round dirtied at least (1 − ε) of what it sent.
    pub stall_epsilon: f64,
    /// … in so many rounds in a row; null: rounds never stall. Since 1.3; 0 is an error.
    pub stall_rounds: Option<u32>,
    /// At most so many rounds; null (since 1.3) for no bound.
    pub max_rounds: Option<u32>,
    /// At most so many times the guest's memory; null (since 1.3) for no bound.
    pub max_memory_factor: Option<f64>,
    /// At most so long in pre-copy, in ms; 0 for no bound.
    pub max_precopy_ms: u64,
}

impl Termination {
    /// Xen's (VMbuddies 4.2): bounds on rounds and traffic, whether or not rounds still help.
    pub const XEN: Self = Self {
        stall_epsilon: 0.1,
        stall_rounds: None,
        max_rounds: Some(30),
        max_memory_factor: Some(3.0),
        max_precopy_ms: 0,
    };
    /// QEMU's: only when what remains fits the downtime limit.
    pub const QEMU: Self = Self {
        max_rounds: None,
        max_memory_factor: None,
        ..Self::XEN
    };
}

impl Default for Termination {
    fn default() -> Self {
        Self {
            stall_rounds: Some(2),
            ..Self::XEN
        }
    }
}

/// `start`: begins pre-copy of VMs whose source is here.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct StartArgs {
    /// The run.
    pub run: Uuid,
    /// The coordinator's epoch.
    pub epoch: u64,
    /// VM name → stream address of its destination's sidecar (from PREPARED there).
    pub vms: BTreeMap<String, String>,
    /// Copy the local disks only, and hold their mirrors back when they are complete; `start` without
    /// it lets what was written since, and the memory, follow. Since 1.4.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub disks_only: bool,
}

/// `pace`: limits and weights, effective at once, also during a round.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct PaceArgs {
    /// The run.
    pub run: Uuid,
    /// The coordinator's epoch.
    pub epoch: u64,
    /// Limit of the whole group on this host in bytes per second; absent: unchanged, 0: none.
    #[serde(default)]
    pub group_bytes_per_s: Option<u64>,
    /// Per VM.
    #[serde(default)]
    pub vms: BTreeMap<String, PaceVm>,
    /// Unix time in ms at which it applies (COMMA 3.1); absent: at once.
    #[serde(default)]
    pub at_ms: Option<u64>,
}

/// One VM in `pace`.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct PaceVm {
    /// Limit in bytes per second; absent: unchanged, 0: none.
    #[serde(default)]
    pub bytes_per_s: Option<u64>,
    /// Share of what the group has, relative to the other VMs' weights; absent: unchanged.
    #[serde(default)]
    pub weight: Option<f64>,
}

/// `hold`: puts one VM into wait-and-copy now, converged or not.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct VmArgs {
    /// The run.
    pub run: Uuid,
    /// The coordinator's epoch.
    pub epoch: u64,
    /// The VM's name.
    pub vm: String,
}

/// `throttle`: slows the vCPUs of one VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ThrottleArgs {
    /// The run.
    pub run: Uuid,
    /// The coordinator's epoch.
    pub epoch: u64,
    /// The VM's name.
    pub vm: String,
    /// 0 (off) to 99 percent.
    pub percent: u8,
}

/// `throttle-disks`: limits what the guest writes to each of its local disks that move.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ThrottleDisksArgs {
    /// The run.
    pub run: Uuid,
    /// The coordinator's epoch.
    pub epoch: u64,
    /// The VM's name.
    pub vm: String,
    /// For each of its disks, in bytes per second; 0: no limit.
    pub bytes_per_s: u64,
}

/// `set-report-interval`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ReportIntervalArgs {
    /// The run.
    pub run: Uuid,
    /// The coordinator's epoch.
    pub epoch: u64,
    /// Interval of STATUS events in ms, 20 to 60000.
    pub interval_ms: u64,
}

/// `decide`: proposes a record to the register kept here; answers what is recorded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct DecideArgs {
    /// The run.
    pub run: Uuid,
    /// The VM the record is about; absent: the group.
    #[serde(default)]
    pub vm: Option<Uuid>,
    /// `commit` or `abort` for the group, `source` or `destination` for a VM.
    pub value: RecordValue,
}

/// `finish`: the destinations of these VMs run; their sources may be quit.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct FinishArgs {
    /// The run.
    pub run: Uuid,
    /// The coordinator's epoch.
    pub epoch: u64,
    /// VM names.
    pub vms: Vec<String>,
}

/// Names a run in a query.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct QueryRunArgs {
    /// The run.
    pub run: Uuid,
}

/// `recover`: the operator settles a run in doubt.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RecoverArgs {
    /// The run.
    pub run: Uuid,
    /// The VM it is about; absent: the group, or every VM here.
    #[serde(default)]
    pub vm: Option<Uuid>,
    /// What holds if no record is found: `commit` or `abort` for the group, `source` or
    /// `destination` for VMs.
    pub value: RecordValue,
    /// The host the operator vouches is off for good (the register's, or the other half's).
    pub fenced: String,
}

/// `query-vm`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct QueryVmArgs {
    /// The VM's name.
    pub vm: String,
}

fn default_lease_ms() -> u64 {
    5000
}

fn default_report_interval_ms() -> u64 {
    500
}

fn default_max_downtime_ms() -> u64 {
    300
}

/// Older sidecars refuse what they do not know.
#[allow(clippy::trivially_copy_pass_by_ref, reason = "serde wants it so")]
fn is_false(value: &bool) -> bool {
    !value
}

/// Sidecars of protocol 1.0 know no other, and refuse what they do not know.
#[allow(clippy::trivially_copy_pass_by_ref, reason = "serde wants it so")]
fn is_relay(transport: &Transport) -> bool {
    *transport == Transport::Relay
}

fn default_disk_stall_ms() -> u64 {
    2000
}

#[allow(clippy::trivially_copy_pass_by_ref, reason = "serde wants it so")]
fn is_default_disk_stall(ms: &u64) -> bool {
    *ms == default_disk_stall_ms()
}

#[allow(clippy::trivially_copy_pass_by_ref, reason = "serde wants it so")]
fn is_flatten(chain: &Chain) -> bool {
    *chain == Chain::Flatten
}

fn is_background(mode: &CopyMode) -> bool {
    *mode == CopyMode::Background
}

fn default_true() -> bool {
    true
}

/// No arguments.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct NoArgs {}

/// `qmp_capabilities`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct CapabilitiesArgs {
    /// Capabilities to enable; `oob` is the only one.
    #[serde(default)]
    pub enable: Vec<String>,
}

/// Every command with its arguments, parsed.
#[derive(Debug, Clone, PartialEq)]
pub enum Command {
    /// `qmp_capabilities`: leaves negotiation.
    Capabilities(CapabilitiesArgs),
    /// `query-muster-schema`: all commands and events with the JSON schema of their data.
    QuerySchema,
    /// `query-status`: host, versions, runs, alarms.
    QueryStatus,
    /// `query-host`: [`super::types::HostInfo`].
    QueryHost,
    /// `query-vms`: list of [`super::types::VmEntry`].
    QueryVms,
    /// `query-vm`: asks QEMU itself; [`super::types::VmInfo`].
    QueryVm(QueryVmArgs),
    /// `query-settings`: limits and intervals in force.
    QuerySettings,
    /// `query-run`: phase, decision and one report per VM half.
    QueryRun(QueryRunArgs),
    /// `query-decision`: the records kept here for a run.
    QueryDecision(QueryRunArgs),
    /// `prepare`.
    Prepare(PrepareArgs),
    /// `start`.
    Start(StartArgs),
    /// `pace`.
    Pace(PaceArgs),
    /// `hold`.
    Hold(VmArgs),
    /// `arm`: wait-and-copy at full speed, ready for a release; ARMED events follow.
    Arm(RunArgs),
    /// `disarm`: back to the paced hold.
    Disarm(RunArgs),
    /// `release`: pauses every source of the run (pre-switchover); STOPPED events follow.
    Release(RunArgs),
    /// `continue`: stop-and-copy; ARRIVED events follow.
    Continue(RunArgs),
    /// `back`: paused VMs run again and are held again (patched QEMU only); HELD events follow.
    Back(RunArgs),
    /// `decide`.
    Decide(DecideArgs),
    /// `commit`: the register says commit; destinations are continued.
    Commit(RunArgs),
    /// `abort`: rolls back as far as this half may by itself, and asks the register beyond that.
    Abort(RunArgs),
    /// `finish`.
    Finish(FinishArgs),
    /// `throttle`.
    Throttle(ThrottleArgs),
    /// `throttle-disks`.
    ThrottleDisks(ThrottleDisksArgs),
    /// `yank`: cuts the migration stream of one VM (out-of-band).
    Yank(VmArgs),
    /// `keep-alive`: renews the coordinator's lease.
    KeepAlive(RunArgs),
    /// `set-report-interval`.
    SetReportInterval(ReportIntervalArgs),
    /// `recover`.
    Recover(RecoverArgs),
    /// `forget`: the run is over everywhere; its records here go.
    Forget(RunArgs),
    /// `dirty-start`: begins to measure how a VM dirties its memory.
    DirtyStart(DirtyStartArgs),
    /// `dirty-stop`: ends a measurement.
    DirtyStop(DirtyVmArgs),
    /// `query-dirty`: [`super::dirty::DirtyState`].
    QueryDirty(DirtyVmArgs),
    /// `probe-listen`: expects a probe of the bandwidth to here.
    ProbeListen(ProbeListenArgs),
    /// `probe`: measures the bandwidth to another host; PROBED follows.
    Probe(ProbeArgs),
    /// `query-traffic`: counts for a while; [`super::traffic::TrafficCount`].
    QueryTraffic(QueryTrafficArgs),
}

#[cfg(test)]
mod tests {
    use serde_json::{from_value, json, to_value};

    use super::*;

    #[test]
    fn null_switches_a_bound_off_and_a_missing_one_has_its_default() {
        let read = |value| from_value::<Termination>(value).expect("good");
        assert_eq!(read(json!({})), Termination::default());
        let off = json!({ "stall_rounds": null, "max_rounds": null, "max_memory_factor": null });
        assert_eq!(read(off), Termination::QEMU);
        for rule in [Termination::XEN, Termination::QEMU, Termination::default()] {
            assert_eq!(read(to_value(rule).expect("JSON")), rule);
        }
    }
}
