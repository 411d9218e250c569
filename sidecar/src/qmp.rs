//! A QMP client without I/O: bytes in, messages out, and the next deadline.
//!
//! Call [`QmpClient::receive`] with what the socket gave, drain [`QmpClient::poll`], then write
//! [`QmpClient::output`]. Every command has a deadline; [`QmpClient::overdue`] tells when QEMU owes
//! an answer. One client per monitor: QEMU serves one connection at a time, a greeting that does
//! not come usually means that somebody else holds it.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use serde_json::{Map, Value, json};

use crate::protocol::lines::{Line, LineBuffer};

/// Longest line accepted from QEMU.
const MAX_LINE_BYTES: usize = 8 << 20;
/// QEMU greets within this time, or somebody else holds the monitor.
const GREETING_DEADLINE: Duration = Duration::from_secs(2);

/// What QEMU said.
#[derive(Debug, Clone, PartialEq)]
pub enum QmpMessage<T> {
    /// Negotiation is over; commands flow. Carries QEMU's version, such as `10.0.2`.
    Ready {
        /// QEMU's version.
        version: String,
        /// Whether out-of-band commands are on.
        oob: bool,
    },
    /// The answer to the command sent with this tag: its return value, or QEMU's description.
    Reply {
        /// The tag given to [`QmpClient::send`].
        tag: T,
        /// The return value or the error's description.
        result: Result<Value, String>,
    },
    /// An asynchronous event.
    Event {
        /// Its name, such as `STOP`.
        name: String,
        /// Its data, `Null` if it has none.
        data: Value,
        /// QEMU's timestamp: unix time in microseconds.
        at_us: i64,
    },
}

/// Why the connection cannot be used any more.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum QmpError {
    /// The peer does not speak QMP.
    #[error("the monitor does not speak QMP: {0}")]
    Protocol(String),
    /// No greeting.
    #[error(
        "no greeting from the monitor within 2 s: another client (libvirt?) holds it, or QEMU hangs \
         or has only begun to start; give Muster a monitor of its own (-qmp unix:PATH,server=on,wait=off)"
    )]
    NoGreeting,
    /// An answer is overdue.
    #[error("QEMU has not answered `{command}` for {waited_ms} ms: it hangs")]
    Overdue {
        /// The command.
        command: String,
        /// How long it has been waited for, in ms.
        waited_ms: u128,
    },
}

#[derive(Debug)]
struct Pending<T> {
    id: u64,
    tag: T,
    command: String,
    sent: Instant,
    deadline: Instant,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Greeting { deadline: Instant },
    Negotiating { deadline: Instant },
    Ready,
}

/// The client's side of one monitor connection; `T` tags commands.
#[derive(Debug)]
pub struct QmpClient<T> {
    lines: LineBuffer,
    output: Vec<u8>,
    queued: Vec<u8>,
    /// Where in `output` the commands begin that a descriptor goes with.
    marks: VecDeque<usize>,
    queued_marks: Vec<usize>,
    state: State,
    pending: VecDeque<Pending<T>>,
    next_id: u64,
    version: String,
    oob: bool,
}

impl<T> QmpClient<T> {
    /// A client for a connection that was just made.
    #[must_use]
    pub fn new(now: Instant) -> Self {
        Self {
            lines: LineBuffer::new(MAX_LINE_BYTES),
            output: Vec::new(),
            queued: Vec::new(),
            marks: VecDeque::new(),
            queued_marks: Vec::new(),
            state: State::Greeting {
                deadline: now + GREETING_DEADLINE,
            },
            pending: VecDeque::new(),
            next_id: 1,
            version: String::new(),
            oob: false,
        }
    }

    /// Sends a command; `timeout` is how long its answer may take.
    pub fn send(
        &mut self,
        now: Instant,
        tag: T,
        command: &str,
        arguments: Value,
        timeout: Duration,
    ) {
        self.send_as("execute", now, tag, command, arguments, timeout);
    }

    /// Sends a command that a descriptor goes with (`getfd`): whoever writes the output passes it
    /// with the first byte of exactly that command, see [`Self::carries_descriptor`].
    pub fn send_with_descriptor(
        &mut self,
        now: Instant,
        tag: T,
        command: &str,
        arguments: Value,
        timeout: Duration,
    ) {
        if self.state == State::Ready {
            self.marks.push_back(self.output.len());
        } else {
            self.queued_marks.push(self.queued.len());
        }
        self.send_as("execute", now, tag, command, arguments, timeout);
    }

    /// Sends a command out-of-band where the connection allows it.
    pub fn send_oob(
        &mut self,
        now: Instant,
        tag: T,
        command: &str,
        arguments: Value,
        timeout: Duration,
    ) {
        let verb = if self.oob { "exec-oob" } else { "execute" };
        self.send_as(verb, now, tag, command, arguments, timeout);
    }

    fn send_as(
        &mut self,
        verb: &str,
        now: Instant,
        tag: T,
        command: &str,
        arguments: Value,
        timeout: Duration,
    ) {
        let id = self.next_id;
        self.next_id += 1;
        let mut object = Map::new();
        object.insert(verb.to_owned(), json!(command));
        if !arguments.is_null() {
            object.insert("arguments".to_owned(), arguments);
        }
        object.insert("id".to_owned(), json!(id));
        let mut line = Value::Object(object).to_string().into_bytes();
        line.push(b'\n');
        if self.state == State::Ready {
            self.output.extend_from_slice(&line);
        } else {
            self.queued.extend_from_slice(&line);
        }
        let command = command.to_owned();
        self.pending.push_back(Pending {
            id,
            tag,
            command,
            sent: now,
            deadline: now + timeout,
        });
    }

    /// Bytes to write to the socket; remove what was written with [`Self::written`], and ask again:
    /// a command that a descriptor goes with comes alone.
    #[must_use]
    pub fn output(&self) -> &[u8] {
        let end = match self.marks.front() {
            None => self.output.len(),
            Some(0) => {
                let newline = self.output.iter().position(|byte| *byte == b'\n');
                newline.map_or(self.output.len(), |at| at + 1)
            }
            Some(at) => *at,
        };
        &self.output[..end]
    }

    /// Whether a descriptor is to be passed with the first byte of [`Self::output`].
    #[must_use]
    pub fn carries_descriptor(&self) -> bool {
        self.marks.front() == Some(&0)
    }

    /// Forgets the first `n` bytes of the output.
    pub fn written(&mut self, n: usize) {
        let n = n.min(self.output.len());
        self.output.drain(..n);
        if n > 0 && self.carries_descriptor() {
            self.marks.pop_front();
        }
        for mark in &mut self.marks {
            *mark = mark.saturating_sub(n);
        }
    }

    /// Takes bytes from the socket.
    pub fn receive(&mut self, bytes: &[u8]) {
        self.lines.push(bytes);
    }

    /// Whether no answer is outstanding.
    #[must_use]
    pub fn is_quiet(&self) -> bool {
        self.pending.is_empty()
    }

    /// The next thing QEMU said.
    ///
    /// # Errors
    /// The peer does not speak QMP; the connection is of no more use.
    pub fn poll(&mut self, now: Instant) -> Result<Option<QmpMessage<T>>, QmpError> {
        while let Some(line) = self.lines.next_line() {
            let Line::Whole(line) = line else {
                return Err(QmpError::Protocol(format!(
                    "a line over {MAX_LINE_BYTES} bytes"
                )));
            };
            let value: Value = serde_json::from_slice(&line)
                .map_err(|error| QmpError::Protocol(format!("invalid JSON: {error}")))?;
            if let Some(message) = self.handle(now, value)? {
                return Ok(Some(message));
            }
        }
        Ok(None)
    }

    fn handle(
        &mut self,
        now: Instant,
        mut value: Value,
    ) -> Result<Option<QmpMessage<T>>, QmpError> {
        match self.state {
            State::Greeting { .. } => {
                let Some(greeting) = value.get("QMP") else {
                    return Err(QmpError::Protocol(
                        "it did not begin with a greeting".into(),
                    ));
                };
                let qemu = &greeting["version"]["qemu"];
                let part = |name: &str| qemu[name].as_u64().unwrap_or(0);
                self.version = format!("{}.{}.{}", part("major"), part("minor"), part("micro"));
                let offers_oob = greeting["capabilities"]
                    .as_array()
                    .is_some_and(|list| list.iter().any(|item| item == "oob"));
                self.oob = offers_oob;
                let enable: &[&str] = if offers_oob { &["oob"] } else { &[] };
                let command = json!({
                    "execute": "qmp_capabilities",
                    "arguments": { "enable": enable },
                });
                self.output
                    .extend_from_slice(command.to_string().as_bytes());
                self.output.push(b'\n');
                self.state = State::Negotiating {
                    deadline: now + GREETING_DEADLINE,
                };
                Ok(None)
            }
            State::Negotiating { .. } if value.get("return").is_some() => {
                self.state = State::Ready;
                let queued = std::mem::take(&mut self.queued);
                let marks = std::mem::take(&mut self.queued_marks);
                let start = self.output.len();
                self.marks.extend(marks.into_iter().map(|at| start + at));
                self.output.extend_from_slice(&queued);
                Ok(Some(QmpMessage::Ready {
                    version: self.version.clone(),
                    oob: self.oob,
                }))
            }
            State::Negotiating { .. } if value.get("error").is_some() => Err(QmpError::Protocol(
                format!("qmp_capabilities: {}", value["error"]["desc"]),
            )),
            _ => Ok(self.message(&mut value)),
        }
    }

    fn message(&mut self, value: &mut Value) -> Option<QmpMessage<T>> {
        if let Some(name) = value["event"].as_str() {
            let name = name.to_owned();
            let stamp = &value["timestamp"];
            let seconds = stamp["seconds"].as_i64().unwrap_or(0);
            let micros = stamp["microseconds"].as_i64().unwrap_or(0);
            let at_us = seconds.saturating_mul(1_000_000).saturating_add(micros);
            return Some(QmpMessage::Event {
                name,
                data: value["data"].take(),
                at_us,
            });
        }
        let id = value["id"].as_u64()?;
        let index = self.pending.iter().position(|pending| pending.id == id)?;
        let pending = self.pending.remove(index)?;
        let result = match value.get_mut("return") {
            Some(value) => Ok(value.take()),
            None => Err(value["error"]["desc"]
                .as_str()
                .unwrap_or("no description")
                .to_owned()),
        };
        Some(QmpMessage::Reply {
            tag: pending.tag,
            result,
        })
    }

    /// When [`Self::overdue`] has to be asked again.
    #[must_use]
    pub fn deadline(&self) -> Option<Instant> {
        let state = match self.state {
            State::Greeting { deadline } | State::Negotiating { deadline } => Some(deadline),
            State::Ready => None,
        };
        self.pending
            .iter()
            .map(|pending| pending.deadline)
            .chain(state)
            .min()
    }

    /// Puts off every deadline to `until` at least: QEMU may be silent in stop-and-copy.
    pub fn extend_deadlines(&mut self, until: Instant) {
        for pending in &mut self.pending {
            pending.deadline = pending.deadline.max(until);
        }
    }

    /// The first answer that is overdue, if one is.
    #[must_use]
    pub fn overdue(&self, now: Instant) -> Option<QmpError> {
        match self.state {
            State::Greeting { deadline } | State::Negotiating { deadline } if deadline <= now => {
                return Some(QmpError::NoGreeting);
            }
            _ => {}
        }
        let pending = self
            .pending
            .iter()
            .find(|pending| pending.deadline <= now)?;
        Some(QmpError::Overdue {
            command: pending.command.clone(),
            waited_ms: now.saturating_duration_since(pending.sent).as_millis(),
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const GREETING: &[u8] = br#"{"QMP": {"version": {"qemu": {"micro": 2, "minor": 0, "major": 10}, "package": ""}, "capabilities": ["oob"]}}
"#;

    fn ready(now: Instant) -> QmpClient<u32> {
        let mut qmp = QmpClient::new(now);
        qmp.receive(GREETING);
        assert_eq!(qmp.poll(now), Ok(None));
        assert!(String::from_utf8_lossy(qmp.output()).contains("\"oob\""));
        qmp.written(qmp.output().len());
        qmp.receive(b"{\"return\": {}}\n");
        let expected = QmpMessage::Ready {
            version: "10.0.2".into(),
            oob: true,
        };
        assert_eq!(qmp.poll(now), Ok(Some(expected)));
        qmp
    }

    #[test]
    fn negotiates_then_pairs_replies_with_commands() {
        let now = Instant::now();
        let mut qmp = ready(now);
        qmp.send(now, 1, "query-status", Value::Null, Duration::from_secs(1));
        qmp.send_oob(
            now,
            2,
            "yank",
            json!({"instances": []}),
            Duration::from_secs(2),
        );
        assert!(String::from_utf8_lossy(qmp.output()).contains("exec-oob"));
        qmp.receive(b"{\"error\": {\"class\": \"GenericError\", \"desc\": \"no\"}, \"id\": 2}\n");
        qmp.receive(
            b"{\"event\": \"STOP\", \"timestamp\": {\"seconds\": 1, \"microseconds\": 5}}\n",
        );
        qmp.receive(b"{\"return\": {\"status\": \"running\"}, \"id\": 1}\n");
        let reply = QmpMessage::Reply {
            tag: 2,
            result: Err("no".into()),
        };
        assert_eq!(qmp.poll(now), Ok(Some(reply)));
        let event = QmpMessage::Event {
            name: "STOP".into(),
            data: Value::Null,
            at_us: 1_000_005,
        };
        assert_eq!(qmp.poll(now), Ok(Some(event)));
        let reply = QmpMessage::Reply {
            tag: 1,
            result: Ok(json!({"status": "running"})),
        };
        assert_eq!(qmp.poll(now), Ok(Some(reply)));
        assert!(qmp.is_quiet());
    }

    #[test]
    fn a_descriptor_goes_with_its_command_alone() {
        let now = Instant::now();
        let mut qmp = ready(now);
        let second = Duration::from_secs(1);
        let name = json!({"fdname": "a"});
        qmp.send(now, 1, "stop", Value::Null, second);
        qmp.send_with_descriptor(now, 2, "getfd", name.clone(), second);
        qmp.send(now, 3, "cont", Value::Null, second);
        let text = |qmp: &QmpClient<u32>| String::from_utf8_lossy(qmp.output()).into_owned();
        assert!(text(&qmp).contains("stop") && !text(&qmp).contains("getfd"));
        assert!(!qmp.carries_descriptor());
        qmp.written(5);
        qmp.written(qmp.output().len());
        assert!(qmp.carries_descriptor());
        assert!(text(&qmp).contains("getfd") && !text(&qmp).contains("cont"));
        // It went with the first bytes; the rest of the line needs none.
        qmp.written(3);
        assert!(!qmp.carries_descriptor() && text(&qmp).contains("cont"));
        qmp.written(qmp.output().len());

        let mut early = QmpClient::new(now);
        early.send(now, 1, "stop", Value::Null, second);
        early.send_with_descriptor(now, 2, "getfd", name, second);
        early.receive(GREETING);
        assert_eq!(early.poll(now), Ok(None));
        early.receive(b"{\"return\": {}}\n");
        assert!(matches!(
            early.poll(now),
            Ok(Some(QmpMessage::Ready { .. }))
        ));
        early.written(early.output().len());
        assert!(early.carries_descriptor() && text(&early).contains("getfd"));
    }

    #[test]
    fn a_silent_monitor_and_a_late_answer_are_noticed() {
        let now = Instant::now();
        let silent = QmpClient::<u32>::new(now);
        assert_eq!(
            silent.overdue(now + Duration::from_secs(3)),
            Some(QmpError::NoGreeting)
        );
        let mut qmp = ready(now);
        qmp.send(now, 1, "query-migrate", Value::Null, Duration::from_secs(2));
        assert_eq!(qmp.deadline(), Some(now + Duration::from_secs(2)));
        assert_eq!(qmp.overdue(now + Duration::from_secs(1)), None);
        assert!(qmp.overdue(now + Duration::from_secs(2)).is_some());
        qmp.extend_deadlines(now + Duration::from_secs(9));
        assert_eq!(qmp.overdue(now + Duration::from_secs(8)), None);
    }

    #[test]
    fn another_protocol_is_refused() {
        let now = Instant::now();
        let mut qmp = QmpClient::<u32>::new(now);
        qmp.receive(b"SSH-2.0-OpenSSH\n");
        assert!(qmp.poll(now).is_err());
    }

    proptest! {
        #[test]
        fn no_input_panics(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let now = Instant::now();
            let mut qmp = ready(now);
            qmp.receive(&bytes);
            while let Ok(Some(_)) = qmp.poll(now) {}
        }
    }
}
