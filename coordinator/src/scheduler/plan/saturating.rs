//! LLL and OBA with writable working sets that saturate.
//!
//! While M bytes cross at a rate r, at most the working set W is dirtied, however long it takes:
//!
//! > T(r) = M/r + min(d·M/r, W)/(r − d)        for r > d
//!
//! Without saturation that is M/(r − d), COMMA's and Pacer's model. With it, starting early costs less
//! than that model says: what is dirtied early is dirtied again and counts once. VMbuddies bounds the
//! traffic by its rounds instead (3.3.1, Eq. 7), which is far above what guests with small working
//! sets send. So the choice between OBA and LLL is made here wherever all working sets are known.

use super::schemes::{Sent, in_turn};
use crate::scheduler::schedule::{Limits, Schedule, VmSchedule};

/// The common finish is found to this part of itself.
const PRECISION: f64 = 1e-12;
const STEPS: u32 = 200;

/// A VM with a known working set.
#[derive(Debug, Clone, Copy)]
struct Vm {
    left: f64,
    dirty_rate: f64,
    working_set: f64,
}

impl Vm {
    fn of(sent: &Sent) -> Option<Self> {
        Some(Self {
            left: sent.load.left_bytes,
            dirty_rate: sent.load.dirty_rate,
            working_set: sent.working_set?,
        })
    }

    /// T(r), in seconds; infinite where the rate does not exceed the dirty rate.
    fn time(&self, rate: f64) -> f64 {
        if self.left <= 0.0 {
            return 0.0;
        }
        if rate <= self.dirty_rate {
            return f64::INFINITY;
        }
        let once = self.left / rate;
        once + (self.dirty_rate * once).min(self.working_set) / (rate - self.dirty_rate)
    }

    /// The rate at which it takes so many seconds: T(r) falls, and both its branches invert in closed
    /// form.
    fn rate(&self, time: f64) -> f64 {
        if self.left <= 0.0 {
            return 0.0;
        }
        let growing = self.dirty_rate + self.left / time;
        if self.dirty_rate * self.left / growing <= self.working_set {
            return growing;
        }
        // T·r² − (T·d + M + W)·r + M·d = 0, the larger root.
        let middle = time * self.dirty_rate + self.left + self.working_set;
        let inside = middle * middle - 4.0 * time * self.left * self.dirty_rate;
        (middle + inside.max(0.0).sqrt()) / (2.0 * time)
    }
}

fn vms(sent: &[Sent], group: &[usize]) -> Option<Vec<Vm>> {
    group.iter().map(|&vm| Vm::of(&sent[vm])).collect()
}

/// LLL's order. Nothing where a working set is not known, or where it never ends.
pub(super) fn lll(sent: &[Sent], limits: &Limits, group: &[usize]) -> Option<Schedule> {
    vms(sent, group)?;
    in_turn(sent, limits, group, |vm, rate| {
        Vm::of(&sent[vm]).map_or(f64::INFINITY, |vm| vm.time(rate))
    })
}

/// OBA: the rates with which all finish together. Nothing where a working set is not known, where it
/// never ends, or where a VM would pass something narrower than what it gets.
pub(super) fn oba(sent: &[Sent], limits: &Limits, group: &[usize]) -> Option<Schedule> {
    let vms = vms(sent, group)?;
    let dirty: f64 = vms.iter().map(|vm| vm.dirty_rate).sum();
    let all: f64 = vms.iter().map(|vm| vm.left).sum();
    if dirty >= limits.bandwidth || all <= 0.0 {
        return None;
    }
    // Without saturation it takes longest, without dirtying shortest.
    let (mut low, mut high) = (all / limits.bandwidth, all / (limits.bandwidth - dirty));
    for _ in 0..STEPS {
        if high - low <= PRECISION * high {
            break;
        }
        let middle = low + (high - low) / 2.0;
        let wanted: f64 = vms.iter().map(|vm| vm.rate(middle)).sum();
        if wanted > limits.bandwidth {
            low = middle;
        } else {
            high = middle;
        }
    }
    let rates: Vec<(usize, f64)> = group
        .iter()
        .zip(&vms)
        .map(|(&index, vm)| (index, vm.rate(high)))
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
    use proptest::prelude::*;

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
        }
    }

    #[test]
    fn without_saturation_it_is_the_linear_model() {
        // ALGORITHMS, OBA with V = 0: T 28.571428571, r = (45, 55).
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
        assert_eq!(lll(&unknown, &Limits::link(1000.0), &[0, 1]), None);
    }

    proptest! {
        #[test]
        fn rate_inverts_time(left in 1.0..1e6, dirty in 0.0..100.0, set in 0.0..1e5, times in 1.01..50.0) {
            let vm = Vm { left, dirty_rate: dirty, working_set: set };
            let rate = dirty * times + 1.0;
            let found = vm.rate(vm.time(rate));
            prop_assert!((found - rate).abs() <= 1e-6 * rate, "{found} {rate}");
        }
    }
}
