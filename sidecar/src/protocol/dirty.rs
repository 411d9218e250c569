//! Measuring how a VM dirties its memory: commands, events, and what is measured.
//!
//! A measurement belongs to no run and changes nothing of the VM, so its commands carry no `run`
//! and no `epoch`, and its events, which only the client gets that began it, no `seq`.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::event::Event;
use super::probe::ProbeEvent;

/// Shortest and longest interval, in ms.
pub const INTERVAL_MS: std::ops::RangeInclusive<u64> = 50..=60_000;
/// Shortest and longest measurement, in ms.
pub const DURATION_MS: std::ops::RangeInclusive<u64> = 50..=86_400_000;
/// Shortest and longest delay of a prediction, in ms.
pub const DELAY_MS: std::ops::RangeInclusive<u64> = 1..=3_600_000;
/// Most predictions for each interval.
pub const MAX_DELAYS: usize = 16;
/// Most cells of a heat map.
pub const MAX_HEAT_CELLS: usize = 1024;

/// `dirty-start`: begins to measure a VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct DirtyStartArgs {
    /// The VM's name.
    pub vm: String,
    /// Length of an interval in ms, 50 to 60000. A QEMU before 8.2 without the export measures whole
    /// seconds.
    #[serde(default = "default_interval_ms")]
    pub interval_ms: u64,
    /// It ends by itself after this time, in ms, 50 to 86400000.
    #[serde(default = "default_duration_ms")]
    pub duration_ms: u64,
    /// For which delays the dirty set is predicted, in ms, each 1 to 3600000; at most 16.
    #[serde(default = "default_delays_ms")]
    pub delays_ms: Vec<u64>,
    /// How many cells the heat map has, 0 to 1024; 0 for none.
    #[serde(default = "default_heat_cells")]
    pub heat_cells: usize,
    /// Whether its disks are measured, too. Since 1.6.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub disks: bool,
}

fn default_interval_ms() -> u64 {
    1000
}

fn default_duration_ms() -> u64 {
    3_600_000
}

fn default_delays_ms() -> Vec<u64> {
    vec![1000, 10_000]
}

fn default_heat_cells() -> usize {
    64
}

impl DirtyStartArgs {
    /// What is wrong with the numbers, if anything is.
    ///
    /// # Errors
    /// One line that says what is expected.
    pub fn check(&self) -> Result<(), String> {
        let outside = |name: &str, range: &std::ops::RangeInclusive<u64>| {
            format!("`{name}` is {} to {}", range.start(), range.end())
        };
        if !INTERVAL_MS.contains(&self.interval_ms) {
            return Err(outside("interval_ms", &INTERVAL_MS));
        }
        if !DURATION_MS.contains(&self.duration_ms) {
            return Err(outside("duration_ms", &DURATION_MS));
        }
        if self.delays_ms.len() > MAX_DELAYS {
            return Err(format!("`delays_ms` has at most {MAX_DELAYS} entries"));
        }
        if !self.delays_ms.iter().all(|delay| DELAY_MS.contains(delay)) {
            return Err(outside("delays_ms", &DELAY_MS));
        }
        if self.heat_cells > MAX_HEAT_CELLS {
            return Err(format!("`heat_cells` is 0 to {MAX_HEAT_CELLS}"));
        }
        Ok(())
    }
}

/// `dirty-stop`, `query-dirty`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct DirtyVmArgs {
    /// The VM's name.
    pub vm: String,
}

/// Where the figures come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum DirtySource {
    /// A patched QEMU's export of its dirty log: which pages were dirtied.
    Export,
    /// QEMU's `calc-dirty-rate`: how many; there is neither working set nor prediction nor heat.
    CalcDirtyRate,
}

/// How many pages will have been dirtied after a delay.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Predicted {
    /// The delay, in ms.
    pub delay_ms: u64,
    /// Distinct pages dirtied by then, in bytes: the mean footprint of what was measured; `None`
    /// before it was measured for as long.
    pub dirty_bytes: Option<u64>,
}

/// How hot each part of memory is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Heat {
    /// Memory that the cells divide in equal parts, in bytes: QEMU's RAM blocks one after the
    /// other, the largest first.
    pub span_bytes: u64,
    /// The share of a cell's pages that an interval dirties, in percent, rounded up; averaged with
    /// weights that halve every two seconds.
    pub percent: Vec<u8>,
}

/// How the guest writes to one of its disks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct DirtyDisk {
    /// Its block node.
    pub node: String,
    /// Distinct blocks of 4 KiB written in the interval, in bytes per second.
    pub dirty_rate_bytes_per_s: u64,
    /// The mean of all intervals.
    pub mean_dirty_rate_bytes_per_s: u64,
    /// The highest of an interval.
    pub max_dirty_rate_bytes_per_s: u64,
    /// Distinct blocks written since the measurement began, in bytes.
    pub dirty_set_bytes: u64,
}

/// What one interval says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct DirtyRound {
    /// The VM.
    pub vm: String,
    /// Where the figures come from.
    pub source: DirtySource,
    /// Number of the interval, from 1.
    pub round: u64,
    /// How long the interval was, in microseconds.
    pub duration_us: u64,
    /// Intervals between the one before and this one that were not seen.
    pub missed: u64,
    /// Distinct pages dirtied in it, in bytes.
    pub dirtied_bytes: u64,
    /// Dirty rate in it. A page counts once in an interval: longer ones show lower rates.
    pub dirty_rate_bytes_per_s: u64,
    /// The mean of all intervals.
    pub mean_dirty_rate_bytes_per_s: u64,
    /// The highest of an interval.
    pub max_dirty_rate_bytes_per_s: u64,
    /// Pages dirtied since the measurement began, in bytes (VMbuddies 5.2).
    pub working_set_bytes: Option<u64>,
    /// Whether the last two intervals found the same working set: then it is the guest's writable
    /// working set (VMbuddies 5.2).
    pub working_set_stable: Option<bool>,
    /// One for each delay that was asked for.
    pub predicted: Vec<Predicted>,
    /// Which memory is hot.
    pub heat: Option<Heat>,
    /// The disks that the guest can write, where they are measured. Since 1.6.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub disks: Vec<DirtyDisk>,
}

/// Why a measurement ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum DirtyEnd {
    /// `dirty-stop`.
    Stopped,
    /// Its time was up.
    Duration,
    /// The VM is being migrated, which has precedence.
    Migration,
    /// Something broke, or QEMU refused.
    Failed,
}

/// The events of a measurement. On the wire: `{"event": NAME, "data": {…}, "timestamp": {…}}`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "event", content = "data", rename_all = "SCREAMING_SNAKE_CASE")]
pub enum DirtyEvent {
    /// The first interval begins.
    DirtyStarted {
        /// The VM.
        vm: String,
        /// Where the figures come from.
        source: DirtySource,
        /// Length of an interval in ms, as QEMU can measure it.
        interval_ms: u64,
        /// Guest RAM in bytes.
        memory_bytes: u64,
        /// What a person should know, such as why there is only a rate.
        note: Option<String>,
    },
    /// An interval is over.
    DirtyRound(DirtyRound),
    /// Nothing more is measured, and QEMU's monitor is free.
    DirtyEnded {
        /// The VM.
        vm: String,
        /// Why.
        reason: DirtyEnd,
        /// The same in words, with what to do.
        error: Option<String>,
    },
}

impl DirtyEvent {
    /// The VM that is measured.
    #[must_use]
    pub fn vm(&self) -> &str {
        match self {
            Self::DirtyStarted { vm, .. } | Self::DirtyEnded { vm, .. } => vm,
            Self::DirtyRound(round) => &round.vm,
        }
    }
}

/// Where a measurement stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum DirtyPhase {
    /// QEMU is asked what it can do.
    Starting,
    /// Intervals are measured.
    Measuring,
    /// QEMU is told to stop.
    Ending,
}

/// What `query-dirty` says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct DirtyState {
    /// The VM.
    pub vm: String,
    /// Where the measurement stands.
    pub phase: DirtyPhase,
    /// Where the figures come from, once that is known.
    pub source: Option<DirtySource>,
    /// Length of an interval in ms.
    pub interval_ms: u64,
    /// The latest interval that is over.
    pub latest: Option<DirtyRound>,
}

/// Every event there is, of runs, measurements and probes, for the schema.
#[derive(Debug, JsonSchema)]
#[schemars(untagged)]
#[allow(dead_code, reason = "its schema is all that is used")]
pub enum AnyEvent {
    /// Of a run.
    Run(Event),
    /// Of a measurement.
    Dirty(DirtyEvent),
    /// Of a probe.
    Probe(ProbeEvent),
}
