//! Connections to the sidecars' control sockets.
//!
//! Each host has one connection with a thread of its own: it connects, checks the greeting, leaves
//! capability negotiation, and then reads lines into one channel for all hosts. When the
//! connection breaks it says so and tries again until the [`Client`] is dropped. Writing happens
//! in the caller's thread, with a bound on how long it may take.

mod connection;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crossbeam::channel::{Receiver, RecvTimeoutError, unbounded};
use serde_json::Value;
use sidecar::protocol::codec::CommandError;
use sidecar::protocol::command::Command;
use sidecar::protocol::dirty::DirtyEvent;
use sidecar::protocol::event::Envelope;
use sidecar::protocol::probe::Probed;

use crate::application::{Application, ControlAddress, HostId};
use connection::{Line, Writer};

/// Why a sidecar could not be spoken to.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ClientError {
    /// No connection.
    #[error("cannot connect to {address}: {error}; is muster-sidecar running there?")]
    Connect {
        /// The control socket.
        address: String,
        /// Why.
        error: String,
    },
    /// The peer did not greet in time.
    #[error(
        "{address} does not greet within {seconds} s; another client may hold it, or the sidecar hangs"
    )]
    NoGreeting {
        /// The control socket.
        address: String,
        /// How long it was given.
        seconds: u64,
    },
    /// The peer is something else, or speaks another version.
    #[error("{address}: {error}")]
    Greeting {
        /// The control socket.
        address: String,
        /// What was found and what was expected.
        error: String,
    },
    /// The connection ended.
    #[error("the connection to {address} ended: {error}")]
    Ended {
        /// The control socket.
        address: String,
        /// Why.
        error: String,
    },
}

/// What arrives from a host.
#[derive(Debug)]
pub enum Message {
    /// The connection is open, greeting and negotiation are done. Carries the sidecar's host name.
    Connected {
        /// As the sidecar's own configuration names the host.
        host_name: String,
    },
    /// The connection could not be opened, or is gone. It is tried again.
    Lost(ClientError),
    /// The answer to the command with this id.
    Answer {
        /// As [`Client::send`] returned it.
        id: u64,
        /// What it returned.
        result: Result<Value, CommandError>,
    },
    /// An event.
    Event(Box<Envelope>),
    /// An event of a measurement that was begun on this connection.
    Dirty {
        /// The event.
        event: Box<DirtyEvent>,
        /// Unix time in microseconds.
        at_us: i64,
    },
    /// What a probe found that was begun on this connection.
    Probed(Probed),
}

/// Connections to all hosts that take part.
#[derive(Debug)]
pub struct Client {
    links: Vec<Link>,
    inbox: Receiver<(HostId, Message)>,
    stop: Arc<AtomicBool>,
    next_id: Arc<AtomicU64>,
}

#[derive(Debug)]
struct Link {
    host: HostId,
    writer: Writer,
}

/// Sends from another thread.
#[derive(Debug, Clone)]
pub struct Sender {
    links: Vec<(HostId, Writer)>,
    next_id: Arc<AtomicU64>,
}

impl Sender {
    /// Sends a command whose answer nobody waits for.
    pub fn send(&self, host: HostId, command: &Command) {
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        if let Some((_, writer)) = self.links.iter().find(|(at, _)| *at == host) {
            // A connection that does not take it is reported by its reader.
            let _ = writer.write(&command.to_line(id));
        }
    }
}

impl Client {
    /// Begins to connect to these hosts; [`Message::Connected`] or [`Message::Lost`] follow.
    #[must_use]
    pub fn connect(app: &Application, hosts: &[HostId]) -> Self {
        let addresses = hosts
            .iter()
            .map(|&host| (host, app.host(host).control.clone()));
        Self::connect_to(addresses)
    }

    /// The same for plain addresses.
    pub fn connect_to(hosts: impl IntoIterator<Item = (HostId, ControlAddress)>) -> Self {
        let (outbox, inbox) = unbounded();
        let stop = Arc::new(AtomicBool::new(false));
        let links = hosts
            .into_iter()
            .map(|(host, address)| {
                let writer = Writer::default();
                let line = Line {
                    host,
                    address,
                    writer: writer.clone(),
                    outbox: outbox.clone(),
                    stop: Arc::clone(&stop),
                };
                std::thread::spawn(move || line.run());
                Link { host, writer }
            })
            .collect();
        Self {
            links,
            inbox,
            stop,
            // 0 is the negotiation's.
            next_id: Arc::new(AtomicU64::new(1)),
        }
    }

    /// Sends a command and returns the id of its answer; `None`: there is no connection now.
    pub fn send(&self, host: HostId, command: &Command) -> Option<u64> {
        let link = self.links.iter().find(|link| link.host == host)?;
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        link.writer.write(&command.to_line(id)).ok().map(|()| id)
    }

    /// A handle that sends from another thread.
    #[must_use]
    pub fn sender(&self) -> Sender {
        let links = self
            .links
            .iter()
            .map(|link| (link.host, link.writer.clone()));
        Sender {
            links: links.collect(),
            next_id: Arc::clone(&self.next_id),
        }
    }

    /// The next message, at the latest after `timeout`.
    #[must_use]
    pub fn receive(&self, timeout: Duration) -> Option<(HostId, Message)> {
        match self.inbox.recv_timeout(timeout) {
            Ok(message) => Some(message),
            Err(RecvTimeoutError::Timeout) => None,
            Err(RecvTimeoutError::Disconnected) => {
                std::thread::sleep(timeout);
                None
            }
        }
    }

    /// The next message, if it is there already.
    #[must_use]
    pub fn try_receive(&self) -> Option<(HostId, Message)> {
        self.inbox.try_recv().ok()
    }

    /// Waits until every host has connected or could not be: the first answer of each.
    #[must_use]
    pub fn wait_connected(&self, within: Duration) -> Vec<(HostId, Result<String, ClientError>)> {
        let end = Instant::now() + within;
        let mut found: Vec<(HostId, Result<String, ClientError>)> = Vec::new();
        while found.len() < self.links.len() {
            let left = end.saturating_duration_since(Instant::now());
            let Some((host, message)) = self.receive(left) else {
                break;
            };
            let result = match message {
                Message::Connected { host_name } => Ok(host_name),
                Message::Lost(error) => Err(error),
                _ => continue,
            };
            if found.iter().all(|(known, _)| *known != host) {
                found.push((host, result));
            }
        }
        found
    }

    /// Sends queries and collects their answers, in the order of `queries`. Events are dropped.
    #[must_use]
    pub fn ask(
        &self,
        queries: &[(HostId, Command)],
        within: Duration,
    ) -> Vec<Result<Value, String>> {
        let end = Instant::now() + within;
        let ids: Vec<Option<u64>> = queries
            .iter()
            .map(|(host, command)| self.send(*host, command))
            .collect();
        let mut answers: Vec<Option<Result<Value, String>>> = ids
            .iter()
            .map(|id| {
                id.is_none()
                    .then(|| Err("there is no connection".to_owned()))
            })
            .collect();
        while answers.iter().any(Option::is_none) {
            let left = end.saturating_duration_since(Instant::now());
            let Some((from, message)) = self.receive(left) else {
                break;
            };
            match message {
                Message::Answer { id, result } => {
                    if let Some(index) = ids.iter().position(|known| *known == Some(id)) {
                        answers[index] = Some(result.map_err(|error| error.desc));
                    }
                }
                Message::Lost(error) => {
                    for (index, (host, _)) in queries.iter().enumerate() {
                        if *host == from && answers[index].is_none() {
                            answers[index] = Some(Err(error.to_string()));
                        }
                    }
                }
                _ => {}
            }
        }
        let silent = || Err(format!("no answer within {within:?}"));
        answers
            .into_iter()
            .map(|answer| answer.unwrap_or_else(silent))
            .collect()
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for link in &self.links {
            link.writer.close();
        }
    }
}
