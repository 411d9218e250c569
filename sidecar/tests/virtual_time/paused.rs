//! A VM that is paused before it moves, on a QEMU without the patches: it reaches pre-switchover by
//! itself.

use super::*;

fn paused_source() -> World {
    let make = |now| VmHalf::Source(Box::new(Source::new(now, "db".into(), VM, settings(true))));
    World::new(make, "paused")
}

#[test]
fn what_is_left_of_a_paused_vm_is_what_qemu_says_at_the_end() {
    let mut world = paused_source();
    world.up_to(Phase::Precopy);
    world.qemu.remaining = 28 * MIB;
    world.pass(Duration::from_millis(200));
    // The rest goes out between two polls.
    world.qemu.remaining = 0;
    world.qemu.migrates("pre-switchover");
    world.settle();
    assert_eq!(world.phase(), Phase::Held);
    assert!(world.has(|e| matches!(
        e,
        Event::Held {
            remaining_bytes: 0,
            ..
        }
    )));
    assert_eq!(world.src().report().remaining_bytes, 0);
    let now = world.now;
    world.src().arm(now);
    world.settle();
    assert!(world.has(|e| matches!(
        e,
        Event::Armed {
            remaining_bytes: 0,
            ..
        }
    )));
    let now = world.now;
    world.src().release(now);
    world.settle();
    assert_eq!(world.phase(), Phase::Stopped);
    assert_eq!(world.count("cont"), 0);
}
