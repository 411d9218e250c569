//! The sidecars as the engine sees them: connections, keep-alives, and requests with deadlines.

use std::time::Duration;

use serde::Deserialize;
use serde_json::Value;
use sidecar::protocol::command::{Command, QueryRunArgs};
use sidecar::protocol::types::{Decision, VmReport};

use super::group::{GroupRun, Stage};
use super::halves::End;
use super::{Output, Step};
use crate::application::HostId;

/// Every command is answered within this time, or its sidecar counts as hung.
pub(super) const ANSWER_WITHIN: Duration = Duration::from_secs(2);
/// Interval of keep-alives: with [`ANSWER_WITHIN`] a hang is noticed within 2.75 s.
const KEEP_ALIVE: Duration = Duration::from_millis(750);
/// A lost connection may come back within this time, unless VMs are paused.
const RECONNECT_WITHIN: Duration = Duration::from_secs(2);

/// A sidecar.
#[derive(Debug, Clone, Default)]
pub(super) struct HostState {
    /// Its name, for messages.
    pub name: String,
    down_since: Option<Duration>,
    last_heard: Duration,
    next_keep_alive: Duration,
    /// A word is waited for.
    asked: bool,
    reported: bool,
    pub last_seq: Option<u64>,
}

impl HostState {
    pub(super) fn heard(&mut self, now: Duration) {
        self.last_heard = now;
        self.asked = false;
        self.reported = false;
    }

    pub(super) fn is_up(&self) -> bool {
        self.down_since.is_none()
    }

    /// Connected, and has said something since it was last asked.
    fn is_present(&self) -> bool {
        self.is_up() && !self.asked
    }

    /// Connected, but not answering.
    pub(super) fn is_silent(&self) -> bool {
        self.reported
    }
}

/// A command without an answer yet.
#[derive(Debug, Clone)]
pub(super) struct Request {
    pub host: HostId,
    pub command: Command,
    deadline: Duration,
}

/// What `query-run` answers, as far as it is needed.
#[derive(Debug, Deserialize)]
struct RunState {
    #[serde(default)]
    decision: Option<Decision>,
    #[serde(default)]
    vms: Vec<VmReport>,
}

impl GroupRun {
    /// Gives the hosts their names for messages.
    pub fn name_hosts(&mut self, name: impl Fn(HostId) -> String) {
        for (id, host) in &mut self.hosts {
            host.name = name(*id);
        }
    }

    pub(super) fn host_name(&self, host: HostId) -> String {
        match self.hosts.get(&host) {
            Some(state) if !state.name.is_empty() => state.name.clone(),
            _ => format!("host {}", host.0),
        }
    }

    pub(super) fn send(&mut self, now: Duration, host: HostId, command: Command) {
        let ticket = self.next_ticket;
        self.next_ticket += 1;
        let up = self.hosts.get(&host).is_some_and(HostState::is_up);
        let request = Request {
            host,
            command: command.clone(),
            deadline: now + ANSWER_WITHIN,
        };
        self.requests.insert(ticket, request);
        if up {
            self.outputs.push_back(Output::Send {
                host,
                ticket,
                command,
            });
        }
    }

    /// Hosts that VMs of the group leave.
    pub(super) fn sources(&self) -> Vec<HostId> {
        let mut hosts: Vec<HostId> = self.vms.iter().map(|vm| vm.member.from).collect();
        hosts.sort_unstable();
        hosts.dedup();
        hosts
    }

    /// Hosts that VMs of the group are to reach.
    pub(super) fn destinations(&self) -> Vec<HostId> {
        let mut hosts: Vec<HostId> = self.vms.iter().map(|vm| vm.member.to).collect();
        hosts.sort_unstable();
        hosts.dedup();
        hosts
    }

    fn has_halves(&self, host: HostId) -> bool {
        self.vms
            .iter()
            .any(|vm| vm.member.from == host || vm.member.to == host)
    }

    /// The connection to `host` is gone; the driver tries to open it again.
    pub fn handle_lost(&mut self, now: Duration, host: HostId, error: &str) {
        let Some(state) = self.hosts.get_mut(&host) else {
            return;
        };
        if matches!(self.stage, Stage::New | Stage::Ended) || state.down_since.is_some() {
            state.down_since.get_or_insert(now);
            return;
        }
        state.down_since = Some(now);
        let drop_only = |r: &Request| matches!(r.command, Command::KeepAlive(_));
        self.requests
            .retain(|_, request| request.host != host || !drop_only(request));
        let name = self.host_name(host);
        self.notice(format!(
            "the connection to the sidecar of {name} is lost: {error}"
        ));
        if self.stage == Stage::Stopping {
            self.fail(
                now,
                format!("the sidecar of {name} is gone while VMs are paused"),
            );
        }
        self.advance(now);
    }

    /// The connection to `host` is open (again).
    pub fn handle_connected(&mut self, now: Duration, host: HostId) {
        let Some(state) = self.hosts.get_mut(&host) else {
            return;
        };
        if state.down_since.take().is_none() {
            return;
        }
        state.heard(now);
        state.last_seq = None;
        state.next_keep_alive = now;
        if matches!(self.stage, Stage::New | Stage::Ended) {
            return;
        }
        // Commands are idempotent: what was not answered is sent again.
        let again: Vec<u64> = self
            .requests
            .iter()
            .filter(|(_, request)| request.host == host)
            .map(|(ticket, _)| *ticket)
            .collect();
        for ticket in again {
            match self.requests.remove(&ticket).map(|request| request.command) {
                // What is proposed may have changed meanwhile.
                Some(Command::Decide(_)) => self.ask_register_at = Some(now),
                Some(command) => self.send(now, host, command),
                None => {}
            }
        }
        self.check_register(now);
        self.catch_up(now, host);
        self.advance(now);
    }

    pub(super) fn catch_up(&mut self, now: Duration, host: HostId) {
        if self.has_halves(host) {
            let run = self.spec.run;
            self.send(now, host, Command::QueryRun(QueryRunArgs { run }));
        }
    }

    pub(super) fn answered(
        &mut self,
        now: Duration,
        request: &Request,
        result: Result<Value, String>,
    ) {
        let host = request.host;
        match (&request.command, result) {
            (Command::Decide(args), Ok(value)) if args.vm.is_none() => self.decided(now, &value),
            (Command::Decide(args), Err(error)) if args.vm.is_none() => {
                let name = self.host_name(host);
                self.register_refused(now, format!("the register at {name}: {error}"));
            }
            (Command::QueryRun(_), Ok(value)) => {
                if let Ok(state) = serde_json::from_value::<RunState>(value) {
                    for report in &state.vms {
                        self.absorb(now, host, self.last_sample_us(), report, true);
                    }
                    if let Some(decision) = state.decision {
                        self.learn(now, decision);
                    }
                }
            }
            (Command::QueryRun(_), Err(error)) => {
                let name = self.host_name(host);
                self.not_begun(host);
                self.fail(
                    now,
                    format!("the sidecar of {name} has lost the run: {error}"),
                );
            }
            (Command::Prepare(args), Err(error)) => {
                for prepared in &args.vms {
                    for vm in &mut self.vms {
                        if vm.member.name == prepared.vm {
                            vm.half(args.role).end = Some(End::NotBegun);
                        }
                    }
                }
                let name = self.host_name(host);
                self.fail(now, format!("{name} refuses to prepare: {error}"));
            }
            (
                Command::Start(_)
                | Command::Arm(_)
                | Command::Release(_)
                | Command::Continue(_)
                | Command::Back(_)
                | Command::Hold(_),
                Err(error),
            ) => {
                let (name, command) = (self.host_name(host), request.command.name());
                self.fail(now, format!("{name} refuses {command}: {error}"));
            }
            (
                Command::Pace(_)
                | Command::Throttle(_)
                | Command::ThrottleDisks(_)
                | Command::Commit(_)
                | Command::Finish(_),
                Err(error),
            ) => {
                let (name, command) = (self.host_name(host), request.command.name());
                self.notice(format!("{name} refuses {command}: {error}"));
            }
            _ => {}
        }
    }

    /// Nothing of the run is known at `host`. What was not prepared there never began; before any
    /// source is past its point of return, what was prepared has gone back by itself.
    fn not_begun(&mut self, host: HostId) {
        let past_return = self.past_return;
        for vm in &mut self.vms {
            for (at, half) in [
                (vm.member.from, &mut vm.source),
                (vm.member.to, &mut vm.destination),
            ] {
                if at == host && (!half.prepared || !past_return) && half.end.is_none() {
                    half.end = Some(End::NotBegun);
                }
            }
        }
    }

    fn last_sample_us(&self) -> i64 {
        let last = self
            .vms
            .iter()
            .filter_map(|vm| vm.samples.last())
            .map(|s| s.at_us);
        last.max().unwrap_or_default()
    }

    /// Keep-alives, hung sidecars, lost connections, and commands without an answer.
    pub(super) fn check_hosts(&mut self, now: Duration) {
        let args = self.args();
        let run = self.spec.run;
        let hosts: Vec<HostId> = self.hosts.keys().copied().collect();
        for host in hosts {
            let halves = self.has_halves(host);
            let Some(state) = self.hosts.get_mut(&host) else {
                continue;
            };
            if let Some(since) = state.down_since {
                if now >= since + RECONNECT_WITHIN && !state.reported {
                    state.reported = true;
                    let name = self.host_name(host);
                    let text = format!("the sidecar of {name} cannot be reached");
                    if host == self.spec.register && self.stage == Stage::Deciding {
                        self.in_doubt(format!(
                            "{text}, it keeps the register; the VMs stay paused"
                        ));
                    } else {
                        self.host_failed(now, text);
                    }
                }
                continue;
            }
            if now >= state.next_keep_alive {
                state.next_keep_alive = now + KEEP_ALIVE;
                let command = if halves {
                    Command::KeepAlive(args)
                } else {
                    Command::QueryDecision(QueryRunArgs { run })
                };
                self.send(now, host, command);
            }
        }
        self.check_requests(now);
    }

    /// Asks every host for a word before VMs are paused, so that a group is not led to where only
    /// the register can end it while the register, or a half, is away.
    pub(super) fn ask_presence(&mut self, now: Duration) {
        let hosts: Vec<HostId> = self.hosts.keys().copied().collect();
        for host in hosts {
            if let Some(state) = self.hosts.get_mut(&host) {
                state.asked = true;
                state.next_keep_alive = now;
            }
        }
        self.check_hosts(now);
    }

    /// Whether every host has answered [`Self::ask_presence`].
    pub(super) fn all_present(&self) -> bool {
        self.hosts.values().all(HostState::is_present)
    }

    /// Whether the register's host has.
    pub(super) fn register_present(&self) -> bool {
        let state = self.hosts.get(&self.spec.register);
        state.is_some_and(HostState::is_present)
    }

    fn check_requests(&mut self, now: Duration) {
        let overdue: Vec<u64> = self
            .requests
            .iter()
            .filter(|(_, request)| now >= request.deadline)
            .map(|(ticket, _)| *ticket)
            .collect();
        for ticket in overdue {
            let Some(request) = self.requests.get_mut(&ticket) else {
                continue;
            };
            let host = request.host;
            let Some(state) = self.hosts.get_mut(&host).filter(|state| state.is_up()) else {
                // Kept: it is sent again when the connection is back.
                request.deadline = now + ANSWER_WITHIN;
                continue;
            };
            let silent = now >= state.last_heard + ANSWER_WITHIN;
            let report = silent && !std::mem::replace(&mut state.reported, silent);
            let decide = matches!(request.command, Command::Decide(_));
            let command = request.command.name();
            if decide || !silent || matches!(request.command, Command::KeepAlive(_)) {
                self.requests.remove(&ticket);
            } else {
                request.deadline = now + ANSWER_WITHIN;
            }
            let name = self.host_name(host);
            if decide {
                self.register_refused(now, format!("the register at {name} does not answer"));
            }
            if report {
                let text = format!("the sidecar of {name} does not answer ({command}, 2 s)");
                self.host_failed(now, text);
            }
        }
    }

    fn host_failed(&mut self, now: Duration, text: String) {
        if self.is_deciding() || matches!(self.stage, Stage::RollingBack) {
            self.notice(text);
        } else {
            self.fail(now, text);
        }
    }

    /// When something is due by itself.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Duration> {
        if matches!(self.stage, Stage::New | Stage::Ended) {
            return None;
        }
        let mut due: Vec<Duration> = Vec::new();
        due.extend(self.stage_deadline);
        due.extend(self.ask_register_at);
        due.extend(self.resend_at);
        for host in self.hosts.values() {
            match host.down_since {
                None => due.push(host.next_keep_alive),
                Some(since) if !host.reported => due.push(since + RECONNECT_WITHIN),
                Some(_) => {}
            }
        }
        due.extend(self.requests.values().map(|request| request.deadline));
        match self.stage {
            Stage::Precopy => {
                due.extend(self.next_start.map(|(at, _)| at));
                due.extend(self.catch_up_ends());
            }
            Stage::Held { retry_at } => due.push(retry_at),
            Stage::Armed { since } => due.push(since + super::release::ARMED_AT_MOST),
            _ => {}
        }
        due.into_iter().min()
    }

    /// Time has come to what [`GroupRun::poll_timeout`] said.
    pub fn handle_timeout(&mut self, now: Duration) {
        if matches!(self.stage, Stage::New | Stage::Ended) {
            return;
        }
        self.check_hosts(now);
        self.check_register(now);
        if self.stage_deadline.is_some_and(|deadline| now >= deadline) {
            self.stage_deadline = None;
            self.stage_overdue(now);
        }
        self.advance(now);
    }

    pub(super) fn in_doubt(&mut self, reason: String) {
        self.step(Step::InDoubt { reason });
    }
}
