//! Counting what VMs send each other: the command, its answer, and its bounds.
//!
//! It belongs to no run and touches no guest: frames are counted as they enter the host's bridges.
//! One that passes several hosts is counted on each.

use std::ops::RangeInclusive;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Shortest and longest count, in ms.
pub const COUNT_MS: RangeInclusive<u64> = 100..=60_000;

/// `query-traffic`: counts for a while; the answer comes when it is over.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct QueryTrafficArgs {
    /// For how long, in ms, 100 to 60000.
    pub duration_ms: u64,
}

impl QueryTrafficArgs {
    /// What is wrong with the number, if anything is.
    ///
    /// # Errors
    /// One line that says what is expected.
    pub fn check(&self) -> Result<(), String> {
        if COUNT_MS.contains(&self.duration_ms) {
            return Ok(());
        }
        let (least, most) = (COUNT_MS.start(), COUNT_MS.end());
        Err(format!("`duration_ms` is {least} to {most}"))
    }
}

/// What was counted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct TrafficCount {
    /// How long it was counted, in microseconds.
    pub duration_us: u64,
    /// By sender and receiver; those that sent nothing are left out.
    pub pairs: Vec<PairCount>,
}

/// What one hardware address sent to another.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct PairCount {
    /// The sender's hardware address, `52:54:00:12:34:56`.
    pub from: String,
    /// The receiver's.
    pub to: String,
    /// Bytes, with Ethernet headers; a frame of segmentation offload counts as one.
    pub bytes: u64,
    /// Frames.
    pub packets: u64,
}
