//! Streams that QEMU itself writes: how far they are, and the pace that the kernel keeps for them.
//!
//! The hierarchy of limits decides the numbers, here as for relayed streams, which it grants their
//! bytes one by one. What a direct stream sends is charged to it, so that both kinds share a link.

use std::collections::{HashMap, HashSet};
use std::io;
use std::net::Shutdown;
use std::time::{Duration, Instant};

use mio::net::TcpStream;
use rate_limiter::{Bytes, BytesPerSecond, Demand, LeafId};

use super::channel::{Channel, HalfKey};
use super::{Daemon, log, tcp};
use crate::direct::{self, Appetite, Progress, Stall};
use crate::migration::Now;
use crate::protocol::types::Role;
use crate::run::VmHalf;
use crate::sys;

/// How often shares are worked out anew, and progress is looked at.
const TICK: Duration = Duration::from_millis(50);

/// What a stream may send at that is not to wait: where a burst of 64 KiB goes in 4 ms.
const LIVELY: u64 = 16_000_000;

/// The socket of a stream, which QEMU has too.
#[derive(Debug)]
pub struct Stream {
    /// The socket.
    pub socket: TcpStream,
    /// What was on it before QEMU had it.
    begun: Progress,
    seen: Progress,
    stall: Stall,
    appetite: Appetite,
    pace: Option<u64>,
}

impl Stream {
    /// A socket on which QEMU has not written yet.
    #[must_use]
    pub fn new(socket: TcpStream) -> Self {
        let begun = tcp::progress(&socket).unwrap_or_default();
        Self {
            socket,
            begun,
            seen: begun,
            stall: Stall::default(),
            appetite: Appetite::default(),
            pace: None,
        }
    }

    /// Bytes that QEMU has written and the other host has not acknowledged.
    #[must_use]
    pub fn in_flight_bytes(&self) -> u64 {
        sys::queued_bytes(&self.socket, libc::TIOCOUTQ).unwrap_or(0)
    }

    /// Writes one byte, before QEMU does.
    ///
    /// # Errors
    /// The connection broke.
    pub fn say(&mut self, byte: u8) -> io::Result<()> {
        use std::io::Write;
        self.socket.write_all(&[byte])
    }

    /// Bytes of the stream that are across.
    #[must_use]
    pub fn bytes(&self, role: Role) -> u64 {
        let seen = tcp::progress(&self.socket).unwrap_or(self.seen);
        let count = |progress: &Progress| match role {
            Role::Source => progress.acked_bytes,
            Role::Destination => progress.received_bytes,
        };
        count(&seen).saturating_sub(count(&self.begun))
    }

    /// Whether bytes wait that the path does not take, though the pace would let them go.
    #[must_use]
    pub fn waits_for_path(&self) -> bool {
        self.appetite.is_kept_short(self.seen, self.pace)
    }

    fn look(&mut self) -> Progress {
        // A socket that is gone keeps its last numbers.
        if let Ok(seen) = tcp::progress(&self.socket) {
            self.seen = seen;
        }
        self.seen
    }

    /// Shuts it down, for QEMU too; the bytes that were across.
    pub fn cut(&mut self, role: Role) -> u64 {
        self.look();
        // The end must not wait behind what is paced. It may be gone already.
        let _ = tcp::pace(&self.socket, None);
        let _ = self.socket.shutdown(Shutdown::Both);
        self.bytes(role)
    }

    fn set_pace(&mut self, pace: Option<u64>) {
        let near = match (self.pace, pace) {
            (Some(old), Some(new)) => old.abs_diff(new) <= old / 100,
            (old, new) => old == new,
        };
        if near {
            return;
        }
        let set = tcp::pace(&self.socket, pace)
            .and_then(|()| tcp::limit_unsent(&self.socket, direct::ahead(pace)));
        match set {
            Ok(()) => self.pace = pace,
            Err(error) => log(&format!("a stream cannot be paced: {error}")),
        }
    }
}

impl Daemon {
    /// Looks at every direct stream and sets its pace; when to do it again.
    pub(super) fn pace_direct(&mut self, now: Now) -> Option<Instant> {
        let mut demands: HashMap<LeafId, Demand> = HashMap::new();
        let mut charges = Vec::new();
        let mut lively: HashSet<LeafId> = HashSet::new();
        let mut stalled: Vec<HalfKey> = Vec::new();
        let mut any = false;
        for (run, entry) in &mut self.runs {
            let halves = entry.run.halves.iter().zip(&mut entry.io).enumerate();
            for (index, (half, io)) in halves {
                if let Some(stream) = &mut io.direct.stream {
                    any = true;
                    let seen = stream.look();
                    let (VmHalf::Source(source), Some(leaf)) = (half, io.leaf) else {
                        continue;
                    };
                    if source.has_completed() {
                        continue;
                    }
                    if stream.stall.observe(now.mono, seen, stream.pace) {
                        stalled.push((*run, index));
                    }
                    let (demand, moved) = stream.appetite.observe(now.mono, seen, stream.pace);
                    if demand.most.is_some() || source.is_about_to_stop() {
                        lively.insert(leaf);
                    }
                    let urgent = source.is_urgent();
                    let most = demand.most.filter(|_| !urgent);
                    demands.insert(leaf, Demand { most, ..demand });
                    charges.push((leaf, Bytes(moved)));
                } else if let (Some(leaf), false) = (io.leaf, io.channels.is_empty()) {
                    let mut open = io.channels.iter().filter_map(|id| self.channels.get(id));
                    let wanted = io.rate_bytes_per_s.saturating_add(io.rate_bytes_per_s / 4);
                    let demand = if open.any(Channel::is_backlogged) {
                        Demand::EVERYTHING
                    } else {
                        Demand::at_most(BytesPerSecond(wanted.saturating_add(1 << 20)))
                    };
                    demands.insert(leaf, demand);
                }
            }
        }
        if !any {
            return None;
        }
        for (leaf, moved) in charges {
            self.pacing.charge(now.mono, leaf, moved);
        }
        let allotted = self.pacing.allot(|leaf| demands.get(&leaf).copied());
        let least = lively_pace(&allotted);
        for (leaf, rate) in allotted {
            let limit = self.pacing.leaf_limit(leaf).map_or(u64::MAX, |l| l.0);
            let Some((run, half)) = self.leaves.get(&leaf).copied() else {
                continue;
            };
            let entry = self.runs.get_mut(&run);
            let stream = entry.and_then(|entry| entry.io[half].direct.stream.as_mut());
            if let Some(stream) = stream {
                let least = if lively.contains(&leaf) { least } else { 0 };
                stream.set_pace(rate.map(|rate| rate.0.max(least.min(limit))));
            }
        }
        for key in stalled {
            let text = "the destination takes no data any more (its QEMU or the link hangs)";
            self.break_direct(key, text);
        }
        Some(now.mono + TICK)
    }
}

/// The least pace of streams that send little, or whose VM is about to stop. The kernel works out
/// when a socket may send again as it sends, and a higher pace comes too late for that: at a light
/// one's share the next burst would wait for tens of milliseconds, and with it the VM's release. That
/// such streams may exceed their shares is bounded: all together send at most twice what they may.
fn lively_pace(allotted: &[(LeafId, Option<BytesPerSecond>)]) -> u64 {
    let limited = || allotted.iter().filter_map(|(_, rate)| *rate);
    let sum = limited().fold(0_u64, |sum, rate| sum.saturating_add(rate.0));
    let count = limited().count() as u64;
    (sum / (count + 1)).saturating_mul(2).min(LIVELY)
}
