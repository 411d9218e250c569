//! Whose turn it is: idleness, empty grants, stale identifiers, limits of 0.

mod sim;

use std::time::{Duration, Instant};

use rate_limiter::{Bytes, BytesPerSecond, Hierarchy, LeafId, Poll};
use sim::{Lateness, Sim, mb, ms};

fn leaves<const N: usize>(sim: &mut Sim) -> [LeafId; N] {
    let group = sim.limiter.add_group(sim.now, None);
    [(); N].map(|()| {
        let leaf = sim.limiter.add_leaf(sim.now, group);
        sim.limiter.set_backlogged(leaf, true);
        leaf
    })
}

fn next(limiter: &mut Hierarchy, now: Instant) -> LeafId {
    match limiter.poll(now) {
        Poll::Grant { leaf, .. } => leaf,
        other => panic!("expected a grant, got {other:?}"),
    }
}

#[test]
fn idleness_earns_no_credit() {
    let mut sim = Sim::new(Some(mb(50)), Lateness::UpTo(ms(10)));
    let [a, b] = leaves(&mut sim);
    sim.limiter.set_backlogged(b, false);
    sim.run(ms(2000));
    sim.limiter.set_backlogged(b, true);
    sim.run(ms(3000));
    sim.assert_rate(&[a], ms(2000), mb(25), 3.0);
    sim.assert_rate(&[b], ms(2000), mb(25), 3.0);
}

#[test]
fn an_own_limit_earns_no_credit() {
    let mut sim = Sim::new(Some(mb(50)), Lateness::UpTo(ms(10)));
    let [a, b] = leaves(&mut sim);
    sim.limiter.set_leaf_limit(sim.now, b, Some(mb(1)));
    sim.run(ms(2000));
    sim.limiter.set_leaf_limit(sim.now, b, None);
    sim.run(ms(3000));
    sim.assert_rate(&[a], ms(2000), mb(25), 3.0);
    sim.assert_rate(&[b], ms(2000), mb(25), 3.0);
}

#[test]
fn the_same_holds_for_groups() {
    for idle in [true, false] {
        let mut sim = Sim::new(Some(mb(50)), Lateness::UpTo(ms(10)));
        let [a] = leaves(&mut sim);
        let group = sim.limiter.add_group(sim.now, Some(mb(1)));
        let b = sim.limiter.add_leaf(sim.now, group);
        sim.limiter.set_backlogged(b, !idle);
        sim.run(ms(2000));
        sim.limiter.set_group_limit(sim.now, group, None);
        sim.limiter.set_backlogged(b, true);
        sim.run(ms(3000));
        sim.assert_rate(&[a], ms(2000), mb(25), 3.0);
        sim.assert_rate(&[b], ms(2000), mb(25), 3.0);
    }
}

#[test]
fn groups_share_by_the_weight_of_their_backlog() {
    let mut sim = Sim::new(Some(mb(60)), Lateness::UpTo(ms(10)));
    let two: [LeafId; 2] = leaves(&mut sim);
    let [one] = leaves(&mut sim);
    sim.run(ms(2500));
    sim.assert_rate(&two, ms(0), mb(40), 3.0);
    sim.limiter.set_backlogged(two[0], false);
    sim.run(ms(2500));
    sim.assert_rate(&two, ms(2500), mb(30), 3.0);
    sim.assert_rate(&[one], ms(2500), mb(30), 3.0);
}

#[test]
fn polls_without_charge_go_on_to_others() {
    let mut sim = Sim::new(None, Lateness::Always(ms(0)));
    let all: [LeafId; 3] = leaves(&mut sim);
    let mut turns = [0; 3];
    for _ in 0..300 {
        let leaf = next(&mut sim.limiter, sim.now);
        turns[all.iter().position(|&id| id == leaf).unwrap()] += 1;
    }
    assert_eq!(turns, [100, 100, 100]);
}

#[test]
fn empty_grants_go_on_to_others() {
    let mut sim = Sim::new(Some(mb(50)), Lateness::Always(ms(0)));
    let [a, b, c] = leaves(&mut sim);
    let mut moved = 0;
    for _ in 0..100_000 {
        match sim.limiter.poll(sim.now) {
            Poll::Grant { leaf, bytes } => {
                assert!([a, b, c].contains(&leaf));
                let bytes = if leaf == c { bytes } else { Bytes(0) };
                sim.limiter.charge(sim.now, leaf, bytes);
                moved += bytes.0;
            }
            Poll::Wait(deadline) => sim.now = deadline,
            Poll::Idle => panic!("three leaves are backlogged"),
        }
    }
    // The two that move nothing take turns, but no bandwidth.
    let seconds = (sim.now - sim.start).as_secs_f64();
    assert!(
        seconds > 1.0 && moved as f64 / seconds > 49e6,
        "{moved} B in {seconds} s"
    );
}

#[test]
fn a_blocked_socket_leaves_the_bandwidth_to_others() {
    let mut sim = Sim::new(Some(mb(50)), Lateness::UpTo(ms(10)));
    let [a, b] = leaves(&mut sim);
    assert_eq!(next(&mut sim.limiter, sim.now), a);
    sim.limiter.charge(sim.now, a, Bytes(0));
    sim.limiter.set_backlogged(a, false);
    sim.run(ms(2500));
    sim.assert_rate(&[b], ms(0), mb(50), 1.5);
}

#[test]
fn a_limit_of_zero_blocks_until_it_is_lifted() {
    for place in 0..3 {
        let now = Instant::now();
        let mut limiter = Hierarchy::new(now, None);
        let group = limiter.add_group(now, None);
        let leaf = limiter.add_leaf(now, group);
        limiter.set_backlogged(leaf, true);
        let set = |limiter: &mut Hierarchy, limit| match place {
            0 => limiter.set_link_limit(now, limit),
            1 => limiter.set_group_limit(now, group, limit),
            _ => limiter.set_leaf_limit(now, leaf, limit),
        };
        set(&mut limiter, Some(BytesPerSecond(0)));
        assert_eq!(limiter.poll(now), Poll::Idle);
        assert_eq!(limiter.poll(now + ms(5000)), Poll::Idle);
        set(&mut limiter, Some(mb(1)));
        let quantum = Duration::from_micros(4096); // 4 KiB at 1 MB/s
        assert_eq!(limiter.poll(now), Poll::Wait(now + quantum));
        set(&mut limiter, None);
        assert_eq!(next(&mut limiter, now), leaf);
    }
}

#[test]
fn stale_identifiers_do_nothing() {
    let now = Instant::now();
    let mut limiter = Hierarchy::new(now, Some(mb(1)));
    let gone = limiter.add_group(now, Some(mb(1)));
    let orphan = limiter.add_leaf(now, gone);
    limiter.set_backlogged(orphan, true);
    limiter.remove_group(gone);
    let never = limiter.add_leaf(now, gone);
    assert_eq!(limiter.poll(now), Poll::Idle);

    let group = limiter.add_group(now, None);
    let leaf = limiter.add_leaf(now, group);
    for stale in [orphan, never] {
        assert_ne!(stale, leaf);
        assert!(!limiter.has_leaf(stale));
        limiter.set_backlogged(stale, true);
        limiter.set_leaf_limit(now, stale, Some(mb(0)));
        limiter.set_leaf_weight(stale, 5.0).unwrap();
        limiter.charge(now, stale, Bytes(1 << 30));
        limiter.remove_leaf(stale);
        assert_eq!(limiter.leaf_limit(stale), None);
    }
    limiter.set_group_limit(now, gone, Some(mb(0)));
    limiter.remove_group(gone);
    assert!(!limiter.has_group(gone) && limiter.has_group(group));
    assert_eq!(limiter.poll(now), Poll::Idle);
    limiter.set_backlogged(leaf, true);
    assert_eq!(next(&mut limiter, now), leaf);
    assert!(limiter.is_valid());
}

#[test]
fn a_weight_that_is_none_is_refused_and_changes_nothing() {
    let mut sim = Sim::new(Some(mb(50)), Lateness::Always(ms(0)));
    let [a, b] = leaves(&mut sim);
    for bad in [0.0, -1.0, f64::NAN, f64::INFINITY] {
        let error = sim.limiter.set_leaf_weight(a, bad).unwrap_err().to_string();
        assert!(error.contains("finite number above 0"), "{error}");
    }
    sim.run(ms(2500));
    sim.assert_rate(&[a], ms(0), mb(25), 3.0);
    sim.assert_rate(&[b], ms(0), mb(25), 3.0);
}
