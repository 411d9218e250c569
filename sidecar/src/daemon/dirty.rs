//! Measurements of VMs: their monitors, their logs, and the clients that began them.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use dirtylog::export::{Reader, memfd};
use mio::Token;
use serde_json::{Value, json};

use super::control::{check_name, refuse};
use super::halves::flush_monitor;
use super::net::{Moved, Socket, read_some};
use super::probes::vm_info;
use super::storage::Asker;
use super::{Daemon, Slot, log};
use crate::dirty::log::{Log, limits};
use crate::dirty::{Measurement, Output};
use crate::migration::Now;
use crate::protocol::codec::{CommandError, dirty_event_line};
use crate::protocol::dirty::{DirtyEnd, DirtyEvent, DirtyStartArgs};

/// Measurements at once.
const MAX_MEASUREMENTS: usize = 32;
/// Measurements end within this time when the sidecar does.
const END_WITHIN: Duration = Duration::from_millis(500);
const END_STEP: Duration = Duration::from_millis(1);

/// A measurement with its surroundings.
#[derive(Debug)]
pub struct Measuring {
    machine: Measurement,
    socket: Socket,
    /// The client that began it, while it is there.
    owner: Option<usize>,
    /// What QEMU is to get.
    descriptor: Option<OwnedFd>,
    /// Who asked for `query-vm` meanwhile.
    askers: Vec<Asker>,
}

impl Measuring {
    /// When something is due.
    pub fn deadline(&self) -> Option<Instant> {
        self.machine.deadline()
    }
}

impl Daemon {
    /// Names of the VMs that are measured.
    pub(super) fn measured_vms(&self) -> Vec<&str> {
        let all = self.measurements.values();
        let measured = all.filter(|m| !m.machine.tidies());
        measured.map(|m| m.machine.wanted.vm.as_str()).collect()
    }

    fn measurement_of(&self, vm: &str) -> Option<usize> {
        let mut all = self.measurements.iter();
        all.find(|(_, measuring)| measuring.machine.wanted.vm == vm)
            .map(|(id, _)| *id)
    }

    pub(super) fn dirty_start(
        &mut self,
        now: Now,
        client: usize,
        args: DirtyStartArgs,
    ) -> Result<Value, CommandError> {
        let vm = &args.vm;
        check_name(vm)?;
        args.check().map_err(CommandError::generic)?;
        if let Some(run) = self.run_of(vm) {
            return refuse(format!(
                "VM `{vm}` is being moved in run {run}: measure it afterwards"
            ));
        }
        let before = self.measurement_of(vm);
        let tidying = before.and_then(|id| self.measurements.get(&id));
        if tidying.is_some_and(|m| m.machine.tidies()) {
            // A measurement does the same when it begins.
            self.drop_measurement(now, before.unwrap_or_default());
        } else if before.is_some() {
            return refuse(format!(
                "VM `{vm}` is being measured already: `query-dirty` shows it, `dirty-stop` ends it"
            ));
        }
        if self.measurements.len() >= MAX_MEASUREMENTS {
            return refuse(format!(
                "{MAX_MEASUREMENTS} VMs are being measured on this host: end another measurement"
            ));
        }
        let path = self.config.qmp_path(vm);
        let machine = Measurement::new(now, args.clone());
        match self.begin_measurement(now, machine, Some(client)) {
            Ok(()) => Ok(json!({})),
            Err(error) => refuse(format!(
                "VM `{vm}` is not on this host: its monitor {} cannot be connected: {error}",
                path.display()
            )),
        }
    }

    fn begin_measurement(
        &mut self,
        now: Now,
        machine: Measurement,
        owner: Option<usize>,
    ) -> io::Result<()> {
        let path = self.config.qmp_path(&machine.wanted.vm);
        let token = self.token(Slot::Measurement);
        let connected = Socket::connect_unix(&path).and_then(|mut socket| {
            socket.register(self.poll.registry(), token)?;
            Ok(socket)
        });
        let socket = match connected {
            Ok(socket) => socket,
            Err(error) => {
                self.slots.remove(&token);
                return Err(error);
            }
        };
        let measuring = Measuring {
            machine,
            socket,
            owner,
            descriptor: None,
            askers: Vec::new(),
        };
        self.measurements.insert(token.0, measuring);
        self.serve_measurement(now, token.0);
        Ok(())
    }

    /// After a restart: removes what measurements of an earlier life have left in the disks of VMs that
    /// run here. Those of a run have other hands in their monitor, and lose it when they move.
    pub(super) fn tidy_disks(&mut self, now: Now) {
        let names = self.config.vm_names();
        for vm in names.iter().filter(|vm| check_name(vm).is_ok()) {
            if self.run_of(vm).is_none() && self.measurements.len() < MAX_MEASUREMENTS {
                // One that does not run has nothing left.
                let _ = self.begin_measurement(now, Measurement::tidy(now, vm), None);
            }
        }
    }

    pub(super) fn dirty_stop(&mut self, now: Now, vm: &str) -> Result<Value, CommandError> {
        check_name(vm)?;
        if let Some(id) = self.measurement_of(vm) {
            self.end_measurement(now, id, DirtyEnd::Stopped, None);
        }
        Ok(json!({}))
    }

    pub(super) fn query_dirty(&self, vm: &str) -> Result<Value, CommandError> {
        check_name(vm)?;
        let id = self.measurement_of(vm);
        let measuring = id.and_then(|id| self.measurements.get(&id));
        match measuring.filter(|measuring| !measuring.machine.tidies()) {
            Some(measuring) => Ok(json!(measuring.machine.report())),
            None => refuse(format!(
                "VM `{vm}` is not being measured here: `dirty-start` begins it"
            )),
        }
    }

    /// Has the measurement that holds a VM's monitor ask who QEMU is; whether there is one.
    pub(super) fn probe_measured(&mut self, now: Now, vm: &str, asker: Asker) -> Option<Asker> {
        let id = self.measurement_of(vm);
        let measuring = id.and_then(|id| self.measurements.get_mut(&id));
        match measuring {
            // One that ends frees the monitor, where a probe of its own waits its turn.
            Some(measuring) if !measuring.machine.is_ending() && !measuring.machine.tidies() => {
                measuring.machine.inquire(now);
                measuring.askers.push(asker);
                self.tend_measurement(now, id.unwrap_or_default());
                None
            }
            _ => Some(asker),
        }
    }

    /// A VM is going to be moved: its monitor is needed.
    pub(super) fn yield_monitor(&mut self, now: Now, vm: &str) {
        if let Some(id) = self.measurement_of(vm) {
            let text = "the VM is going to be moved, which has precedence";
            self.end_measurement(now, id, DirtyEnd::Migration, Some(text.into()));
        }
    }

    /// A client is gone, and with it those whom its measurements were for.
    pub(super) fn end_measurements_of(&mut self, client: usize) {
        let owned = |m: &Measuring| m.owner == Some(client);
        let all = self.measurements.iter();
        let ids: Vec<usize> = all.filter(|(_, m)| owned(m)).map(|(id, _)| *id).collect();
        for id in ids {
            if let Some(measuring) = self.measurements.get_mut(&id) {
                measuring.owner = None;
            }
            self.end_measurement(super::now(), id, DirtyEnd::Stopped, None);
        }
    }

    /// Ends all of them, before the sidecar does.
    pub(super) fn end_all_measurements(&mut self) {
        let by = Instant::now() + END_WITHIN;
        let ids: Vec<usize> = self.measurements.keys().copied().collect();
        for id in &ids {
            let text = Some("the sidecar was stopped".into());
            self.end_measurement(super::now(), *id, DirtyEnd::Failed, text);
        }
        while !self.measurements.is_empty() && Instant::now() < by {
            std::thread::sleep(END_STEP);
            for id in &ids {
                self.serve_measurement(super::now(), *id);
            }
        }
    }

    fn end_measurement(&mut self, now: Now, id: usize, reason: DirtyEnd, error: Option<String>) {
        if let Some(measuring) = self.measurements.get_mut(&id) {
            measuring.machine.end(now, reason, error);
        }
        self.tend_measurement(now, id);
    }

    pub(super) fn serve_measurement(&mut self, now: Now, id: usize) {
        let Some(measuring) = self.measurements.get_mut(&id) else {
            return;
        };
        let mut buffer = [0; 16384];
        loop {
            match read_some(&mut measuring.socket, &mut buffer) {
                Moved::Bytes(n) => measuring.machine.receive(now, &buffer[..n]),
                Moved::Blocked => break,
                Moved::End => {
                    measuring.machine.closed("QEMU closed its monitor");
                    break;
                }
                Moved::Broken(error) => {
                    let text = format!("the monitor broke: {error}");
                    measuring.machine.closed(&text);
                    break;
                }
            }
        }
        self.tend_measurement(now, id);
    }

    /// Does what is due by the clock.
    pub(super) fn tend_measurements(&mut self, now: Now) {
        let is_due = |m: &Measuring| m.deadline().is_some_and(|at| at <= now.mono);
        let all = self.measurements.iter();
        let due: Vec<usize> = all.filter(|(_, m)| is_due(m)).map(|(id, _)| *id).collect();
        for id in due {
            if let Some(measuring) = self.measurements.get_mut(&id) {
                measuring.machine.handle_timeout(now);
            }
            self.tend_measurement(now, id);
        }
    }

    /// What the scanner found.
    pub(super) fn take_looks(&mut self, now: Now) {
        for (id, found) in self.scanner.take_found() {
            // It may have ended meanwhile.
            if let Some(measuring) = self.measurements.get_mut(&id) {
                match found {
                    Ok(look) => measuring.machine.looked(now, look),
                    Err(error) => measuring.machine.fail(now, error),
                }
                self.tend_measurement(now, id);
            }
        }
    }

    /// Carries out what a machine wants, and writes what it has for its monitor.
    fn tend_measurement(&mut self, now: Now, id: usize) {
        while let Some(measuring) = self.measurements.get_mut(&id) {
            let Some(output) = measuring.machine.poll_output() else {
                break;
            };
            match output {
                Output::Event(event) => self.tell_measured(now, id, &event),
                Output::OpenLog { memory_bytes } => self.open_log(now, id, memory_bytes),
                Output::CloseLog => self.scanner.drop_log(id),
                Output::Identified(identity) => {
                    let info = vm_info(&measuring.machine.wanted.vm, &identity);
                    for asker in std::mem::take(&mut measuring.askers) {
                        self.answer(asker, &Ok(json!(info)));
                    }
                }
                Output::Close => self.drop_measurement(now, id),
            }
        }
        if let Some(measuring) = self.measurements.get_mut(&id) {
            let descriptor = measuring.descriptor.as_ref().map(AsFd::as_fd);
            flush_monitor(
                &mut measuring.socket,
                &mut measuring.machine.qmp,
                descriptor,
            );
        }
    }

    fn open_log(&mut self, now: Now, id: usize, memory_bytes: u64) {
        let Some(measuring) = self.measurements.get_mut(&id) else {
            return;
        };
        let wanted = measuring.machine.wanted.clone();
        let interval = Duration::from_millis(wanted.interval_ms);
        let opened = memfd("muster-dirty-log")
            .and_then(|fd| Ok((fd.try_clone()?, fd)))
            .map_err(|error| error.to_string())
            .and_then(|(for_qemu, fd)| {
                let reader = Reader::new(fd, limits(memory_bytes));
                let log = Log::new(reader.map_err(|error| error.to_string())?, wanted);
                self.scanner.read(id, log, interval)?;
                Ok(for_qemu)
            });
        match opened {
            Ok(for_qemu) => {
                measuring.descriptor = Some(for_qemu);
                measuring.machine.log_opened(now);
            }
            Err(error) => {
                let text = format!("the dirty log cannot be made: {error}");
                measuring.machine.fail(now, text);
            }
        }
    }

    fn tell_measured(&mut self, now: Now, id: usize, event: &DirtyEvent) {
        if let DirtyEvent::DirtyEnded {
            vm,
            reason: DirtyEnd::Failed,
            error: Some(error),
        } = event
        {
            log(&format!("measuring VM {vm}: {error}"));
        }
        let owner = self.measurements.get(&id).and_then(|m| m.owner);
        if let Some(owner) = owner {
            self.tell_client(owner, &dirty_event_line(event, now.unix_us));
        }
    }

    fn drop_measurement(&mut self, now: Now, id: usize) {
        let Some(mut measuring) = self.measurements.remove(&id) else {
            return;
        };
        measuring.socket.deregister(self.poll.registry());
        self.slots.remove(&Token(id));
        let vm = measuring.machine.wanted.vm;
        drop(measuring.socket);
        for asker in measuring.askers {
            self.start_probe(now, vm.clone(), asker);
        }
    }
}
