//! Gives a guest's memory back, again and again until QEMU takes it.

use std::time::{Duration, Instant};

use super::{Ask, Kept, Tag, balloon, set_polling};

/// QEMU answers within this time, or is asked again.
const ANSWER: Duration = Duration::from_secs(2);
/// After a refusal.
const AGAIN: Duration = Duration::from_secs(1);
/// So often; then it is left to a person.
const TRIES: u8 = 8;

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
enum State {
    #[default]
    Idle,
    /// Asked, or to be asked, again then.
    Due(Instant),
    Done,
    Failed,
}

/// The machine.
#[derive(Debug, Default)]
pub struct GiveBack {
    kept: Option<Kept>,
    state: State,
    tries: u8,
    error: Option<String>,
    commands: Vec<Ask<Tag>>,
}

impl GiveBack {
    /// Begins, once.
    pub fn start(&mut self, now: Instant, kept: Kept) {
        if self.state == State::Idle {
            self.kept = Some(kept);
            self.ask(now);
        }
    }

    fn ask(&mut self, now: Instant) {
        if let Some(kept) = &self.kept {
            self.tries += 1;
            self.state = State::Due(now + ANSWER);
            if let Some((device, seconds)) = &kept.polling {
                self.commands.push(set_polling(device, *seconds));
            }
            self.commands.push(balloon(Tag::Back, kept.before_bytes));
        }
    }

    /// QEMU has taken it: the guest's driver does the rest by itself.
    pub fn replied(&mut self) {
        if matches!(self.state, State::Due(_)) {
            self.state = State::Done;
            self.error = None;
        }
    }

    /// QEMU has not.
    pub fn refused(&mut self, now: Instant, error: &str) {
        if matches!(self.state, State::Due(_)) {
            self.error = Some(error.to_owned());
            self.state = State::Due(now + AGAIN);
        }
    }

    /// The process is gone, and its memory with it.
    pub fn abandon(&mut self) {
        if matches!(self.state, State::Due(_)) {
            self.state = State::Failed;
        }
    }

    /// When [`Self::tick`] wants to be called.
    #[must_use]
    pub fn deadline(&self) -> Option<Instant> {
        match self.state {
            State::Due(at) => Some(at),
            _ => None,
        }
    }

    /// Does what is due; an alarm where it is given up.
    pub fn tick(&mut self, now: Instant) -> Option<String> {
        if self.deadline().is_none_or(|at| at > now) {
            return None;
        }
        if self.tries < TRIES {
            self.ask(now);
            return None;
        }
        self.state = State::Failed;
        let bytes = self.kept.as_ref().map_or(0, |kept| kept.before_bytes);
        let why = self.error.as_deref().unwrap_or("its QEMU did not answer");
        let text = format!(
            "its memory could not be given back ({why}): say `balloon` with value {bytes} on its \
             monitor"
        );
        self.error = Some(text.clone());
        Some(text)
    }

    /// Whether nothing is to be done (any more).
    #[must_use]
    pub fn is_settled(&self) -> bool {
        !matches!(self.state, State::Due(_))
    }

    /// Whether QEMU has taken it.
    #[must_use]
    pub fn is_done(&self) -> bool {
        self.state == State::Done
    }

    /// What went wrong for good.
    #[must_use]
    pub fn failure(&self) -> Option<&str> {
        self.error
            .as_deref()
            .filter(|_| self.state == State::Failed)
    }

    /// What QEMU is to be told.
    pub fn take_commands(&mut self) -> Vec<Ask<Tag>> {
        std::mem::take(&mut self.commands)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kept() -> Kept {
        Kept {
            before_bytes: 7 << 20,
            polling: None,
        }
    }

    #[test]
    fn it_is_tried_again_until_it_is_taken() {
        let mut now = Instant::now();
        let mut back = GiveBack::default();
        assert!(back.is_settled() && back.deadline().is_none());
        back.start(now, kept());
        back.start(now, kept());
        assert_eq!(back.take_commands(), [balloon(Tag::Back, 7 << 20)]);
        back.refused(now, "busy");
        now += AGAIN;
        assert_eq!(back.tick(now), None);
        assert_eq!(back.take_commands(), [balloon(Tag::Back, 7 << 20)]);
        // The monitor was lost with the answer.
        now += ANSWER;
        assert_eq!(back.tick(now), None);
        assert_eq!(back.take_commands().len(), 1);
        assert!(!back.is_settled());
        back.replied();
        assert!(back.is_settled() && back.is_done() && back.failure().is_none());
    }

    #[test]
    fn in_the_end_a_person_is_asked() {
        let mut now = Instant::now();
        let mut back = GiveBack::default();
        back.start(now, kept());
        let alarm = (0..20).find_map(|_| {
            back.refused(now, "no balloon device");
            now += AGAIN;
            back.tick(now)
        });
        let alarm = alarm.expect("an alarm");
        assert!(
            alarm.contains("no balloon device") && alarm.contains("7340032"),
            "{alarm}"
        );
        assert_eq!(back.take_commands().len(), usize::from(TRIES));
        assert!(back.is_settled() && !back.is_done());
        assert_eq!(back.failure(), Some(alarm.as_str()));
    }
}
