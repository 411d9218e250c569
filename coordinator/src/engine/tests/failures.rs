use super::*;
use crate::report::Outcome;
use sidecar::protocol::types::{Decision, Phase, Side, VmReport};

const BEFORE_CONTINUE: [&str; 4] = ["preparing", "precopy", "held", "stopping"];
const ALL: [&str; 5] = ["preparing", "precopy", "held", "stopping", "switching"];

fn at(phase: &str) -> Script {
    let mut s = Script::new(spec(&["web", "db"], true));
    s.up_to(phase);
    s.took();
    s
}

/// The register and both sides must have been told.
fn told_to_abort(s: &mut Script) {
    assert!(s.proposed("abort"));
    assert!(!s.proposed("commit"));
    let took = s.took();
    for expected in [(R, "decide"), (A, "abort"), (B, "abort")] {
        assert!(took.contains(&expected), "{expected:?} in {took:?}");
    }
}

#[test]
fn a_failure_in_any_phase_goes_back_everywhere() {
    for phase in ALL {
        for (host, role) in [(A, Role::Source), (B, Role::Destination)] {
            let mut s = at(phase);
            s.failed(host, role, false);
            told_to_abort(&mut s);
            s.rolled_back();
            assert_eq!(s.group.outcome(), Some(Outcome::RolledBack), "{phase}");
            assert!(s.reason().contains("it broke"), "{}", s.reason());
        }
    }
}

#[test]
fn a_dead_source_loses_its_vm_and_says_so() {
    let mut s = at("held");
    s.failed(A, Role::Source, true);
    told_to_abort(&mut s);
    s.rolled_back();
    assert_eq!(s.group.outcome(), Some(Outcome::NeedsAttention));
    assert!(
        s.group
            .notices()
            .iter()
            .any(|text| text.contains("web is lost"))
    );
}

#[test]
fn a_dead_destination_is_rolled_back_cleanly() {
    let mut s = at("switching");
    s.failed(B, Role::Destination, true);
    s.rolled_back();
    assert_eq!(s.group.outcome(), Some(Outcome::RolledBack));
}

#[test]
fn an_interrupt_before_the_decision_rolls_back() {
    for phase in ALL {
        let mut s = at(phase);
        s.group.interrupt(s.now);
        s.drain();
        told_to_abort(&mut s);
        s.rolled_back();
        assert_eq!(s.group.outcome(), Some(Outcome::RolledBack), "{phase}");
        assert_eq!(s.reason(), "interrupted");
    }
}

#[test]
fn an_interrupt_after_the_proposal_finishes_forward() {
    let mut s = Script::new(spec(&["web"], true));
    s.up_to("deciding");
    s.group.interrupt(s.now);
    s.drain();
    assert!(!s.proposed("abort"));
    s.register_says("commit");
    s.group.interrupt(s.now);
    s.committed(Role::Destination);
    s.committed(Role::Source);
    assert_eq!(s.group.outcome(), Some(Outcome::Committed));
}

#[test]
fn the_register_overrules_the_proposal() {
    let mut s = Script::new(spec(&["web"], true));
    s.up_to("deciding");
    s.register_says("abort");
    let took = s.took();
    assert!(
        took.contains(&(A, "abort")) && took.contains(&(B, "abort")),
        "{took:?}"
    );
    assert!(!took.iter().any(|(_, name)| *name == "commit"));
    s.rolled_back();
    assert_eq!(s.group.outcome(), Some(Outcome::RolledBack));

    // An abort proposed too late: obeyed as the commit it is.
    let mut s = Script::new(spec(&["web"], true));
    s.up_to("switching");
    s.failed(B, Role::Destination, false);
    s.register_says("commit");
    assert!(s.took().contains(&(B, "commit")));
}

#[test]
fn a_hung_sidecar_is_noticed_within_three_seconds() {
    for phase in BEFORE_CONTINUE {
        for host in [A, B, R] {
            let mut s = at(phase);
            s.pass(Duration::from_millis(700));
            s.took();
            s.answering[host.0] = false;
            let since = s.now;
            while s.group.reason().is_none() {
                s.pass(Duration::from_millis(50));
                assert!(s.now - since <= Duration::from_secs(3), "{phase} {host:?}");
                // The others keep reporting.
                for other in [A, B] {
                    if other != host {
                        s.event(other, Event::Status { vms: Vec::new() });
                    }
                }
            }
            assert!(s.reason().contains("does not answer"), "{}", s.reason());
        }
    }
}

#[test]
fn a_lost_connection_may_come_back() {
    let mut s = at("precopy");
    s.group.handle_lost(s.now, A, "reset");
    s.pass(Duration::from_millis(1500));
    s.group.handle_connected(s.now, A);
    s.drain();
    assert_eq!(s.took(), vec![(A, "query-run")]);
    s.pass(Duration::from_millis(1000));
    assert_eq!(s.group.reason(), None);
    s.group.handle_lost(s.now, A, "reset");
    s.pass(Duration::from_millis(2100));
    assert!(s.reason().contains("cannot be reached"));
    // Its source rolls back by itself; without its word the end is not confirmed.
    s.pass(Duration::from_secs(13));
    assert_eq!(s.group.outcome(), Some(Outcome::NeedsAttention));
}

#[test]
fn a_destination_that_is_away_does_not_keep_the_sources() {
    let mut s = at("held");
    s.group.handle_lost(s.now, B, "reset");
    s.pass(Duration::from_millis(2100));
    for vm in s.names() {
        let role = Role::Source;
        let reason = None;
        s.event(A, Event::RolledBack { vm, role, reason });
    }
    s.pass(Duration::from_secs(13));
    assert_eq!(s.group.outcome(), Some(Outcome::RolledBack));
    assert_eq!(
        s.group
            .notices()
            .iter()
            .filter(|n| n.contains("last seen"))
            .count(),
        2
    );
}

#[test]
fn losing_a_sidecar_while_paused_does_not_wait() {
    let mut s = at("stopping");
    s.group.handle_lost(s.now, B, "reset");
    s.drain();
    assert!(s.reason().contains("gone while VMs are paused"));
}

#[test]
fn missed_events_are_caught_up_after_a_reconnect() {
    let mut s = Script::new(spec(&["web"], true));
    s.up_to("switching");
    s.group.handle_lost(s.now, A, "reset");
    s.arrived(Role::Destination);
    s.group.handle_connected(s.now, A);
    s.drain();
    let (host, ticket, _) = s.sent.last().expect("query-run").clone();
    let answer = json!({ "vms": [report("web", 100, Phase::Arrived)] });
    s.group.handle_reply(s.now, host, ticket, Ok(answer));
    s.drain();
    assert!(s.proposed("commit"));
}

fn report(vm: &str, uuid: u128, phase: Phase) -> VmReport {
    VmReport {
        round: 1,
        ..VmReport::new(vm.into(), Uuid::from_u128(uuid), Role::Source, phase)
    }
}

#[test]
fn what_is_left_of_paused_vms_is_checked_again() {
    let mut s = at("stopping");
    s.stopped(20 * MB); // 2 × 20 MB at 50 MB/s: 800 ms, the hard limit is 600 ms
    told_to_abort(&mut s);
    assert!(
        s.reason().contains("800 ms, the hard limit is 600 ms"),
        "{}",
        s.reason()
    );
}

#[test]
fn every_phase_has_its_deadline() {
    for phase in ["preparing", "precopy", "held", "stopping", "switching"] {
        let mut s = at(phase);
        s.pass(Duration::from_secs(150));
        assert!(s.group.outcome().is_some(), "{phase}");
        assert!(!s.proposed("commit"));
        assert!(!s.reason().is_empty());
    }
    let mut s = Script::new(spec(&["web"], true));
    s.up_to("deciding");
    s.pass(Duration::from_secs(31));
    assert_eq!(s.group.outcome(), Some(Outcome::NeedsAttention));
    assert!(s.reason().contains("muster recover"), "{}", s.reason());
}

#[test]
fn the_register_is_asked_until_it_answers() {
    let mut s = Script::new(spec(&["web"], true));
    s.up_to("deciding");
    s.group.handle_lost(s.now, R, "reset");
    s.pass(Duration::from_secs(6));
    assert!(!s.proposed("abort"));
    s.group.handle_connected(s.now, R);
    s.drain();
    s.register_says("commit");
    assert!(s.took().contains(&(B, "commit")));
}

#[test]
fn a_decision_heard_from_a_sidecar_counts() {
    let mut s = Script::new(spec(&["web"], true));
    s.up_to("switching");
    let decision = Decision::Abort;
    s.event(B, Event::Decided { decision });
    assert!(s.took().contains(&(A, "abort")));
    s.arrived(Role::Source);
    s.arrived(Role::Destination);
    assert!(!s.proposed("commit"));
}

#[test]
fn a_committed_destination_that_dies_is_said_plainly() {
    let mut s = Script::new(spec(&["web", "db"], true));
    s.up_to("deciding");
    s.register_says("commit");
    let reason = "its QEMU died before it was continued".to_owned();
    let side = Side::Source;
    s.event(
        B,
        Event::Diverged {
            vm: "web".into(),
            side,
            reason,
        },
    );
    s.failed(B, Role::Destination, true);
    let committed = |vm: &str, role| Event::Committed {
        vm: vm.into(),
        role,
        resumed_at_us: None,
    };
    s.event(B, committed("db", Role::Destination));
    s.event(A, committed("db", Role::Source));
    let rolled_back = Event::RolledBack {
        vm: "web".into(),
        role: Role::Source,
        reason: None,
    };
    s.event(A, rolled_back);
    assert_eq!(s.group.outcome(), Some(Outcome::NeedsAttention));
    let moves = s.group.vm_moves(|_| String::new());
    assert_eq!(moves[0].1.side, Some(Side::Source));
    assert_eq!(moves[1].1.side, Some(Side::Destination));
}

#[test]
fn a_refused_prepare_ends_the_group_before_anything_moved() {
    let mut s = Script::unanswered(spec(&["web"], true));
    let prepares: Vec<(HostId, u64)> = s
        .sent
        .iter()
        .filter(|(_, _, command)| command.name() == "prepare")
        .map(|(host, ticket, _)| (*host, *ticket))
        .collect();
    let error = "there is no VM `web` here";
    s.group
        .handle_reply(s.now, prepares[0].0, prepares[0].1, Err(error.into()));
    s.drain();
    assert!(s.reason().contains(error), "{}", s.reason());
    let took = s.took();
    // B holds nothing of the run.
    assert!(
        took.contains(&(A, "abort")) && !took.contains(&(B, "abort")),
        "{took:?}"
    );
    let (vm, role, reason) = ("web".to_owned(), Role::Source, None);
    s.event(A, Event::RolledBack { vm, role, reason });
    assert_eq!(s.group.outcome(), Some(Outcome::RolledBack));
}

#[test]
fn stale_and_duplicate_events_change_nothing() {
    let mut s = Script::new(spec(&["web", "db"], true));
    s.up_to("switching");
    let arrived = |run: u128, seq| Envelope {
        run: Uuid::from_u128(run),
        seq,
        at_us: 0,
        event: Event::Arrived {
            vm: "web".into(),
            role: Role::Source,
        },
    };
    s.group.handle_event(s.now, A, &arrived(99, 1000));
    s.group.handle_event(s.now, A, &arrived(1, 1));
    s.arrived(Role::Destination);
    s.arrived(Role::Destination);
    assert!(!s.proposed("commit"));
    s.arrived(Role::Source);
    let count = s
        .sent
        .iter()
        .filter(|(_, _, c)| c.name() == "decide")
        .count();
    assert_eq!(count, 1);
    s.arrived(Role::Source);
    let count = s
        .sent
        .iter()
        .filter(|(_, _, c)| c.name() == "decide")
        .count();
    assert_eq!(count, 1);
}

#[test]
fn a_vm_that_pauses_unasked_ends_the_group() {
    let mut s = at("held");
    s.stopped(MB);
    assert!(s.reason().contains("although it was not released"));
}
