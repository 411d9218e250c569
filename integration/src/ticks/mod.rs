//! The tick collector: one thread that stamps every byte that guests send, by the QEMU it came
//! from.
//!
//! Each VM has a listening socket per host. The destination's QEMU writes to another socket than
//! the source's, so every tick is known to have run on a side. Two sockets have no common order;
//! it is kept like this: when any socket of a VM has bytes, the one that ticked last is read
//! *after* the others. What it sent before the VM moved is then in hand before the new side's
//! first byte is recorded, and only a copy that really still runs can tick later.

mod record;
mod worker;

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam::channel::{Sender, unbounded};

pub use record::{Break, Gap, GapStats, Overlap, Record, Switchover, Tick};

use crate::clock::Micros;
use worker::Worker;

/// Why ticks could not be collected.
#[derive(Debug, thiserror::Error)]
pub enum TickError {
    /// A socket could not be made.
    #[error("cannot listen for ticks on {path}: {error}")]
    Listen {
        /// The socket.
        path: PathBuf,
        /// Why.
        error: io::Error,
    },
    /// The collector's thread has ended.
    #[error("the tick collector has ended")]
    Ended,
    /// A guest did not tick in time.
    #[error("{vm} did not tick on {host} within {waited:?}; ticking hosts: {running:?}")]
    Silent {
        /// The VM.
        vm: String,
        /// The host on which it was expected.
        host: String,
        /// How long.
        waited: Duration,
        /// Where it ticked instead in that time.
        running: Vec<String>,
    },
}

/// Collects the ticks of all guests of a testbed.
#[derive(Debug)]
pub struct Collector {
    directory: PathBuf,
    shared: Arc<Shared>,
    orders: Option<Sender<Listening>>,
    wake: UnixStream,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct Shared {
    records: Mutex<BTreeMap<String, Record>>,
    ticked: Condvar,
}

/// A socket for the worker to accept connections from.
#[derive(Debug)]
struct Listening {
    vm: String,
    host: String,
    listener: UnixListener,
}

impl Collector {
    /// Starts a collector whose sockets lie in `directory`.
    ///
    /// # Errors
    /// If the system has no sockets or threads left.
    pub fn start(directory: &Path) -> io::Result<Self> {
        let (wake, woken) = UnixStream::pair()?;
        wake.set_nonblocking(true)?;
        woken.set_nonblocking(true)?;
        let (orders, received) = unbounded();
        let shared = Arc::new(Shared::default());
        let worker = Worker::new(Arc::clone(&shared), received, woken);
        let thread = std::thread::Builder::new()
            .name("ticks".into())
            .spawn(move || worker.run())?;
        Ok(Self {
            directory: directory.to_owned(),
            shared,
            orders: Some(orders),
            wake,
            thread: Some(thread),
        })
    }

    /// Opens the socket to which QEMUs of `vm` on `host` are to connect, and returns its path.
    ///
    /// # Errors
    /// If the socket cannot be made.
    pub fn listen(&self, vm: &str, host: &str, period: Duration) -> Result<PathBuf, TickError> {
        let path = self.directory.join(format!("{vm}.{host}.ticks"));
        let listener = UnixListener::bind(&path)
            .and_then(|listener| listener.set_nonblocking(true).map(|()| listener))
            .map_err(|error| TickError::Listen {
                path: path.clone(),
                error,
            })?;
        let mut records = self.shared.lock();
        records.entry(vm.to_owned()).or_default().period = period;
        drop(records);
        let listening = Listening {
            vm: vm.to_owned(),
            host: host.to_owned(),
            listener,
        };
        let orders = self.orders.as_ref().ok_or(TickError::Ended)?;
        orders.send(listening).map_err(|_| TickError::Ended)?;
        self.wake();
        Ok(path)
    }

    /// All ticks of `vm` so far.
    #[must_use]
    pub fn record(&self, vm: &str) -> Record {
        self.shared.lock().get(vm).cloned().unwrap_or_default()
    }

    /// The ticks of `vm` from `since` on.
    #[must_use]
    pub fn record_since(&self, vm: &str, since: Micros) -> Record {
        let records = self.shared.lock();
        let Some(record) = records.get(vm) else {
            return Record::default();
        };
        record.window(since..Micros(u64::MAX))
    }

    /// Forgets the ticks of all VMs from before `moment`, for runs of hours.
    pub fn forget_before(&self, moment: Micros) {
        for record in self.shared.lock().values_mut() {
            let count = record.ticks.partition_point(|tick| tick.at < moment);
            record.ticks.drain(..count);
            record.ticks.shrink_to_fit();
        }
    }

    /// The hosts on which `vm` ticked within the last `span`.
    #[must_use]
    pub fn running(&self, vm: &str, span: Duration) -> Vec<String> {
        let since = Micros::now() - span;
        let records = self.shared.lock();
        records
            .get(vm)
            .map(|r| r.running(since))
            .unwrap_or_default()
    }

    /// Waits until `vm` has ticked on `host` after now, and says when.
    ///
    /// # Errors
    /// If it does not within `limit`.
    pub fn wait_for_tick(
        &self,
        vm: &str,
        host: &str,
        limit: Duration,
    ) -> Result<Micros, TickError> {
        let (start, deadline) = (Micros::now(), Instant::now() + limit);
        let mut records = self.shared.lock();
        loop {
            let record = records.get(vm);
            let tick = record.and_then(|record| {
                let recent = record
                    .ticks
                    .iter()
                    .rev()
                    .take_while(|tick| tick.at >= start);
                recent
                    .filter(|tick| record.sources[usize::from(tick.source)] == host)
                    .last()
            });
            if let Some(tick) = tick {
                return Ok(tick.at);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(TickError::Silent {
                    vm: vm.to_owned(),
                    host: host.to_owned(),
                    waited: limit,
                    running: record.map(|r| r.running(start)).unwrap_or_default(),
                });
            }
            records = self
                .shared
                .ticked
                .wait_timeout(records, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    fn wake(&self) {
        // A full pipe wakes it as well.
        let _ = (&self.wake).write(&[0]);
    }
}

impl Drop for Collector {
    fn drop(&mut self) {
        self.orders = None;
        self.wake();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Record>> {
        self.records.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);
    const LONG: Duration = Duration::from_secs(10);

    #[test]
    fn ticks_of_two_hosts_make_one_record() {
        let directory = tempfile::tempdir().unwrap();
        let collector = Collector::start(directory.path()).unwrap();
        let mut a = UnixStream::connect(collector.listen("vm", "a", MS).unwrap()).unwrap();
        let mut b = UnixStream::connect(collector.listen("vm", "b", MS).unwrap()).unwrap();
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| collector.wait_for_tick("vm", "b", LONG));
            a.write_all(&[255, 0]).unwrap();
            while collector.record("vm").ticks.len() < 2 {
                std::thread::yield_now();
            }
            let (mut count, mut byte) = (2, 1_u8);
            while !waiting.is_finished() {
                b.write_all(&[byte]).unwrap();
                (count, byte) = (count + 1, byte.wrapping_add(1));
                while collector.record("vm").ticks.len() < count {
                    std::thread::yield_now();
                }
            }
            waiting.join().unwrap().unwrap();
        });
        let record = collector.record("vm");
        assert_eq!(record.breaks(), []);
        assert_eq!(record.overlaps(), []);
        let moves = record.switchovers();
        assert_eq!((moves[0].from.as_str(), moves[0].to.as_str()), ("a", "b"));
        assert_eq!(collector.running("vm", LONG), ["b", "a"]);
        collector.forget_before(Micros::now());
        assert!(collector.record("vm").ticks.is_empty());
    }

    #[test]
    fn silence_is_an_error() {
        let directory = tempfile::tempdir().unwrap();
        let collector = Collector::start(directory.path()).unwrap();
        let error = collector.wait_for_tick("vm", "a", MS).unwrap_err();
        assert!(matches!(error, TickError::Silent { .. }));
    }
}
