//! One VM's run, driven over the control protocol by the benchmark itself, without a coordinator:
//! prepared, started, paced and aborted at will.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use coordinator::Application;
use coordinator::application::HostId;
use coordinator::client::{Client, Message};
use serde_json::Value;
use sidecar::protocol::command::{
    Command, PaceArgs, PaceVm, PrepareArgs, PrepareVm, RunArgs, StartArgs, Termination,
};
use sidecar::protocol::event::Event;
use sidecar::protocol::types::{Role, Transport};
use uuid::Uuid;

use crate::lab::Lab;

const LIMIT: Duration = Duration::from_secs(10);
const LEASE_MS: u64 = 600_000;

/// A run of one VM. An abandoned one is rolled back when its connections close.
#[derive(Debug)]
pub struct Driver {
    client: Client,
    events: VecDeque<(HostId, Event)>,
    args: RunArgs,
    register: String,
    vm: String,
    uuid: Uuid,
    token: String,
    hosts: [HostId; 2],
}

impl Driver {
    /// Connects to both sidecars for a run of `vm` from host `from` to `to`.
    ///
    /// # Errors
    /// One does not answer.
    pub fn connect(lab: &Lab, vm: &str, from: &str, to: &str) -> Result<Self> {
        let app: Application = lab.application_of(&[vm], from, to)?;
        let find = |name| app.host_named(name).context("no such host");
        let hosts = [find(from)?, find(to)?];
        let client = Client::connect(&app, &hosts);
        for (_, connected) in client.wait_connected(LIMIT) {
            connected?;
        }
        let [one, other] = [Uuid::new_v4(), Uuid::new_v4()].map(|id| id.as_u128());
        Ok(Self {
            client,
            events: VecDeque::new(),
            args: RunArgs {
                run: Uuid::new_v4(),
                epoch: 1,
            },
            register: format!("unix:{}", lab.control(from).display()),
            vm: vm.to_owned(),
            uuid: lab.guest(vm)?.uuid,
            token: format!("{one:032x}{other:032x}"),
            hosts,
        })
    }

    /// Prepares both halves. Returns where the stream is to go.
    ///
    /// # Errors
    /// A sidecar refuses, or is not ready in time.
    pub fn prepare(&mut self, hold: bool, transport: Transport) -> Result<String> {
        let [from, to] = self.hosts;
        for (host, role) in [(to, Role::Destination), (from, Role::Source)] {
            let vm = PrepareVm {
                disks: Vec::new(),
                balloon: None,
                vm: self.vm.clone(),
                uuid: self.uuid,
                token: self.token.clone(),
                machine: None,
                transport,
            };
            let prepare = PrepareArgs {
                run: self.args.run,
                epoch: self.args.epoch,
                role,
                register: self.register.clone(),
                lease_ms: LEASE_MS,
                report_interval_ms: 1000,
                max_downtime_ms: 300,
                hold,
                resend: false,
                throttle: false,
                disk_stall_ms: 2000,
                multifd_channels: 0,
                termination: Termination::default(),
                vms: vec![vm],
            };
            self.call(host, &Command::Prepare(prepare))?;
        }
        let stream = self.wait(LIMIT, |host, event| match event {
            Event::Prepared { stream, .. } if host == to => stream.clone(),
            _ => None,
        })?;
        self.wait(LIMIT, |host, event| {
            (host == from && matches!(event, Event::Prepared { .. })).then_some(())
        })?;
        Ok(stream)
    }

    /// Begins pre-copy.
    ///
    /// # Errors
    /// The source's sidecar refuses.
    pub fn start(&mut self, stream: String) -> Result<()> {
        let start = StartArgs {
            disks_only: false,
            run: self.args.run,
            epoch: self.args.epoch,
            vms: [(self.vm.clone(), stream)].into(),
        };
        self.call(self.hosts[0], &Command::Start(start)).map(drop)
    }

    /// Limits the VM's stream.
    ///
    /// # Errors
    /// The source's sidecar refuses.
    pub fn pace(&mut self, bytes_per_s: u64) -> Result<()> {
        let pace = PaceVm {
            bytes_per_s: Some(bytes_per_s),
            weight: None,
        };
        let pace = PaceArgs {
            run: self.args.run,
            epoch: self.args.epoch,
            group_bytes_per_s: None,
            vms: [(self.vm.clone(), pace)].into(),
            at_ms: None,
        };
        self.call(self.hosts[0], &Command::Pace(pace)).map(drop)
    }

    /// Waits until both halves have arrived.
    ///
    /// # Errors
    /// One fails, or it takes longer than `limit`.
    pub fn arrived(&mut self, limit: Duration) -> Result<()> {
        for end in self.hosts {
            self.wait(limit, |host, event| {
                (host == end && matches!(event, Event::Arrived { .. })).then_some(())
            })?;
        }
        Ok(())
    }

    /// Rolls both halves back: the VM runs at its source, its destination's process is gone.
    /// That a half fails because the other one has cut the stream already is no failure here.
    ///
    /// # Errors
    /// That does not happen in time.
    pub fn roll_back(&mut self) -> Result<()> {
        for host in self.hosts {
            self.call(host, &Command::Abort(self.args))?;
        }
        for end in self.hosts {
            self.wait_through_failures(LIMIT, |host, event| {
                (host == end && matches!(event, Event::RunEnded { .. })).then_some(())
            })?;
        }
        for host in self.hosts {
            self.call(host, &Command::Forget(self.args))?;
        }
        Ok(())
    }

    /// Sends a command to the host at this end of the run (0: source) and waits for its answer.
    ///
    /// # Errors
    /// It is refused, or no answer comes.
    pub fn ask(&mut self, end: usize, command: &Command) -> Result<Value> {
        self.call(self.hosts[end], command)
    }

    fn call(&mut self, host: HostId, command: &Command) -> Result<Value> {
        let id = self.client.send(host, command);
        let id = id.context("there is no connection to the sidecar")?;
        let by = Instant::now() + LIMIT;
        loop {
            match self.next(by).context("an answer is missing")? {
                Some((_, Message::Answer { id: other, result })) if other == id => {
                    return result.map_err(|error| anyhow::anyhow!("refused: {}", error.desc));
                }
                _ => {}
            }
        }
    }

    fn wait<T>(
        &mut self,
        limit: Duration,
        mut pick: impl FnMut(HostId, &Event) -> Option<T>,
    ) -> Result<T> {
        let failure = |host, event: &Event| match event {
            Event::Failed { error, .. } => Some(Err(error.clone())),
            _ => pick(host, event).map(Ok),
        };
        self.wait_through_failures(limit, failure)?
            .map_err(|error| anyhow::anyhow!("{}: {error}", self.vm))
    }

    fn wait_through_failures<T>(
        &mut self,
        limit: Duration,
        mut pick: impl FnMut(HostId, &Event) -> Option<T>,
    ) -> Result<T> {
        let by = Instant::now() + limit;
        loop {
            for index in 0..self.events.len() {
                let (host, event) = &self.events[index];
                if let Some(found) = pick(*host, event) {
                    self.events.remove(index);
                    return Ok(found);
                }
            }
            self.next(by).context("an event is missing")?;
        }
    }

    /// The next message; events are kept, failures first.
    fn next(&mut self, by: Instant) -> Result<Option<(HostId, Message)>> {
        let left = by.saturating_duration_since(Instant::now());
        if left.is_zero() {
            bail!("nothing came within {LIMIT:?}");
        }
        match self.client.receive(left) {
            Some((_, Message::Lost(error))) => bail!("{error}"),
            Some((host, Message::Event(envelope))) => {
                match envelope.event {
                    Event::Status { .. } | Event::Round { .. } => {}
                    event @ Event::Failed { .. } => self.events.push_front((host, event)),
                    event => self.events.push_back((host, event)),
                }
                Ok(None)
            }
            other => Ok(other),
        }
    }
}
