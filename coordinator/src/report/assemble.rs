//! From the conductor's groups to a [`MoveReport`]: totals, skews, split time, impact.

use rate_limiter::Bytes;
use sidecar::protocol::types::{QemuBuild, Side, Transport};

use super::predicted::{Actual, Prediction, predict};
use super::{GroupMove, MoveReport, Outcome, SCHEMA_VERSION, VmMove};
use crate::application::{Application, Policy, VmId};
use crate::conductor::{Purpose, Started};

/// When things happened, as the coordinator's clock saw it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Times {
    /// First `start`: unix time in microseconds; `None` if nothing was started.
    pub started_at_us: Option<i64>,
    /// End of the move: unix time in microseconds.
    pub ended_at_us: i64,
}

/// Builds the report.
#[must_use]
pub fn assemble(
    app: &Application,
    policy: Policy,
    outcome: Outcome,
    started: &[Started],
    times: Times,
) -> MoveReport {
    let host_name = |host| app.host(host).name.clone();
    let mut vms: Vec<VmMove> = app.vm_ids().map(|id| at_home(app, id)).collect();
    let mut sent_bytes = 0;
    let mut notices = Vec::new();
    let mut reason = None;
    for group in started {
        let back = group.purpose == Purpose::Return;
        for (id, moved) in group.group.vm_moves(host_name) {
            sent_bytes += moved.sent_bytes;
            let entry = &mut vms[id.0];
            if back {
                entry.side = moved.side.map(other);
                entry.error = moved.error.or(entry.error.take());
            } else {
                *entry = moved;
            }
        }
        notices.extend(group.group.notices().iter().cloned());
        notices.extend(group.group.not_given_back().map(|vm| {
            format!(
                "{vm}: what was taken from its guest is not given back yet; its sidecar goes on trying"
            )
        }));
        reason = reason.or_else(|| group.group.reason().map(str::to_owned));
    }
    let begun = times.started_at_us.unwrap_or(times.ended_at_us);
    let last_running = vms.iter().filter_map(|vm| vm.resumed_at_us).max();
    let ended = match outcome {
        Outcome::Committed => last_running.unwrap_or(times.ended_at_us),
        _ => times.ended_at_us,
    };
    let groups: Vec<GroupMove> = started
        .iter()
        .map(|group| group.group.group_move())
        .collect();
    let total_s = seconds(begun, ended).max(0.0);
    let split_s = split(&vms, times.ended_at_us);
    let impact_bytes = impact(app, &vms);
    let actual = Actual {
        started_at_us: begun,
        completion_s: total_s,
        traffic_bytes: float(sent_bytes),
        impact_bytes,
        vms: &vms,
        groups: &groups,
    };
    let left = |vm: &VmMove| vm.balloon.and_then(|balloon| balloon.during_bytes);
    let memory: Vec<Bytes> = vms
        .iter()
        .map(|vm| Bytes(left(vm).unwrap_or(vm.memory_bytes)))
        .collect();
    let prediction = Prediction::beside(
        predict(app, policy, &memory),
        Some(&actual).filter(|_| outcome == Outcome::Committed),
    );
    MoveReport {
        schema_version: SCHEMA_VERSION,
        application: app.name.clone(),
        policy: policy.to_string(),
        result: outcome,
        reason: if outcome == Outcome::Committed {
            None
        } else {
            reason
        },
        started_at_us: begun,
        total_s,
        sent_bytes,
        split_s,
        unsynchronised_s: split_s,
        synchronised_s: (total_s - split_s).max(0.0),
        stop_skew_s: skew(vms.iter().map(|vm| vm.stopped_at_us)),
        resume_skew_s: skew(vms.iter().map(|vm| vm.resumed_at_us)),
        impact_bytes,
        prediction,
        vms,
        groups,
        adaptations: Vec::new(),
        notices,
    }
}

fn at_home(app: &Application, id: VmId) -> VmMove {
    let vm = app.vm(id);
    VmMove {
        name: vm.name.clone(),
        from: app.host(vm.from).name.clone(),
        to: app.host(vm.to).name.clone(),
        side: Some(Side::Source),
        memory_bytes: vm.profile.memory.map_or(0, |bytes| bytes.0),
        transport: Transport::Relay,
        qemu_build: QemuBuild::Stock,
        hold_reason: None,
        held_s: 0.0,
        rounds: Vec::new(),
        sent_bytes: 0,
        remaining_at_release_bytes: None,
        downtime_s: None,
        stopped_at_us: None,
        resumed_at_us: None,
        history: Vec::new(),
        samples: Vec::new(),
        balloon: None,
        free_page_hint: false,
        error: None,
    }
}

fn other(side: Side) -> Side {
    match side {
        Side::Source => Side::Destination,
        Side::Destination => Side::Source,
    }
}

#[allow(clippy::cast_precision_loss, reason = "microseconds of one move")]
fn seconds(from_us: i64, to_us: i64) -> f64 {
    to_us.saturating_sub(from_us) as f64 / 1e6
}

#[allow(clippy::cast_precision_loss, reason = "bytes of one move")]
fn float(bytes: u64) -> f64 {
    bytes as f64
}

fn skew(times: impl Iterator<Item = Option<i64>>) -> f64 {
    let times: Vec<i64> = times.flatten().collect();
    match (times.iter().min(), times.iter().max()) {
        (Some(first), Some(last)) => seconds(*first, *last),
        _ => 0.0,
    }
}

/// From the first RESUME at a destination until no VM runs at its source any more.
fn split(vms: &[VmMove], ended_at_us: i64) -> f64 {
    let arrived = |vm: &VmMove| vm.side == Some(Side::Destination);
    let first = vms
        .iter()
        .filter(|vm| arrived(vm))
        .filter_map(|vm| vm.resumed_at_us)
        .min();
    let last = vms
        .iter()
        .map(|vm| {
            if arrived(vm) {
                vm.stopped_at_us.unwrap_or(i64::MIN)
            } else {
                ended_at_us
            }
        })
        .max();
    match (first, last) {
        (Some(first), Some(last)) if vms.len() > 1 => seconds(first, last.max(first)),
        _ => 0.0,
    }
}

/// COMMA's Eq. 1: Σ `|t_i − t_j|·TM[i,j]`.
#[allow(clippy::cast_precision_loss, reason = "rates far below 2^53")]
fn impact(app: &Application, vms: &[VmMove]) -> f64 {
    app.traffic
        .iter()
        .filter_map(|traffic| {
            let [a, b] = traffic.between.map(|id| vms[id.0].resumed_at_us);
            Some(seconds(a?, b?).abs() * traffic.rate.0 as f64)
        })
        .sum()
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn app() -> Application {
        let text = r#"
            version = 1
            application = { name = "shop", bandwidth = "50MB/s" }
            host = [{ name = "a", control = "unix:/a" }, { name = "b", control = "unix:/b" }]
            vm = [
              { name = "web", uuid = "00000000-0000-0000-0000-000000000001", from = "a", to = "b" },
              { name = "db", uuid = "00000000-0000-0000-0000-000000000002", from = "a", to = "b" },
            ]
            traffic = [{ between = ["web", "db"], rate = "1MB/s" }]
        "#;
        Application::parse(text, Path::new("test")).expect("good")
    }

    fn moved(stop: i64, resume: i64) -> VmMove {
        let mut vm = at_home(&app(), VmId(0));
        vm.side = Some(Side::Destination);
        vm.stopped_at_us = Some(stop);
        vm.resumed_at_us = Some(resume);
        vm
    }

    #[test]
    fn split_is_zero_when_all_stop_before_the_first_resumes() {
        let together = [moved(1_000_000, 1_200_000), moved(1_010_000, 1_201_000)];
        assert_eq!(split(&together, 9_000_000), 0.0);
        let apart = [moved(1_000_000, 1_200_000), moved(3_200_000, 3_400_000)];
        assert_eq!(split(&apart, 9_000_000), 2.0);
        let mut half = [moved(1_000_000, 1_200_000), moved(0, 0)];
        half[1].side = Some(Side::Source);
        half[1].resumed_at_us = None;
        assert_eq!(split(&half, 2_200_000), 1.0);
    }

    #[test]
    fn impact_is_equation_1() {
        let vms = [moved(0, 1_200_000), moved(0, 3_400_000)];
        assert!((impact(&app(), &vms) - 2.2e6).abs() < 1e-6);
    }

    #[test]
    fn an_application_that_never_began_is_at_home() {
        let report = assemble(
            &app(),
            Policy::Muster,
            Outcome::RolledBack,
            &[],
            Times::default(),
        );
        assert!(report.vms.iter().all(|vm| vm.side == Some(Side::Source)));
        assert_eq!(report.total_s, 0.0);
        let reason = report.prediction.reason.expect("no profiles");
        assert!(reason.contains("`dirty-rate`"), "{reason}");
    }
}
