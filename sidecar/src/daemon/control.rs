//! The commands that clients send.

use std::time::{Duration, Instant};

use serde_json::{Value, json};
use uuid::Uuid;

use super::halves::HalfIo;
use super::storage::{Asker, Job};
use super::{Daemon, Entry, log};
use crate::config::is_node_name;
use crate::migration::Now;
use crate::migration::destination::Destination;
use crate::migration::source::{Settings, Source};
use crate::protocol::codec::{CommandError, Request};
use crate::protocol::command::{
    BALLOON_WAIT_MS, Command, DecideArgs, PrepareArgs, PrepareBalloon, PrepareVm, RESERVE_BYTES,
    RecoverArgs, StartArgs, VmArgs,
};
use crate::protocol::types::{RecordKey, RecordValue, Role, Transport};
use crate::relay::hello::Token as StreamToken;
use crate::run::{Run, VmHalf};

/// VMs in one command.
const MAX_VMS: usize = 256;
/// `pace` commands of a run that wait for their time.
const MAX_SCHEDULED: usize = 256;
/// Local disks of a VM.
const MAX_DISKS: usize = 16;
/// How far ahead that time may be.
const MAX_AHEAD: Duration = Duration::from_secs(86_400);

pub(super) type Answer = Result<Value, CommandError>;

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
    /// Obeys a request; the answer, unless it comes later.
    pub(super) fn obey(&mut self, now: Now, client: usize, request: Request) -> Option<Answer> {
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
            Command::QueryTraffic(args) => {
                let time = Duration::from_millis(args.duration_ms);
                let job = args.check().map(|()| Job::CountTraffic(asker, time));
                job.map_err(CommandError::generic)
            }
            command => return Some(self.command(now, client, command)),
        };
        match job.and_then(|job| self.storage.submit(job).map_err(CommandError::generic)) {
            Ok(()) => None,
            Err(error) => Some(Err(error)),
        }
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
            Command::ProbeListen(args) => return self.probe_listen(now, client, &args),
            Command::Probe(args) => return self.probe(now, client, &args),
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
            Command::ThrottleDisks(args) => {
                let vm = VmArgs {
                    run: args.run,
                    epoch: args.epoch,
                    vm: args.vm,
                };
                self.with_source(&vm, |source| source.throttle_disks(now, args.bytes_per_s))
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
            resend: args.resend,
            multifd_channels: args.multifd_channels,
            termination: args.termination,
            transport: Transport::Relay,
        };
        self.yield_path(now);
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
        if !(100..=60_000).contains(&args.disk_stall_ms) {
            return refuse("`disk_stall_ms` is 100 to 60000");
        }
        if !is_register_address(&args.register) {
            return refuse("`register` is unix:/PATH or tcp:IP:PORT");
        }
        let termination = &args.termination;
        let sane = (0.0..1.0).contains(&termination.stall_epsilon)
            && termination
                .max_memory_factor
                .is_none_or(|factor| factor.is_finite() && factor >= 1.0)
            && termination.stall_rounds != Some(0)
            && termination.max_rounds != Some(0);
        if !sane {
            return refuse(
                "`termination`: stall_epsilon is 0 to 1, max_memory_factor at least 1, stall_rounds \
                 and max_rounds at least 1; null switches one of the last three off",
            );
        }
        for vm in &args.vms {
            check_disks(args, vm)?;
            check_balloon(vm)?;
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
        let config = self.config.vm(&vm.vm);
        let adopt = config.is_some_and(|config| config.adopt);
        let images = config.map_or_else(Vec::new, |config| config.disks.clone());
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
                let source = Source::new(now, vm.vm.clone(), vm.uuid, settings);
                let has_hook = !self.config.hooks.before_switchover.is_empty();
                let source = source.with_disks(&vm.disks).with_hook(has_hook);
                let source = source.with_balloon(vm.balloon);
                VmHalf::Source(Box::new(source))
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
                    disks: vm.disks.clone(),
                    images,
                    nbd_path: incoming.with_extension("nbd").display().to_string(),
                },
            ))),
        };
        let _ = std::fs::remove_file(&incoming);
        let _ = std::fs::remove_file(incoming.with_extension("nbd"));
        entry.run.halves.push(half);
        let mut io = HalfIo::new(qmp, incoming, token);
        io.disk_stall = Duration::from_millis(args.disk_stall_ms);
        entry.io.push(io);
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
                source.start(now, args.disks_only);
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

fn check_balloon(vm: &PrepareVm) -> Result<(), CommandError> {
    let good = |balloon: PrepareBalloon| {
        RESERVE_BYTES.contains(&balloon.reserve_bytes) && BALLOON_WAIT_MS.contains(&balloon.wait_ms)
    };
    if vm.balloon.is_some_and(|balloon| !good(balloon)) {
        let name = &vm.vm;
        return refuse(format!(
            "VM `{name}`: `balloon` has a `reserve_bytes` of 1 MiB to 1 TiB and a `wait_ms` of 100 to \
             60000"
        ));
    }
    Ok(())
}

fn check_disks(args: &PrepareArgs, vm: &PrepareVm) -> Result<(), CommandError> {
    let name = &vm.vm;
    if vm.disks.len() > MAX_DISKS {
        return refuse(format!(
            "VM `{name}` has {} disks, at most {MAX_DISKS} can move with it",
            vm.disks.len()
        ));
    }
    for (index, disk) in vm.disks.iter().enumerate() {
        let node = &disk.node;
        if !is_node_name(node) || disk.size_bytes == 0 {
            return refuse(format!(
                "VM `{name}`: a disk is the name of a block node and its size"
            ));
        }
        if vm.disks[..index].iter().any(|other| other.node == *node) {
            return refuse(format!("VM `{name}`: disk `{node}` is there twice"));
        }
    }
    if !vm.disks.is_empty() && !args.hold {
        return refuse(format!(
            "VM `{name}`: local disks move only with VMs that are held"
        ));
    }
    if !vm.disks.is_empty() && vm.transport == Transport::Direct {
        return refuse(format!(
            "VM `{name}`: local disks need transport relay, direct is asked for"
        ));
    }
    Ok(())
}

/// The moment that a unix time in ms means on the monotonic clock, `None` for one that is past. Of
/// those beyond the clock's end it makes one beyond [`MAX_AHEAD`].
fn instant_of(now: Now, at_ms: u64) -> Option<Instant> {
    let now_us = u64::try_from(now.unix_us).ok()?;
    let ahead = at_ms.saturating_mul(1000).checked_sub(now_us)?;
    let ahead = Duration::from_micros(ahead).min(MAX_AHEAD * 2);
    Some(now.mono + ahead)
}
