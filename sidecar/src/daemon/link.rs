//! A sidecar as client of another sidecar: to ask the register.
//!
//! The control protocol is QMP's, so the QMP client does the talking. The connection is made when
//! there is something to ask and kept for the run; every question has a deadline.

use std::io;
use std::path::Path;
use std::time::{Duration, Instant};

use mio::Token;
use serde_json::{Value, json};
use uuid::Uuid;

use super::net::{Moved, Socket, read_some, write_some};
use super::storage::read_records;
use super::{Daemon, Slot};
use crate::migration::Now;
use crate::protocol::types::{RecordKey, RecordValue};
use crate::qmp::{QmpClient, QmpMessage};
use crate::run::Ask;

const ANSWER: Duration = Duration::from_secs(1);

/// What the register holds of a run.
pub type Records = Vec<(RecordKey, RecordValue)>;

/// A connection to the register's sidecar.
#[derive(Debug)]
pub struct Link {
    /// The poll token.
    pub token: Token,
    /// The socket.
    pub socket: Socket,
    client: QmpClient<Ask>,
}

/// Begins to connect to `unix:PATH` or `tcp:HOST:PORT`.
///
/// # Errors
/// The address is wrong or nobody listens there.
pub fn connect(address: &str) -> io::Result<Socket> {
    if let Some(path) = address.strip_prefix("unix:") {
        return Socket::connect_unix(Path::new(path));
    }
    let host = address.strip_prefix("tcp:").unwrap_or(address);
    // Names are not resolved: that could block the loop.
    let resolved = host.parse().map_err(|_| {
        io::Error::other(format!("`{address}` is neither unix:PATH nor tcp:IP:PORT"))
    })?;
    Socket::connect_tcp(resolved)
}

impl Link {
    /// A link over a socket that is being connected.
    #[must_use]
    pub fn new(now: Instant, token: Token, socket: Socket) -> Self {
        Self {
            token,
            socket,
            client: QmpClient::new(now),
        }
    }

    /// Sends a question.
    pub fn ask(&mut self, now: Instant, run: Uuid, ask: Ask) {
        let (command, arguments) = match ask {
            Ask::Records => ("query-decision", json!({ "run": run })),
            Ask::Decide(RecordKey::Group, value) => {
                ("decide", json!({ "run": run, "value": value }))
            }
            Ask::Decide(RecordKey::Vm(vm), value) => {
                ("decide", json!({ "run": run, "vm": vm, "value": value }))
            }
        };
        self.client.send(now, ask, command, arguments, ANSWER);
    }

    /// Moves bytes; the records of an answer, if one came.
    ///
    /// # Errors
    /// The connection is of no more use; why.
    pub fn step(&mut self, now: Instant) -> Result<Option<Records>, String> {
        let mut records = None;
        loop {
            let mut buffer = [0; 16384];
            let moved = read_some(&mut self.socket, &mut buffer);
            match moved {
                Moved::Bytes(n) => self.client.receive(&buffer[..n]),
                Moved::Blocked => break,
                Moved::End => return Err("it hung up".into()),
                Moved::Broken(error) if error.kind() == io::ErrorKind::NotConnected => break,
                Moved::Broken(error) => return Err(error.to_string()),
            }
        }
        while let Some(message) = self.client.poll(now).map_err(|error| error.to_string())? {
            if let QmpMessage::Reply { tag, result } = message {
                records
                    .get_or_insert_with(Vec::new)
                    .extend(read_answer(tag, &result?)?);
            }
        }
        while !self.client.output().is_empty() {
            match write_some(&mut self.socket, self.client.output()) {
                Moved::Bytes(n) => self.client.written(n),
                Moved::Blocked | Moved::End => break,
                Moved::Broken(error) => return Err(error.to_string()),
            }
        }
        Ok(records)
    }

    /// Whether no answer is outstanding.
    #[must_use]
    pub fn is_quiet(&self) -> bool {
        self.client.is_quiet()
    }
}

fn read_answer(ask: Ask, value: &Value) -> Result<Records, String> {
    match ask {
        Ask::Records => Ok(read_records(value)),
        Ask::Decide(key, _) => {
            let value = serde_json::from_value(value["value"].clone())
                .map_err(|error| format!("its answer has no `value`: {error}"))?;
            Ok(vec![(key, value)])
        }
    }
}

impl Daemon {
    pub(super) fn ask_register(&mut self, now: Now, run: Uuid, ask: Ask) {
        let Some(entry) = self.runs.get(&run) else {
            return;
        };
        let address = entry.run.register.clone();
        if !self.links.contains_key(&run) {
            let connected = connect(&address).and_then(|mut socket| {
                let token = self.token(Slot::Link(run));
                socket.register(self.poll.registry(), token)?;
                Ok(Link::new(now.mono, token, socket))
            });
            match connected {
                Ok(link) => {
                    self.links.insert(run, link);
                }
                Err(error) => {
                    if let Some(entry) = self.runs.get_mut(&run) {
                        entry.run.not_answered(now, &error.to_string());
                    }
                    return;
                }
            }
        }
        if let Some(link) = self.links.get_mut(&run) {
            link.ask(now.mono, run, ask);
        }
        self.serve_link(now, run);
    }

    pub(super) fn serve_link(&mut self, now: Now, run: Uuid) {
        let Some(link) = self.links.get_mut(&run) else {
            return;
        };
        let step = link.step(now.mono);
        let Some(entry) = self.runs.get_mut(&run) else {
            return;
        };
        match step {
            Ok(Some(records)) => entry.run.answered(now, &records),
            Ok(None) => {}
            Err(error) => {
                let was_asked = !link.is_quiet();
                if was_asked {
                    entry.run.not_answered(now, &error);
                }
                self.drop_link(run);
            }
        }
    }

    pub(super) fn drop_link(&mut self, run: Uuid) {
        if let Some(mut link) = self.links.remove(&run) {
            link.socket.deregister(self.poll.registry());
            self.slots.remove(&link.token);
        }
    }
}
