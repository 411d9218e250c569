//! Who the QEMU is, what it can do, and what the run needs of it.

use serde_json::{Value, json};

use super::{AfterNote, FULL_SPEED, Source, Tag};
use crate::commit::SourceHalf;
use crate::migration::identity::{CapabilityPlan, HoldBy, Identity, Question};
use crate::migration::{Now, Output};
use crate::protocol::event::Event;
use crate::protocol::types::{Phase, QemuBuild, Role, Transport};

impl Source {
    pub(super) fn ready(&mut self, now: Now, version: String) {
        self.identity = Identity::new(version);
        for question in Question::ALL {
            let (command, arguments) = question.command();
            self.send(now, Tag::Ask(question), command, arguments);
        }
    }

    /// Says PREPARED, again if `prepare` is repeated.
    pub fn tell_prepared(&mut self) {
        let event = Event::Prepared {
            vm: self.half.name.clone(),
            role: Role::Source,
            stream: None,
            memory_bytes: self.half.total_bytes,
            qemu_version: self.identity.version.clone(),
            qemu_build: self.identity.build(),
        };
        self.half.tell(event);
    }

    pub(super) fn parameters(&self) -> Value {
        let mut parameters = json!({
            "max-bandwidth": FULL_SPEED,
            "downtime-limit": crate::hold::millis(self.settings.max_downtime),
        });
        if self.settings.multifd_channels > 0 {
            parameters["multifd-channels"] = json!(self.settings.multifd_channels);
        }
        if self.hold == HoldBy::Qemu {
            self.add_hold_parameters(&mut parameters);
        }
        if self.settings.throttle {
            parameters["cpu-throttle-initial"] = json!(1);
            parameters["max-cpu-throttle"] = json!(1);
            parameters["cpu-throttle-increment"] = json!(99);
            parameters["throttle-trigger-threshold"] = json!(100);
        }
        parameters
    }

    /// A patched QEMU does not throttle while it holds: where that may be wanted the relay holds.
    fn choose_hold(&self) -> HoldBy {
        match self.identity.build() {
            _ if !self.settings.hold => HoldBy::Nobody,
            QemuBuild::Patched if !self.settings.throttle => HoldBy::Qemu,
            _ => HoldBy::Relay,
        }
    }

    pub(super) fn identified(&mut self, now: Now) {
        self.half.total_bytes = self.identity.memory_bytes;
        if self.adopting {
            self.adopted(now);
            return;
        }
        if self.half.phase() != Phase::Preparing {
            return;
        }
        self.hold = self.choose_hold();
        let plan = CapabilityPlan {
            hold: self.hold,
            pause: self.settings.hold,
            throttle: self.settings.throttle,
            multifd: self.settings.multifd_channels > 0,
        };
        let identity = &self.identity;
        let is_direct = self.settings.transport == Transport::Direct;
        let problem = if identity.uuid != self.half.uuid {
            Some(format!(
                "the VM behind this monitor has UUID {}, expected {}: check `uuid` in the \
                 application file and the monitor's path",
                identity.uuid, self.half.uuid
            ))
        } else if !matches!(
            identity.status.as_str(),
            "running" | "paused" | "postmigrate"
        ) {
            Some(format!(
                "the VM is `{}`; only a running or paused VM can be moved",
                identity.status
            ))
        } else if identity.is_migrating() {
            Some(format!(
                "a migration is already going on (`{}`): wait for it or cancel it",
                identity.migration
            ))
        } else if self.mirrors.are_write_blocking() && identity.build() != QemuBuild::Patched {
            Some(format!(
                "QEMU {} here is {}, and may crash when a write-blocking copy of a disk is given up: \
                 use copy mode background",
                identity.version,
                identity.build()
            ))
        } else if is_direct && self.hold == HoldBy::Relay {
            Some(format!(
                "transport direct needs a QEMU that holds by itself, and no throttling; QEMU {} \
                 here is {}: use transport relay",
                identity.version,
                identity.build()
            ))
        } else if is_direct && self.settings.multifd_channels > 0 {
            Some("transport direct has one connection: use transport relay with multifd".into())
        } else {
            let mismatch = self.mirrors.mismatch(&identity.disks);
            plan.missing(identity).or(mismatch)
        };
        if let Some(problem) = problem {
            self.fail(problem, false);
            self.state = SourceHalf::RunsAgain {
                was_released: false,
            };
            self.settled = true;
            return;
        }
        self.was_running = identity.status == "running";
        if let Some(device) = &identity.balloon {
            self.balloon.found_device(device);
        }
        let capabilities = plan.arguments(identity);
        let back = (
            identity.original_capabilities(&capabilities),
            identity.original_parameters(&self.parameters()),
        );
        self.originals = Some(back);
        // What was found is on disk before anything is changed.
        self.capabilities = capabilities;
        self.after_note = Some(AfterNote::Configure);
        self.half.put(Output::SaveNote);
        self.drive_balloon(now);
    }

    /// After a restart of the sidecar: what did the VM become meanwhile?
    pub(super) fn adopted(&mut self, now: Now) {
        let running = self.identity.status == "running";
        match self.identity.migration.as_str() {
            "completed" if !running => self.completed(now),
            "none" | "failed" | "cancelled" | "completed" if running || !self.was_running => {
                self.runs_again(now);
            }
            "none" | "failed" | "cancelled" => {
                self.send(now, Tag::Resume, "cont", Value::Null);
            }
            // Its stream died with the earlier life. One that completes all the same says so.
            _ => self.send(now, Tag::Cancel, "migrate_cancel", Value::Null),
        }
    }
}
