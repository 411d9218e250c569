//! The source's half of a move: QEMU through pre-copy, hold, release and stop-and-copy.
//!
//! ```text
//! preparing → prepared → precopy → held ⇄ armed → stopped → switching → arrived → committed
//!                 └──────────── anything wrong ────────────┴─► rolling-back → rolled-back
//! ```
//!
//! Stock QEMU is held by keeping its SWITCHOVER_ACK in the relay; `release` lets it through. The
//! release then pauses the VM (`pause-before-switchover`), `continue` lets it go on.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::identity::{CapabilityPlan, Identity, Question};
use super::{Half, Now, Output};
use crate::commit::{End, Next, SourceHalf};
use crate::hold::{HoldPacer, Rounds, Sample};
use crate::protocol::command::Termination;
use crate::protocol::event::Event;
use crate::protocol::types::{HoldReason, Phase, Role, Side, VmReport};
use crate::qmp::{QmpClient, QmpMessage};

/// How often a migration is looked at.
const POLL: Duration = Duration::from_millis(100);
/// … while armed, and just after.
const QUICK_POLL: Duration = Duration::from_millis(10);
/// After the migration ended and the VM's run state does not tell it yet.
const LOOK_AGAIN: Duration = Duration::from_millis(1);
/// How long QEMU may take to answer anything but in stop-and-copy.
const ANSWER: Duration = Duration::from_secs(2);
/// After `arm`, QEMU sends at full speed for so long before what remains is reported.
const ARM_TIME: Duration = Duration::from_millis(50);
/// QEMU pauses within this time after a release.
const RELEASE_DEADLINE: Duration = Duration::from_secs(2);
/// Stop-and-copy may take three times what is predicted, and so much more.
const SWITCH_SLACK: Duration = Duration::from_secs(2);
/// Effectively no limit; QEMU takes values below 10 B/s as none.
const FULL_SPEED: u64 = 1 << 40;
/// QEMU's largest downtime-limit, in ms: the acknowledgement alone decides.
const ANY_DOWNTIME_MS: u64 = 2_000_000;

/// What a run says about its sources.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Settings {
    /// The group's downtime limit.
    pub max_downtime: Duration,
    /// Keep in wait-and-copy until released.
    pub hold: bool,
    /// Allow throttling.
    pub throttle: bool,
    /// multifd channels, 0 for none.
    pub multifd_channels: u8,
    /// When pre-copy ends.
    pub termination: Termination,
}

/// Which command an answer belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tag {
    /// One of the questions of the identification.
    Ask(Question),
    /// Capabilities for the run.
    SetCapabilities,
    /// Parameters for the run.
    SetParameters,
    /// `migrate`.
    Start,
    /// `query-migrate`, periodically.
    Poll,
    /// `query-migrate` just after the VM was paused.
    Paused,
    /// A parameter changed on the way.
    Tune,
    /// Full speed before a release.
    Arm,
    /// `migrate-continue`.
    Continue,
    /// `migrate_cancel`.
    Cancel,
    /// `query-migrate` after it: there may have been nothing to cancel.
    Cancelled,
    /// `yank`.
    Yank,
    /// `query-status` after the migration ended; what it ended as.
    Ended,
    /// `cont`.
    Resume,
    /// `quit`.
    Quit,
    /// Capabilities as found.
    RestoreCapabilities,
    /// Parameters as found.
    RestoreParameters,
    /// vCPU throttle in percent.
    Throttle(u8),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum AfterNote {
    Configure,
    Start,
    Arm,
}

/// The machine. See the module.
#[derive(Debug)]
pub struct Source {
    /// What it shares with the other half.
    pub half: Half,
    /// The monitor, while connected.
    pub qmp: Option<QmpClient<Tag>>,
    /// Measured speed of the stream, kept up to date by the daemon.
    pub rate_bytes_per_s: u64,
    /// What is put back afterwards: capabilities and parameters as found.
    pub originals: Option<(Value, Value)>,
    /// Whether the guest ran before the move (else it stays paused after it).
    pub was_running: bool,
    settings: Settings,
    state: SourceHalf,
    identity: Identity,
    adopting: bool,
    started: bool,
    rounds: Option<Rounds>,
    last: Option<Sample>,
    throttle_percent: u8,
    remaining_at_release: Option<u64>,
    next_poll: Option<Instant>,
    look_at_end: Option<Instant>,
    pacer: Option<HoldPacer>,
    armed_at: Option<Instant>,
    next_armed: Option<Instant>,
    release_by: Option<Instant>,
    switch_by: Option<Instant>,
    after_note: Option<AfterNote>,
    capabilities: Value,
    note_released: bool,
    wants_out: bool,
    cancelling: bool,
    resuming: bool,
    quitting: Option<Instant>,
    restoring: u8,
    settled: bool,
    hung: bool,
    /// A guest that was paused before the move switches over without an acknowledgement, and
    /// waits in pre-switchover: there is nothing to hold.
    waits_paused: bool,
    reconnect_at: Option<Instant>,
}

impl Source {
    /// Begins to prepare a VM that runs here.
    #[must_use]
    pub fn new(now: Now, name: String, uuid: uuid::Uuid, settings: Settings) -> Self {
        let mut half = Half::new(now, name, uuid, Role::Source);
        half.put(Output::ConnectQmp);
        Self {
            half,
            qmp: None,
            rate_bytes_per_s: 0,
            originals: None,
            was_running: true,
            settings,
            state: SourceHalf::Reversible,
            identity: Identity::default(),
            adopting: false,
            started: false,
            rounds: None,
            last: None,
            throttle_percent: 0,
            remaining_at_release: None,
            next_poll: None,
            look_at_end: None,
            pacer: None,
            armed_at: None,
            next_armed: None,
            release_by: None,
            switch_by: None,
            after_note: None,
            capabilities: Value::Null,
            note_released: false,
            wants_out: false,
            cancelling: false,
            resuming: false,
            quitting: None,
            restoring: 0,
            settled: false,
            hung: false,
            waits_paused: false,
            reconnect_at: None,
        }
    }

    /// Takes over a VM that an earlier life of this sidecar was moving.
    #[must_use]
    pub fn adopt(
        now: Now,
        name: String,
        uuid: uuid::Uuid,
        settings: Settings,
        released: bool,
        originals: Option<(Value, Value)>,
        was_running: bool,
    ) -> Self {
        let mut source = Self::new(now, name, uuid, settings);
        source.adopting = true;
        source.started = true;
        source.note_released = released;
        source.originals = originals;
        source.was_running = was_running;
        source.wants_out = true;
        source.state = if released {
            SourceHalf::Released
        } else {
            SourceHalf::Reversible
        };
        source.half.enter(now, Phase::RollingBack);
        source
    }

    /// What `commit` is asked about.
    #[must_use]
    pub fn state(&self) -> SourceHalf {
        self.state
    }

    /// Whether this half wants out by itself.
    #[must_use]
    pub fn wants_out(&self) -> bool {
        self.wants_out
    }

    /// Whether the note on disk must say that the VM may complete.
    #[must_use]
    pub fn note_released(&self) -> bool {
        self.note_released
    }

    /// Whether the VM was given leave to complete.
    #[must_use]
    pub fn is_prepared(&self) -> bool {
        self.half.phase() != Phase::Preparing
    }

    /// The report of this half.
    #[must_use]
    pub fn report(&self) -> VmReport {
        let mut report = self.half.report();
        if let Some(sample) = self.last {
            report.remaining_bytes = sample.remaining_bytes;
            report.dirty_rate_bytes_per_s = sample.dirty_rate_bytes_per_s;
        }
        if let Some(rounds) = &self.rounds {
            report.round = rounds.current();
            report.rounds = rounds.finished().to_vec();
        }
        if matches!(self.state, SourceHalf::Completed | SourceHalf::Quit) {
            report.remaining_bytes = 0;
        }
        report.rate_bytes_per_s = self.rate_bytes_per_s;
        report.throttle_percent = self.throttle_percent;
        report.remaining_at_release_bytes = self.remaining_at_release;
        report
    }

    fn send(&mut self, now: Now, tag: Tag, command: &str, arguments: Value) {
        if let Some(qmp) = &mut self.qmp {
            qmp.send(now.mono, tag, command, arguments, ANSWER);
        }
    }

    /// The stream broke. QEMU will say the same; this says why.
    pub fn stream_failed(&mut self, error: &str) {
        if self.started && !matches!(self.state, SourceHalf::Completed | SourceHalf::Quit) {
            self.wants_out = true;
            self.half
                .secondary_fault(format!("the migration stream broke: {error}"));
        }
    }

    /// Something failed here: tell it, and want out.
    pub fn fail(&mut self, error: impl Into<String>, lost: bool) {
        self.wants_out = true;
        let error = error.into();
        self.half.fault(error, lost);
    }

    /// The monitor was connected.
    pub fn qmp_connected(&mut self, now: Now) {
        self.qmp = Some(QmpClient::new(now.mono));
        self.reconnect_at = None;
    }

    /// The monitor could not be connected, or its connection ended.
    pub fn qmp_closed(&mut self, now: Now, error: &str, process_alive: bool) {
        let was_connected = self.qmp.take().is_some();
        if self.quitting.is_some() || self.half.phase().is_final() {
            return;
        }
        if was_connected && !process_alive {
            self.process_gone(now);
            return;
        }
        if process_alive {
            self.reconnect_at = Some(now.mono + POLL * 2);
        } else if self.adopting {
            // It ended while nobody watched it.
            self.process_gone(now);
        } else if self.half.phase() == Phase::Preparing {
            self.fail(error, false);
            self.state = SourceHalf::RunsAgain {
                was_released: false,
            };
            self.settled = true;
        }
        if self.half.error().is_none() && !process_alive {
            self.fail(format!("the connection to QEMU ended: {error}"), false);
        }
    }

    /// The QEMU process is gone.
    pub fn process_gone(&mut self, now: Now) {
        self.qmp = None;
        self.reconnect_at = None;
        if self.quitting.take().is_some() {
            self.state = SourceHalf::Quit;
            self.settled = true;
            return;
        }
        if self.half.phase().is_final() || matches!(self.state, SourceHalf::Dead { .. }) {
            return;
        }
        let was_released = matches!(
            self.state,
            SourceHalf::Released
                | SourceHalf::Completed
                | SourceHalf::RunsAgain { was_released: true }
        );
        let completed = self.state == SourceHalf::Completed;
        self.state = SourceHalf::Dead { was_released };
        self.settled = true;
        self.half.put(Output::CutStream);
        let error = "the source's QEMU process ended unexpectedly";
        if completed {
            // The copy at the destination is whole: no reason of ours to propose `abort`.
            self.half.fault(error, true);
        } else {
            self.half.enter(now, Phase::RollingBack);
            self.fail(error, true);
        }
    }

    /// `start`: begins pre-copy.
    pub fn start(&mut self, _now: Now) {
        if self.started {
            return;
        }
        self.started = true;
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
                self.half.put(Output::Listen);
            }
            Some(AfterNote::Arm) if self.waits_paused => {
                self.half.enter(now, Phase::Armed);
                let vm = self.half.name.clone();
                let remaining_bytes = self.last.map_or(0, |s| s.remaining_bytes);
                self.half.tell(Event::Armed {
                    vm,
                    remaining_bytes,
                    dirty_rate_bytes_per_s: 0,
                });
            }
            Some(AfterNote::Arm) => {
                let parameters =
                    json!({ "max-bandwidth": FULL_SPEED, "downtime-limit": ANY_DOWNTIME_MS });
                self.send(now, Tag::Arm, "migrate-set-parameters", parameters);
            }
            None => {}
        }
    }

    /// The relay listens on this unix socket for QEMU's stream.
    pub fn listening(&mut self, now: Now, path: &str) {
        let uri = format!("unix:{path}");
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
        if self.half.phase() == Phase::Precopy && self.settings.hold {
            self.enter_hold(now, HoldReason::Asked);
        }
    }

    fn enter_hold(&mut self, now: Now, reason: HoldReason) {
        let sample = self.last;
        let remaining_bytes = sample.map_or(0, |s| s.remaining_bytes);
        let dirty_rate = sample.map_or(0, |s| s.dirty_rate_bytes_per_s);
        self.half.enter(now, Phase::Held);
        let pacer = HoldPacer::new(dirty_rate);
        self.tune(now, json!({ "max-bandwidth": pacer.current() }));
        self.pacer = Some(pacer);
        let vm = self.half.name.clone();
        let dirty_rate_bytes_per_s = dirty_rate;
        self.half.tell(Event::Held {
            vm,
            reason,
            remaining_bytes,
            dirty_rate_bytes_per_s,
        });
    }

    fn tune(&mut self, now: Now, parameters: Value) {
        self.send(now, Tag::Tune, "migrate-set-parameters", parameters);
    }

    /// `arm`: full speed, ready for a release.
    pub fn arm(&mut self, _now: Now) {
        if self.half.phase() == Phase::Held && self.after_note.is_none() {
            self.note_released = true;
            self.after_note = Some(AfterNote::Arm);
            self.half.put(Output::SaveNote);
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
            self.half.put(Output::OpenAckGate);
        }
    }

    /// `continue`: stop-and-copy.
    pub fn proceed(&mut self, now: Now) {
        if self.half.phase() != Phase::Stopped || self.state != SourceHalf::Reversible {
            return;
        }
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

    fn enter_switching(&mut self, now: Now) {
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

    /// Carries out what `commit` says.
    pub fn perform(&mut self, now: Now, next: Next) {
        match next {
            Next::Cancel => self.cancel(now),
            Next::Resume if !self.resuming => {
                self.resuming = true;
                self.half.enter(now, Phase::RollingBack);
                if self.was_running {
                    self.send(now, Tag::Resume, "cont", Value::Null);
                } else {
                    self.runs_again(now);
                }
            }
            Next::Quit if self.quitting.is_none() => {
                self.half.enter(now, Phase::Committing);
                self.quitting = Some(now.mono + ANSWER);
                self.send(now, Tag::Quit, "quit", Value::Null);
            }
            Next::End(end) if self.settled => self.end(now, end),
            _ => {}
        }
    }

    fn cancel(&mut self, now: Now) {
        if self.cancelling {
            return;
        }
        self.cancelling = true;
        self.wants_out = true;
        self.after_note = None;
        self.release_by = None;
        self.half.enter(now, Phase::RollingBack);
        self.half.put(Output::CutStream);
        self.next_poll = None;
        if self.started && self.rounds.is_some() || self.adopting {
            self.send(now, Tag::Cancel, "migrate_cancel", Value::Null);
        } else {
            self.runs_again(now);
        }
    }

    /// The VM runs here for good: put back what was changed.
    fn runs_again(&mut self, now: Now) {
        if matches!(self.state, SourceHalf::RunsAgain { .. }) {
            return;
        }
        let was_released = matches!(self.state, SourceHalf::Released | SourceHalf::Completed);
        self.state = SourceHalf::RunsAgain { was_released };
        self.half.put(Output::CutStream);
        self.half.enter(now, Phase::RollingBack);
        self.next_poll = None;
        self.switch_by = None;
        self.release_by = None;
        match (self.originals.take(), self.qmp.is_some()) {
            (Some((capabilities, parameters)), true) => {
                self.restoring = 2;
                self.send(
                    now,
                    Tag::RestoreCapabilities,
                    "migrate-set-capabilities",
                    capabilities,
                );
                self.send(
                    now,
                    Tag::RestoreParameters,
                    "migrate-set-parameters",
                    parameters,
                );
            }
            _ => self.settled = true,
        }
    }

    fn end(&mut self, now: Now, end: End) {
        if self.half.phase().is_final() {
            return;
        }
        let vm = self.half.name.clone();
        let role = Role::Source;
        let reason = self.half.error().map(str::to_owned);
        match end {
            End::Committed => {
                self.half.enter(now, Phase::Committed);
                self.half.tell(Event::Committed {
                    vm,
                    role,
                    resumed_at_us: None,
                });
            }
            End::RolledBack => {
                self.half.enter(now, Phase::RolledBack);
                self.half.tell(Event::RolledBack { vm, role, reason });
            }
            End::Diverged(side) => {
                let phase = match side {
                    Side::Source => Phase::RolledBack,
                    Side::Destination => Phase::Committed,
                };
                self.half.enter(now, phase);
                let reason = "its other copy was lost; this one was the last complete one".into();
                self.half.tell(Event::Diverged { vm, side, reason });
            }
            End::Lost => self.half.enter(now, Phase::Failed),
        }
    }

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

    fn ready(&mut self, now: Now, version: String) {
        self.identity = Identity::new(version);
        for question in Question::ALL {
            let (command, arguments) = question.command();
            self.send(now, Tag::Ask(question), command, arguments);
        }
    }

    fn reply(&mut self, now: Now, tag: Tag, value: &Value) {
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
                self.tell_prepared();
            }
            Tag::Poll => self.polled(now, value),
            Tag::Paused => self.paused(now, value),
            Tag::Arm if self.half.phase() == Phase::Held => {
                self.half.enter(now, Phase::Armed);
                self.armed_at = Some(now.mono);
                self.next_armed = Some(now.mono + ARM_TIME);
                self.next_poll = Some(now.mono + QUICK_POLL);
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
            Tag::Resume => self.send(now, Tag::Ended, "query-status", Value::Null),
            Tag::RestoreCapabilities | Tag::RestoreParameters => self.restored(),
            Tag::Throttle(percent) => {
                self.throttle_percent = percent;
                let vm = self.half.name.clone();
                self.half.tell(Event::Throttled { vm, percent });
            }
            _ => {}
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
        };
        self.half.tell(event);
    }

    fn restored(&mut self) {
        self.restoring = self.restoring.saturating_sub(1);
        self.settled |= self.restoring == 0;
    }

    fn parameters(&self) -> Value {
        let mut parameters = json!({
            "max-bandwidth": FULL_SPEED,
            "downtime-limit": crate::hold::millis(self.settings.max_downtime),
        });
        if self.settings.multifd_channels > 0 {
            parameters["multifd-channels"] = json!(self.settings.multifd_channels);
        }
        if self.settings.throttle {
            parameters["cpu-throttle-initial"] = json!(1);
            parameters["max-cpu-throttle"] = json!(1);
            parameters["cpu-throttle-increment"] = json!(99);
            parameters["throttle-trigger-threshold"] = json!(100);
        }
        parameters
    }

    fn identified(&mut self, now: Now) {
        self.half.total_bytes = self.identity.memory_bytes;
        if self.adopting {
            self.adopted(now);
            return;
        }
        if self.half.phase() != Phase::Preparing {
            return;
        }
        let plan = CapabilityPlan {
            hold: self.settings.hold,
            pause: self.settings.hold,
            throttle: self.settings.throttle,
            multifd: self.settings.multifd_channels > 0,
        };
        let identity = &self.identity;
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
        } else {
            plan.missing(identity)
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
    }

    /// After a restart of the sidecar: what did the VM become meanwhile?
    fn adopted(&mut self, now: Now) {
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

    fn refused(&mut self, now: Now, tag: Tag, error: &str) {
        match tag {
            Tag::Tune | Tag::Yank | Tag::Quit | Tag::Poll => {}
            Tag::Cancel => self.send(now, Tag::Ended, "query-status", Value::Null),
            Tag::RestoreCapabilities | Tag::RestoreParameters => {
                self.half.fault(
                    format!("could not restore migration settings: {error}"),
                    false,
                );
                self.restored();
            }
            Tag::Throttle(_) => self.half.fault(format!("throttle refused: {error}"), false),
            Tag::Resume => self.fail(format!("the source cannot be continued: {error}"), false),
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

    fn event(&mut self, now: Now, name: &str, data: &Value, at_us: i64) {
        match name {
            "STOP" => self.half.stopped_at_us = Some(at_us),
            "RESUME" if self.half.stopped_at_us.is_some() => {
                self.half.resumed_at_us = Some(at_us);
            }
            "MIGRATION_PASS" if self.half.phase() == Phase::Precopy => {
                self.next_poll = self.next_poll.map(|_| now.mono);
            }
            "MIGRATION" => self.migration_event(now, data["status"].as_str().unwrap_or_default()),
            _ => {}
        }
    }

    fn migration_event(&mut self, now: Now, status: &str) {
        match status {
            "pre-switchover" if !self.was_running && self.half.phase() == Phase::Precopy => {
                self.waits_paused = true;
                self.next_poll = None;
                self.enter_hold(now, HoldReason::Converged);
            }
            "pre-switchover" => {
                self.release_by = None;
                self.next_poll = None;
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
    fn ended(&mut self, now: Now, run_state: &str) {
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

    fn completed(&mut self, now: Now) {
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

    fn polled(&mut self, now: Now, value: &Value) {
        let Some(sample) = read_sample(value) else {
            return;
        };
        self.last = Some(sample);
        self.half.total_bytes = self.half.total_bytes.max(sample.total_bytes);
        match self.half.phase() {
            Phase::Precopy => {
                let Some(rounds) = &mut self.rounds else {
                    return;
                };
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
            Phase::Armed if self.next_armed.is_some_and(|at| at <= now.mono) => {
                self.next_armed = Some(now.mono + POLL);
                let event = Event::Armed {
                    vm: self.half.name.clone(),
                    remaining_bytes: sample.remaining_bytes,
                    dirty_rate_bytes_per_s: sample.dirty_rate_bytes_per_s,
                };
                self.half.tell(event);
            }
            _ => {}
        }
    }

    fn paused(&mut self, now: Now, value: &Value) {
        let remaining = read_sample(value)
            .or(self.last)
            .map_or(0, |s| s.remaining_bytes);
        self.stopped(now, remaining);
    }

    fn stopped(&mut self, now: Now, remaining_bytes: u64) {
        if self.cancelling {
            return;
        }
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

    /// When [`Self::tick`] wants to be called.
    #[must_use]
    pub fn deadline(&self) -> Option<Instant> {
        let qmp = self
            .qmp
            .as_ref()
            .filter(|_| !self.hung)
            .and_then(QmpClient::deadline);
        let quitting = self.quitting;
        [
            qmp,
            self.next_poll,
            self.look_at_end,
            self.release_by,
            self.switch_by,
            self.reconnect_at,
            quitting,
        ]
        .into_iter()
        .flatten()
        .min()
    }

    /// Does what is due.
    pub fn tick(&mut self, now: Now) {
        if self.look_at_end.is_some_and(|at| at <= now.mono) {
            self.look_at_end = None;
            self.send(now, Tag::Ended, "query-status", Value::Null);
        }
        if self.next_poll.is_some_and(|at| at <= now.mono) {
            let interval = if self.half.phase() == Phase::Armed {
                QUICK_POLL
            } else {
                POLL
            };
            self.next_poll = Some(now.mono + interval);
            if self.qmp.as_ref().is_some_and(QmpClient::is_quiet) {
                self.send(now, Tag::Poll, "query-migrate", Value::Null);
            }
        }
        if self.reconnect_at.is_some_and(|at| at <= now.mono) {
            self.reconnect_at = None;
            self.half.put(Output::ConnectQmp);
        }
        if self.release_by.is_some_and(|at| at <= now.mono) {
            self.release_by = None;
            self.fail(
                "QEMU did not pause the VM within 2 s after its release",
                false,
            );
        }
        if self.switch_by.is_some_and(|at| at <= now.mono) {
            self.switch_by = None;
            self.fail(
                "stop-and-copy takes far longer than predicted; its stream was cut",
                false,
            );
            self.yank(now);
        }
        if self.quitting.is_some_and(|at| at <= now.mono) {
            self.quitting = Some(now.mono + ANSWER);
            self.half.put(Output::Kill);
        }
        if let (false, Some(qmp)) = (self.hung, &self.qmp) {
            if let Some(error) = qmp.overdue(now.mono) {
                self.hung = true;
                self.fail(error.to_string(), false);
                self.half.put(Output::CutStream);
            }
        }
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
