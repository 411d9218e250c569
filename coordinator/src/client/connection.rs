//! One connection: its thread, and the half that others write to.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream, ToSocketAddrs};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crossbeam::channel::Sender as Outbox;
use sidecar::protocol::PROTOCOL_MAJOR;
use sidecar::protocol::codec::{ServerMessage, read_server_message};
use sidecar::protocol::command::{CapabilitiesArgs, Command};
use sidecar::protocol::lines::{Line as TextLine, LineBuffer};
use sidecar::protocol::probe::ProbeEvent;

use super::{ClientError, Message};
use crate::application::{ControlAddress, HostId};

const CONNECT_WITHIN: Duration = Duration::from_secs(2);
const GREET_WITHIN: Duration = Duration::from_secs(2);
/// A sidecar that does not read for so long counts as lost.
const WRITE_WITHIN: Duration = Duration::from_millis(500);
const TRY_AGAIN: Duration = Duration::from_millis(250);
/// Longest line accepted from a sidecar: a report of many VMs with their rounds.
const MAX_LINE_BYTES: usize = 16 * 1024 * 1024;

#[derive(Debug)]
enum Stream {
    Unix(UnixStream),
    Tcp(TcpStream),
}

impl Stream {
    fn connect(address: &ControlAddress) -> io::Result<Self> {
        match address {
            ControlAddress::Unix(path) => UnixStream::connect(path).map(Self::Unix),
            ControlAddress::Tcp(address) => {
                let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
                for address in address.to_socket_addrs()? {
                    match TcpStream::connect_timeout(&address, CONNECT_WITHIN) {
                        Ok(stream) => {
                            stream.set_nodelay(true)?;
                            return Ok(Self::Tcp(stream));
                        }
                        Err(error) => last = error,
                    }
                }
                Err(last)
            }
        }
    }

    fn try_clone(&self) -> io::Result<Self> {
        match self {
            Self::Unix(stream) => stream.try_clone().map(Self::Unix),
            Self::Tcp(stream) => stream.try_clone().map(Self::Tcp),
        }
    }

    fn set_read_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
        match self {
            Self::Unix(stream) => stream.set_read_timeout(timeout),
            Self::Tcp(stream) => stream.set_read_timeout(timeout),
        }
    }

    fn set_write_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
        match self {
            Self::Unix(stream) => stream.set_write_timeout(timeout),
            Self::Tcp(stream) => stream.set_write_timeout(timeout),
        }
    }

    fn shutdown(&self) {
        // Already closed is as good.
        let _ = match self {
            Self::Unix(stream) => stream.shutdown(Shutdown::Both),
            Self::Tcp(stream) => stream.shutdown(Shutdown::Both),
        };
    }

    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Unix(stream) => stream.read(buffer),
            Self::Tcp(stream) => stream.read(buffer),
        }
    }

    fn write_all(&mut self, bytes: &[u8]) -> io::Result<()> {
        match self {
            Self::Unix(stream) => stream.write_all(bytes),
            Self::Tcp(stream) => stream.write_all(bytes),
        }
    }
}

/// The half that commands are written to; empty while there is no connection.
#[derive(Debug, Clone, Default)]
pub(super) struct Writer(Arc<Mutex<Option<Stream>>>);

impl Writer {
    fn set(&self, stream: Option<Stream>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = stream;
    }

    pub(super) fn write(&self, bytes: &[u8]) -> io::Result<()> {
        let mut guard = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let stream = guard.as_mut().ok_or(io::ErrorKind::NotConnected)?;
        let result = stream.write_all(bytes);
        if result.is_err() {
            // Part of a line may be out: this connection is of no more use. Its reader notices.
            stream.shutdown();
            *guard = None;
        }
        result
    }

    pub(super) fn close(&self) {
        let guard = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(stream) = guard.as_ref() {
            stream.shutdown();
        }
    }
}

/// What a connection's thread works with.
#[derive(Debug)]
pub(super) struct Line {
    pub host: HostId,
    pub address: ControlAddress,
    pub writer: Writer,
    pub outbox: Outbox<(HostId, Message)>,
    pub stop: Arc<AtomicBool>,
}

impl Line {
    /// Connects, reads, and begins again, until told to stop.
    pub(super) fn run(self) {
        let mut failed_before = None;
        while !self.stopped() {
            match self.open() {
                Ok((stream, lines, host_name)) => {
                    failed_before = None;
                    if !self.say(Message::Connected { host_name }) {
                        return;
                    }
                    let error = self.read(stream, lines);
                    self.writer.set(None);
                    let address = self.address.to_string();
                    let lost = ClientError::Ended { address, error };
                    if self.stopped() || !self.say(Message::Lost(lost)) {
                        return;
                    }
                }
                // The same failure is said once.
                Err(error) if failed_before.as_ref() == Some(&error) => {}
                Err(error) => {
                    failed_before = Some(error.clone());
                    if !self.say(Message::Lost(error)) {
                        return;
                    }
                }
            }
            std::thread::sleep(TRY_AGAIN);
        }
    }

    fn stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    fn say(&self, message: Message) -> bool {
        self.outbox.send((self.host, message)).is_ok()
    }

    fn open(&self) -> Result<(Stream, LineBuffer, String), ClientError> {
        let address = self.address.to_string();
        let connect = |error: io::Error| ClientError::Connect {
            address: address.clone(),
            error: error.to_string(),
        };
        let mut stream = Stream::connect(&self.address).map_err(connect)?;
        stream
            .set_write_timeout(Some(WRITE_WITHIN))
            .map_err(connect)?;
        let mut lines = LineBuffer::new(MAX_LINE_BYTES);
        let end = Instant::now() + GREET_WITHIN;
        let wrong = |error: String| ClientError::Greeting {
            address: address.clone(),
            error,
        };
        let host_name = match next_message(&mut stream, &mut lines, end) {
            Ok(ServerMessage::Greeting { major, minor, host }) if major == PROTOCOL_MAJOR => {
                let _ = minor;
                host
            }
            Ok(ServerMessage::Greeting { major, minor, .. }) => {
                return Err(wrong(format!(
                    "the sidecar speaks protocol {major}.{minor}, this program {PROTOCOL_MAJOR}.x; \
                     update the older one"
                )));
            }
            Ok(_) => return Err(wrong("expected a greeting first".into())),
            Err(NoMessage::Timeout) => {
                return Err(ClientError::NoGreeting {
                    address,
                    seconds: GREET_WITHIN.as_secs(),
                });
            }
            Err(NoMessage::Ended(error)) => return Err(wrong(error)),
        };
        let negotiate = Command::Capabilities(CapabilitiesArgs {
            enable: vec!["oob".into()],
        });
        stream.write_all(&negotiate.to_line(0)).map_err(connect)?;
        loop {
            match next_message(&mut stream, &mut lines, end) {
                Ok(ServerMessage::Answer { result, .. }) => {
                    result.map_err(|error| wrong(error.desc))?;
                    break;
                }
                Ok(_) => {}
                Err(NoMessage::Timeout) => {
                    return Err(wrong("no answer to qmp_capabilities".into()));
                }
                Err(NoMessage::Ended(error)) => return Err(wrong(error)),
            }
        }
        stream.set_read_timeout(None).map_err(connect)?;
        self.writer.set(Some(stream.try_clone().map_err(connect)?));
        Ok((stream, lines, host_name))
    }

    /// Reads until the connection ends, and says why it did.
    fn read(&self, mut stream: Stream, mut lines: LineBuffer) -> String {
        let mut buffer = vec![0; 64 * 1024];
        loop {
            while let Some(line) = lines.next_line() {
                let message = match line {
                    TextLine::Whole(text) => read_server_message(&text),
                    TextLine::TooLong => return "a line of more than 16 MiB came".into(),
                };
                let message = match message {
                    Ok(Some(ServerMessage::Event(envelope))) => Message::Event(envelope),
                    Ok(Some(ServerMessage::Dirty { event, at_us })) => {
                        Message::Dirty { event, at_us }
                    }
                    Ok(Some(ServerMessage::Probe(event))) => {
                        let ProbeEvent::Probed(probed) = *event;
                        Message::Probed(probed)
                    }
                    Ok(Some(ServerMessage::Answer {
                        id: Some(id),
                        result,
                    })) => Message::Answer { id, result },
                    Ok(_) => continue,
                    Err(error) => return format!("it sent something unreadable ({error})"),
                };
                if !self.say(message) {
                    return "nobody listens any more".into();
                }
            }
            match stream.read(&mut buffer) {
                Ok(0) => return "closed by the sidecar".into(),
                Ok(count) => lines.push(&buffer[..count]),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return error.to_string(),
            }
        }
    }
}

enum NoMessage {
    Timeout,
    Ended(String),
}

fn next_message(
    stream: &mut Stream,
    lines: &mut LineBuffer,
    end: Instant,
) -> Result<ServerMessage, NoMessage> {
    let ended = |error: io::Error| NoMessage::Ended(error.to_string());
    let mut buffer = [0; 4096];
    loop {
        while let Some(line) = lines.next_line() {
            let TextLine::Whole(text) = line else {
                return Err(NoMessage::Ended("a line that is too long came".into()));
            };
            match read_server_message(&text) {
                Ok(Some(message)) => return Ok(message),
                Ok(None) => {}
                Err(error) => return Err(NoMessage::Ended(error.desc)),
            }
        }
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(NoMessage::Timeout);
        }
        stream.set_read_timeout(Some(left)).map_err(ended)?;
        match stream.read(&mut buffer) {
            Ok(0) => return Err(NoMessage::Ended("closed before it greeted".into())),
            Ok(count) => lines.push(&buffer[..count]),
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut
                ) =>
            {
                return Err(NoMessage::Timeout);
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(ended(error)),
        }
    }
}
