//! Runs in virtual time: the real machines against a pretended QEMU and register. No sockets, no
//! sleeps; time jumps to the next deadline.

mod balloon;
mod disks;
mod patched;
mod paused;
mod qemu;
mod world;

use std::time::{Duration, Instant};

use qemu::{MIB, Qemu};
use sidecar::migration::destination::{Destination, Place};
use sidecar::migration::source::{Settings, Source};
use sidecar::migration::{Now, Output};
use sidecar::protocol::command::Termination;
use sidecar::protocol::event::Event;
use sidecar::protocol::types::{
    Decision, HoldReason, Phase, RecordKey, RecordValue, Side, Transport,
};
use sidecar::run::{Ask, Run, RunOutput, VmHalf};
use uuid::Uuid;
use world::{Register, VM, World, settings};

const WAY: [Phase; 7] = [
    Phase::Prepared,
    Phase::Precopy,
    Phase::Held,
    Phase::Armed,
    Phase::Stopped,
    Phase::Switching,
    Phase::Arrived,
];

#[test]
fn a_source_goes_the_whole_way() {
    let mut world = World::source(true);
    for phase in WAY {
        let mut fresh = World::source(true);
        fresh.up_to(phase);
        assert_eq!(fresh.phase(), phase);
    }
    world.up_to(Phase::Arrived);
    assert!(world.qemu.capabilities["switchover-ack"]);
    assert!(world.qemu.capabilities["pause-before-switchover"]);
    assert!(world.has(|e| matches!(
        e,
        Event::Held {
            reason: HoldReason::Converged,
            ..
        }
    )));
    assert!(world.has(
        |e| matches!(e, Event::Stopped { remaining_bytes, .. } if *remaining_bytes == 5 * MIB)
    ));
    world.run.learn(RecordKey::Group, RecordValue::Commit);
    world.settle();
    assert_eq!(
        world.count("quit"),
        0,
        "its destination is not known to run yet"
    );
    world.run.finish(vec!["db".into()]);
    world.settle();
    assert_eq!(world.count("quit"), 1);
    let now = world.now;
    world.src().process_gone(now);
    world.settle();
    assert_eq!(world.phase(), Phase::Committed);
    assert!(world.run.has_ended());
}

#[test]
fn a_completion_that_is_told_before_the_run_state_follows_arrives() {
    let mut world = World::source(true);
    world.up_to(Phase::Switching);
    world.qemu.completes("finish-migrate");
    world.pass(Duration::from_millis(20));
    assert_eq!(world.phase(), Phase::Switching);
    world.qemu.status = "postmigrate".into();
    world.pass(Duration::from_millis(20));
    assert_eq!(world.phase(), Phase::Arrived);
}

#[test]
fn an_abort_that_comes_after_the_completion_resumes_the_source() {
    let mut world = World::source(true);
    world.up_to(Phase::Switching);
    // Its event was lost on the way.
    world.qemu.status = "postmigrate".into();
    world.qemu.migration = "completed".into();
    world.run.learn(RecordKey::Group, RecordValue::Abort);
    world.settle();
    world.pass(Duration::from_secs(1));
    assert_eq!(world.phase(), Phase::RolledBack);
    assert_eq!(world.qemu.status, "running");
}

#[test]
fn an_abort_in_any_phase_restores_everything() {
    for phase in WAY {
        let mut world = World::source(true);
        let (capabilities, parameters) = (
            world.qemu.capabilities.clone(),
            world.qemu.parameters.clone(),
        );
        world.up_to(phase);
        world.run.abort();
        world.pass(Duration::from_secs(3));
        assert_eq!(world.phase(), Phase::RolledBack, "{phase}");
        assert_eq!(world.qemu.status, "running", "{phase}");
        assert_eq!(world.qemu.capabilities, capabilities, "{phase}");
        assert_eq!(world.qemu.parameters, parameters, "{phase}");
        let asked = world.group.is_some();
        assert_eq!(
            asked,
            phase == Phase::Arrived,
            "{phase}: the register decides once arrived"
        );
        assert!(world.run.has_ended(), "{phase}");
    }
}

#[test]
fn a_silent_coordinator_never_leaves_a_vm_paused_while_the_register_answers() {
    for phase in WAY {
        let mut world = World::source(true);
        world.up_to(phase);
        world.heard = false;
        world.pass(Duration::from_secs(4));
        // Stop-and-copy has a deadline of its own, which comes first.
        if phase != Phase::Switching {
            let lost = world.has(|e| matches!(e, Event::CoordinatorLost { .. }));
            assert!(lost, "{phase}");
            assert_eq!(
                world.phase(),
                phase,
                "nothing is done before the lease ends"
            );
        }
        world.pass(Duration::from_secs(3));
        assert_eq!(world.qemu.status, "running", "{phase}");
        assert_eq!(world.phase(), Phase::RolledBack, "{phase}");
    }
}

#[test]
fn what_the_register_says_counts() {
    let mut world = World::source(true);
    world.up_to(Phase::Arrived);
    world.group = Some(RecordValue::Commit);
    world.heard = false;
    world.pass(Duration::from_secs(10));
    assert_eq!(world.run.decision(), Some(Decision::Commit));
    assert_eq!(world.count("cont"), 0);
    assert_eq!(world.count("quit"), 0);
    world.vm = Some(RecordValue::Destination);
    world.pass(Duration::from_secs(1));
    assert_eq!(world.count("quit"), 1);
}

#[test]
fn without_a_register_it_stays_paused_and_in_doubt() {
    let mut world = World::source(true);
    world.up_to(Phase::Arrived);
    world.register = Register::Silent;
    world.heard = false;
    world.pass(Duration::from_secs(60));
    assert_eq!(world.phase(), Phase::InDoubt);
    assert!(world.run.is_in_doubt());
    assert!(world.has(|e| matches!(e, Event::InDoubt { .. })));
    assert_eq!(world.count("cont") + world.count("quit"), 0);
    world.register = Register::Works;
    world.pass(Duration::from_secs(2));
    assert_eq!(world.phase(), Phase::RolledBack);
    assert_eq!(world.qemu.status, "running");
    assert_eq!(world.vm, Some(RecordValue::Source));
}

#[test]
fn a_hanging_qemu_is_noticed_within_three_seconds() {
    let phases = [Phase::Prepared, Phase::Precopy, Phase::Held, Phase::Armed];
    for phase in phases {
        let mut world = World::source(true);
        world.up_to(phase);
        world.qemu.hung = true;
        world.outputs.clear();
        world.pass(Duration::from_secs(3));
        assert!(
            world.has(|e| matches!(e, Event::Failed { lost: false, .. })),
            "{phase}"
        );
        assert!(world.outputs.contains(&Output::CutStream), "{phase}");
        assert_eq!(world.phase(), Phase::RollingBack);
    }
}

#[test]
fn a_dead_source_is_lost_or_runs_at_its_destination() {
    let mut world = World::source(true);
    world.up_to(Phase::Held);
    let now = world.now;
    world.src().process_gone(now);
    world.settle();
    assert!(world.has(|e| matches!(e, Event::Failed { lost: true, .. })));
    assert_eq!(world.phase(), Phase::Failed);
    let mut world = World::source(true);
    world.up_to(Phase::Arrived);
    let now = world.now;
    world.src().process_gone(now);
    world.run.abort();
    world.pass(Duration::from_secs(2));
    assert_eq!(world.vm, Some(RecordValue::Destination));
    // That the VM runs there is the destination's to say.
    assert!(!world.has(|e| matches!(e, Event::Diverged { .. })));
    assert_eq!(world.phase(), Phase::Failed);
}

#[test]
fn a_held_vm_is_paced_near_its_dirty_rate() {
    let mut world = World::source(true);
    world.up_to(Phase::Held);
    world.qemu.remaining = MIB;
    world.pass(Duration::from_secs(3));
    let limit = world.qemu.parameters["max-bandwidth"]
        .as_u64()
        .expect("a number");
    let dirty = 2560 * 4096;
    assert!(limit.abs_diff(dirty) < dirty / 4, "{limit}");
    let now = world.now;
    world.src().arm(now);
    world.pass(Duration::from_millis(300));
    assert!(world.qemu.parameters["max-bandwidth"].as_u64() > Some(1 << 39));
    let now = world.now;
    world.src().disarm(now);
    world.pass(Duration::from_millis(300));
    assert_eq!(world.phase(), Phase::Held);
    assert_eq!(world.qemu.parameters["downtime-limit"], 300);
}

#[test]
fn without_hold_it_switches_over_by_itself() {
    let mut world = World::source(false);
    world.up_to(Phase::Precopy);
    assert!(!world.qemu.capabilities["switchover-ack"]);
    world.qemu.status = "finish-migrate".into();
    world.qemu.event("STOP", serde_json::Value::Null);
    world.qemu.migrates("device");
    world.settle();
    assert_eq!(world.phase(), Phase::Switching);
    world.qemu.completes("postmigrate");
    world.settle();
    assert_eq!(world.phase(), Phase::Arrived);
}

#[test]
fn a_throttle_is_set_and_taken_off() {
    let mut world = World::source(true);
    world.up_to(Phase::Held);
    for percent in [40, 0] {
        let now = world.now;
        world.src().throttle(now, percent).expect("allowed");
        world.settle();
        assert!(world.has(|e| matches!(e, Event::Throttled { percent: p, .. } if *p == percent)));
    }
    assert_eq!(world.qemu.parameters["max-cpu-throttle"], 1);
}

fn arrived() -> World {
    let mut world = World::destination();
    world.pass(Duration::from_millis(100));
    assert_eq!(world.phase(), Phase::Prepared);
    world.qemu.migrates("active");
    world.settle();
    world.qemu.completes("inmigrate");
    world.settle();
    world
}

#[test]
fn a_destination_is_never_continued_while_it_loads() {
    let mut world = arrived();
    world.run.learn(RecordKey::Group, RecordValue::Commit);
    world.pass(Duration::from_millis(20));
    assert_eq!(world.count("cont"), 0, "it is still inmigrate");
    world.qemu.status = "paused".into();
    world.pass(Duration::from_millis(50));
    assert_eq!(world.count("cont"), 1);
    assert!(world.has(|e| matches!(
        e,
        Event::Committed {
            resumed_at_us: Some(_),
            ..
        }
    )));
    world.pass(Duration::from_secs(1));
    assert_eq!(world.vm, Some(RecordValue::Destination));
    assert_eq!(world.phase(), Phase::Committed);
    assert!(
        !world.qemu.capabilities.values().any(|state| *state),
        "capabilities as before"
    );
}

#[test]
fn a_loaded_destination_is_killed_only_when_its_source_has_it_back() {
    let mut world = arrived();
    world.qemu.status = "paused".into();
    world.pass(Duration::from_millis(50));
    assert_eq!(world.phase(), Phase::Arrived);
    world.run.abort();
    world.pass(Duration::from_secs(5));
    assert_eq!(world.group, Some(RecordValue::Abort));
    assert_eq!(world.count("quit"), 0);
    world.vm = Some(RecordValue::Source);
    world.pass(Duration::from_secs(2));
    assert_eq!(world.count("quit"), 1);
    assert_eq!(world.phase(), Phase::RolledBack);
}

#[test]
fn the_last_complete_copy_runs() {
    let mut world = arrived();
    world.qemu.status = "paused".into();
    world.pass(Duration::from_millis(50));
    world.run.abort();
    world.pass(Duration::from_secs(1));
    world.vm = Some(RecordValue::Destination);
    world.pass(Duration::from_secs(2));
    assert_eq!(world.qemu.status, "running");
    assert!(world.has(|e| matches!(
        e,
        Event::Diverged {
            side: Side::Destination,
            ..
        }
    )));
}

#[test]
fn a_destination_that_dies_before_cont_gives_the_vm_back() {
    let mut world = arrived();
    world.qemu.status = "paused".into();
    world.pass(Duration::from_millis(50));
    let now = world.now;
    world.dst().process_gone(now);
    world.group = Some(RecordValue::Commit);
    world.run.learn(RecordKey::Group, RecordValue::Commit);
    world.pass(Duration::from_secs(2));
    assert_eq!(world.vm, Some(RecordValue::Source));
    assert!(world.has(|e| matches!(
        e,
        Event::Diverged {
            side: Side::Source,
            ..
        }
    )));
}

fn without_ack(qemu: &mut Qemu) {
    qemu.capabilities.remove("switchover-ack");
}

#[test]
fn the_wrong_qemu_is_refused_in_one_line() {
    type Spoil = fn(&mut Qemu);
    let cases: [(Spoil, &str); 3] = [
        (|qemu| qemu.uuid = Uuid::from_u128(8), "UUID"),
        (|qemu| qemu.status = "shutdown".into(), "shutdown"),
        (without_ack, "8.1"),
    ];
    for (spoil, word) in cases {
        let mut world = World::source(true);
        spoil(&mut world.qemu);
        world.pass(Duration::from_millis(100));
        let said = world.run.halves[0]
            .half()
            .error()
            .unwrap_or_default()
            .to_owned();
        assert!(said.contains(word), "{word}: {said}");
        assert_eq!(world.phase(), Phase::RolledBack);
        assert_eq!(world.count("migrate-set-capabilities"), 0);
    }
}

#[test]
fn an_operator_ends_a_run_whose_register_is_gone() {
    let mut world = World::source(true);
    world.up_to(Phase::Arrived);
    world.register = Register::Silent;
    world.heard = false;
    world.pass(Duration::from_secs(10));
    assert_eq!(world.phase(), Phase::InDoubt);
    world.run.vouch(RecordKey::Group, RecordValue::Abort);
    world.pass(Duration::from_secs(2));
    assert_eq!(world.phase(), Phase::RolledBack);
    assert_eq!(world.qemu.status, "running");

    let mut world = arrived();
    world.qemu.status = "paused".into();
    world.register = Register::Silent;
    world.heard = false;
    world.pass(Duration::from_secs(10));
    world.run.vouch(RecordKey::Group, RecordValue::Abort);
    world.pass(Duration::from_secs(10));
    assert_eq!(
        world.count("quit"),
        0,
        "whether its source runs is not vouched for"
    );
    world.run.vouch(RecordKey::Vm(VM), RecordValue::Source);
    world.pass(Duration::from_secs(2));
    assert_eq!(world.phase(), Phase::RolledBack);

    let mut world = arrived();
    world.qemu.status = "paused".into();
    world.register = Register::Silent;
    world.heard = false;
    world.pass(Duration::from_secs(10));
    world.run.vouch(RecordKey::Group, RecordValue::Commit);
    world.pass(Duration::from_secs(2));
    assert_eq!(world.phase(), Phase::Committed);
    assert_eq!(world.qemu.status, "running");
}

#[test]
fn an_operator_does_not_overrule_the_register() {
    let mut world = World::source(true);
    world.up_to(Phase::Arrived);
    world.group = Some(RecordValue::Commit);
    world.run.vouch(RecordKey::Group, RecordValue::Abort);
    world.pass(Duration::from_secs(5));
    assert_eq!(world.run.decision(), Some(Decision::Commit));
    assert_eq!(world.count("cont"), 0);
}

#[test]
fn a_source_that_is_not_finalized_yet_is_continued_a_moment_later() {
    for (refusals, at_once) in [(3, true), (u32::MAX, false)] {
        let mut world = World::source(true);
        world.up_to(Phase::Switching);
        world.qemu.not_finalized = refusals;
        world.qemu.migrates("failed");
        world.qemu.status = "finish-migrate".into();
        world.pass(Duration::from_millis(500));
        assert_eq!(world.qemu.status == "running", at_once);
        world.pass(Duration::from_secs(3));
        assert_eq!(world.phase() == Phase::RolledBack, at_once);
        let mut outputs = world.outputs.iter();
        let is_told = outputs.any(|output| matches!(output, Output::Alarm { lasts: false, .. }));
        assert_eq!(is_told, !at_once);
        // It is never given up, but tried seldom.
        let tries = world.count("cont");
        world.pass(Duration::from_secs(4));
        let tries = world.count("cont") - tries;
        assert!(
            if at_once {
                tries == 0
            } else {
                (3..=5).contains(&tries)
            },
            "{tries}"
        );
        world.qemu.not_finalized = 0;
        world.pass(Duration::from_secs(2));
        assert_eq!(world.phase(), Phase::RolledBack);
        assert_eq!(world.qemu.status, "running");
    }
}
