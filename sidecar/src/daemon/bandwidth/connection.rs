//! One connection of a probe: what it sends or throws away, and what it finds.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use uuid::Uuid;

use super::super::net::{Moved, Socket, read_some, write_some};
use super::super::tcp;
use super::PROBE_CHANNEL;
use crate::bandwidth::Samples;
use crate::protocol::probe::{PROBE_BYTES, PROBE_MS, ProbeArgs, Probed};
use crate::relay::hello::{Answer, Hello, Token as StreamToken};

/// A probe is connected and answered within this time.
const HELLO_WITHIN: Duration = Duration::from_secs(2);
/// Beyond the longest probe, a receiver waits so long for its end.
const RECEIVE_SLACK: Duration = Duration::from_secs(2);
/// How often acknowledgements are looked at.
const SAMPLE: Duration = Duration::from_millis(2);
/// Written or read in one go, so that the loop stays responsive.
const TURN_BYTES: usize = 1 << 20;
/// … in pieces of this size.
pub(super) const CHUNK_BYTES: usize = 64 * 1024;

/// A connection of a probe.
#[derive(Debug)]
pub(super) struct Probing {
    pub(super) probe: Uuid,
    /// The client that began it, or asked to expect it.
    pub(super) owner: usize,
    pub(super) socket: Socket,
    pub(super) by: Instant,
    /// More can be done at once.
    pub(super) more: bool,
    pub(super) side: Side,
}

/// Which end of it this is.
#[derive(Debug)]
pub(super) enum Side {
    Sending(Box<Sending>),
    Receiving { left_bytes: u64 },
}

/// The end that sends.
#[derive(Debug)]
pub(super) struct Sending {
    pub(super) peer: SocketAddr,
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

/// How a step of a probe ended it.
pub(super) enum End {
    Done,
    Failed(String),
}

impl Probing {
    /// The end that sends, over a socket that is being connected.
    pub(super) fn sending(
        now: Instant,
        owner: usize,
        socket: Socket,
        args: &ProbeArgs,
        peer: SocketAddr,
        token: StreamToken,
    ) -> Self {
        let hello = Hello {
            run: args.probe,
            vm: Uuid::nil(),
            channel: PROBE_CHANNEL,
            balloon_bytes: None,
            guest_runs: false,
            token,
        };
        let sending = Sending {
            peer,
            hello: hello.encode(),
            duration: Duration::from_millis(args.duration_ms),
            max_bytes: args.max_bytes,
            since: None,
            unsent_bytes: args.max_bytes,
            acked_bytes: 0,
            rtt_us: 0,
            samples: Samples::default(),
        };
        Self {
            probe: args.probe,
            owner,
            socket,
            by: now + HELLO_WITHIN,
            more: false,
            side: Side::Sending(Box::new(sending)),
        }
    }

    /// The end that receives: its hello was right, and is answered here.
    pub(super) fn receiving(now: Instant, owner: usize, mut socket: Socket, probe: Uuid) -> Self {
        // A peer that is gone already shows it when it is read.
        let _ = write_some(&mut socket, &[Answer::Accepted as u8]);
        Self {
            probe,
            owner,
            socket,
            by: now + Duration::from_millis(*PROBE_MS.end()) + RECEIVE_SLACK,
            more: true,
            side: Side::Receiving {
                left_bytes: *PROBE_BYTES.end(),
            },
        }
    }

    /// When something is to be done even if the socket is not ready.
    pub(super) fn deadline(&self, now: Instant) -> Instant {
        match &self.side {
            _ if self.more => now,
            Side::Sending(sending) if sending.since.is_some() => self.by.min(now + SAMPLE),
            _ => self.by,
        }
    }

    /// Whether this end sends.
    pub(super) fn sends(&self) -> bool {
        matches!(self.side, Side::Sending(_))
    }

    /// Does what can be done now; how that ended it, if it did.
    pub(super) fn step(&mut self, now: Instant, noise: &[u8]) -> Option<End> {
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
                     first, with the same token, at most 5 s before)"
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

    /// What it found.
    pub(super) fn verdict(&self, now: Instant, probe: Uuid, end: End) -> Probed {
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
