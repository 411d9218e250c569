//! An incoming QEMU before its stream: who it is, what is set in it, and where disks and memory come.

use std::path::PathBuf;

use serde_json::{Value, json};

use super::{ANSWER, Destination, HEALTH, STREAM_FD, Tag};
use crate::commit::DestinationHalf;
use crate::config::DiskConfig;
use crate::migration::identity::{CapabilityPlan, HoldBy};
use crate::migration::{Now, Output};
use crate::protocol::command::PrepareDisk;
use crate::protocol::event::Event;
use crate::protocol::types::{Phase, Role};

impl Destination {
    /// Capabilities and parameters are set, and disks may come.
    pub(super) fn configured(&mut self, now: Now) {
        if !self.exports.is_empty() {
            self.half.put(Output::WriteBack);
        }
        if self.is_direct() {
            self.prepared(now);
        } else {
            self.take_stream(now, &format!("unix:{}", self.place.incoming_path));
        }
    }

    pub(super) fn drive_disks(&mut self, now: Now) {
        for ask in self.exports.take_commands() {
            self.send(now, Tag::Disk(ask.tag), ask.command, ask.arguments);
        }
        if let Some(problem) = self.exports.take_problem() {
            self.fail(problem, false);
        }
    }

    /// The disks that come with it.
    #[must_use]
    pub fn disks(&self) -> &[PrepareDisk] {
        &self.place.disks
    }

    /// The images that they come to, as far as they are known.
    #[must_use]
    pub fn images(&self) -> Vec<PathBuf> {
        let known = self.place.images.iter();
        let comes = |image: &&DiskConfig| self.place.disks.iter().any(|d| d.node == image.node);
        known
            .filter(comes)
            .map(|image| image.image.clone())
            .collect()
    }

    /// The source has closed the connection of a disk, having sent everything.
    pub fn disk_finished(&mut self, now: Now) {
        self.exports.connection_finished();
        self.drive_disks(now);
    }

    pub(super) fn prepared(&mut self, now: Now) {
        self.half.enter(now, Phase::Prepared);
        self.next_ask = Some((now.mono + HEALTH, Tag::Health));
        self.tell_prepared();
    }

    pub(super) fn take_stream(&mut self, now: Now, uri: &str) {
        let mut arguments = json!({ "uri": uri });
        if self.identity.is_at_least(9, 1) {
            arguments["exit-on-error"] = json!(false);
        }
        self.send(now, Tag::Listen, "migrate-incoming", arguments);
    }

    /// The source's sidecar has connected, and the daemon has the socket for QEMU. False if this
    /// is not the time for it.
    pub fn stream_connected(&mut self, now: Now) -> bool {
        let is_time = self.is_direct() && self.half.phase() == Phase::Prepared && !self.wants_out;
        let Some(qmp) = self.qmp.as_mut().filter(|_| is_time) else {
            return false;
        };
        let name = json!({ "fdname": STREAM_FD });
        qmp.send_with_descriptor(now.mono, Tag::Handover, "getfd", name, ANSWER);
        self.take_stream(now, &format!("fd:{STREAM_FD}"));
        true
    }

    /// Says PREPARED, again if `prepare` is repeated.
    pub fn tell_prepared(&mut self) {
        let event = Event::Prepared {
            vm: self.half.name.clone(),
            role: Role::Destination,
            stream: Some(self.place.stream_address.clone()),
            memory_bytes: self.half.total_bytes,
            qemu_version: self.identity.version.clone(),
            qemu_build: self.identity.build(),
        };
        self.half.tell(event);
    }

    pub(super) fn parameters(&self) -> Value {
        match self.settings.multifd_channels {
            0 => json!({}),
            n => json!({ "multifd-channels": n }),
        }
    }

    pub(super) fn identified(&mut self, now: Now) {
        if self.adopting {
            self.send(now, Tag::Adopt, "query-migrate", Value::Null);
            return;
        }
        if self.half.phase() != Phase::Preparing {
            return;
        }
        self.half.total_bytes = self.identity.memory_bytes;
        let relay_holds = self.settings.hold && !self.is_direct();
        let plan = CapabilityPlan {
            hold: if relay_holds {
                HoldBy::Relay
            } else {
                HoldBy::Nobody
            },
            pause: false,
            throttle: false,
            multifd: self.settings.multifd_channels > 0,
        };
        let identity = &self.identity;
        let machine = self
            .place
            .machine
            .as_deref()
            .filter(|machine| *machine != identity.machine);
        let problem = if identity.uuid != self.half.uuid {
            Some(format!(
                "the incoming QEMU has UUID {}, expected {}: set `-uuid` in its template",
                identity.uuid, self.half.uuid
            ))
        } else if identity.status != "inmigrate" {
            Some(format!(
                "the QEMU at this monitor is `{}`, not waiting for a migration: start it with \
                 `-incoming defer -S`",
                identity.status
            ))
        } else if let Some(machine) = machine {
            Some(format!(
                "the incoming QEMU's machine type is `{}`, the source's `{machine}`: set \
                 `-machine` in its template",
                identity.machine
            ))
        } else {
            let mismatch = self.exports.mismatch(&identity.disks);
            plan.missing(identity).or(mismatch)
        };
        if let Some(problem) = problem {
            self.fail(problem, false);
            return;
        }
        let capabilities = plan.arguments(identity);
        let back = (
            identity.original_capabilities(&capabilities),
            identity.original_parameters(&self.parameters()),
        );
        self.originals = Some(back);
        self.half.put(Output::SaveNote);
        self.send(
            now,
            Tag::SetCapabilities,
            "migrate-set-capabilities",
            capabilities,
        );
    }

    pub(super) fn adopted(&mut self, now: Now, value: &Value) {
        let completed = value["status"].as_str() == Some("completed");
        match (completed, self.identity.status.as_str()) {
            (true, "running") => self.runs(now),
            (true, _) => self.send(now, Tag::Loaded, "query-status", Value::Null),
            (false, _) => {
                self.state = DestinationHalf::Broken;
                self.half.enter(now, Phase::RollingBack);
            }
        }
    }
}
