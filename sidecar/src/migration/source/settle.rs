//! The way out: what `commit` says is done here, and what was changed is put back.

use std::time::{Duration, Instant};

use serde_json::Value;

use super::{ANSWER, Source, Tag};
use crate::commit::{Next, SourceHalf};
use crate::migration::{Now, Output};
use crate::protocol::types::Phase;

/// `cont` that was refused is said again after this time …
const AGAIN: Duration = Duration::from_millis(5);
/// … and, when that has been of no use for long enough to be told, after this one.
const AGAIN_LATER: Duration = Duration::from_secs(1);

/// A VM that QEMU does not let go on yet.
#[derive(Debug, Clone, Copy)]
pub(super) struct Continuing {
    /// When `cont` is said again; nothing while its answer is awaited.
    pub(super) at: Option<Instant>,
    /// When somebody is to be told, if nobody was.
    alarm_at: Option<Instant>,
}

impl Source {
    /// QEMU says that a migration has failed a moment before the VM leaves `finish-migrate`, and until
    /// then it may not be continued (`qmp_cont` in monitor/qmp-cmds.c).
    pub(super) fn continue_refused(&mut self, now: Now, error: &str) {
        let again = self.continuing.get_or_insert(Continuing {
            at: None,
            alarm_at: Some(now.mono + ANSWER),
        });
        let is_late = again.alarm_at.is_none_or(|at| at <= now.mono);
        again.at = Some(now.mono + if is_late { AGAIN_LATER } else { AGAIN });
        if is_late && again.alarm_at.take().is_some() {
            let vm = &self.half.name;
            let text = format!(
                "VM `{vm}` is paused and is to run here, but QEMU does not continue it ({error}): see \
                 its log; it is tried every second"
            );
            self.half.put(Output::Alarm { text, lasts: false });
            self.fail(format!("the source cannot be continued: {error}"), false);
        }
    }

    pub(super) fn continue_again(&mut self, now: Now) {
        let due = |again: &mut Continuing| again.at.take_if(|at| *at <= now.mono);
        if self.continuing.as_mut().and_then(due).is_some() {
            self.send(now, Tag::Resume, "cont", Value::Null);
        }
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
            Next::End(end) if self.settled => self.half.end(now, end),
            _ => {}
        }
    }

    pub(super) fn cancel(&mut self, now: Now) {
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
    pub(super) fn runs_again(&mut self, now: Now) {
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
        let originals = self.originals.take().filter(|_| self.qmp.is_some());
        if let Some((capabilities, parameters)) = originals {
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
        self.draining = false;
        self.mirrors.abandon(now.mono);
        self.balloon.give_back(now.mono);
        self.drive_disks(now);
        self.drive_balloon(now);
        self.settle();
    }

    pub(super) fn restored(&mut self) {
        self.restoring = self.restoring.saturating_sub(1);
        self.settle();
    }

    /// Whether everything is as it was found.
    pub(super) fn settle(&mut self) {
        let is_back = matches!(self.state, SourceHalf::RunsAgain { .. });
        let no_mirrors = self.mirrors.are_gone() || self.qmp.is_none();
        self.settled |= is_back && self.restoring == 0 && no_mirrors && self.balloon.is_settled();
    }
}
