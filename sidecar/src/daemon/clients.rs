//! Clients of the control socket: their connections, the lines they send, and what they are told.

use std::collections::VecDeque;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use anyhow::Context;
use mio::Token;
use mio::net::UnixListener;
use serde_json::json;

use super::control::{Answer, refuse};
use super::net::{Moved, Socket, read_some, write_some};
use super::storage::Asker;
use super::{Daemon, Slot, log};
use crate::migration::Now;
use crate::protocol::codec::{
    CommandError, MAX_LINE_BYTES, Request, answer_line, event_line, greeting_line, read_request,
};
use crate::protocol::event::Envelope;
use crate::protocol::lines::{Line, LineBuffer};

/// Output that a client may leave unread before it is dropped.
const MAX_UNREAD_BYTES: usize = 8 << 20;
/// Clients at once.
const MAX_CLIENTS: usize = 64;
/// Commands of one client, and reads from it, before others have their turn.
const STEPS_PER_TURN: usize = 64;

/// A client.
#[derive(Debug)]
pub struct Client {
    socket: Socket,
    lines: LineBuffer,
    output: VecDeque<u8>,
    pub(super) negotiated: bool,
    closed: bool,
}

/// Listens on the unix control socket; a socket that nobody serves is replaced.
///
/// # Errors
/// Another sidecar serves it, or it cannot be made.
pub fn listen_unix(path: &Path) -> anyhow::Result<UnixListener> {
    if std::os::unix::net::UnixStream::connect(path).is_ok() {
        anyhow::bail!(
            "another sidecar already serves {}: stop it, or configure another `control.unix`",
            path.display()
        );
    }
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(error).with_context(|| format!("{} is in the way", path.display()));
        }
        _ => {}
    }
    if let Some(parent) = path.parent() {
        std::fs::create_dir_all(parent)
            .with_context(|| format!("the directory {} cannot be made", parent.display()))?;
    }
    let listener = UnixListener::bind(path)
        .with_context(|| format!("the control socket {} cannot be made", path.display()))?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o660))
        .with_context(|| format!("the mode of {} cannot be set", path.display()))?;
    Ok(listener)
}

impl Daemon {
    pub(super) fn accept_clients(&mut self, slot: Slot) {
        loop {
            let accepted = match slot {
                Slot::ControlTcp => match &self.control_tcp {
                    Some(listener) => listener.accept().map(|(s, _)| Socket::tcp(s)),
                    None => return,
                },
                _ => self
                    .control_unix
                    .accept()
                    .map(|(socket, _)| Socket::Unix(socket)),
            };
            let Ok(mut socket) = accepted else { return };
            if self.clients.len() >= MAX_CLIENTS {
                log("too many control clients; one was refused");
                continue;
            }
            let token = self.token(Slot::Client);
            if socket.register(self.poll.registry(), token).is_err() {
                self.slots.remove(&token);
                continue;
            }
            let client = Client {
                socket,
                lines: LineBuffer::new(MAX_LINE_BYTES),
                output: greeting_line(&self.config.host).into(),
                negotiated: false,
                closed: false,
            };
            self.clients.insert(token.0, client);
            self.flush_client(token.0);
        }
    }

    pub(super) fn serve_client(&mut self, now: Now, id: usize) {
        let mut buffer = [0; 16384];
        let mut left = STEPS_PER_TURN;
        let mut drained = false;
        while left > 0 && !drained {
            left -= self.serve_lines(now, id, left);
            let Some(client) = self.clients.get_mut(&id).filter(|c| left > 0 && !c.closed) else {
                break;
            };
            left -= 1;
            match read_some(&mut client.socket, &mut buffer) {
                Moved::Bytes(n) => client.lines.push(&buffer[..n]),
                Moved::Blocked => drained = true,
                Moved::End | Moved::Broken(_) => client.closed = true,
            }
        }
        self.flush_client(id);
        match self.clients.get(&id) {
            Some(client) if client.closed => self.drop_client(id),
            Some(_) if !drained => self.eager_clients.push(id),
            _ => {}
        }
    }

    /// Obeys at most `limit` commands of a client; how many.
    fn serve_lines(&mut self, now: Now, id: usize, limit: usize) -> usize {
        for served in 0..limit {
            let client = self.clients.get_mut(&id).filter(|c| !c.closed);
            let Some(line) = client.and_then(|client| client.lines.next_line()) else {
                return served;
            };
            let request = match line {
                Line::Whole(line) => read_request(&line),
                Line::TooLong => {
                    let text = format!("a command is at most {MAX_LINE_BYTES} bytes");
                    let command = Err(CommandError::generic(text));
                    Request {
                        id: None,
                        oob: false,
                        command,
                    }
                }
            };
            let asker = Asker {
                client: id,
                id: request.id.clone(),
            };
            if let Some(result) = self.obey(now, id, request) {
                self.answer(asker, &result);
            }
        }
        limit
    }

    fn drop_client(&mut self, id: usize) {
        let Some(mut client) = self.clients.remove(&id) else {
            return;
        };
        client.socket.deregister(self.poll.registry());
        self.slots.remove(&Token(id));
        self.end_measurements_of(id);
        self.end_probes_of(id);
        for entry in self
            .runs
            .values_mut()
            .filter(|entry| entry.owner == Some(id))
        {
            entry.owner = None;
            entry
                .run
                .lose_coordinator("the coordinator's connection ended");
        }
    }

    fn flush_client(&mut self, id: usize) {
        let Some(client) = self.clients.get_mut(&id) else {
            return;
        };
        while !client.output.is_empty() {
            let (front, _) = client.output.as_slices();
            match write_some(&mut client.socket, front) {
                Moved::Bytes(n) => drop(client.output.drain(..n)),
                Moved::Blocked => break,
                Moved::End | Moved::Broken(_) => {
                    client.closed = true;
                    break;
                }
            }
        }
        if client.output.len() > MAX_UNREAD_BYTES {
            log("a control client does not read what it is told; it was dropped");
            client.closed = true;
        }
    }

    pub(super) fn answer(&mut self, asker: Asker, result: &Answer) {
        self.tell_client(asker.client, &answer_line(asker.id.as_ref(), result));
    }

    /// Sends a line to one client.
    pub(super) fn tell_client(&mut self, id: usize, line: &[u8]) {
        if let Some(client) = self.clients.get_mut(&id) {
            client.output.extend(line);
            self.flush_client(id);
        }
        // One that takes no answers gets no further turn of its own to be dropped in.
        if self.clients.get(&id).is_some_and(|c| c.closed) {
            self.eager_clients.push(id);
        }
    }

    pub(super) fn broadcast(&mut self, envelope: &Envelope) {
        let line = event_line(envelope);
        let mut closed = Vec::new();
        for (id, client) in self
            .clients
            .iter_mut()
            .filter(|(_, client)| client.negotiated)
        {
            client.output.extend(&line);
            closed.push(*id);
        }
        for id in closed {
            self.flush_client(id);
            if self.clients.get(&id).is_some_and(|client| client.closed) {
                self.drop_client(id);
            }
        }
    }

    pub(super) fn negotiate(
        &mut self,
        client: usize,
        negotiated: bool,
        enable: &[String],
    ) -> Answer {
        if negotiated {
            let text = "capabilities negotiation is already complete, command ignored";
            return Err(CommandError::not_found(text));
        }
        if let Some(unknown) = enable.iter().find(|name| *name != "oob") {
            return refuse(format!("capability `{unknown}` is not known; `oob` is"));
        }
        if let Some(client) = self.clients.get_mut(&client) {
            client.negotiated = true;
        }
        Ok(json!({}))
    }
}
