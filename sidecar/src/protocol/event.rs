//! The events of the control protocol.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::types::{Decision, HoldReason, QemuBuild, Role, RoundReport, Side, VmReport};

/// Every event. On the wire: `{"event": NAME, "data": {"run", "seq", …}, "timestamp": {…}}`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "event", content = "data", rename_all = "SCREAMING_SNAKE_CASE")]
pub enum Event {
    /// A half is ready. The destination's carries where the stream goes.
    Prepared {
        /// The VM.
        vm: String,
        /// Which half.
        role: Role,
        /// Destination: address for `start`.
        stream: Option<String>,
        /// Guest RAM in bytes.
        memory_bytes: u64,
        /// QEMU's version.
        qemu_version: String,
        /// Whether it is a patched one.
        #[serde(default)]
        qemu_build: QemuBuild,
    },
    /// Every local disk that moves with the VM was copied once. Since 1.4.
    DisksCopied {
        /// The VM.
        vm: String,
        /// Written meanwhile, and not sent yet, in bytes.
        remaining_bytes: u64,
    },
    /// A pre-copy round ended.
    Round {
        /// The VM.
        vm: String,
        /// What it sent and what was dirtied meanwhile.
        #[serde(flatten)]
        round: RoundReport,
    },
    /// The VM reached its pseudo-synchropoint and is in wait-and-copy.
    Held {
        /// The VM.
        vm: String,
        /// Why.
        reason: HoldReason,
        /// Dirty memory and what is on its way, in bytes.
        remaining_bytes: u64,
        /// In bytes per second.
        dirty_rate_bytes_per_s: u64,
    },
    /// In answer to `arm`: at full speed, and what remains now.
    Armed {
        /// The VM.
        vm: String,
        /// Dirty memory and what is on its way, in bytes.
        remaining_bytes: u64,
        /// In bytes per second.
        dirty_rate_bytes_per_s: u64,
    },
    /// The source is paused (pre-switchover).
    Stopped {
        /// The VM.
        vm: String,
        /// What the link still has to carry: dirty memory and what is on its way, in bytes.
        remaining_bytes: u64,
        /// QEMU's STOP event: unix time in microseconds.
        stopped_at_us: i64,
    },
    /// Stop-and-copy began.
    Switching {
        /// The VM.
        vm: String,
    },
    /// This half is complete; the VM has arrived when both are.
    Arrived {
        /// The VM.
        vm: String,
        /// Which half.
        role: Role,
    },
    /// The destination runs (role destination), or the source's process is gone (role source).
    Committed {
        /// The VM.
        vm: String,
        /// Which half.
        role: Role,
        /// Destination: QEMU's RESUME event, unix time in microseconds.
        resumed_at_us: Option<i64>,
    },
    /// The source runs again as before (role source), or the destination's process is gone.
    RolledBack {
        /// The VM.
        vm: String,
        /// Which half.
        role: Role,
        /// Why, where it is known.
        reason: Option<String>,
    },
    /// The VM ended on another side than the rest of its group: it was its last complete copy.
    Diverged {
        /// The VM.
        vm: String,
        /// Where it runs.
        side: Side,
        /// Why.
        reason: String,
    },
    /// Something broke. Before `continue` the source rolls back by itself; after it the register
    /// is asked.
    Failed {
        /// The VM.
        vm: String,
        /// Which half.
        role: Role,
        /// One line: what was expected, what was found, what to do.
        error: String,
        /// Whether this half is lost for good (its QEMU is dead).
        lost: bool,
        /// Whether it follows from a stream that was cut: another fault, told by another half, is
        /// probably the cause.
        #[serde(default)]
        secondary: bool,
    },
    /// The coordinator is silent or gone; the register will be asked when the lease ends.
    CoordinatorLost {
        /// What was noticed.
        error: String,
    },
    /// The register cannot be reached; the VMs stay paused until it can.
    InDoubt {
        /// What was tried.
        error: String,
    },
    /// A decision became known here.
    Decided {
        /// Which.
        decision: Decision,
    },
    /// vCPU throttle changed.
    Throttled {
        /// The VM.
        vm: String,
        /// In percent; 0: off.
        percent: u8,
    },
    /// Periodic report of every half in the run here.
    Status {
        /// One per half.
        vms: Vec<VmReport>,
    },
    /// Every half of the run here is final.
    RunEnded {
        /// One per half.
        vms: Vec<VmReport>,
    },
}

/// An event as it stands on the wire.
#[derive(Debug, Clone, PartialEq)]
pub struct Envelope {
    /// The run it belongs to.
    pub run: Uuid,
    /// Counts up by one per event of a run and sidecar.
    pub seq: u64,
    /// Unix time in microseconds.
    pub at_us: i64,
    /// The event.
    pub event: Event,
}
