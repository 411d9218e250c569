//! The direct transport's connections: the companion, and the stream's socket, which goes to QEMU.
//!
//! Both open with a hello, as relayed streams do, the companion first. Not a byte of the stream is
//! read or written here: the hello and its answer are exactly as long as they are.

use std::time::{Duration, Instant};

use mio::Token;
use mio::net::TcpStream;

use super::channel::HalfKey;
use super::direct_pace::Stream;
use super::net::{Moved, Socket, read_some, write_some};
use super::{Daemon, Slot, log};
use crate::direct::{COMPANION, Heartbeat};
use crate::migration::Now;
use crate::relay::hello::{Answer, Hello};
use crate::run::VmHalf;

/// A connection is made and answered within this time.
const HELLO_DEADLINE: Duration = Duration::from_secs(2);

/// What one half has of its direct transport.
#[derive(Debug, Default)]
pub struct Direct {
    opening: Option<Opening>,
    companion: Option<Companion>,
    /// What QEMU has, too.
    pub stream: Option<Stream>,
}

impl Direct {
    /// When something is due.
    fn deadline(&self) -> Option<Instant> {
        let opening = self.opening.as_ref().map(|opening| opening.by);
        let companion = self.companion.as_ref().map(|c| c.heart.deadline());
        [opening, companion].into_iter().flatten().min()
    }
}

/// Source: a connection whose hello is on its way.
#[derive(Debug)]
struct Opening {
    token: Token,
    socket: Socket,
    hello: Vec<u8>,
    channel: u16,
    by: Instant,
}

#[derive(Debug)]
struct Companion {
    token: Token,
    socket: Socket,
    heart: Heartbeat,
}

/// What became of an opening.
enum Opened {
    NotYet,
    Accepted,
    Failed(String),
}

impl Opening {
    fn step(&mut self, now: Instant) -> Opened {
        let failed = |error: &std::io::Error| {
            Opened::Failed(format!("connecting to the destination's sidecar: {error}"))
        };
        if let Some(error) = self.socket.take_error() {
            return failed(&error);
        }
        while !self.hello.is_empty() {
            match write_some(&mut self.socket, &self.hello) {
                Moved::Bytes(n) => {
                    self.hello.drain(..n);
                }
                Moved::Blocked | Moved::End => break,
                Moved::Broken(error) => return failed(&error),
            }
        }
        let mut answer = [0];
        match read_some(&mut self.socket, &mut answer) {
            Moved::Bytes(_) => match Answer::from_byte(answer[0]) {
                Some(Answer::Accepted) => Opened::Accepted,
                Some(answer) => Opened::Failed(answer.explain().into()),
                None => {
                    Opened::Failed("what listens at the stream address is no muster-sidecar".into())
                }
            },
            Moved::End => Opened::Failed("the destination's sidecar hung up".into()),
            Moved::Broken(error) if error.kind() != std::io::ErrorKind::NotConnected => {
                failed(&error)
            }
            Moved::Blocked | Moved::Broken(_) if self.by <= now => Opened::Failed(
                "the destination's sidecar did not answer within 2 s: is its stream address \
                 reachable from here?"
                    .into(),
            ),
            Moved::Blocked | Moved::Broken(_) => Opened::NotYet,
        }
    }
}

impl Companion {
    fn new(now: Instant, token: Token, socket: Socket) -> Self {
        Self {
            token,
            socket,
            heart: Heartbeat::new(now),
        }
    }

    /// Hears what has come, and says that this side is alive.
    fn step(&mut self, now: Instant) -> Result<(), &'static str> {
        let mut bytes = [0; 64];
        loop {
            match read_some(&mut self.socket, &mut bytes) {
                Moved::Bytes(_) => self.heart.hear(now),
                Moved::Blocked => break,
                Moved::End | Moved::Broken(_) => return Err("the other sidecar hung up"),
            }
        }
        if self.heart.is_silent(now) {
            return Err("the other sidecar says nothing any more (it or the link hangs)");
        }
        if self.heart.beats(now) {
            if let Moved::Broken(_) = write_some(&mut self.socket, &[0]) {
                return Err("the other sidecar hung up");
            }
        }
        Ok(())
    }
}

impl Daemon {
    fn direct(&mut self, key: HalfKey) -> Option<&mut Direct> {
        let entry = self.runs.get_mut(&key.0)?;
        Some(&mut entry.io[key.1].direct)
    }

    /// Source: begins to connect; the companion first, so that nobody is alone with a stream.
    pub(super) fn connect_direct(&mut self, now: Now, key: HalfKey) {
        self.open_direct(now, key, COMPANION);
    }

    fn open_direct(&mut self, now: Now, key: HalfKey, channel: u16) {
        let token = self.token(Slot::Opening(key));
        let Some(entry) = self.runs.get_mut(&key.0) else {
            return;
        };
        let (io, half) = (&mut entry.io[key.1], &mut entry.run.halves[key.1]);
        let VmHalf::Source(source) = half else {
            return;
        };
        let hello = Hello {
            run: key.0,
            vm: source.half.uuid,
            channel,
            guest_runs: source.was_running,
            balloon_bytes: source.taken_from(),
            token: io.token,
        };
        let connected = io
            .peer
            .ok_or_else(|| "no destination is known".to_owned())
            .and_then(|address| {
                Socket::connect_tcp(address)
                    .and_then(|mut socket| {
                        socket.register(self.poll.registry(), token)?;
                        Ok(socket)
                    })
                    .map_err(|error| format!("connecting to {address}: {error}"))
            });
        match connected {
            Ok(socket) => {
                io.direct.opening = Some(Opening {
                    token,
                    socket,
                    hello: hello.encode(),
                    channel,
                    by: now.mono + HELLO_DEADLINE,
                });
                self.direct_at = Some(now.mono);
            }
            Err(error) => {
                self.slots.remove(&token);
                self.break_direct(key, &error);
            }
        }
    }

    pub(super) fn serve_opening(&mut self, now: Now, key: HalfKey) {
        let Some(direct) = self.direct(key) else {
            return;
        };
        let Some(mut opening) = direct.opening.take() else {
            return;
        };
        match opening.step(now.mono) {
            Opened::NotYet => direct.opening = Some(opening),
            Opened::Failed(error) => {
                direct.opening = Some(opening);
                self.break_direct(key, &error);
            }
            Opened::Accepted if opening.channel == COMPANION => {
                let Opening { token, socket, .. } = opening;
                direct.companion = Some(Companion::new(now.mono, token, socket));
                self.slots.insert(token, Slot::Companion(key));
                self.open_direct(now, key, 0);
            }
            Opened::Accepted => {
                let stream = self.set_free(opening.token, opening.socket);
                let Some(entry) = self.runs.get_mut(&key.0) else {
                    return;
                };
                entry.io[key.1].direct.stream = stream.map(Stream::new);
                if let Some(source) = entry.run.halves[key.1].source_mut() {
                    source.connected(now);
                }
                self.direct_at = Some(now.mono);
            }
        }
    }

    /// Ends the daemon's own use of a socket.
    fn set_free(&mut self, token: Token, mut socket: Socket) -> Option<TcpStream> {
        socket.deregister(self.poll.registry());
        self.slots.remove(&token);
        match socket {
            Socket::Tcp(stream) => Some(stream),
            Socket::Unix(_) => None,
        }
    }

    pub(super) fn serve_companion(&mut self, now: Now, key: HalfKey) {
        let companion = self.direct(key).and_then(|d| d.companion.as_mut());
        if let Some(Err(error)) = companion.map(|companion| companion.step(now.mono)) {
            self.break_direct(key, error);
        }
    }

    /// Destination: takes the companion, or the stream for QEMU.
    pub(super) fn greet_direct(&mut self, now: Now, id: usize, key: HalfKey, hello: &Hello) {
        let Some(direct) = self.direct(key) else {
            return;
        };
        let is_new = match hello.channel {
            COMPANION => direct.companion.is_none(),
            0 => direct.companion.is_some() && direct.stream.is_none(),
            _ => false,
        };
        if !is_new {
            log("a stream connection came for a VM that has one already");
            self.refuse(id, Answer::Unknown);
            return;
        }
        let Some(channel) = self.channels.remove(&id) else {
            return;
        };
        let (token, mut socket) = (channel.peer.token, channel.peer.socket);
        if hello.channel == COMPANION {
            // A peer that is gone already shows it when it is read.
            let _ = write_some(&mut socket, &[Answer::Accepted as u8]);
            self.slots.insert(token, Slot::Companion(key));
            if let Some(direct) = self.direct(key) {
                direct.companion = Some(Companion::new(now.mono, token, socket));
            }
            self.direct_at = Some(now.mono);
            return;
        }
        let stream = self.set_free(token, socket).map(Stream::new);
        let Some(entry) = self.runs.get_mut(&key.0) else {
            return;
        };
        entry.io[key.1].direct.stream = stream;
        let Some(destination) = entry.run.halves[key.1].destination_mut() else {
            return;
        };
        let changed = destination.greeted(hello);
        if !destination.stream_connected(now) {
            self.break_direct(key, "its QEMU does not wait for a stream");
            return;
        }
        if changed {
            self.save_note(key.0);
        }
        self.direct_at = Some(now.mono);
    }

    /// Destination: QEMU has the socket; the source may hand its end to QEMU, too.
    pub(super) fn accept_direct(&mut self, key: HalfKey) {
        let stream = self.direct(key).and_then(|d| d.stream.as_mut());
        let said = stream.map(|stream| stream.say(Answer::Accepted as u8));
        if let Some(Err(error)) = said {
            self.break_direct(key, &format!("the other sidecar: {error}"));
        }
    }

    pub(super) fn break_direct(&mut self, key: HalfKey, error: &str) {
        self.cut_stream(key);
        if let Some(entry) = self.runs.get_mut(&key.0) {
            entry.run.halves[key.1].stream_failed(error);
        }
    }

    /// Shuts the stream down: QEMU has it open, too, and so closing it would not do.
    pub(super) fn cut_direct(&mut self, key: HalfKey) {
        let Some(entry) = self.runs.get_mut(&key.0) else {
            return;
        };
        let io = &mut entry.io[key.1];
        let Direct {
            opening,
            companion,
            stream,
        } = std::mem::take(&mut io.direct);
        if let Some(mut stream) = stream {
            io.closed_bytes += stream.cut(entry.run.halves[key.1].half().role);
        }
        let opening = opening.map(|opening| (opening.token, opening.socket));
        let companion = companion.map(|companion| (companion.token, companion.socket));
        for (token, mut socket) in opening.into_iter().chain(companion) {
            socket.deregister(self.poll.registry());
            self.slots.remove(&token);
        }
    }

    /// Does what is due for every VM whose stream goes direct.
    pub(super) fn tend_direct(&mut self, now: Now) {
        if self.direct_at.is_none_or(|at| at > now.mono) {
            return;
        }
        for key in self.direct_halves() {
            self.serve_opening(now, key);
            self.serve_companion(now, key);
        }
        let paced = self.pace_direct(now);
        let due = self.runs.values().flat_map(|entry| &entry.io);
        let due = due.filter_map(|io| io.direct.deadline()).chain(paced).min();
        self.direct_at = due;
    }

    fn direct_halves(&self) -> Vec<HalfKey> {
        let halves = self.runs.iter().flat_map(|(run, entry)| {
            let busy = |io: &super::halves::HalfIo| io.direct.deadline().is_some();
            let found = entry.io.iter().enumerate().filter(move |(_, io)| busy(io));
            found.map(|(half, _)| (*run, half))
        });
        halves.collect()
    }
}
