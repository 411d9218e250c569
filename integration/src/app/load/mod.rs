//! The users: requests at moments that are fixed beforehand, whatever becomes of those before.
//!
//! This is an open loop. A response time counts from the moment at which its request was meant to be
//! sent, so a system that stands still is charged with every request that it keeps waiting, and not
//! with one per connection (coordinated omission). Workers hold one connection each and take the
//! next request that is due; connections are opened before the first, and one that is lost is opened
//! again and counted.

mod client;

use std::collections::BTreeSet;
use std::net::SocketAddrV4;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use crossbeam::channel::{Receiver, Sender, bounded, unbounded};
use serde::Serialize;

use crate::clock::Micros;
use crate::net::{Host, NetError};
use crate::signals::{Interrupt, Interrupted};
use client::Client;

/// A request that is not answered for so long has failed.
const LIMIT: Duration = Duration::from_secs(60);
/// Requests that are due and not taken yet; more are counted as failed.
const WAITING: usize = 65_536;
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

/// What load to make.
#[derive(Debug, Clone, PartialEq)]
pub struct LoadSpec {
    /// Where it goes.
    pub front: SocketAddrV4,
    /// Requests per second.
    pub rate: f64,
    /// The share of requests that write, 0 to 1. The others are 30 % home, 40 % search and 30 %
    /// detail, about as in Cloudstone's mix.
    pub writes: f64,
    /// Connections, all opened beforehand.
    pub connections: usize,
}

/// A running load; it ends when this is dropped.
#[derive(Debug)]
pub struct Load {
    end: Arc<AtomicBool>,
    abandoned: Arc<AtomicBool>,
    open: Open,
    samples: Receiver<Sample>,
    threads: Vec<JoinHandle<()>>,
}

/// When the requests were due that have not ended yet.
#[derive(Debug, Clone, Default)]
struct Open(Arc<Mutex<BTreeSet<Micros>>>);

impl Open {
    fn change<T>(&self, change: impl FnOnce(&mut BTreeSet<Micros>) -> T) -> T {
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
        let (orders, due) = bounded::<Order>(WAITING);
        let (sender, samples) = unbounded();
        let told = Told {
            samples: sender,
            open: open.clone(),
            abandoned: Arc::clone(&abandoned),
        };
        // Threads are in the namespace of the one that starts them.
        let started = users.enter(|| {
            let mut threads = Vec::new();
            for _ in 0..spec.connections.max(1) {
                let client = Client::connect(spec.front, LIMIT)?;
                let (due, told, front) = (due.clone(), told.clone(), spec.front);
                threads.push(std::thread::spawn(move || work(client, front, &due, &told)));
            }
            Ok(threads)
        })?;
        let mut threads = started.map_err(failed)?;
        let (spec, ending) = (spec.clone(), Arc::clone(&end));
        threads.push(std::thread::spawn(move || {
            order(&spec, &ending, &orders, &told)
        }));
        Ok(Self {
            end,
            abandoned,
            open,
            samples,
            threads,
        })
    }

    /// The requests that have ended since the last call.
    #[must_use]
    pub fn take(&self) -> Vec<Sample> {
        self.samples.try_iter().collect()
    }

    /// Waits until every request that was due before `until` has ended; each does, within a minute
    /// of its turn.
    ///
    /// # Errors
    /// An interrupt comes.
    pub fn settle(&self, until: Micros, interrupt: &Interrupt) -> Result<(), Interrupted> {
        while self
            .open
            .change(|open| open.first().is_some_and(|due| *due < until))
        {
            interrupt.sleep(STEP)?;
        }
        Ok(())
    }

    /// Sends no more, waits for what is under way, and returns what has ended since the last call.
    #[must_use]
    pub fn finish(mut self) -> Vec<Sample> {
        self.end.store(true, Ordering::Relaxed);
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

#[derive(Debug, Clone, Copy)]
struct Order {
    action: Action,
    due: Micros,
    id: u64,
}

/// Where requests are told that have ended.
#[derive(Debug, Clone)]
struct Told {
    samples: Sender<Sample>,
    open: Open,
    /// Nobody listens any more.
    abandoned: Arc<AtomicBool>,
}

impl Told {
    fn tell(&self, sample: Sample) {
        // Who waits for it to end then finds it.
        let _ = self.samples.send(sample);
        self.open.change(|open| open.remove(&sample.due));
    }
}

/// Makes every request due at its moment.
fn order(spec: &LoadSpec, end: &AtomicBool, orders: &Sender<Order>, told: &Told) {
    let start = Micros::now();
    let gap = Duration::from_secs_f64(1.0 / spec.rate.max(0.01));
    let mut dice = Dice(1);
    for number in 1_u32.. {
        let due = start + gap * number;
        loop {
            if end.load(Ordering::Relaxed) {
                return;
            }
            let left = due.since(Micros::now());
            if left.is_zero() {
                break;
            }
            std::thread::sleep(left.min(STEP));
        }
        let action = choose(spec.writes, dice.roll(), dice.roll());
        let id = u64::from(dice.next());
        told.open.change(|open| open.insert(due));
        if orders.try_send(Order { action, due, id }).is_err() {
            let (done, ending) = (Micros::now(), Ending::Lost);
            told.tell(Sample {
                action,
                due,
                done,
                ending,
            });
        }
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

/// Sends what is due over one connection.
fn work(client: Client, front: SocketAddrV4, due: &Receiver<Order>, told: &Told) {
    let mut kept = Some(client);
    for Order { action, due, id } in due {
        if told.abandoned.load(Ordering::Relaxed) {
            return;
        }
        let target = format!("/{}?id={id}", action.name());
        let mut attempt = || {
            let mut client = match kept.take() {
                Some(client) => client,
                None => Client::connect(front, LIMIT)?,
            };
            let (ending, _) = client.ask(action.method(), &target)?;
            kept = Some(client);
            Ok::<_, std::io::Error>(ending)
        };
        let ending = attempt().unwrap_or(Ending::Lost);
        let done = Micros::now();
        told.tell(Sample {
            action,
            due,
            done,
            ending,
        });
    }
}

/// Numbers that are the same in every run (splitmix64).
#[derive(Debug)]
struct Dice(u64);

impl Dice {
    fn next(&mut self) -> u32 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        u32::try_from((z ^ (z >> 31)) >> 32).unwrap_or(0)
    }

    fn roll(&mut self) -> f64 {
        f64::from(self.next()) / (f64::from(u32::MAX) + 1.0)
    }
}

#[cfg(test)]
mod tests {
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
