//! What the paths are found to carry goes into the capacity of every group.

use std::time::Duration;

use rate_limiter::BytesPerSecond;

use super::{Conductor, Randomness, Started};
use crate::application::{HostId, VmId};
use crate::capacity::{Capacity, Cut};
use crate::engine::{GroupSpec, Step};
use crate::policy::Concurrency;
use crate::scheduler::paths::{Path, Stream};

impl<R: Randomness> Conductor<'_, R> {
    /// Takes what the streams have achieved; where a path carries something else, all is shared anew.
    pub(super) fn look_at_paths(&mut self, now: Duration) {
        let streams = self.active().flat_map(|started| started.group.streams());
        let streams: Vec<Stream> = streams.collect();
        let changes = self.paths.observe(&streams);
        if changes.is_empty() {
            return;
        }
        let app = self.app;
        for change in changes.iter().filter(|one| one.is_news) {
            let (from, to) = change.path;
            let step = Step::Bandwidth {
                from: app.host(from).name.clone(),
                to: app.host(to).name.clone(),
                rate: change.rate,
            };
            let on_it = self.started.iter_mut().find(|started| {
                started.group.outcome().is_none() && passes(started.group.spec(), change.path)
            });
            if let Some(started) = on_it {
                started.group.announce(step);
            }
        }
        self.share_paths(now);
        self.plan_again();
    }

    /// Tells every group what it may use of the paths.
    pub(super) fn share_paths(&mut self, now: Duration) {
        let found: Vec<(usize, Vec<(Path, BytesPerSecond)>)> = (0..self.started.len())
            .filter(|&index| self.started[index].group.outcome().is_none())
            .map(|index| {
                let members = self.started[index].group.spec().members.iter();
                let ends: Vec<_> = members.map(|one| (one.vm, one.from, one.to)).collect();
                (index, self.narrow_for(&ends))
            })
            .collect();
        for (index, narrow) in found {
            self.started[index].group.set_paths(now, &narrow);
        }
    }

    /// What a group with these VMs may use of the paths that carry less than was told. Groups that are
    /// under way at once have equal parts; those that take turns have it one after another.
    pub(super) fn narrow_for(
        &self,
        ends: &[(VmId, HostId, HostId)],
    ) -> Vec<(Path, BytesPerSecond)> {
        let narrow = self.paths.narrow();
        let mine =
            narrow.filter(|(path, _)| ends.iter().any(|(_, from, to)| (*from, *to) == *path));
        mine.map(|(path, rate)| {
            let parts = match self.plan.concurrency {
                Concurrency::AllAtOnce => self.active().filter(|one| is_on(one, path)).count(),
                Concurrency::OneAfterAnother | Concurrency::TwoStages => 1,
            };
            let parts = u64::try_from(parts).unwrap_or(1).max(1);
            (path, BytesPerSecond((rate.0 / parts).max(1)))
        })
        .collect()
    }

    /// What VMs pass through, with what was found of the paths.
    pub(super) fn capacity(&self, ends: &[(VmId, HostId, HostId)]) -> Capacity {
        let mut capacity = Capacity::of(self.app, ends);
        for (path, rate) in self.paths.narrow() {
            let on_it = ends.iter().enumerate();
            let on_it = on_it.filter(|(_, (_, from, to))| (*from, *to) == path);
            let members: Vec<usize> = on_it.map(|(index, _)| index).collect();
            if !members.is_empty() {
                capacity.cuts.push(Cut { rate, members });
            }
        }
        capacity
    }
}

fn passes(spec: &GroupSpec, path: Path) -> bool {
    let mut members = spec.members.iter();
    members.any(|member| (member.from, member.to) == path)
}

fn is_on(started: &Started, path: Path) -> bool {
    passes(started.group.spec(), path)
}
