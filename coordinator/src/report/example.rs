//! Made-up reports for the tests of tables and pictures.

use sidecar::protocol::types::{HoldReason, Phase, PhaseEntry, QemuBuild, Side, Transport};
use uuid::Uuid;

use super::predicted::{Compared, Prediction};
use super::{GroupMove, MoveReport, Outcome, SCHEMA_VERSION, VmMove};

fn us(seconds: f64) -> i64 {
    #[allow(clippy::cast_possible_truncation, reason = "made up")]
    let us = (seconds * 1e6) as i64;
    1_700_000_000_000_000 + us
}

fn vm(
    name: &str,
    memory_mib: u64,
    start: f64,
    held: Option<f64>,
    stop: f64,
    resume: f64,
) -> VmMove {
    let mut history = vec![
        PhaseEntry {
            phase: Phase::Preparing,
            at_us: us(start - 0.2),
        },
        PhaseEntry {
            phase: Phase::Precopy,
            at_us: us(start),
        },
    ];
    history.extend(held.map(|at| PhaseEntry {
        phase: Phase::Held,
        at_us: us(at),
    }));
    history.push(PhaseEntry {
        phase: Phase::Stopped,
        at_us: us(stop),
    });
    history.push(PhaseEntry {
        phase: Phase::Switching,
        at_us: us(stop + 0.004),
    });
    VmMove {
        name: name.into(),
        from: "a".into(),
        to: "b".into(),
        side: Some(Side::Destination),
        memory_bytes: memory_mib << 20,
        transport: Transport::Relay,
        qemu_build: QemuBuild::Stock,
        hold_reason: held.map(|_| HoldReason::Converged),
        held_s: held.map_or(0.0, |at| stop - at),
        rounds: Vec::new(),
        sent_bytes: memory_mib << 20,
        remaining_at_release_bytes: Some(1 << 20),
        downtime_s: Some(resume - stop),
        stopped_at_us: Some(us(stop)),
        resumed_at_us: Some(us(resume)),
        history,
        samples: Vec::new(),
        balloon: None,
        free_page_hint: false,
        error: None,
    }
}

fn report(
    policy: &str,
    total_s: f64,
    split_s: f64,
    impact_bytes: f64,
    vms: Vec<VmMove>,
) -> MoveReport {
    MoveReport {
        schema_version: SCHEMA_VERSION,
        application: "shop".into(),
        policy: policy.into(),
        result: Outcome::Committed,
        reason: None,
        started_at_us: us(0.0),
        total_s,
        sent_bytes: vms.iter().map(|vm| vm.sent_bytes).sum(),
        split_s,
        unsynchronised_s: split_s,
        synchronised_s: total_s - split_s,
        stop_skew_s: split_s,
        resume_skew_s: split_s.max(0.0012),
        impact_bytes,
        groups: vec![GroupMove {
            run: Uuid::nil(),
            vms: vms.iter().map(|vm| vm.name.clone()).collect(),
            result: Outcome::Committed,
            bandwidth_bytes_per_s: 50_000_000,
            predicted_downtime_s: Some(0.12),
        }],
        vms,
        prediction: Prediction {
            reason: None,
            completion_s: Some(Compared {
                predicted: 24.0,
                actual: Some(total_s),
                error_percent: Some((24.0 / total_s - 1.0) * 100.0),
            }),
            ..Prediction::none(String::new())
        },
        adaptations: Vec::new(),
        notices: Vec::new(),
    }
}

/// Three VMs moved by each policy.
pub(crate) fn three_policies() -> Vec<MoveReport> {
    vec![
        report(
            "sequential",
            24.1,
            20.6,
            9.1e7,
            vec![
                vm("web", 128, 0.0, None, 3.1, 3.16),
                vm("app", 256, 3.4, None, 10.2, 10.3),
                vm("db", 512, 10.6, None, 23.9, 24.1),
            ],
        ),
        report(
            "parallel",
            23.4,
            14.7,
            6.3e7,
            vec![
                vm("web", 128, 0.0, None, 8.4, 8.5),
                vm("app", 256, 0.0, None, 16.7, 16.8),
                vm("db", 512, 0.0, None, 23.2, 23.4),
            ],
        ),
        report(
            "muster",
            24.3,
            0.0,
            1.4e4,
            vec![
                vm("web", 128, 0.0, Some(21.5), 24.17, 24.29),
                vm("app", 256, 0.0, Some(22.3), 24.171, 24.291),
                vm("db", 512, 0.0, Some(23.6), 24.172, 24.3),
            ],
        ),
    ]
}

/// A move that was rolled back.
pub(crate) fn rolled_back() -> MoveReport {
    let mut report = three_policies().remove(2);
    report.result = Outcome::RolledBack;
    report.reason = Some("db at b: the destination's QEMU died & <left>".into());
    report.total_s = 12.0;
    report.synchronised_s = 12.0;
    report.prediction = Prediction::none("VM web: give `dirty-rate`".into());
    for vm in &mut report.vms {
        vm.side = Some(Side::Source);
        vm.stopped_at_us = None;
        vm.resumed_at_us = None;
        vm.downtime_s = None;
        vm.history.truncate(2);
        vm.history.push(PhaseEntry {
            phase: Phase::RollingBack,
            at_us: us(11.7),
        });
        vm.history.push(PhaseEntry {
            phase: Phase::RolledBack,
            at_us: us(12.0),
        });
    }
    report
}
