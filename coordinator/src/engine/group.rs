//! [`GroupRun`]: inputs and outputs of one group's state machine.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use rate_limiter::BytesPerSecond;
use serde_json::Value;
use sidecar::protocol::command::RunArgs;
use sidecar::protocol::event::Envelope;
use sidecar::protocol::types::Decision;
use uuid::Uuid;

use super::halves::{VmProgress, VmRun};
use super::hosts::{HostState, Request};
use super::stages::{CatchUp, Part};
use super::{GroupSpec, Output, Step};
use crate::application::HostId;
use crate::capacity::Cut;
use crate::report::Outcome;

/// Where the group is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stage {
    New,
    Preparing,
    Precopy,
    /// All held; armed again at `retry_at`.
    Held {
        retry_at: Duration,
    },
    Arming,
    Armed {
        since: Duration,
    },
    Stopping,
    /// `back` is sent; until every VM is held again.
    Backing,
    Switching,
    /// `commit` is proposed, the register's answer outstanding.
    Deciding,
    Committing,
    RollingBack,
    Ended,
}

/// One group's move.
#[derive(Debug)]
pub struct GroupRun {
    pub(super) spec: GroupSpec,
    /// What the file says of links and interfaces; what was measured of the paths comes to it.
    pub(super) known_cuts: Vec<Cut>,
    pub(super) stage: Stage,
    pub(super) vms: Vec<VmRun>,
    pub(super) hosts: BTreeMap<HostId, HostState>,
    pub(super) outputs: VecDeque<Output>,
    pub(super) requests: BTreeMap<u64, Request>,
    pub(super) next_ticket: u64,
    /// Of a group of two stages: where it is.
    pub(super) part: Part,
    /// When its turn came.
    pub(super) turn_at: Option<Duration>,
    /// How long it had waited for that: the time does not count.
    pub(super) waited: Duration,
    pub(super) catch_up: Option<CatchUp>,
    /// When the stage must be over.
    pub(super) stage_deadline: Option<Duration>,
    pub(super) begun_at: Duration,
    pub(super) all_held_at: Option<Duration>,
    pub(super) arm_attempts: u32,
    pub(super) best: Option<Duration>,
    /// While armed: when the group was weighed last, and what was predicted then.
    pub(super) weighed: Option<(Duration, Duration)>,
    pub(super) forced: bool,
    pub(super) hold_sent: bool,
    /// Since when the group is too slow for its deadline.
    pub(super) slow_since: Option<Duration>,
    /// That the deadline will be missed was said.
    pub(super) is_late: bool,
    /// Other groups are under way, and share the bandwidth.
    pub(super) has_company: bool,
    pub(super) paced: Option<(Duration, Vec<f64>)>,
    /// The bulk copies are about to end: reports come often.
    pub(super) is_closing: bool,
    /// When which VM is due to start next, by its position.
    pub(super) next_start: Option<(Duration, usize)>,
    /// A source may be past the point where it can go back by itself.
    pub(super) past_return: bool,
    pub(super) commit_proposed: bool,
    pub(super) decision: Option<Decision>,
    pub(super) ask_register_at: Option<Duration>,
    pub(super) resend_at: Option<Duration>,
    pub(super) all_running: bool,
    pub(super) predicted: Option<Duration>,
    pub(super) reason: Option<String>,
    /// Whether another fault is probably behind the reason.
    pub(super) reason_is_secondary: bool,
    pub(super) notices: Vec<String>,
    pub(super) outcome: Option<Outcome>,
}

impl GroupRun {
    /// A group that has not begun. Every host counts as connected.
    #[must_use]
    pub fn new(spec: GroupSpec) -> Self {
        let vms: Vec<VmRun> = spec.members.iter().cloned().map(VmRun::new).collect();
        let mut ids: BTreeSet<HostId> = BTreeSet::from([spec.register]);
        for member in &spec.members {
            ids.extend([member.from, member.to]);
        }
        let hosts = ids
            .into_iter()
            .map(|id| (id, HostState::default()))
            .collect();
        let part = match spec.parked {
            Some(_) => Part::Bulk { waits_since: None },
            None => Part::Turn,
        };
        Self {
            known_cuts: spec.capacity.cuts.clone(),
            spec,
            part,
            turn_at: None,
            waited: Duration::ZERO,
            catch_up: None,
            stage: Stage::New,
            vms,
            hosts,
            outputs: VecDeque::new(),
            requests: BTreeMap::new(),
            next_ticket: 0,
            stage_deadline: None,
            begun_at: Duration::ZERO,
            all_held_at: None,
            arm_attempts: 0,
            best: None,
            weighed: None,
            forced: false,
            hold_sent: false,
            slow_since: None,
            is_late: false,
            has_company: false,
            paced: None,
            is_closing: false,
            next_start: None,
            past_return: false,
            commit_proposed: false,
            decision: None,
            ask_register_at: None,
            resend_at: None,
            all_running: false,
            predicted: None,
            reason: None,
            reason_is_secondary: false,
            notices: Vec::new(),
            outcome: None,
        }
    }

    /// The group's run.
    #[must_use]
    pub fn run(&self) -> Uuid {
        self.spec.run
    }

    /// What it was made from.
    #[must_use]
    pub fn spec(&self) -> &GroupSpec {
        &self.spec
    }

    /// How it ended; `None` while it goes on.
    #[must_use]
    pub fn outcome(&self) -> Option<Outcome> {
        self.outcome
    }

    /// Why it was not committed.
    #[must_use]
    pub fn reason(&self) -> Option<&str> {
        self.reason.as_deref()
    }

    /// Whether a commit is proposed or recorded: the group now finishes forward.
    #[must_use]
    pub fn is_deciding(&self) -> bool {
        self.commit_proposed || self.decision == Some(Decision::Commit)
    }

    /// State of every VM, for the live display.
    #[must_use]
    pub fn progress(&self) -> Vec<VmProgress> {
        self.vms.iter().map(VmRun::progress).collect()
    }

    /// The next output, in the order in which it must be carried out.
    pub fn poll_output(&mut self) -> Option<Output> {
        self.outputs.pop_front()
    }

    /// Whether other groups are under way that leave it their part of the bandwidth when they end.
    pub fn set_company(&mut self, has_company: bool) {
        self.has_company = has_company;
    }

    /// Gives the group another share of the bandwidth.
    pub fn set_bandwidth(&mut self, now: Duration, bandwidth: BytesPerSecond) {
        if self.spec.capacity.bandwidth == bandwidth {
            return;
        }
        self.spec.capacity.bandwidth = bandwidth;
        if self.stage == Stage::Precopy {
            self.paced = None;
            self.pace(now);
        }
    }

    /// The user wants it to stop. Rolls back while that is possible, else finishes forward.
    pub fn interrupt(&mut self, now: Duration) {
        match self.stage {
            Stage::New => {
                self.reason = Some("interrupted before it began".into());
                self.end(Outcome::RolledBack);
            }
            Stage::RollingBack | Stage::Ended => {}
            _ if self.is_deciding() => {
                self.step(Step::Notice(
                    "interrupted after the decision was proposed: finishing, this cannot be taken back"
                        .into(),
                ));
            }
            _ => self.fail(now, "interrupted".into()),
        }
    }

    /// An event from the sidecar of `host`. Events of other runs are ignored.
    pub fn handle_event(&mut self, now: Duration, host: HostId, envelope: &Envelope) {
        if envelope.run == self.spec.run && self.stage == Stage::Ended {
            self.hear_last_words(host, envelope);
        }
        if envelope.run != self.spec.run || matches!(self.stage, Stage::New | Stage::Ended) {
            return;
        }
        let Some(state) = self.hosts.get_mut(&host) else {
            return;
        };
        state.heard(now);
        match state.last_seq {
            Some(last) if envelope.seq <= last => return,
            Some(last) if envelope.seq > last + 1 => self.catch_up(now, host),
            _ => {}
        }
        if let Some(state) = self.hosts.get_mut(&host) {
            state.last_seq = Some(envelope.seq);
        }
        self.apply(now, host, envelope);
        self.advance(now);
    }

    /// The answer to a command that was sent with `ticket`.
    pub fn handle_reply(
        &mut self,
        now: Duration,
        host: HostId,
        ticket: u64,
        result: Result<Value, String>,
    ) {
        if let Some(state) = self.hosts.get_mut(&host) {
            state.heard(now);
        }
        if let Some(request) = self.requests.remove(&ticket) {
            self.answered(now, &request, result);
            self.advance(now);
        }
    }

    pub(super) fn args(&self) -> RunArgs {
        RunArgs {
            run: self.spec.run,
            epoch: self.spec.epoch,
        }
    }

    pub(super) fn step(&mut self, step: Step) {
        self.outputs.push_back(Output::Step(step));
    }

    pub(super) fn notice(&mut self, text: String) {
        if !self.notices.contains(&text) {
            self.notices.push(text.clone());
            self.step(Step::Notice(text));
        }
    }
}
