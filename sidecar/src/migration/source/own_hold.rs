//! The hold of a patched QEMU: what is told to it, and what it says.
//!
//! It decides by itself when pre-copy ends (with the run's bounds as parameters), sleeps while it
//! holds, and stops only when it is told to; from there it can go back.

use std::time::Duration;

use serde_json::{Value, json};

use super::{ANY_DOWNTIME_MS, RELEASE_DEADLINE, Source, Tag};
use crate::commit::SourceHalf;
use crate::hold::Sample;
use crate::migration::Now;
use crate::migration::identity::HoldBy;
use crate::protocol::event::Event;
use crate::protocol::types::{HoldReason, Phase, RoundReport};

/// The most that `switchover-hold-stall-rounds` takes.
const MOST_STALL_ROUNDS: u32 = 64;
const STALL_AHEAD: &str = "switchover-hold-stall-ahead";

impl Source {
    /// When pre-copy is to end, as the patched QEMU's parameters say it.
    #[allow(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        clippy::cast_precision_loss,
        reason = "percent, and a multiple of the memory; the casts saturate"
    )]
    pub(super) fn add_hold_parameters(&self, parameters: &mut Value) {
        let bounds = &self.settings.termination;
        // In QEMU 0 turns each of them off.
        let threshold = bounds.stall_rounds.map_or(0, |_| {
            (bounds.stall_epsilon * 100.0).round().clamp(1.0, 100.0) as u64
        });
        let factor = bounds.max_memory_factor.unwrap_or(0.0);
        let bytes = (factor * self.half.total_bytes as f64) as u64;
        parameters["switchover-hold-stall-threshold"] = json!(threshold);
        parameters["switchover-hold-stall-rounds"] =
            json!(bounds.stall_rounds.unwrap_or(1).clamp(1, MOST_STALL_ROUNDS));
        parameters["switchover-hold-max-rounds"] = json!(bounds.max_rounds.unwrap_or(0));
        parameters["switchover-hold-max-bytes"] = json!(bytes);
        // A round that is going to be in vain need not be sent. Not every series can tell.
        if self.identity.has_parameter(STALL_AHEAD) {
            parameters[STALL_AHEAD] = json!(bounds.stall_rounds.is_some());
        }
    }

    /// Makes the next end of a round the last one.
    pub(super) fn ask_hold(&mut self, now: Now) {
        if !std::mem::replace(&mut self.hold_asked, true) {
            let parameters =
                json!({ "switchover-hold-max-rounds": 1, "switchover-hold-max-bytes": 1 });
            self.tune(now, parameters);
        }
    }

    /// What is held in vain sends all that is dirtied, or rests between two transfers: QEMU rests while
    /// more than its downtime-limit allows is left (`hold_send` in QEMU's migration/switchover-hold.c).
    pub(super) fn resend(&mut self, now: Now, on: bool) {
        if !self.settings.resend {
            return;
        }
        let limit = if on {
            ANY_DOWNTIME_MS
        } else {
            crate::hold::millis(self.settings.max_downtime)
        };
        self.tune(now, json!({ "downtime-limit": limit }));
    }

    /// Synchronises every few ms from now on, or as before.
    pub(super) fn arm_hold(&mut self, now: Now, enable: bool) {
        let tag = if enable { Tag::Arm } else { Tag::Disarm };
        self.resend(now, !enable);
        let arguments = json!({ "enable": enable });
        self.send(now, tag, "migrate-switchover-arm", arguments);
    }

    /// `back`: the paused VM runs again and is held again.
    ///
    /// # Errors
    /// Its QEMU cannot.
    pub fn back(&mut self, now: Now) -> Result<(), &'static str> {
        if self.hold != HoldBy::Qemu {
            return Err("only a patched QEMU goes back from a release; `abort` cancels it");
        }
        let may = self.state == SourceHalf::Reversible && !self.going_back && !self.draining;
        if self.half.phase() == Phase::Stopped && may {
            self.going_back = true;
            // QEMU says that it holds after its next synchronisation.
            self.release_by = Some(now.mono + RELEASE_DEADLINE);
            self.send(now, Tag::Back, "migrate-switchover-back", json!({}));
        }
        Ok(())
    }

    /// MIGRATION_ROUND.
    pub(super) fn round_ended(&mut self, data: &Value) {
        let number = |name: &str| data[name].as_u64().unwrap_or(0);
        let report = RoundReport {
            round: number("round"),
            sent_bytes: number("sent-bytes"),
            dirtied_bytes: number("dirtied-bytes"),
            duration_ms: number("duration-ms"),
        };
        if self
            .rounds
            .as_mut()
            .is_some_and(|rounds| rounds.add(report))
        {
            let vm = self.half.name.clone();
            self.half.tell(Event::Round { vm, round: report });
        }
    }

    /// MIGRATION_SWITCHOVER_HELD: after pre-copy, after a `back`, or instead of stopping.
    pub(super) fn qemu_holds(&mut self, now: Now, data: &Value) {
        if self.cancelling {
            return;
        }
        let reason = match data["reason"].as_str() {
            _ if self.hold_asked => HoldReason::Asked,
            Some("converged") => HoldReason::Converged,
            _ if self
                .rounds
                .as_ref()
                .is_some_and(|r| r.is_bounded(self.last) || !r.looks_for_stalls()) =>
            {
                HoldReason::Bounded
            }
            _ => HoldReason::Stalled,
        };
        self.going_back = false;
        self.release_by = None;
        self.armed_at = None;
        self.next_armed = None;
        let total_bytes = self.half.total_bytes;
        let sample = self.last.get_or_insert(Sample {
            syncs: 0,
            sent_bytes: 0,
            remaining_bytes: 0,
            dirty_rate_bytes_per_s: 0,
            total_bytes,
        });
        sample.remaining_bytes = data["remaining"].as_u64().unwrap_or(0);
        sample.dirty_rate_bytes_per_s = data["dirty-rate"].as_u64().unwrap_or(0);
        self.next_poll = self.next_poll.or(Some(now.mono));
        self.enter_hold(now, reason);
    }
}

/// What `query-migrate` says of a hold is fresher than its counters: taken over, and drawn on to
/// this moment.
pub(super) fn refine(sample: Sample, value: &Value) -> Sample {
    let hold = &value["switchover-hold"];
    let number = |name: &str| hold[name].as_u64();
    let (Some(remaining), Some(rate)) = (number("remaining"), number("dirty-rate")) else {
        return sample;
    };
    let age = Duration::from_millis(number("sync-age-ms").unwrap_or(0).min(60_000));
    let since = u128::from(rate) * age.as_millis() / 1000;
    let since = u64::try_from(since).unwrap_or(u64::MAX);
    Sample {
        syncs: number("syncs").unwrap_or(sample.syncs),
        remaining_bytes: remaining.saturating_add(since).min(sample.total_bytes),
        dirty_rate_bytes_per_s: rate,
        ..sample
    }
}
