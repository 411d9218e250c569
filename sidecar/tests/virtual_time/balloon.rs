//! VMs whose guests give what they do not use while they move.

use sidecar::migration::balloon::Kept;
use sidecar::protocol::command::PrepareBalloon;
use sidecar::protocol::types::BalloonReport;
use sidecar::relay::hello::{Hello, Token};

use super::qemu::Balloon;
use super::*;

const WISH: PrepareBalloon = PrepareBalloon {
    reserve_bytes: 32 * MIB,
    wait_ms: 5000,
};

fn source(status: &str, balloon: Option<Balloon>) -> World {
    let make = |now| {
        let source = Source::new(now, "db".into(), VM, settings(true));
        VmHalf::Source(Box::new(source.with_balloon(Some(WISH))))
    };
    let mut world = World::new(make, status);
    world.qemu.balloon = balloon;
    world
}

/// Prepared and started: pre-copy follows as soon as its balloon lets it.
fn started(balloon: Balloon) -> World {
    let mut world = source("running", Some(balloon));
    world.up_to(Phase::Prepared);
    let now = world.now;
    world.src().start(now, false);
    world
}

fn balloon(world: &World) -> &Balloon {
    world.qemu.balloon.as_ref().expect("a balloon")
}

fn report(world: &mut World) -> BalloonReport {
    world.src().report().balloon.expect("it was asked for")
}

#[test]
fn what_a_guest_does_not_use_is_taken_before_its_memory_is_copied() {
    let mut world = started(Balloon {
        step: 20 * MIB,
        polling: 7,
        ..Balloon::using(64 * MIB)
    });
    world.pass(Duration::from_millis(200));
    assert_eq!(world.phase(), Phase::Prepared);
    assert_eq!(world.count("migrate"), 0, "its balloon is on its way");
    assert_eq!(balloon(&world).target, (64 + 32) * MIB);
    world.pass(Duration::from_secs(1));
    assert_eq!(world.phase(), Phase::Precopy);
    assert_eq!(world.count("migrate"), 1);
    let told = report(&mut world);
    assert_eq!(told.before_bytes, 256 * MIB);
    assert_eq!(told.during_bytes, Some(96 * MIB));
    assert!((350..700).contains(&told.took_ms), "{told:?}");
    assert!(!told.given_back && told.notice.is_none(), "{told:?}");
    assert_eq!(world.src().taken_from(), Some(256 * MIB));
    assert!(world.src().report().free_page_hint);
    // It is noted before anything is changed, and taken back whatever happens.
    let kept = Kept {
        before_bytes: 256 * MIB,
        polling: Some(("/machine/peripheral/balloon0".into(), 7)),
    };
    assert_eq!(world.src().balloon_kept(), Some(&kept));
    world.run.abort();
    world.pass(Duration::from_secs(1));
    assert_eq!(world.phase(), Phase::RolledBack);
    assert_eq!(balloon(&world).target, 256 * MIB);
    assert_eq!(balloon(&world).polling, 7);
    assert!(report(&mut world).given_back);
}

#[test]
fn a_balloon_that_was_inflated_before_is_so_again() {
    let inflated = Balloon {
        actual: 200 * MIB,
        target: 200 * MIB,
        ..Balloon::using(64 * MIB)
    };
    let mut world = started(inflated);
    world.pass(Duration::from_secs(1));
    assert_eq!(balloon(&world).actual, 96 * MIB);
    world.run.abort();
    world.pass(Duration::from_secs(1));
    assert_eq!(balloon(&world).target, 200 * MIB);
    // One that has less than the guest needs beside its reserve is left alone.
    let mut world = started(Balloon {
        actual: 90 * MIB,
        target: 90 * MIB,
        ..Balloon::using(64 * MIB)
    });
    world.pass(Duration::from_secs(1));
    assert_eq!(world.phase(), Phase::Precopy);
    assert_eq!(world.count("balloon"), 0);
    assert_eq!(world.src().taken_from(), None);
}

#[test]
fn nobody_waits_for_a_balloon_that_does_not_come() {
    let none = |used| Balloon {
        used,
        ..Balloon::using(0)
    };
    for (status, device, expected) in [
        ("running", None, "no virtio-balloon"),
        ("running", Some(none(None)), "no driver"),
        ("running", Some(none(Some(250 * MIB))), "nothing to take"),
        ("paused", Some(none(Some(0))), "paused"),
    ] {
        let mut world = source(status, device);
        world.up_to(Phase::Prepared);
        let now = world.now;
        world.src().start(now, false);
        world.pass(Duration::from_millis(2500));
        assert_eq!(world.phase(), Phase::Precopy, "{expected}");
        let told = report(&mut world);
        let notice = told.notice.expect("why");
        assert!(notice.contains(expected), "{notice}");
        assert_eq!(told.during_bytes, None);
        assert_eq!(world.count("balloon"), 0);
    }
}

#[test]
fn a_guest_that_is_slow_is_not_waited_for_and_gives_no_more_later() {
    // It stops after two steps, and: it would need a minute.
    for (step, least, most) in [(0, 900, 1400), (MIB, 4900, 5200)] {
        let mut world = started(Balloon {
            step,
            ..Balloon::using(64 * MIB)
        });
        world.pass(Duration::from_millis(least));
        assert_eq!(world.count("migrate"), 0, "{step}");
        world.pass(Duration::from_millis(most - least));
        assert_eq!(world.count("migrate"), 1, "{step}");
        let at = balloon(&world);
        // What changed hands since the last look comes back.
        assert!(at.actual.abs_diff(at.target) <= step, "{at:?}");
        assert!(
            report(&mut world)
                .notice
                .is_some_and(|text| text.contains("not to"))
        );
    }
}

#[test]
fn a_guest_that_runs_short_gets_its_reserve_again() {
    let mut world = started(Balloon::using(64 * MIB));
    world.pass(Duration::from_secs(1));
    assert_eq!(balloon(&world).actual, 96 * MIB);
    world.qemu.balloon.as_mut().expect("one").used = Some(90 * MIB);
    world.pass(Duration::from_secs(2));
    assert_eq!(balloon(&world).actual, (90 + 32) * MIB);
    assert!(
        report(&mut world)
            .notice
            .is_some_and(|text| text.contains("short"))
    );
    // It never has more than it had.
    world.qemu.balloon.as_mut().expect("one").used = Some(250 * MIB);
    world.pass(Duration::from_secs(9));
    assert_eq!(balloon(&world).actual, 256 * MIB);
}

#[test]
fn from_the_release_on_the_balloon_is_left_alone() {
    let mut world = source("running", Some(Balloon::using(64 * MIB)));
    world.up_to(Phase::Armed);
    let asked = world.count("query-balloon");
    let now = world.now;
    world.src().release(now);
    world.qemu.pauses();
    world.pass(Duration::from_millis(1500));
    assert_eq!(world.phase(), Phase::Stopped);
    world.src().proceed(now);
    world.settle();
    world.qemu.completes("postmigrate");
    world.settle();
    assert_eq!(world.count("query-balloon"), asked);
    assert_eq!(world.count("balloon"), 1);
    world.run.learn(RecordKey::Group, RecordValue::Commit);
    world.run.finish(vec!["db".into()]);
    world.settle();
    assert_eq!(world.count("quit"), 1);
    assert_eq!(world.count("balloon"), 1, "that is the destination's");
}

#[test]
fn a_sidecar_that_was_restarted_gives_back_what_its_earlier_life_took() {
    let kept = Kept {
        before_bytes: 256 * MIB,
        polling: Some(("/machine/peripheral/balloon0".into(), 0)),
    };
    let make = |now| {
        let source = Source::adopt(now, "db".into(), VM, settings(true), false, None, true);
        VmHalf::Source(Box::new(source.with_adopted_balloon(Some(kept))))
    };
    let mut world = World::new(make, "running");
    world.qemu.migration = "failed".into();
    world.qemu.balloon = Some(Balloon {
        actual: 96 * MIB,
        target: 96 * MIB,
        polling: 1,
        refuses: true,
        ..Balloon::using(64 * MIB)
    });
    world.run.lose_coordinator("restarted");
    world.pass(Duration::from_millis(2500));
    assert_eq!(
        world.phase(),
        Phase::RollingBack,
        "QEMU does not take it yet"
    );
    world.qemu.balloon.as_mut().expect("one").refuses = false;
    world.pass(Duration::from_secs(1));
    assert_eq!(world.phase(), Phase::RolledBack);
    assert_eq!(balloon(&world).target, 256 * MIB);
    assert_eq!(balloon(&world).polling, 0);
}

fn hello(balloon_bytes: Option<u64>) -> Hello {
    Hello {
        run: Uuid::from_u128(1),
        vm: VM,
        channel: 0,
        guest_runs: true,
        balloon_bytes,
        token: Token([0; 32]),
    }
}

fn loaded(mut world: World) -> World {
    world.qemu.completes("paused");
    world.pass(Duration::from_millis(50));
    assert_eq!(world.phase(), Phase::Arrived);
    assert_eq!(world.count("balloon"), 0);
    world
}

fn incoming() -> World {
    let mut world = World::destination();
    world.qemu.balloon = Some(Balloon {
        actual: 96 * MIB,
        target: 96 * MIB,
        ..Balloon::using(64 * MIB)
    });
    world.pass(Duration::from_millis(100));
    world
}

#[test]
fn a_destination_gives_back_what_was_taken_at_the_source_once_its_guest_runs() {
    let mut world = incoming();
    assert!(world.dst().greeted(&hello(Some(200 * MIB))));
    // A further connection says nothing new, and one of a disk nothing of it.
    assert!(!world.dst().greeted(&hello(Some(200 * MIB))));
    assert!(!world.dst().greeted(&hello(None)));
    let mut world = loaded(world);
    world.run.learn(RecordKey::Group, RecordValue::Commit);
    world.pass(Duration::from_millis(100));
    let at = |name: &str| world.qemu.commands.iter().position(|known| known == name);
    assert!(at("cont") < at("balloon"), "{:?}", world.qemu.commands);
    assert_eq!(balloon(&world).target, 200 * MIB);
    assert_eq!(world.phase(), Phase::Committed);
    assert!(
        world
            .dst()
            .report()
            .balloon
            .is_some_and(|told| told.given_back)
    );
}

#[test]
fn a_destination_that_is_not_heard_tries_again_and_then_asks_for_a_person() {
    let mut world = incoming();
    // No more than its memory.
    world.dst().greeted(&hello(Some(u64::MAX)));
    let mut world = loaded(world);
    world.qemu.balloon.as_mut().expect("one").refuses = true;
    world.run.learn(RecordKey::Group, RecordValue::Commit);
    world.pass(Duration::from_secs(3));
    assert_eq!(world.phase(), Phase::Committing);
    assert!(
        world.has(|e| matches!(e, Event::Committed { .. })),
        "its guest runs"
    );
    world.pass(Duration::from_secs(20));
    assert_eq!(world.phase(), Phase::Committed);
    let alarm = |output: &Output| matches!(output, Output::Alarm { text, lasts: true } if text.contains("268435456"));
    assert!(world.outputs.iter().any(alarm));
    let told = world.dst().report().balloon.expect("told");
    assert!(!told.given_back && told.notice.is_some());
}

#[test]
fn a_destination_that_was_restarted_knows_it_from_its_note() {
    let kept = Kept {
        before_bytes: 256 * MIB,
        polling: None,
    };
    let make = |now| {
        let half = Destination::adopt(now, "db".into(), VM, settings(true), true, None);
        VmHalf::Destination(Box::new(half.with_adopted_balloon(Some(kept))))
    };
    let mut world = World::new(make, "running");
    world.dst().half.put(Output::ConnectQmp);
    world.qemu.migration = "completed".into();
    world.qemu.balloon = Some(Balloon {
        actual: 96 * MIB,
        target: 96 * MIB,
        ..Balloon::using(64 * MIB)
    });
    world.group = Some(RecordValue::Commit);
    world.run.lose_coordinator("restarted");
    world.pass(Duration::from_secs(2));
    assert_eq!(balloon(&world).target, 256 * MIB);
    assert_eq!(world.phase(), Phase::Committed);
}
