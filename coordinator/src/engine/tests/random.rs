use super::*;
use proptest::prelude::*;
use std::collections::BTreeSet;

/// Anything that can happen, in any order.
#[derive(Debug, Clone, Copy)]
enum Happening {
    Prepared,
    Held(usize),
    Armed(u64),
    Stopped(usize, u64),
    Arrived(usize, Role),
    Failed(usize, Role, bool),
    Lost(usize),
    Connected(usize),
    Interrupt,
    Turn,
    Pass(u64),
    RegisterAborts,
}

fn happening() -> impl Strategy<Value = Happening> {
    let role = || prop_oneof![Just(Role::Source), Just(Role::Destination)];
    prop_oneof![
        3 => Just(Happening::Prepared),
        4 => (0..2_usize).prop_map(Happening::Held),
        4 => (0..30_u64).prop_map(Happening::Armed),
        6 => (0..2_usize, 0..20_u64).prop_map(|(vm, mb)| Happening::Stopped(vm, mb)),
        12 => (0..2_usize, role()).prop_map(|(vm, role)| Happening::Arrived(vm, role)),
        1 => (0..2_usize, role(), any::<bool>()).prop_map(|(v, r, l)| Happening::Failed(v, r, l)),
        1 => (0..3_usize).prop_map(Happening::Lost),
        2 => (0..3_usize).prop_map(Happening::Connected),
        1 => Just(Happening::Interrupt),
        2 => Just(Happening::Turn),
        2 => (0..3000_u64).prop_map(Happening::Pass),
        1 => Just(Happening::RegisterAborts),
    ]
}

fn apply(s: &mut Script, happening: Happening) {
    let name = |vm: usize| ["web", "db"][vm].to_owned();
    let host = |role| if role == Role::Source { A } else { B };
    match happening {
        Happening::Prepared => s.prepared(),
        Happening::Held(vm) => s.event(
            A,
            Event::Held {
                vm: name(vm),
                reason: HoldReason::Stalled,
                remaining_bytes: MB,
                dirty_rate_bytes_per_s: MB,
            },
        ),
        Happening::Armed(mb) => s.armed(mb * MB),
        Happening::Stopped(vm, mb) => s.event(
            A,
            Event::Stopped {
                vm: name(vm),
                remaining_bytes: mb * MB,
                stopped_at_us: 1,
            },
        ),
        Happening::Arrived(vm, role) => s.event(host(role), Event::Arrived { vm: name(vm), role }),
        Happening::Failed(vm, role, lost) => s.event(
            host(role),
            Event::Failed {
                vm: name(vm),
                role,
                error: "random".into(),
                lost,
                secondary: false,
            },
        ),
        Happening::Lost(host) => s.group.handle_lost(s.now, HostId(host), "random"),
        Happening::Connected(host) => s.group.handle_connected(s.now, HostId(host)),
        Happening::Interrupt => s.group.interrupt(s.now),
        Happening::Turn => s.group.give_turn(s.now),
        Happening::Pass(ms) => s.pass(Duration::from_millis(ms)),
        Happening::RegisterAborts => {
            if s.sent
                .iter()
                .any(|(_, _, command)| matches!(command, Command::Decide(_)))
            {
                s.register_says("abort");
            }
        }
    }
    s.drain();
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    /// In whatever order things happen: `commit` is proposed only when every half has arrived and
    /// none has failed before (but a source that died after its
    /// arrival), `commit` is never sent without the register's word, and it ends.
    #[test]
    fn commit_only_when_all_have_arrived(
        (hold, two_stages) in prop_oneof![
            Just((false, false)), Just((true, false)), Just((true, true))
        ],
        happenings in proptest::collection::vec(happening(), 0..60),
    ) {
        let mut spec = spec(&["web", "db"], hold);
        spec.parked = two_stages.then_some(BytesPerSecond(65_536));
        let mut s = Script::new(spec);
        let mut arrived = BTreeSet::new();
        let mut dead = BTreeSet::new();
        let mut broken = BTreeSet::new();
        for happening in happenings {
            match happening {
                Happening::Arrived(vm, role) => {
                    arrived.insert((vm, role));
                }
                // A source that dies after its arrival leaves a whole copy at the destination, the
                // last one: whatever else is told of that source counts for nothing.
                Happening::Failed(vm, Role::Source, true)
                    if arrived.contains(&(vm, Role::Source)) =>
                {
                    dead.insert(vm);
                    broken.remove(&(vm, Role::Source));
                }
                Happening::Failed(vm, Role::Source, _) if dead.contains(&vm) => {}
                Happening::Failed(vm, role, _) if !s.proposed("commit") => {
                    broken.insert((vm, role));
                }
                _ => {}
            }
            apply(&mut s, happening);
            if s.proposed("commit") {
                prop_assert_eq!(arrived.len(), 4);
                prop_assert!(broken.is_empty(), "{broken:?}");
            }
            let commits = s.sent.iter().any(|(_, _, c)| matches!(c, Command::Commit(_)));
            prop_assert!(!commits);
        }
        apply(&mut s, Happening::Turn);
        s.pass(Duration::from_secs(200));
        prop_assert!(s.group.outcome().is_some());
    }
}
