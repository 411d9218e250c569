use super::world::{Guest, World};
use super::*;
use crate::engine::Step;

const B: f64 = 32e6;
const PARKED: u64 = 65_536;

/// A light VM and databases of which no two fit the bandwidth.
fn guests(count: usize) -> Vec<Guest> {
    let all = [
        ("web", 300e6, 1e6, 40e6),
        ("db1", 600e6, 10e6, 300e6),
        ("db2", 500e6, 10e6, 300e6),
        ("db3", 400e6, 10e6, 200e6),
    ];
    let guest = |&(name, memory, dirty_rate, working_set)| Guest {
        name,
        memory,
        dirty_rate,
        working_set,
    };
    all[..count].iter().map(guest).collect()
}

fn app_of(guests: &[Guest], on_partial: OnPartial) -> Application {
    let mut text = String::from(
        "version = 1\n[application]\nname = \"shop\"\nbandwidth = \"32MB/s\"\n\
         [[host]]\nname = \"a\"\ncontrol = \"unix:/a\"\n[[host]]\nname = \"b\"\ncontrol = \"unix:/b\"\n",
    );
    for (index, guest) in guests.iter().enumerate() {
        text += &format!(
            "[[vm]]\nname = \"{}\"\nfrom = \"a\"\nto = \"b\"\nmemory = \"{}B\"\n\
             uuid = \"00000000-0000-0000-0000-00000000000{index}\"\ndirty-rate = \"{}B/s\"\n\
             max-dirty-rate = \"{}B/s\"\nwritable-working-set = \"{}B\"\n",
            guest.name,
            guest.memory,
            guest.dirty_rate,
            1.7 * guest.dirty_rate,
            guest.working_set
        );
    }
    if guests[0].name == "web" {
        text += "[[traffic]]\nbetween = [\"web\", \"db1\"]\nrate = \"1MB/s\"\n";
    }
    let mut app = Application::parse(&text, Path::new("test")).expect("good");
    app.on_partial = on_partial;
    app
}

fn s(seconds: f64) -> Duration {
    Duration::from_secs_f64(seconds)
}

/// The names of the group that moves as this one in the order.
fn group(world: &World<'_>, index: usize) -> Vec<String> {
    world.groups()[index].clone()
}

fn is_turn(step: &Step) -> bool {
    *step == Step::Turn
}

fn is_end(step: &Step) -> bool {
    matches!(step, Step::Ended(_))
}

#[test]
fn everything_is_copied_once_and_then_groups_move_in_turn() {
    let guests = guests(3);
    let app = app_of(&guests, OnPartial::Stay);
    let mut world = World::new(&app, &guests);
    assert_eq!(world.groups().len(), 2, "{:?}", world.groups());
    let first = group(&world, 0);
    let second = group(&world, 1);
    // Stage one: 1400 MB, in proportion to what is left.
    world.until(|world| world.vms.iter().all(|vm| vm.copied_at.is_some()));
    let ends: Vec<Duration> = world.vms.iter().filter_map(|vm| vm.copied_at).collect();
    let (one, last) = (ends.iter().min().unwrap(), ends.iter().max().unwrap());
    assert!(*last - *one < s(1.0), "{ends:?}");
    let expected = s(1.0 + 1400e6 / B);
    assert!(last.abs_diff(expected) < s(1.5), "{ends:?}");
    assert!(
        world
            .at(&first[0], is_turn)
            .is_some_and(|turn| turn >= *last)
    );

    // Stage two: who waits is parked, and nothing of it is sent.
    world.until(|world| world.at(&first[0], |step| *step == Step::AllHeld).is_some());
    let waiting = world.vm(&second[0]);
    assert_eq!(waiting.limit, Some(PARKED));
    assert_eq!(waiting.round, 2);
    let sent = waiting.sent;
    world.until(|world| world.at(&second[0], is_turn).is_some());
    assert!(world.vm(&second[0]).sent - sent < 10e6);
    assert!(second.iter().all(|vm| world.vm(vm).stopped_at.is_none()));

    assert_eq!(world.end(), Outcome::Committed);
    let end = |vms: &[String]| world.at(&vms[0], is_end).expect("ended");
    let turn = |vms: &[String]| world.at(&vms[0], is_turn).expect("had its turn");
    assert!(turn(&first) < end(&first) && end(&first) <= turn(&second));
    assert!(turn(&second) < end(&second));
    for vms in [&first, &second] {
        let stops: Vec<_> = vms.iter().map(|vm| world.vm(vm).stopped_at).collect();
        assert!(
            stops.iter().all(|at| *at == stops[0] && at.is_some()),
            "{stops:?}"
        );
    }
    // Shares that change by less than 5 % are not told.
    assert!(world.most <= B * 1.05, "{}", world.most);
    // A group is gathered in about the time that its dirty pages take.
    let time = end(&second) - turn(&second);
    assert!(time < s(2.0 * 300e6 / (B - 10e6)), "{time:?}");
}

#[test]
fn a_path_that_carries_less_than_was_told_is_found_and_shared() {
    let guests = guests(3);
    let app = app_of(&guests, OnPartial::Stay);
    let limits = |world: &World<'_>| {
        let groups = world.conductor.started().iter();
        let going = groups.filter(|one| one.group.outcome().is_none());
        let rate = |one: &Started| {
            one.group
                .spec()
                .capacity
                .rate(one.group.spec().members.len())
        };
        going.map(|one| rate(one).0).collect::<Vec<u64>>()
    };
    let is_found = |step: &Step| matches!(step, Step::Bandwidth { rate: Some(_), .. });
    let mut world = World::new(&app, &guests);
    world.carries = 20e6;
    world.until(|world| world.any(is_found));
    assert!(world.now < s(8.0), "{:?}", world.now);
    // All memory is still copied once at the same time.
    world.until(|world| world.vms.iter().all(|vm| vm.copied_at.is_some()));
    let ends: Vec<Duration> = world.vms.iter().filter_map(|vm| vm.copied_at).collect();
    let (one, last) = (ends.iter().min().unwrap(), ends.iter().max().unwrap());
    assert!(*last - *one < s(2.0), "{ends:?}");
    let limit = limits(&world).into_iter().max().unwrap_or_default();
    assert!((19_000_000..22_500_000).contains(&limit), "{limit}");
    // It carries all again: by and by that is used.
    world.carries = 32e6;
    let is_lifted = |step: &Step| matches!(step, Step::Bandwidth { rate: None, .. });
    let before = world.now;
    world.until(|world| world.any(is_lifted));
    assert!(world.now - before < s(30.0), "{:?}", world.now - before);
    assert_eq!(world.end(), Outcome::Committed);
}

#[test]
fn the_order_of_the_turns_follows_what_was_dirtied() {
    // As foreseen db1 dirties most, and goes first: the last one's turn is the dearest.
    let mut foreseen: Vec<Guest> = guests(4).split_off(1);
    for (guest, working_set) in foreseen.iter_mut().zip([300e6, 300e6, 100e6]) {
        (guest.memory, guest.working_set) = (400e6, working_set);
    }
    let mut app = app_of(&foreseen, OnPartial::Stay);
    let pair = |a, b| crate::application::Traffic {
        between: [VmId(a), VmId(b)],
        rate: BytesPerSecond(1_000_000),
    };
    app.traffic = vec![pair(0, 1), pair(1, 2)];
    let turns = |guests: &[Guest]| {
        let mut world = World::new(&app, guests);
        assert_eq!(world.groups(), [["db1"], ["db2"], ["db3"]]);
        assert_eq!(world.end(), Outcome::Committed);
        let planned = world.any(|step| matches!(step, Step::Planned { .. }));
        let mut names = ["db1", "db2", "db3"];
        names.sort_by_key(|name| world.at(name, is_turn));
        (names, planned)
    };
    assert_eq!(turns(&foreseen), (["db1", "db2", "db3"], false));
    // It is db3 that dirties most.
    let mut guests = foreseen.clone();
    (guests[0].working_set, guests[2].working_set) = (50e6, 350e6);
    assert_eq!(turns(&guests), (["db3", "db2", "db1"], true));
}

#[test]
fn without_profiles_there_is_one_group_of_two_stages() {
    let guests = guests(2);
    let mut app = app_of(&guests, OnPartial::Stay);
    for vm in &mut app.vms {
        vm.profile = Default::default();
    }
    let mut world = World::new(&app, &guests);
    assert_eq!(world.groups(), [["web", "db1"]]);
    assert_eq!(world.end(), Outcome::Committed);
    let ends: Vec<_> = world.vms.iter().filter_map(|vm| vm.copied_at).collect();
    assert!(ends[0].abs_diff(ends[1]) < s(1.0), "{ends:?}");
}

#[test]
fn a_vm_that_is_held_while_it_waits_catches_up_first() {
    // It has nothing to send after its bulk copy, so that it is held, and dirties a lot later.
    let mut guests = guests(3);
    for guest in &mut guests {
        guest.dirty_rate /= 10.0;
    }
    guests[2].working_set = 5e6;
    let profile = self::guests(3);
    let app = app_of(&profile, OnPartial::Stay);
    let mut world = World::new(&app, &guests);
    let second = group(&world, 1);
    world.until(|world| world.at(&second[0], is_turn).is_some());
    assert_eq!(world.end(), Outcome::Committed);
    let arms = world
        .steps
        .iter()
        .filter(|(_, _, step)| matches!(step, Step::Disarmed { .. }));
    assert_eq!(arms.count(), 0, "{:?}", world.steps);
}

#[test]
fn waiting_for_a_turn_costs_no_deadline() {
    let guests = guests(4);
    let mut app = app_of(&guests, OnPartial::Stay);
    // Stage one takes 57 s, a turn about 20.
    app.deadline = Some(s(85.0));
    let mut world = World::new(&app, &guests);
    assert_eq!(world.groups().len(), 3);
    assert_eq!(world.end(), Outcome::Committed);
    let last = group(&world, 2);
    let end = world.at(&last[0], is_end).expect("ended");
    assert!(end > s(1.0 + 85.0 + 10.0), "{end:?}");
    assert!(
        !world
            .steps
            .iter()
            .any(|(_, _, step)| matches!(step, Step::Notice(_)))
    );

    // In stage one it does count.
    app.deadline = Some(s(40.0));
    let mut world = World::new(&app, &guests);
    assert_eq!(world.end(), Outcome::RolledBack);
    assert!(world.now < s(60.0));
}

#[test]
fn a_failure_before_any_group_has_moved_leaves_everything_at_home() {
    for on_partial in [OnPartial::Stay, OnPartial::Retry, OnPartial::Return] {
        let guests = guests(3);
        let app = app_of(&guests, on_partial);
        // In stage one.
        let mut world = World::new(&app, &guests);
        let second = group(&world, 1);
        world.until(|world| world.now > s(20.0));
        world.fail(&second[0]);
        assert_eq!(world.end(), Outcome::RolledBack);
        assert!(world.now < s(30.0), "{:?}", world.now);
        // One that waits, while the other one has its turn.
        let mut world = World::new(&app, &guests);
        let first = group(&world, 0);
        world.until(|world| world.at(&first[0], is_turn).is_some());
        world.fail(&second[0]);
        assert_eq!(world.end(), Outcome::RolledBack);
        assert_eq!(world.conductor.started().len(), 2);
        assert!(world.vms.iter().all(|vm| vm.stopped_at.is_none()));
        let reason = world.conductor.started()[0]
            .group
            .reason()
            .unwrap_or_default();
        assert!(reason.contains("it broke"), "{reason}");
    }
}

/// The second of three groups fails when the first one has moved.
fn second_fails(on_partial: OnPartial, again: bool) -> (Outcome, Vec<(Vec<String>, bool)>) {
    let guests = guests(4);
    let app = app_of(&guests, on_partial);
    let mut world = World::new(&app, &guests);
    let groups = world.groups();
    world.until(|world| world.at(&groups[1][0], is_turn).is_some());
    world.fail(&groups[1][0]);
    if again {
        let retries = |world: &World<'_>| {
            let mut started = world.conductor.started().iter();
            started.any(|one| one.purpose == Purpose::Retry)
        };
        world.until(retries);
        world.fail(&groups[1][0]);
    }
    let outcome = world.end();
    let moved = |vms: &Vec<String>| {
        let there = vms.iter().filter(|vm| world.vm(vm).at == HostId(1)).count();
        assert!(there == 0 || there == vms.len(), "{vms:?} is divided");
        (vms.clone(), there > 0)
    };
    (outcome, groups.iter().map(moved).collect())
}

#[test]
fn a_later_failure_stays_retries_or_returns() {
    let moved =
        |found: &[(Vec<String>, bool)]| -> Vec<bool> { found.iter().map(|one| one.1).collect() };
    let (outcome, groups) = second_fails(OnPartial::Stay, false);
    assert_eq!(outcome, Outcome::PartlyMoved);
    assert_eq!(moved(&groups), [true, false, false]);
    let (outcome, groups) = second_fails(OnPartial::Retry, false);
    assert_eq!(outcome, Outcome::Committed);
    assert_eq!(moved(&groups), [true; 3]);
    let (outcome, groups) = second_fails(OnPartial::Retry, true);
    assert_eq!(outcome, Outcome::PartlyMoved);
    assert_eq!(moved(&groups), [true, false, false]);
    let (outcome, groups) = second_fails(OnPartial::Return, false);
    assert_eq!(outcome, Outcome::RolledBack);
    assert_eq!(moved(&groups), [false; 3]);
}

#[test]
fn the_last_group_that_fails_while_it_waits_stops_nobody_before_it() {
    let guests = guests(4);
    let app = app_of(&guests, OnPartial::Stay);
    let mut world = World::new(&app, &guests);
    let groups = world.groups();
    world.until(|world| world.at(&groups[1][0], is_turn).is_some());
    world.fail(&groups[2][0]);
    assert_eq!(world.end(), Outcome::PartlyMoved);
    let there = |vms: &[String]| vms.iter().all(|vm| world.vm(vm).at == HostId(1));
    let moved: Vec<bool> = groups.iter().map(|vms| there(vms)).collect();
    assert_eq!(moved, [true, true, false]);
}

#[test]
fn an_interrupt_takes_back_what_has_not_moved() {
    let guests = guests(3);
    for on_partial in [OnPartial::Stay, OnPartial::Retry, OnPartial::Return] {
        let app = app_of(&guests, on_partial);
        let mut world = World::new(&app, &guests);
        world.until(|world| world.now > s(20.0));
        world.interrupt();
        assert_eq!(world.end(), Outcome::RolledBack);
        // While the first one has its turn.
        let mut world = World::new(&app, &guests);
        let groups = world.groups();
        world.until(|world| world.at(&groups[0][0], is_turn).is_some());
        world.interrupt();
        assert_eq!(world.end(), Outcome::RolledBack);
        // While the second one has.
        let mut world = World::new(&app, &guests);
        world.until(|world| world.at(&groups[1][0], is_turn).is_some());
        world.interrupt();
        let expected = match on_partial {
            OnPartial::Return => Outcome::RolledBack,
            _ => Outcome::PartlyMoved,
        };
        assert_eq!(world.end(), expected);
        assert!(world.vm(&groups[1][0]).stopped_at.is_none());
    }
}
