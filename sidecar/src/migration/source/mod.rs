//! The source's half of a move: QEMU through pre-copy, hold, release and stop-and-copy.
//!
//! ```text
//! preparing → prepared → precopy → held ⇄ armed → stopped → switching → arrived → committed
//!                 └──────────── anything wrong ────────────┴─► rolling-back → rolled-back
//! ```
//!
//! Stock QEMU is held by keeping its SWITCHOVER_ACK in the relay; `release` lets it through. The
//! release then pauses the VM (`pause-before-switchover`), `continue` lets it go on. A patched QEMU
//! holds, arms and releases by itself (`own_hold`), and can go `back` from `stopped` to `held`.
//!
//! Local disks are mirrored first, then memory is copied; `continue` ends the mirrors before it
//! lets the VM go on (`disks`).

mod balloon;
mod disks;
mod monitor;
mod own_hold;
mod settle;
mod setup;
mod steps;

use std::time::{Duration, Instant};

use serde_json::Value;

use super::balloon::inflate::Balloon;
use super::balloon::{self as ballooning, Kept};
use super::disks::source::{self as mirror, Mirrors};
use super::identity::{HoldBy, Identity, Question};
use super::{HEALTH, Half, Now, Output};
use crate::commit::SourceHalf;
use crate::hold::{HoldPacer, Rounds, Sample};
use crate::protocol::command::{PrepareBalloon, PrepareDisk, Termination};
use crate::protocol::types::{Phase, Role, Transport, VmReport};
use crate::qmp::QmpClient;
use settle::Continuing;

/// How often a migration is looked at.
const POLL: Duration = Duration::from_millis(100);
/// … while armed, and just after.
const QUICK_POLL: Duration = Duration::from_millis(10);
/// After the migration ended and the VM's run state does not tell it yet.
const LOOK_AGAIN: Duration = Duration::from_millis(1);
/// How long QEMU may take to answer anything but in stop-and-copy.
const ANSWER: Duration = Duration::from_secs(2);
/// After `arm`, what remains is reported once QEMU has synchronised so often: one that was paced
/// sleeps for up to 100 ms first, and what it showed before does not count what is dirty since.
const ARM_SYNCS: u64 = 2;
/// … or after this time.
const ARM_TIME: Duration = Duration::from_millis(500);
/// QEMU pauses within this time after a release.
const RELEASE_DEADLINE: Duration = Duration::from_secs(2);
/// Stop-and-copy may take three times what is predicted, and so much more.
const SWITCH_SLACK: Duration = Duration::from_millis(1500);
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
    /// What is held in vain goes on sending what it dirties.
    pub resend: bool,
    /// Allow throttling.
    pub throttle: bool,
    /// multifd channels, 0 for none.
    pub multifd_channels: u8,
    /// When pre-copy ends.
    pub termination: Termination,
    /// How the stream goes.
    pub transport: Transport,
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
    /// `getfd`.
    Handover,
    /// `migrate`.
    Start,
    /// `closefd` after a `migrate` that was refused.
    TakeBack,
    /// `query-status`, periodically, until pre-copy begins.
    Health,
    /// `query-migrate`, periodically.
    Poll,
    /// `query-migrate` just after the VM was paused.
    Paused,
    /// A parameter changed on the way.
    Tune,
    /// Full speed before a release.
    Arm,
    /// `migrate-switchover-arm` off.
    Disarm,
    /// `migrate-switchover-release`.
    Release,
    /// `migrate-switchover-back`.
    Back,
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
    /// One of the commands of the disks' mirrors.
    Disk(mirror::Tag),
    /// One of the balloon's commands.
    Balloon(ballooning::Tag),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum AfterNote {
    Configure,
    Start,
    Balloon,
    Arm,
}

/// The host's program that is run before the VM may be paused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Hook {
    Wanted,
    Running,
    /// It has run, or there is none.
    Done,
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
    /// What QEMU has sent and the destination's host has not taken, kept up to date by the daemon:
    /// QEMU's own account of what remains is without it.
    pub in_flight_bytes: u64,
    /// What is put back afterwards: capabilities and parameters as found.
    pub originals: Option<(Value, Value)>,
    /// Whether the guest ran before the move (else it stays paused after it).
    pub was_running: bool,
    settings: Settings,
    hold: HoldBy,
    /// `hold` was commanded, and QEMU has been asked to.
    hold_asked: bool,
    /// `back` was commanded, and QEMU is on its way.
    going_back: bool,
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
    /// `cont` was refused.
    continuing: Option<Continuing>,
    pacer: Option<HoldPacer>,
    /// Since when it is armed, and how often QEMU had synchronised when that was first looked at.
    armed_at: Option<(Instant, Option<u64>)>,
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
    mirrors: Mirrors,
    balloon: Balloon,
    /// Every disk is mirrored, and the stream of the memory was asked for.
    stream_opened: bool,
    /// DISKS_COPIED was told.
    disks_copied: bool,
    /// The hook before the switchover.
    hook: Hook,
    /// `continue` was commanded, and the mirrors copy their rest.
    draining: bool,
    /// The VM is paused, this much memory remains; how much of the disks is being asked.
    pausing: Option<u64>,
}

impl Source {
    /// Begins to prepare a VM that runs here.
    #[must_use]
    pub fn new(now: Now, name: String, uuid: uuid::Uuid, settings: Settings) -> Self {
        let mut half = Half::new(now, name, uuid, Role::Source);
        half.put(Output::ConnectQmp);
        half.transport = settings.transport;
        Self {
            half,
            qmp: None,
            rate_bytes_per_s: 0,
            in_flight_bytes: 0,
            originals: None,
            was_running: true,
            settings,
            hold: HoldBy::Nobody,
            hold_asked: false,
            going_back: false,
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
            continuing: None,
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
            mirrors: Mirrors::new(&[]),
            balloon: Balloon::new(None),
            stream_opened: false,
            disks_copied: false,
            hook: Hook::Done,
            draining: false,
            pausing: None,
        }
    }

    /// With local disks that move with it.
    #[must_use]
    pub fn with_disks(mut self, disks: &[PrepareDisk]) -> Self {
        self.mirrors = Mirrors::new(disks);
        self
    }

    /// With memory that is taken from its guest while it moves.
    #[must_use]
    pub fn with_balloon(mut self, wish: Option<PrepareBalloon>) -> Self {
        self.balloon = Balloon::new(wish);
        self
    }

    /// Taken over with memory that an earlier life may have taken from its guest.
    #[must_use]
    pub fn with_adopted_balloon(mut self, kept: Option<Kept>) -> Self {
        self.balloon = Balloon::adopt(kept);
        self
    }

    /// With a hook that is run before the VM may be paused.
    #[must_use]
    pub fn with_hook(mut self, has_hook: bool) -> Self {
        if has_hook {
            self.hook = Hook::Wanted;
        }
        self
    }

    /// Taken over with local disks that an earlier life may have mirrored.
    #[must_use]
    pub fn with_adopted_disks(mut self, nodes: &[String]) -> Self {
        self.mirrors = Mirrors::adopt(nodes);
        self
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

    /// Whether the relay keeps this VM's acknowledgement back until the release.
    #[must_use]
    pub fn is_held_by_relay(&self) -> bool {
        self.hold == HoldBy::Relay
    }

    /// Whether it is to have its full share of the bandwidth, whatever it uses of it now.
    #[must_use]
    pub fn is_urgent(&self) -> bool {
        self.half.phase() == Phase::Switching
    }

    /// Whether it is to stop at any moment, or has stopped and waits for the others.
    #[must_use]
    pub fn is_about_to_stop(&self) -> bool {
        matches!(self.half.phase(), Phase::Armed | Phase::Stopped)
    }

    /// Whether all of its stream has been taken.
    #[must_use]
    pub fn has_completed(&self) -> bool {
        matches!(self.state, SourceHalf::Completed | SourceHalf::Quit)
    }

    /// The report of this half.
    #[must_use]
    pub fn report(&self) -> VmReport {
        let mut report = self.half.report();
        report.qemu_build = self.identity.build();
        if let Some(sample) = self.last {
            report.remaining_bytes = self.left_bytes(sample.remaining_bytes);
            report.dirty_rate_bytes_per_s = sample.dirty_rate_bytes_per_s;
        }
        if self.last.is_none() && self.half.phase() == Phase::Precopy && !self.mirrors.is_empty() {
            report.remaining_bytes = self.left_bytes(report.total_bytes);
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
        report.disks = self.mirrors.reports();
        report.balloon = self.balloon.report();
        report.free_page_hint = self.balloon.has_free_page_hint();
        report.remaining_at_release_bytes = self.remaining_at_release;
        report
    }

    /// What the link still has to carry, if QEMU says that `remaining_bytes` remain.
    fn left_bytes(&self, remaining_bytes: u64) -> u64 {
        remaining_bytes
            .saturating_add(self.in_flight_bytes)
            .saturating_add(self.mirrors.left_bytes())
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
        self.mirrors.reconnected(now.mono);
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
            self.continuing.and_then(|again| again.at),
            self.release_by,
            self.switch_by,
            self.reconnect_at,
            quitting,
            self.mirrors.deadline(),
            self.balloon_deadline(),
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
        self.continue_again(now);
        if self.next_poll.is_some_and(|at| at <= now.mono) {
            let (interval, tag, command) = match self.half.phase() {
                Phase::Prepared => (HEALTH, Tag::Health, "query-status"),
                Phase::Armed => (QUICK_POLL, Tag::Poll, "query-migrate"),
                _ => (POLL, Tag::Poll, "query-migrate"),
            };
            self.next_poll = Some(now.mono + interval);
            if self.qmp.as_ref().is_some_and(QmpClient::is_quiet) {
                self.send(now, tag, command, Value::Null);
            }
        }
        if self.reconnect_at.is_some_and(|at| at <= now.mono) {
            self.reconnect_at = None;
            self.half.put(Output::ConnectQmp);
        }
        self.tick_disks(now);
        self.tick_balloon(now);
        if self.release_by.is_some_and(|at| at <= now.mono) {
            self.release_by = None;
            let text = if self.going_back {
                "QEMU did not hold the VM again within 2 s after it was sent back"
            } else {
                "QEMU did not pause the VM within 2 s after its release"
            };
            self.fail(text, false);
        }
        if self.switch_by.is_some_and(|at| at <= now.mono) {
            self.switch_by = None;
            if self.draining {
                self.fail(
                    "what was left of its disks takes far longer than predicted",
                    false,
                );
                return;
            }
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
