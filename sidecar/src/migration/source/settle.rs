//! The way out: what `commit` says is done here, and what was changed is put back.

use serde_json::Value;

use super::{ANSWER, Source, Tag};
use crate::commit::{Next, SourceHalf};
use crate::migration::{Now, Output};
use crate::protocol::types::Phase;

impl Source {
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
