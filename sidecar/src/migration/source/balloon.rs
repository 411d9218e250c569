//! The VM's balloon: what it wants said to QEMU, and when the memory may be copied.

use super::{AfterNote, Source, Tag};
use crate::commit::SourceHalf;
use crate::migration::{Now, Output};
use crate::protocol::types::Phase;

impl Source {
    /// What the destination is to give back to its guest, in bytes.
    #[must_use]
    pub fn taken_from(&self) -> Option<u64> {
        self.balloon.taken_from()
    }

    /// What is put back, for the note.
    #[must_use]
    pub fn balloon_kept(&self) -> Option<&crate::migration::balloon::Kept> {
        self.balloon.kept()
    }

    /// From the release on QEMU is left alone until the VM runs for good.
    fn leaves_balloon(&self) -> bool {
        matches!(
            self.half.phase(),
            Phase::Armed | Phase::Stopped | Phase::Switching | Phase::Arrived
        )
    }

    pub(super) fn balloon_deadline(&self) -> Option<std::time::Instant> {
        let deadline = self.balloon.deadline();
        deadline.filter(|_| !self.leaves_balloon())
    }

    pub(super) fn tick_balloon(&mut self, now: Now) {
        if self.balloon_deadline().is_some_and(|at| at <= now.mono) {
            if let Some(alarm) = self.balloon.tick(now.mono) {
                let vm = &self.half.name;
                let text = format!("VM `{vm}`: {alarm}");
                self.half.put(Output::Alarm { text, lasts: true });
            }
            self.drive_balloon(now);
        }
    }

    /// Sends what the balloon asks for, and does what it allows.
    pub(super) fn drive_balloon(&mut self, now: Now) {
        // An answer that was on its way may ask for something, too: that waits.
        if !self.leaves_balloon() {
            for ask in self.balloon.take_commands() {
                self.send(now, Tag::Balloon(ask.tag), ask.command, ask.arguments);
            }
        }
        if self.balloon.take_note() {
            self.after_note = Some(AfterNote::Balloon);
            self.half.put(Output::SaveNote);
        }
        let is_over = matches!(self.state, SourceHalf::RunsAgain { .. });
        let goes_on = self.started && !is_over && !self.wants_out;
        let before_memory = self.rounds.is_none() && !self.stream_opened;
        if goes_on && before_memory && self.balloon.has_begun() && self.balloon.is_done() {
            self.open_stream(now);
        }
        self.settle();
    }
}
