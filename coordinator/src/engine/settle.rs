//! Deciding, committing and rolling back: obeying the register, and the outcome.

use std::time::Duration;

use serde_json::Value;
use sidecar::protocol::command::{Command, DecideArgs, FinishArgs};
use sidecar::protocol::types::{Decision, RecordValue, Side};

use super::Step;
use super::group::{GroupRun, Stage};
use super::halves::{End, VmRun};
use crate::report::Outcome;

/// How long the register is asked before the coordinator leaves the group in doubt.
const DECIDE_WITHIN: Duration = Duration::from_secs(30);
const COMMIT_WITHIN: Duration = Duration::from_secs(20);
const ROLL_BACK_WITHIN: Duration = Duration::from_secs(12);
const ASK_AGAIN: Duration = Duration::from_millis(500);
const RESEND: Duration = Duration::from_secs(1);

impl GroupRun {
    /// Something broke, or the user wants out. Before the decision this rolls the group back;
    /// after it, it changes nothing.
    pub(super) fn fail(&mut self, now: Duration, reason: String) {
        self.fail_for(now, reason, false);
    }

    /// The same; a `secondary` reason follows from another fault, and gives way to it when that is
    /// told too.
    pub(super) fn fail_for(&mut self, now: Duration, reason: String, secondary: bool) {
        if self.stage == Stage::RollingBack && self.reason_is_secondary && !secondary {
            self.reason_is_secondary = false;
            if let Some(before) = self.reason.replace(reason) {
                self.notice(before);
            }
            return;
        }
        if self.is_deciding() || matches!(self.stage, Stage::RollingBack | Stage::Ended) {
            if self.stage != Stage::Ended && self.reason.as_ref() != Some(&reason) {
                self.notice(reason);
            }
            return;
        }
        self.reason = Some(reason.clone());
        self.reason_is_secondary = secondary;
        self.step(Step::RollingBack { reason });
        self.roll_back(now);
    }

    /// `abort` to everyone, and for the record. Each sidecar goes back by itself where it still
    /// may, and asks the register where it may not.
    fn roll_back(&mut self, now: Duration) {
        self.stage = Stage::RollingBack;
        self.stage_deadline = Some(now + ROLL_BACK_WITHIN);
        self.resend_at = None;
        // What was queued for the way forward is not sent any more.
        self.requests.clear();
        if self.decision.is_none() {
            self.decide(now, RecordValue::Abort);
        }
        self.send_abort(now);
    }

    fn send_abort(&mut self, now: Duration) {
        self.resend_at = Some(now + RESEND);
        let args = self.args();
        for host in self.open_hosts() {
            self.send(now, host, Command::Abort(args));
        }
    }

    /// Hosts with a half that has not ended.
    fn open_hosts(&self) -> Vec<crate::application::HostId> {
        let open = |vm: &VmRun, host| {
            (vm.member.from == host && vm.source.end.is_none())
                || (vm.member.to == host && vm.destination.end.is_none())
        };
        let hosts = self.hosts.keys().copied();
        hosts
            .filter(|&host| self.vms.iter().any(|vm| open(vm, host)))
            .collect()
    }

    fn decide(&mut self, now: Duration, value: RecordValue) {
        self.ask_register_at = None;
        let args = DecideArgs {
            run: self.spec.run,
            vm: None,
            value,
        };
        self.send(now, self.spec.register, Command::Decide(args));
    }

    /// All halves have arrived: the one place where a commit is proposed.
    pub(super) fn propose_commit(&mut self, now: Duration) {
        if !self.vms.iter().all(VmRun::arrived) || self.decision.is_some() {
            return;
        }
        self.step(Step::AllArrived);
        self.stage = Stage::Deciding;
        self.stage_deadline = Some(now + DECIDE_WITHIN);
        self.commit_proposed = true;
        self.decide(now, RecordValue::Commit);
    }

    /// The register has answered.
    pub(super) fn decided(&mut self, now: Duration, answer: &Value) {
        match serde_json::from_value::<RecordValue>(answer["value"].clone()) {
            Ok(RecordValue::Commit) => self.learn(now, Decision::Commit),
            Ok(RecordValue::Abort) => self.learn(now, Decision::Abort),
            _ => self.register_refused(now, format!("the register answered {answer}")),
        }
    }

    /// The register did not answer as it should: it is asked again, until the stage's deadline.
    pub(super) fn register_refused(&mut self, now: Duration, error: String) {
        if self.decision.is_some() || self.stage == Stage::Ended {
            return;
        }
        if self.commit_proposed || self.past_return {
            self.in_doubt(error);
        } else {
            self.notice(error);
        }
        self.ask_register_at = Some(now + ASK_AGAIN);
    }

    /// Asks the register again when it is time, and repeats what was not carried out yet.
    pub(super) fn check_register(&mut self, now: Duration) {
        if self.ask_register_at.is_some_and(|at| now >= at) {
            self.ask_register_at = None;
            match self.stage {
                Stage::Deciding if self.vms.iter().all(VmRun::arrived) => {
                    self.decide(now, RecordValue::Commit);
                }
                // A half broke while nobody knew whether the commit is recorded.
                Stage::Deciding => self.decide(now, RecordValue::Abort),
                Stage::RollingBack => self.decide(now, RecordValue::Abort),
                _ => {}
            }
        }
        if self.resend_at.is_some_and(|at| now >= at) {
            match self.stage {
                Stage::Committing => self.send_commit(now),
                Stage::RollingBack => self.send_abort(now),
                _ => self.resend_at = None,
            }
        }
    }

    /// The decision became known: from the register's answer, or through a sidecar.
    pub(super) fn learn(&mut self, now: Duration, decision: Decision) {
        if let Some(known) = self.decision {
            if known != decision {
                self.notice(format!(
                    "contradiction: {known:?} is recorded, {decision:?} was reported"
                ));
            }
            return;
        }
        if self.stage == Stage::Ended {
            return;
        }
        self.decision = Some(decision);
        self.ask_register_at = None;
        self.step(Step::Decided(decision));
        match (decision, self.stage) {
            (Decision::Commit, _) => {
                self.stage = Stage::Committing;
                self.stage_deadline = Some(now + COMMIT_WITHIN);
                self.requests.clear();
                self.send_commit(now);
                self.step(Step::CommitSent);
            }
            (Decision::Abort, Stage::RollingBack) => self.send_abort(now),
            (Decision::Abort, _) => {
                let reason = "the register says abort: a sidecar had lost the coordinator, or an operator aborted";
                self.reason.get_or_insert_with(|| reason.into());
                self.commit_proposed = false;
                self.step(Step::RollingBack {
                    reason: reason.into(),
                });
                self.roll_back(now);
            }
        }
    }

    /// `commit` to every destination, written before any answer is read; then to the sources.
    fn send_commit(&mut self, now: Duration) {
        self.resend_at = Some(now + RESEND);
        let args = self.args();
        let open = self.open_hosts();
        let mut hosts = self.destinations();
        hosts.extend(self.sources());
        let mut told = Vec::new();
        for host in hosts {
            if open.contains(&host) && !told.contains(&host) {
                told.push(host);
                self.send(now, host, Command::Commit(args));
            }
        }
        for vm in &mut self.vms {
            vm.finish_sent = false;
        }
    }

    /// Committing and rolling back: finishes what has become possible, ends when all halves have.
    pub(super) fn advance_settling(&mut self, now: Duration) {
        if self.stage == Stage::Committing {
            self.send_finish(now);
            let runs = |vm: &VmRun| vm.side().is_some();
            if !self.all_running && self.vms.iter().all(runs) {
                self.all_running = true;
                self.step(Step::AllRunning);
            }
        }
        if self.vms.iter().all(VmRun::ended) {
            self.conclude();
        }
    }

    fn send_finish(&mut self, now: Duration) {
        for host in self.sources() {
            let mut names = Vec::new();
            for vm in &mut self.vms {
                let runs = vm.destination.end == Some(End::Committed);
                if vm.member.from == host && runs && vm.source.end.is_none() && !vm.finish_sent {
                    vm.finish_sent = true;
                    names.push(vm.member.name.clone());
                }
            }
            if !names.is_empty() {
                let args = self.args();
                let finish = FinishArgs {
                    run: args.run,
                    epoch: args.epoch,
                    vms: names,
                };
                self.send(now, host, Command::Finish(finish));
            }
        }
    }

    /// The deadline of deciding, committing or rolling back has passed: says what is open.
    pub(super) fn settling_overdue(&mut self) {
        if self.stage == Stage::Deciding {
            let name = self.host_name(self.spec.register);
            let reason = format!(
                "in doubt: the register at {name} has not answered for {DECIDE_WITHIN:?}; the VMs \
                 stay paused until it does, or until `muster recover`"
            );
            self.reason = Some(reason.clone());
            self.in_doubt(reason);
            self.end(Outcome::NeedsAttention);
            return;
        }
        for index in 0..self.vms.len() {
            let vm = &self.vms[index];
            for (half, host) in [(vm.source, vm.member.from), (vm.destination, vm.member.to)] {
                if half.end.is_none() {
                    let state = half
                        .phase
                        .map_or("unknown".into(), |phase| phase.to_string());
                    let text = format!(
                        "{} at {} was last seen {state}; its sidecar settles it when it is back \
                         (see `muster status`, `muster recover`)",
                        self.vms[index].member.name,
                        self.host_name(host)
                    );
                    self.notices.push(text);
                }
            }
        }
        self.conclude();
    }

    fn conclude(&mut self) {
        let outcome = self.judge();
        for index in 0..self.vms.len() {
            let vm = &self.vms[index];
            if vm.source.end == Some(End::Lost) && vm.side().is_none() {
                let text = format!(
                    "{} is lost: its QEMU at {} died before its copy was complete",
                    vm.member.name,
                    self.host_name(vm.member.from)
                );
                self.notices.push(text);
            }
        }
        if self.reason.is_none() {
            if outcome == Outcome::NeedsAttention {
                self.reason = Some("not every VM's end is confirmed; see the notices".into());
            }
        } else if outcome == Outcome::Committed {
            self.reason = None;
        }
        self.end(outcome);
    }

    /// What the halves' ends amount to.
    fn judge(&self) -> Outcome {
        let diverged = self.vms.iter().any(|vm| vm.diverged.is_some());
        let all = |side| self.vms.iter().all(|vm| vm.side() == Some(side));
        if diverged {
            return Outcome::NeedsAttention;
        }
        if all(Side::Destination) {
            let gone = |vm: &VmRun| vm.source.end.is_some();
            return if self.vms.iter().all(gone) {
                Outcome::Committed
            } else {
                Outcome::NeedsAttention
            };
        }
        // A destination whose sidecar is away cannot run the VM: the source has taken it back.
        let away = |vm: &VmRun| {
            vm.destination.end.is_some()
                || self
                    .hosts
                    .get(&vm.member.to)
                    .is_some_and(|host| !host.is_up() || host.is_silent())
        };
        if all(Side::Source) && self.vms.iter().all(away) {
            return Outcome::RolledBack;
        }
        Outcome::NeedsAttention
    }

    pub(super) fn end(&mut self, outcome: Outcome) {
        self.stage = Stage::Ended;
        self.stage_deadline = None;
        self.requests.clear();
        self.outcome = Some(outcome);
        self.step(Step::Ended(outcome));
    }
}
