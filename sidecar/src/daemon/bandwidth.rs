//! Probes of the bandwidth to other hosts: what is sent, and what is expected and thrown away.
//!
//! They come over the listener of migration streams and open with the same hello, whose run is the
//! probe's identifier and whose channel is [`PROBE_CHANNEL`].

use std::collections::HashMap;
use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use mio::Token;
use nix::sys::socket::{setsockopt, sockopt};
use serde_json::{Value, json};
use uuid::Uuid;

use super::control::refuse;
use super::net::{Moved, Socket, read_some, write_some};
use super::{Daemon, Slot, log, tcp};
use crate::bandwidth::Samples;
use crate::migration::Now;
use crate::protocol::codec::{CommandError, probe_event_line};
use crate::protocol::probe::{
    PROBE_BYTES, PROBE_MS, ProbeAddress, ProbeArgs, ProbeEvent, ProbeListenArgs, Probed,
};
use crate::relay::hello::{Answer, Hello, Token as StreamToken};

/// Marks a connection as a probe.
pub const PROBE_CHANNEL: u16 = 65_534;
/// Probes sent, received, and expected at once, each.
const MAX_PROBES: usize = 16;
/// An expected probe comes within this time.
const EXPECTED_FOR: Duration = Duration::from_secs(10);
/// A probe is connected and answered within this time.
const HELLO_WITHIN: Duration = Duration::from_secs(2);
/// Beyond the longest probe, a receiver waits so long for its end.
const RECEIVE_SLACK: Duration = Duration::from_secs(2);
/// How often acknowledgements are looked at.
const SAMPLE: Duration = Duration::from_millis(2);
/// Written or read in one go, so that the loop stays responsive.
const TURN_BYTES: usize = 1 << 20;
const CHUNK_BYTES: usize = 64 * 1024;

/// A probe that may come.
#[derive(Debug)]
struct Expected {
    probe: Uuid,
    token: StreamToken,
    client: usize,
    by: Instant,
}

/// A connection of a probe.
#[derive(Debug)]
struct Probing {
    probe: Uuid,
    /// The client that began it.
    owner: usize,
    socket: Socket,
    by: Instant,
    /// More can be done at once.
    more: bool,
    side: Side,
}

#[derive(Debug)]
enum Side {
    Sending(Box<Sending>),
    Receiving { left_bytes: u64 },
}

#[derive(Debug)]
struct Sending {
    peer: SocketAddr,
    hello: Vec<u8>,
    duration: Duration,
    max_bytes: u64,
    /// Since it was accepted: when, and what had been acknowledged by then.
    since: Option<(Instant, u64)>,
    unsent_bytes: u64,
    acked_bytes: u64,
    rtt_us: u32,
    samples: Samples,
}

/// Every probe here.
#[derive(Debug)]
pub(super) struct Probings {
    expected: Vec<Expected>,
    open: HashMap<usize, Probing>,
    /// What is sent: nothing that a link could compress.
    noise: Vec<u8>,
}

/// How a step of a probe ended it.
enum End {
    Done,
    Failed(String),
}

impl Probings {
    pub(super) fn new() -> Self {
        // xorshift64 (Marsaglia, 2003).
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        let mut next = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state
        };
        let words = (0..CHUNK_BYTES / 8).flat_map(|_| next().to_ne_bytes());
        Self {
            expected: Vec::new(),
            open: HashMap::new(),
            noise: words.collect(),
        }
    }

    /// When something is to be done even if nothing is ready.
    pub(super) fn deadline(&self, now: Instant) -> Option<Instant> {
        let open = self.open.values().map(|probing| match &probing.side {
            _ if probing.more => now,
            Side::Sending(sending) if sending.since.is_some() => probing.by.min(now + SAMPLE),
            _ => probing.by,
        });
        open.chain(self.expected.iter().map(|expected| expected.by))
            .min()
    }

    fn count(&self, is_sending: bool) -> usize {
        let all = self.open.values();
        all.filter(|p| matches!(p.side, Side::Sending(_)) == is_sending)
            .count()
    }
}

fn parse_token(text: &str) -> Result<StreamToken, CommandError> {
    StreamToken::from_hex(text)
        .ok_or_else(|| CommandError::generic("`token` is 64 hexadecimal digits"))
}

impl Daemon {
    /// A probe would take bandwidth from VMs that are being moved.
    fn check_idle(&self) -> Result<(), CommandError> {
        match self.runs.iter().find(|(_, entry)| !entry.run.has_ended()) {
            Some((run, _)) => refuse(format!(
                "VMs are being moved here in run {run}: probe before or afterwards"
            )),
            None => Ok(()),
        }
    }

    pub(super) fn probe_listen(
        &mut self,
        now: Now,
        client: usize,
        args: &ProbeListenArgs,
    ) -> Result<Value, CommandError> {
        let token = parse_token(&args.token)?;
        self.check_idle()?;
        let expected = &mut self.probings.expected;
        if expected.iter().any(|known| known.probe == args.probe) {
            return refuse(format!("the probe {} is expected already", args.probe));
        }
        if expected.len() >= MAX_PROBES || self.probings.count(false) >= MAX_PROBES {
            return refuse(format!(
                "{MAX_PROBES} probes are under way or expected here: try again later"
            ));
        }
        self.probings.expected.push(Expected {
            probe: args.probe,
            token,
            client,
            by: now.mono + EXPECTED_FOR,
        });
        let stream = self.stream_address.clone();
        Ok(json!(ProbeAddress { stream }))
    }

    pub(super) fn probe(
        &mut self,
        now: Now,
        client: usize,
        args: &ProbeArgs,
    ) -> Result<Value, CommandError> {
        args.check().map_err(CommandError::generic)?;
        let token = parse_token(&args.token)?;
        let Ok(peer) = args.stream.parse::<SocketAddr>() else {
            return refuse(format!("`{}` is no stream address (IP:PORT)", args.stream));
        };
        self.check_idle()?;
        for probing in self.probings.open.values() {
            match &probing.side {
                Side::Sending(sending) if sending.peer == peer => {
                    return refuse(format!(
                        "a probe to {peer} is under way already: wait for its PROBED"
                    ));
                }
                _ => {}
            }
        }
        if self.probings.count(true) >= MAX_PROBES {
            return refuse(format!("{MAX_PROBES} probes are under way here already"));
        }
        let slot = self.token(Slot::Probing);
        let connected = Socket::connect_tcp(peer).and_then(|mut socket| {
            socket.register(self.poll.registry(), slot)?;
            Ok(socket)
        });
        let socket = match connected {
            Ok(socket) => socket,
            Err(error) => {
                self.slots.remove(&slot);
                return refuse(format!("connecting to {peer}: {error}"));
            }
        };
        let hello = Hello {
            run: args.probe,
            vm: Uuid::nil(),
            channel: PROBE_CHANNEL,
            guest_runs: false,
            token,
        };
        let sending = Sending {
            peer,
            hello: hello.encode().to_vec(),
            duration: Duration::from_millis(args.duration_ms),
            max_bytes: args.max_bytes,
            since: None,
            unsent_bytes: args.max_bytes,
            acked_bytes: 0,
            rtt_us: 0,
            samples: Samples::default(),
        };
        self.probings.open.insert(
            slot.0,
            Probing {
                probe: args.probe,
                owner: client,
                socket,
                by: now.mono + HELLO_WITHIN,
                more: false,
                side: Side::Sending(Box::new(sending)),
            },
        );
        Ok(json!({}))
    }

    /// Destination: a hello of a probe came over the channel `id`.
    pub(super) fn greet_probe(&mut self, now: Now, id: usize, hello: &Hello) {
        let expected = &mut self.probings.expected;
        let is_it =
            |known: &Expected| known.probe == hello.run && known.token.matches(&hello.token);
        let Some(index) = expected.iter().position(is_it) else {
            self.refuse(id, Answer::Unknown);
            return;
        };
        let expected = expected.swap_remove(index);
        let Some(channel) = self.channels.remove(&id) else {
            return;
        };
        let (token, mut socket) = (channel.peer.token, channel.peer.socket);
        self.slots.insert(token, Slot::Probing);
        // A peer that is gone already shows it when it is read.
        let _ = write_some(&mut socket, &[Answer::Accepted as u8]);
        let longest = Duration::from_millis(*PROBE_MS.end());
        self.probings.open.insert(
            token.0,
            Probing {
                probe: hello.run,
                owner: expected.client,
                socket,
                by: now.mono + longest + RECEIVE_SLACK,
                more: true,
                side: Side::Receiving {
                    left_bytes: *PROBE_BYTES.end(),
                },
            },
        );
    }

    /// A client is gone, and with it those whom its probes were for.
    pub(super) fn end_probes_of(&mut self, client: usize) {
        self.probings
            .expected
            .retain(|expected| expected.client != client);
        let all = self.probings.open.iter();
        let owned = all.filter(|(_, probing)| probing.owner == client);
        let ids: Vec<usize> = owned.map(|(id, _)| *id).collect();
        for id in ids {
            self.close_probe(id);
        }
    }

    /// Does what is due, or was left over.
    pub(super) fn tend_probes(&mut self, now: Now) {
        self.probings.expected.retain(|known| known.by > now.mono);
        let ids: Vec<usize> = self.probings.open.keys().copied().collect();
        for id in ids {
            self.step_probe(now, id);
        }
    }

    pub(super) fn step_probe(&mut self, now: Now, id: usize) {
        let Probings { open, noise, .. } = &mut self.probings;
        let Some(probing) = open.get_mut(&id) else {
            return;
        };
        probing.more = false;
        let Some(end) = probing.step(now.mono, noise) else {
            return;
        };
        if let (Side::Sending(sending), owner) = (&probing.side, probing.owner) {
            let probed = sending.verdict(now.mono, probing.probe, end);
            if let Some(error) = &probed.error {
                log(&format!("probing {}: {error}", sending.peer));
            }
            let line = probe_event_line(&ProbeEvent::Probed(probed), now.unix_us);
            self.close_probe(id);
            self.tell_client(owner, &line);
            return;
        }
        if let End::Failed(error) = end {
            log(&format!("a probe was ended: {error}"));
        }
        self.close_probe(id);
    }

    fn close_probe(&mut self, id: usize) {
        let Some(mut probing) = self.probings.open.remove(&id) else {
            return;
        };
        probing.socket.deregister(self.poll.registry());
        self.slots.remove(&Token(id));
        if let Socket::Tcp(stream) = &probing.socket {
            // What was not sent yet is not to be: the path is for others now.
            let at_once = libc::linger {
                l_onoff: 1,
                l_linger: 0,
            };
            let _ = setsockopt(&stream.as_fd(), sockopt::Linger, &at_once);
        }
    }
}

impl Probing {
    fn step(&mut self, now: Instant, noise: &[u8]) -> Option<End> {
        match &mut self.side {
            Side::Receiving { left_bytes } => {
                let (more, end) = receive(&mut self.socket, left_bytes);
                self.more = more;
                end.or_else(|| {
                    let late = "it lasted longer than any may".to_owned();
                    (self.by <= now).then_some(End::Failed(late))
                })
            }
            Side::Sending(sending) => {
                if sending.since.is_none() {
                    if let Err(error) = sending.greet(now, &mut self.socket) {
                        return Some(End::Failed(error));
                    }
                    let Some((begun, _)) = sending.since else {
                        let silent = "the destination's sidecar did not answer within 2 s: is its \
                                      stream address reachable from here?";
                        return (self.by <= now).then(|| End::Failed(silent.into()));
                    };
                    self.by = begun + sending.duration;
                }
                let more = match sending.send(&mut self.socket, noise) {
                    Ok(more) => more,
                    Err(error) => return Some(End::Failed(error)),
                };
                self.more = more && self.by > now;
                if let Err(error) = sending.sample(now, &self.socket) {
                    return Some(End::Failed(error));
                }
                let over = self.by <= now || sending.acked_bytes >= sending.max_bytes;
                over.then_some(End::Done)
            }
        }
    }
}

/// Throws away what came; whether there may be more, and how it ended.
fn receive(socket: &mut Socket, left_bytes: &mut u64) -> (bool, Option<End>) {
    let mut buffer = [0; CHUNK_BYTES];
    let mut turn = 0;
    while turn < TURN_BYTES {
        match read_some(socket, &mut buffer) {
            Moved::Bytes(n) => {
                turn += n;
                *left_bytes = left_bytes.saturating_sub(n as u64);
                if *left_bytes == 0 {
                    return (false, Some(End::Done));
                }
            }
            Moved::Blocked => return (false, None),
            // The source ends it with a reset, so that nothing is left on the way.
            Moved::End | Moved::Broken(_) => return (false, Some(End::Done)),
        }
    }
    (true, None)
}

impl Sending {
    /// Says what this is, and takes the answer.
    fn greet(&mut self, now: Instant, socket: &mut Socket) -> Result<(), String> {
        let connecting = format!("connecting to {}", self.peer);
        if let Some(error) = socket.take_error() {
            return Err(format!("{connecting}: {error}"));
        }
        while !self.hello.is_empty() {
            match write_some(socket, &self.hello) {
                Moved::Bytes(n) => drop(self.hello.drain(..n)),
                Moved::Blocked | Moved::End => return Ok(()),
                Moved::Broken(error) => return Err(format!("{connecting}: {error}")),
            }
        }
        let mut answer = [0];
        match read_some(socket, &mut answer) {
            Moved::Blocked => Ok(()),
            Moved::End => Err("the destination's sidecar hung up".into()),
            Moved::Broken(error) => Err(format!("{connecting}: {error}")),
            Moved::Bytes(_) => match Answer::from_byte(answer[0]) {
                Some(Answer::Accepted) => {
                    let seen = progress(socket)?;
                    self.since = Some((now, seen.acked_bytes));
                    self.samples.add(0, 0);
                    Ok(())
                }
                Some(Answer::Unknown) => Err(
                    "the destination's sidecar does not expect this probe (`probe-listen` comes \
                     first, with the same token, at most 10 s before)"
                        .into(),
                ),
                Some(answer) => Err(answer.explain().into()),
                None => Err("what listens at the stream address is no muster-sidecar".into()),
            },
        }
    }

    /// Writes what the kernel takes; whether it may take more at once.
    fn send(&mut self, socket: &mut Socket, noise: &[u8]) -> Result<bool, String> {
        let mut turn = 0;
        while turn < TURN_BYTES && self.unsent_bytes > 0 {
            let n = usize::try_from(self.unsent_bytes).map_or(noise.len(), |n| n.min(noise.len()));
            match write_some(socket, &noise[..n]) {
                Moved::Bytes(n) => {
                    turn += n;
                    self.unsent_bytes = self.unsent_bytes.saturating_sub(n as u64);
                }
                Moved::Blocked => return Ok(false),
                Moved::End => return Err("the destination's sidecar hung up".into()),
                Moved::Broken(error) => {
                    return Err(format!("the destination's sidecar hung up: {error}"));
                }
            }
        }
        Ok(self.unsent_bytes > 0)
    }

    fn sample(&mut self, now: Instant, socket: &Socket) -> Result<(), String> {
        let Some((begun, before)) = self.since else {
            return Ok(());
        };
        let seen = progress(socket)?;
        self.acked_bytes = seen.acked_bytes.saturating_sub(before);
        self.rtt_us = seen.rtt_us;
        self.samples.add(
            micros(now.saturating_duration_since(begun)),
            self.acked_bytes,
        );
        if self.acked_bytes < self.max_bytes && hung_up(socket) {
            return Err("the destination's sidecar hung up".into());
        }
        Ok(())
    }

    fn verdict(&self, now: Instant, probe: Uuid, end: End) -> Probed {
        let begun = self.since.map_or(now, |(begun, _)| begun);
        let (rate, error) = match (end, self.samples.rate()) {
            (End::Failed(error), _) => (None, Some(error)),
            (End::Done, Some(rate)) => (Some(rate), None),
            (End::Done, None) => (
                None,
                Some(format!(
                    "{} took {} bytes and then no more within {:?} (its sidecar or the link hangs, \
                     or the time is too short for a round trip)",
                    self.peer, self.acked_bytes, self.duration
                )),
            ),
        };
        Probed {
            probe,
            acked_bytes: self.acked_bytes,
            duration_us: micros(now.saturating_duration_since(begun)),
            bytes_per_s: rate.map(|rate| rate.bytes_per_s),
            settled: rate.is_some_and(|rate| rate.settled),
            rtt_us: self.rtt_us,
            error,
        }
    }
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

/// Whether the other end closed: a destination writes nothing after its answer.
fn hung_up(socket: &Socket) -> bool {
    let Socket::Tcp(stream) = socket else {
        return true;
    };
    !matches!(stream.peek(&mut [0]), Err(error) if matches!(
        error.kind(),
        std::io::ErrorKind::WouldBlock | std::io::ErrorKind::Interrupted
    ))
}

fn progress(socket: &Socket) -> Result<crate::direct::Progress, String> {
    match socket {
        Socket::Tcp(stream) => tcp::progress(stream),
        Socket::Unix(_) => Err(std::io::ErrorKind::Unsupported.into()),
    }
    .map_err(|error| format!("TCP_INFO: {error}"))
}
