//! The atomic commit, as pure functions: what each half of a VM may do next.
//!
//! A half knows its own QEMU and what the register has told it. From that alone [`source_next`]
//! and [`destination_next`] say what to do; the daemon does it and asks again after every change.
//! The rules (docs/failure-modes.md has them with their reasons):
//!
//! - A source that has not completed may take itself back: its VM then never arrives, and
//!   `commit` is recorded only when every half has arrived.
//! - Once it may have completed, only a record ends it. A lost lease proposes `abort`; the answer
//!   counts.
//! - A completed source is continued only under the record `source` for its VM; the destination's
//!   copy of such a VM is killed only under the same record, and continued only under `commit` or
//!   the record `destination`. The register holds one record per VM, written once: so never both.
//!
//! `tests` walks every interleaving of these functions with crashes of each process.

use crate::protocol::types::{Decision, Side};

/// What is known of the source's QEMU.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum SourceHalf {
    /// It runs, and cannot complete by itself: `continue` was not sent.
    Reversible,
    /// It may complete at any moment.
    Released,
    /// QEMU said completed and postmigrate: paused, its memory intact.
    Completed,
    /// The migration failed or was cancelled, or a completed VM was continued: it runs here.
    RunsAgain {
        /// Whether the destination may hold a complete copy.
        was_released: bool,
    },
    /// Its process is gone without our doing.
    Dead {
        /// Whether the destination may hold a complete copy.
        was_released: bool,
    },
    /// We quit it after its destination ran.
    Quit,
}

/// What is known of the destination's QEMU.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DestinationHalf {
    /// The sidecar was restarted and has not asked it yet: anything from loading to running.
    Unknown,
    /// It has not received everything.
    Loading,
    /// The stream broke before it had everything.
    Broken,
    /// QEMU said completed and paused.
    Loaded,
    /// `cont` was sent, or may have been (after a restart of the sidecar).
    ContSent,
    /// It runs.
    Running,
    /// Its process is gone without our doing.
    Dead {
        /// Whether `cont` was sent or may have been.
        cont_sent: bool,
    },
    /// We killed it.
    Killed,
}

/// What a half knows of the run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Knowledge {
    /// The group's record.
    pub group: Option<Decision>,
    /// The record of this VM.
    pub vm: Option<Side>,
    /// `abort` was commanded, or this half failed.
    pub wants_out: bool,
    /// The coordinator's lease ended.
    pub lease_lost: bool,
    /// `finish` was commanded for this VM: its destination runs.
    pub destination_runs: bool,
}

impl Knowledge {
    fn is_over(self) -> bool {
        self.wants_out || self.lease_lost
    }
}

/// What to do next. Everything is repeated until it has had its effect.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Next {
    /// Nothing to do until something changes.
    Wait,
    /// Ask the register for its records again after a while.
    AskAgain,
    /// Cancel the migration; the source runs on.
    Cancel,
    /// Propose `abort` for the group to the register.
    ProposeAbort,
    /// Propose the side on which this VM ends.
    Claim(Side),
    /// Continue the source.
    Resume,
    /// Continue the destination.
    Cont,
    /// Quit the source: its destination runs.
    Quit,
    /// Kill the destination's process.
    Kill,
    /// Final: see [`End`].
    End(End),
}

/// How a half ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum End {
    /// The VM runs at its destination, with its group.
    Committed,
    /// The VM runs at its source, with its group.
    RolledBack,
    /// The VM runs on `Side`, unlike its group: the other copy died.
    Diverged(Side),
    /// This half is lost.
    Lost,
}

/// What the source's half does next.
#[must_use]
pub fn source_next(half: SourceHalf, know: Knowledge) -> Next {
    use SourceHalf as S;
    match half {
        S::Reversible => match know.is_over() || know.group == Some(Decision::Abort) {
            true => Next::Cancel,
            false => Next::Wait,
        },
        // Cancelling is safe even here: it either comes before the completion, and then this half
        // never arrives, or too late, and then it changes nothing.
        S::Released => match know.group {
            Some(Decision::Abort) => Next::Cancel,
            None if know.wants_out => Next::Cancel,
            None if know.lease_lost => Next::ProposeAbort,
            None | Some(Decision::Commit) => Next::Wait,
        },
        S::Completed => match (know.group, know.vm) {
            (None, _) if know.is_over() => Next::ProposeAbort,
            (None, _) => Next::Wait,
            (Some(_), Some(Side::Source)) => Next::Resume,
            (Some(_), Some(Side::Destination)) => Next::Quit,
            (Some(Decision::Abort), None) => Next::Claim(Side::Source),
            (Some(Decision::Commit), None) if know.destination_runs => Next::Quit,
            (Some(Decision::Commit), None) => Next::AskAgain,
        },
        // The record lets the destination's sidecar kill a copy that is complete.
        S::RunsAgain { was_released: true } if know.vm.is_none() => Next::Claim(Side::Source),
        S::RunsAgain { .. } => match know.group {
            Some(Decision::Commit) => Next::End(End::Diverged(Side::Source)),
            _ => Next::End(End::RolledBack),
        },
        S::Dead {
            was_released: false,
        } => Next::End(End::Lost),
        S::Dead { was_released: true } => match (know.group, know.vm) {
            (Some(Decision::Commit), Some(Side::Source)) => Next::End(End::Lost),
            (Some(Decision::Commit), _) => Next::End(End::Committed),
            // Whether the other copy is whole, and runs, is the destination's to say.
            (Some(Decision::Abort), Some(_)) => Next::End(End::Lost),
            (Some(Decision::Abort), None) => Next::Claim(Side::Destination),
            (None, _) if know.is_over() => Next::ProposeAbort,
            (None, _) => Next::AskAgain,
        },
        S::Quit => match know.group {
            Some(Decision::Abort) => Next::End(End::Diverged(Side::Destination)),
            _ => Next::End(End::Committed),
        },
    }
}

/// What the destination's half does next.
#[must_use]
pub fn destination_next(half: DestinationHalf, know: Knowledge) -> Next {
    use DestinationHalf as D;
    match half {
        D::Unknown => Next::Wait,
        D::Loading => match know.group {
            Some(Decision::Abort) => Next::Kill,
            None if know.wants_out => Next::Kill,
            None if know.lease_lost => Next::ProposeAbort,
            None | Some(Decision::Commit) => Next::Wait,
        },
        D::Broken => Next::Kill,
        D::Loaded => match (know.group, know.vm) {
            (None, _) if know.is_over() => Next::ProposeAbort,
            (None, _) => Next::Wait,
            (Some(_), Some(Side::Source)) => Next::Kill,
            (Some(_), Some(Side::Destination)) | (Some(Decision::Commit), None) => Next::Cont,
            (Some(Decision::Abort), None) => Next::AskAgain,
        },
        D::ContSent => Next::Wait,
        D::Running => match (know.group, know.vm) {
            (_, None) => Next::Claim(Side::Destination),
            (Some(Decision::Abort), Some(_)) => Next::End(End::Diverged(Side::Destination)),
            (_, Some(_)) => Next::End(End::Committed),
        },
        D::Dead { cont_sent: true } => match (know.group, know.vm) {
            // Nobody recorded a commit, or this VM stayed: its `cont` was not sent after all.
            (Some(Decision::Abort), Some(Side::Source) | None) => Next::End(End::RolledBack),
            (None, _) if know.is_over() => Next::ProposeAbort,
            (None, _) => Next::AskAgain,
            (Some(Decision::Commit), None) => Next::Claim(Side::Destination),
            (Some(_), Some(_)) => Next::End(End::Lost),
        },
        D::Dead { cont_sent: false } => match (know.group, know.vm) {
            (Some(Decision::Commit), None) => Next::Claim(Side::Source),
            (Some(Decision::Commit), Some(Side::Source)) => Next::End(End::Diverged(Side::Source)),
            (Some(Decision::Abort), Some(Side::Source) | None) => Next::End(End::RolledBack),
            (Some(_), Some(Side::Destination)) => Next::End(End::Lost),
            (None, _) if know.is_over() => Next::ProposeAbort,
            (None, _) => Next::AskAgain,
        },
        D::Killed => match know.group {
            Some(Decision::Commit) => Next::End(End::Diverged(Side::Source)),
            _ => Next::End(End::RolledBack),
        },
    }
}

#[cfg(test)]
mod tests;
