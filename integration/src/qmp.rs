//! A small blocking QMP client: the testbed's own monitor of a QEMU, beside Muster's.
//!
//! Every wait has a deadline. Events that pass by are kept, with the time at which QEMU sent them.

use std::collections::VecDeque;
use std::io::{self, IoSlice, Read, Write};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::sys::socket::{ControlMessage, MsgFlags, getsockopt, sendmsg, sockopt::PeerCredentials};
use serde_json::{Value, json};

use crate::clock::Micros;

const MAX_LINE: usize = 16 << 20;
const CONNECT_EVERY: Duration = Duration::from_millis(2);

/// Why a QMP monitor did not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum QmpError {
    /// The socket could not be connected in time.
    #[error("cannot connect to QEMU's monitor {path}: {error}")]
    Connect {
        /// The socket.
        path: PathBuf,
        /// The last error.
        error: io::Error,
    },
    /// The connection broke.
    #[error("QEMU's monitor {path} broke while waiting for {what}: {error}")]
    Broken {
        /// The socket.
        path: PathBuf,
        /// What was waited for.
        what: String,
        /// Why.
        error: io::Error,
    },
    /// Nothing came in time.
    #[error(
        "QEMU's monitor {path}: no {what} within {waited:?} (does another client hold the monitor?)"
    )]
    Timeout {
        /// The socket.
        path: PathBuf,
        /// What was waited for.
        what: String,
        /// How long.
        waited: Duration,
    },
    /// QEMU refused.
    #[error("QEMU refuses {command}: {description}")]
    Refused {
        /// The command.
        command: String,
        /// QEMU's words.
        description: String,
    },
    /// What came is not QMP.
    #[error("QEMU's monitor {path} sent `{line}`, which is not QMP")]
    Garbage {
        /// The socket.
        path: PathBuf,
        /// What came.
        line: String,
    },
}

/// One event of QEMU.
#[derive(Debug, Clone, PartialEq)]
pub struct Event {
    /// Its name, such as `STOP`.
    pub name: String,
    /// Its data.
    pub data: Value,
    /// When QEMU sent it.
    pub at: Micros,
}

/// A connection to one QEMU's monitor.
#[derive(Debug)]
pub struct Qmp {
    path: PathBuf,
    stream: UnixStream,
    buffer: Vec<u8>,
    events: VecDeque<Event>,
    next_id: u64,
}

impl Qmp {
    /// Connects, waits for the greeting, and enters command mode. The socket may still be missing
    /// when this is called.
    ///
    /// # Errors
    /// If that is not done within `limit`.
    pub fn connect(path: &Path, limit: Duration) -> Result<Self, QmpError> {
        Self::connect_while(path, limit, || true)
    }

    /// As [`connect`](Self::connect), but gives up on a missing socket when `alive` says that
    /// nobody will make it any more.
    ///
    /// # Errors
    /// If that is not done within `limit`.
    pub fn connect_while(
        path: &Path,
        limit: Duration,
        mut alive: impl FnMut() -> bool,
    ) -> Result<Self, QmpError> {
        let deadline = Instant::now() + limit;
        let stream = loop {
            match UnixStream::connect(path) {
                Ok(stream) => break stream,
                Err(error) if Instant::now() >= deadline || !alive() => {
                    let path = path.to_owned();
                    return Err(QmpError::Connect { path, error });
                }
                Err(_) => std::thread::sleep(CONNECT_EVERY),
            }
        };
        let mut qmp = Self {
            path: path.to_owned(),
            stream,
            buffer: Vec::new(),
            events: VecDeque::new(),
            next_id: 1,
        };
        let left = || deadline.saturating_duration_since(Instant::now());
        let greeting = qmp.next_line("greeting", left())?;
        if greeting.get("QMP").is_none() {
            return Err(qmp.garbage(greeting.to_string()));
        }
        qmp.execute("qmp_capabilities", json!({}), left())?;
        Ok(qmp)
    }

    /// Executes a command and returns what it returns.
    ///
    /// # Errors
    /// If QEMU refuses, the connection breaks, or no answer comes within `limit`.
    pub fn execute(
        &mut self,
        command: &str,
        arguments: Value,
        limit: Duration,
    ) -> Result<Value, QmpError> {
        self.send_and_wait(command, arguments, None, limit)
    }

    /// Passes a descriptor to QEMU, where later commands call it `name`.
    ///
    /// # Errors
    /// As [`execute`](Self::execute).
    pub fn pass_fd(&mut self, name: &str, fd: BorrowedFd, limit: Duration) -> Result<(), QmpError> {
        self.send_and_wait("getfd", json!({"fdname": name}), Some(fd), limit)?;
        Ok(())
    }

    fn send_and_wait(
        &mut self,
        command: &str,
        arguments: Value,
        fd: Option<BorrowedFd>,
        limit: Duration,
    ) -> Result<Value, QmpError> {
        let id = self.next_id;
        self.next_id += 1;
        let mut line = json!({"execute": command, "arguments": arguments, "id": id}).to_string();
        line.push('\n');
        let deadline = Instant::now() + limit;
        self.stream
            .set_write_timeout(Some(limit.max(Duration::from_millis(1))))
            .and_then(|()| send(&mut self.stream, line.as_bytes(), fd))
            .map_err(|error| self.broken(command, error))?;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let mut message = self.next_line(command, left)?;
            if message.get("id") != Some(&json!(id)) {
                continue;
            }
            if let Some(value) = message.get_mut("return") {
                return Ok(value.take());
            }
            let description = message["error"]["desc"].as_str().unwrap_or("?");
            return Err(QmpError::Refused {
                command: command.to_owned(),
                description: description.to_owned(),
            });
        }
    }

    /// Executes a command of the human monitor and returns its text.
    ///
    /// # Errors
    /// As [`execute`](Self::execute).
    pub fn human(&mut self, line: &str, limit: Duration) -> Result<String, QmpError> {
        let arguments = json!({"command-line": line});
        let value = self.execute("human-monitor-command", arguments, limit)?;
        Ok(value.as_str().unwrap_or_default().to_owned())
    }

    /// The run state, such as `running` or `postmigrate`.
    ///
    /// # Errors
    /// As [`execute`](Self::execute).
    pub fn run_state(&mut self, limit: Duration) -> Result<String, QmpError> {
        let value = self.execute("query-status", json!({}), limit)?;
        Ok(value["status"].as_str().unwrap_or_default().to_owned())
    }

    /// Takes the next kept event of that name, or waits for it. Other events stay kept.
    ///
    /// # Errors
    /// If it does not come within `limit`.
    pub fn wait_event(&mut self, name: &str, limit: Duration) -> Result<Event, QmpError> {
        let deadline = Instant::now() + limit;
        loop {
            if let Some(index) = self.events.iter().position(|event| event.name == name) {
                if let Some(event) = self.events.remove(index) {
                    return Ok(event);
                }
            }
            let left = deadline.saturating_duration_since(Instant::now());
            self.next_line(name, left)?;
        }
    }

    /// Takes all events that have come, without waiting.
    ///
    /// # Errors
    /// If the connection is broken.
    pub fn take_events(&mut self) -> Result<Vec<Event>, QmpError> {
        loop {
            match self.next_line("events", Duration::ZERO) {
                Ok(_) => {}
                Err(QmpError::Timeout { .. }) => return Ok(self.events.drain(..).collect()),
                Err(error) => return Err(error),
            }
        }
    }

    /// The number of the process behind the socket.
    ///
    /// # Errors
    /// If the kernel does not tell.
    pub fn peer_pid(&self) -> io::Result<u32> {
        let credentials = getsockopt(&self.stream, PeerCredentials)?;
        u32::try_from(credentials.pid()).map_err(io::Error::other)
    }

    /// Reads one message; an event is kept and returned.
    fn next_line(&mut self, what: &str, limit: Duration) -> Result<Value, QmpError> {
        let deadline = Instant::now() + limit;
        let mut searched = 0;
        let end = loop {
            if let Some(at) = self.buffer[searched..]
                .iter()
                .position(|byte| *byte == b'\n')
            {
                break searched + at;
            }
            searched = self.buffer.len();
            let left = deadline.saturating_duration_since(Instant::now());
            self.fill(what, left.max(Duration::from_micros(1)), limit)?;
        };
        let line: Vec<u8> = self.buffer.drain(..=end).collect();
        let Ok(message) = serde_json::from_slice::<Value>(&line) else {
            return Err(self.garbage(String::from_utf8_lossy(&line).trim_end().to_owned()));
        };
        if let Some(name) = message.get("event").and_then(Value::as_str) {
            let stamp = &message["timestamp"];
            let part = |key: &str| stamp[key].as_u64().unwrap_or(0);
            self.events.push_back(Event {
                name: name.to_owned(),
                data: message["data"].clone(),
                at: Micros::from_unix_us(part("seconds") * 1_000_000 + part("microseconds")),
            });
        }
        Ok(message)
    }

    fn fill(&mut self, what: &str, left: Duration, limit: Duration) -> Result<(), QmpError> {
        let mut chunk = [0; 16384];
        let result = self
            .stream
            .set_read_timeout(Some(left))
            .and_then(|()| self.stream.read(&mut chunk));
        match result {
            Ok(0) => Err(self.broken(what, io::ErrorKind::UnexpectedEof.into())),
            Ok(_) if self.buffer.len() > MAX_LINE => Err(self.garbage("an endless line".into())),
            Ok(count) => {
                self.buffer.extend_from_slice(&chunk[..count]);
                Ok(())
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(()),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Err(QmpError::Timeout {
                path: self.path.clone(),
                what: what.to_owned(),
                waited: limit,
            }),
            Err(error) => Err(self.broken(what, error)),
        }
    }

    fn broken(&self, what: &str, error: io::Error) -> QmpError {
        QmpError::Broken {
            path: self.path.clone(),
            what: what.to_owned(),
            error,
        }
    }

    fn garbage(&self, line: String) -> QmpError {
        QmpError::Garbage {
            path: self.path.clone(),
            line,
        }
    }
}

/// Writes `line`; a descriptor goes with its first bytes.
fn send(stream: &mut UnixStream, line: &[u8], fd: Option<BorrowedFd>) -> io::Result<()> {
    let sent = match fd {
        Some(fd) => {
            let fds = [fd.as_raw_fd()];
            let control = [ControlMessage::ScmRights(&fds)];
            let data = [IoSlice::new(line)];
            sendmsg::<()>(stream.as_raw_fd(), &data, &control, MsgFlags::empty(), None)?
        }
        None => 0,
    };
    stream.write_all(&line[sent..])
}
