//! OBA with writable working sets that saturate ([`Sent::time`]).
//!
//! With them, starting early costs less than the linear model says: what is dirtied early is dirtied
//! again and counts once. VMbuddies bounds the traffic by its rounds instead (3.3.1, Eq. 7), which is far
//! above what guests with small working sets send.

use super::schemes::Sent;
use crate::scheduler::schedule::{Limits, Schedule, VmSchedule};

/// The common finish is found to this part of itself.
const PRECISION: f64 = 1e-12;
const STEPS: u32 = 200;

/// OBA: the rates with which all finish together. Nothing where a working set is not known, where it
/// never ends, or where a VM would pass something narrower than what it gets.
pub(super) fn oba(sent: &[Sent], limits: &Limits, group: &[usize]) -> Option<Schedule> {
    let vms: Vec<&Sent> = group.iter().map(|&vm| &sent[vm]).collect();
    let dirty: f64 = vms.iter().map(|vm| vm.load.dirty_rate).sum();
    let all: f64 = vms.iter().map(|vm| vm.load.left_bytes).sum();
    let is_known = vms.iter().all(|vm| vm.working_set.is_some());
    if !is_known || dirty >= limits.bandwidth || all <= 0.0 {
        return None;
    }
    // Without saturation it takes longest, without dirtying shortest.
    let (mut low, mut high) = (all / limits.bandwidth, all / (limits.bandwidth - dirty));
    for _ in 0..STEPS {
        if high - low <= PRECISION * high {
            break;
        }
        let middle = low + (high - low) / 2.0;
        let wanted: f64 = vms.iter().map(|vm| vm.rate_for(middle)).sum();
        if wanted > limits.bandwidth {
            low = middle;
        } else {
            high = middle;
        }
    }
    let rates: Vec<(usize, f64)> = group
        .iter()
        .zip(&vms)
        .map(|(&index, vm)| (index, vm.rate_for(high)))
        .collect();
    limits.hold(rates.iter().copied()).then(|| Schedule {
        duration_s: high,
        vms: rates
            .iter()
            .map(|&(vm, rate)| VmSchedule {
                vm,
                start_s: 0.0,
                bandwidth: vec![(0.0, rate)],
            })
            .collect(),
    })
}

#[cfg(test)]
mod tests {
    use super::super::schemes::lll;
    use super::*;
    use crate::scheduler::schedule::Load;

    fn sent(left: f64, dirty_rate: f64, working_set: f64) -> Sent {
        Sent {
            load: Load {
                left_bytes: left,
                max_dirty_rate: 2.0 * dirty_rate,
                dirty_rate,
            },
            cap: f64::INFINITY,
            working_set: Some(working_set),
            stop_s: 0.0,
        }
    }

    #[test]
    fn without_saturation_it_is_the_linear_model() {
        // OBA (VMbuddies, Algorithm 2) with V = 0: T 28.571428571, r = (45, 55).
        let vms = [sent(1000.0, 10.0, 1e9), sent(1000.0, 20.0, 1e9)];
        let found = oba(&vms, &Limits::link(100.0), &[0, 1]).expect("it converges");
        assert!((found.duration_s - 28.571_428_571).abs() < 1e-8);
        assert!((found.vms[0].bandwidth[0].1 - 45.0).abs() < 1e-8);
    }

    #[test]
    fn small_working_sets_make_starting_together_the_faster_way() {
        let hot = [sent(1000.0, 10.0, 10.0), sent(1000.0, 20.0, 20.0)];
        let link = Limits::link(100.0);
        let together = oba(&hot, &link, &[0, 1]).expect("it converges").duration_s;
        let turns = lll(&hot, &link, &[0, 1]).expect("it converges").duration_s;
        assert!(together < turns, "{together} {turns}");
        // In the linear model it is the other way round: who has not started causes no resends.
        let large = [sent(1000.0, 10.0, 1e9), sent(1000.0, 20.0, 1e9)];
        let together = oba(&large, &link, &[0, 1])
            .expect("it converges")
            .duration_s;
        let turns = lll(&large, &link, &[0, 1])
            .expect("it converges")
            .duration_s;
        assert!(turns < together, "{together} {turns}");
    }

    #[test]
    fn what_never_ends_has_no_schedule() {
        let hot = [sent(1000.0, 60.0, 10.0), sent(1000.0, 60.0, 20.0)];
        assert_eq!(oba(&hot, &Limits::link(100.0), &[0, 1]), None);
        let mut unknown = hot;
        unknown[0].working_set = None;
        assert_eq!(oba(&unknown, &Limits::link(1000.0), &[0, 1]), None);
    }
}
