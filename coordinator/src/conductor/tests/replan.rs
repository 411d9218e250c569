//! Groups of `muster` that wait are made anew when a path carries less than was told.

use super::world::{Guest, World};
use super::*;
use crate::application::Traffic;
use crate::engine::Step;

fn guest(name: &'static str, memory: f64, dirty_rate: f64) -> Guest {
    Guest {
        name,
        memory,
        dirty_rate,
        working_set: 40e6,
    }
}

/// A front end, and two databases that fit 32 MB/s together, but not with it.
fn guests() -> Vec<Guest> {
    vec![
        guest("web", 1500e6, 9e6),
        guest("db1", 300e6, 10e6),
        guest("db2", 300e6, 10e6),
    ]
}

fn app_of(guests: &[Guest]) -> Application {
    let mut text = String::from(
        "version = 1\n[application]\nname = \"shop\"\nbandwidth = \"32MB/s\"\n\
         [[host]]\nname = \"a\"\ncontrol = \"unix:/a\"\n[[host]]\nname = \"b\"\ncontrol = \"unix:/b\"\n",
    );
    for (index, guest) in guests.iter().enumerate() {
        text += &format!(
            "[[vm]]\nname = \"{}\"\nfrom = \"a\"\nto = \"b\"\nmemory = \"{}B\"\n\
             uuid = \"00000000-0000-0000-0000-00000000000{index}\"\ndirty-rate = \"{}B/s\"\n\
             writable-working-set = \"{}B\"\n",
            guest.name, guest.memory, guest.dirty_rate, guest.working_set
        );
    }
    let mut app = Application::parse(&text, Path::new("test")).expect("good");
    let pair = |a, b, rate| Traffic {
        between: [VmId(a), VmId(b)],
        rate: BytesPerSecond(rate),
    };
    app.traffic = vec![pair(0, 1, 100_000), pair(1, 2, 5_000_000)];
    app
}

fn is_planned(step: &Step) -> bool {
    matches!(step, Step::Planned { .. })
}

#[test]
fn where_no_two_fit_any_more_they_follow_one_another() {
    let guests = guests();
    let app = app_of(&guests);
    let mut world = World::with(&app, Policy::Muster, &guests);
    assert_eq!(world.conductor.plan.groups.len(), 2);
    assert_eq!(world.groups(), [["web"]]);
    world.carries = 20e6;
    world.until(|world| world.at("web", is_planned).is_some());
    let found = world.steps.iter().find_map(|(_, _, step)| match step {
        Step::Planned { groups } => Some(groups.clone()),
        _ => None,
    });
    // db1 talks to both, but then each is alone.
    assert_eq!(found.expect("planned"), [["db1"], ["db2"]]);
    // The whole search finds the same.
    let planning = world.conductor.poll_planning().expect("asked");
    assert!(world.conductor.poll_planning().is_none());
    world.conductor.handle_replanned(planning.run());
    assert_eq!(world.end(), Outcome::Committed);
    assert_eq!(world.groups(), [["web"], ["db1"], ["db2"]]);
    let count = world.steps.iter().filter(|(_, _, step)| is_planned(step));
    assert_eq!(count.count(), 1);
}

#[test]
fn a_path_that_carries_it_again_puts_them_together_again() {
    let guests = guests();
    let app = app_of(&guests);
    let mut world = World::with(&app, Policy::Muster, &guests);
    world.carries = 20e6;
    world.until(|world| world.at("web", is_planned).is_some());
    world.carries = 32e6;
    assert_eq!(world.end(), Outcome::Committed);
    let groups = world.groups();
    assert_eq!(groups[0], ["web"]);
    assert_eq!(groups[1], ["db1", "db2"]);
}

#[test]
fn guests_that_dirty_more_than_they_did_are_planned_anew() {
    let guests = guests();
    let app = app_of(&guests);
    let mut world = World::with(&app, Policy::Muster, &guests);
    assert_eq!(world.groups(), [["web"]]);
    assert_eq!(world.conductor.waiting(), [VmId(1), VmId(2)]);
    let mut profile = app.vm(VmId(1)).profile;
    let rate = |mb: u64| Some(BytesPerSecond(mb * 1_000_000));
    // As before, or nearly.
    profile.dirty_rate = rate(10);
    world.conductor.handle_measured(vec![(VmId(1), profile)]);
    assert!(world.conductor.poll_planning().is_none());
    // They do not fit 32 MB/s together any more.
    (profile.dirty_rate, profile.max_dirty_rate) = (rate(25), rate(28));
    world
        .conductor
        .handle_measured(vec![(VmId(1), profile), (VmId(0), profile)]);
    assert!(world.conductor.poll_planning().is_some());
    assert_eq!(world.end(), Outcome::Committed);
    let groups = world.groups();
    assert_eq!(groups.len(), 3, "{groups:?}");
    let started = world.conductor.started().iter();
    let members = started.flat_map(|started| &started.group.spec().members);
    let mut known = members.filter(|member| member.profile.dirty_rate == rate(25));
    assert_eq!(known.next().expect("one").name, "db1");
    assert!(known.next().is_none(), "web has started");
}

#[test]
fn an_answer_to_an_older_question_is_not_taken() {
    let guests = guests();
    let app = app_of(&guests);
    let mut world = World::with(&app, Policy::Muster, &guests);
    world.carries = 20e6;
    world.until(|world| world.at("web", is_planned).is_some());
    let old = world.conductor.poll_planning().expect("asked").run();
    world.carries = 32e6;
    world.until(|world| world.conductor.paths.narrow().count() == 0);
    let waiting = world.conductor.waiting.clone();
    world.conductor.handle_replanned(old);
    assert_eq!(world.conductor.waiting, waiting);
    // Nor one that comes when they have started.
    let late = world.conductor.poll_planning().expect("asked");
    world.until(|world| world.conductor.started().len() > 1);
    world.conductor.handle_replanned(late.run());
    assert!(world.conductor.waiting.is_empty());
    assert_eq!(world.end(), Outcome::Committed);
}
