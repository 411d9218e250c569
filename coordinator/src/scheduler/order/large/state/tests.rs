use proptest::prelude::*;

use super::*;
use crate::scheduler::group::ByDelayedStart;
use crate::scheduler::group::replicas::Tiers;
use crate::scheduler::order::tests::instance;
use crate::scheduler::schedule::Limits;

proptest! {
    #[test]
    fn every_change_costs_what_it_was_priced_at(
        instance in instance(12),
        tiers in any::<bool>(),
        steps in prop::collection::vec((0..6_u8, any::<u16>(), any::<u16>()), 1..80),
    ) {
        let vms = instance.loads.len();
        let limits = Limits::link(instance.bandwidth);
        let time = ByDelayedStart::new(&instance.loads, &limits);
        let names = (0..vms).map(|vm| Some(if vm % 2 == 0 { "web" } else { "db" }));
        let known = Tiers::new(names).ok().filter(|_| tiers);
        let problem = Problem { time: &time, traffic: &instance.traffic, tiers: known.as_ref() };
        let mut groups: Vec<Vec<usize>> = (0..vms).map(|vm| vec![vm]).collect();
        if known.is_some() {
            let end = |at: usize| vec![at, at + 1];
            groups = std::iter::once(end(0))
                .chain((4..vms).map(|vm| vec![vm]))
                .chain([end(2)])
                .collect();
            if groups.iter().any(|group| problem.judge(vec![group.clone()], false).durations_s[0].is_infinite()) {
                return Ok(());
            }
        }
        let mut state = State::new(&problem, &groups);
        for (kind, a, b) in steps {
            let before = state.cost();
            let keep = b % 3 != 0;
            let mut priced = None;
            let accept = |change: f64| {
                priced = Some(change);
                keep
            };
            let (a, b) = (usize::from(a), usize::from(b));
            let done = match kind {
                0 => state.relocate(a % vms, b % state.ranks(), accept),
                1 => state.part(a % vms, b % (state.ranks() + 1), accept),
                2 => state.swap(a % vms, b % vms, accept),
                3 if state.ranks() > 1 => state.merge(a % (state.ranks() - 1), accept),
                4 => state.split(a % state.ranks(), |vm| b >> vm & 1 == 1, accept),
                5 if state.ranks() > 1 => state.exchange(a % (state.ranks() - 1), accept),
                _ => false,
            };
            prop_assert_eq!(done, priced.is_some() && keep);
            let judged = problem.judge(state.groups(), false);
            prop_assert!(problem.keeps_tiers(&judged.groups));
            prop_assert!(judged.durations_s.iter().all(|duration| duration.is_finite()));
            let scale = 1e-9 * judged.impact_bytes.max(before).max(1.0);
            prop_assert!((state.cost() - judged.impact_bytes).abs() <= scale);
            let expected = if done { before + priced.unwrap_or(0.0) } else { before };
            prop_assert!((state.cost() - expected).abs() <= scale);
            state.recount();
        }
        let mut all = state.groups().concat();
        all.sort_unstable();
        prop_assert_eq!(all, (0..vms).collect::<Vec<_>>());
    }
}
