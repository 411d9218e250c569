//! Dirty logs are read on this thread: a scan of a large guest takes milliseconds.
//!
//! The event loop hands a [`Log`] over and is woken when an interval is over. The thread looks at
//! each log's sequence number, one load, many times an interval.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use crossbeam::channel::{Receiver, RecvTimeoutError, Sender, TrySendError, bounded};
use dirtylog::export::{ReadError, RoundsError};
use mio::Waker;

use crate::dirty::log::{Log, Look};

/// What is to be done.
#[derive(Debug)]
enum Job {
    Read(usize, Box<Log>, Duration),
    Drop(usize),
}

/// What was found in the log of a measurement.
pub type Found = (usize, Result<Look, String>);

/// The thread's end in the event loop.
#[derive(Debug)]
pub struct Scanner {
    jobs: Sender<Job>,
    found: Receiver<Found>,
}

const QUEUE: usize = 256;
/// Looks in an interval, and the bounds of the time between them.
const LOOKS: u32 = 20;
const PAUSES: [Duration; 2] = [Duration::from_millis(5), Duration::from_millis(50)];

#[derive(Debug)]
struct Reading {
    log: Box<Log>,
    pause: Duration,
    next: Instant,
}

impl Scanner {
    /// Starts the thread.
    ///
    /// # Errors
    /// No thread can be started.
    pub fn start(waker: std::sync::Arc<Waker>) -> std::io::Result<Self> {
        let (jobs, queue) = bounded(QUEUE);
        let (results, found) = bounded(QUEUE);
        std::thread::Builder::new()
            .name("scanner".into())
            .spawn(move || read(&queue, &results, &waker))?;
        Ok(Self { jobs, found })
    }

    /// Reads a log whose intervals are so long, until [`Self::drop_log`].
    ///
    /// # Errors
    /// The thread does not keep up.
    pub fn read(&self, id: usize, log: Log, interval: Duration) -> Result<(), String> {
        let pause = (interval / LOOKS).clamp(PAUSES[0], PAUSES[1]);
        self.submit(Job::Read(id, Box::new(log), pause))
    }

    /// Forgets a log.
    pub fn drop_log(&self, id: usize) {
        // One that is kept is dropped when it ends: its QEMU writes no more.
        let _ = self.submit(Job::Drop(id));
    }

    fn submit(&self, job: Job) -> Result<(), String> {
        self.jobs.try_send(job).map_err(|error| match error {
            TrySendError::Full(_) => "the thread that reads dirty logs does not keep up".to_owned(),
            TrySendError::Disconnected(_) => "the thread that reads dirty logs is gone".to_owned(),
        })
    }

    /// What was found since.
    pub fn take_found(&self) -> Vec<Found> {
        self.found.try_iter().collect()
    }
}

fn read(jobs: &Receiver<Job>, results: &Sender<Found>, waker: &Waker) {
    let mut logs: HashMap<usize, Reading> = HashMap::new();
    loop {
        let next = logs.values().map(|reading| reading.next).min();
        let job = match next {
            Some(at) => jobs.recv_deadline(at),
            None => jobs.recv().map_err(RecvTimeoutError::from),
        };
        match job {
            Ok(Job::Read(id, log, pause)) => {
                let next = Instant::now() + pause;
                logs.insert(id, Reading { log, pause, next });
            }
            Ok(Job::Drop(id)) => drop(logs.remove(&id)),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return,
        }
        let mut broken = Vec::new();
        let now = Instant::now();
        for (id, reading) in logs.iter_mut().filter(|(_, reading)| reading.next <= now) {
            let look = match reading.log.look() {
                Ok(Look::Nothing) => None,
                Ok(look) => Some(Ok(look)),
                Err(RoundsError::Read(ReadError::Torn { .. })) => None,
                Err(error) => {
                    broken.push(*id);
                    Some(Err(error.to_string()))
                }
            };
            reading.next = Instant::now() + reading.pause;
            let Some(look) = look else { continue };
            if results.send((*id, look)).is_err() || waker.wake().is_err() {
                return;
            }
        }
        for id in broken {
            logs.remove(&id);
        }
    }
}
