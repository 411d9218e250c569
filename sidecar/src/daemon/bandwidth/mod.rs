//! Probes of the bandwidth to other hosts: what is sent, and what is expected and thrown away.
//!
//! They come over the listener of migration streams and open with the same hello, whose run is the
//! probe's identifier and whose channel is [`PROBE_CHANNEL`].
//!
//! Nothing of a probe outlives its client, its time, or the beginning of a move.
//!
//! - `connection`: one connection, either end of it.

mod connection;

use std::collections::HashMap;
use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use mio::Token;
use nix::sys::socket::{setsockopt, sockopt};
use serde_json::{Value, json};
use uuid::Uuid;

use super::control::refuse;
use super::net::Socket;
use super::{Daemon, Slot, log};
use crate::migration::Now;
use crate::protocol::codec::{CommandError, probe_event_line};
use crate::protocol::probe::{ProbeAddress, ProbeArgs, ProbeEvent, ProbeListenArgs};
use crate::relay::hello::{Answer, Hello, Token as StreamToken};
use connection::{CHUNK_BYTES, End, Probing, Side};

/// Marks a connection as a probe.
pub const PROBE_CHANNEL: u16 = 65_534;
/// Probes sent at once, and received or expected.
const MAX_PROBES: usize = 16;
/// An expected probe comes within this time.
const EXPECTED_FOR: Duration = Duration::from_secs(5);
/// A probe that may come.
#[derive(Debug)]
struct Expected {
    probe: Uuid,
    token: StreamToken,
    client: usize,
    by: Instant,
}

/// Every probe here.
#[derive(Debug)]
pub(super) struct Probings {
    expected: Vec<Expected>,
    open: HashMap<usize, Probing>,
    /// What is sent: nothing that a link could compress.
    noise: Vec<u8>,
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
        let open = self.open.values().map(|probing| probing.deadline(now));
        open.chain(self.expected.iter().map(|expected| expected.by))
            .min()
    }

    fn count(&self, sends: bool) -> usize {
        let all = self.open.values();
        all.filter(|probing| probing.sends() == sends).count()
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
        let Probings { expected, .. } = &self.probings;
        if expected.iter().any(|known| known.probe == args.probe) {
            return refuse(format!("the probe {} is expected already", args.probe));
        }
        if expected.len() + self.probings.count(false) >= MAX_PROBES {
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
        let probing = Probing::sending(now.mono, client, socket, args, peer, token);
        self.probings.open.insert(slot.0, probing);
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
        let (token, socket) = (channel.peer.token, channel.peer.socket);
        self.slots.insert(token, Slot::Probing);
        let probing = Probing::receiving(now.mono, expected.client, socket, hello.run);
        self.probings.open.insert(token.0, probing);
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
        self.end_probe(now, id, end);
    }

    /// VMs are going to be moved: the path is theirs.
    pub(super) fn yield_path(&mut self, now: Now) {
        self.probings.expected.clear();
        let ids: Vec<usize> = self.probings.open.keys().copied().collect();
        for id in ids {
            let text = "VMs are going to be moved here, which has precedence";
            self.end_probe(now, id, End::Failed(text.into()));
        }
    }

    fn end_probe(&mut self, now: Now, id: usize, end: End) {
        let Some(probing) = self.probings.open.get(&id) else {
            return;
        };
        match &probing.side {
            Side::Sending(sending) => {
                let probed = sending.verdict(now.mono, probing.probe, end);
                if let Some(error) = &probed.error {
                    log(&format!("probing {}: {error}", sending.peer));
                }
                let line = probe_event_line(&ProbeEvent::Probed(probed), now.unix_us);
                let owner = probing.owner;
                self.close_probe(id);
                self.tell_client(owner, &line);
            }
            Side::Receiving { .. } => {
                if let End::Failed(error) = end {
                    log(&format!("a probe was ended: {error}"));
                }
                self.close_probe(id);
            }
        }
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
