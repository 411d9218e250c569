//! The engine in virtual time, against scripted events: no sockets, no sidecars.

mod balloon;
mod disks;
mod failures;
mod happy;
mod random;
mod stages;
mod throttle;

use super::*;
use crate::application::OnNonConvergence;
use rate_limiter::BytesPerSecond;
use serde_json::json;
use sidecar::protocol::event::{Envelope, Event};
use sidecar::protocol::types::{HoldReason, QemuBuild, Role};

pub(super) const A: HostId = HostId(0);
pub(super) const B: HostId = HostId(1);
/// The register, apart from both.
pub(super) const R: HostId = HostId(2);
pub(super) const MB: u64 = 1_000_000;

pub(super) fn spec(names: &[&str], hold: bool) -> GroupSpec {
    let members = names.iter().enumerate().map(|(index, name)| Member {
        vm: VmId(index),
        name: (*name).to_owned(),
        uuid: Uuid::from_u128(100 + index as u128),
        from: A,
        to: B,
        token: "0".repeat(64),
        machine: None,
        disks: Vec::new(),
        balloon: None,
        min_write_rate: None,
        transport: Transport::Relay,
        max_throttle: 99,
        profile: VmProfile::default(),
    });
    GroupSpec {
        run: Uuid::from_u128(1),
        epoch: 1,
        members: members.collect(),
        register: R,
        register_address: "unix:/register".into(),
        hold,
        scheme: Scheme::default(),
        rests: true,
        parked: None,
        limits: Limits {
            max_downtime: Duration::from_millis(300),
            hard_downtime: Duration::from_millis(600),
            deadline: None,
            lease: Duration::from_secs(5),
            report_interval: Duration::from_millis(500),
            disk_stall: Duration::from_secs(2),
            multifd_channels: 0,
            termination: Termination::default(),
            horizon: Duration::from_secs(10),
            on_non_convergence: OnNonConvergence::Abort,
        },
        capacity: Capacity {
            bandwidth: BytesPerSecond(50 * MB),
            cuts: Vec::new(),
        },
    }
}

/// Drives a group and remembers what it put out.
pub(super) struct Script {
    pub group: GroupRun,
    pub now: Duration,
    pub sent: Vec<(HostId, u64, Command)>,
    pub steps: Vec<Step>,
    seq: [u64; 3],
    /// Hosts whose commands are answered with `{}` at once.
    pub answering: [bool; 3],
    /// What the sources' QEMUs are.
    pub build: QemuBuild,
}

impl Script {
    pub fn new(spec: GroupSpec) -> Self {
        Self::with(spec, [true; 3])
    }

    /// No command is answered.
    pub fn unanswered(spec: GroupSpec) -> Self {
        Self::with(spec, [false; 3])
    }

    fn with(spec: GroupSpec, answering: [bool; 3]) -> Self {
        let mut script = Self {
            group: GroupRun::new(spec),
            now: Duration::from_secs(100),
            sent: Vec::new(),
            steps: Vec::new(),
            seq: [0; 3],
            answering,
            build: QemuBuild::Stock,
        };
        script.group.begin(script.now);
        script.drain();
        script
    }

    pub fn drain(&mut self) {
        while let Some(output) = self.group.poll_output() {
            match output {
                Output::Step(step) => self.steps.push(step),
                Output::Send {
                    host,
                    ticket,
                    command,
                } => {
                    let decide = matches!(command, Command::Decide(_) | Command::QueryRun(_));
                    self.sent.push((host, ticket, command));
                    if self.answering[host.0] && !decide {
                        self.group
                            .handle_reply(self.now, host, ticket, Ok(json!({})));
                    }
                }
            }
        }
    }

    pub fn event(&mut self, host: HostId, event: Event) {
        self.seq[host.0] += 1;
        let envelope = Envelope {
            run: self.group.run(),
            seq: self.seq[host.0],
            at_us: i64::try_from(self.now.as_micros()).unwrap(),
            event,
        };
        self.group.handle_event(self.now, host, &envelope);
        self.drain();
    }

    /// Lets time pass, with every timeout in between.
    pub fn pass(&mut self, time: Duration) {
        let end = self.now + time;
        while let Some(due) = self.group.poll_timeout().filter(|due| *due <= end) {
            self.now = self.now.max(due);
            self.group.handle_timeout(self.now);
            self.drain();
        }
        self.now = end;
    }

    /// Names of the commands sent since the last call, with their host; without the chatter.
    pub fn took(&mut self) -> Vec<(HostId, &'static str)> {
        let chatter = ["keep-alive", "query-decision", "set-report-interval"];
        self.sent
            .drain(..)
            .map(|(host, _, command)| (host, command.name()))
            .filter(|(_, name)| !chatter.contains(name))
            .collect()
    }

    /// Answers the `decide` that was sent last.
    pub fn register_says(&mut self, value: &str) {
        let found = self
            .sent
            .iter()
            .rev()
            .find(|(_, _, c)| matches!(c, Command::Decide(_)));
        let (host, ticket, _) = found.expect("nothing was proposed");
        let (host, ticket) = (*host, *ticket);
        self.group
            .handle_reply(self.now, host, ticket, Ok(json!({ "value": value })));
        self.drain();
    }

    pub fn names(&self) -> Vec<String> {
        self.group
            .spec()
            .members
            .iter()
            .map(|member| member.name.clone())
            .collect()
    }

    fn each(&mut self, host: HostId, event: impl Fn(String) -> Event) {
        for vm in self.names() {
            self.event(host, event(vm));
        }
    }

    pub fn prepared(&mut self) {
        let qemu_build = self.build;
        for (host, role) in [(A, Role::Source), (B, Role::Destination)] {
            self.each(host, |vm| Event::Prepared {
                stream: (role == Role::Destination).then(|| format!("10.0.0.2:4601/{vm}")),
                vm,
                role,
                memory_bytes: 100 * MB,
                qemu_version: "10.0.2".into(),
                qemu_build,
            });
        }
    }

    pub fn held(&mut self) {
        self.each(A, |vm| Event::Held {
            vm,
            reason: HoldReason::Converged,
            remaining_bytes: MB,
            dirty_rate_bytes_per_s: MB,
        });
    }

    pub fn armed(&mut self, remaining_bytes: u64) {
        self.each(A, |vm| Event::Armed {
            vm,
            remaining_bytes,
            dirty_rate_bytes_per_s: MB,
        });
    }

    /// One VM's report while armed.
    pub fn armed_one(&mut self, vm: &str, remaining_bytes: u64, dirty_rate_bytes_per_s: u64) {
        let vm = vm.to_owned();
        self.event(
            A,
            Event::Armed {
                vm,
                remaining_bytes,
                dirty_rate_bytes_per_s,
            },
        );
    }

    /// Armed, and what remains does not fall any more: the moment of the release.
    pub fn steady(&mut self, remaining_bytes: u64) {
        self.armed(remaining_bytes);
        self.pass(Duration::from_millis(50));
        self.armed(remaining_bytes);
    }

    pub fn stopped(&mut self, remaining_bytes: u64) {
        self.each(A, |vm| Event::Stopped {
            vm,
            remaining_bytes,
            stopped_at_us: 5,
        });
    }

    pub fn arrived(&mut self, role: Role) {
        let host = if role == Role::Source { A } else { B };
        self.each(host, |vm| Event::Arrived { vm, role });
    }

    pub fn committed(&mut self, role: Role) {
        let host = if role == Role::Source { A } else { B };
        let resumed_at_us = (role == Role::Destination).then_some(9);
        self.each(host, |vm| Event::Committed {
            vm,
            role,
            resumed_at_us,
        });
    }

    pub fn rolled_back(&mut self) {
        for (host, role) in [(A, Role::Source), (B, Role::Destination)] {
            self.each(host, |vm| Event::RolledBack {
                vm,
                role,
                reason: None,
            });
        }
    }

    pub fn failed(&mut self, host: HostId, role: Role, lost: bool) {
        let vm = self.names()[0].clone();
        let error = "it broke".into();
        self.event(
            host,
            Event::Failed {
                vm,
                role,
                error,
                lost,
                secondary: false,
            },
        );
    }

    /// Goes to the named phase on the happy path.
    pub fn up_to(&mut self, phase: &str) {
        type Go<'g> = &'g dyn Fn(&mut Script);
        let path: [(&str, Go<'_>); 6] = [
            ("preparing", &|_| {}),
            ("precopy", &Self::prepared),
            ("held", &Self::held),
            ("stopping", &|s| s.steady(MB)),
            ("switching", &|s| s.stopped(MB)),
            ("deciding", &|s| {
                s.arrived(Role::Source);
                s.arrived(Role::Destination);
            }),
        ];
        for (name, go) in path {
            go(self);
            if name == phase {
                return;
            }
        }
        panic!("no phase {phase}");
    }

    pub fn proposed(&self, value: &str) -> bool {
        self.sent.iter().any(|(_, _, command)| match command {
            Command::Decide(args) => json!(args.value) == json!(value),
            _ => false,
        })
    }

    pub fn reason(&self) -> String {
        self.group.reason().unwrap_or_default().to_owned()
    }
}
