//! Sidecars and guests in virtual time: what is paced flows, what is dirtied comes back.

use sidecar::protocol::command::Command;
use sidecar::protocol::event::Event;
use sidecar::protocol::types::{HoldReason, Phase, QemuBuild, Role, RoundReport, VmReport};

use super::*;
use crate::engine::Step;

const TICK: Duration = Duration::from_millis(50);
const A: HostId = HostId(0);
const B: HostId = HostId(1);
/// Nothing takes longer than this.
const END: Duration = Duration::from_secs(2000);

/// A guest with a working set that it dirties at a steady rate.
#[derive(Debug, Clone)]
pub struct Guest {
    pub name: &'static str,
    pub memory: f64,
    pub dirty_rate: f64,
    pub working_set: f64,
}

/// A guest in its move.
#[derive(Debug)]
pub struct Vm {
    guest: Guest,
    uuid: Uuid,
    run: Uuid,
    /// Where it runs.
    pub at: HostId,
    pub phase: Phase,
    pub round: u64,
    pub left: f64,
    dirtied: f64,
    pub sent: f64,
    round_began: Duration,
    pub limit: Option<u64>,
    weight: f64,
    /// For how long it has waited for the path.
    waited: Duration,
    /// When its first round was over.
    pub copied_at: Option<Duration>,
    pub stopped_at: Option<Duration>,
}

pub struct World<'a> {
    pub conductor: Conductor<'a, Counter>,
    pub now: Duration,
    pub vms: Vec<Vm>,
    pub steps: Vec<(Duration, Vec<String>, Step)>,
    /// What the path carries, in bytes per second.
    pub carries: f64,
    /// The most that all have sent at a time, in bytes per second.
    pub most: f64,
    limits: BTreeMap<Uuid, u64>,
    seq: BTreeMap<(Uuid, HostId), u64>,
    report_at: Duration,
}

impl<'a> World<'a> {
    pub fn new(app: &'a Application, guests: &[Guest]) -> Self {
        Self::with(app, Policy::Comma, guests)
    }

    pub fn with(app: &'a Application, policy: Policy, guests: &[Guest]) -> Self {
        let plan = plan(app, policy).expect("carried out");
        let vm = |guest: &Guest| Vm {
            uuid: app
                .vms
                .iter()
                .find(|vm| vm.name == guest.name)
                .map(|vm| vm.uuid)
                .expect("in the application"),
            guest: guest.clone(),
            run: Uuid::nil(),
            at: A,
            phase: Phase::Preparing,
            round: 0,
            left: 0.0,
            dirtied: 0.0,
            sent: 0.0,
            round_began: Duration::ZERO,
            limit: None,
            weight: 1.0,
            waited: Duration::ZERO,
            copied_at: None,
            stopped_at: None,
        };
        let mut world = Self {
            conductor: Conductor::new(app, plan, BTreeMap::new(), Counter(0)),
            now: Duration::from_secs(1),
            vms: guests.iter().map(vm).collect(),
            steps: Vec::new(),
            carries: f64::INFINITY,
            most: 0.0,
            limits: BTreeMap::new(),
            seq: BTreeMap::new(),
            report_at: Duration::ZERO,
        };
        world.conductor.begin(world.now);
        world.carry_out();
        world
    }

    /// Names of the VMs of each planned group.
    pub fn groups(&self) -> Vec<Vec<String>> {
        let names = |started: &Started| {
            let members = started.group.spec().members.iter();
            members.map(|member| member.name.clone()).collect()
        };
        self.conductor.started().iter().map(names).collect()
    }

    pub fn vm(&self, name: &str) -> &Vm {
        let mut vms = self.vms.iter();
        vms.find(|vm| vm.guest.name == name).expect("a VM")
    }

    /// When a group of which this VM is one came to a step.
    pub fn at(&self, vm: &str, is: impl Fn(&Step) -> bool) -> Option<Duration> {
        let mut steps = self.steps.iter();
        let found = steps.find(|(_, vms, step)| vms.iter().any(|one| one == vm) && is(step))?;
        Some(found.0)
    }

    /// Whether any group came to a step.
    pub fn any(&self, is: impl Fn(&Step) -> bool) -> bool {
        self.steps.iter().any(|(_, _, step)| is(step))
    }

    /// Goes on until something is true.
    pub fn until(&mut self, is: impl Fn(&Self) -> bool) {
        while !is(self) {
            assert!(
                self.conductor.outcome().is_none(),
                "ended: {:?}",
                self.steps
            );
            assert!(self.now < END, "it takes for ever: {:?}", self.steps);
            self.tick();
        }
    }

    pub fn end(&mut self) -> Outcome {
        self.until(|world| world.conductor.outcome().is_some());
        // A path that carries what was told gives no cause.
        let is_shared_anew = |step: &Step| matches!(step, Step::Bandwidth { .. });
        let mut steps = self.steps.iter();
        assert!(self.carries.is_finite() || !steps.any(|(_, _, step)| is_shared_anew(step)));
        self.conductor.outcome().expect("ended")
    }

    /// A QEMU at the destination dies.
    pub fn fail(&mut self, name: &str) {
        let run = self.vm(name).run;
        let event = Event::Failed {
            vm: name.into(),
            role: Role::Destination,
            error: "it broke".into(),
            lost: true,
            secondary: false,
        };
        self.say(run, if self.vm(name).at == A { B } else { A }, event);
        self.carry_out();
    }

    pub fn interrupt(&mut self) {
        self.conductor.interrupt(self.now);
        self.carry_out();
    }

    fn say(&mut self, run: Uuid, host: HostId, event: Event) {
        let seq = self.seq.entry((run, host)).or_default();
        *seq += 1;
        let envelope = Envelope {
            run,
            seq: *seq,
            at_us: i64::try_from(self.now.as_micros()).unwrap(),
            event,
        };
        self.conductor.handle_event(self.now, host, &envelope);
    }

    fn tick(&mut self) {
        self.now += TICK;
        while let Some(due) = self.conductor.poll_timeout().filter(|due| *due <= self.now) {
            self.conductor.handle_timeout(due.max(self.now - TICK));
            self.carry_out();
        }
        let all: f64 = self
            .vms
            .iter()
            .filter(|vm| sends(vm))
            .map(|vm| self.rate(vm))
            .sum();
        self.most = self.most.max(all);
        for index in 0..self.vms.len() {
            self.flow(index);
        }
        if self.now >= self.report_at {
            self.report_at = self.now + Duration::from_millis(200);
            for index in 0..self.vms.len() {
                self.report(index);
            }
        }
        self.carry_out();
    }

    /// What a VM sends now: what it may, or its part of what the path carries.
    fn rate(&self, vm: &Vm) -> f64 {
        self.allowed(vm) * self.part()
    }

    /// What part of all that VMs may send the path carries.
    fn part(&self) -> f64 {
        let all = self.vms.iter().filter(|one| sends(one) && one.left > 0.0);
        let all: f64 = all.map(|vm| self.allowed(vm)).sum();
        (self.carries / all).min(1.0)
    }

    /// What a VM may send now: its part of its run's limit, and no more than its own.
    fn allowed(&self, vm: &Vm) -> f64 {
        let weights = self
            .vms
            .iter()
            .filter(|one| one.run == vm.run && sends(one));
        let weights: f64 = weights.map(|one| one.weight).sum();
        let all = self.limits.get(&vm.run).copied().unwrap_or_default();
        let share = all as f64 * vm.weight / weights.max(vm.weight);
        let own = vm.limit.filter(|limit| *limit > 0);
        own.map_or(share, |limit| share.min(limit as f64))
    }

    fn flow(&mut self, index: usize) {
        let rate = self.rate(&self.vms[index]);
        let waits = self.part() < 0.99;
        let now = self.now;
        let vm = &mut self.vms[index];
        if !sends(vm) {
            return;
        }
        if waits && vm.left > 0.0 {
            vm.waited += TICK;
        }
        let step = TICK.as_secs_f64();
        let sent = (rate * step).min(vm.left);
        vm.sent += sent;
        vm.left -= sent;
        // Who is held looks at once at what was dirtied, the others when they have sent all.
        vm.dirtied = (vm.dirtied + vm.guest.dirty_rate * step).min(vm.guest.working_set);
        let (run, host) = (vm.run, vm.at);
        if vm.phase != Phase::Precopy {
            vm.left = (vm.left + vm.dirtied).min(vm.guest.working_set);
            vm.dirtied = 0.0;
            if vm.phase == Phase::Armed {
                let event = Event::Armed {
                    vm: vm.guest.name.into(),
                    remaining_bytes: bytes(vm.left),
                    dirty_rate_bytes_per_s: bytes(vm.guest.dirty_rate),
                };
                self.say(run, host, event);
            }
            return;
        }
        if vm.left > 0.0 {
            return;
        }
        let round = RoundReport {
            round: vm.round,
            sent_bytes: bytes(vm.sent),
            dirtied_bytes: bytes(vm.dirtied),
            duration_ms: 1,
        };
        let began = std::mem::replace(&mut vm.round_began, now);
        vm.round += 1;
        vm.copied_at = vm.copied_at.or(Some(now));
        vm.left = std::mem::take(&mut vm.dirtied);
        let took = (now - began).as_secs_f64();
        // What is left fits the downtime, or the round was as short as it gets.
        let is_ready = vm.left <= rate * 0.3 || (vm.round > 3 && took <= 1.0);
        if is_ready {
            vm.phase = Phase::Held;
        }
        let (vm, left) = (vm.guest.name.to_owned(), vm.left);
        let dirty_rate_bytes_per_s = bytes(self.vms[index].guest.dirty_rate);
        self.say(
            run,
            host,
            Event::Round {
                vm: vm.clone(),
                round,
            },
        );
        if is_ready {
            let event = Event::Held {
                vm,
                reason: HoldReason::Converged,
                remaining_bytes: bytes(left),
                dirty_rate_bytes_per_s,
            };
            self.say(run, host, event);
        }
    }

    fn report(&mut self, index: usize) {
        let vm = &self.vms[index];
        if !sends(vm) {
            return;
        }
        let report = VmReport {
            round: vm.round,
            total_bytes: bytes(vm.guest.memory),
            transferred_bytes: bytes(vm.sent),
            remaining_bytes: bytes(vm.left),
            dirty_rate_bytes_per_s: bytes(vm.guest.dirty_rate),
            rate_bytes_per_s: bytes(self.rate(vm)),
            link_wait_ms: u64::try_from(vm.waited.as_millis()).unwrap(),
            ..VmReport::new(vm.guest.name.into(), vm.uuid, Role::Source, vm.phase)
        };
        let (run, host) = (vm.run, vm.at);
        let status = Event::Status { vms: vec![report] };
        self.say(run, host, status);
    }

    fn carry_out(&mut self) {
        while let Some((index, output)) = self.conductor.poll_output() {
            let spec = self.conductor.started()[index].group.spec().clone();
            match output {
                Output::Step(step) => {
                    let names = spec.members.iter().map(|one| one.name.clone());
                    self.steps.push((self.now, names.collect(), step));
                }
                Output::Send {
                    host,
                    ticket,
                    command,
                } => {
                    let answer = match &command {
                        Command::Decide(args) => serde_json::json!({ "value": args.value }),
                        _ => serde_json::json!({ "vms": [] }),
                    };
                    self.obey(&spec, host, &command);
                    self.conductor
                        .handle_reply(self.now, index, host, ticket, Ok(answer));
                }
            }
        }
    }

    fn obey(&mut self, spec: &GroupSpec, host: HostId, command: &Command) {
        let run = spec.run;
        if let Command::Pace(args) = command {
            self.limits
                .insert(run, args.group_bytes_per_s.unwrap_or_default());
            let over = |group: &Started| group.group.outcome().is_some();
            for started in self.conductor.started().iter().filter(|one| over(one)) {
                self.limits.remove(&started.group.run());
            }
        }
        for member in &spec.members {
            let index = self.vms.iter().position(|vm| vm.guest.name == member.name);
            let index = index.expect("a VM of the world");
            for role in [Role::Source, Role::Destination] {
                let here = if role == Role::Source {
                    member.from
                } else {
                    member.to
                };
                if here == host {
                    self.obey_one(run, index, role, host, command);
                }
            }
        }
    }

    fn obey_one(&mut self, run: Uuid, index: usize, role: Role, host: HostId, command: &Command) {
        let now = self.now;
        let vm = &mut self.vms[index];
        let name = vm.guest.name.to_owned();
        let event = match (command, role) {
            (Command::Prepare(args), _) if args.role == role => {
                vm.run = run;
                vm.phase = Phase::Prepared;
                Event::Prepared {
                    vm: name,
                    role,
                    stream: Some("s".into()),
                    memory_bytes: bytes(vm.guest.memory),
                    qemu_version: "10".into(),
                    qemu_build: QemuBuild::Stock,
                }
            }
            (Command::Start(args), Role::Source) if args.vms.contains_key(&name) => {
                vm.phase = Phase::Precopy;
                (vm.round, vm.left, vm.dirtied) = (1, vm.guest.memory, 0.0);
                vm.round_began = now;
                return;
            }
            (Command::Pace(args), Role::Source) => {
                let pace = &args.vms[&name];
                vm.limit = pace.bytes_per_s.or(vm.limit);
                vm.weight = pace.weight.unwrap_or(vm.weight);
                return;
            }
            (Command::Arm(_), Role::Source) => {
                vm.phase = Phase::Armed;
                return;
            }
            (Command::Disarm(_), Role::Source) => {
                vm.phase = Phase::Held;
                return;
            }
            (Command::Release(_), Role::Source) => {
                vm.phase = Phase::Stopped;
                vm.stopped_at = Some(now);
                Event::Stopped {
                    vm: name,
                    remaining_bytes: bytes(vm.left),
                    stopped_at_us: 1,
                }
            }
            (Command::Continue(_), Role::Source) => {
                vm.phase = Phase::Arrived;
                let to = if host == A { B } else { A };
                let (vm, role) = (name.clone(), Role::Destination);
                self.say(run, to, Event::Arrived { vm, role });
                Event::Arrived {
                    vm: name,
                    role: Role::Source,
                }
            }
            (Command::Abort(_), _) => {
                vm.phase = Phase::RolledBack;
                let reason = None;
                Event::RolledBack {
                    vm: name,
                    role,
                    reason,
                }
            }
            (Command::Commit(_), Role::Destination) => {
                vm.at = host;
                Event::Committed {
                    vm: name,
                    role,
                    resumed_at_us: Some(1),
                }
            }
            (Command::Finish(args), Role::Source) if args.vms.contains(&name) => {
                vm.phase = Phase::Committed;
                Event::Committed {
                    vm: name,
                    role,
                    resumed_at_us: None,
                }
            }
            _ => return,
        };
        self.say(run, host, event);
    }
}

fn sends(vm: &Vm) -> bool {
    matches!(vm.phase, Phase::Precopy | Phase::Held | Phase::Armed)
}

#[allow(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "far below 2^63"
)]
fn bytes(value: f64) -> u64 {
    value.max(0.0) as u64
}
