//! The users: an open loop (`open`) or a closed one (`closed`), whose level changes as a
//! [`Shape`] says.

mod client;
mod closed;
mod dice;
mod open;
pub mod shape;

use std::collections::BTreeSet;
use std::net::SocketAddrV4;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use crossbeam::channel::{Receiver, Sender, unbounded};
use serde::Serialize;

use crate::clock::Micros;
use crate::net::{Host, NetError};
use crate::signals::{Interrupt, Interrupted};
use client::Client;
pub use shape::Shape;

/// A request that is not answered for so long has failed.
const LIMIT: Duration = Duration::from_secs(60);
/// The wall is looked at this often while the next request is far.
const STEP: Duration = Duration::from_millis(20);

/// What a user does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Action {
    /// Loads the home page: 2 reads.
    Home,
    /// Searches: 6 reads.
    Search,
    /// Looks at something: 4 reads.
    Detail,
    /// Adds something: 2 reads and 2 writes.
    Add,
    /// Not a user's: how much was added.
    Count,
    /// Not a user's: fills the database.
    Fill,
}

impl Action {
    /// What users do.
    pub const USERS: [Self; 4] = [Self::Home, Self::Search, Self::Detail, Self::Add];

    /// As a request line names it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Home => "home",
            Self::Search => "search",
            Self::Detail => "detail",
            Self::Add => "add",
            Self::Count => "count",
            Self::Fill => "fill",
        }
    }

    fn method(self) -> &'static str {
        match self {
            Self::Add | Self::Fill => "POST",
            _ => "GET",
        }
    }
}

/// How a request ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Ending {
    /// It was answered.
    Answered,
    /// It was answered with an error.
    Refused,
    /// Its connection broke, or nothing came within a minute.
    Lost,
}

/// One request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sample {
    /// What it asked for.
    pub action: Action,
    /// When it was meant to be sent.
    pub due: Micros,
    /// When its answer was there, or it failed.
    pub done: Micros,
    /// How it ended.
    pub ending: Ending,
}

impl Sample {
    /// The response time that its user saw.
    #[must_use]
    pub fn took(&self) -> Duration {
        self.done.since(self.due)
    }
}

/// Who decides when a request is sent.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Pace {
    /// The clock, whatever becomes of the requests before.
    Open {
        /// Requests per second.
        rate: Shape,
        /// Connections, all opened beforehand.
        connections: usize,
    },
    /// Users, who think after every answer.
    Closed {
        /// How many of them are there.
        users: Shape,
        /// How long they think on the average; exponentially distributed.
        think: Duration,
        /// The same seed, the same thoughts.
        seed: u64,
    },
}

/// What load to make.
#[derive(Debug, Clone, PartialEq)]
pub struct LoadSpec {
    /// Where it goes.
    pub front: SocketAddrV4,
    /// When requests are sent.
    pub pace: Pace,
    /// The share of requests that write, 0 to 1. The others are 30 % home, 40 % search and 30 %
    /// detail, about as in Cloudstone's mix.
    pub writes: f64,
}

/// A running load; it ends when this is dropped.
#[derive(Debug)]
pub struct Load {
    end: Arc<AtomicBool>,
    abandoned: Arc<AtomicBool>,
    open: Open,
    samples: Receiver<Sample>,
    threads: Vec<JoinHandle<()>>,
    /// Users who think listen here.
    hang_up: Option<Sender<Never>>,
}

/// Nothing is ever said: that the line is dead is the message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Never {}

/// The requests that have not ended yet: when each was due, and whose it is.
#[derive(Debug, Clone, Default)]
struct Open(Arc<Mutex<BTreeSet<Key>>>);

/// When a request was due, and a number that no other has that was due then.
type Key = (Micros, u64);

impl Open {
    fn change<T>(&self, change: impl FnOnce(&mut BTreeSet<Key>) -> T) -> T {
        change(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// Sends one request over a connection of its own, from the calling thread's namespace, and returns
/// the answer's body.
///
/// # Errors
/// It is not answered well.
pub fn ask_once(front: SocketAddrV4, action: Action, id: u64) -> std::io::Result<String> {
    let mut client = Client::connect(front, LIMIT)?;
    let (ending, body) = client.ask(action.method(), &format!("/{}?id={id}", action.name()))?;
    match ending {
        Ending::Answered => Ok(body),
        _ => Err(std::io::Error::other(body)),
    }
}

impl Load {
    /// Begins to send requests from `users`.
    ///
    /// # Errors
    /// A connection cannot be made.
    pub fn start(users: &Host, spec: &LoadSpec) -> Result<Self, NetError> {
        let failed = |error| NetError::Traffic {
            from: users.name().to_owned(),
            to: spec.front.to_string(),
            error,
        };
        let end = Arc::new(AtomicBool::new(false));
        let abandoned = Arc::new(AtomicBool::new(false));
        let open = Open::default();
        let (sender, samples) = unbounded();
        let told = Told {
            samples: sender,
            open: open.clone(),
            abandoned: Arc::clone(&abandoned),
        };
        let (hang_up, line) = unbounded();
        // Threads are in the namespace of the one that starts them.
        let threads = users.enter(|| match spec.pace {
            Pace::Open { rate, connections } => {
                open::start(spec, rate, connections.max(1), &end, &told)
            }
            Pace::Closed { users, think, seed } => {
                let crowd = closed::Crowd { users, think, seed };
                closed::start(spec, crowd, &line, &told)
            }
        })?;
        Ok(Self {
            end,
            abandoned,
            open,
            samples,
            threads: threads.map_err(failed)?,
            hang_up: Some(hang_up),
        })
    }

    /// The requests that have ended since the last call.
    #[must_use]
    pub fn take(&self) -> Vec<Sample> {
        self.samples.try_iter().collect()
    }

    /// Waits until every request that was due before `until` has ended; whether they all have
    /// within `limit`.
    ///
    /// # Errors
    /// An interrupt comes.
    pub fn settle(
        &self,
        until: Micros,
        limit: Duration,
        interrupt: &Interrupt,
    ) -> Result<bool, Interrupted> {
        let by = Micros::now() + limit;
        while self
            .open
            .change(|open| open.first().is_some_and(|(due, _)| *due < until))
        {
            if Micros::now() > by {
                return Ok(false);
            }
            interrupt.sleep(STEP)?;
        }
        Ok(true)
    }

    /// Sends no more, waits for what is under way, and returns what has ended since the last call.
    #[must_use]
    pub fn finish(mut self) -> Vec<Sample> {
        self.end.store(true, Ordering::Relaxed);
        self.hang_up = None;
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
        self.take()
    }
}

impl Drop for Load {
    /// Nobody waits: what is due is not sent any more, and threads end with their last answer.
    fn drop(&mut self) {
        self.end.store(true, Ordering::Relaxed);
        self.abandoned.store(true, Ordering::Relaxed);
    }
}

/// Where requests are told that begin and end.
#[derive(Debug, Clone)]
struct Told {
    samples: Sender<Sample>,
    open: Open,
    /// Nobody listens any more.
    abandoned: Arc<AtomicBool>,
}

impl Told {
    fn begin(&self, key: Key) {
        self.open.change(|open| open.insert(key));
    }

    fn tell(&self, key: Key, action: Action, ending: Ending) {
        // Who waits for it to end then finds it.
        let _ = self.samples.send(Sample {
            action,
            due: key.0,
            done: Micros::now(),
            ending,
        });
        self.open.change(|open| open.remove(&key));
    }
}

/// One user's connection; one that broke is made anew for the next request.
#[derive(Debug)]
struct Line {
    front: SocketAddrV4,
    kept: Option<Client>,
}

impl Line {
    fn ask(&mut self, action: Action, id: u64) -> Ending {
        let mut attempt = || {
            let mut client = match self.kept.take() {
                Some(client) => client,
                None => Client::connect(self.front, LIMIT)?,
            };
            let target = format!("/{}?id={id}", action.name());
            let (ending, _) = client.ask(action.method(), &target)?;
            self.kept = Some(client);
            Ok::<_, std::io::Error>(ending)
        };
        attempt().unwrap_or(Ending::Lost)
    }
}

fn choose(writes: f64, first: f64, second: f64) -> Action {
    match second {
        _ if first < writes => Action::Add,
        _ if second < 0.3 => Action::Home,
        _ if second < 0.7 => Action::Search,
        _ => Action::Detail,
    }
}

#[cfg(test)]
mod tests {
    use super::dice::Dice;
    use super::*;

    #[test]
    fn the_mix_is_as_asked() {
        let mut dice = Dice(1);
        let mut counts = [0_u32; 4];
        for _ in 0..10_000 {
            let action = choose(0.1, dice.roll(), dice.roll());
            let at = Action::USERS.iter().position(|other| *other == action);
            counts[at.unwrap()] += 1;
        }
        let expected = [2700, 3600, 2700, 1000];
        for (count, expected) in counts.iter().zip(expected) {
            assert!(count.abs_diff(expected) < 200, "{counts:?}");
        }
    }

    #[test]
    fn a_response_time_counts_from_when_it_was_due() {
        let sample = Sample {
            action: Action::Home,
            due: Micros(1000),
            done: Micros(3500),
            ending: Ending::Answered,
        };
        assert_eq!(sample.took(), Duration::from_micros(2500));
    }
}
