//! What the receiver sees, with a caller that is up to 10 ms late: the promises in the crate's
//! documentation.

mod sim;

use rate_limiter::{Bytes, BytesPerSecond, LeafId, Poll};
use sim::{Lateness, Sim, mb, ms};

const LATE: [Lateness; 3] = [
    Lateness::UpTo(ms(10)),
    Lateness::Always(ms(10)),
    Lateness::Always(ms(0)),
];

fn one_leaf(link: Option<BytesPerSecond>, lateness: Lateness) -> (Sim, LeafId) {
    let mut sim = Sim::new(link, lateness);
    let group = sim.limiter.add_group(sim.now, None);
    let leaf = sim.limiter.add_leaf(sim.now, group);
    sim.limiter.set_backlogged(leaf, true);
    (sim, leaf)
}

#[test]
fn one_second_shows_the_rate() {
    let kb = |rate: u64| BytesPerSecond(rate * 1000);
    for (rate, tolerance) in [
        (kb(260), 3.0),
        (kb(500), 2.0),
        (kb(1100), 1.5),
        (mb(3), 1.5),
        (mb(32), 1.5),
        (mb(50), 1.5),
        (mb(100), 1.5),
        (mb(200), 1.5),
        (mb(1000), 1.5),
    ] {
        for lateness in LATE {
            let (mut sim, leaf) = one_leaf(None, lateness);
            sim.limiter.set_leaf_limit(sim.now, leaf, Some(rate));
            sim.run(ms(10_000));
            sim.assert_rate(&[leaf], ms(0), rate, tolerance);
        }
    }
}

#[test]
fn a_burst_after_idling_stays_inside() {
    for rate in [mb(3), mb(50), mb(200)] {
        let (mut sim, leaf) = one_leaf(Some(rate), Lateness::UpTo(ms(10)));
        for _ in 0..5 {
            sim.run(ms(700));
            sim.limiter.set_backlogged(leaf, false);
            sim.run(ms(300));
            sim.limiter.set_backlogged(leaf, true);
        }
        let (_, most) = sim.windows(&[], ms(0), ms(500));
        assert!(
            most <= rate.0 / 2 + rate.0 * 15 / 1000,
            "{most} B in 500 ms at {rate}"
        );
    }
}

#[test]
fn low_rates_come_in_small_grants() {
    let rate = BytesPerSecond(3000);
    let (mut sim, leaf) = one_leaf(Some(mb(100)), Lateness::UpTo(ms(10)));
    sim.limiter.set_leaf_limit(sim.now, leaf, Some(rate));
    sim.run(ms(120_000));
    assert!(
        sim.arrivals
            .iter()
            .all(|arrival| arrival.bytes == Bytes(4096))
    );
    let (fewest, most) = sim.windows(&[], ms(0), ms(60_000));
    assert!(
        fewest >= 180_000 - 2 * 4096 && most <= 180_000 + 4096 + 100,
        "{fewest} to {most}"
    );
}

#[test]
fn quanta_follow_the_tightest_limit() {
    for (link, group, leaf, quantum) in [
        (None, None, None, 256 << 10),
        (Some(mb(50)), None, None, 200_000),
        (Some(mb(50)), Some(mb(40)), None, 160_000),
        (Some(mb(50)), Some(mb(40)), Some(mb(10)), 40_000),
        (Some(mb(5)), Some(mb(40)), Some(mb(10)), 20_000),
        (Some(mb(1000)), None, None, 256 << 10),
        (None, None, Some(BytesPerSecond(3000)), 4096),
    ] {
        let (mut sim, id) = one_leaf(link, Lateness::Always(ms(0)));
        let other = sim.limiter.add_group(sim.now, group);
        sim.limiter.set_backlogged(id, false);
        let id = sim.limiter.add_leaf(sim.now, other);
        sim.limiter.set_backlogged(id, true);
        sim.limiter.set_leaf_limit(sim.now, id, leaf);
        let expected = Poll::Grant {
            leaf: id,
            bytes: Bytes(quantum),
        };
        assert_eq!(sim.limiter.poll(sim.now), expected);
    }
}

#[test]
fn changes_reach_the_receiver_within_150_ms() {
    for lateness in LATE {
        for (before, after) in [
            (Some(mb(50)), mb(20)),
            (Some(mb(20)), mb(50)),
            (Some(mb(200)), mb(1)),
            (Some(mb(1)), mb(200)),
            (Some(mb(0)), mb(50)),
            (None, mb(50)),
        ] {
            let (mut sim, leaf) = one_leaf(Some(mb(300)), lateness);
            sim.limiter.set_leaf_limit(sim.now, leaf, before);
            sim.run(ms(1234));
            sim.limiter.set_leaf_limit(sim.now, leaf, Some(after));
            sim.run(ms(4000));
            sim.assert_rate(&[], ms(1234 + 150), after, 1.7);
            let (fewest, most) = sim.windows(&[], ms(1234 + 150), ms(100));
            let exact = after.0 / 10;
            assert!(
                fewest >= exact * 80 / 100 && most <= exact * 120 / 100,
                "{fewest} {most}"
            );
            // Nothing of the old rate is caught up with: at most a burst of the new one.
            let first: u64 = sim
                .arrivals
                .iter()
                .filter(|arrival| arrival.at > sim.start + ms(1234))
                .filter(|arrival| arrival.at < sim.start + ms(1234 + 150))
                .map(|arrival| arrival.bytes.0)
                .sum();
            let burst = (after.0 * 15 / 1000).max(16 << 10);
            assert!(
                first <= after.0 * 150 / 1000 + burst,
                "{before:?} to {after}: {first} B"
            );
        }
    }
}

#[test]
fn many_changes_during_a_transfer_add_nothing() {
    let (mut sim, leaf) = one_leaf(None, Lateness::UpTo(ms(10)));
    let mut allowed = 0;
    for step in 0..600_u64 {
        let rate = mb(10 + step * 7919 % 90);
        sim.limiter.set_leaf_limit(sim.now, leaf, Some(rate));
        sim.run(ms(7));
        allowed += rate.0 * 7 / 1000;
    }
    let moved: u64 = sim.arrivals.iter().map(|arrival| arrival.bytes.0).sum();
    let ratio = moved as f64 / allowed as f64;
    assert!((0.98..=1.005).contains(&ratio), "{ratio}");
}

#[test]
fn nested_limits_all_hold() {
    for lateness in LATE {
        let mut sim = Sim::new(Some(mb(50)), lateness);
        let group = sim.limiter.add_group(sim.now, Some(mb(40)));
        let leaves = [2.0, 1.0, 2.0].map(|weight| {
            let leaf = sim.limiter.add_leaf(sim.now, group);
            sim.limiter.set_leaf_weight(leaf, weight).unwrap();
            sim.limiter.set_backlogged(leaf, true);
            leaf
        });
        let [limited, one, two] = leaves;
        sim.limiter.set_leaf_limit(sim.now, limited, Some(mb(10)));
        let other = sim.limiter.add_group(sim.now, None);
        let rest = sim.limiter.add_leaf(sim.now, other);
        sim.limiter.set_leaf_weight(rest, 0.1).unwrap();
        sim.limiter.set_backlogged(rest, true);
        sim.run(ms(5000));
        sim.assert_rate(&[], ms(0), mb(50), 1.5);
        sim.assert_rate(&leaves, ms(0), mb(40), 3.0);
        sim.assert_rate(&[limited], ms(0), mb(10), 3.0);
        sim.assert_rate(&[one], ms(0), mb(10), 3.0);
        sim.assert_rate(&[two], ms(0), mb(20), 3.0);
        // What the others leave: their errors are its own, 1.5 % of 50 MB/s are 7.5 % of 10.
        sim.assert_rate(&[rest], ms(0), mb(10), 7.5);

        // The group narrows: the limited leaf's share (2 of 5) falls below its own limit.
        sim.limiter.set_group_limit(sim.now, group, Some(mb(20)));
        sim.run(ms(5000));
        let settled = ms(5150);
        sim.assert_rate(&[limited], settled, mb(8), 3.0);
        sim.assert_rate(&[one], settled, mb(4), 3.0);
        sim.assert_rate(&[two], settled, mb(8), 3.0);
        sim.assert_rate(&[rest], settled, mb(30), 3.0);
    }
}

/// A bucket that waits for others must not run over: the burst covers what is left over, a quantum
/// and the lateness.
#[test]
fn nested_limits_lose_nothing() {
    for unit in [50, 100, 300, 1000, 3000, 10_000] {
        for lateness in LATE {
            let rate = |units: u64| Some(BytesPerSecond(units * unit * 1000));
            let mut sim = Sim::new(rate(5), lateness);
            let group = sim.limiter.add_group(sim.now, rate(4));
            let other = sim.limiter.add_group(sim.now, None);
            let leaves = [(group, 2.0), (group, 1.0), (other, 0.1)].map(|(group, weight)| {
                let leaf = sim.limiter.add_leaf(sim.now, group);
                sim.limiter.set_leaf_weight(leaf, weight).unwrap();
                sim.limiter.set_backlogged(leaf, true);
                leaf
            });
            sim.limiter.set_leaf_limit(sim.now, leaves[0], rate(1));
            sim.run(ms(30_000));
            for (leaf, units) in leaves.into_iter().zip([1, 3, 1]) {
                let from_leaf = sim.arrivals.iter().filter(|arrival| arrival.leaf == leaf);
                let moved: u64 = from_leaf.map(|arrival| arrival.bytes.0).sum();
                let ratio = moved as f64 / (units * unit * 30_000) as f64;
                assert!(
                    (0.99..1.01).contains(&ratio),
                    "{ratio} at {units}×{unit} kB/s"
                );
            }
        }
    }
}

#[test]
fn weights_change_at_once() {
    let mut sim = Sim::new(Some(mb(50)), Lateness::UpTo(ms(10)));
    let group = sim.limiter.add_group(sim.now, None);
    let [slow, fast] = [1e-6, 1.0].map(|weight| {
        let leaf = sim.limiter.add_leaf(sim.now, group);
        sim.limiter.set_leaf_weight(leaf, weight).unwrap();
        sim.limiter.set_backlogged(leaf, true);
        leaf
    });
    sim.run(ms(1000));
    // `slow` has had one quantum, which at its old weight would last for hours.
    sim.limiter.set_leaf_weight(slow, 1.0).unwrap();
    sim.run(ms(3000));
    sim.assert_rate(&[slow], ms(1150), mb(25), 3.0);
    sim.assert_rate(&[fast], ms(1150), mb(25), 3.0);
}
