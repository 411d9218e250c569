//! COMMA's two stages over all groups (3.2).
//!
//! Stage one: all groups start at once, and every VM's memory is copied once, at rates with which all
//! end together. Stage two: the groups take turns in the plan's order. Who has its turn gets the
//! bandwidth but for the little that keeps the streams of those that wait open.
//!
//! A group that fails goes back. As long as no other one has moved, or is about to, all go back with
//! it, as if it had been the first of groups that follow each other. Else `on-partial` decides: *stay*:
//! the groups before it still have their turns, those after it go back; *retry*: it is tried once more
//! when its turn comes; *return*: nobody moves any more, and who has moved returns.

use std::time::Duration;

use rate_limiter::BytesPerSecond;

use super::{Conductor, Purpose, Randomness};
use crate::application::{HostId, OnPartial, VmId};
use crate::engine::GroupRun;
use crate::policy::Concurrency;
use crate::report::Outcome;
use crate::scheduler::allot::{Moving, bulk, parked_rate};

impl<R: Randomness> Conductor<'_, R> {
    /// Whether groups take turns now: on the way back they follow each other.
    pub(super) fn takes_turns(&self) -> bool {
        let mut started = self.started.iter();
        self.plan.concurrency == Concurrency::TwoStages
            && !started.any(|started| started.purpose == Purpose::Return)
    }

    /// Who copies, who waits, and whose turn it is.
    pub(super) fn conduct(&mut self, now: Duration) {
        self.give_up_others(now);
        let is_stage_one = self
            .active()
            .any(|started| started.group.is_moving() && !started.group.has_copied());
        if is_stage_one {
            self.share_bulk(now);
            return;
        }
        self.order_turns();
        if let Some(turn) = self.turn(now) {
            self.share_turn(now, turn);
        }
    }

    /// Index into the started groups of the latest attempt of a planned one.
    fn latest(&self, planned: usize) -> Option<usize> {
        let mut started = self.started.iter();
        started.rposition(|started| started.planned == planned)
    }

    /// Whether a group has moved, or may have the next moment.
    fn any_moves(&self) -> bool {
        self.started.iter().any(|started| {
            let group = &started.group;
            group.outcome() == Some(Outcome::Committed) || group.is_switching()
        })
    }

    /// Whether a planned group that failed is tried once more.
    fn is_tried_again(&self, planned: usize) -> bool {
        let latest = self.latest(planned).map(|index| &self.started[index]);
        self.app.on_partial == OnPartial::Retry
            && !self.interrupted
            && self.any_moves()
            && latest.is_some_and(|started| {
                started.purpose == Purpose::Forward
                    && started.group.outcome() != Some(Outcome::NeedsAttention)
            })
    }

    /// A group has failed: others that have lost their sense go back too.
    fn give_up_others(&mut self, now: Duration) {
        let has_failed = |group: &GroupRun| match group.outcome() {
            Some(outcome) => outcome != Outcome::Committed,
            None => group.is_rolling_back(),
        };
        let failed: Vec<usize> = (0..self.plan.groups.len())
            .filter_map(|planned| self.latest(planned))
            .filter(|&index| has_failed(&self.started[index].group))
            .collect();
        let any_moves = self.any_moves();
        let is_final = |&index: &usize| !self.is_tried_again(self.started[index].planned);
        let Some(first) = failed.iter().copied().find(is_final) else {
            return;
        };
        let at = self.started[first].planned;
        let lost = failed
            .iter()
            .any(|&index| self.started[index].group.outcome() == Some(Outcome::NeedsAttention));
        let ends_all = !any_moves || lost || self.app.on_partial == OnPartial::Return;
        let names = |index: usize| {
            let members = &self.started[index].group.spec().members;
            let names: Vec<&str> = members.iter().map(|member| member.name.as_str()).collect();
            names.join(", ")
        };
        let why = self.started[first].group.reason().unwrap_or("interrupted");
        let reason = format!("{} did not move: {why}", names(first));
        let started = self.started.iter();
        let after: Vec<bool> = started.map(|one| self.is_after(one.planned, at)).collect();
        for (started, is_after) in self.started.iter_mut().zip(after) {
            let group = &mut started.group;
            let is_concerned = ends_all || is_after;
            let may = group.is_moving() && !group.is_switching();
            if group.outcome().is_none() && is_concerned && may {
                group.abandon(now, reason.clone());
            }
        }
    }

    /// Stage one: everybody's rate follows what it has left to copy.
    fn share_bulk(&mut self, now: Duration) {
        let mut ends: Vec<(VmId, HostId, HostId)> = Vec::new();
        let mut vms: Vec<Moving> = Vec::new();
        let mut groups: Vec<(usize, usize)> = Vec::new();
        for (index, started) in self.started.iter().enumerate() {
            let group = &started.group;
            if group.outcome().is_none() && group.is_moving() {
                let members = group.spec().members.iter();
                ends.extend(members.map(|member| (member.vm, member.from, member.to)));
                let of_group = group.moving();
                groups.push((index, of_group.len()));
                vms.extend(of_group);
            }
        }
        let capacity = self.capacity(&ends);
        let mut rates = bulk(&capacity, &vms).rates.into_iter();
        for (index, count) in groups {
            let sum: f64 = rates.by_ref().take(count).sum();
            let group = &mut self.started[index].group;
            group.share_bandwidth(now, whole(sum));
        }
    }

    /// Whose turn it is in stage two: the first group in the plan's order that has not moved. Starts
    /// it again where it failed and may be tried once more. Nobody's, where it failed for good.
    fn turn(&mut self, now: Duration) -> Option<usize> {
        for planned in self.turns.clone() {
            let index = self.latest(planned)?;
            match self.started[index].group.outcome() {
                None => return Some(index),
                Some(Outcome::Committed) => {}
                Some(_) if self.is_tried_again(planned) => {
                    self.start(now, planned, Purpose::Retry);
                    return self.latest(planned);
                }
                Some(_) => return None,
            }
        }
        None
    }

    /// Stage two: whose turn it is gets what those that wait do not need.
    fn share_turn(&mut self, now: Duration, turn: usize) {
        let bandwidth = self.app.allowance.for_move();
        let parked = parked_rate(bandwidth, self.app.vms.len());
        let mut taken = 0;
        for (index, started) in self.started.iter_mut().enumerate() {
            let group = &mut started.group;
            if index != turn && group.outcome().is_none() && group.is_moving() {
                let vms = u64::try_from(group.spec().members.len()).unwrap_or(u64::MAX);
                let share = parked.0.saturating_mul(vms);
                taken += share;
                group.share_bandwidth(now, BytesPerSecond(share));
            }
        }
        let group = &mut self.started[turn].group;
        let rest = bandwidth.0.saturating_sub(taken).max(1);
        group.share_bandwidth(now, BytesPerSecond(rest));
        group.give_turn(now);
    }
}

#[allow(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "rates are positive and far below 2^63"
)]
fn whole(rate: f64) -> BytesPerSecond {
    BytesPerSecond((rate as u64).max(1))
}
