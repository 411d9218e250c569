//! A WAN that changes in the course of a run: `--wan-at 5s:rtt=100ms,rate=200Mbit/s,loss=0.1%`.

use std::str::FromStr;
use std::time::Duration;

use crossbeam::channel::{Receiver, RecvTimeoutError};
use rate_limiter::{BytesPerSecond, units};
use serde::Serialize;

use crate::clock::Micros;

/// The WAN between the sites.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct State {
    /// Its rate each way.
    pub rate: BytesPerSecond,
    /// Its round trip time.
    pub rtt: Duration,
    /// The share of frames that is lost, 0 to 1.
    pub loss: f64,
}

/// What changes, and when; the rest stays.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Change {
    /// So long after the move began.
    pub at: Duration,
    /// A new rate.
    pub rate: Option<BytesPerSecond>,
    /// A new round trip time.
    pub rtt: Option<Duration>,
    /// A new share of frames lost.
    pub loss: Option<f64>,
}

/// What is no change of the WAN.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{0}` is no change of the WAN; expected a time, `:`, and some of rtt=, rate= and loss=, such as \
     `5s:rtt=100ms,rate=200Mbit/s,loss=0.1%`"
)]
pub struct NoChange(String);

impl FromStr for Change {
    type Err = NoChange;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let bad = || NoChange(text.to_owned());
        let (at, rest) = text.split_once(':').ok_or_else(bad)?;
        let mut change = Self {
            at: units::parse_duration(at).map_err(|_| bad())?,
            rate: None,
            rtt: None,
            loss: None,
        };
        for part in rest.split(',') {
            let (name, value) = part.split_once('=').ok_or_else(bad)?;
            match name.trim() {
                "rate" => {
                    let rate = value.trim().parse::<BytesPerSecond>().map_err(|_| bad())?;
                    change.rate = Some(rate);
                }
                "rtt" => change.rtt = Some(units::parse_duration(value).map_err(|_| bad())?),
                "loss" => change.loss = Some(share(value.trim()).ok_or_else(bad)?),
                _ => return Err(bad()),
            }
        }
        Ok(change)
    }
}

/// A share from 0 to 1, or in percent.
fn share(text: &str) -> Option<f64> {
    let share = match text.strip_suffix('%') {
        Some(percent) => percent.trim().parse::<f64>().ok()? / 100.0,
        None => text.parse().ok()?,
    };
    (0.0..=1.0).contains(&share).then_some(share)
}

/// The WAN after each of these changes, by time.
#[must_use]
pub fn course(base: State, changes: &[Change]) -> Vec<(Duration, State)> {
    let mut sorted = changes.to_vec();
    sorted.sort_by_key(|change| change.at);
    let mut now = base;
    let after = sorted.iter().map(|change| {
        now = State {
            rate: change.rate.unwrap_or(now.rate),
            rtt: change.rtt.unwrap_or(now.rtt),
            loss: change.loss.unwrap_or(now.loss),
        };
        (change.at, now)
    });
    after.collect()
}

/// A change that was made, for the report.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Mark {
    /// Since the move began, in seconds.
    pub at_s: f64,
    /// The WAN from then on, in words.
    pub what: String,
}

impl State {
    /// In words.
    #[must_use]
    pub fn text(&self) -> String {
        let percent = self.loss * 100.0;
        format!("{}, {:?}, {percent:.3} % lost", self.rate, self.rtt)
    }
}

/// Makes the changes of a course, counted from the first moment that `line` tells; ends with the
/// course, or when `line` is hung up. Returns what was done.
pub(super) fn follow(
    course: &[(Duration, State)],
    line: &Receiver<Micros>,
    mut set: impl FnMut(State),
) -> Vec<Mark> {
    let mut marks = Vec::new();
    let Ok(began) = line.recv() else {
        return marks;
    };
    for (at, state) in course {
        loop {
            let left = (began + *at).since(Micros::now());
            // Groups that begin later are told, too.
            match line.recv_timeout(left) {
                Ok(_) => {}
                Err(RecvTimeoutError::Timeout) => break,
                Err(RecvTimeoutError::Disconnected) => return marks,
            }
        }
        set(*state);
        marks.push(Mark {
            at_s: Micros::now().since(began).as_secs_f64(),
            what: state.text(),
        });
    }
    marks
}

#[cfg(test)]
mod tests {
    use crossbeam::channel::unbounded;

    use super::*;

    const BASE: State = State {
        rate: BytesPerSecond(50_000_000),
        rtt: Duration::from_millis(50),
        loss: 0.0,
    };

    fn change(text: &str) -> Change {
        text.parse().unwrap()
    }

    #[test]
    fn changes_are_read() {
        let all = change("5s:rtt=100ms,rate=200Mbit/s,loss=0.1%");
        assert_eq!(all.at, Duration::from_secs(5));
        assert_eq!(all.rtt, Some(Duration::from_millis(100)));
        assert_eq!(all.rate, Some(BytesPerSecond(25_000_000)));
        assert!((all.loss.unwrap() - 0.001).abs() < 1e-12);
        assert_eq!(change("0s:loss=0.5").loss, Some(0.5));
        for text in [
            "5s",
            "5s:",
            "rtt=1ms",
            "5s:rtt",
            "5s:speed=1",
            "5s:loss=2",
            "5s:loss=-1%",
            "x:loss=0",
        ] {
            assert!(text.parse::<Change>().is_err(), "{text}");
        }
    }

    #[test]
    fn what_is_not_changed_stays() {
        let changes = ["9s:rtt=20ms", "5s:rate=8Mbit/s,loss=1%"].map(change);
        let course = course(BASE, &changes);
        let [(first_at, first), (second_at, second)] = course[..] else {
            panic!("{course:?}")
        };
        assert_eq!((first_at.as_secs(), second_at.as_secs()), (5, 9));
        assert_eq!((first.rate.0, first.rtt), (1_000_000, BASE.rtt));
        assert_eq!((second.rate.0, second.rtt.as_millis()), (1_000_000, 20));
        assert!((second.loss - 0.01).abs() < 1e-12);
    }

    #[test]
    fn changes_come_in_their_time_after_the_beginning() {
        let changes = ["60ms:rtt=1ms", "20ms:rtt=2ms", "60s:rtt=3ms"].map(change);
        let (told, line) = unbounded();
        let follower = std::thread::spawn(move || {
            let mut set = Vec::new();
            let marks = follow(&course(BASE, &changes), &line, |state| {
                set.push(state.rtt.as_millis());
            });
            (marks, set)
        });
        told.send(Micros::now()).unwrap();
        told.send(Micros::now()).unwrap();
        std::thread::sleep(Duration::from_millis(200));
        drop(told);
        let (marks, set) = follower.join().unwrap();
        assert_eq!(set, [2, 1], "the last one's time did not come");
        assert!(marks[0].at_s >= 0.02 && marks[1].at_s >= 0.06, "{marks:?}");
        assert_eq!(marks[1].what, "50.0 MB/s, 1ms, 0.000 % lost");
    }

    #[test]
    fn a_move_that_never_began_changes_nothing() {
        let (told, line) = unbounded();
        drop(told);
        let marks = follow(&[(Duration::ZERO, BASE)], &line, |_| panic!("changed"));
        assert_eq!(marks, []);
    }
}
