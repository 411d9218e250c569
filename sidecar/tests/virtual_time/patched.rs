//! A patched QEMU: its own hold, over either transport, and the socket it gets.

use serde_json::json;

use super::*;
use sidecar::protocol::types::{QemuBuild, Role};

fn source(transport: Transport) -> World {
    source_with(Settings {
        transport,
        ..settings(true)
    })
}

fn source_with(settings: Settings) -> World {
    let settings = Settings {
        throttle: false,
        ..settings
    };
    let make = |now| VmHalf::Source(Box::new(Source::new(now, "db".into(), VM, settings)));
    let mut world = World::new(make, "running");
    world.qemu.patch();
    world
}

impl World {
    fn does(&mut self, act: impl FnOnce(&mut Source, Now)) {
        let now = self.now;
        act(self.src(), now);
        self.settle();
    }

    fn holds(&mut self, reason: &str) {
        let data = json!({"reason": reason, "remaining": 5 * MIB, "dirty-rate": MIB,
            "bandwidth": 50 * MIB, "expected-downtime": 100, "refused": false});
        self.qemu.event("MIGRATION_SWITCHOVER_HELD", data);
        self.settle();
    }

    fn stops(&mut self, remaining: u64) {
        self.qemu.pauses();
        let data = json!({"remaining": remaining, "bandwidth": MIB, "expected-downtime": 1});
        self.qemu.event("MIGRATION_SWITCHOVER_STOPPED", data);
        self.settle();
    }

    /// To the hold, and through a release.
    fn up_to_stopped(&mut self, remaining: u64) {
        self.does(|source, now| source.arm(now));
        self.qemu.syncs += 1;
        self.pass(Duration::from_millis(50));
        assert_eq!(self.phase(), Phase::Armed);
        self.does(|source, now| source.release(now));
        self.stops(remaining);
        assert_eq!(self.phase(), Phase::Stopped);
    }
}

fn held(world: &World) -> Vec<HoldReason> {
    let reasons = world.events.iter().filter_map(|event| match event {
        Event::Held { reason, .. } => Some(*reason),
        _ => None,
    });
    reasons.collect()
}

fn stopped(world: &World) -> Vec<u64> {
    let left = world.events.iter().filter_map(|event| match event {
        Event::Stopped {
            remaining_bytes, ..
        } => Some(*remaining_bytes),
        _ => None,
    });
    left.collect()
}

#[test]
fn what_is_held_in_vain_rests_or_sends_on() {
    for (resend, held, armed) in [(false, 300, 300), (true, 2_000_000, 300)] {
        let mut world = source_with(Settings {
            resend,
            ..settings(true)
        });
        world.up_to(Phase::Precopy);
        world.holds("stalled");
        let limit = |world: &World| world.qemu.parameters["downtime-limit"].as_u64();
        assert_eq!(limit(&world), Some(held));
        world.does(|source, now| source.arm(now));
        assert_eq!(limit(&world), Some(armed));
        world.qemu.syncs += 1;
        world.pass(Duration::from_millis(50));
        world.does(|source, now| source.disarm(now));
        assert_eq!(limit(&world), Some(held));
    }
}

#[test]
fn it_holds_goes_back_and_goes_on() {
    for transport in [Transport::Relay, Transport::Direct] {
        let mut world = source(transport);
        world.up_to(Phase::Precopy);
        assert!(world.qemu.capabilities["switchover-hold"]);
        assert!(!world.qemu.capabilities["switchover-ack"]);
        assert_eq!(world.qemu.parameters["switchover-hold-stall-rounds"], 2);
        assert_eq!(world.qemu.parameters["switchover-hold-stall-ahead"], true);
        let bound = world.qemu.parameters["switchover-hold-max-bytes"].as_u64();
        assert_eq!(bound, Some(3 * 256 * MIB));
        let round = json!({"round": 1, "sent-bytes": 256 * MIB, "dirtied-bytes": 5 * MIB,
            "duration-ms": 5000, "remaining": 5 * MIB});
        world.qemu.event("MIGRATION_ROUND", round);
        world.holds("converged");
        assert_eq!(world.phase(), Phase::Held);
        assert!(
            world.has(|e| matches!(e, Event::Round { round, .. } if round.duration_ms == 5000))
        );
        let bandwidth = world.qemu.parameters["max-bandwidth"].clone();
        world.pass(Duration::from_secs(1));
        assert_eq!(
            world.qemu.parameters["max-bandwidth"], bandwidth,
            "it sleeps by itself"
        );

        world.up_to_stopped(7 * MIB);
        let mut result = Ok(());
        world.does(|source, now| result = source.back(now));
        assert_eq!(result, Ok(()));
        world.does(|source, now| source.proceed(now));
        assert_eq!(world.count("migrate-continue"), 0, "it is on its way back");
        world.qemu.status = "running".into();
        world.qemu.migrates("active");
        world.holds("converged");
        assert_eq!(world.phase(), Phase::Held);
        world.up_to_stopped(MIB);
        world.does(|source, now| source.proceed(now));
        world.qemu.completes("postmigrate");
        world.settle();
        assert_eq!(world.phase(), Phase::Arrived);
        assert_eq!(held(&world), [HoldReason::Converged; 2]);
        assert_eq!(stopped(&world), [7 * MIB, MIB]);
        assert!(!world.outputs.contains(&Output::OpenAckGate));
        let report = world.src().report();
        assert_eq!(
            (report.qemu_build, report.transport),
            (QemuBuild::Patched, transport)
        );
    }
}

#[test]
fn asked_to_hold_it_makes_this_round_the_last() {
    let mut world = source(Transport::Relay);
    world.up_to(Phase::Precopy);
    world.does(|source, now| source.hold(now));
    assert_eq!(world.phase(), Phase::Precopy);
    assert_eq!(world.qemu.parameters["switchover-hold-max-rounds"], 1);
    world.holds("stalled");
    assert_eq!(held(&world), [HoldReason::Asked]);
}

#[test]
fn a_back_that_nothing_comes_of_is_a_fault() {
    let mut world = source(Transport::Direct);
    world.up_to(Phase::Precopy);
    world.holds("stalled");
    assert_eq!(held(&world), [HoldReason::Stalled]);
    world.up_to_stopped(MIB);
    world.does(|source, now| source.back(now).expect("patched"));
    world.pass(Duration::from_secs(3));
    assert_eq!(world.phase(), Phase::RolledBack);
    assert_eq!(world.qemu.parameters["max-bandwidth"], 134_217_728);
}

#[test]
fn a_socket_goes_to_qemu_before_the_migration_begins() {
    let mut world = source(Transport::Direct);
    world.up_to(Phase::Precopy);
    assert!(world.outputs.contains(&Output::Connect) && !world.outputs.contains(&Output::Listen));
    let at = |name| world.qemu.commands.iter().position(|c| c == name);
    assert!(at("getfd").expect("sent") < at("migrate").expect("sent"));
}

#[test]
fn an_incoming_qemu_gets_its_socket_when_the_stream_comes() {
    let settings = Settings {
        transport: Transport::Direct,
        ..settings(true)
    };
    let place = Place {
        spawn: true,
        disks: Vec::new(),
        nbd_path: "/run/db.nbd".into(),
        ..Place::default()
    };
    let make = |now| {
        let half = Destination::new(now, "db".into(), VM, settings, place);
        VmHalf::Destination(Box::new(half))
    };
    let mut world = World::new(make, "inmigrate");
    world.pass(Duration::from_millis(100));
    assert_eq!(world.phase(), Phase::Prepared);
    assert_eq!(world.count("migrate-incoming"), 0);
    assert!(world.has(|e| matches!(
        e,
        Event::Prepared {
            role: Role::Destination,
            ..
        }
    )));
    let now = world.now;
    assert!(world.dst().stream_connected(now));
    world.settle();
    assert_eq!(
        (world.count("getfd"), world.count("migrate-incoming")),
        (1, 1)
    );
    assert!(world.outputs.contains(&Output::AcceptStream));
}

#[test]
fn stock_qemu_refuses_to_be_held_over_a_direct_stream() {
    let settings = Settings {
        transport: Transport::Direct,
        ..settings(true)
    };
    let make = |now| VmHalf::Source(Box::new(Source::new(now, "db".into(), VM, settings)));
    let mut world = World::new(make, "running");
    world.pass(Duration::from_millis(100));
    let refused =
        |e: &Event| matches!(e, Event::Failed { error, .. } if error.contains("transport relay"));
    assert!(world.has(refused));
    let mut world = World::source(true);
    world.up_to(Phase::Stopped);
    world.does(|source, now| assert!(source.back(now).is_err()));
}
