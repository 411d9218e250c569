//! Gives back, to a guest that runs here, what was taken from it at the source.

use super::{Destination, Tag};
use crate::migration::balloon::Kept;
use crate::migration::{Now, Output};
use crate::protocol::types::BalloonReport;
use crate::relay::hello::Hello;

impl Destination {
    /// With a balloon that an earlier life of this sidecar knew of.
    #[must_use]
    pub fn with_adopted_balloon(mut self, kept: Option<Kept>) -> Self {
        self.balloon = kept;
        self
    }

    /// The hello of its stream came; whether it says something that the note does not.
    pub fn greeted(&mut self, hello: &Hello) -> bool {
        let before = (self.was_running, self.balloon.clone());
        self.was_running = hello.guest_runs;
        if let Some(bytes) = hello.balloon_bytes {
            // A balloon never leaves more than there is.
            let before_bytes = bytes.min(self.half.total_bytes);
            self.balloon = (before_bytes > 0).then_some(Kept {
                before_bytes,
                polling: None,
            });
        }
        before != (self.was_running, self.balloon.clone())
    }

    /// Its guest runs.
    pub(super) fn give_back(&mut self, now: Now) {
        if let Some(kept) = self.balloon.clone() {
            self.give_back.start(now.mono, kept);
            self.drive_balloon(now);
        }
    }

    pub(super) fn tick_balloon(&mut self, now: Now) {
        if let Some(alarm) = self.give_back.tick(now.mono) {
            let vm = &self.half.name;
            let text = format!("VM `{vm}`: {alarm}");
            self.half.put(Output::Alarm { text, lasts: true });
        }
        self.drive_balloon(now);
    }

    fn drive_balloon(&mut self, now: Now) {
        for ask in self.give_back.take_commands() {
            self.send(now, Tag::Balloon(ask.tag), ask.command, ask.arguments);
        }
    }

    pub(super) fn balloon_report(&self) -> Option<BalloonReport> {
        let kept = self.balloon.as_ref()?;
        Some(BalloonReport {
            before_bytes: kept.before_bytes,
            during_bytes: None,
            took_ms: 0,
            given_back: self.give_back.is_done(),
            notice: self.give_back.failure().map(str::to_owned),
        })
    }
}
