//! The conductor: carries out a plan, group by group, and settles what a failed group means for
//! those that have moved already. Pure, like the engine under it. Groups that take turns after a bulk
//! copy of all of them (COMMA's two stages) are in `stages.rs`.

mod bandwidth;
mod replan;
mod stages;

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use rate_limiter::BytesPerSecond;
use serde_json::Value;
use sidecar::protocol::command::PrepareDisk;
use sidecar::protocol::event::{Envelope, Event};
use sidecar::protocol::types::Transport;
use uuid::Uuid;

use crate::application::{Application, HostId, OnPartial, VmId};
use crate::capacity::Capacity;
use crate::engine::{GroupRun, GroupSpec, Limits, Member, Output, VmProgress};
use crate::policy::{Concurrency, Plan, PlannedGroup};
use crate::report::Outcome;
use crate::scheduler::allot::parked_rate;
use crate::scheduler::paths::Paths;
use replan::Replan;

pub use replan::{Planning, Replanned};

/// What a group was started for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// The plan says so.
    Forward,
    /// It failed once (`on-partial = "retry"`).
    Retry,
    /// A later group failed (`on-partial = "return"`): back to where its VMs came from.
    Return,
}

/// A group that was started.
#[derive(Debug)]
pub struct Started {
    /// Index into the plan's groups.
    pub planned: usize,
    /// What for.
    pub purpose: Purpose,
    /// Its move.
    pub group: GroupRun,
}

/// Where randomness comes from: run UUIDs and tokens.
pub trait Randomness {
    /// A new run's UUID.
    fn run(&mut self) -> Uuid;
    /// A new stream's token: 64 hexadecimal digits.
    fn token(&mut self) -> String;
}

/// The system's random numbers.
#[derive(Debug, Clone, Copy, Default)]
pub struct SystemRandom;

impl Randomness for SystemRandom {
    fn run(&mut self) -> Uuid {
        Uuid::new_v4()
    }

    fn token(&mut self) -> String {
        // Two v4 UUIDs carry 244 random bits.
        format!("{}{}", Uuid::new_v4().simple(), Uuid::new_v4().simple())
    }
}

/// Carries out a plan.
#[derive(Debug)]
pub struct Conductor<'a, R> {
    app: &'a Application,
    plan: Plan,
    machines: BTreeMap<VmId, String>,
    transports: BTreeMap<VmId, Transport>,
    disks: BTreeMap<VmId, Vec<PrepareDisk>>,
    random: R,
    started: Vec<Started>,
    waiting: VecDeque<(usize, Purpose)>,
    down: BTreeMap<HostId, String>,
    /// What the paths are found to carry.
    paths: Paths,
    /// What the plan was made with, and is to be made anew with.
    replan: Replan,
    /// The planned groups in the order of their turns, where they take turns.
    turns: Vec<usize>,
    interrupted: bool,
    outcome: Option<Outcome>,
}

impl<'a, R: Randomness> Conductor<'a, R> {
    /// A plan that has not begun. `machines` are the machine types found at the sources.
    pub fn new(
        app: &'a Application,
        plan: Plan,
        machines: BTreeMap<VmId, String>,
        random: R,
    ) -> Self {
        let waiting = (0..plan.groups.len())
            .map(|index| (index, Purpose::Forward))
            .collect();
        let turns = (0..plan.groups.len()).collect();
        Self {
            app,
            plan,
            machines,
            transports: BTreeMap::new(),
            disks: BTreeMap::new(),
            random,
            started: Vec::new(),
            waiting,
            down: BTreeMap::new(),
            paths: Paths::new(&app.allowance),
            replan: Replan::default(),
            turns,
            interrupted: false,
            outcome: None,
        }
    }

    /// The local disks of each VM, as preflight has found them.
    #[must_use]
    pub fn with_disks(mut self, disks: BTreeMap<VmId, Vec<PrepareDisk>>) -> Self {
        self.disks = disks;
        self
    }

    /// How the VMs' streams go; through the relay where nothing is said.
    #[must_use]
    pub fn with_transports(mut self, transports: BTreeMap<VmId, Transport>) -> Self {
        self.transports = transports;
        self
    }

    /// Every group that was started, in order.
    #[must_use]
    pub fn started(&self) -> &[Started] {
        &self.started
    }

    /// How the whole ended; `None` while it goes on.
    #[must_use]
    pub fn outcome(&self) -> Option<Outcome> {
        self.outcome
    }

    /// Whether a commit is proposed or recorded in a group under way.
    #[must_use]
    pub fn is_deciding(&self) -> bool {
        self.active().any(|started| started.group.is_deciding())
    }

    fn active(&self) -> impl Iterator<Item = &Started> {
        self.started
            .iter()
            .filter(|started| started.group.outcome().is_none())
    }

    fn each(&mut self, mut act: impl FnMut(&mut GroupRun)) {
        for started in &mut self.started {
            if started.group.outcome().is_none() {
                act(&mut started.group);
            }
        }
    }

    /// Begins.
    pub fn begin(&mut self, now: Duration) {
        self.settle(now);
    }

    /// An event from a sidecar.
    pub fn handle_event(&mut self, now: Duration, host: HostId, envelope: &Envelope) {
        // One that has ended still hears what was given back after its end.
        for started in &mut self.started {
            started.group.handle_event(now, host, envelope);
        }
        if matches!(envelope.event, Event::Status { .. }) {
            self.look_at_paths(now);
        }
        self.settle(now);
    }

    /// The answer to a command of the group with this index in [`Conductor::started`].
    pub fn handle_reply(
        &mut self,
        now: Duration,
        index: usize,
        host: HostId,
        ticket: u64,
        result: Result<Value, String>,
    ) {
        if let Some(started) = self.started.get_mut(index) {
            started.group.handle_reply(now, host, ticket, result);
        }
        self.settle(now);
    }

    /// The connection to a sidecar is gone.
    pub fn handle_lost(&mut self, now: Duration, host: HostId, error: &str) {
        self.down.insert(host, error.to_owned());
        self.each(|group| group.handle_lost(now, host, error));
        self.settle(now);
    }

    /// The connection to a sidecar is open.
    pub fn handle_connected(&mut self, now: Duration, host: HostId) {
        self.down.remove(&host);
        self.each(|group| group.handle_connected(now, host));
        self.settle(now);
    }

    /// The user wants it to stop: groups that can go back do, no further ones start.
    pub fn interrupt(&mut self, now: Duration) {
        self.interrupted = true;
        self.each(|group| group.interrupt(now));
        self.settle(now);
    }

    /// Time has come to what [`Conductor::poll_timeout`] said.
    pub fn handle_timeout(&mut self, now: Duration) {
        self.each(|group| group.handle_timeout(now));
        self.settle(now);
    }

    /// When something is due by itself.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Duration> {
        self.active()
            .filter_map(|started| started.group.poll_timeout())
            .min()
    }

    /// The next output and the group it belongs to.
    pub fn poll_output(&mut self) -> Option<(usize, Output)> {
        let mut groups = self.started.iter_mut().enumerate();
        groups.find_map(|(index, started)| Some((index, started.group.poll_output()?)))
    }

    /// Every VM of the application, in its order.
    #[must_use]
    pub fn progress(&self) -> Vec<VmProgress> {
        let latest = |vm: VmId| {
            self.started.iter().rev().find_map(|started| {
                started
                    .group
                    .progress()
                    .into_iter()
                    .find(|progress| progress.vm == vm)
            })
        };
        let idle = |vm: VmId| VmProgress {
            vm,
            name: self.app.vm(vm).name.clone(),
            phase: None,
            round: 0,
            total_bytes: 0,
            remaining_bytes: 0,
            transferred_bytes: 0,
            rate_bytes_per_s: 0,
            dirty_rate_bytes_per_s: 0,
            throttle_percent: 0,
            time_left: None,
            error: None,
        };
        self.app
            .vm_ids()
            .map(|vm| latest(vm).unwrap_or_else(|| idle(vm)))
            .collect()
    }

    /// Starts what can start now, or ends.
    fn settle(&mut self, now: Duration) {
        while self.outcome.is_none() {
            let active = self.active().count();
            if active > 0 {
                if self.takes_turns() {
                    self.conduct(now);
                } else {
                    self.share(now, active);
                }
                if self.active().next().is_some() {
                    return;
                }
            }
            if let Some(outcome) = self.next(now) {
                self.outcome = Some(outcome);
            }
        }
    }

    /// Groups under way share the bandwidth in equal parts.
    fn share(&mut self, now: Duration, active: usize) {
        let parts = u64::try_from(active).unwrap_or(1).max(1);
        let share = BytesPerSecond((self.app.allowance.for_move().0 / parts).max(1));
        self.each(|group| {
            group.set_company(active > 1);
            group.set_bandwidth(now, share);
        });
        self.share_paths(now);
    }

    /// How the latest attempt of a planned group ended.
    fn ended(&self, planned: usize) -> Option<(Purpose, Outcome)> {
        let mut latest = self
            .started
            .iter()
            .rev()
            .filter(|started| started.planned == planned);
        let started = latest.next()?;
        Some((started.purpose, started.group.outcome()?))
    }

    /// No group is under way: starts the next ones, or says how it all ended.
    fn next(&mut self, now: Duration) -> Option<Outcome> {
        let ends: Vec<(usize, Purpose, Outcome)> = (0..self.plan.groups.len())
            .filter_map(|planned| {
                self.ended(planned)
                    .map(|(p, outcome)| (planned, p, outcome))
            })
            .collect();
        if ends
            .iter()
            .any(|(_, _, outcome)| *outcome == Outcome::NeedsAttention)
        {
            return Some(Outcome::NeedsAttention);
        }
        let returning = self
            .started
            .iter()
            .any(|started| started.purpose == Purpose::Return);
        if returning {
            return self.next_return(now, &ends);
        }
        let failed = ends
            .iter()
            .find(|(_, _, outcome)| *outcome == Outcome::RolledBack);
        let moved: Vec<usize> = ends
            .iter()
            .filter(|(_, _, outcome)| *outcome == Outcome::Committed)
            .map(|(planned, _, _)| *planned)
            .collect();
        let Some(&(planned, purpose, _)) = failed else {
            return self.next_forward(now, &moved);
        };
        if moved.is_empty() {
            return Some(Outcome::RolledBack);
        }
        match self.app.on_partial {
            OnPartial::Retry if purpose == Purpose::Forward && !self.interrupted => {
                self.start(now, planned, Purpose::Retry);
                None
            }
            OnPartial::Return => {
                self.waiting = moved
                    .into_iter()
                    .rev()
                    .map(|p| (p, Purpose::Return))
                    .collect();
                self.next_return(now, &[])
            }
            _ => Some(Outcome::PartlyMoved),
        }
    }

    fn next_forward(&mut self, now: Duration, moved: &[usize]) -> Option<Outcome> {
        if self.waiting.is_empty() {
            return Some(Outcome::Committed);
        }
        if self.interrupted {
            self.waiting.clear();
            if moved.is_empty() {
                return Some(Outcome::RolledBack);
            }
            if self.app.on_partial == OnPartial::Return {
                self.waiting = moved.iter().rev().map(|p| (*p, Purpose::Return)).collect();
                return self.next_return(now, &[]);
            }
            return Some(Outcome::PartlyMoved);
        }
        let count = match self.plan.concurrency {
            Concurrency::OneAfterAnother => 1,
            Concurrency::AllAtOnce | Concurrency::TwoStages => self.waiting.len(),
        };
        self.replan.has_started();
        let next: Vec<(usize, Purpose)> = self.waiting.drain(..count).collect();
        for (planned, purpose) in next {
            self.start(now, planned, purpose);
        }
        None
    }

    fn next_return(
        &mut self,
        now: Duration,
        ends: &[(usize, Purpose, Outcome)],
    ) -> Option<Outcome> {
        let stuck = ends.iter().any(|(_, purpose, outcome)| {
            *purpose == Purpose::Return && *outcome != Outcome::Committed
        });
        if stuck {
            return Some(Outcome::PartlyMoved);
        }
        match self.waiting.pop_front() {
            Some((planned, purpose)) => {
                self.start(now, planned, purpose);
                None
            }
            None => Some(Outcome::RolledBack),
        }
    }

    fn start(&mut self, now: Duration, planned: usize, purpose: Purpose) {
        let app = self.app;
        let back = purpose == Purpose::Return;
        let PlannedGroup { vms, scheme } = self.plan.groups[planned].clone();
        let ends: Vec<(VmId, HostId, HostId)> = vms
            .iter()
            .map(|&id| {
                let vm = app.vm(id);
                if back {
                    (id, vm.to, vm.from)
                } else {
                    (id, vm.from, vm.to)
                }
            })
            .collect();
        let members = ends
            .iter()
            .map(|&(id, from, to)| Member {
                vm: id,
                name: app.vm(id).name.clone(),
                uuid: app.vm(id).uuid,
                from,
                to,
                token: self.random.token(),
                machine: self.machines.get(&id).cloned(),
                transport: self.transports.get(&id).copied().unwrap_or_default(),
                disks: self.disks.get(&id).cloned().unwrap_or_default(),
                min_write_rate: app.vm(id).min_write_rate,
                max_throttle: app.vm(id).max_throttle.unwrap_or(app.max_throttle),
                balloon: app.balloon_of(id),
                profile: self.moved_profile(id),
            })
            .collect();
        let spec = GroupSpec {
            run: self.random.run(),
            epoch: 1,
            members,
            register: app.register,
            register_address: app.host(app.register).control.to_string(),
            hold: self.plan.hold,
            scheme,
            rests: self.plan.rests,
            parked: (self.plan.concurrency == Concurrency::TwoStages
                && purpose == Purpose::Forward)
                .then(|| parked_rate(app.allowance.for_move(), app.vms.len())),
            limits: limits(app),
            capacity: Capacity::of(app, &ends),
        };
        let mut group = GroupRun::new(spec);
        group.name_hosts(|host| app.host(host).name.clone());
        for (host, error) in &self.down {
            group.handle_lost(now, *host, error);
        }
        group.set_paths(now, &self.narrow_for(&ends));
        group.begin(now);
        self.started.push(Started {
            planned,
            purpose,
            group,
        });
    }
}

fn limits(app: &Application) -> Limits {
    Limits {
        max_downtime: app.max_downtime,
        hard_downtime: app.hard_downtime,
        deadline: app.deadline,
        lease: app.lease,
        report_interval: app.report_interval,
        disk_stall: app.disk_stall,
        multifd_channels: app.multifd_channels,
        termination: app.termination,
        horizon: app.horizon,
        on_non_convergence: app.on_non_convergence,
    }
}

#[cfg(test)]
mod tests;
