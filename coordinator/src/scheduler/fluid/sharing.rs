//! Who gets how much of links that many share: weighted max-min fairness by progressive filling.

use crate::capacity::Capacity;

/// A stream that wants bandwidth.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Flow {
    /// It takes no more than this.
    pub limit_bytes_per_s: f64,
    /// Two flows that share a full link get it in proportion to their weights.
    pub weight: f64,
}

/// Rates of the flows over every cut of `capacity`; members of a cut are positions in `flows`.
/// `taken` is what others have of each already: of the bandwidth first, then of the cuts in order.
///
/// All rates rise together, in proportion to the weights, until a flow reaches its limit or a cut
/// is full; the others go on. So nobody can have more but from somebody who has less for its weight.
#[must_use]
#[allow(clippy::cast_precision_loss, reason = "rates far below 2^53")]
pub fn max_min(capacity: &Capacity, taken: &[f64], flows: &[Flow]) -> Vec<f64> {
    let everyone: Vec<usize> = (0..flows.len()).collect();
    let all = std::iter::once((capacity.bandwidth.0 as f64, &everyone));
    let cuts = capacity
        .cuts
        .iter()
        .map(|cut| (cut.rate.0 as f64, &cut.members));
    let taken = taken.iter().copied().chain(std::iter::repeat(0.0));
    let mut cuts: Vec<(f64, &Vec<usize>)> = all
        .chain(cuts)
        .zip(taken)
        .map(|((rate, members), taken)| ((rate - taken).max(0.0), members))
        .collect();
    let mut rates = vec![0.0; flows.len()];
    let is_open = |flow: &Flow| flow.limit_bytes_per_s > 0.0 && flow.weight > 0.0;
    let mut open: Vec<bool> = flows.iter().map(is_open).collect();
    let mut level = 0.0;
    while open.contains(&true) {
        // The next level at which something is full.
        let limits = everyone.iter().filter(|&&flow| open[flow]);
        let limits = limits.map(|&flow| flows[flow].limit_bytes_per_s / flows[flow].weight);
        let by_flow = limits.fold(f64::INFINITY, f64::min);
        let cut_level = |(left, members): &(f64, &Vec<usize>)| {
            let weights = members.iter().filter(|&&flow| open[flow]);
            let weight: f64 = weights.map(|&flow| flows[flow].weight).sum();
            if weight > 0.0 {
                level + left / weight
            } else {
                f64::INFINITY
            }
        };
        let levels: Vec<f64> = cuts.iter().map(cut_level).collect();
        let by_cut = levels.iter().copied().fold(f64::INFINITY, f64::min);
        let next = by_flow.min(by_cut).max(level);
        for (left, members) in &mut cuts {
            let weights = members.iter().filter(|&&flow| open[flow]);
            let weight: f64 = weights.map(|&flow| flows[flow].weight).sum();
            *left = (*left - weight * (next - level)).max(0.0);
        }
        let mut full = vec![false; flows.len()];
        for ((_, members), cut) in cuts.iter().zip(&levels) {
            if *cut <= next * (1.0 + 1e-12) {
                members.iter().for_each(|&flow| full[flow] = true);
            }
        }
        for (index, flow) in flows.iter().enumerate() {
            let limit = flow.limit_bytes_per_s;
            let reached = next * flow.weight;
            if open[index] && (full[index] || limit <= reached * (1.0 + 1e-12)) {
                rates[index] = limit.min(reached);
                open[index] = false;
            }
        }
        level = next;
    }
    rates
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rate_limiter::BytesPerSecond;

    use super::*;
    use crate::capacity::Cut;

    fn capacity(bandwidth: u64, cuts: &[(u64, &[usize])]) -> Capacity {
        let cut = |&(rate, members): &(u64, &[usize])| Cut {
            rate: BytesPerSecond(rate),
            members: members.to_vec(),
        };
        Capacity {
            bandwidth: BytesPerSecond(bandwidth),
            cuts: cuts.iter().map(cut).collect(),
        }
    }

    fn flows(all: &[(f64, f64)]) -> Vec<Flow> {
        let flow = |&(limit_bytes_per_s, weight)| Flow {
            limit_bytes_per_s,
            weight,
        };
        all.iter().map(flow).collect()
    }

    const ANY: f64 = f64::INFINITY;

    #[test]
    fn examples() {
        let three = flows(&[(ANY, 1.0), (10.0, 1.0), (ANY, 1.0)]);
        assert_eq!(
            max_min(&capacity(100, &[]), &[], &three),
            [45.0, 10.0, 45.0]
        );
        // The first two share an interface of 30, what they leave goes to the third.
        let shared = capacity(100, &[(30, &[0, 1])]);
        assert_eq!(max_min(&shared, &[], &three), [20.0, 10.0, 70.0]);
        assert_eq!(max_min(&shared, &[50.0, 0.0], &three), [20.0, 10.0, 20.0]);
        let weighted = flows(&[(ANY, 1.0), (ANY, 3.0), (ANY, 0.0)]);
        assert_eq!(
            max_min(&capacity(100, &[]), &[], &weighted),
            [25.0, 75.0, 0.0]
        );
        assert_eq!(max_min(&capacity(100, &[]), &[200.0], &three), [0.0; 3]);
        assert_eq!(
            max_min(&capacity(100, &[]), &[], &flows(&[(0.0, 1.0)])),
            [0.0]
        );
    }

    proptest! {
        #[test]
        fn it_is_max_min_fair(
            raw in prop::collection::vec((0.0..200.0_f64, 0.1..5.0_f64, any::<u8>()), 1..12),
            rates in prop::collection::vec(1..300_u64, 3),
        ) {
            let all: Vec<(f64, f64)> = raw.iter().map(|r| (r.0, r.1)).collect();
            let flows = flows(&all);
            let members = |bit: u8| -> Vec<usize> {
                (0..raw.len()).filter(|&i| raw[i].2 >> bit & 1 == 1).collect()
            };
            let (a, b) = (members(0), members(1));
            let capacity = capacity(rates[0], &[(rates[1], &a), (rates[2], &b)]);
            let found = max_min(&capacity, &[], &flows);
            let everyone: Vec<usize> = (0..raw.len()).collect();
            let cuts = [(rates[0], &everyone), (rates[1], &a), (rates[2], &b)];
            for (rate, members) in cuts {
                let sum: f64 = members.iter().map(|&i| found[i]).sum();
                prop_assert!(sum <= rate as f64 * (1.0 + 1e-9));
            }
            // Everyone is at its limit, or in a full cut where nobody has more for its weight.
            for (i, flow) in flows.iter().enumerate() {
                let at_limit = found[i] >= flow.limit_bytes_per_s * (1.0 - 1e-9);
                let level = found[i] / flow.weight;
                let held_back = cuts.iter().any(|(rate, members)| {
                    let sum: f64 = members.iter().map(|&j| found[j]).sum();
                    members.contains(&i)
                        && sum >= *rate as f64 * (1.0 - 1e-9)
                        && members.iter().all(|&j| found[j] / flows[j].weight <= level * (1.0 + 1e-9))
                });
                prop_assert!(at_limit || held_back, "{i} {found:?}");
            }
        }
    }
}
