//! One run as this sidecar takes part in it: its halves, the lease, and what the register said.
//!
//! Without I/O. After anything changed, [`Run::reconcile`] asks `commit` for every half what is to
//! be done, lets the half do it, and says what the register is to be asked. [`Run::deadline`] is
//! when it wants to be called again.

mod note;

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use uuid::Uuid;

use crate::commit::{self, Knowledge, Next};
use crate::hold::millis;
use crate::migration::destination::Destination;
use crate::migration::source::Source;
use crate::migration::{Half, Now, Output};
use crate::protocol::event::{Envelope, Event};
use crate::protocol::types::{Decision, Phase, RecordKey, RecordValue, Side, VmReport};

pub use note::NotePlace;

/// The coordinator is told to be silent after this time; it speaks every second.
const SILENCE: Duration = Duration::from_millis(2500);
/// The register is asked again after this time.
const ASK_AGAIN: Duration = Duration::from_millis(500);
/// The register owes an answer within this time.
const ASK_DEADLINE: Duration = Duration::from_secs(1);

/// One half of a VM's move.
#[derive(Debug)]
pub enum VmHalf {
    /// The VM leaves.
    Source(Box<Source>),
    /// The VM comes.
    Destination(Box<Destination>),
}

impl VmHalf {
    /// What both kinds have.
    #[must_use]
    pub fn half(&self) -> &Half {
        match self {
            Self::Source(source) => &source.half,
            Self::Destination(destination) => &destination.half,
        }
    }

    /// What both kinds have.
    pub fn half_mut(&mut self) -> &mut Half {
        match self {
            Self::Source(source) => &mut source.half,
            Self::Destination(destination) => &mut destination.half,
        }
    }

    /// The source, if it is one.
    pub fn source_mut(&mut self) -> Option<&mut Source> {
        match self {
            Self::Source(source) => Some(source),
            Self::Destination(_) => None,
        }
    }

    /// The destination, if it is one.
    pub fn destination_mut(&mut self) -> Option<&mut Destination> {
        match self {
            Self::Source(_) => None,
            Self::Destination(destination) => Some(destination),
        }
    }

    /// Says PREPARED again, if it is no longer preparing.
    pub fn tell_prepared(&mut self) {
        match self {
            _ if self.half().phase() == Phase::Preparing => {}
            Self::Source(source) => source.tell_prepared(),
            Self::Destination(destination) => destination.tell_prepared(),
        }
    }

    /// Does what is due.
    pub fn tick(&mut self, now: Now) {
        match self {
            Self::Source(source) => source.tick(now),
            Self::Destination(destination) => destination.tick(now),
        }
    }

    /// When [`Self::tick`] wants to be called.
    #[must_use]
    pub fn deadline(&self) -> Option<Instant> {
        match self {
            Self::Source(source) => source.deadline(),
            Self::Destination(destination) => destination.deadline(),
        }
    }

    /// The stream broke.
    pub fn stream_failed(&mut self, error: &str) {
        match self {
            Self::Source(source) => source.stream_failed(error),
            Self::Destination(destination) => destination.stream_failed(error),
        }
    }

    /// The process is gone.
    pub fn process_gone(&mut self, now: Now) {
        match self {
            Self::Source(source) => source.process_gone(now),
            Self::Destination(destination) => destination.process_gone(now),
        }
    }

    /// The monitor's connection ended or could not be made.
    pub fn qmp_closed(&mut self, now: Now, error: &str, process_alive: bool) {
        match self {
            Self::Source(source) => source.qmp_closed(now, error, process_alive),
            Self::Destination(destination) => destination.qmp_closed(now, error, process_alive),
        }
    }

    /// Something outside of QEMU failed for this half.
    pub fn fail(&mut self, error: &str) {
        match self {
            Self::Source(source) => source.fail(error, false),
            Self::Destination(destination) => destination.fail(error, false),
        }
    }

    fn next(&self, mut know: Knowledge) -> Next {
        match self {
            Self::Source(source) => {
                know.wants_out |= source.wants_out();
                commit::source_next(source.state(), know)
            }
            Self::Destination(destination) => {
                know.wants_out |= destination.wants_out();
                commit::destination_next(destination.state(), know)
            }
        }
    }

    fn perform(&mut self, now: Now, next: Next) {
        match self {
            Self::Source(source) => source.perform(now, next),
            Self::Destination(destination) => destination.perform(now, next),
        }
    }

    /// The report of this half.
    #[must_use]
    pub fn report(&self) -> VmReport {
        match self {
            Self::Source(source) => source.report(),
            Self::Destination(destination) => destination.report(),
        }
    }
}

/// A question to the register.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ask {
    /// Propose a record.
    Decide(RecordKey, RecordValue),
    /// Which records are there?
    Records,
}

/// What a run wants from the daemon.
#[derive(Debug)]
pub enum RunOutput {
    /// From the half with this index.
    Half(usize, Output),
    /// Tell the clients.
    Event(Event),
    /// Ask the register.
    Ask(Ask),
    /// Every half is final: the note goes.
    Ended,
}

/// One run. See the module.
#[derive(Debug)]
pub struct Run {
    /// The run.
    pub id: Uuid,
    /// The highest epoch seen.
    pub epoch: u64,
    /// Address of the register's sidecar.
    pub register: String,
    /// The coordinator's lease.
    pub lease: Duration,
    /// The group's downtime limit.
    pub max_downtime: Duration,
    /// Whether VMs are held until released.
    pub hold: bool,
    /// Interval of STATUS events.
    pub report_interval: Duration,
    /// The halves that are here.
    pub halves: Vec<VmHalf>,
    heard: Instant,
    lease_lost: bool,
    silence_told: bool,
    wants_out: bool,
    finished: Vec<String>,
    group: Option<Decision>,
    sides: BTreeMap<Uuid, Side>,
    seq: u64,
    next_report: Instant,
    asked: Option<(Instant, Ask)>,
    vouched: Vec<(RecordKey, RecordValue)>,
    ask_at: Instant,
    wants_answer: bool,
    failing_since: Option<Instant>,
    in_doubt: bool,
    ended: bool,
    events: Vec<Event>,
}

impl Run {
    /// A run without halves yet.
    #[must_use]
    pub fn new(now: Now, id: Uuid, epoch: u64, register: String, lease: Duration) -> Self {
        Self {
            id,
            epoch,
            register,
            lease,
            max_downtime: Duration::from_millis(300),
            hold: true,
            report_interval: Duration::from_millis(500),
            halves: Vec::new(),
            heard: now.mono,
            lease_lost: false,
            silence_told: false,
            wants_out: false,
            finished: Vec::new(),
            group: None,
            sides: BTreeMap::new(),
            seq: 0,
            next_report: now.mono,
            asked: None,
            vouched: Vec::new(),
            ask_at: now.mono,
            wants_answer: false,
            failing_since: None,
            in_doubt: false,
            ended: false,
            events: Vec::new(),
        }
    }

    /// Whether every half here is final.
    #[must_use]
    pub fn has_ended(&self) -> bool {
        self.ended
    }

    /// The group's decision, as far as it is known here.
    #[must_use]
    pub fn decision(&self) -> Option<Decision> {
        self.group
    }

    /// Whether a decision is needed and the register cannot be reached.
    #[must_use]
    pub fn is_in_doubt(&self) -> bool {
        self.in_doubt
    }

    /// The least advanced phase of the halves that are not final, or of all.
    #[must_use]
    pub fn phase(&self) -> Option<Phase> {
        let phases = || self.halves.iter().map(|half| half.half().phase());
        phases()
            .filter(|phase| !phase.is_final())
            .min()
            .or_else(|| phases().max())
    }

    /// Puts an event into its envelope.
    pub fn envelope(&mut self, now: Now, event: Event) -> Envelope {
        self.seq += 1;
        Envelope {
            run: self.id,
            seq: self.seq,
            at_us: now.unix_us,
            event,
        }
    }

    /// The coordinator spoke: its lease is renewed. A lost one stays lost.
    pub fn hear(&mut self, now: Now) {
        self.heard = now.mono;
        self.silence_told = false;
    }

    /// The coordinator's connection ended, or the sidecar was restarted: its lease ends now.
    pub fn lose_coordinator(&mut self, error: &str) {
        if self.ended || self.lease_lost {
            return;
        }
        self.lease_lost = true;
        self.events.push(Event::CoordinatorLost {
            error: error.to_owned(),
        });
    }

    /// `abort` was commanded.
    pub fn abort(&mut self) {
        self.wants_out = true;
    }

    /// `commit` was commanded, or an operator vouches for a record.
    pub fn learn(&mut self, key: RecordKey, value: RecordValue) {
        match (key, value) {
            (RecordKey::Group, RecordValue::Commit) => self.learn_group(Decision::Commit),
            (RecordKey::Group, RecordValue::Abort) => self.learn_group(Decision::Abort),
            (RecordKey::Vm(vm), RecordValue::Source) => {
                self.sides.entry(vm).or_insert(Side::Source);
            }
            (RecordKey::Vm(vm), RecordValue::Destination) => {
                self.sides.entry(vm).or_insert(Side::Destination);
            }
            _ => {}
        }
    }

    /// An operator vouches for a record: it is proposed to the register, and holds where that
    /// cannot be asked. From then on this run's own proposals hold there as well.
    pub fn vouch(&mut self, key: RecordKey, value: RecordValue) {
        self.vouched.retain(|(known, _)| *known != key);
        self.vouched.push((key, value));
    }

    fn knows(&self, key: RecordKey) -> bool {
        match key {
            RecordKey::Group => self.group.is_some(),
            RecordKey::Vm(vm) => self.sides.contains_key(&vm),
        }
    }

    fn learn_group(&mut self, decision: Decision) {
        if self.group.is_none() {
            self.group = Some(decision);
            self.events.push(Event::Decided { decision });
        }
    }

    /// `finish` was commanded for these VMs.
    pub fn finish(&mut self, vms: Vec<String>) {
        self.finished.extend(vms);
    }

    /// The register answered the question asked.
    pub fn answered(&mut self, now: Now, records: &[(RecordKey, RecordValue)]) {
        self.asked = None;
        self.failing_since = None;
        self.in_doubt = false;
        let before = (self.group, self.sides.len());
        for (key, value) in records {
            self.learn(*key, *value);
        }
        let news = before != (self.group, self.sides.len());
        self.ask_at = if news { now.mono } else { now.mono + ASK_AGAIN };
    }

    /// The register could not be asked.
    pub fn not_answered(&mut self, now: Now, error: &str) {
        let asked = self.asked.take();
        if let (Some((_, Ask::Decide(key, value))), false) = (asked, self.vouched.is_empty()) {
            self.answered(now, &[(key, value)]);
            return;
        }
        self.ask_at = now.mono + ASK_AGAIN;
        let since = *self.failing_since.get_or_insert(now.mono);
        if self.in_doubt || now.mono.saturating_duration_since(since) < ASK_AGAIN {
            return;
        }
        self.in_doubt = true;
        let error = format!(
            "the register at {} cannot be asked: {error}; the VMs stay as they are until it can \
             (or `muster recover --fenced HOST`)",
            self.register
        );
        for half in &mut self.halves {
            if half.half().phase() == Phase::Arrived {
                half.half_mut().enter(now, Phase::InDoubt);
            }
        }
        self.events.push(Event::InDoubt { error });
    }

    fn knowledge(&self, half: &Half) -> Knowledge {
        Knowledge {
            group: self.group,
            vm: self.sides.get(&half.uuid).copied(),
            wants_out: self.wants_out,
            lease_lost: self.lease_lost,
            destination_runs: self.finished.contains(&half.name),
        }
    }

    /// Does everything that can be done now.
    pub fn reconcile(&mut self, now: Now) -> Vec<RunOutput> {
        self.watch_lease(now);
        let mut outputs = Vec::new();
        let open = self.vouched.iter().find(|(key, _)| !self.knows(*key));
        let mut ask = open.map(|(key, value)| Ask::Decide(*key, *value));
        for index in 0..self.halves.len() {
            let know = self.knowledge(self.halves[index].half());
            let half = &mut self.halves[index];
            half.tick(now);
            let next = half.next(know);
            match next {
                Next::ProposeAbort => {
                    ask = ask.or(Some(Ask::Decide(RecordKey::Group, RecordValue::Abort)));
                }
                Next::Claim(side) => {
                    let value = match side {
                        Side::Source => RecordValue::Source,
                        Side::Destination => RecordValue::Destination,
                    };
                    ask = ask.or(Some(Ask::Decide(RecordKey::Vm(half.half().uuid), value)));
                }
                Next::AskAgain => {}
                next => half.perform(now, next),
            }
            let waits = next == Next::AskAgain;
            if waits && ask.is_none() {
                ask = Some(Ask::Records);
            }
            let taken = self.halves[index].half_mut().take_outputs();
            outputs.extend(
                taken
                    .into_iter()
                    .map(|output| RunOutput::Half(index, output)),
            );
        }
        self.wants_answer = ask.is_some();
        if let Some(ask) = ask.filter(|_| self.asked.is_none() && self.ask_at <= now.mono) {
            self.asked = Some((now.mono + ASK_DEADLINE, ask));
            outputs.push(RunOutput::Ask(ask));
        }
        self.finish_reports(now, &mut outputs);
        outputs
    }

    fn watch_lease(&mut self, now: Now) {
        let silent = now.mono.saturating_duration_since(self.heard);
        if self.ended || self.lease_lost {
            return;
        }
        if silent >= self.lease {
            let error = format!("no word from the coordinator for {} ms", millis(silent));
            self.lose_coordinator(&error);
        } else if silent >= SILENCE && !self.silence_told {
            self.silence_told = true;
            let error = format!(
                "no word from the coordinator for {} ms; its lease ends after {} ms",
                millis(silent),
                millis(self.lease)
            );
            self.events.push(Event::CoordinatorLost { error });
        }
    }

    fn finish_reports(&mut self, now: Now, outputs: &mut Vec<RunOutput>) {
        let events = std::mem::take(&mut self.events);
        outputs.extend(events.into_iter().map(RunOutput::Event));
        if self.ended || self.halves.is_empty() {
            return;
        }
        if self
            .halves
            .iter()
            .all(|half| half.half().phase().is_final())
        {
            self.ended = true;
            self.in_doubt = false;
            let vms = self.reports();
            outputs.push(RunOutput::Event(Event::RunEnded { vms }));
            outputs.push(RunOutput::Ended);
        } else if self.next_report <= now.mono {
            self.next_report = now.mono + self.report_interval;
            let vms = self.reports();
            outputs.push(RunOutput::Event(Event::Status { vms }));
        }
    }

    /// One report per half; the daemon adds what the relay knows.
    #[must_use]
    pub fn reports(&self) -> Vec<VmReport> {
        self.halves.iter().map(VmHalf::report).collect()
    }

    /// Whether the next report is to be made now.
    #[must_use]
    pub fn report_is_due(&self, now: Now) -> bool {
        self.next_report <= now.mono
    }

    /// Puts the next STATUS at `interval` from now on.
    pub fn set_report_interval(&mut self, now: Now, interval: Duration) {
        self.report_interval = interval;
        self.next_report = now.mono + interval;
    }

    /// When [`Self::reconcile`] wants to be called.
    #[must_use]
    pub fn deadline(&self) -> Option<Instant> {
        if self.ended {
            return None;
        }
        let lease = (!self.lease_lost).then(|| {
            let silence = if self.silence_told {
                self.lease
            } else {
                SILENCE.min(self.lease)
            };
            self.heard + silence
        });
        let ask = match self.asked {
            Some((by, _)) => Some(by),
            None => self.wants_answer.then_some(self.ask_at),
        };
        let halves = self.halves.iter().filter_map(VmHalf::deadline).min();
        [lease, ask, halves, Some(self.next_report)]
            .into_iter()
            .flatten()
            .min()
    }

    /// Whether the register's answer is overdue.
    #[must_use]
    pub fn ask_is_overdue(&self, now: Now) -> bool {
        self.asked.is_some_and(|(by, _)| by <= now.mono)
    }
}
