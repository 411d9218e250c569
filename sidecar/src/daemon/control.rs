//! Clients of the control socket and the commands they send.

use std::collections::VecDeque;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::Context;
use mio::Token;
use mio::net::UnixListener;
use serde_json::{Value, json};
use uuid::Uuid;

use super::halves::HalfIo;
use super::net::{Moved, Socket, read_some, write_some};
use super::storage::{Asker, Job};
use super::{Daemon, Entry, Slot, log};
use crate::migration::Now;
use crate::migration::destination::Destination;
use crate::migration::source::{Settings, Source};
use crate::protocol::codec::{
    CommandError, MAX_LINE_BYTES, Request, answer_line, event_line, greeting_line, read_request,
};
use crate::protocol::command::{
    Command, DecideArgs, PrepareArgs, PrepareVm, RecoverArgs, StartArgs, VmArgs,
};
use crate::protocol::event::Envelope;
use crate::protocol::lines::{Line, LineBuffer};
use crate::protocol::types::{RecordKey, RecordValue, Role, Transport};
use crate::relay::hello::Token as StreamToken;
use crate::run::{Run, VmHalf};

/// Output that a client may leave unread before it is dropped.
const MAX_UNREAD_BYTES: usize = 8 << 20;
/// Clients at once.
const MAX_CLIENTS: usize = 64;
/// VMs in one command.
const MAX_VMS: usize = 256;
/// `pace` commands of a run that wait for their time.
const MAX_SCHEDULED: usize = 256;
/// How far ahead that time may be.
const MAX_AHEAD: Duration = Duration::from_secs(86_400);
/// Commands of one client, and reads from it, before others have their turn.
const STEPS_PER_TURN: usize = 64;

/// A client.
#[derive(Debug)]
pub struct Client {
    socket: Socket,
    lines: LineBuffer,
    output: VecDeque<u8>,
    negotiated: bool,
    closed: bool,
}

/// Listens on the unix control socket; a socket that nobody serves is replaced.
///
/// # Errors
/// Another sidecar serves it, or it cannot be made.
pub fn listen_unix(path: &Path) -> anyhow::Result<UnixListener> {
    if std::os::unix::net::UnixStream::connect(path).is_ok() {
        anyhow::bail!(
            "another sidecar already serves {}: stop it, or configure another `control.unix`",
            path.display()
        );
    }
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(error).with_context(|| format!("{} is in the way", path.display()));
        }
        _ => {}
    }
    if let Some(parent) = path.parent() {
        std::fs::create_dir_all(parent)
            .with_context(|| format!("the directory {} cannot be made", parent.display()))?;
    }
    let listener = UnixListener::bind(path)
        .with_context(|| format!("the control socket {} cannot be made", path.display()))?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o660))
        .with_context(|| format!("the mode of {} cannot be set", path.display()))?;
    Ok(listener)
}

type Answer = Result<Value, CommandError>;

pub(super) fn refuse<T>(text: impl Into<String>) -> Result<T, CommandError> {
    Err(CommandError::generic(text))
}

fn stale<T>(epoch: u64, newest: u64) -> Result<T, CommandError> {
    refuse(format!(
        "stale epoch {epoch}: epoch {newest} has taken over"
    ))
}

/// A VM's name becomes part of paths.
pub(super) fn check_name(name: &str) -> Result<(), CommandError> {
    if name.is_empty() || name.len() > 64 || name.contains(['/', '\0']) {
        return refuse(format!("`{name}` is no name for a VM"));
    }
    Ok(())
}

fn is_register_address(address: &str) -> bool {
    match address.strip_prefix("tcp:") {
        Some(tcp) => tcp.parse::<std::net::SocketAddr>().is_ok(),
        None => address.starts_with("unix:/"),
    }
}

impl Daemon {
    pub(super) fn accept_clients(&mut self, slot: Slot) {
        loop {
            let accepted = match slot {
                Slot::ControlTcp => match &self.control_tcp {
                    Some(listener) => listener.accept().map(|(s, _)| Socket::tcp(s)),
                    None => return,
                },
                _ => self
                    .control_unix
                    .accept()
                    .map(|(socket, _)| Socket::Unix(socket)),
            };
            let Ok(mut socket) = accepted else { return };
            if self.clients.len() >= MAX_CLIENTS {
                log("too many control clients; one was refused");
                continue;
            }
            let token = self.token(Slot::Client);
            if socket.register(self.poll.registry(), token).is_err() {
                self.slots.remove(&token);
                continue;
            }
            let client = Client {
                socket,
                lines: LineBuffer::new(MAX_LINE_BYTES),
                output: greeting_line(&self.config.host).into(),
                negotiated: false,
                closed: false,
            };
            self.clients.insert(token.0, client);
            self.flush_client(token.0);
        }
    }

    pub(super) fn serve_client(&mut self, now: Now, id: usize) {
        let mut buffer = [0; 16384];
        let mut left = STEPS_PER_TURN;
        let mut drained = false;
        while left > 0 && !drained {
            left -= self.serve_lines(now, id, left);
            let Some(client) = self.clients.get_mut(&id).filter(|c| left > 0 && !c.closed) else {
                break;
            };
            left -= 1;
            match read_some(&mut client.socket, &mut buffer) {
                Moved::Bytes(n) => client.lines.push(&buffer[..n]),
                Moved::Blocked => drained = true,
                Moved::End | Moved::Broken(_) => client.closed = true,
            }
        }
        self.flush_client(id);
        match self.clients.get(&id) {
            Some(client) if client.closed => self.drop_client(id),
            Some(_) if !drained => self.eager_clients.push(id),
            _ => {}
        }
    }

    /// Obeys at most `limit` commands of a client; how many.
    fn serve_lines(&mut self, now: Now, id: usize, limit: usize) -> usize {
        for served in 0..limit {
            let client = self.clients.get_mut(&id).filter(|c| !c.closed);
            let Some(line) = client.and_then(|client| client.lines.next_line()) else {
                return served;
            };
            let request = match line {
                Line::Whole(line) => read_request(&line),
                Line::TooLong => {
                    let text = format!("a command is at most {MAX_LINE_BYTES} bytes");
                    let command = Err(CommandError::generic(text));
                    Request {
                        id: None,
                        oob: false,
                        command,
                    }
                }
            };
            let asker = Asker {
                client: id,
                id: request.id.clone(),
            };
            if let Some(result) = self.obey(now, id, request) {
                self.answer(asker, &result);
            }
        }
        limit
    }

    fn drop_client(&mut self, id: usize) {
        let Some(mut client) = self.clients.remove(&id) else {
            return;
        };
        client.socket.deregister(self.poll.registry());
        self.slots.remove(&Token(id));
        self.end_measurements_of(id);
        for entry in self
            .runs
            .values_mut()
            .filter(|entry| entry.owner == Some(id))
        {
            entry.owner = None;
            entry
                .run
                .lose_coordinator("the coordinator's connection ended");
        }
    }

    fn flush_client(&mut self, id: usize) {
        let Some(client) = self.clients.get_mut(&id) else {
            return;
        };
        while !client.output.is_empty() {
            let (front, _) = client.output.as_slices();
            match write_some(&mut client.socket, front) {
                Moved::Bytes(n) => drop(client.output.drain(..n)),
                Moved::Blocked => break,
                Moved::End | Moved::Broken(_) => {
                    client.closed = true;
                    break;
                }
            }
        }
        if client.output.len() > MAX_UNREAD_BYTES {
            log("a control client does not read what it is told; it was dropped");
            client.closed = true;
        }
    }

    pub(super) fn answer(&mut self, asker: Asker, result: &Answer) {
        self.tell_client(asker.client, &answer_line(asker.id.as_ref(), result));
    }

    /// Sends a line to one client.
    pub(super) fn tell_client(&mut self, id: usize, line: &[u8]) {
        if let Some(client) = self.clients.get_mut(&id) {
            client.output.extend(line);
            self.flush_client(id);
        }
        // One that takes no answers gets no further turn of its own to be dropped in.
        if self.clients.get(&id).is_some_and(|c| c.closed) {
            self.eager_clients.push(id);
        }
    }

    pub(super) fn broadcast(&mut self, envelope: &Envelope) {
        let line = event_line(envelope);
        let mut closed = Vec::new();
        for (id, client) in self
            .clients
            .iter_mut()
            .filter(|(_, client)| client.negotiated)
        {
            client.output.extend(&line);
            closed.push(*id);
        }
        for id in closed {
            self.flush_client(id);
            if self.clients.get(&id).is_some_and(|client| client.closed) {
                self.drop_client(id);
            }
        }
    }

    /// Obeys a request; the answer, unless it comes later.
    fn obey(&mut self, now: Now, client: usize, request: Request) -> Option<Answer> {
        let asker = Asker {
            client,
            id: request.id,
        };
        let command = match request.command {
            Ok(command) => command,
            Err(error) => return Some(Err(error)),
        };
        let negotiated = self
            .clients
            .get(&client)
            .is_some_and(|client| client.negotiated);
        if let Command::Capabilities(args) = &command {
            return Some(self.negotiate(client, negotiated, &args.enable));
        }
        if !negotiated {
            let text = format!(
                "expecting capabilities negotiation with `qmp_capabilities` before `{}`",
                command.name()
            );
            return Some(Err(CommandError::not_found(text)));
        }
        if request.oob && !command.allows_oob() {
            let text = format!("`{}` cannot be sent out-of-band", command.name());
            return Some(Err(CommandError::generic(text)));
        }
        let job = match command {
            Command::Decide(args) => self.decide_job(asker, args),
            Command::QueryDecision(args) => Ok(Job::Records(asker, args.run)),
            Command::Forget(args) => match self.runs.get(&args.run) {
                Some(entry) if !entry.run.has_ended() => refuse("the run is not over here"),
                Some(entry) if args.epoch < entry.run.epoch => stale(args.epoch, entry.run.epoch),
                _ => Ok(Job::Forget(asker, args.run)),
            },
            Command::QueryVm(args) => {
                if let Err(error) = check_name(&args.vm) {
                    return Some(Err(error));
                }
                if let Some(run) = self.run_of(&args.vm) {
                    return Some(refuse(format!(
                        "VM `{}` is being moved in run {run}",
                        args.vm
                    )));
                }
                if let Some(asker) = self.probe_measured(now, &args.vm, asker) {
                    self.start_probe(now, args.vm, asker);
                }
                return None;
            }
            command => return Some(self.command(now, client, command)),
        };
        match job.and_then(|job| self.storage.submit(job).map_err(CommandError::generic)) {
            Ok(()) => None,
            Err(error) => Some(Err(error)),
        }
    }

    fn negotiate(&mut self, client: usize, negotiated: bool, enable: &[String]) -> Answer {
        if negotiated {
            let text = "capabilities negotiation is already complete, command ignored";
            return Err(CommandError::not_found(text));
        }
        if let Some(unknown) = enable.iter().find(|name| *name != "oob") {
            return refuse(format!("capability `{unknown}` is not known; `oob` is"));
        }
        if let Some(client) = self.clients.get_mut(&client) {
            client.negotiated = true;
        }
        Ok(json!({}))
    }

    fn decide_job(&self, asker: Asker, args: DecideArgs) -> Result<Job, CommandError> {
        let key = args.vm.map_or(RecordKey::Group, RecordKey::Vm);
        Ok(Job::Decide(asker, args.run, key, args.value))
    }

    pub(super) fn run_of(&self, vm: &str) -> Option<Uuid> {
        let has = |entry: &Entry| {
            !entry.run.has_ended()
                && entry
                    .run
                    .halves
                    .iter()
                    .any(|half| half.half().name == vm && !half.half().phase().is_final())
        };
        self.runs
            .iter()
            .find(|(_, entry)| has(entry))
            .map(|(id, _)| *id)
    }

    /// Finds the run of a mutating command, checks and takes over its epoch, renews the lease.
    fn check_epoch(
        &mut self,
        now: Now,
        client: usize,
        run: Uuid,
        epoch: u64,
    ) -> Result<&mut Entry, CommandError> {
        let Some(entry) = self.runs.get_mut(&run) else {
            return refuse(format!(
                "run {run} is not known here; it begins with `prepare`"
            ));
        };
        if epoch < entry.run.epoch {
            return stale(epoch, entry.run.epoch);
        }
        entry.run.epoch = epoch;
        entry.owner = Some(client);
        entry.run.hear(now);
        Ok(entry)
    }

    fn command(&mut self, now: Now, client: usize, command: Command) -> Answer {
        let command = match command {
            Command::Prepare(args) => return self.prepare(now, client, &args),
            Command::DirtyStart(args) => return self.dirty_start(now, client, args),
            command => command,
        };
        if let Some(args) = command.run() {
            self.check_epoch(now, client, args.run, args.epoch)?;
        }
        match command {
            Command::Start(args) => self.start(now, &args),
            Command::Pace(args) => {
                match args.at_ms.and_then(|at| instant_of(now, at)) {
                    Some(at) if at > now.mono + MAX_AHEAD => {
                        return refuse("`at_ms` (unix time) is more than a day ahead");
                    }
                    Some(at) if at > now.mono => {
                        if let Some(entry) = self.runs.get_mut(&args.run) {
                            if entry.scheduled.len() >= MAX_SCHEDULED {
                                return refuse("too many `pace` commands wait for their time");
                            }
                            entry.scheduled.push((at, args));
                        }
                    }
                    _ => self.pace(now, &args).map_err(CommandError::generic)?,
                }
                Ok(json!({}))
            }
            Command::Hold(args) => self.with_source(&args, |source| source.hold(now)),
            Command::Yank(args) => self.with_source(&args, |source| source.yank(now)),
            Command::Arm(args) => self.with_sources(args.run, |source| source.arm(now)),
            Command::Disarm(args) => self.with_sources(args.run, |source| source.disarm(now)),
            Command::Release(args) => self.with_sources(args.run, |source| source.release(now)),
            Command::Continue(args) => self.with_sources(args.run, |source| source.proceed(now)),
            Command::Back(args) => {
                let mut result = Ok(());
                let found = self.with_sources(args.run, |source| {
                    result = result.and(source.back(now));
                });
                found.and_then(|value| result.map(|()| value).map_err(CommandError::generic))
            }
            Command::Throttle(args) => {
                if args.percent > 99 {
                    return refuse("`percent` is 0 to 99");
                }
                let vm = VmArgs {
                    run: args.run,
                    epoch: args.epoch,
                    vm: args.vm,
                };
                let mut result = Ok(());
                let found = self.with_source(&vm, |source| {
                    result = source.throttle(now, args.percent);
                });
                found.and_then(|value| result.map(|()| value).map_err(CommandError::generic))
            }
            Command::Commit(args) => {
                self.learn(args.run, RecordKey::Group, RecordValue::Commit);
                Ok(json!({}))
            }
            Command::Abort(args) => {
                if let Some(entry) = self.runs.get_mut(&args.run) {
                    entry.run.abort();
                }
                Ok(json!({}))
            }
            Command::Finish(args) => {
                if let Some(entry) = self.runs.get_mut(&args.run) {
                    entry.run.finish(args.vms);
                }
                Ok(json!({}))
            }
            Command::SetReportInterval(args) => {
                if !(20..=60_000).contains(&args.interval_ms) {
                    return refuse("`interval_ms` is 20 to 60000");
                }
                if let Some(entry) = self.runs.get_mut(&args.run) {
                    let interval = Duration::from_millis(args.interval_ms);
                    entry.run.set_report_interval(now, interval);
                }
                Ok(json!({}))
            }
            Command::KeepAlive(_) => Ok(json!({})),
            Command::Recover(args) => self.recover(&args),
            Command::DirtyStop(args) => self.dirty_stop(now, &args.vm),
            query => self.query(&query),
        }
    }

    fn learn(&mut self, run: Uuid, key: RecordKey, value: RecordValue) {
        if let Some(entry) = self.runs.get_mut(&run) {
            entry.run.learn(key, value);
        }
    }

    fn with_source(&mut self, args: &VmArgs, act: impl FnOnce(&mut Source)) -> Answer {
        let halves = self
            .runs
            .get_mut(&args.run)
            .map(|entry| &mut entry.run.halves);
        let mut sources = halves.into_iter().flatten().filter_map(VmHalf::source_mut);
        match sources.find(|source| source.half.name == args.vm) {
            Some(source) => {
                act(source);
                Ok(json!({}))
            }
            None => refuse(format!("VM `{}` is no source of this run here", args.vm)),
        }
    }

    fn with_sources(&mut self, run: Uuid, mut act: impl FnMut(&mut Source)) -> Answer {
        let halves = self.runs.get_mut(&run).map(|entry| &mut entry.run.halves);
        halves
            .into_iter()
            .flatten()
            .filter_map(VmHalf::source_mut)
            .for_each(&mut act);
        Ok(json!({}))
    }

    fn prepare(&mut self, now: Now, client: usize, args: &PrepareArgs) -> Answer {
        self.check_prepare(args)?;
        if !self.runs.contains_key(&args.run) {
            let lease = Duration::from_millis(args.lease_ms);
            let mut run = Run::new(now, args.run, args.epoch, args.register.clone(), lease);
            run.max_downtime = Duration::from_millis(args.max_downtime_ms);
            run.hold = args.hold;
            run.set_report_interval(now, Duration::from_millis(args.report_interval_ms));
            let group = self.pacing.add_group(now.mono, None);
            let entry = Entry {
                run,
                io: Vec::new(),
                group,
                owner: None,
                notes: 0,
                scheduled: Vec::new(),
            };
            self.runs.insert(args.run, entry);
        }
        let entry = self.check_epoch(now, client, args.run, args.epoch)?;
        if entry.run.has_ended() {
            return refuse(format!("run {} is over here", args.run));
        }
        let settings = Settings {
            max_downtime: Duration::from_millis(args.max_downtime_ms),
            hold: args.hold,
            throttle: args.throttle,
            multifd_channels: args.multifd_channels,
            termination: args.termination,
            transport: Transport::Relay,
        };
        let mut added = false;
        for vm in &args.vms {
            added |= self.prepare_vm(now, args, vm, settings)?;
        }
        if added {
            self.save_note(args.run);
        }
        Ok(json!({}))
    }

    fn check_prepare(&self, args: &PrepareArgs) -> Result<(), CommandError> {
        if args.vms.is_empty() || args.vms.len() > MAX_VMS {
            return refuse(format!(
                "`vms` has {} entries, expected 1 to {MAX_VMS}",
                args.vms.len()
            ));
        }
        if !(200..=3_600_000).contains(&args.lease_ms) {
            return refuse("`lease_ms` is 200 to 3600000");
        }
        if !(20..=60_000).contains(&args.report_interval_ms) {
            return refuse("`report_interval_ms` is 20 to 60000");
        }
        if !(1..=2_000_000).contains(&args.max_downtime_ms) {
            return refuse("`max_downtime_ms` is 1 to 2000000");
        }
        if !is_register_address(&args.register) {
            return refuse("`register` is unix:/PATH or tcp:IP:PORT");
        }
        let termination = &args.termination;
        let sane = (0.0..1.0).contains(&termination.stall_epsilon)
            && termination.max_memory_factor.is_finite()
            && termination.max_memory_factor >= 1.0
            && termination.stall_rounds > 0
            && termination.max_rounds > 0;
        if !sane {
            return refuse(
                "`termination`: stall_epsilon is 0 to 1, max_memory_factor at least 1, \
                 stall_rounds and max_rounds at least 1",
            );
        }
        for vm in &args.vms {
            if StreamToken::from_hex(&vm.token).is_none() {
                return refuse(format!("VM `{}`: `token` is 64 hexadecimal digits", vm.vm));
            }
            let name = &vm.vm;
            check_name(name)?;
            let halves = self.runs.get(&args.run).map(|entry| &entry.run.halves);
            let other_end = halves.into_iter().flatten().map(VmHalf::half);
            if other_end
                .filter(|half| half.name == *name)
                .any(|half| half.role != args.role)
            {
                return refuse(format!(
                    "VM `{name}` is in run {} here with another role: source and destination are \
                     two hosts",
                    args.run
                ));
            }
            if let Some(run) = self.run_of(name).filter(|run| *run != args.run) {
                return refuse(format!("VM `{name}` is being moved in run {run}"));
            }
            let config = self.config.vm(name);
            let can_receive =
                config.is_some_and(|config| config.adopt || !config.incoming.is_empty());
            if args.role == Role::Destination && !can_receive {
                return refuse(format!(
                    "host {} has no template for VM `{name}`: add a [[vm]] with `incoming` (or \
                     `adopt = true`) to its sidecar's configuration",
                    self.config.host
                ));
            }
        }
        Ok(())
    }

    fn prepare_vm(
        &mut self,
        now: Now,
        args: &PrepareArgs,
        vm: &PrepareVm,
        settings: Settings,
    ) -> Result<bool, CommandError> {
        self.yield_monitor(now, &vm.vm);
        let qmp = self.config.qmp_path(&vm.vm);
        let incoming = self.incoming_path(&vm.vm);
        let adopt = self.config.vm(&vm.vm).is_some_and(|config| config.adopt);
        let stream_address = self.stream_address.clone();
        let Some(entry) = self.runs.get_mut(&args.run) else {
            return Ok(false);
        };
        let known = entry
            .run
            .halves
            .iter_mut()
            .find(|half| half.half().name == vm.vm);
        if let Some(half) = known {
            half.tell_prepared();
            return Ok(false);
        }
        let Some(token) = StreamToken::from_hex(&vm.token) else {
            return refuse("`token` is 64 hexadecimal digits");
        };
        let settings = Settings {
            transport: vm.transport,
            ..settings
        };
        let half = match args.role {
            Role::Source => {
                VmHalf::Source(Box::new(Source::new(now, vm.vm.clone(), vm.uuid, settings)))
            }
            Role::Destination => VmHalf::Destination(Box::new(Destination::new(
                now,
                vm.vm.clone(),
                vm.uuid,
                settings,
                crate::migration::destination::Place {
                    machine: vm.machine.clone(),
                    stream_address,
                    incoming_path: incoming.display().to_string(),
                    spawn: !adopt,
                },
            ))),
        };
        let _ = std::fs::remove_file(&incoming);
        entry.run.halves.push(half);
        entry.io.push(HalfIo::new(qmp, incoming, token));
        let index = entry.io.len() - 1;
        if args.role == Role::Source {
            self.add_leaf(now, (args.run, index));
        }
        Ok(true)
    }

    fn start(&mut self, now: Now, args: &StartArgs) -> Answer {
        let Some(entry) = self.runs.get(&args.run) else {
            return refuse("unknown run");
        };
        let mut peers = Vec::new();
        for (vm, address) in &args.vms {
            let halves = &entry.run.halves;
            let index = halves
                .iter()
                .position(|half| half.half().name == *vm && half.half().role == Role::Source);
            let Some(index) = index else {
                return refuse(format!("VM `{vm}` is no source of this run here"));
            };
            if let VmHalf::Source(source) = &halves[index] {
                if !source.is_prepared() {
                    return refuse(format!("VM `{vm}` is not prepared yet: wait for PREPARED"));
                }
            }
            let Ok(address) = address.parse() else {
                return refuse(format!("`{address}` is no stream address (IP:PORT)"));
            };
            peers.push((index, address));
        }
        for (index, address) in peers {
            self.set_peer((args.run, index), address);
            let entry = self.runs.get_mut(&args.run);
            if let Some(source) = entry.and_then(|entry| entry.run.halves[index].source_mut()) {
                source.start(now);
            }
        }
        Ok(json!({}))
    }

    fn recover(&mut self, args: &RecoverArgs) -> Answer {
        let Some(entry) = self.runs.get_mut(&args.run) else {
            return refuse(format!("run {} is not known here", args.run));
        };
        if entry.run.has_ended() {
            return Ok(json!({}));
        }
        log(&format!(
            "run {}: an operator vouches that host {} is off, and says {:?}",
            args.run, args.fenced, args.value
        ));
        match args.value {
            RecordValue::Commit | RecordValue::Abort => {
                entry.run.vouch(RecordKey::Group, args.value);
            }
            RecordValue::Source | RecordValue::Destination => {
                let vms: Vec<Uuid> = entry.run.halves.iter().map(|h| h.half().uuid).collect();
                for vm in vms
                    .into_iter()
                    .filter(|vm| args.vm.is_none_or(|only| only == *vm))
                {
                    entry.run.vouch(RecordKey::Vm(vm), args.value);
                }
            }
        }
        Ok(json!({}))
    }
}

/// The moment that a unix time in ms means on the monotonic clock, `None` for one that is past. Of
/// those beyond the clock's end it makes one beyond [`MAX_AHEAD`].
fn instant_of(now: Now, at_ms: u64) -> Option<Instant> {
    let now_us = u64::try_from(now.unix_us).ok()?;
    let ahead = at_ms.saturating_mul(1000).checked_sub(now_us)?;
    let ahead = Duration::from_micros(ahead).min(MAX_AHEAD * 2);
    Some(now.mono + ahead)
}
