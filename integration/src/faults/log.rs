//! What happens in a cell, in order: what the coordinator says, and what the sidecars tell every
//! client of theirs.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use coordinator::application::{ControlAddress, HostId};
use coordinator::client::{Client, Message};
use sidecar::protocol::event::Event;

use super::steer::{At, Said};
use crate::clock::Micros;
use crate::lab::Lab;

/// One thing that happened.
#[derive(Debug, Clone)]
pub struct Entry {
    /// When.
    pub at: Micros,
    /// Who said it.
    pub who: String,
    /// What.
    pub what: What,
}

/// See [`Entry`].
#[derive(Debug, Clone)]
pub enum What {
    /// The coordinator said so.
    Said(Said),
    /// An event that names a trouble.
    Trouble(String),
    /// Another event.
    Event(String),
}

impl Entry {
    /// The trouble it names, if any.
    #[must_use]
    pub fn trouble(&self) -> Option<&str> {
        match &self.what {
            What::Trouble(text) | What::Said(Said::Trouble(text)) => Some(text),
            _ => None,
        }
    }

    fn text(&self) -> String {
        match &self.what {
            What::Said(said) => format!("{said:?}"),
            What::Trouble(text) => format!("! {text}"),
            What::Event(text) => text.clone(),
        }
    }
}

#[derive(Debug, Default)]
struct Shared {
    entries: Mutex<Vec<Entry>>,
    added: Condvar,
}

/// The log of a cell.
#[derive(Debug, Clone, Default)]
pub struct Log(Arc<Shared>);

impl Log {
    fn lock(&self) -> MutexGuard<'_, Vec<Entry>> {
        self.0
            .entries
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds an entry.
    pub fn add(&self, at: Micros, who: &str, what: What) {
        self.lock().push(Entry {
            at,
            who: who.to_owned(),
            what,
        });
        self.0.added.notify_all();
    }

    /// Everything so far.
    #[must_use]
    pub fn entries(&self) -> Vec<Entry> {
        self.lock().clone()
    }

    /// Waits until `find` finds something in the log.
    pub fn wait<T>(
        &self,
        limit: Duration,
        mut find: impl FnMut(&[Entry]) -> Option<T>,
    ) -> Option<T> {
        let by = Instant::now() + limit;
        let mut entries = self.lock();
        loop {
            if let Some(found) = find(&entries) {
                return Some(found);
            }
            let left = by.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return None;
            }
            entries = self
                .0
                .added
                .wait_timeout(entries, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    /// Whether the coordinator has come by this point.
    #[must_use]
    pub fn passed(&self, at: At) -> bool {
        let is_it =
            |entry: &Entry| matches!(entry.what, What::Said(Said::At(there, _)) if there == at);
        self.lock().iter().any(is_it)
    }

    /// The exit code and reason of the coordinator, if its move is over.
    #[must_use]
    pub fn end(&self) -> Option<(u8, Option<String>)> {
        self.lock().iter().find_map(|entry| match &entry.what {
            What::Said(Said::End(code, reason)) => Some((*code, reason.clone())),
            _ => None,
        })
    }

    /// As text, with times since `from`.
    #[must_use]
    pub fn text(&self, from: Micros) -> String {
        use std::fmt::Write;
        let mut text = String::new();
        let mut entries = self.entries();
        entries.sort_by_key(|entry| entry.at);
        for entry in entries {
            let ms = if entry.at < from {
                -(from.since(entry.at).as_secs_f64() * 1e3)
            } else {
                entry.at.since(from).as_secs_f64() * 1e3
            };
            let _ = writeln!(text, "{ms:9.1} ms {:12} {}", entry.who, entry.text());
        }
        text
    }
}

/// Control addresses of a lab's hosts.
#[must_use]
pub fn addresses(lab: &Lab) -> Vec<(HostId, ControlAddress)> {
    lab.spec
        .hosts
        .iter()
        .enumerate()
        .map(|(index, host)| (HostId(index), ControlAddress::Unix(lab.control(host))))
        .collect()
}

/// Writes into the log what the sidecars tell, until it is dropped.
#[derive(Debug)]
pub struct Listener {
    stop: Arc<std::sync::atomic::AtomicBool>,
    thread: Option<std::thread::JoinHandle<()>>,
}

const LOOK_EVERY: Duration = Duration::from_millis(50);

impl Listener {
    /// Connects to every sidecar of the lab.
    #[must_use]
    pub fn start(lab: &Lab, log: &Log) -> Self {
        let client = Client::connect_to(addresses(lab));
        let connected = client.wait_connected(Duration::from_secs(5));
        let hosts = lab.spec.hosts.clone();
        let log = log.clone();
        for (host, error) in connected {
            if let Err(error) = error {
                let text = format!("the testbed cannot listen: {error}");
                log.add(Micros::now(), &hosts[host.0], What::Trouble(text));
            }
        }
        let stop = Arc::new(std::sync::atomic::AtomicBool::new(false));
        let asked = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            while !asked.load(std::sync::atomic::Ordering::Relaxed) {
                let Some((host, message)) = client.receive(LOOK_EVERY) else {
                    continue;
                };
                if let Message::Event(envelope) = message {
                    if let Some(what) = read(&envelope.event) {
                        let who = format!("sidecar {}", hosts[host.0]);
                        log.add(Micros::now(), &who, what);
                    }
                }
            }
        });
        Self {
            stop,
            thread: Some(thread),
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.stop.store(true, std::sync::atomic::Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn read(event: &Event) -> Option<What> {
    let text = serde_json::to_string(event).unwrap_or_default();
    Some(match event {
        Event::Status { .. } | Event::Round { .. } => return None,
        Event::Failed { .. }
        | Event::CoordinatorLost { .. }
        | Event::InDoubt { .. }
        | Event::RolledBack { .. }
        | Event::Diverged { .. } => What::Trouble(text),
        Event::RunEnded { vms } => {
            let ends: Vec<String> = vms
                .iter()
                .map(|vm| format!("{} {:?} {}", vm.vm, vm.role, vm.phase))
                .collect();
            What::Event(format!("RUN_ENDED {}", ends.join(", ")))
        }
        _ => What::Event(text),
    })
}
