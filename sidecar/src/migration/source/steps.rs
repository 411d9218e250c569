//! The steps forward: what the coordinator commands, from `start` to `continue`.

use std::time::Duration;

use serde_json::{Value, json};

use super::{
    ANSWER, ANY_DOWNTIME_MS, AfterNote, FULL_SPEED, Hook, POLL, RELEASE_DEADLINE, SWITCH_SLACK,
    Source, Tag,
};
use crate::commit::SourceHalf;
use crate::hold::{HoldPacer, Rounds};
use crate::migration::identity::HoldBy;
use crate::migration::{Now, Output, STREAM_FD};
use crate::protocol::event::Event;
use crate::protocol::types::{HoldReason, Phase, Transport};

impl Source {
    /// `start`: begins pre-copy.
    pub fn start(&mut self, now: Now, disks_only: bool) {
        if self.started {
            if !disks_only && !self.wants_out {
                self.mirrors.send_on(now.mono);
                self.drive_disks(now);
            }
            return;
        }
        self.started = true;
        if disks_only {
            self.mirrors.hold_back();
        }
        self.note_released = !self.settings.hold;
        self.after_note = Some(AfterNote::Start);
        self.half.put(Output::SaveNote);
    }

    /// The note is on disk, so that the step that waited for it may happen.
    pub fn note_saved(&mut self, now: Now) {
        match self.after_note.take() {
            Some(AfterNote::Configure) => {
                let capabilities = self.capabilities.take();
                self.send(
                    now,
                    Tag::SetCapabilities,
                    "migrate-set-capabilities",
                    capabilities,
                );
            }
            Some(AfterNote::Start) => {
                if !self.settings.hold {
                    self.state = SourceHalf::Released;
                }
                if self.mirrors.is_empty() {
                    self.open_stream(now);
                } else {
                    self.half.enter(now, Phase::Precopy);
                    self.half.put(Output::ListenDisks);
                }
            }
            Some(AfterNote::Balloon) => {
                self.balloon.noted(now);
                self.drive_balloon(now);
            }
            Some(AfterNote::Arm) if self.waits_paused => {
                self.half.enter(now, Phase::Armed);
                let vm = self.half.name.clone();
                let remaining_bytes = self.left_bytes(self.last.map_or(0, |s| s.remaining_bytes));
                self.half.tell(Event::Armed {
                    vm,
                    remaining_bytes,
                    dirty_rate_bytes_per_s: 0,
                });
            }
            Some(AfterNote::Arm) if self.hold == HoldBy::Qemu => self.arm_hold(now, true),
            Some(AfterNote::Arm) => {
                let parameters =
                    json!({ "max-bandwidth": FULL_SPEED, "downtime-limit": ANY_DOWNTIME_MS });
                self.send(now, Tag::Arm, "migrate-set-parameters", parameters);
            }
            None => {}
        }
    }

    /// Has the memory's stream opened, once the guest has given what it does not use.
    pub(super) fn open_stream(&mut self, now: Now) {
        if !self.balloon.is_done() {
            self.balloon.begin(now, self.was_running);
            self.drive_balloon(now);
            return;
        }
        self.stream_opened = true;
        self.half.put(match self.settings.transport {
            Transport::Relay => Output::Listen,
            Transport::Direct => Output::Connect,
        });
    }

    /// The relay listens on this unix socket for QEMU's stream.
    pub fn listening(&mut self, now: Now, path: &str) {
        self.begin(now, &format!("unix:{path}"));
    }

    /// The destination is connected, and the daemon has the socket for QEMU.
    pub fn connected(&mut self, now: Now) {
        if self.half.phase() != Phase::Prepared {
            return;
        }
        if let Some(qmp) = &mut self.qmp {
            let name = json!({ "fdname": STREAM_FD });
            qmp.send_with_descriptor(now.mono, Tag::Handover, "getfd", name, ANSWER);
        }
        self.begin(now, &format!("fd:{STREAM_FD}"));
    }

    fn begin(&mut self, now: Now, uri: &str) {
        self.send(now, Tag::Start, "migrate", json!({ "uri": uri }));
        self.half.enter(now, Phase::Precopy);
        self.rounds = Some(Rounds::new(
            now.mono,
            self.settings.termination,
            self.settings.max_downtime,
        ));
        self.next_poll = Some(now.mono + POLL);
    }

    /// `hold`: into wait-and-copy now.
    pub fn hold(&mut self, now: Now) {
        match self.hold {
            _ if self.half.phase() != Phase::Precopy || self.rounds.is_none() => {}
            HoldBy::Nobody => {}
            HoldBy::Relay => self.enter_hold(now, HoldReason::Asked),
            HoldBy::Qemu => self.ask_hold(now),
        }
    }

    pub(super) fn enter_hold(&mut self, now: Now, reason: HoldReason) {
        let sample = self.last;
        let remaining_bytes = self.left_bytes(sample.map_or(0, |s| s.remaining_bytes));
        let dirty_rate = sample.map_or(0, |s| s.dirty_rate_bytes_per_s);
        self.half.enter(now, Phase::Held);
        if self.hold == HoldBy::Qemu {
            // It sleeps by itself.
            self.resend(now, true);
        } else {
            let pacer = HoldPacer::new(dirty_rate);
            self.tune(now, json!({ "max-bandwidth": pacer.current() }));
            self.pacer = Some(pacer);
        }
        let vm = self.half.name.clone();
        let dirty_rate_bytes_per_s = dirty_rate;
        self.half.tell(Event::Held {
            vm,
            reason,
            remaining_bytes,
            dirty_rate_bytes_per_s,
        });
    }

    pub(super) fn tune(&mut self, now: Now, parameters: Value) {
        self.send(now, Tag::Tune, "migrate-set-parameters", parameters);
    }

    /// `arm`: full speed, ready for a release.
    pub fn arm(&mut self, _now: Now) {
        if self.half.phase() != Phase::Held {
            return;
        }
        match self.hook {
            Hook::Wanted => {
                self.hook = Hook::Running;
                self.half.put(Output::RunHook);
                return;
            }
            Hook::Running => return,
            Hook::Done => {}
        }
        if self.after_note.is_none() {
            self.note_released = true;
            self.after_note = Some(AfterNote::Arm);
            self.half.put(Output::SaveNote);
        }
    }

    /// The hook has ended: the VM may be armed.
    pub fn hook_ended(&mut self, now: Now, result: Result<(), String>) {
        self.hook = Hook::Done;
        match result {
            Ok(()) => self.arm(now),
            Err(error) => self.fail(error, false),
        }
    }

    /// `disarm`: back to the paced hold.
    pub fn disarm(&mut self, now: Now) {
        if self.half.phase() != Phase::Armed || self.release_by.is_some() {
            return;
        }
        if self.waits_paused {
            self.half.enter(now, Phase::Held);
            return;
        }
        self.armed_at = None;
        self.next_armed = None;
        if self.hold == HoldBy::Qemu {
            self.half.enter(now, Phase::Held);
            self.arm_hold(now, false);
            return;
        }
        self.half.enter(now, Phase::Held);
        let pacer = HoldPacer::new(self.last.map_or(0, |s| s.dirty_rate_bytes_per_s));
        let limit = crate::hold::millis(self.settings.max_downtime);
        self.tune(
            now,
            json!({ "max-bandwidth": pacer.current(), "downtime-limit": limit }),
        );
        self.pacer = Some(pacer);
    }

    /// `release`: pauses the VM, still reversible.
    pub fn release(&mut self, now: Now) {
        if self.waits_paused && self.half.phase() == Phase::Armed {
            self.send(now, Tag::Paused, "query-migrate", Value::Null);
        } else if self.half.phase() == Phase::Armed && self.release_by.is_none() {
            self.release_by = Some(now.mono + RELEASE_DEADLINE);
            self.next_armed = None;
            match self.hold {
                HoldBy::Qemu => {
                    self.send(now, Tag::Release, "migrate-switchover-release", json!({}));
                }
                _ => self.half.put(Output::OpenAckGate),
            }
        }
    }

    /// `continue`: the rest of the disks, then stop-and-copy.
    pub fn proceed(&mut self, now: Now) {
        let may = self.state == SourceHalf::Reversible && !self.going_back && !self.draining;
        if self.half.phase() != Phase::Stopped || !may {
            return;
        }
        if self.mirrors.is_empty() {
            self.switch_over(now);
        } else {
            self.drain_disks(now);
        }
    }

    pub(super) fn switch_over(&mut self, now: Now) {
        self.state = SourceHalf::Released;
        self.half.put(Output::Unpace);
        self.send(
            now,
            Tag::Continue,
            "migrate-continue",
            json!({ "state": "pre-switchover" }),
        );
        self.enter_switching(now);
    }

    pub(super) fn enter_switching(&mut self, now: Now) {
        self.half.enter(now, Phase::Switching);
        let vm = self.half.name.clone();
        self.half.tell(Event::Switching { vm });
        let remaining = self.remaining_at_release.unwrap_or(0);
        let copy = rate_limiter::BytesPerSecond(self.rate_bytes_per_s.max(1_000_000))
            .time_for(rate_limiter::Bytes(remaining));
        let downtime = copy
            .max(self.settings.max_downtime)
            .min(Duration::from_secs(60));
        let by = now.mono + downtime * 3 + SWITCH_SLACK;
        self.switch_by = Some(by);
        self.draining = false;
        self.next_poll = None;
        if let Some(qmp) = &mut self.qmp {
            qmp.extend_deadlines(by);
        }
    }

    /// `throttle`.
    ///
    /// # Errors
    /// Throttling was not asked for in `prepare`.
    pub fn throttle(&mut self, now: Now, percent: u8) -> Result<(), &'static str> {
        if !self.settings.throttle {
            return Err("throttling needs `throttle: true` in `prepare`");
        }
        // Auto-converge's own trigger is disarmed by its smallest value; a throttle is set by
        // making every measuring period a trigger.
        let (level, threshold) = if percent == 0 { (1, 100) } else { (percent, 1) };
        let parameters = json!({
            "cpu-throttle-initial": level,
            "max-cpu-throttle": level,
            "cpu-throttle-increment": 99,
            "throttle-trigger-threshold": threshold,
        });
        self.send(
            now,
            Tag::Throttle(percent),
            "migrate-set-parameters",
            parameters,
        );
        Ok(())
    }

    /// `yank`: cuts the stream out-of-band.
    pub fn yank(&mut self, now: Now) {
        if let Some(qmp) = &mut self.qmp {
            let arguments = json!({ "instances": [{ "type": "migration" }] });
            qmp.send_oob(now.mono, Tag::Yank, "yank", arguments, ANSWER);
        }
        self.half.put(Output::CutStream);
    }
}
