//! A group of two stages: everything once, then nothing until its turn.

use super::*;
use crate::report::Outcome;
use sidecar::protocol::command::PaceArgs;
use sidecar::protocol::types::{Phase, RoundReport, VmReport};

const PARKED: u64 = 65_536;

pub(super) fn two_stages(names: &[&str]) -> GroupSpec {
    let mut spec = spec(names, true);
    spec.parked = Some(BytesPerSecond(PARKED));
    spec.scheme = Scheme::Delayed;
    for member in &mut spec.members {
        member.profile.dirty_rate = Some(BytesPerSecond(5 * MB));
        member.profile.max_dirty_rate = Some(BytesPerSecond(10 * MB));
    }
    spec
}

pub(super) fn last_pace(s: &Script) -> PaceArgs {
    let found = s
        .sent
        .iter()
        .rev()
        .find_map(|(_, _, command)| match command {
            Command::Pace(args) => Some(args.clone()),
            _ => None,
        });
    found.expect("paced")
}

pub(super) fn round_over(s: &mut Script, vm: &str) {
    let round = RoundReport {
        round: 1,
        sent_bytes: 100 * MB,
        dirtied_bytes: 20 * MB,
        duration_ms: 2000,
    };
    s.event(
        A,
        Event::Round {
            vm: vm.into(),
            round,
        },
    );
}

pub(super) fn report(s: &mut Script, vm: &str, phase: Phase, round: u64, remaining_bytes: u64) {
    let report = report_of(s, vm, phase, round, remaining_bytes);
    s.event(A, Event::Status { vms: vec![report] });
}

pub(super) fn report_of(
    s: &Script,
    vm: &str,
    phase: Phase,
    round: u64,
    remaining_bytes: u64,
) -> VmReport {
    let spec = s.group.spec();
    let member = spec.members.iter().find(|member| member.name == vm);
    let uuid = member.expect("a member").uuid;
    VmReport {
        round,
        total_bytes: 100 * MB,
        remaining_bytes,
        dirty_rate_bytes_per_s: 5 * MB,
        ..VmReport::new(vm.into(), uuid, Role::Source, phase)
    }
}

fn held(s: &mut Script, vm: &str, remaining_bytes: u64) {
    s.event(
        A,
        Event::Held {
            vm: vm.into(),
            reason: HoldReason::Converged,
            remaining_bytes,
            dirty_rate_bytes_per_s: 5 * MB,
        },
    );
}

/// Both are copied once, and wait.
fn waiting() -> Script {
    waiting_with(None)
}

fn waiting_with(deadline: Option<Duration>) -> Script {
    let mut spec = two_stages(&["web", "db"]);
    spec.limits.deadline = deadline;
    let mut s = Script::new(spec);
    s.prepared();
    for vm in ["web", "db"] {
        round_over(&mut s, vm);
        report(&mut s, vm, Phase::Precopy, 2, 20 * MB);
    }
    assert!(s.group.has_copied());
    s.took();
    s
}

#[test]
fn who_is_copied_first_is_parked_until_all_are() {
    let mut s = Script::new(two_stages(&["web", "db"]));
    s.prepared();
    let pace = last_pace(&s);
    assert_eq!(pace.vms["web"].weight, pace.vms["db"].weight);
    // Each has its half, and not what the other one leaves.
    let all = s.group.spec().capacity.rate(2).0;
    assert_eq!(pace.vms["web"].bytes_per_s, Some(all / 2));
    assert_eq!(pace.vms["db"].bytes_per_s, Some(all / 2));
    s.took();
    round_over(&mut s, "web");
    // At once, not when the next shares are due.
    let pace = last_pace(&s);
    assert_eq!(pace.vms["web"].bytes_per_s, Some(PARKED));
    assert_eq!(pace.vms["db"].bytes_per_s, Some(all - PARKED));
    assert!(!s.group.has_copied() && !s.steps.contains(&Step::Copied));
    // Copied whole, with nothing left to send.
    held(&mut s, "db", MB);
    assert!(s.group.has_copied());
    assert_eq!(s.steps.last(), Some(&Step::Copied));
    assert_eq!(last_pace(&s).vms["db"].bytes_per_s, Some(PARKED));
}

#[test]
fn it_waits_for_its_turn_for_as_long_as_it_takes() {
    for deadline in [None, Some(Duration::from_secs(60))] {
        let mut s = waiting_with(deadline);
        s.pass(Duration::from_secs(10_000));
        assert_eq!(s.took(), vec![]);
        s.group.give_turn(s.now);
        s.drain();
        assert!(s.steps.contains(&Step::Turn));
        s.pass(Duration::from_secs(50));
        assert_eq!(s.reason(), "");
        // From here on the deadline counts again.
        s.pass(Duration::from_secs(60));
        assert!(s.reason().contains("deadline"), "{}", s.reason());
    }
}

#[test]
fn that_all_are_held_is_no_turn() {
    let mut s = waiting_with(Some(Duration::from_secs(60)));
    s.held();
    s.pass(Duration::from_secs(10_000));
    assert_eq!(s.took(), vec![]);
    assert_eq!(s.group.outcome(), None);
}

#[test]
fn in_its_turn_what_was_dirtied_is_sent_and_it_is_released() {
    let mut s = waiting();
    s.group.give_turn(s.now);
    s.drain();
    // One starts now, with all but what the other one's stream needs; the other one when it is due.
    let pace = last_pace(&s);
    let parked = |pace: &PaceArgs| {
        let limits = pace.vms.values().map(|vm| vm.bytes_per_s);
        limits.filter(|limit| *limit == Some(PARKED)).count()
    };
    assert_eq!(parked(&pace), 1, "{pace:?}");
    s.pass(Duration::from_secs(2));
    assert_eq!(parked(&last_pace(&s)), 0);
    assert!(!s.took().contains(&(A, "arm")));
    s.held();
    assert!(s.steps.contains(&Step::AllHeld));
    s.pass(Duration::from_secs(1));
    assert!(s.took().contains(&(A, "arm")));
    s.steady(MB);
    assert_eq!(s.took(), vec![(A, "release")]);
    s.stopped(MB);
    // Nothing of the parking is left in stop-and-copy.
    assert!(
        last_pace(&s)
            .vms
            .values()
            .all(|vm| vm.bytes_per_s == Some(0))
    );
}

#[test]
fn who_was_held_while_it_waited_is_gathered_when_it_has_caught_up() {
    let mut s = Script::new(two_stages(&["web"]));
    s.prepared();
    held(&mut s, "web", MB);
    s.group.give_turn(s.now);
    s.drain();
    // It has dirtied 90 MB meanwhile.
    for left in [90, 70, 50, 30, 12] {
        report(&mut s, "web", Phase::Held, 2, left * MB);
        s.pass(Duration::from_millis(500));
        assert!(!s.steps.contains(&Step::AllHeld), "{left} MB");
    }
    report(&mut s, "web", Phase::Held, 2, 2 * MB);
    assert!(s.steps.contains(&Step::AllHeld));

    // What does not get less is as good as it gets.
    let mut s = Script::new(two_stages(&["web"]));
    s.prepared();
    held(&mut s, "web", MB);
    s.group.give_turn(s.now);
    s.drain();
    for _ in 0..3 {
        report(&mut s, "web", Phase::Held, 2, 90 * MB);
        s.pass(Duration::from_millis(500));
    }
    assert!(!s.steps.contains(&Step::AllHeld));
    s.pass(Duration::from_secs(4));
    assert!(s.steps.contains(&Step::AllHeld));
}

#[test]
fn it_goes_back_from_both_stages() {
    let copying = || {
        let mut s = Script::new(two_stages(&["web", "db"]));
        s.prepared();
        round_over(&mut s, "web");
        s.took();
        s
    };
    let in_turn = || {
        let mut s = waiting();
        s.group.give_turn(s.now);
        s.drain();
        s.took();
        s
    };
    let stages: [&dyn Fn() -> Script; 3] = [&copying, &waiting, &in_turn];
    for begin in stages {
        let act: [&dyn Fn(&mut Script); 3] = [
            &|s| s.group.interrupt(s.now),
            &|s| s.group.abandon(s.now, "the others failed".into()),
            &|s| s.failed(B, Role::Destination, true),
        ];
        for act in act {
            let mut s = begin();
            act(&mut s);
            s.drain();
            assert!(s.proposed("abort") && !s.proposed("commit"));
            let took = s.took();
            for expected in [(R, "decide"), (A, "abort"), (B, "abort")] {
                assert!(took.contains(&expected), "{expected:?} in {took:?}");
            }
            s.rolled_back();
            assert_eq!(s.group.outcome(), Some(Outcome::RolledBack));
            // A turn that comes too late changes nothing.
            s.group.give_turn(s.now);
            s.drain();
            assert_eq!(s.took(), vec![]);
        }
    }
}

#[test]
fn in_stage_one_the_deadline_counts() {
    let mut spec = two_stages(&["web", "db"]);
    spec.limits.deadline = Some(Duration::from_secs(60));
    spec.limits.on_non_convergence = OnNonConvergence::Force;
    let mut s = Script::new(spec);
    s.prepared();
    round_over(&mut s, "web");
    s.pass(Duration::from_secs(61));
    assert!(
        s.reason().contains("web, db was still in pre-copy"),
        "{}",
        s.reason()
    );
    assert!(!s.took().contains(&(A, "hold")));
}

#[test]
fn a_narrow_interface_does_not_free_who_is_parked() {
    let mut spec = two_stages(&["web", "db"]);
    spec.capacity.cuts.push(crate::capacity::Cut {
        rate: BytesPerSecond(10 * MB),
        members: vec![0],
    });
    let mut s = Script::new(spec);
    s.prepared();
    // Both at the pace at which all end together: web's 10 MB/s.
    assert_eq!(last_pace(&s).vms["web"].bytes_per_s, Some(10 * MB));
    held(&mut s, "web", MB);
    assert_eq!(last_pace(&s).vms["web"].bytes_per_s, Some(PARKED));
}
