//! A closed loop: users who ask, wait for the answer, and think for a while, as those of Cloudstone,
//! RUBBoS and TPC-W do.
//!
//! A response time counts from when the request is sent: an application that stands still is asked
//! less. How many users there are changes with the course of the load: who is not there thinks on,
//! and looks again.

use std::io;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;
use std::time::Duration;

use crossbeam::channel::{Receiver, RecvTimeoutError};

use super::client::Client;
use super::dice::Dice;
use super::{LIMIT, Line, LoadSpec, Never, Shape, Told, choose};
use crate::clock::Micros;

/// A user's thread needs little.
const STACK: usize = 256 << 10;

/// The users.
#[derive(Debug, Clone, Copy)]
pub(super) struct Crowd {
    pub(super) users: Shape,
    pub(super) think: Duration,
    pub(super) seed: u64,
}

/// Lets all users that there ever are begin, in the caller's namespace. The first one's connection
/// shows that there is somebody to ask; the others connect when they have something to ask.
pub(super) fn start(
    spec: &LoadSpec,
    crowd: Crowd,
    end: &Receiver<Never>,
    told: &Told,
) -> io::Result<Vec<JoinHandle<()>>> {
    let began = Micros::now();
    let mut kept = Some(Client::connect(spec.front, LIMIT)?);
    let mut threads = Vec::new();
    for number in (0_u32..).take_while(|number| f64::from(*number) < crowd.users.highest()) {
        let user = User {
            number,
            crowd,
            began,
            writes: spec.writes,
            dice: Dice::of(crowd.seed, u64::from(number)),
        };
        let line = Line {
            front: spec.front,
            kept: kept.take(),
        };
        let (end, told) = (end.clone(), told.clone());
        let thread = std::thread::Builder::new().stack_size(STACK);
        threads.push(thread.spawn(move || user.live(line, &end, &told))?);
    }
    Ok(threads)
}

#[derive(Debug)]
struct User {
    number: u32,
    crowd: Crowd,
    began: Micros,
    writes: f64,
    dice: Dice,
}

impl User {
    fn live(mut self, mut line: Line, end: &Receiver<Never>, told: &Told) {
        loop {
            let thinks = self.dice.exponential(self.crowd.think);
            if end.recv_timeout(thinks) != Err(RecvTimeoutError::Timeout)
                || told.abandoned.load(Ordering::Relaxed)
            {
                return;
            }
            let due = Micros::now();
            if !self.is_there(due.since(self.began)) {
                continue;
            }
            let action = choose(self.writes, self.dice.roll(), self.dice.roll());
            let id = u64::from(self.dice.next());
            let key = (due, u64::from(self.number));
            told.begin(key);
            let ending = line.ask(action, id);
            told.tell(key, action, ending);
        }
    }

    fn is_there(&self, after: Duration) -> bool {
        f64::from(self.number) < self.crowd.users.level(after.as_secs_f64())
    }
}

#[cfg(test)]
mod tests {
    use super::super::shape::Course;
    use super::*;

    #[test]
    fn as_many_users_are_there_as_the_level_says() {
        let crowd = Crowd {
            users: Shape {
                course: Course::OnOff,
                low: 2.0,
                high: 5.0,
                period: Duration::from_secs(10),
            },
            think: Duration::from_secs(1),
            seed: 1,
        };
        let user = |number| User {
            number,
            crowd,
            began: Micros(0),
            writes: 0.0,
            dice: Dice(1),
        };
        let there = |seconds| {
            let after = Duration::from_secs(seconds);
            (0..9)
                .filter(|number| user(*number).is_there(after))
                .count()
        };
        assert_eq!((there(3), there(13), there(23)), (2, 5, 2));
    }
}
