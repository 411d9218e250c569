//! Measuring how a VM dirties its memory: one measurement as a state machine without I/O.
//!
//! ```text
//! Starting ── a patched QEMU ──► stop a stale export ► pass the memfd, start ──► Measuring ─┐
//!     └────── stock QEMU ──────► calc-dirty-rate ◄──────── an interval is over ◄──┘         │
//! Over ◄── monitor closed ◄── dirty-log-export-stop answered, or 1 s later ◄── Ending ◄─────┘
//! ```
//!
//! A measurement holds the VM's monitor, of which there is one. Whoever else needs it is served
//! ([`Measurement::inquire`]) or has precedence ([`Measurement::end`]): what is measured never
//! keeps a VM from being moved.
//!
//! - [`log`](mod@log): what the export says.

mod disks;
pub mod log;
mod monitor;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use dirtylog::Pages;
use dirtylog::rate::DirtyRate;
use serde_json::json;

use crate::migration::Now;
use crate::migration::identity::{Identity, Question};
use crate::protocol::dirty::{
    DURATION_MS, DirtyEnd, DirtyEvent, DirtyPhase, DirtyRound, DirtySource, DirtyStartArgs,
    DirtyState, INTERVAL_MS,
};
use crate::qmp::QmpClient;
use disks::Disks;
use log::Look;

/// Name of the memfd at QEMU's monitor.
const LOG_FD: &str = "muster-dirty-log";
/// QEMU owes an answer for so long.
const ANSWER: Duration = Duration::from_secs(2);
/// A migration waits for the monitor while the export is stopped: not longer than this.
const STOP_WITHIN: Duration = Duration::from_secs(1);
/// How late an interval may be.
const LATE: Duration = Duration::from_secs(5);
/// `calc-dirty-rate` is asked this often whether it is done.
const LOOK_AGAIN: Duration = Duration::from_millis(50);
/// How many intervals mean and maximum of the rate are about.
const RATES: usize = 86_400;

/// What a command was sent for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tag {
    /// Who QEMU is.
    Ask(Question),
    /// What is exported, and whether it can be.
    Export,
    /// Nobody reads what is exported.
    StopStale,
    /// The memfd.
    Pass,
    /// The export.
    Start,
    /// Its end.
    Stop,
    /// `calc-dirty-rate`.
    Calculate,
    /// `query-dirty-rate`.
    Calculated,
    /// `query-block`.
    Disks,
    /// `block-dirty-bitmap-add`, `block-dirty-bitmap-clear`.
    Bitmap,
    /// `query-named-block-nodes`, for the counts of the bitmaps.
    Count,
    /// `block-dirty-bitmap-remove` of what an earlier measurement has left.
    RemoveStale,
    /// The same in the end.
    Remove,
}

/// What is to be done.
#[derive(Debug, Clone, PartialEq)]
pub enum Output {
    /// Tell the client that began the measurement.
    Event(DirtyEvent),
    /// Make the log for a VM with so much RAM, then call [`Measurement::log_opened`].
    OpenLog {
        /// Guest RAM in bytes.
        memory_bytes: u64,
    },
    /// Read the log no more.
    CloseLog,
    /// Who QEMU is, as asked by [`Measurement::inquire`].
    Identified(Box<Identity>),
    /// Close the monitor: it is over.
    Close,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum State {
    Starting,
    /// The log is being made.
    Opening,
    Exporting {
        /// An interval must be over by then.
        by: Instant,
    },
    Calculating {
        bitmap: bool,
        /// When to look; QEMU has accepted the calculation.
        look: Option<Instant>,
        /// It must be done by then.
        by: Instant,
    },
    Ending {
        by: Instant,
    },
    Over,
}

/// One measurement. See the module.
#[derive(Debug)]
pub struct Measurement {
    /// What was asked for.
    pub wanted: DirtyStartArgs,
    /// The client's side of the monitor; flush its output.
    pub qmp: QmpClient<Tag>,
    state: State,
    /// QEMU was told to export.
    exported: bool,
    /// QEMU calculates a rate that was asked for before.
    busy: bool,
    /// Whether QEMU can export, and does; once it has answered.
    export: Option<Option<String>>,
    identity: Identity,
    /// Complete once.
    identified: bool,
    /// Somebody else wants to know who QEMU is.
    inquiry: Option<Identity>,
    source: Option<DirtySource>,
    until: Option<Instant>,
    ending: Option<(DirtyEnd, Option<String>)>,
    /// Of `calc-dirty-rate`.
    rate: DirtyRate,
    rounds: u64,
    latest: Option<DirtyRound>,
    disks: Disks,
    /// It only removes what an earlier life of the sidecar has left.
    tidies: bool,
    outputs: VecDeque<Output>,
}

/// A figure as it stands in reports; at least 0.
#[allow(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "saturates, and nothing measured is negative"
)]
pub(crate) fn whole(value: f64) -> u64 {
    value.round() as u64
}

impl Measurement {
    /// A measurement whose monitor was just connected.
    #[must_use]
    pub fn new(now: Now, wanted: DirtyStartArgs) -> Self {
        Self {
            wanted,
            qmp: QmpClient::new(now.mono),
            state: State::Starting,
            exported: false,
            busy: false,
            export: None,
            identity: Identity::default(),
            identified: false,
            inquiry: None,
            source: None,
            until: None,
            ending: None,
            rate: DirtyRate::new(RATES),
            rounds: 0,
            latest: None,
            disks: Disks::default(),
            tidies: false,
            outputs: VecDeque::new(),
        }
    }

    /// Measures nothing: removes bitmaps that an earlier life of the sidecar has left in a VM's disks.
    #[must_use]
    pub fn tidy(now: Now, vm: &str) -> Self {
        let wanted = DirtyStartArgs {
            vm: vm.to_owned(),
            interval_ms: *INTERVAL_MS.start(),
            duration_ms: *DURATION_MS.start(),
            delays_ms: Vec::new(),
            heat_cells: 0,
            disks: true,
        };
        let mut this = Self::new(now, wanted);
        this.tidies = true;
        this
    }

    /// Whether it measures nothing, and gives way to a measurement.
    #[must_use]
    pub fn tidies(&self) -> bool {
        self.tidies
    }

    /// The next thing to do.
    pub fn poll_output(&mut self) -> Option<Output> {
        self.outputs.pop_front()
    }

    /// What `query-dirty` says.
    #[must_use]
    pub fn report(&self) -> DirtyState {
        DirtyState {
            vm: self.wanted.vm.clone(),
            phase: match self.state {
                State::Starting | State::Opening => DirtyPhase::Starting,
                State::Exporting { .. } | State::Calculating { .. } => DirtyPhase::Measuring,
                State::Ending { .. } | State::Over => DirtyPhase::Ending,
            },
            source: self.source,
            interval_ms: self.wanted.interval_ms,
            latest: self.latest.clone(),
        }
    }

    /// Whether it can be told anything any more.
    #[must_use]
    pub fn is_ending(&self) -> bool {
        matches!(self.state, State::Ending { .. } | State::Over)
    }

    /// Asks QEMU who it is, for somebody else; [`Output::Identified`] follows.
    pub fn inquire(&mut self, now: Now) {
        if self.inquiry.is_none() {
            // The questions of the beginning are answered first, and serve as well.
            self.inquiry = Some(Identity::new(self.identity.version.clone()));
            if self.identified {
                self.ask(now);
            }
        }
    }

    fn ask(&mut self, now: Now) {
        for question in Question::ALL {
            let (command, arguments) = question.command();
            self.send(now, Tag::Ask(question), command, arguments);
        }
    }

    fn send(&mut self, now: Now, tag: Tag, command: &str, arguments: serde_json::Value) {
        self.qmp.send(now.mono, tag, command, arguments, ANSWER);
    }

    /// The log was made: its descriptor goes with the next command that carries one.
    pub fn log_opened(&mut self, now: Now) {
        if self.state != State::Opening {
            return;
        }
        let name = json!({ "fdname": LOG_FD });
        self.qmp
            .send_with_descriptor(now.mono, Tag::Pass, "getfd", name, ANSWER);
        let interval = self.wanted.interval_ms;
        let arguments = json!({ "fdname": LOG_FD, "interval": interval });
        self.exported = true;
        self.send(now, Tag::Start, "dirty-log-export-start", arguments);
    }

    /// A look at the log found something.
    pub fn looked(&mut self, now: Now, look: Look) {
        if !matches!(self.state, State::Exporting { .. }) {
            return;
        }
        match look {
            Look::Nothing => {}
            Look::Migrating => self.end(
                now,
                DirtyEnd::Migration,
                Some("the VM is being migrated, and not by this sidecar".into()),
            ),
            Look::Round(round) => {
                self.expect_interval(now);
                self.tell_round(now, *round);
            }
        }
    }

    fn expect_interval(&mut self, now: Now) {
        let by = now.mono + self.interval() * 3 + LATE;
        self.state = State::Exporting { by };
    }

    fn interval(&self) -> Duration {
        Duration::from_millis(self.wanted.interval_ms)
    }

    fn tell_round(&mut self, now: Now, round: DirtyRound) {
        if let Some(round) = self.count_disks(now, round) {
            self.tell_whole(round);
        }
    }

    fn tell_whole(&mut self, round: DirtyRound) {
        self.latest = Some(round.clone());
        self.outputs
            .push_back(Output::Event(DirtyEvent::DirtyRound(round)));
    }

    /// An interval of `calc-dirty-rate`.
    fn calculated(&mut self, now: Now, bytes_per_s: u64) {
        let interval = self.interval();
        let dirtied = whole(interval.as_secs_f64() * bytes_per_s as f64);
        self.rounds += 1;
        self.rate.add(Pages(dirtied), interval);
        let rate = |rate: Option<dirtylog::rate::PagesPerSecond>| {
            rate.map_or(0, |rate| whole(rate.bytes_per_second(1)))
        };
        let round = DirtyRound {
            vm: self.wanted.vm.clone(),
            source: DirtySource::CalcDirtyRate,
            round: self.rounds,
            duration_us: u64::try_from(interval.as_micros()).unwrap_or(u64::MAX),
            missed: 0,
            dirtied_bytes: dirtied,
            dirty_rate_bytes_per_s: bytes_per_s,
            mean_dirty_rate_bytes_per_s: rate(self.rate.mean()),
            max_dirty_rate_bytes_per_s: rate(self.rate.max()),
            working_set_bytes: None,
            working_set_stable: None,
            predicted: Vec::new(),
            heat: None,
            disks: Vec::new(),
        };
        self.tell_round(now, round);
    }

    /// The first interval begins.
    fn begun(&mut self, now: Now, source: DirtySource, note: Option<String>) {
        self.source = Some(source);
        self.until = Some(now.mono + Duration::from_millis(self.wanted.duration_ms));
        let event = DirtyEvent::DirtyStarted {
            vm: self.wanted.vm.clone(),
            source,
            interval_ms: self.wanted.interval_ms,
            memory_bytes: self.identity.memory_bytes,
            note,
        };
        self.outputs.push_back(Output::Event(event));
        if self.wanted.disks {
            self.send(now, Tag::Disks, "query-block", serde_json::Value::Null);
        }
    }

    /// Ends it: QEMU is told to stop, and the monitor is free at most a second later.
    pub fn end(&mut self, now: Now, reason: DirtyEnd, error: Option<String>) {
        if self.is_ending() {
            return;
        }
        self.ending = Some((reason, error));
        self.leave_disks(now);
        if !self.exported && self.disks.are_left() {
            // A calculation ends by itself, and changes nothing.
            self.finish();
            return;
        }
        let by = now.mono + STOP_WITHIN;
        self.state = State::Ending { by };
        if !self.exported {
            return;
        }
        self.outputs.push_back(Output::CloseLog);
        self.send(
            now,
            Tag::Stop,
            "dirty-log-export-stop",
            serde_json::Value::Null,
        );
    }

    fn finish(&mut self) {
        if self.state == State::Over {
            return;
        }
        self.state = State::Over;
        let (reason, error) = self.ending.take().unwrap_or((DirtyEnd::Stopped, None));
        let event = DirtyEvent::DirtyEnded {
            vm: self.wanted.vm.clone(),
            reason,
            error,
        };
        self.outputs.push_back(Output::CloseLog);
        self.outputs.push_back(Output::Event(event));
        self.outputs.push_back(Output::Close);
    }

    /// Something broke: the log, or what reads it.
    pub fn fail(&mut self, now: Now, error: String) {
        self.end(now, DirtyEnd::Failed, Some(error));
    }

    /// QEMU, or the connection to it, is of no more use.
    pub fn closed(&mut self, error: &str) {
        if self.ending.is_none() {
            self.ending = Some((DirtyEnd::Failed, Some(error.to_owned())));
        }
        self.finish();
    }

    /// When [`Self::handle_timeout`] has to be called.
    #[must_use]
    pub fn deadline(&self) -> Option<Instant> {
        let state = match self.state {
            State::Starting | State::Opening | State::Over => None,
            State::Exporting { by } | State::Ending { by } => Some(by),
            State::Calculating { look, by, .. } => Some(look.map_or(by, |look| look.min(by))),
        };
        let until = self.until.filter(|_| !self.is_ending());
        [state, until, self.qmp.deadline()]
            .into_iter()
            .flatten()
            .min()
    }

    /// Does what is due.
    pub fn handle_timeout(&mut self, now: Now) {
        let is_due = |at: Instant| at <= now.mono;
        if self.state == State::Over {
            return;
        }
        if let State::Ending { by } = self.state {
            if is_due(by) {
                self.hangs("it does not answer when the measurement ends");
            }
            return;
        }
        if let Some(error) = self.qmp.overdue(now.mono) {
            // What was told last cannot be told again: the next measurement stops the export.
            self.hangs(&error.to_string());
            return;
        }
        if self.until.is_some_and(is_due) {
            self.end(now, DirtyEnd::Duration, None);
            return;
        }
        match self.state {
            State::Exporting { by } if is_due(by) => {
                let error = "QEMU has exported nothing for too long: it hangs".to_owned();
                self.fail(now, error);
            }
            State::Calculating { by, .. } if is_due(by) => {
                let error = "QEMU does not finish `calc-dirty-rate`: try again later".to_owned();
                self.fail(now, error);
            }
            State::Calculating {
                look: Some(look),
                bitmap,
                by,
            } if is_due(look) => {
                self.state = State::Calculating {
                    bitmap,
                    look: None,
                    by,
                };
                self.query(now);
            }
            _ => {}
        }
    }

    fn hangs(&mut self, error: &str) {
        let exports = if self.exported {
            "; the export may go on, until it is measured again"
        } else {
            ""
        };
        let text = format!("VM `{}`: {error}{exports}", self.wanted.vm);
        match &mut self.ending {
            Some((_, error)) => *error = Some(text),
            None => self.ending = Some((DirtyEnd::Failed, Some(text))),
        }
        self.finish();
    }
}
