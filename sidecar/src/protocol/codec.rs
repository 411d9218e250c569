//! Requests and answers, events with their timestamp: JSON in and out.

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json};

use super::command::{Command, RunArgs};
use super::dirty::DirtyEvent;
use super::event::Envelope;
use super::probe::ProbeEvent;

/// Longest line accepted from a control client.
pub const MAX_LINE_BYTES: usize = 256 * 1024;

/// An error as QMP writes it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{desc}")]
pub struct CommandError {
    /// QMP's error class.
    pub class: ErrorClass,
    /// For people.
    pub desc: String,
}

/// QMP's error classes; clients switch on these only for `CommandNotFound`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ErrorClass {
    /// Everything without a class of its own.
    GenericError,
    /// The command does not exist, or not in this mode.
    CommandNotFound,
}

impl CommandError {
    /// An error of the generic class.
    pub fn generic(desc: impl Into<String>) -> Self {
        Self {
            class: ErrorClass::GenericError,
            desc: desc.into(),
        }
    }

    /// The command is not known (here, or yet).
    pub fn not_found(desc: impl Into<String>) -> Self {
        Self {
            class: ErrorClass::CommandNotFound,
            desc: desc.into(),
        }
    }
}

/// A command line, read.
#[derive(Debug, Clone, PartialEq)]
pub struct Request {
    /// The client's `id`, given back in the answer.
    pub id: Option<Value>,
    /// Whether it came as `exec-oob`.
    pub oob: bool,
    /// The command, or why it could not be read.
    pub command: Result<Command, CommandError>,
}

/// Reads one line as a request.
#[must_use]
pub fn read_request(line: &[u8]) -> Request {
    let bad = |id, oob, error| Request {
        id,
        oob,
        command: Err(error),
    };
    let value: Value = match serde_json::from_slice(line) {
        Ok(value) => value,
        Err(error) => {
            let error = CommandError::generic(format!("invalid JSON: {error}"));
            return bad(None, false, error);
        }
    };
    let Value::Object(mut object) = value else {
        return bad(
            None,
            false,
            CommandError::generic("a command is a JSON object"),
        );
    };
    let id = object.remove("id");
    let oob = object.contains_key("exec-oob");
    let name = match (object.remove("execute"), object.remove("exec-oob")) {
        (Some(Value::String(name)), None) | (None, Some(Value::String(name))) => name,
        (None, None) => {
            let error = CommandError::generic("`execute` or `exec-oob` is missing");
            return bad(id, oob, error);
        }
        (Some(_), Some(_)) => {
            let error = CommandError::generic("`execute` and `exec-oob` exclude each other");
            return bad(id, oob, error);
        }
        _ => {
            return bad(
                id,
                oob,
                CommandError::generic("the command's name must be a string"),
            );
        }
    };
    let arguments = object
        .remove("arguments")
        .unwrap_or_else(|| Value::Object(Map::new()));
    if let Some(key) = object.keys().next() {
        let error = CommandError::generic(format!("`{key}` does not belong in a command"));
        return bad(id, oob, error);
    }
    if !arguments.is_object() {
        return bad(
            id,
            oob,
            CommandError::generic("`arguments` must be an object"),
        );
    }
    let command = read_command(&name, arguments);
    Request { id, oob, command }
}

fn arguments<T: DeserializeOwned>(name: &str, value: Value) -> Result<T, CommandError> {
    serde_json::from_value(value)
        .map_err(|error| CommandError::generic(format!("arguments of `{name}`: {error}")))
}

fn read_command(name: &str, value: Value) -> Result<Command, CommandError> {
    use Command as C;
    macro_rules! with {
        ($variant:ident) => {
            C::$variant(arguments(name, value)?)
        };
    }
    macro_rules! plain {
        ($variant:ident) => {{
            let super::command::NoArgs {} = arguments(name, value)?;
            C::$variant
        }};
    }
    Ok(match name {
        "qmp_capabilities" => with!(Capabilities),
        "query-muster-schema" => plain!(QuerySchema),
        "query-status" => plain!(QueryStatus),
        "query-host" => plain!(QueryHost),
        "query-vms" => plain!(QueryVms),
        "query-vm" => with!(QueryVm),
        "query-settings" => plain!(QuerySettings),
        "query-run" => with!(QueryRun),
        "query-decision" => with!(QueryDecision),
        "prepare" => with!(Prepare),
        "start" => with!(Start),
        "pace" => with!(Pace),
        "hold" => with!(Hold),
        "arm" => with!(Arm),
        "disarm" => with!(Disarm),
        "release" => with!(Release),
        "continue" => with!(Continue),
        "back" => with!(Back),
        "decide" => with!(Decide),
        "commit" => with!(Commit),
        "abort" => with!(Abort),
        "finish" => with!(Finish),
        "throttle" => with!(Throttle),
        "throttle-disks" => with!(ThrottleDisks),
        "yank" => with!(Yank),
        "keep-alive" => with!(KeepAlive),
        "set-report-interval" => with!(SetReportInterval),
        "recover" => with!(Recover),
        "forget" => with!(Forget),
        "dirty-start" => with!(DirtyStart),
        "dirty-stop" => with!(DirtyStop),
        "query-dirty" => with!(QueryDirty),
        "probe-listen" => with!(ProbeListen),
        "probe" => with!(Probe),
        "query-traffic" => with!(QueryTraffic),
        _ => {
            let desc = format!("the command `{name}` is not known; see query-muster-schema");
            return Err(CommandError::not_found(desc));
        }
    })
}

impl Command {
    /// The command's name on the wire.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Capabilities(_) => "qmp_capabilities",
            Self::QuerySchema => "query-muster-schema",
            Self::QueryStatus => "query-status",
            Self::QueryHost => "query-host",
            Self::QueryVms => "query-vms",
            Self::QueryVm(_) => "query-vm",
            Self::QuerySettings => "query-settings",
            Self::QueryRun(_) => "query-run",
            Self::QueryDecision(_) => "query-decision",
            Self::Prepare(_) => "prepare",
            Self::Start(_) => "start",
            Self::Pace(_) => "pace",
            Self::Hold(_) => "hold",
            Self::Arm(_) => "arm",
            Self::Disarm(_) => "disarm",
            Self::Release(_) => "release",
            Self::Continue(_) => "continue",
            Self::Back(_) => "back",
            Self::Decide(_) => "decide",
            Self::Commit(_) => "commit",
            Self::Abort(_) => "abort",
            Self::Finish(_) => "finish",
            Self::Throttle(_) => "throttle",
            Self::ThrottleDisks(_) => "throttle-disks",
            Self::Yank(_) => "yank",
            Self::KeepAlive(_) => "keep-alive",
            Self::SetReportInterval(_) => "set-report-interval",
            Self::Recover(_) => "recover",
            Self::Forget(_) => "forget",
            Self::DirtyStart(_) => "dirty-start",
            Self::DirtyStop(_) => "dirty-stop",
            Self::QueryDirty(_) => "query-dirty",
            Self::ProbeListen(_) => "probe-listen",
            Self::Probe(_) => "probe",
            Self::QueryTraffic(_) => "query-traffic",
        }
    }

    /// Whether it may be sent as `exec-oob`.
    #[must_use]
    pub fn allows_oob(&self) -> bool {
        matches!(self, Self::Abort(_) | Self::Yank(_))
    }

    /// Run and epoch of a mutating command.
    #[must_use]
    pub fn run(&self) -> Option<RunArgs> {
        let (run, epoch) = match self {
            Self::Prepare(a) => (a.run, a.epoch),
            Self::Start(a) => (a.run, a.epoch),
            Self::Pace(a) => (a.run, a.epoch),
            Self::Hold(a) | Self::Yank(a) => (a.run, a.epoch),
            Self::Finish(a) => (a.run, a.epoch),
            Self::Throttle(a) => (a.run, a.epoch),
            Self::ThrottleDisks(a) => (a.run, a.epoch),
            Self::SetReportInterval(a) => (a.run, a.epoch),
            Self::Arm(a)
            | Self::Disarm(a)
            | Self::Release(a)
            | Self::Continue(a)
            | Self::Back(a)
            | Self::Commit(a)
            | Self::Abort(a)
            | Self::Forget(a)
            | Self::KeepAlive(a) => return Some(*a),
            _ => return None,
        };
        Some(RunArgs { run, epoch })
    }

    fn arguments(&self) -> Value {
        fn value<T: Serialize>(args: &T) -> Value {
            serde_json::to_value(args).unwrap_or(Value::Null)
        }
        match self {
            Self::QuerySchema
            | Self::QueryStatus
            | Self::QueryHost
            | Self::QueryVms
            | Self::QuerySettings => json!({}),
            Self::Capabilities(a) => value(a),
            Self::QueryVm(a) => value(a),
            Self::QueryRun(a) | Self::QueryDecision(a) => value(a),
            Self::Prepare(a) => value(a),
            Self::Start(a) => value(a),
            Self::Pace(a) => value(a),
            Self::Hold(a) | Self::Yank(a) => value(a),
            Self::Arm(a)
            | Self::Disarm(a)
            | Self::Release(a)
            | Self::Continue(a)
            | Self::Back(a)
            | Self::Commit(a)
            | Self::Abort(a)
            | Self::Forget(a)
            | Self::KeepAlive(a) => value(a),
            Self::Decide(a) => value(a),
            Self::Finish(a) => value(a),
            Self::Throttle(a) => value(a),
            Self::ThrottleDisks(a) => value(a),
            Self::SetReportInterval(a) => value(a),
            Self::Recover(a) => value(a),
            Self::DirtyStart(a) => value(a),
            Self::DirtyStop(a) | Self::QueryDirty(a) => value(a),
            Self::ProbeListen(a) => value(a),
            Self::Probe(a) => value(a),
            Self::QueryTraffic(a) => value(a),
        }
    }

    /// The command as a line, with `id`; out-of-band where it may be.
    #[must_use]
    pub fn to_line(&self, id: u64) -> Vec<u8> {
        let verb = if self.allows_oob() {
            "exec-oob"
        } else {
            "execute"
        };
        line(&json!({ verb: self.name(), "arguments": self.arguments(), "id": id }))
    }
}

fn line(value: &Value) -> Vec<u8> {
    let mut bytes = value.to_string().into_bytes();
    bytes.push(b'\n');
    bytes
}

/// The greeting, as a line.
#[must_use]
pub fn greeting_line(host: &str) -> Vec<u8> {
    line(&json!({
        "QMP": {
            "version": {
                "muster": {
                    "major": super::PROTOCOL_MAJOR,
                    "minor": super::PROTOCOL_MINOR,
                },
                "package": env!("CARGO_PKG_VERSION"),
                "host": host,
            },
            "capabilities": ["oob"],
        }
    }))
}

/// The answer to a request, as a line.
#[must_use]
pub fn answer_line(id: Option<&Value>, answer: &Result<Value, CommandError>) -> Vec<u8> {
    let mut object = match answer {
        Ok(value) => json!({ "return": value }),
        Err(error) => {
            let class = match error.class {
                ErrorClass::GenericError => "GenericError",
                ErrorClass::CommandNotFound => "CommandNotFound",
            };
            json!({ "error": { "class": class, "desc": error.desc } })
        }
    };
    if let Some(id) = id {
        object["id"] = id.clone();
    }
    line(&object)
}

/// An event, as a line.
#[must_use]
pub fn event_line(envelope: &Envelope) -> Vec<u8> {
    let mut value = serde_json::to_value(&envelope.event).unwrap_or(Value::Null);
    value["data"]["run"] = json!(envelope.run);
    value["data"]["seq"] = json!(envelope.seq);
    stamped_line(value, envelope.at_us)
}

/// An event of a measurement, as a line.
#[must_use]
pub fn dirty_event_line(event: &DirtyEvent, at_us: i64) -> Vec<u8> {
    stamped_line(serde_json::to_value(event).unwrap_or(Value::Null), at_us)
}

/// An event of a probe, as a line.
#[must_use]
pub fn probe_event_line(event: &ProbeEvent, at_us: i64) -> Vec<u8> {
    stamped_line(serde_json::to_value(event).unwrap_or(Value::Null), at_us)
}

fn stamped_line(mut value: Value, at_us: i64) -> Vec<u8> {
    value["timestamp"] = json!({
        "seconds": at_us.div_euclid(1_000_000),
        "microseconds": at_us.rem_euclid(1_000_000),
    });
    line(&value)
}

/// What a client reads from a sidecar.
#[derive(Debug, Clone, PartialEq)]
pub enum ServerMessage {
    /// The greeting: protocol major version, minor version, host.
    Greeting {
        /// Protocol major version.
        major: u32,
        /// Protocol minor version.
        minor: u32,
        /// The sidecar's host name.
        host: String,
    },
    /// The answer to the command with this id.
    Answer {
        /// The id that the command carried.
        id: Option<u64>,
        /// What it returned.
        result: Result<Value, CommandError>,
    },
    /// An event.
    Event(Box<Envelope>),
    /// An event of a measurement.
    Dirty {
        /// The event.
        event: Box<DirtyEvent>,
        /// Unix time in microseconds.
        at_us: i64,
    },
    /// An event of a probe.
    Probe(Box<ProbeEvent>),
}

/// Reads one line from a sidecar. `None`: an event or message of a newer minor version.
///
/// # Errors
/// The line is no JSON object.
pub fn read_server_message(line: &[u8]) -> Result<Option<ServerMessage>, CommandError> {
    let mut value: Value = serde_json::from_slice(line)
        .map_err(|error| CommandError::generic(format!("invalid JSON: {error}")))?;
    if let Some(greeting) = value.get("QMP") {
        let muster = &greeting["version"]["muster"];
        let number = |v: &Value| v.as_u64().and_then(|n| u32::try_from(n).ok());
        let (Some(major), Some(minor)) = (number(&muster["major"]), number(&muster["minor"]))
        else {
            return Err(CommandError::generic(
                "the peer greets as QMP but is no muster-sidecar (a QEMU monitor?)",
            ));
        };
        let host = greeting["version"]["host"]
            .as_str()
            .unwrap_or_default()
            .to_owned();
        return Ok(Some(ServerMessage::Greeting { major, minor, host }));
    }
    let id = value.get("id").and_then(Value::as_u64);
    if let Some(result) = value.get_mut("return") {
        return Ok(Some(ServerMessage::Answer {
            id,
            result: Ok(result.take()),
        }));
    }
    if let Some(error) = value.get("error") {
        let desc = error["desc"]
            .as_str()
            .unwrap_or("no description")
            .to_owned();
        let class = match error["class"].as_str() {
            Some("CommandNotFound") => ErrorClass::CommandNotFound,
            _ => ErrorClass::GenericError,
        };
        let result = Err(CommandError { class, desc });
        return Ok(Some(ServerMessage::Answer { id, result }));
    }
    Ok(read_event(value))
}

fn read_event(mut value: Value) -> Option<ServerMessage> {
    let stamp = &value["timestamp"];
    let seconds = stamp["seconds"].as_i64()?;
    let micros = stamp["microseconds"].as_i64()?;
    let at_us = seconds.checked_mul(1_000_000)?.checked_add(micros)?;
    let data = value.get_mut("data")?.as_object_mut()?;
    let run = data.remove("run");
    let seq = data.remove("seq");
    let event = json!({ "event": value["event"], "data": value["data"] });
    let Some(run) = run else {
        if let Ok(event) = serde_json::from_value(event.clone()) {
            return Some(ServerMessage::Probe(event));
        }
        let event = serde_json::from_value(event).ok()?;
        return Some(ServerMessage::Dirty { event, at_us });
    };
    Some(ServerMessage::Event(Box::new(Envelope {
        run: serde_json::from_value(run).ok()?,
        seq: seq?.as_u64()?,
        at_us,
        event: serde_json::from_value(event).ok()?,
    })))
}

#[cfg(test)]
mod tests;
