//! What QEMU says on its monitor, and what follows from it.

use std::time::Duration;

use serde_json::{Value, json};

use super::{ANSWER, ARM_SYNCS, ARM_TIME, LOOK_AGAIN, POLL, QUICK_POLL, Source, Tag, own_hold};
use crate::commit::SourceHalf;
use crate::hold::Sample;
use crate::migration::identity::HoldBy;
use crate::migration::{HEALTH, Now, Output, STREAM_FD};
use crate::protocol::event::Event;
use crate::protocol::types::{HoldReason, Phase, Role, Transport};
use crate::qmp::QmpMessage;

impl Source {
    /// Takes what QEMU said.
    pub fn handle(&mut self, now: Now, message: QmpMessage<Tag>) {
        if std::mem::take(&mut self.hung) {
            self.half.put(Output::CutStream);
        }
        match message {
            QmpMessage::Ready { version, .. } => self.ready(now, version),
            QmpMessage::Event { name, data, at_us } => self.event(now, &name, &data, at_us),
            QmpMessage::Reply {
                tag,
                result: Ok(value),
            } => self.reply(now, tag, &value),
            QmpMessage::Reply {
                tag,
                result: Err(error),
            } => self.refused(now, tag, &error),
        }
    }

    pub(super) fn reply(&mut self, now: Now, tag: Tag, value: &Value) {
        match tag {
            Tag::Ask(question) => {
                let complete = self.identity.answer(question, value);
                if complete {
                    self.identified(now);
                }
            }
            // Put back already, if it is no longer preparing.
            Tag::SetCapabilities if self.half.phase() == Phase::Preparing => {
                let parameters = self.parameters();
                self.send(
                    now,
                    Tag::SetParameters,
                    "migrate-set-parameters",
                    parameters,
                );
            }
            Tag::SetParameters if self.half.phase() == Phase::Preparing => {
                self.half.enter(now, Phase::Prepared);
                self.next_poll = Some(now.mono + HEALTH);
                self.tell_prepared();
            }
            Tag::Poll => self.polled(now, value),
            Tag::Paused => self.paused(now, value),
            Tag::Arm if self.half.phase() == Phase::Held => {
                self.half.enter(now, Phase::Armed);
                self.mirrors.watch_closely(now.mono, true);
                self.armed_at = Some((now.mono, None));
                self.next_armed = Some(now.mono);
                let pause = if self.hold == HoldBy::Qemu {
                    Duration::ZERO
                } else {
                    QUICK_POLL
                };
                self.next_poll = Some(now.mono + pause);
            }
            Tag::Back => {
                self.remaining_at_release = None;
                self.half.stopped_at_us = None;
                self.half.resumed_at_us = None;
                self.next_poll = Some(now.mono);
            }
            Tag::Cancel => self.send(now, Tag::Cancelled, "query-migrate", Value::Null),
            Tag::Cancelled => {
                let status = value["status"].as_str().unwrap_or("none");
                // `completed`: it came too late, and the register says on which side the VM ends.
                if matches!(status, "none" | "failed" | "cancelled" | "completed") {
                    self.identity.migration = status.to_owned();
                    self.send(now, Tag::Ended, "query-status", Value::Null);
                }
            }
            Tag::Ended => self.ended(now, value["status"].as_str().unwrap_or_default()),
            Tag::Resume => {
                self.continuing = None;
                self.send(now, Tag::Ended, "query-status", Value::Null);
            }
            Tag::RestoreCapabilities | Tag::RestoreParameters => self.restored(),
            Tag::Disk(tag) => {
                self.mirrors.replied(now.mono, tag, value);
                self.after_disk(now, tag);
            }
            Tag::Balloon(tag) => {
                self.balloon.replied(now, tag, value);
                self.drive_balloon(now);
            }
            Tag::Throttle(percent) => {
                self.throttle_percent = percent;
                let vm = self.half.name.clone();
                self.half.tell(Event::Throttled { vm, percent });
            }
            _ => {}
        }
    }

    pub(super) fn refused(&mut self, now: Now, tag: Tag, error: &str) {
        match tag {
            Tag::Disk(tag) => {
                self.mirrors.refused(now.mono, tag, error);
                self.after_disk(now, tag);
            }
            Tag::Balloon(tag) => {
                self.balloon.refused(now, tag, error);
                self.drive_balloon(now);
            }
            Tag::Tune
            | Tag::Yank
            | Tag::Quit
            | Tag::Health
            | Tag::Poll
            | Tag::TakeBack
            | Tag::Disarm => {}
            Tag::Start if self.half.transport == Transport::Direct => {
                let name = json!({ "fdname": STREAM_FD });
                self.send(now, Tag::TakeBack, "closefd", name);
                self.fail(format!("QEMU refused to migrate: {error}"), false);
            }
            Tag::Cancel => self.send(now, Tag::Ended, "query-status", Value::Null),
            Tag::RestoreCapabilities | Tag::RestoreParameters => {
                self.half.fault(
                    format!("could not restore migration settings: {error}"),
                    false,
                );
                self.restored();
            }
            Tag::Throttle(_) => self.half.fault(format!("throttle refused: {error}"), false),
            Tag::Resume => self.continue_refused(now, error),
            Tag::Ask(_) | Tag::SetCapabilities | Tag::SetParameters => {
                self.fail(
                    format!("QEMU refused the set-up of the migration: {error}"),
                    false,
                );
                if self.half.phase() == Phase::Preparing {
                    self.runs_again(now);
                }
            }
            _ => self.fail(format!("QEMU refused ({tag:?}): {error}"), false),
        }
    }

    pub(super) fn event(&mut self, now: Now, name: &str, data: &Value, at_us: i64) {
        if self.mirrors.event(name, data) {
            self.drive_disks(now);
            return;
        }
        match name {
            "STOP" => self.half.stopped_at_us = Some(at_us),
            "RESUME" if self.half.stopped_at_us.is_some() => {
                self.half.resumed_at_us = Some(at_us);
            }
            "MIGRATION_ROUND" if self.hold == HoldBy::Qemu => self.round_ended(data),
            "MIGRATION_SWITCHOVER_HELD" if self.hold == HoldBy::Qemu => self.qemu_holds(now, data),
            "MIGRATION_SWITCHOVER_STOPPED" if self.hold == HoldBy::Qemu => {
                self.pause_seen(now, data["remaining"].as_u64().unwrap_or(0));
            }
            "MIGRATION_PASS" if self.half.phase() == Phase::Precopy => {
                self.next_poll = self.next_poll.map(|_| now.mono);
            }
            "MIGRATION" => self.migration_event(now, data["status"].as_str().unwrap_or_default()),
            _ => {}
        }
    }

    pub(super) fn migration_event(&mut self, now: Now, status: &str) {
        match status {
            "pre-switchover" if !self.was_running && self.half.phase() == Phase::Precopy => {
                // It is held as soon as QEMU has said what is left: the last poll may be old.
                self.waits_paused = true;
                self.next_poll = None;
                self.send(now, Tag::Paused, "query-migrate", Value::Null);
            }
            "pre-switchover" => {
                self.release_by = None;
                self.next_poll = None;
                if self.hold == HoldBy::Qemu {
                    // What remains comes with an event of its own.
                    return;
                }
                self.send(now, Tag::Paused, "query-migrate", Value::Null);
            }
            "device" if self.half.phase() == Phase::Precopy && !self.settings.hold => {
                let remaining = self.last.map_or(0, |s| s.remaining_bytes);
                self.stopped(now, remaining);
                self.enter_switching(now);
            }
            "completed" | "failed" | "cancelled" => {
                self.switch_by = self.switch_by.map(|by| by.max(now.mono + ANSWER));
                self.send(now, Tag::Ended, "query-status", Value::Null);
                self.identity.migration = status.to_owned();
                if status == "failed" && !self.cancelling {
                    self.wants_out = true;
                    let text = "the migration failed (stream cut, or the destination died)";
                    self.half.secondary_fault(text);
                }
            }
            _ => {}
        }
    }

    /// The migration is over and QEMU says in which run state the VM is now.
    pub(super) fn ended(&mut self, now: Now, run_state: &str) {
        let completed = self.identity.migration == "completed";
        match run_state {
            "postmigrate" if completed && !self.resuming => self.completed(now),
            "running" => self.runs_again(now),
            // QEMU says `completed` a moment before it enters `postmigrate`.
            "finish-migrate" if completed && !self.resuming => {
                self.look_at_end = Some(now.mono + LOOK_AGAIN);
            }
            _ if self.resuming || completed => {}
            "paused" if !self.was_running => self.runs_again(now),
            // Failed or cancelled, hence never complete, and left paused: it may go on.
            "paused" | "postmigrate" | "finish-migrate" => {
                self.send(now, Tag::Resume, "cont", Value::Null);
            }
            _ => {}
        }
    }

    pub(super) fn completed(&mut self, now: Now) {
        if matches!(self.state, SourceHalf::Completed | SourceHalf::Quit) {
            return;
        }
        self.state = SourceHalf::Completed;
        self.switch_by = None;
        self.next_poll = None;
        if self.adopting || self.cancelling {
            return;
        }
        self.half.enter(now, Phase::Arrived);
        let vm = self.half.name.clone();
        self.half.tell(Event::Arrived {
            vm,
            role: Role::Source,
        });
    }

    pub(super) fn polled(&mut self, now: Now, value: &Value) {
        let Some(sample) = read_sample(value) else {
            return;
        };
        let sample = own_hold::refine(sample, value);
        self.last = Some(sample);
        self.half.total_bytes = self.half.total_bytes.max(sample.total_bytes);
        match self.half.phase() {
            Phase::Precopy => {
                let Some(rounds) = &mut self.rounds else {
                    return;
                };
                if self.hold == HoldBy::Qemu {
                    if rounds.is_overdue(now.mono, sample) {
                        self.ask_hold(now);
                    }
                    return;
                }
                let (round, reason) = rounds.observe(now.mono, sample, self.rate_bytes_per_s);
                if let Some(round) = round {
                    let vm = self.half.name.clone();
                    self.half.tell(Event::Round { vm, round });
                }
                if let (Some(reason), true) = (reason, self.settings.hold) {
                    self.enter_hold(now, reason);
                }
            }
            Phase::Held => {
                let set = self.pacer.as_mut().and_then(|pacer| {
                    pacer.observe(sample.remaining_bytes, sample.dirty_rate_bytes_per_s)
                });
                if let Some(limit) = set {
                    self.tune(now, json!({ "max-bandwidth": limit }));
                }
            }
            Phase::Armed
                if self.next_armed.is_some_and(|at| at <= now.mono)
                    && self.is_fresh(now, sample.syncs) =>
            {
                self.next_armed = Some(now.mono + POLL);
                let event = Event::Armed {
                    vm: self.half.name.clone(),
                    remaining_bytes: self.left_bytes(sample.remaining_bytes),
                    dirty_rate_bytes_per_s: sample.dirty_rate_bytes_per_s,
                };
                self.half.tell(event);
            }
            _ => {}
        }
    }

    /// Armed: whether what QEMU shows is from after the arming.
    fn is_fresh(&mut self, now: Now, syncs: u64) -> bool {
        let Some((since, base)) = &mut self.armed_at else {
            return false;
        };
        let base = *base.get_or_insert(syncs);
        let wanted = if self.hold == HoldBy::Qemu {
            1
        } else {
            ARM_SYNCS
        };
        syncs >= base + wanted || now.mono >= *since + ARM_TIME
    }

    pub(super) fn paused(&mut self, now: Now, value: &Value) {
        self.last = read_sample(value).or(self.last);
        match self.half.phase() {
            Phase::Precopy if self.waits_paused => self.enter_hold(now, HoldReason::Converged),
            Phase::Held if self.waits_paused => {}
            _ => self.pause_seen(now, self.last.map_or(0, |s| s.remaining_bytes)),
        }
    }

    pub(super) fn stopped(&mut self, now: Now, remaining_bytes: u64) {
        if self.cancelling {
            return;
        }
        let remaining_bytes = self.left_bytes(remaining_bytes);
        self.remaining_at_release = Some(remaining_bytes);
        self.half.enter(now, Phase::Stopped);
        let vm = self.half.name.clone();
        let stopped_at_us = self.half.stopped_at_us.unwrap_or(now.unix_us);
        self.half.tell(Event::Stopped {
            vm,
            remaining_bytes,
            stopped_at_us,
        });
    }
}

fn read_sample(value: &Value) -> Option<Sample> {
    let ram = value.get("ram")?;
    let number = |name: &str| ram[name].as_u64();
    let page = number("page-size").unwrap_or(4096);
    Some(Sample {
        syncs: number("dirty-sync-count")?,
        sent_bytes: number("normal-bytes")?
            .saturating_add(number("duplicate")?.saturating_mul(page)),
        remaining_bytes: number("remaining")?,
        dirty_rate_bytes_per_s: number("dirty-pages-rate")?.saturating_mul(page),
        total_bytes: number("total")?,
    })
}
