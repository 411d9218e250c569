//! `query-vm`: a short visit to the monitor of a VM that is in no run.

use std::io;
use std::time::{Duration, Instant};

use mio::Token;
use serde_json::{Value, json};

use super::net::{Moved, Socket, read_some, write_some};
use super::storage::Asker;
use super::{Daemon, Slot};
use crate::migration::Now;
use crate::migration::identity::{Identity, Question};
use crate::protocol::codec::CommandError;
use crate::protocol::types::{QemuBuild, VmInfo};
use crate::qmp::{QmpClient, QmpMessage};

/// A `query-vm` under way: a short visit to a monitor.
#[derive(Debug)]
pub struct Probe {
    /// It must be over by then.
    pub by: Instant,
    vm: String,
    asker: Option<Asker>,
    socket: Socket,
    client: QmpClient<Question>,
    identity: Identity,
}

const PROBE_DEADLINE: Duration = Duration::from_millis(2500);

impl Daemon {
    pub(super) fn start_probe(&mut self, now: Now, vm: String, asker: Asker) {
        let path = self.config.qmp_path(&vm);
        let token = self.token(Slot::Probe);
        let connected = Socket::connect_unix(&path).and_then(|mut socket| {
            socket.register(self.poll.registry(), token)?;
            Ok(socket)
        });
        match connected {
            Ok(socket) => {
                let probe = Probe {
                    by: now.mono + PROBE_DEADLINE,
                    vm,
                    asker: Some(asker),
                    socket,
                    client: QmpClient::new(now.mono),
                    identity: Identity::default(),
                };
                self.probes.insert(token.0, probe);
                self.serve_probe(now, token.0);
            }
            Err(error) => {
                self.slots.remove(&token);
                let text = format!(
                    "VM `{vm}` is not on this host: its monitor {} cannot be connected: {error}",
                    path.display()
                );
                self.answer(asker, &Err(CommandError::generic(text)));
            }
        }
    }

    pub(super) fn serve_probe(&mut self, now: Now, id: usize) {
        let Some(probe) = self.probes.get_mut(&id) else {
            return;
        };
        let Some(result) = probe.step(now) else {
            return;
        };
        let asker = probe.asker.take();
        self.drop_probe(id);
        if let Some(asker) = asker {
            self.answer(asker, &result.map_err(CommandError::generic));
        }
    }

    fn drop_probe(&mut self, id: usize) {
        if let Some(mut probe) = self.probes.remove(&id) {
            probe.socket.deregister(self.poll.registry());
            self.slots.remove(&Token(id));
        }
    }

    pub(super) fn drop_overdue_probes(&mut self, now: Now) {
        let late: Vec<usize> = self
            .probes
            .iter()
            .filter(|(_, p)| p.by <= now.mono)
            .map(|(id, _)| *id)
            .collect();
        for id in late {
            let Some(probe) = self.probes.get_mut(&id) else {
                continue;
            };
            let text = probe.client.overdue(now.mono).map_or_else(
                || "QEMU does not answer on its monitor".to_owned(),
                |error| error.to_string(),
            );
            let text = format!("VM `{}`: {text}", probe.vm);
            let asker = probe.asker.take();
            self.drop_probe(id);
            if let Some(asker) = asker {
                self.answer(asker, &Err(CommandError::generic(text)));
            }
        }
    }
}

/// What `query-vm` says of a QEMU.
pub(super) fn vm_info(vm: &str, identity: &Identity) -> VmInfo {
    VmInfo {
        vm: vm.to_owned(),
        uuid: identity.uuid,
        status: identity.status.clone(),
        memory_bytes: identity.memory_bytes,
        machine: identity.machine.clone(),
        qemu_version: identity.version.clone(),
        kvm: identity.kvm,
        can_hold: identity.has_capability("switchover-ack")
            || identity.build() == QemuBuild::Patched,
        qemu_build: identity.build(),
        disks: identity.disks.clone(),
        has_balloon: Some(identity.balloon.is_some()),
    }
}

impl Probe {
    /// Moves bytes; the answer when there is one.
    fn step(&mut self, now: Now) -> Option<Result<Value, String>> {
        let mut buffer = [0; 16384];
        let mut closed = None;
        loop {
            match read_some(&mut self.socket, &mut buffer) {
                Moved::Bytes(n) => self.client.receive(&buffer[..n]),
                Moved::Blocked => break,
                Moved::End => {
                    closed = Some(io::Error::from(io::ErrorKind::UnexpectedEof));
                    break;
                }
                Moved::Broken(error) => {
                    closed = Some(error);
                    break;
                }
            }
        }
        loop {
            match self.client.poll(now.mono) {
                Ok(Some(QmpMessage::Ready { version, .. })) => {
                    self.identity = Identity::new(version);
                    for question in Question::ALL {
                        let (command, arguments) = question.command();
                        self.client
                            .send(now.mono, question, command, arguments, PROBE_DEADLINE);
                    }
                }
                Ok(Some(QmpMessage::Reply {
                    tag,
                    result: Ok(value),
                })) => {
                    if self.identity.answer(tag, &value) {
                        return Some(Ok(json!(vm_info(&self.vm, &self.identity))));
                    }
                }
                Ok(Some(QmpMessage::Reply {
                    result: Err(error), ..
                })) => {
                    return Some(Err(format!("VM `{}`: QEMU says: {error}", self.vm)));
                }
                Ok(Some(QmpMessage::Event { .. })) => {}
                Ok(None) => break,
                Err(error) => return Some(Err(format!("VM `{}`: {error}", self.vm))),
            }
        }
        while !self.client.output().is_empty() {
            match write_some(&mut self.socket, self.client.output()) {
                Moved::Bytes(n) => self.client.written(n),
                _ => break,
            }
        }
        closed.map(|error| Err(format!("VM `{}`: its monitor closed: {error}", self.vm)))
    }
}
