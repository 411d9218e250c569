//! Probing the bandwidth between two hosts: commands, the event, and their bounds.
//!
//! A probe belongs to no run and changes nothing. The destination's sidecar is told to expect it
//! (`probe-listen`), then the source's to send it (`probe`); the same identifier and token pair the
//! two. What it found is an event at the source, which only the client gets that began it.

use std::ops::RangeInclusive;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// Shortest and longest probe, in ms.
pub const PROBE_MS: RangeInclusive<u64> = 10..=10_000;
/// Fewest and most bytes of a probe.
pub const PROBE_BYTES: RangeInclusive<u64> = 65_536..=1 << 30;

/// `probe-listen`: expects a probe.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ProbeListenArgs {
    /// The probe.
    pub probe: Uuid,
    /// One-time token: 64 hexadecimal digits, the same at both ends.
    pub token: String,
}

/// What `probe-listen` returns.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ProbeAddress {
    /// Where the source is to send it: `IP:PORT`.
    pub stream: String,
}

/// `probe`: measures the bandwidth to another host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ProbeArgs {
    /// The probe.
    pub probe: Uuid,
    /// One-time token: 64 hexadecimal digits, the same at both ends.
    pub token: String,
    /// Where the destination's sidecar expects it: `IP:PORT`.
    pub stream: String,
    /// It ends after this time, in ms, 10 to 10000.
    #[serde(default = "default_duration_ms")]
    pub duration_ms: u64,
    /// … or after so many bytes, 65536 to 1073741824.
    #[serde(default = "default_max_bytes")]
    pub max_bytes: u64,
}

fn default_duration_ms() -> u64 {
    500
}

fn default_max_bytes() -> u64 {
    64 << 20
}

impl ProbeArgs {
    /// What is wrong with the numbers, if anything is.
    ///
    /// # Errors
    /// One line that says what is expected.
    pub fn check(&self) -> Result<(), String> {
        let outside = |name: &str, range: &RangeInclusive<u64>| {
            format!("`{name}` is {} to {}", range.start(), range.end())
        };
        if !PROBE_MS.contains(&self.duration_ms) {
            return Err(outside("duration_ms", &PROBE_MS));
        }
        if !PROBE_BYTES.contains(&self.max_bytes) {
            return Err(outside("max_bytes", &PROBE_BYTES));
        }
        Ok(())
    }
}

/// What a probe found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Probed {
    /// The probe.
    pub probe: Uuid,
    /// Bytes that the destination's host acknowledged.
    pub acked_bytes: u64,
    /// How long they took, in microseconds.
    pub duration_us: u64,
    /// Their rate in the second half of that time, without TCP's slow start; `None` where it failed.
    pub bytes_per_s: Option<u64>,
    /// Whether the rate had stopped to grow: if not, the path may carry more.
    pub settled: bool,
    /// Smoothed round-trip time with the path full, in microseconds (TCP_INFO).
    pub rtt_us: u32,
    /// Why nothing was found, with what to do.
    pub error: Option<String>,
}

/// The events of probes. On the wire: `{"event": NAME, "data": {…}, "timestamp": {…}}`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "event", content = "data", rename_all = "SCREAMING_SNAKE_CASE")]
pub enum ProbeEvent {
    /// A probe is over.
    Probed(Probed),
}
