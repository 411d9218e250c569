//! The destination's half of a move: an incoming QEMU, from its start to `cont` or its end.
//!
//! ```text
//! preparing → prepared → precopy → arrived → committing → committed
//!       └──────────────────┴──────────┴─► rolled-back (the process is gone)
//! ```
//!
//! `cont` is only ever sent to a QEMU that says completed *and* paused: one that still loads would
//! answer {} and start by itself later. It is confirmed by the run state, not by its reply.
//!
//! Local disks come over NBD while it waits: PREPARED is told when they can, and a VM whose NBD server
//! still runs when its memory is complete has not arrived.

mod balloon;
mod setup;

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::balloon::give_back::GiveBack;
use super::balloon::{self as ballooning, Kept};
use super::disks::destination::{self as export, Exports};
use super::identity::{Identity, Question};
use super::source::Settings;
use super::{HEALTH, Half, Now, Output, STREAM_FD};
use crate::commit::{DestinationHalf, Next};
use crate::config::DiskConfig;
use crate::protocol::command::PrepareDisk;
use crate::protocol::event::Event;
use crate::protocol::types::{Phase, Role, Transport, VmReport};
use crate::qmp::{QmpClient, QmpMessage};

const ANSWER: Duration = Duration::from_secs(2);
/// The incoming QEMU's monitor opens within this time.
const START_DEADLINE: Duration = Duration::from_secs(10);
const RECONNECT: Duration = Duration::from_millis(20);
/// How often its run state is asked between `completed` and `paused`, and after `cont`.
const SETTLE: Duration = Duration::from_millis(3);
/// After `quit`, the process is killed when it is still there.
const QUIT_DEADLINE: Duration = Duration::from_millis(300);

/// Which command an answer belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tag {
    /// One of the questions of the identification.
    Ask(Question),
    /// Capabilities for the run.
    SetCapabilities,
    /// Parameters for the run.
    SetParameters,
    /// `migrate-incoming`.
    Listen,
    /// `getfd`.
    Handover,
    /// `query-status` to see that it is alive.
    Health,
    /// `query-status` after the migration completed.
    Loaded,
    /// `query-migrate` of a QEMU taken over after a restart.
    Adopt,
    /// `cont`.
    Cont,
    /// `query-status` after it.
    Runs,
    /// Capabilities or parameters as found, `announce-self`.
    Tidy,
    /// `quit`.
    Quit,
    /// One of the commands of the disks' exports.
    Disk(export::Tag),
    /// One of the balloon's commands.
    Balloon(ballooning::Tag),
}

/// Where an incoming VM is to be.
#[derive(Debug, Clone, Default)]
pub struct Place {
    /// The machine type it must have.
    pub machine: Option<String>,
    /// Where other sidecars connect, for PREPARED.
    pub stream_address: String,
    /// Unix socket on which QEMU takes the stream.
    pub incoming_path: String,
    /// Start its QEMU, rather than adopt one that waits.
    pub spawn: bool,
    /// Local disks that come with it.
    pub disks: Vec<PrepareDisk>,
    /// What is known of their images.
    pub images: Vec<DiskConfig>,
    /// Unix socket of QEMU's NBD server.
    pub nbd_path: String,
}

/// The machine. See the module.
#[derive(Debug)]
pub struct Destination {
    /// What it shares with the other half.
    pub half: Half,
    /// The monitor, while connected.
    pub qmp: Option<QmpClient<Tag>>,
    /// Whether the guest ran at the source (from the stream's hello); else it stays paused.
    pub was_running: bool,
    place: Place,
    settings: Settings,
    state: DestinationHalf,
    identity: Identity,
    adopting: bool,
    connect_by: Option<Instant>,
    reconnect_at: Option<Instant>,
    next_ask: Option<(Instant, Tag)>,
    kill_by: Option<Instant>,
    wants_out: bool,
    hung: bool,
    /// What is put back once it runs: capabilities and parameters as found.
    pub originals: Option<(Value, Value)>,
    tidying: u8,
    exports: Exports,
    /// What its guest's balloon was at the source, where memory was taken from it.
    pub balloon: Option<Kept>,
    give_back: GiveBack,
}

impl Destination {
    /// Begins to prepare an incoming VM.
    #[must_use]
    pub fn new(now: Now, name: String, uuid: uuid::Uuid, settings: Settings, place: Place) -> Self {
        let mut half = Half::new(now, name, uuid, Role::Destination);
        half.transport = settings.transport;
        half.put(if place.spawn {
            Output::Spawn
        } else {
            Output::ConnectQmp
        });
        let exports = Exports::new(
            place.disks.clone(),
            place.images.clone(),
            place.nbd_path.clone(),
        );
        Self {
            half,
            qmp: None,
            was_running: true,
            place,
            settings,
            state: DestinationHalf::Loading,
            identity: Identity::default(),
            adopting: false,
            connect_by: Some(now.mono + START_DEADLINE),
            reconnect_at: None,
            next_ask: None,
            kill_by: None,
            wants_out: false,
            hung: false,
            originals: None,
            tidying: 0,
            exports,
            balloon: None,
            give_back: GiveBack::default(),
        }
    }

    /// Takes over an incoming VM of an earlier life of this sidecar.
    #[must_use]
    pub fn adopt(
        now: Now,
        name: String,
        uuid: uuid::Uuid,
        settings: Settings,
        was_running: bool,
        originals: Option<(Value, Value)>,
    ) -> Self {
        let mut this = Self::new(now, name, uuid, settings, Place::default());
        this.adopting = true;
        this.state = DestinationHalf::Unknown;
        this.was_running = was_running;
        this.originals = originals;
        this.wants_out = true;
        this
    }

    /// What `commit` is asked about.
    #[must_use]
    pub fn state(&self) -> DestinationHalf {
        self.state
    }

    /// Whether this half wants out by itself.
    #[must_use]
    pub fn wants_out(&self) -> bool {
        self.wants_out
    }

    /// The report of this half.
    #[must_use]
    pub fn report(&self) -> VmReport {
        VmReport {
            qemu_build: self.identity.build(),
            balloon: self.balloon_report(),
            ..self.half.report()
        }
    }

    fn send(&mut self, now: Now, tag: Tag, command: &str, arguments: Value) {
        if let Some(qmp) = &mut self.qmp {
            qmp.send(now.mono, tag, command, arguments, ANSWER);
        }
    }

    /// Something failed here: tell it, and want out.
    pub fn fail(&mut self, error: impl Into<String>, lost: bool) {
        self.wants_out = true;
        self.half.fault(error, lost);
    }

    /// The stream broke before everything was here, or ended.
    pub fn stream_failed(&mut self, error: &str) {
        if self.state == DestinationHalf::Loading && self.half.phase() != Phase::Preparing {
            self.wants_out = true;
            self.half
                .secondary_fault(format!("the migration stream broke: {error}"));
        }
    }

    /// The process could not be started.
    pub fn spawn_failed(&mut self, error: &str) {
        self.fail(error, false);
        self.state = DestinationHalf::Killed;
    }

    /// The process was started.
    pub fn spawned(&mut self, now: Now) {
        self.reconnect_at = Some(now.mono + RECONNECT);
    }

    /// The monitor was connected.
    pub fn qmp_connected(&mut self, now: Now) {
        self.qmp = Some(QmpClient::new(now.mono));
        self.reconnect_at = None;
        self.connect_by = None;
    }

    /// The monitor could not be connected (yet), or its connection ended.
    pub fn qmp_closed(&mut self, now: Now, error: &str, process_alive: bool) {
        self.qmp = None;
        if self.half.phase().is_final() || self.state == DestinationHalf::Killed {
            return;
        }
        if !process_alive {
            self.process_gone(now);
            return;
        }
        match self.connect_by {
            // One that may hold the only running copy is asked for ever.
            Some(by) if by <= now.mono && !self.adopting => {
                self.connect_by = None;
                self.fail(
                    format!("the incoming QEMU's monitor does not open: {error}"),
                    false,
                );
                self.half.put(Output::Kill);
            }
            _ => self.reconnect_at = Some(now.mono + RECONNECT),
        }
    }

    /// The QEMU process is gone.
    pub fn process_gone(&mut self, now: Now) {
        self.qmp = None;
        self.reconnect_at = None;
        self.next_ask = None;
        self.give_back.abandon();
        if self.half.phase().is_final() {
            return;
        }
        self.half.put(Output::CutStream);
        if self.kill_by.take().is_some() || self.state == DestinationHalf::Broken {
            self.state = DestinationHalf::Killed;
            return;
        }
        let cont_sent = matches!(
            self.state,
            DestinationHalf::ContSent | DestinationHalf::Running | DestinationHalf::Unknown
        );
        if !matches!(
            self.state,
            DestinationHalf::Dead { .. } | DestinationHalf::Killed
        ) {
            self.state = DestinationHalf::Dead { cont_sent };
            self.half.enter(now, Phase::RollingBack);
            self.fail(
                "the destination's QEMU process ended unexpectedly (see its log)",
                true,
            );
        }
    }

    /// Carries out what `commit` says.
    pub fn perform(&mut self, now: Now, next: Next) {
        match next {
            Next::Cont if self.state == DestinationHalf::Loaded => {
                self.half.enter(now, Phase::Committing);
                self.state = DestinationHalf::ContSent;
                if self.was_running {
                    self.send(now, Tag::Cont, "cont", Value::Null);
                } else {
                    self.runs(now);
                }
            }
            Next::Kill if self.kill_by.is_none() => {
                self.half.enter(now, Phase::RollingBack);
                self.half.put(Output::CutStream);
                self.next_ask = None;
                self.reconnect_at = None;
                self.kill_by = Some(now.mono + QUIT_DEADLINE);
                if self.qmp.is_some() && !self.hung {
                    self.send(now, Tag::Quit, "quit", Value::Null);
                } else {
                    self.half.put(Output::Kill);
                }
            }
            Next::End(end) if self.tidying == 0 && self.give_back.is_settled() => {
                self.half.end(now, end)
            }
            _ => {}
        }
    }

    /// Takes what QEMU said.
    pub fn handle(&mut self, now: Now, message: QmpMessage<Tag>) {
        self.hung = false;
        match message {
            QmpMessage::Ready { version, .. } => {
                self.identity = Identity::new(version);
                for question in Question::ALL {
                    let (command, arguments) = question.command();
                    self.send(now, Tag::Ask(question), command, arguments);
                }
            }
            QmpMessage::Event { name, data, at_us } => self.event(now, &name, &data, at_us),
            QmpMessage::Reply {
                tag,
                result: Ok(value),
            } => self.reply(now, tag, &value),
            QmpMessage::Reply {
                tag,
                result: Err(error),
            } => match tag {
                Tag::Tidy => self.tidied(),
                Tag::Quit | Tag::Health => {}
                Tag::Balloon(_) => self.give_back.refused(now.mono, &error),
                Tag::Disk(tag) => {
                    self.exports.refused(tag, &error);
                    self.drive_disks(now);
                }
                Tag::Cont => {
                    self.state = DestinationHalf::Loaded;
                    self.fail(
                        format!("the destination cannot be continued: {error}"),
                        false,
                    );
                }
                _ => self.fail(
                    format!("the incoming QEMU refused ({tag:?}): {error}"),
                    false,
                ),
            },
        }
    }

    fn reply(&mut self, now: Now, tag: Tag, value: &Value) {
        let status = || value["status"].as_str().unwrap_or_default();
        match tag {
            Tag::Ask(question) => {
                if self.identity.answer(question, value) {
                    self.identified(now);
                }
            }
            Tag::SetCapabilities => {
                let parameters = self.parameters();
                self.send(
                    now,
                    Tag::SetParameters,
                    "migrate-set-parameters",
                    parameters,
                );
            }
            Tag::SetParameters if self.exports.is_empty() => self.configured(now),
            Tag::SetParameters => {
                self.exports.open();
                self.drive_disks(now);
            }
            Tag::Disk(tag) => {
                self.exports.replied(tag);
                self.drive_disks(now);
                match tag {
                    export::Tag::Export(_) if self.exports.are_open() => self.configured(now),
                    export::Tag::Stop => self.half.put(Output::SealDisks),
                    _ => {}
                }
            }
            Tag::Listen if self.is_direct() => self.half.put(Output::AcceptStream),
            Tag::Listen => self.prepared(now),
            Tag::Loaded => match status() {
                "paused" | "postmigrate" => self.loaded(now),
                _ => self.next_ask = Some((now.mono + SETTLE, Tag::Loaded)),
            },
            Tag::Adopt => self.adopted(now, value),
            Tag::Cont => self.send(now, Tag::Runs, "query-status", Value::Null),
            Tag::Runs => match status() {
                "running" => self.runs(now),
                _ => self.next_ask = Some((now.mono + SETTLE, Tag::Runs)),
            },
            Tag::Tidy => self.tidied(),
            Tag::Balloon(ballooning::Tag::Back) => self.give_back.replied(),
            Tag::Balloon(_) | Tag::Handover | Tag::Health | Tag::Quit => {}
        }
    }

    fn is_direct(&self) -> bool {
        self.half.transport == Transport::Direct
    }

    fn tidied(&mut self) {
        self.tidying = self.tidying.saturating_sub(1);
    }

    fn event(&mut self, now: Now, name: &str, data: &Value, at_us: i64) {
        match (name, data["status"].as_str().unwrap_or_default()) {
            ("RESUME", _) => self.half.resumed_at_us = Some(at_us),
            ("MIGRATION", "active") => self.half.enter(now, Phase::Precopy),
            ("MIGRATION", "completed") => {
                self.next_ask = None;
                self.send(now, Tag::Loaded, "query-status", Value::Null);
            }
            ("MIGRATION", "failed") if self.state == DestinationHalf::Loading => {
                self.state = DestinationHalf::Broken;
                if self.kill_by.is_none() {
                    self.wants_out = true;
                    let text = "the incoming migration failed (stream cut or not loadable)";
                    self.half.secondary_fault(text);
                }
            }
            _ => {}
        }
    }

    fn loaded(&mut self, now: Now) {
        if !matches!(
            self.state,
            DestinationHalf::Loading | DestinationHalf::Unknown
        ) {
            return;
        }
        if !self.exports.are_sealed() {
            self.fail("its memory came before its disks were complete", false);
            return;
        }
        self.state = DestinationHalf::Loaded;
        self.next_ask = Some((now.mono + HEALTH, Tag::Health));
        self.half.enter(now, Phase::Arrived);
        let vm = self.half.name.clone();
        self.half.tell(Event::Arrived {
            vm,
            role: Role::Destination,
        });
    }

    fn runs(&mut self, now: Now) {
        if self.state == DestinationHalf::Running {
            return;
        }
        self.state = DestinationHalf::Running;
        self.half.enter(now, Phase::Committing);
        let event = Event::Committed {
            vm: self.half.name.clone(),
            role: Role::Destination,
            resumed_at_us: self.half.resumed_at_us,
        };
        self.half.tell(event);
        let announce = json!({ "initial": 50, "max": 550, "rounds": 5, "step": 100 });
        self.tidying = 1;
        self.send(now, Tag::Tidy, "announce-self", announce);
        if let Some((capabilities, parameters)) = self.originals.take() {
            self.tidying += 2;
            self.send(now, Tag::Tidy, "migrate-set-capabilities", capabilities);
            self.send(now, Tag::Tidy, "migrate-set-parameters", parameters);
        }
        if self.qmp.is_none() {
            self.tidying = 0;
        }
        self.give_back(now);
    }

    /// When [`Self::tick`] wants to be called.
    #[must_use]
    pub fn deadline(&self) -> Option<Instant> {
        let qmp = self
            .qmp
            .as_ref()
            .filter(|_| !self.hung)
            .and_then(QmpClient::deadline);
        let ask = self.next_ask.map(|(at, _)| at);
        let balloon = self.give_back.deadline();
        [qmp, ask, self.reconnect_at, self.kill_by, balloon]
            .into_iter()
            .flatten()
            .min()
    }

    /// Does what is due.
    pub fn tick(&mut self, now: Now) {
        if let Some((at, tag)) = self.next_ask.filter(|(at, _)| *at <= now.mono) {
            self.next_ask = (tag == Tag::Health).then_some((at.max(now.mono) + HEALTH, tag));
            if tag != Tag::Health || self.qmp.as_ref().is_some_and(QmpClient::is_quiet) {
                self.send(now, tag, "query-status", Value::Null);
            }
        }
        self.tick_balloon(now);
        if self.reconnect_at.is_some_and(|at| at <= now.mono) {
            self.reconnect_at = None;
            self.half.put(Output::ConnectQmp);
        }
        if self.kill_by.is_some_and(|at| at <= now.mono) {
            self.kill_by = Some(now.mono + ANSWER);
            self.half.put(Output::Kill);
        }
        if let (false, Some(qmp)) = (self.hung, &self.qmp) {
            if let Some(error) = qmp.overdue(now.mono) {
                self.hung = true;
                self.fail(format!("the destination: {error}"), false);
            }
        }
    }
}
