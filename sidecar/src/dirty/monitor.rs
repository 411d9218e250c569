//! What QEMU says on its monitor, and what follows from it.

use serde_json::{Value, json};

use super::{LATE, LOOK_AGAIN, Measurement, Output, State, Tag};
use crate::migration::Now;
use crate::migration::identity::{Identity, Question};
use crate::protocol::dirty::{DirtyEnd, DirtySource};
use crate::qmp::QmpMessage;

/// `calc-dirty-rate` counts in these.
const MIB: u64 = 1 << 20;
/// In what `calc-dirty-rate` says while another one runs (QEMU migration/dirtyrate.c).
const BUSY: &str = "already being measured";
/// What is missing, and how to get it.
const RATE_ONLY: &str = "this QEMU does not export its dirty log (`make qemu` builds one that does): \
     only the dirty rate can be measured, in steps of 1 MiB/s";

impl Measurement {
    /// Takes bytes from the monitor.
    pub fn receive(&mut self, now: Now, bytes: &[u8]) {
        self.qmp.receive(bytes);
        while self.state != State::Over {
            match self.qmp.poll(now.mono) {
                Ok(None) => return,
                Ok(Some(message)) => self.handle(now, message),
                Err(error) => self.closed(&error.to_string()),
            }
        }
    }

    fn handle(&mut self, now: Now, message: QmpMessage<Tag>) {
        match message {
            QmpMessage::Ready { version, .. } => {
                self.identity = Identity::new(version);
                if self.tidies {
                    self.send(now, Tag::Disks, "query-block", Value::Null);
                    return;
                }
                self.ask(now);
                self.send(now, Tag::Export, "query-dirty-log-export", Value::Null);
            }
            QmpMessage::Event { .. } => {}
            QmpMessage::Reply { tag, result } => match result {
                Ok(value) => self.reply(now, tag, &value),
                Err(error) => self.refused(now, tag, &error),
            },
        }
    }

    fn reply(&mut self, now: Now, tag: Tag, value: &Value) {
        match tag {
            Tag::Ask(question) => {
                if self.identified {
                    self.answer_inquiry(question, value);
                } else if self.identity.answer(question, value) {
                    self.identified = true;
                    if self.inquiry.take().is_some() {
                        self.tell_identity(self.identity.clone());
                    }
                    self.set_out(now);
                }
            }
            Tag::Export => {
                let status = value["status"].as_str().unwrap_or_default();
                self.export = Some(Some(status.to_owned()));
                self.set_out(now);
            }
            Tag::StopStale => self.open_log(),
            Tag::Start if self.state == State::Opening => {
                self.expect_interval(now);
                self.begun(now, DirtySource::Export, None);
            }
            Tag::Stop => self.finish(),
            Tag::Disks => self.track_disks(now, value),
            Tag::Count => self.disks_counted(now, value),
            Tag::Remove => self.disk_left(),
            Tag::Bitmap | Tag::RemoveStale => {}
            Tag::Calculate => self.calculating(now),
            Tag::Calculated => self.look_at_rate(now, value),
            Tag::Pass | Tag::Start => {}
        }
    }

    fn refused(&mut self, now: Now, tag: Tag, error: &str) {
        match tag {
            // A QEMU without the export does not know the command.
            Tag::Export => {
                self.export = Some(None);
                self.set_out(now);
            }
            // It has ended meanwhile.
            Tag::StopStale => self.open_log(),
            // It was never started, or has ended by itself.
            Tag::Stop => self.finish(),
            // A measurement before this one has left its last calculation behind.
            Tag::Calculate if error.contains(BUSY) && self.source.is_none() => {
                self.busy = true;
                self.state = State::Calculating {
                    bitmap: self.counts_bitmap(),
                    look: Some(now.mono + LOOK_AGAIN),
                    by: now.mono + LATE,
                };
            }
            Tag::Calculate if self.counts_bitmap() && self.source.is_none() => {
                self.calculate(now, false);
            }
            Tag::Start => {
                self.exported = false;
                self.fail(
                    now,
                    format!("QEMU refuses to export its dirty log: {error}"),
                );
            }
            // The start is refused as well, and says so.
            Tag::Pass => {}
            Tag::Count => self.disks_counted(now, &Value::Null),
            Tag::Remove => self.disk_left(),
            // Not measured; there was none; or a disk was removed meanwhile.
            Tag::Disks if self.tidies => self.end(now, DirtyEnd::Stopped, None),
            Tag::Disks | Tag::Bitmap | Tag::RemoveStale => {}
            Tag::Ask(_) | Tag::Calculate | Tag::Calculated => {
                self.fail(now, format!("QEMU says: {error}"));
            }
        }
    }

    fn counts_bitmap(&self) -> bool {
        matches!(self.state, State::Calculating { bitmap: true, .. })
    }

    fn answer_inquiry(&mut self, question: Question, value: &Value) {
        let Some(mut inquiry) = self.inquiry.take() else {
            return;
        };
        if inquiry.answer(question, value) {
            self.tell_identity(inquiry);
        } else {
            self.inquiry = Some(inquiry);
        }
    }

    fn tell_identity(&mut self, identity: Identity) {
        let identity = Box::new(identity);
        self.outputs.push_back(Output::Identified(identity));
    }

    /// Begins, when everything is known that must be.
    fn set_out(&mut self, now: Now) {
        if self.state != State::Starting || !self.identified {
            return;
        }
        let Some(export) = &self.export else {
            return;
        };
        if self.identity.is_migrating() || self.identity.status == "inmigrate" {
            let status = &self.identity.migration;
            let text =
                format!("QEMU is migrating the VM (status `{status}`): measure it afterwards");
            self.end(now, DirtyEnd::Migration, Some(text));
            return;
        }
        match export.as_deref() {
            None => {
                let bitmap = self.identity.kvm;
                self.calculate(now, bitmap);
            }
            Some("inactive" | "failed") => self.open_log(),
            // Of a sidecar that was killed: there is no other reader on Muster's monitor.
            Some(_) => {
                self.state = State::Opening;
                self.send(now, Tag::StopStale, "dirty-log-export-stop", Value::Null);
            }
        }
    }

    fn open_log(&mut self) {
        if matches!(self.state, State::Starting | State::Opening) {
            self.state = State::Opening;
            let memory_bytes = self.identity.memory_bytes;
            self.outputs.push_back(Output::OpenLog { memory_bytes });
        }
    }

    /// Has QEMU count: pages of its dirty bitmap where KVM keeps one, or else samples of pages.
    fn calculate(&mut self, now: Now, bitmap: bool) {
        let in_ms = self.identity.is_at_least(8, 2);
        if !in_ms {
            self.wanted.interval_ms = self.wanted.interval_ms.next_multiple_of(1000);
        }
        let interval_ms = self.wanted.interval_ms;
        let mode = if bitmap {
            "dirty-bitmap"
        } else {
            "page-sampling"
        };
        let arguments = if in_ms {
            json!({ "calc-time": interval_ms, "calc-time-unit": "millisecond", "mode": mode })
        } else {
            json!({ "calc-time": interval_ms / 1000, "mode": mode })
        };
        self.state = State::Calculating {
            bitmap,
            look: None,
            by: now.mono + self.interval() * 2 + LATE,
        };
        self.send(now, Tag::Calculate, "calc-dirty-rate", arguments);
    }

    fn calculating(&mut self, now: Now) {
        let State::Calculating { bitmap, by, .. } = self.state else {
            return;
        };
        self.state = State::Calculating {
            bitmap,
            look: Some(now.mono + self.interval()),
            by,
        };
        if self.source.is_none() {
            let how = if bitmap {
                "counted in KVM's dirty bitmap"
            } else {
                "estimated from samples of pages"
            };
            let note = format!("{RATE_ONLY}; {how}");
            self.begun(now, DirtySource::CalcDirtyRate, Some(note));
        }
    }

    pub(super) fn query(&mut self, now: Now) {
        self.send(now, Tag::Calculated, "query-dirty-rate", Value::Null);
    }

    fn look_at_rate(&mut self, now: Now, value: &Value) {
        let State::Calculating { bitmap, by, .. } = self.state else {
            return;
        };
        let rate = value["dirty-rate"].as_u64();
        match (value["status"].as_str(), rate) {
            (Some("measured"), _) if self.busy => {
                self.busy = false;
                self.calculate(now, bitmap);
            }
            (Some("measured"), Some(rate)) => {
                self.calculated(now, rate.saturating_mul(MIB));
                self.calculate(now, bitmap);
            }
            (Some("measuring"), _) => {
                self.state = State::Calculating {
                    bitmap,
                    look: Some(now.mono + LOOK_AGAIN),
                    by,
                };
            }
            _ => self.fail(now, "QEMU does not tell its dirty rate".to_owned()),
        }
    }
}
