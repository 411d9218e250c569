//! What the engine knows of each VM: its two halves, and the measurements for the report.

use std::time::Duration;

use rate_limiter::BytesPerSecond;
use sidecar::protocol::types::{
    CopyMode, DiskReport, HoldReason, Phase, PhaseEntry, QemuBuild, Role, RoundReport, Side,
    VmReport,
};

use super::Member;
use super::throttle::Throttle;
use crate::application::VmId;
use crate::report::{BalloonMove, Sample};
use crate::scheduler::{self, allot::Moving};

/// At most so many samples are kept per VM; beyond it every second one is dropped.
const MAX_SAMPLES: usize = 4000;

/// How a half ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum End {
    /// Destination: it runs. Source: its process is gone.
    Committed,
    /// Source: it runs as before. Destination: its process is gone.
    RolledBack,
    /// Its QEMU is dead.
    Lost,
    /// Its sidecar never took part.
    NotBegun,
}

/// One end of a VM's move, as its sidecar reports it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Half {
    /// Last phase reported.
    pub phase: Option<Phase>,
    pub(super) prepared: bool,
    pub(super) arrived: bool,
    pub(super) failed: bool,
    pub(super) end: Option<End>,
}

/// A VM of the group while it moves.
#[derive(Debug, Clone)]
pub(super) struct VmRun {
    pub member: Member,
    pub source: Half,
    pub destination: Half,
    /// Where `start` sends the stream.
    pub stream: Option<String>,
    /// Whether `start` was sent.
    pub started: bool,
    /// Whether its memory follows its disks: `start` was sent for more than the disks.
    pub memory_started: bool,
    /// Every disk that moves with it was copied once.
    pub disks_copied: bool,
    /// What its disks have left, and how fast its guest writes to them.
    pub disks_left_bytes: u64,
    pub disk_rate_bytes_per_s: u64,
    /// Since when its guest writes to its disks nearly as fast as they are copied, and how it was
    /// slowed.
    pub hot_since: Option<Duration>,
    pub disk_limit_bytes_per_s: Option<u64>,
    /// Copied once; what follows waits for stage two.
    pub parked: bool,
    /// It was held while it was parked, and has to catch up.
    pub is_behind: bool,
    pub held: bool,
    pub armed: bool,
    pub stopped: bool,
    /// Its QEMU did not stop when it was released: too much would have been left.
    pub refused: bool,
    /// Of the source's QEMU.
    pub qemu_build: QemuBuild,
    pub finish_sent: bool,
    pub diverged: Option<Side>,
    pub remaining_bytes: u64,
    pub dirty_rate_bytes_per_s: u64,
    pub rate_bytes_per_s: u64,
    /// When the source made its last report: unix time in microseconds.
    pub reported_at_us: Option<i64>,
    /// For how long its stream had waited for the path by then.
    pub link_wait_ms: u64,
    /// What it had sent by then.
    pub reported_bytes: u64,
    pub round: u64,
    pub throttle_percent: u8,
    pub throttle: Throttle,
    pub memory_bytes: u64,
    /// As its QEMU at the destination has it; 0 while that is unknown.
    pub destination_memory_bytes: u64,
    pub transferred_bytes: u64,
    pub hold_reason: Option<HoldReason>,
    pub held_at_us: Option<i64>,
    pub rounds: Vec<RoundReport>,
    pub history: Vec<PhaseEntry>,
    pub samples: Vec<Sample>,
    pub remaining_at_release: Option<u64>,
    pub stopped_at_us: Option<i64>,
    pub resumed_at_us: Option<i64>,
    /// What was done with its balloon.
    pub balloon: Option<BalloonMove>,
    pub free_page_hint: bool,
    pub error: Option<String>,
}

/// A VM's state for the live display.
#[derive(Debug, Clone, PartialEq)]
pub struct VmProgress {
    /// Which VM of the application.
    pub vm: VmId,
    /// Its name.
    pub name: String,
    /// Phase at the source, or at the destination once it has arrived.
    pub phase: Option<Phase>,
    /// Pre-copy round.
    pub round: u64,
    /// Guest RAM in bytes.
    pub total_bytes: u64,
    /// Dirty or unsent memory in bytes.
    pub remaining_bytes: u64,
    /// Bytes of its stream so far.
    pub transferred_bytes: u64,
    /// Speed of its stream in bytes per second.
    pub rate_bytes_per_s: u64,
    /// Dirty rate in bytes per second.
    pub dirty_rate_bytes_per_s: u64,
    /// vCPU throttle in percent.
    pub throttle_percent: u8,
    /// Until it is ready to switch over, where that can be said.
    pub time_left: Option<Duration>,
    /// What went wrong.
    pub error: Option<String>,
}

impl VmRun {
    pub(super) fn new(member: Member) -> Self {
        let sizes = member.disks.iter().map(|disk| disk.size_bytes);
        Self {
            disks_left_bytes: sizes.fold(0, u64::saturating_add),
            disk_rate_bytes_per_s: 0,
            hot_since: None,
            disk_limit_bytes_per_s: None,
            memory_started: false,
            disks_copied: false,
            member,
            source: Half::default(),
            destination: Half::default(),
            stream: None,
            started: false,
            parked: false,
            is_behind: false,
            held: false,
            armed: false,
            stopped: false,
            refused: false,
            qemu_build: QemuBuild::Stock,
            finish_sent: false,
            diverged: None,
            remaining_bytes: 0,
            dirty_rate_bytes_per_s: 0,
            rate_bytes_per_s: 0,
            reported_at_us: None,
            link_wait_ms: 0,
            reported_bytes: 0,
            round: 0,
            throttle_percent: 0,
            throttle: Throttle::default(),
            memory_bytes: 0,
            destination_memory_bytes: 0,
            transferred_bytes: 0,
            hold_reason: None,
            held_at_us: None,
            rounds: Vec::new(),
            history: Vec::new(),
            samples: Vec::new(),
            remaining_at_release: None,
            stopped_at_us: None,
            resumed_at_us: None,
            balloon: None,
            free_page_hint: false,
            error: None,
        }
    }

    /// Whether local disks move with it.
    pub(super) fn has_disks(&self) -> bool {
        !self.member.disks.is_empty()
    }

    /// Whether its guest's writes wait for the copy of a disk.
    pub(super) fn is_write_blocking(&self) -> bool {
        let mut disks = self.member.disks.iter();
        disks.any(|disk| disk.copy_mode == CopyMode::WriteBlocking)
    }

    pub(super) fn half(&mut self, role: Role) -> &mut Half {
        match role {
            Role::Source => &mut self.source,
            Role::Destination => &mut self.destination,
        }
    }

    pub(super) fn arrived(&self) -> bool {
        let whole = |half: &Half| half.arrived && !half.failed && half.end.is_none();
        let source_lost = self.source.arrived && self.source.end == Some(End::Lost);
        (whole(&self.source) || source_lost) && whole(&self.destination)
    }

    pub(super) fn ended(&self) -> bool {
        self.source.end.is_some() && self.destination.end.is_some()
    }

    /// Where it runs, once that is known.
    pub(super) fn side(&self) -> Option<Side> {
        if let Some(side) = self.diverged {
            return Some(side);
        }
        if self.destination.end == Some(End::Committed) {
            return Some(Side::Destination);
        }
        match self.source.end {
            Some(End::RolledBack | End::NotBegun) => Some(Side::Source),
            _ => None,
        }
    }

    /// Held because it does not converge: what it sends is dirty again soon.
    pub(super) fn is_held_in_vain(&self) -> bool {
        let reason = self.hold_reason;
        self.held && matches!(reason, Some(HoldReason::Stalled | HoldReason::Bounded))
    }

    /// What the scheduler has to know of it now. What was foreseen stands in until it is measured.
    #[allow(clippy::cast_precision_loss, reason = "sizes and rates below 2^53")]
    pub(super) fn moving(&self) -> Moving {
        let known = &self.member.profile;
        let rate = |rate: Option<BytesPerSecond>| rate.map(|rate| rate.0 as f64);
        let mean = rate(known.dirty_rate).or(rate(known.max_dirty_rate).map(|most| most / 2.0));
        let nominal = mean.unwrap_or_default();
        let is_measured = self.started && (self.round > 0 || self.dirty_rate_bytes_per_s > 0);
        let dirty_rate = if is_measured {
            self.dirty_rate_bytes_per_s as f64
        } else {
            nominal
        };
        let untouched = self.round == 0 && self.remaining_bytes == 0;
        Moving {
            progress: match (self.started, self.held) {
                (_, true) => scheduler::allot::Progress::Held,
                (true, false) => scheduler::allot::Progress::Copying,
                (false, false) => scheduler::allot::Progress::Waiting,
            },
            left_bytes: if untouched && self.memory_bytes == 0 {
                known.memory.map_or(0.0, |memory| memory.0 as f64)
            } else if untouched {
                self.memory_bytes as f64
            } else {
                self.remaining_bytes as f64
            },
            dirty_rate,
            nominal_dirty_rate: nominal,
            max_dirty_rate: rate(known.max_dirty_rate)
                .unwrap_or(2.0 * nominal)
                .max(dirty_rate),
            working_set: known.writable_working_set.map(|size| size.0 as f64),
            in_vain: self.is_held_in_vain(),
        }
    }

    pub(super) fn add_round(&mut self, round: RoundReport) {
        self.round = self.round.max(round.round.saturating_add(1));
        if self
            .rounds
            .last()
            .is_none_or(|last| last.round < round.round)
        {
            self.rounds.push(round);
        }
    }

    /// Takes the measurements of a report.
    pub(super) fn measure(&mut self, at_us: i64, report: &VmReport) {
        self.half(report.role).phase = Some(report.phase);
        self.transferred_bytes = self.transferred_bytes.max(report.transferred_bytes);
        if report.role == Role::Destination {
            self.resumed_at_us = report.resumed_at_us.or(self.resumed_at_us);
            return;
        }
        self.memory_bytes = self.memory_bytes.max(report.total_bytes);
        self.round = report.round;
        self.rate_bytes_per_s = report.rate_bytes_per_s;
        if !report.disks.is_empty() {
            let sum = |value: fn(&DiskReport) -> u64| report.disks.iter().map(value).sum();
            self.disks_left_bytes = sum(|disk| disk.remaining_bytes);
            self.disk_rate_bytes_per_s = sum(|disk| disk.dirty_rate_bytes_per_s);
            self.disks_copied |= report.disks.iter().all(|disk| disk.ready);
        }
        self.reported_at_us = Some(at_us);
        self.reported_bytes = report.transferred_bytes;
        self.link_wait_ms = report.link_wait_ms;
        self.throttle_percent = report.throttle_percent;
        if !self.stopped {
            self.remaining_bytes = report.remaining_bytes;
            self.dirty_rate_bytes_per_s = report.dirty_rate_bytes_per_s;
        }
        if report.rounds.len() >= self.rounds.len() {
            self.rounds.clone_from(&report.rounds);
        }
        if report.history.len() >= self.history.len() {
            self.history.clone_from(&report.history);
        }
        self.stopped_at_us = report.stopped_at_us.or(self.stopped_at_us);
        self.remaining_at_release = report
            .remaining_at_release_bytes
            .or(self.remaining_at_release);
        if report.error.is_some() {
            self.error.clone_from(&report.error);
        }
        if self.samples.len() >= MAX_SAMPLES {
            let mut index = 0;
            self.samples.retain(|_| {
                index += 1;
                index % 2 == 1
            });
        }
        self.samples.push(Sample {
            at_us,
            phase: report.phase,
            round: report.round,
            remaining_bytes: report.remaining_bytes,
            rate_bytes_per_s: report.rate_bytes_per_s,
            dirty_rate_bytes_per_s: report.dirty_rate_bytes_per_s,
            transferred_bytes: report.transferred_bytes,
        });
    }

    /// Notes that the source entered `phase`, where no report has said so yet.
    pub(super) fn enter(&mut self, phase: Phase, at_us: i64) {
        self.source.phase = Some(phase);
        if self.history.iter().all(|entry| entry.phase != phase) {
            self.history.push(PhaseEntry { phase, at_us });
        }
    }

    pub(super) fn progress(&self) -> VmProgress {
        let net = self
            .rate_bytes_per_s
            .saturating_sub(self.dirty_rate_bytes_per_s);
        let copying = self.source.phase == Some(Phase::Precopy) && !self.held;
        let time_left = (copying && net > 0 && self.remaining_bytes > 0)
            .then(|| Duration::from_millis(self.remaining_bytes.saturating_mul(1000) / net));
        let phase = match self.destination.phase {
            Some(Phase::Committed | Phase::Committing) => self.destination.phase,
            _ => self.source.phase.or(self.destination.phase),
        };
        VmProgress {
            vm: self.member.vm,
            name: self.member.name.clone(),
            phase,
            round: self.round,
            total_bytes: self.memory_bytes,
            remaining_bytes: self.remaining_bytes,
            transferred_bytes: self.transferred_bytes,
            rate_bytes_per_s: self.rate_bytes_per_s,
            dirty_rate_bytes_per_s: self.dirty_rate_bytes_per_s,
            throttle_percent: self.throttle_percent,
            time_left,
            error: self.error.clone(),
        }
    }
}
