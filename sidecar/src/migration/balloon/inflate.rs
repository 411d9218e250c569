//! The source's balloon: measures what the guest uses, takes the rest, and watches that it is not
//! missed.
//!
//! ```text
//! idle → asking → noting → measuring → taking → taken → back
//!          └─────────┴─────────┴── anything in the way ─► not ballooned (with a notice)
//! ```

use std::time::{Duration, Instant};

use serde_json::Value;

use super::give_back::GiveBack;
use super::{Ask, Kept, POLLING, Tag, balloon, get, query, set_polling};
use crate::hold::millis;
use crate::migration::Now;
use crate::protocol::command::PrepareBalloon;
use crate::protocol::types::BalloonReport;

/// How often the guest's balloon is looked at while it changes.
const LOOK: Duration = Duration::from_millis(50);
/// How often the guest's statistics are, afterwards; QEMU asks the guest for them once a second.
const WATCH: Duration = Duration::from_secs(1);
/// A driver that is there sends its statistics within this time.
const STATS: Duration = Duration::from_secs(2);
/// A balloon that has not moved for so long does not.
const STUCK: Duration = Duration::from_secs(1);
/// The device's property that holds them.
const STATS_OF_GUEST: &str = "guest-stats";
/// The smallest part of its memory that is worth it, and the largest that is left: one in so many.
const WORTH: u64 = 32;
const FLOOR: u64 = 16;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Idle,
    Asking,
    Noting,
    Measuring,
    Taking,
    Taken,
    /// Without ballooning.
    Off,
    Back,
}

/// What the guest says of its memory, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stats {
    updated_s: i64,
    available: Option<u64>,
}

fn read_stats(value: &Value) -> Stats {
    // QEMU shows what the driver does not say as the largest number.
    let stat = |name: &str| value["stats"][name].as_u64().filter(|n| *n != u64::MAX);
    Stats {
        updated_s: value["last-update"].as_i64().unwrap_or(0),
        available: stat("stat-available-memory").or_else(|| stat("stat-free-memory")),
    }
}

/// The machine.
#[derive(Debug)]
pub struct Balloon {
    wish: Option<PrepareBalloon>,
    device: String,
    state: State,
    kept: Option<Kept>,
    found: Option<u64>,
    polling: Option<u64>,
    /// When the statistics that were found are from, in seconds of unix time.
    earlier_s: Option<i64>,
    began: Option<Instant>,
    until: Option<Instant>,
    next_look: Option<Instant>,
    /// Statistics from before are not what the guest uses now.
    fresh_from_s: i64,
    target: u64,
    actual: u64,
    moved_at: Option<Instant>,
    took: Duration,
    free_page_hint: bool,
    notice: Option<String>,
    back: GiveBack,
    wants_note: bool,
    commands: Vec<Ask<Tag>>,
}

impl Balloon {
    /// Of a VM that is to be ballooned so, or not at all.
    #[must_use]
    pub fn new(wish: Option<PrepareBalloon>) -> Self {
        Self {
            wish,
            device: String::new(),
            state: State::Idle,
            kept: None,
            found: None,
            polling: None,
            earlier_s: None,
            began: None,
            until: None,
            next_look: None,
            fresh_from_s: 0,
            target: 0,
            actual: 0,
            moved_at: None,
            took: Duration::ZERO,
            free_page_hint: false,
            notice: None,
            back: GiveBack::default(),
            wants_note: false,
            commands: Vec::new(),
        }
    }

    /// Of a VM that an earlier life of this sidecar may have ballooned.
    #[must_use]
    pub fn adopt(kept: Option<Kept>) -> Self {
        let mut this = Self::new(None);
        this.state = State::Off;
        this.kept = kept;
        this
    }

    /// The VM has this device, whether it is to be ballooned or not.
    pub fn found_device(&mut self, device: &str) {
        device.clone_into(&mut self.device);
        self.commands.push(get(Tag::Hint, device, "free-page-hint"));
    }

    /// Whether the memory may be copied.
    #[must_use]
    pub fn is_done(&self) -> bool {
        match self.state {
            State::Idle => self.wish.is_none(),
            State::Taken | State::Off | State::Back => true,
            _ => false,
        }
    }

    /// Whether [`Self::begin`] was called for a VM that is to be ballooned.
    #[must_use]
    pub fn has_begun(&self) -> bool {
        self.began.is_some()
    }

    /// Before the memory is copied.
    pub fn begin(&mut self, now: Now, guest_runs: bool) {
        let Some(wish) = self.wish.filter(|_| self.state == State::Idle) else {
            return;
        };
        self.began = Some(now.mono);
        self.until = Some(now.mono + Duration::from_millis(wish.wait_ms));
        if self.device.is_empty() {
            self.turn_off(now.mono, "it has no virtio-balloon device");
        } else if !guest_runs {
            self.turn_off(now.mono, "it is paused");
        } else {
            self.state = State::Asking;
            self.commands.extend([
                get(Tag::Polling, &self.device, POLLING),
                query(Tag::Found),
                get(Tag::Earlier, &self.device, STATS_OF_GUEST),
            ]);
        }
    }

    fn turn_off(&mut self, now: Instant, why: &str) {
        self.state = State::Off;
        self.target = 0;
        self.next_look = None;
        self.took = self.began.map_or(Duration::ZERO, |at| now - at);
        self.notice = Some(format!("not ballooned: {why}"));
    }

    /// QEMU answered.
    pub fn replied(&mut self, now: Now, tag: Tag, value: &Value) {
        match tag {
            Tag::Hint => self.free_page_hint = value.as_bool().unwrap_or(false),
            Tag::Polling => {
                self.polling = value.as_u64();
                self.asked();
            }
            Tag::Found => {
                self.found = value["actual"].as_u64();
                self.asked();
            }
            Tag::Earlier => {
                self.earlier_s = Some(read_stats(value).updated_s);
                self.asked();
            }
            Tag::Stats => self.measured(now.mono, read_stats(value)),
            Tag::Size => {
                if let Some(actual) = value["actual"].as_u64() {
                    self.sized(now.mono, actual);
                }
            }
            Tag::Back => self.back.replied(),
            Tag::Poll | Tag::Take | Tag::Ease => {}
        }
    }

    /// QEMU refused.
    pub fn refused(&mut self, now: Now, tag: Tag, error: &str) {
        match tag {
            Tag::Back => self.back.refused(now.mono, error),
            Tag::Polling | Tag::Found | Tag::Earlier if self.state == State::Asking => {
                self.turn_off(now.mono, error);
            }
            Tag::Stats | Tag::Poll if self.state == State::Measuring => {
                self.turn_off(now.mono, error);
            }
            Tag::Take if self.state == State::Taking => {
                // Nothing was taken.
                self.turn_off(now.mono, error);
            }
            _ => {}
        }
    }

    /// What is to be put back is known: it is noted before anything is changed.
    fn asked(&mut self) {
        let (State::Asking, Some(before_bytes), Some(polling), Some(_)) =
            (self.state, self.found, self.polling, self.earlier_s)
        else {
            return;
        };
        self.actual = before_bytes;
        self.kept = Some(Kept {
            before_bytes,
            polling: Some((self.device.clone(), polling)),
        });
        self.state = State::Noting;
        self.wants_note = true;
    }

    /// The note is on disk.
    pub fn noted(&mut self, now: Now) {
        if self.state != State::Noting {
            return;
        }
        self.state = State::Measuring;
        // QEMU counts whole seconds: what came in this one may be from before.
        let earlier = self.earlier_s.unwrap_or(0);
        self.fresh_from_s = (now.unix_us / 1_000_000).max(earlier.saturating_add(1));
        // From 0 on QEMU asks the guest at once.
        if self.polling != Some(0) {
            self.commands.push(set_polling(&self.device, 0));
        }
        self.commands.push(set_polling(&self.device, 1));
        self.until = self.until.map(|until| until.min(now.mono + STATS));
        self.next_look = Some(now.mono);
    }

    fn measured(&mut self, now: Instant, stats: Stats) {
        // 0: there never were any.
        if stats.updated_s == 0 || stats.updated_s < self.fresh_from_s {
            return;
        }
        match (self.state, stats.available) {
            (State::Measuring, None) => {
                self.turn_off(now, "its driver does not say what the guest uses");
            }
            (State::Measuring, Some(available)) => self.take(now, available),
            (State::Taking | State::Taken, Some(available)) => self.ease(now, available),
            _ => {}
        }
    }

    fn reserve(&self) -> u64 {
        self.wish.map_or(0, |wish| wish.reserve_bytes)
    }

    fn take(&mut self, now: Instant, available: u64) {
        let before = self.actual;
        let spare = available.saturating_sub(self.reserve());
        let target = before.saturating_sub(spare).max(before / FLOOR);
        if before - target < before / WORTH {
            let used = before.saturating_sub(available);
            let text = format!("of {before} bytes it uses {used}: there is nothing to take");
            self.turn_off(now, &text);
            return;
        }
        self.target = target;
        self.state = State::Taking;
        self.moved_at = Some(now);
        self.until = self
            .began
            .zip(self.wish)
            .map(|(at, wish)| at + Duration::from_millis(wish.wait_ms));
        self.commands.push(balloon(Tag::Take, target));
        self.next_look = Some(now + LOOK);
    }

    /// The guest has less left than half of its reserve: it gets that again.
    fn ease(&mut self, now: Instant, available: u64) {
        let reserve = self.reserve();
        if available >= reserve / 2 {
            return;
        }
        let before = self.kept.as_ref().map_or(0, |kept| kept.before_bytes);
        let target = before.min(self.actual.max(self.target) + (reserve - available));
        if target > self.target || self.state == State::Taking {
            self.target = target;
            self.commands.push(balloon(Tag::Ease, target));
            self.notice = Some(format!(
                "the guest ran short of memory: its balloon was opened to {target} bytes"
            ));
        }
        self.taken(now);
    }

    fn sized(&mut self, now: Instant, actual: u64) {
        if actual != self.actual {
            self.moved_at = Some(now);
        }
        self.actual = actual;
        if self.state == State::Taking && actual <= self.target {
            self.taken(now);
        }
    }

    fn taken(&mut self, now: Instant) {
        if self.state == State::Taking {
            self.state = State::Taken;
            self.took = self.began.map_or(Duration::ZERO, |at| now - at);
        }
        self.next_look = Some(now + WATCH);
    }

    /// When [`Self::tick`] wants to be called.
    #[must_use]
    pub fn deadline(&self) -> Option<Instant> {
        let until = self.until.filter(|_| self.is_under_way());
        [self.next_look, until, self.back.deadline()]
            .into_iter()
            .flatten()
            .min()
    }

    fn is_under_way(&self) -> bool {
        matches!(
            self.state,
            State::Asking | State::Noting | State::Measuring | State::Taking
        )
    }

    /// Does what is due; an alarm where the memory cannot be given back.
    pub fn tick(&mut self, now: Instant) -> Option<String> {
        if self.next_look.is_some_and(|at| at <= now) {
            self.look(now);
        }
        if self.is_under_way() && self.until.is_some_and(|at| at <= now) {
            self.too_late(now);
        }
        self.back.tick(now)
    }

    fn look(&mut self, now: Instant) {
        let interval = if self.state == State::Taken {
            WATCH
        } else {
            LOOK
        };
        self.next_look = Some(now + interval);
        let stats = get(Tag::Stats, &self.device, STATS_OF_GUEST);
        match self.state {
            State::Measuring => self.commands.push(stats),
            State::Taking if self.moved_at.is_some_and(|at| now - at >= STUCK) => {
                self.too_late(now);
            }
            State::Taking | State::Taken => self.commands.extend([stats, query(Tag::Size)]),
            _ => self.next_look = None,
        }
    }

    fn too_late(&mut self, now: Instant) {
        match self.state {
            State::Measuring => {
                self.turn_off(now, "the guest has no driver that says what it uses");
            }
            State::Taking => {
                let (actual, target) = (self.actual, self.target);
                self.notice = Some(format!(
                    "the balloon came to {actual} bytes, not to {target}, before the copy began"
                ));
                // What a slow guest gave later would only disturb the copy.
                self.target = actual;
                self.commands.push(balloon(Tag::Ease, actual));
                self.taken(now);
            }
            _ => self.turn_off(now, "its QEMU did not answer in time"),
        }
    }

    /// The VM runs here for good.
    pub fn give_back(&mut self, now: Instant) {
        self.next_look = None;
        self.state = State::Back;
        if let Some(kept) = self.kept.clone() {
            self.commands.clear();
            self.back.start(now, kept);
        }
    }

    /// Whether nothing is to be put back (any more).
    #[must_use]
    pub fn is_settled(&self) -> bool {
        self.back.is_settled()
    }

    /// What is put back, for the note.
    #[must_use]
    pub fn kept(&self) -> Option<&Kept> {
        self.kept.as_ref()
    }

    /// What the destination is to give back, in bytes.
    #[must_use]
    pub fn taken_from(&self) -> Option<u64> {
        let kept = self.kept.as_ref().filter(|_| self.target > 0)?;
        Some(kept.before_bytes)
    }

    /// Whether QEMU is given hints of free pages by its guest.
    #[must_use]
    pub fn has_free_page_hint(&self) -> bool {
        self.free_page_hint
    }

    /// How it went.
    #[must_use]
    pub fn report(&self) -> Option<BalloonReport> {
        let is_told = self.wish.is_some() && self.began.is_some() || self.kept.is_some();
        is_told.then(|| BalloonReport {
            before_bytes: self.kept.as_ref().map_or(0, |kept| kept.before_bytes),
            during_bytes: (self.target > 0).then_some(self.actual),
            took_ms: millis(self.took),
            given_back: self.back.is_done(),
            notice: self
                .back
                .failure()
                .or(self.notice.as_deref())
                .map(str::to_owned),
        })
    }

    /// What QEMU is to be told.
    pub fn take_commands(&mut self) -> Vec<Ask<Tag>> {
        let mut commands = std::mem::take(&mut self.commands);
        commands.extend(self.back.take_commands());
        commands
    }

    /// Whether the note is to be written.
    pub fn take_note(&mut self) -> bool {
        std::mem::take(&mut self.wants_note)
    }
}
