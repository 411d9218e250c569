//! Slowing VMs in pre-copy: who does not converge alone, and who is too slow for the deadline.

use super::*;
use sidecar::protocol::types::{Phase, VmReport};

fn throttling(names: &[&str]) -> GroupSpec {
    let mut spec = spec(names, true);
    spec.limits.on_non_convergence = OnNonConvergence::Throttle;
    spec
}

/// Half seconds in which a VM is in pre-copy with so much left, dirtying so much, in MB and MB/s.
fn copies(s: &mut Script, half_seconds: u32, vm: &str, round: u64, left: u64, dirties: u64) {
    for _ in 0..half_seconds {
        s.pass(Duration::from_millis(500));
        let members = &s.group.spec().members;
        let member = members.iter().find(|member| member.name == vm);
        let uuid = member.expect("a member").uuid;
        let report = VmReport {
            round,
            total_bytes: 1000 * MB,
            remaining_bytes: left * MB,
            dirty_rate_bytes_per_s: dirties * MB,
            ..VmReport::new(vm.into(), uuid, Role::Source, Phase::Precopy)
        };
        s.event(A, Event::Status { vms: vec![report] });
    }
}

/// What was told since the last call.
fn throttles(s: &mut Script) -> Vec<(String, u8)> {
    let commands = std::mem::take(&mut s.sent).into_iter();
    let told = commands.filter_map(|(_, _, command)| match command {
        Command::Throttle(args) => Some((args.vm, args.percent)),
        _ => None,
    });
    told.collect()
}

fn web(percent: u8) -> Vec<(String, u8)> {
    vec![("web".to_owned(), percent)]
}

#[test]
fn a_vm_that_does_not_converge_alone_is_slowed_until_it_does() {
    let mut s = Script::new(throttling(&["web"]));
    s.up_to("precopy");
    // In its first round nothing is known yet.
    copies(&mut s, 40, "web", 1, 500, 60);
    copies(&mut s, 19, "web", 2, 80, 60);
    assert_eq!(throttles(&mut s), []);
    copies(&mut s, 2, "web", 3, 80, 60);
    assert_eq!(throttles(&mut s), web(20));
    // Each step has its time.
    copies(&mut s, 7, "web", 4, 80, 48);
    assert_eq!(throttles(&mut s), []);
    copies(&mut s, 2, "web", 4, 80, 48);
    assert_eq!(throttles(&mut s), web(40));
    // It converges, because it is slowed.
    copies(&mut s, 40, "web", 5, 80, 36);
    assert_eq!(throttles(&mut s), []);
    // It would without: 34 MB/s of 50.
    copies(&mut s, 1, "web", 6, 80, 20);
    assert_eq!(throttles(&mut s), web(0));
    // Should it begin anew, so does the throttle, where it was.
    copies(&mut s, 22, "web", 7, 80, 60);
    assert_eq!(throttles(&mut s), web(40));
}

#[test]
fn nobody_is_slowed_further_than_the_file_allows() {
    for (allowed, told) in [
        (30, vec![20, 30]),
        (0, vec![]),
        (99, vec![20, 40, 60, 80, 99]),
    ] {
        let mut spec = throttling(&["web"]);
        spec.members[0].max_throttle = allowed;
        let mut s = Script::new(spec);
        s.up_to("precopy");
        copies(&mut s, 100, "web", 3, 80, 60);
        let percents: Vec<u8> = throttles(&mut s).into_iter().map(|one| one.1).collect();
        assert_eq!(percents, told);
    }
    // Nor where it is not allowed at all.
    let mut s = Script::new(spec(&["web"], true));
    s.up_to("precopy");
    copies(&mut s, 100, "web", 3, 80, 60);
    assert_eq!(throttles(&mut s), []);
}

#[test]
fn who_shares_the_bandwidth_with_others_is_not_slowed() {
    let mut s = Script::new(throttling(&["web"]));
    s.group.set_company(true);
    s.up_to("precopy");
    copies(&mut s, 60, "web", 3, 80, 60);
    assert_eq!(throttles(&mut s), []);
    s.group.set_company(false);
    copies(&mut s, 1, "web", 3, 80, 60);
    assert_eq!(throttles(&mut s), web(20));
}

#[test]
fn what_fits_the_downtime_is_not_slowed() {
    let mut s = Script::new(throttling(&["web"]));
    s.up_to("precopy");
    // 14 MB at 50 MB/s: 280 ms.
    copies(&mut s, 100, "web", 3, 14, 60);
    assert_eq!(throttles(&mut s), []);
}

#[test]
fn who_waits_for_others_in_the_hold_is_not_slowed() {
    let mut s = Script::new(throttling(&["web", "db"]));
    s.up_to("precopy");
    copies(&mut s, 22, "web", 3, 80, 60);
    assert_eq!(throttles(&mut s), web(20));
    copies(&mut s, 1, "db", 1, 500, 1);
    let event = Event::Held {
        vm: "web".into(),
        reason: HoldReason::Stalled,
        remaining_bytes: 20 * MB,
        dirty_rate_bytes_per_s: 40 * MB,
    };
    s.event(A, event);
    assert_eq!(throttles(&mut s), web(0));
}

#[test]
fn a_deadline_that_would_be_missed_is_kept_by_slowing() {
    let mut spec = throttling(&["web"]);
    spec.limits.deadline = Some(Duration::from_secs(40));
    let mut s = Script::new(spec);
    s.up_to("precopy");
    // 1000 MB at 50 − 5 MB/s are there in time.
    copies(&mut s, 10, "web", 1, 1000, 5);
    assert_eq!(throttles(&mut s), []);
    // 800 MB at 50 − 35 MB/s are not: 53 s, and 35 s are left.
    copies(&mut s, 10, "web", 2, 800, 35);
    assert_eq!(throttles(&mut s), web(20));
    copies(&mut s, 9, "web", 2, 760, 24);
    // 760 MB at 50 − 24 take 29 s; 26 are left.
    assert_eq!(throttles(&mut s), web(40));
    // Now it is in time, and would be without.
    copies(&mut s, 12, "web", 2, 300, 10);
    assert_eq!(throttles(&mut s), web(0));
}

#[test]
fn a_deadline_that_cannot_be_kept_is_said() {
    let mut spec = throttling(&["web"]);
    spec.limits.deadline = Some(Duration::from_secs(40));
    spec.members[0].max_throttle = 20;
    let mut s = Script::new(spec);
    s.up_to("precopy");
    copies(&mut s, 40, "web", 2, 2000, 30);
    assert_eq!(throttles(&mut s), web(20));
    let said = s.group.notices().join("\n");
    assert!(
        said.contains("the deadline will not be met: about"),
        "{said}"
    );
}
