//! VMs whose guests give what they do not use while they move.

use sidecar::protocol::command::PrepareBalloon;
use sidecar::protocol::types::{BalloonReport, Phase, VmReport};

use super::*;
use crate::report::BalloonMove;

const WISH: PrepareBalloon = PrepareBalloon {
    reserve_bytes: 8 * MB,
    wait_ms: 5000,
};

fn ballooned() -> Script {
    let mut spec = spec(&["web"], true);
    spec.members[0].balloon = Some(WISH);
    Script::new(spec)
}

fn report(role: Role, phase: Phase, told: BalloonReport) -> VmReport {
    let uuid = Uuid::from_u128(100);
    VmReport {
        balloon: Some(told),
        ..VmReport::new("web".into(), uuid, role, phase)
    }
}

fn taken(given_back: bool) -> BalloonReport {
    BalloonReport {
        before_bytes: 100 * MB,
        during_bytes: Some(30 * MB),
        took_ms: 120,
        given_back,
        notice: None,
    }
}

fn told(s: &Script) -> Option<BalloonMove> {
    let moves = s.group.vm_moves(|_| String::new());
    moves[0].1.balloon
}

#[test]
fn both_ends_are_told_to_balloon() {
    let s = ballooned();
    let wishes = s.sent.iter().filter_map(|(_, _, command)| match command {
        Command::Prepare(args) => Some(args.vms[0].balloon),
        _ => None,
    });
    assert_eq!(wishes.collect::<Vec<_>>(), [Some(WISH); 2]);
}

#[test]
fn what_the_destination_gives_back_counts_even_after_the_end() {
    let mut s = ballooned();
    s.prepared();
    assert_eq!(told(&s), None);
    let vms = vec![report(Role::Source, Phase::Precopy, taken(false))];
    s.event(A, Event::Status { vms });
    let expected = BalloonMove {
        before_bytes: 100 * MB,
        during_bytes: Some(30 * MB),
        took_ms: 120,
        given_back: false,
    };
    assert_eq!(told(&s), Some(expected));
    s.held();
    s.steady(MB);
    s.stopped(MB);
    s.arrived(Role::Source);
    s.arrived(Role::Destination);
    s.register_says("commit");
    s.committed(Role::Destination);
    s.committed(Role::Source);
    assert_eq!(s.group.outcome(), Some(Outcome::Committed));
    assert_eq!(s.group.not_given_back().collect::<Vec<_>>(), ["web"]);
    let back = BalloonReport {
        before_bytes: 100 * MB,
        during_bytes: None,
        took_ms: 0,
        given_back: true,
        notice: None,
    };
    let vms = vec![report(Role::Destination, Phase::Committed, back)];
    s.event(B, Event::RunEnded { vms });
    let given_back = true;
    let expected = BalloonMove {
        given_back,
        ..expected
    };
    assert_eq!(told(&s), Some(expected));
    assert_eq!(s.group.not_given_back().count(), 0);
}

#[test]
fn why_a_guest_is_not_ballooned_is_a_notice_once() {
    let mut s = ballooned();
    s.prepared();
    for _ in 0..2 {
        let told = BalloonReport {
            during_bytes: None,
            notice: Some("not ballooned: it is paused".into()),
            ..taken(false)
        };
        let vms = vec![report(Role::Source, Phase::Precopy, told)];
        s.event(A, Event::Status { vms });
    }
    assert_eq!(s.group.notices(), ["web: not ballooned: it is paused"]);
    assert_eq!(s.group.not_given_back().count(), 0);
}
