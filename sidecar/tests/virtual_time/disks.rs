//! VMs with local disks.

use sidecar::protocol::command::PrepareDisk;
use sidecar::protocol::types::{Chain, CopyMode};

use super::*;

const DISKS: [(&str, u64); 2] = [("root", 64 * MIB), ("data", 128 * MIB)];

fn disks() -> Vec<PrepareDisk> {
    let disk = |(node, size_bytes): (&str, u64)| PrepareDisk {
        node: node.into(),
        size_bytes,
        copy_mode: CopyMode::Background,
        chain: Chain::Flatten,
        read_only: false,
    };
    DISKS.map(disk).into()
}

fn source() -> World {
    let make = |now| {
        let source = Source::new(now, "db".into(), VM, settings(true));
        VmHalf::Source(Box::new(source.with_disks(&disks())))
    };
    let mut world = World::new(make, "running");
    world.qemu.disks = DISKS.map(|(node, size)| (node.to_owned(), size)).into();
    world
}

fn destination() -> World {
    let place = Place {
        machine: None,
        stream_address: "10.0.0.2:4601".into(),
        incoming_path: "/run/db.in".into(),
        spawn: true,
        disks: disks(),
        images: Vec::new(),
        nbd_path: "/run/db.nbd".into(),
    };
    let make = |now| {
        let name = "db".into();
        VmHalf::Destination(Box::new(Destination::new(
            now,
            name,
            VM,
            settings(true),
            place,
        )))
    };
    let mut world = World::new(make, "inmigrate");
    world.qemu.disks = DISKS.map(|(node, size)| (node.to_owned(), size)).into();
    world
}

fn position(world: &World, command: &str) -> usize {
    let mut commands = world.qemu.commands.iter();
    commands
        .position(|name| name == command)
        .unwrap_or_else(|| panic!("no {command}"))
}

#[test]
fn memory_follows_when_every_disk_is_mirrored() {
    let mut world = source();
    world.up_to(Phase::Precopy);
    assert_eq!(world.count("blockdev-add"), 2);
    assert_eq!(world.count("blockdev-mirror"), 2);
    let report = world.src().report();
    assert_eq!(report.remaining_bytes, (256 + 64 + 128) * MIB);
    assert_eq!(report.disks.len(), 2);
    let now = world.now;
    world.src().hold(now);
    world.qemu.event(
        "BLOCK_JOB_READY",
        serde_json::json!({ "device": "muster-mirror0", "offset": 64 * MIB, "len": 64 * MIB }),
    );
    world.pass(Duration::from_secs(2));
    assert_eq!(world.phase(), Phase::Precopy);
    assert_eq!(world.count("migrate"), 0, "one disk is not mirrored yet");
    world.qemu.mirrors_ready(MIB);
    world.pass(Duration::from_millis(50));
    assert_eq!(world.count("migrate"), 1);
}

#[test]
fn holes_are_not_left_to_be_sent() {
    let mut world = source();
    world.qemu.allocated = Some(16 * MIB);
    world.up_to(Phase::Precopy);
    world.pass(Duration::from_millis(200));
    let left = |world: &mut World, sent: u64| {
        world.src().disks_sent(sent);
        let report = world.src().report();
        let disks: u64 = report.disks.iter().map(|disk| disk.remaining_bytes).sum();
        (report.remaining_bytes - 256 * MIB, disks)
    };
    assert_eq!(left(&mut world, 8 * MIB), (24 * MIB, 24 * MIB));
    // What is known of holes is not exact: something is always left.
    assert_eq!(left(&mut world, 40 * MIB), (12 * MIB, 12 * MIB));
    world.qemu.mirrors_ready(MIB);
    world.settle();
    assert_eq!(left(&mut world, 40 * MIB).0, 2 * MIB);
}

/// Up to the moment at which every disk was copied, memory not being wanted yet.
fn copied_disks_only(world: &mut World) {
    world.up_to(Phase::Prepared);
    let now = world.now;
    world.src().start(now, true);
    world.settle();
    world.qemu.mirrors_ready(0);
    world.settle();
}

#[test]
fn complete_mirrors_are_held_back_until_memory_is_to_follow() {
    let mut world = source();
    copied_disks_only(&mut world);
    assert!(world.has(|e| matches!(e, Event::DisksCopied { .. })));
    assert_eq!(world.count("block-job-pause"), 2);
    // What the guest writes meanwhile is known, though the jobs do nothing.
    world.qemu.written = 3 * MIB;
    world.pass(Duration::from_secs(3));
    assert_eq!(world.count("migrate"), 0);
    let report = world.src().report();
    assert_eq!(report.remaining_bytes, (256 + 2 * 3) * MIB);
    assert_eq!(report.disks[0].dirty_rate_bytes_per_s, 3 * MIB);
    assert_eq!(report.disks[0].dirty_set_bytes, 3 * MIB);
    let now = world.now;
    for _ in 0..2 {
        world.src().start(now, false);
        world.settle();
    }
    assert_eq!(world.count("block-job-resume"), 2);
    assert_eq!(world.count("migrate"), 1);
    world.pass(Duration::from_secs(3));
    assert_eq!(world.src().report().disks[0].remaining_bytes, 0);
}

#[test]
fn a_guest_that_was_slowed_is_so_no_more_after_an_abort() {
    let mut world = source();
    world.up_to(Phase::Precopy);
    let now = world.now;
    world.src().throttle_disks(now, 500_000);
    world.settle();
    let limits = |world: &World| world.qemu.limits.values().copied().collect::<Vec<u64>>();
    assert_eq!(limits(&world), [500_000, 500_000]);
    world.run.abort();
    world.pass(Duration::from_secs(3));
    assert_eq!(limits(&world), [0, 0]);
    assert_eq!(world.phase(), Phase::RolledBack);
}

#[test]
fn an_abort_ends_mirrors_that_are_held_back() {
    let mut world = source();
    copied_disks_only(&mut world);
    world.run.abort();
    world.pass(Duration::from_secs(3));
    assert_eq!(world.phase(), Phase::RolledBack);
    assert_eq!(world.count("block-dirty-bitmap-remove"), 4);
    assert!(world.qemu.targets.is_empty() && world.qemu.jobs.is_empty());
}

#[test]
fn what_is_left_of_disks_counts_and_is_copied_before_the_switchover() {
    let mut world = source();
    world.up_to(Phase::Armed);
    world.qemu.mirrors_ready(MIB);
    let now = world.now;
    world.src().release(now);
    world.settle();
    // The guest writes on until it is paused.
    world.qemu.mirrors_ready(3 * MIB);
    world.qemu.jobs_stay = true;
    world.qemu.pauses();
    world.settle();
    let both = (5 + 2 * 3) * MIB;
    assert!(
        world.has(
            |e| matches!(e, Event::Stopped { remaining_bytes, .. } if *remaining_bytes == both)
        )
    );
    world.src().proceed(now);
    world.src().proceed(now);
    world.pass(Duration::from_millis(100));
    assert_eq!(world.count("block-job-cancel"), 2);
    assert_eq!(world.count("blockdev-del"), 0);
    world.qemu.ends("muster-mirror0", true, None);
    world.settle();
    assert_eq!(world.count("blockdev-del"), 0);
    world.qemu.ends("muster-mirror1", true, None);
    world.settle();
    assert_eq!(world.count("blockdev-del"), 2);
    world.src().disk_sealed(now);
    world.settle();
    assert_eq!(
        world.count("migrate-continue"),
        0,
        "one server may still run"
    );
    assert_eq!(world.phase(), Phase::Stopped);
    world.src().disk_sealed(now);
    world.settle();
    assert_eq!(world.phase(), Phase::Switching);
    assert_eq!(world.count("migrate-continue"), 1);
    world.qemu.completes("postmigrate");
    world.settle();
    assert_eq!(world.phase(), Phase::Arrived);
}

#[test]
fn a_mirror_that_does_not_end_whole_takes_the_vm_back() {
    for (whole, error) in [(true, Some("Input/output error")), (false, None)] {
        let mut world = source();
        world.up_to(Phase::Stopped);
        world.qemu.jobs_stay = true;
        let now = world.now;
        world.src().proceed(now);
        world.settle();
        world.qemu.jobs_stay = false;
        world.qemu.ends("muster-mirror1", whole, error);
        world.pass(Duration::from_secs(1));
        assert_eq!(world.count("migrate-continue"), 0);
        assert_eq!(world.phase(), Phase::RolledBack);
        assert_eq!(world.qemu.status, "running");
        assert!(world.qemu.targets.is_empty() && world.qemu.jobs.is_empty());
    }
}

#[test]
fn disks_that_are_not_drained_in_time_take_the_vm_back() {
    let mut world = source();
    world.up_to(Phase::Stopped);
    world.qemu.jobs_stay = true;
    let now = world.now;
    world.src().proceed(now);
    world.pass(Duration::from_secs(2));
    assert_eq!(world.phase(), Phase::Stopped);
    world.pass(Duration::from_secs(1));
    assert_eq!(world.phase(), Phase::RollingBack);
    assert_eq!(
        world.qemu.status, "running",
        "the guest does not wait for the clean-up"
    );
    world.qemu.jobs_stay = false;
    for job in ["muster-mirror0", "muster-mirror1"] {
        world.qemu.ends(job, false, None);
    }
    world.pass(Duration::from_secs(1));
    assert_eq!(world.phase(), Phase::RolledBack);
}

#[test]
fn an_abort_in_any_phase_leaves_no_mirror() {
    for phase in WAY {
        let mut world = source();
        world.up_to(phase);
        world.run.abort();
        world.pass(Duration::from_secs(3));
        assert_eq!(world.phase(), Phase::RolledBack, "{phase}");
        assert_eq!(world.qemu.status, "running", "{phase}");
        assert!(world.qemu.targets.is_empty(), "{phase}");
        assert!(world.qemu.jobs.is_empty(), "{phase}");
        assert!(world.run.has_ended(), "{phase}");
    }
}

#[test]
fn the_connections_are_cut_before_a_mirror_is_ended_by_force() {
    let mut world = source();
    world.up_to(Phase::Precopy);
    world.qemu.jobs_stay = true;
    world.run.abort();
    world.settle();
    assert!(world.outputs.contains(&Output::CutStream));
    world.pass(Duration::from_secs(1));
    assert_eq!(
        world.phase(),
        Phase::RollingBack,
        "the jobs are still there"
    );
    assert_eq!(world.count("blockdev-del"), 0);
    world.pass(Duration::from_secs(5));
    assert!(
        world.has(|e| matches!(e, Event::Failed { error, .. } if error.contains("does not end")))
    );
    world.qemu.ends("muster-mirror0", false, None);
    world.qemu.ends("muster-mirror1", false, None);
    world.pass(Duration::from_secs(1));
    assert_eq!(world.phase(), Phase::RolledBack);
    assert!(world.qemu.targets.is_empty());
}

#[test]
fn a_full_disk_is_a_reason_and_a_cut_connection_a_consequence() {
    for (error, is_reason) in [("No space left on device", true), ("Broken pipe", false)] {
        let mut world = source();
        world.up_to(Phase::Precopy);
        world.qemu.ends("muster-mirror0", true, Some(error));
        world.pass(Duration::from_secs(1));
        assert!(world.has(|e| matches!(
            e,
            Event::Failed { error: told, secondary, .. }
                if told.contains(error) && *secondary != is_reason
        )));
        assert_eq!(world.phase(), Phase::RolledBack);
    }
}

#[test]
fn a_disk_that_is_not_as_it_is_said_to_be_is_refused_before_anything_is_changed() {
    for disks in [vec![("root".to_owned(), 64 * MIB)], vec![]] {
        let mut world = source();
        world.qemu.disks = disks;
        world.pass(Duration::from_millis(100));
        assert!(world.has(|e| matches!(e, Event::Failed { .. })));
        assert_eq!(world.count("migrate-set-capabilities"), 0);
        assert_eq!(world.phase(), Phase::RolledBack);
        let mut world = destination();
        world.qemu.disks.truncate(1);
        world.pass(Duration::from_millis(100));
        assert!(world.has(|e| matches!(e, Event::Failed { .. })));
        assert_eq!(world.count("nbd-server-start"), 0);
    }
}

#[test]
fn a_restarted_sidecar_removes_what_its_earlier_life_had_mirrored() {
    let nodes: Vec<String> = DISKS.map(|(node, _)| node.to_owned()).into();
    let make = |now| {
        let source = Source::adopt(now, "db".into(), VM, settings(true), false, None, true);
        VmHalf::Source(Box::new(source.with_adopted_disks(&nodes)))
    };
    let mut world = World::new(make, "running");
    world.qemu.disks = DISKS.map(|(node, size)| (node.to_owned(), size)).into();
    world.qemu.targets = vec!["muster-nbd0".into(), "muster-nbd1".into()];
    world.qemu.jobs.insert("muster-mirror1".into(), (0, MIB));
    world.pass(Duration::from_secs(1));
    assert_eq!(world.phase(), Phase::RolledBack);
    assert!(world.qemu.targets.is_empty() && world.qemu.jobs.is_empty());
}

#[test]
fn a_destination_opens_its_exports_and_seals_them_before_it_has_arrived() {
    let mut world = destination();
    world.pass(Duration::from_millis(100));
    assert_eq!(world.phase(), Phase::Prepared);
    assert_eq!(world.count("block-export-add"), 2);
    assert!(position(&world, "block-export-add") < position(&world, "migrate-incoming"));
    world.qemu.migrates("active");
    world.settle();
    let now = world.now;
    world.dst().disk_finished(now);
    world.settle();
    assert_eq!(world.count("nbd-server-stop"), 0);
    world.dst().disk_finished(now);
    world.settle();
    assert_eq!(world.count("nbd-server-stop"), 1);
    assert!(world.outputs.contains(&Output::SealDisks));
    world.qemu.completes("paused");
    world.settle();
    assert_eq!(world.phase(), Phase::Arrived);
}

#[test]
fn memory_that_comes_before_the_disks_are_complete_does_not_arrive() {
    let mut world = destination();
    world.pass(Duration::from_millis(100));
    world.qemu.migrates("active");
    world.qemu.completes("paused");
    world.pass(Duration::from_secs(1));
    assert!(!world.has(|e| matches!(e, Event::Arrived { .. })));
    assert_eq!(world.phase(), Phase::RolledBack);
}

#[test]
fn a_vm_is_armed_when_its_hook_has_ended_and_not_when_it_fails() {
    for result in [Ok(()), Err("the hook failed".to_owned())] {
        let make = |now| {
            let source = Source::new(now, "db".into(), VM, settings(true)).with_hook(true);
            VmHalf::Source(Box::new(source))
        };
        let mut world = World::new(make, "running");
        world.up_to(Phase::Held);
        let now = world.now;
        for _ in 0..2 {
            world.src().arm(now);
            world.settle();
        }
        let hooks = world.outputs.iter().filter(|one| **one == Output::RunHook);
        assert_eq!(hooks.count(), 1);
        assert_eq!(world.phase(), Phase::Held);
        let is_good = result.is_ok();
        world.src().hook_ended(now, result);
        world.pass(Duration::from_millis(300));
        let expected = if is_good {
            Phase::Armed
        } else {
            Phase::RolledBack
        };
        world.pass(Duration::from_secs(2));
        assert_eq!(world.phase(), expected);
    }
}
