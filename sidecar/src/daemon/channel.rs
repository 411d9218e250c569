//! One channel of a migration stream: QEMU's unix socket on one side, the other sidecar on the
//! other, a [`Pipe`] for each direction.
//!
//! The connection of a local disk is one too: NBD's requests go the way of the stream, paced, its
//! answers come back. It ends in good order only from the source: QEMU there closes its NBD client,
//! the destination's closes when its NBD server has stopped.
//!
//! Readiness is edge-triggered, so a channel remembers what it may still read or write: a paced
//! reader that stops early gets no second notice.

use std::time::{Duration, Instant};

use mio::Token;
use uuid::Uuid;

use super::net::{Moved, Socket, read_some, write_some};
use crate::protocol::types::Role;
use crate::relay::Pipe;
use crate::relay::hello::{Answer, DISK_CHANNEL, HELLO_BYTES, Hello};
use crate::relay::nbd::NbdWatch;
use crate::relay::return_path::AckGate;

/// A connection is made and answered within this time.
const HELLO_DEADLINE: Duration = Duration::from_secs(2);
/// Bytes that wait for so long without any being taken mean a dead peer.
const STALL: Duration = Duration::from_millis(2500);
/// An NBD server closes when it is told to, a moment before the source does: not longer before.
const CLOSED_BEFORE: Duration = Duration::from_millis(500);
/// What is moved in one go, so that the loop stays responsive.
const TURN_BYTES: usize = 2 << 20;

/// Which half a channel belongs to.
pub type HalfKey = (Uuid, usize);

#[derive(Debug)]
enum State {
    /// Source: the hello is on its way, one byte of answer is awaited.
    Greeting { hello: Vec<u8>, by: Instant },
    /// Destination: the hello is being read.
    Greeted { hello: Vec<u8>, by: Instant },
    /// Bytes flow.
    Open,
    /// Destination: the disk that it carried is complete, its NBD server is about to stop.
    Lingering,
}

/// One side of a channel: its socket and what it may do.
#[derive(Debug)]
pub struct End {
    /// The poll token.
    pub token: Token,
    /// The socket.
    pub socket: Socket,
    readable: bool,
    writable: bool,
}

impl End {
    /// A freshly registered socket; trying is how its readiness is found out.
    #[must_use]
    pub fn new(token: Token, socket: Socket) -> Self {
        Self {
            token,
            socket,
            readable: true,
            writable: true,
        }
    }
}

/// What a step of a channel led to.
#[derive(Debug)]
pub enum Step {
    /// Go on when the sockets are ready.
    Fine,
    /// More can be done at once.
    More,
    /// Destination: a hello came; the daemon says what it is for.
    Hello(Hello),
    /// Both directions are done.
    Finished,
    /// It broke; why.
    Broken(String),
    /// Destination: QEMU has closed the connection of a disk that is not complete.
    Dropped,
}

/// A channel. See the module.
#[derive(Debug)]
pub struct Channel {
    /// Which half it belongs to, once that is known.
    pub half: Option<HalfKey>,
    /// Which end of the move this is.
    pub role: Role,
    /// QEMU's side.
    pub qemu: Option<End>,
    /// The other sidecar's side.
    pub peer: End,
    /// Bytes that crossed from source to destination.
    pub bytes: u64,
    /// Whether it carries a local disk.
    pub is_disk: bool,
    state: State,
    from_qemu: Pipe,
    to_qemu: Pipe,
    gate: Option<AckGate>,
    filtered: Vec<u8>,
    waiting_since: Option<Instant>,
    /// Destination: the NBD server has closed, and the source does within this time.
    closed_by: Option<Instant>,
    /// Source: what the NBD server at the destination owes.
    nbd: NbdWatch,
    /// It answers within this time, or the connection is cut: the guest's own writes may come to wait
    /// for it.
    disk_stall: Duration,
}

impl Channel {
    /// Source: QEMU connected, the other sidecar is being connected.
    #[must_use]
    pub fn outgoing(
        now: Instant,
        half: HalfKey,
        qemu: End,
        peer: End,
        hello: &Hello,
        gated: bool,
        disk_stall: Duration,
    ) -> Self {
        let state = State::Greeting {
            hello: hello.encode(),
            by: now + HELLO_DEADLINE,
        };
        let mut channel = Self::new(Role::Source, peer, state);
        channel.half = Some(half);
        channel.qemu = Some(qemu);
        channel.gate = gated.then(AckGate::new);
        channel.is_disk = hello.channel == DISK_CHANNEL;
        channel.disk_stall = disk_stall;
        channel
    }

    /// Destination: another sidecar connected.
    #[must_use]
    pub fn incoming(now: Instant, peer: End) -> Self {
        let state = State::Greeted {
            hello: Vec::new(),
            by: now + HELLO_DEADLINE,
        };
        Self::new(Role::Destination, peer, state)
    }

    fn new(role: Role, peer: End, state: State) -> Self {
        Self {
            half: None,
            role,
            qemu: None,
            peer,
            bytes: 0,
            is_disk: false,
            state,
            from_qemu: Pipe::new(),
            to_qemu: Pipe::new(),
            gate: None,
            filtered: Vec::new(),
            waiting_since: None,
            closed_by: None,
            nbd: NbdWatch::default(),
            disk_stall: STALL,
        }
    }

    /// Destination: refuses the hello; the channel is to be dropped then.
    pub fn refuse(&mut self, answer: Answer) {
        // The peer learns it from the end of the connection otherwise.
        let _ = write_some(&mut self.peer.socket, &[answer as u8]);
    }

    /// Destination: accepts the hello, `qemu` takes the stream.
    pub fn accept(&mut self, half: HalfKey, qemu: End, is_disk: bool) {
        self.half = Some(half);
        self.is_disk = is_disk;
        self.qemu = Some(qemu);
        self.state = State::Open;
        self.from_qemu.push(&[Answer::Accepted as u8]);
    }

    /// Destination: the source has closed its disk; keeps the connection until the NBD server has
    /// stopped. What QEMU's end was.
    pub fn linger(&mut self) -> Option<End> {
        self.state = State::Lingering;
        self.waiting_since = None;
        self.qemu.take()
    }

    /// Whether it waits for the NBD server.
    #[must_use]
    pub fn is_lingering(&self) -> bool {
        matches!(self.state, State::Lingering)
    }

    /// Takes readiness of the socket with this token.
    pub fn ready(&mut self, token: Token, readable: bool, writable: bool) {
        let end = match &mut self.qemu {
            Some(qemu) if qemu.token == token => qemu,
            _ => &mut self.peer,
        };
        end.readable |= readable;
        end.writable |= writable;
    }

    /// Source: bytes that QEMU has written and the destination's host has not taken.
    #[must_use]
    pub fn in_flight_bytes(&self) -> u64 {
        let unread = self
            .qemu
            .as_ref()
            .map_or(0, |end| end.socket.unread_bytes());
        unread + self.from_qemu.len() as u64 + self.peer.socket.unacknowledged_bytes()
    }

    /// Source: opens the gate; true if an acknowledgement had been kept.
    pub fn open_gate(&mut self) -> bool {
        let kept = self.gate.as_mut().map(AckGate::open).unwrap_or_default();
        self.to_qemu.push(&kept);
        !kept.is_empty()
    }

    /// Source: whether paced bytes wait and could be written.
    #[must_use]
    pub fn is_backlogged(&self) -> bool {
        matches!(self.state, State::Open) && !self.from_qemu.is_empty() && self.peer.writable
    }

    /// Source: whether bytes wait and the path takes none.
    #[must_use]
    pub fn waits_for_path(&self) -> bool {
        matches!(self.state, State::Open) && !self.from_qemu.is_empty() && !self.peer.writable
    }

    /// Does what can be done without pacing. On the source's host the stream itself is only read
    /// here, [`Self::send`] writes it.
    pub fn step(&mut self, now: Instant) -> Step {
        if self.is_lingering() {
            return Step::Fine;
        }
        match self.greet(now) {
            Step::Fine => {}
            step => return step,
        }
        if !matches!(self.state, State::Open) {
            // Let QEMU fill the pipe meanwhile, so that its hang-up is noticed.
            return self.read_qemu();
        }
        match self.role {
            Role::Source => self.step_source(now),
            Role::Destination => self.step_destination(now),
        }
    }

    fn step_source(&mut self, now: Instant) -> Step {
        if let step @ (Step::Broken(_) | Step::Finished) = self.read_qemu() {
            return step;
        }
        if self.from_qemu.is_done() {
            self.peer.socket.shutdown_write();
        }
        let back = self.carry_back(now);
        self.watch(now);
        back
    }

    fn step_destination(&mut self, now: Instant) -> Step {
        let mut moved = 0;
        while moved < TURN_BYTES {
            let Some(qemu) = &mut self.qemu else { break };
            let mut idle = true;
            if self.peer.readable && !self.to_qemu.has_ended() && self.to_qemu.free() > 0 {
                match read_some(&mut self.peer.socket, self.to_qemu.room()) {
                    Moved::Bytes(n) => {
                        self.to_qemu.fill(n);
                        idle = false;
                    }
                    Moved::Blocked => self.peer.readable = false,
                    Moved::End => self.to_qemu.end(),
                    Moved::Broken(error) => return broken("the other sidecar", &error),
                }
            }
            if qemu.writable && !self.to_qemu.is_empty() {
                match write_some(&mut qemu.socket, self.to_qemu.filled()) {
                    Moved::Bytes(n) => {
                        self.to_qemu.consume(n);
                        self.bytes += n as u64;
                        moved += n;
                        idle = false;
                    }
                    Moved::Blocked | Moved::End => qemu.writable = false,
                    // Its NBD server has closed: nobody reads this any more.
                    Moved::Broken(_) if self.is_disk => {
                        let n = self.to_qemu.len();
                        self.to_qemu.consume(n);
                        self.from_qemu.end();
                        break;
                    }
                    Moved::Broken(error) => return broken("the incoming QEMU", &error),
                }
            }
            if idle {
                break;
            }
        }
        if self.to_qemu.is_done() {
            if let Some(qemu) = &self.qemu {
                qemu.socket.shutdown_write();
            }
        }
        if let step @ Step::Broken(_) = self.read_qemu() {
            return step;
        }
        while self.peer.writable && !self.from_qemu.is_empty() {
            match write_some(&mut self.peer.socket, self.from_qemu.filled()) {
                Moved::Bytes(n) => self.from_qemu.consume(n),
                Moved::Blocked | Moved::End => self.peer.writable = false,
                Moved::Broken(error) => return broken("the other sidecar", &error),
            }
        }
        if self.from_qemu.is_done() {
            // QEMU closed its end: it has loaded everything, or failed. Nothing more can come.
            if !self.is_disk || self.to_qemu.has_ended() {
                return Step::Finished;
            }
            let by = *self.closed_by.get_or_insert(now + CLOSED_BEFORE);
            if by <= now {
                return Step::Dropped;
            }
        }
        if moved >= TURN_BYTES {
            Step::More
        } else {
            Step::Fine
        }
    }

    fn greet(&mut self, now: Instant) -> Step {
        match &mut self.state {
            State::Open | State::Lingering => Step::Fine,
            State::Greeting { hello, by } => {
                if let Some(error) = self.peer.socket.take_error() {
                    return broken("connecting to the destination's sidecar", &error);
                }
                if *by <= now {
                    return Step::Broken(
                        "the destination's sidecar did not answer within 2 s: is its stream \
                         address reachable from here?"
                            .into(),
                    );
                }
                while !hello.is_empty() && self.peer.writable {
                    match write_some(&mut self.peer.socket, hello) {
                        Moved::Bytes(n) => {
                            hello.drain(..n);
                        }
                        Moved::Blocked | Moved::End => self.peer.writable = false,
                        Moved::Broken(error) => {
                            return broken("connecting to the destination's sidecar", &error);
                        }
                    }
                }
                let mut answer = [0];
                match read_some(&mut self.peer.socket, &mut answer) {
                    Moved::Bytes(_) => match Answer::from_byte(answer[0]) {
                        Some(Answer::Accepted) => {
                            self.state = State::Open;
                            Step::Fine
                        }
                        Some(answer) => Step::Broken(answer.explain().into()),
                        None => Step::Broken(
                            "what listens at the stream address is no muster-sidecar".into(),
                        ),
                    },
                    Moved::Blocked => Step::Fine,
                    Moved::End => Step::Broken("the destination's sidecar hung up".into()),
                    Moved::Broken(error) if error.kind() == std::io::ErrorKind::NotConnected => {
                        Step::Fine
                    }
                    Moved::Broken(error) => {
                        broken("connecting to the destination's sidecar", &error)
                    }
                }
            }
            State::Greeted { hello, by } => {
                if *by <= now {
                    return Step::Broken("no hello within 2 s".into());
                }
                let mut rest = [0; HELLO_BYTES];
                let missing = Hello::missing(hello);
                match read_some(&mut self.peer.socket, &mut rest[..missing]) {
                    Moved::Bytes(n) => hello.extend_from_slice(&rest[..n]),
                    Moved::Blocked => return Step::Fine,
                    Moved::End => return Step::Broken("hung up before its hello".into()),
                    Moved::Broken(error) => return broken("a stream connection", &error),
                }
                if Hello::missing(hello) > 0 {
                    return Step::More;
                }
                match Hello::decode(hello) {
                    Ok(hello) => Step::Hello(hello),
                    Err(answer) => {
                        self.refuse(answer);
                        Step::Broken("a stream connection with a wrong hello".into())
                    }
                }
            }
        }
    }

    fn read_qemu(&mut self) -> Step {
        let Some(qemu) = &mut self.qemu else {
            return Step::Fine;
        };
        while qemu.readable && !self.from_qemu.has_ended() && self.from_qemu.free() > 0 {
            match read_some(&mut qemu.socket, self.from_qemu.room()) {
                Moved::Bytes(n) => self.from_qemu.fill(n),
                Moved::Blocked => qemu.readable = false,
                Moved::End => self.from_qemu.end(),
                Moved::Broken(error) if self.role == Role::Destination => {
                    // An incoming QEMU that died: what it wrote before still counts.
                    let _ = error;
                    self.from_qemu.end();
                }
                // An NBD client that was removed with answers unread.
                Moved::Broken(_) if self.is_disk => self.from_qemu.end(),
                Moved::Broken(error) => return broken("QEMU", &error),
            }
        }
        Step::Fine
    }

    /// Source: carries the return path through the gate.
    fn carry_back(&mut self, now: Instant) -> Step {
        let mut buffer = [0; 4096];
        while self.peer.readable && !self.to_qemu.has_ended() && self.to_qemu.free() > 8192 {
            match read_some(&mut self.peer.socket, &mut buffer) {
                Moved::Bytes(n) if self.is_disk => {
                    self.nbd.received(now, &buffer[..n]);
                    // Else its NBD client is gone.
                    if !self.from_qemu.has_ended() {
                        self.to_qemu.push(&buffer[..n]);
                    }
                }
                Moved::Bytes(n) => match &mut self.gate {
                    Some(gate) => {
                        self.filtered.clear();
                        if let Err(error) = gate.pass(&buffer[..n], &mut self.filtered) {
                            return Step::Broken(error.to_string());
                        }
                        self.to_qemu.push(&self.filtered);
                    }
                    None => {
                        self.to_qemu.push(&buffer[..n]);
                    }
                },
                Moved::Blocked => self.peer.readable = false,
                Moved::End => self.to_qemu.end(),
                Moved::Broken(error) => return broken("the other sidecar", &error),
            }
        }
        if self.is_disk && self.to_qemu.has_ended() {
            return if self.from_qemu.is_done() {
                Step::Finished
            } else {
                Step::Broken("the destination closed the connection of a disk".into())
            };
        }
        let Some(qemu) = &mut self.qemu else {
            return Step::Fine;
        };
        while qemu.writable && !self.to_qemu.is_empty() {
            match write_some(&mut qemu.socket, self.to_qemu.filled()) {
                Moved::Bytes(n) => self.to_qemu.consume(n),
                Moved::Blocked | Moved::End => qemu.writable = false,
                Moved::Broken(_) if self.is_disk => {
                    let n = self.to_qemu.len();
                    self.to_qemu.consume(n);
                }
                // QEMU closed after it had completed: nobody reads the return path any more.
                Moved::Broken(_) => return Step::Finished,
            }
        }
        if self.to_qemu.is_done() {
            Step::Finished
        } else {
            Step::Fine
        }
    }

    /// Source: writes up to `budget` bytes of the stream; how many it wrote.
    ///
    /// # Errors
    /// The connection broke.
    pub fn send(&mut self, now: Instant, budget: usize) -> Result<usize, String> {
        let n = budget.min(self.from_qemu.filled().len());
        match write_some(&mut self.peer.socket, &self.from_qemu.filled()[..n]) {
            Moved::Bytes(n) => {
                if self.is_disk {
                    self.nbd.sent(now, &self.from_qemu.filled()[..n]);
                    self.nbd.look(now, self.peer.socket.unacknowledged_bytes());
                }
                self.from_qemu.consume(n);
                self.bytes += n as u64;
                self.waiting_since = None;
                Ok(n)
            }
            Moved::Blocked | Moved::End => {
                self.peer.writable = false;
                Ok(0)
            }
            Moved::Broken(error) => Err(format!("the other sidecar: {error}")),
        }
    }

    fn watch(&mut self, now: Instant) {
        if self.from_qemu.is_empty() || self.peer.writable {
            self.waiting_since = None;
        } else {
            self.waiting_since.get_or_insert(now);
        }
        if self.is_disk {
            self.nbd.look(now, self.peer.socket.unacknowledged_bytes());
        }
    }

    /// The guest's own write waits from before its copy is sent until its mirror is given up.
    fn disk_silence(&self) -> Duration {
        self.disk_stall * 3 / 4
    }

    /// When [`Self::step`] wants to be called even if nothing is ready.
    #[must_use]
    pub fn deadline(&self) -> Option<Instant> {
        match &self.state {
            State::Greeting { by, .. } | State::Greeted { by, .. } => Some(*by),
            State::Open | State::Lingering => {
                let waits = self.waiting_since.map(|since| since + STALL);
                let silent = self.nbd.deadline(self.disk_silence());
                let closed = self.closed_by.filter(|_| !self.is_lingering());
                [waits, silent, closed].into_iter().flatten().min()
            }
        }
    }

    /// Whether bytes wait and the peer has taken none for too long, or a disk's server does not
    /// answer: why it is to be cut.
    #[must_use]
    pub fn stalled(&self, now: Instant) -> Option<&'static str> {
        if self.waiting_since.is_some_and(|since| since + STALL <= now) {
            return Some("the destination takes no data any more (its sidecar or the link hangs)");
        }
        let silent = self.nbd.is_silent(now, self.disk_silence());
        silent.then_some("the destination does not answer to what is written to a disk")
    }
}

fn broken(what: &str, error: &std::io::Error) -> Step {
    Step::Broken(format!("{what}: {error}"))
}
