//! Migration streams: who they belong to, and how fast they may go.

use std::net::SocketAddr;
use std::path::Path;
use std::time::{Duration, Instant};

use mio::net::UnixListener;
use mio::{Interest, Registry, Token};
use rate_limiter::{Bytes, BytesPerSecond, Poll};
use uuid::Uuid;

use super::bandwidth::PROBE_CHANNEL;
use super::channel::{Channel, End, HalfKey, Step};
use super::halves;
use super::net::Socket;
use super::{Daemon, Entry, Slot, log};
use crate::direct::COMPANION;
use crate::migration::Now;
use crate::protocol::command::{PaceArgs, PaceVm};
use crate::protocol::types::{Role, Transport, VmReport};
use crate::relay::hello::{Answer, DISK_CHANNEL, Hello};
use crate::run::VmHalf;

/// Grants handed out before other things are looked at again.
const GRANTS_PER_TURN: usize = 64;
/// Connections that have not said yet what they carry.
const MAX_STRANGERS: usize = 64;
/// How often the speed of streams is measured.
const MEASURE: Duration = Duration::from_millis(100);

/// Listens on a unix socket of its own for this host's QEMU.
///
/// # Errors
/// It cannot, for people.
pub(super) fn listen(
    registry: &Registry,
    token: Token,
    path: &Path,
) -> Result<UnixListener, String> {
    // What an earlier life left.
    let _ = std::fs::remove_file(path);
    let bound = UnixListener::bind(path).and_then(|mut listener| {
        registry.register(&mut listener, token, Interest::READABLE)?;
        Ok(listener)
    });
    bound.map_err(|error| format!("{} cannot be listened on: {error}", path.display()))
}

impl Daemon {
    pub(super) fn listen_for_qemu(&mut self, now: Now, key: HalfKey) {
        let token = self.token(Slot::Listener(key));
        let Some(entry) = self.runs.get_mut(&key.0) else {
            return;
        };
        let half = &mut entry.run.halves[key.1];
        let path = halves::outgoing_path(&self.config.runtime_dir, &half.half().name);
        match listen(self.poll.registry(), token, &path) {
            Ok(listener) => {
                entry.io[key.1].listener = Some((token, listener, path.clone()));
                if let Some(source) = half.source_mut() {
                    source.listening(now, &path.display().to_string());
                }
            }
            Err(error) => half.fail(&error),
        }
    }

    /// Takes what QEMU connects: with its stream, or with the NBD clients of its disks.
    pub(super) fn accept_qemu(&mut self, now: Now, key: HalfKey, is_disk: bool) {
        loop {
            let Some(entry) = self.runs.get_mut(&key.0) else {
                return;
            };
            let io = &mut entry.io[key.1];
            let listener = if is_disk {
                &mut io.disk_listener
            } else {
                &mut io.listener
            };
            let Some((_, listener, _)) = listener else {
                return;
            };
            let Ok((socket, _)) = listener.accept() else {
                return;
            };
            if let Err(error) = self.open_channel(now, key, Socket::Unix(socket), is_disk) {
                if let Some(entry) = self.runs.get_mut(&key.0) {
                    entry.run.halves[key.1].stream_failed(&error);
                }
            }
        }
    }

    fn open_channel(
        &mut self,
        now: Now,
        key: HalfKey,
        mut qemu: Socket,
        is_disk: bool,
    ) -> Result<(), String> {
        let Some(entry) = self.runs.get_mut(&key.0) else {
            return Ok(());
        };
        let (io, half) = (&mut entry.io[key.1], &entry.run.halves[key.1]);
        let peer_address = io.peer.ok_or("no destination is known")?;
        let hello = Hello {
            run: key.0,
            vm: half.half().uuid,
            channel: if is_disk {
                DISK_CHANNEL
            } else {
                io.next_channel
            },
            guest_runs: match half {
                VmHalf::Source(source) => source.was_running,
                VmHalf::Destination(destination) => destination.was_running,
            },
            balloon_bytes: match half {
                VmHalf::Source(source) => source.taken_from(),
                VmHalf::Destination(_) => None,
            },
            token: io.token,
        };
        let held_here = matches!(half, VmHalf::Source(source) if source.is_held_by_relay());
        let disk_stall = io.disk_stall;
        let gated = hello.channel == 0 && held_here && !io.gate_open;
        io.next_channel += u16::from(!is_disk);
        let id = self.next_token;
        let mut peer = Socket::connect_tcp(peer_address)
            .map_err(|error| format!("connecting to {peer_address}: {error}"))?;
        let peer_token = self.token(Slot::ChannelEnd(id));
        let qemu_token = self.token(Slot::ChannelEnd(id));
        let registry = self.poll.registry();
        peer.register(registry, peer_token)
            .map_err(|error| error.to_string())?;
        qemu.register(registry, qemu_token)
            .map_err(|error| error.to_string())?;
        let (qemu, peer) = (End::new(qemu_token, qemu), End::new(peer_token, peer));
        let channel = Channel::outgoing(now.mono, key, qemu, peer, &hello, gated, disk_stall);
        self.channels.insert(id, channel);
        self.busy.push(id);
        if let Some(entry) = self.runs.get_mut(&key.0) {
            entry.io[key.1].channels.push(id);
        }
        Ok(())
    }

    pub(super) fn accept_streams(&mut self, now: Now) {
        while let Ok((socket, _)) = self.streams.accept() {
            let strangers = self.channels.values().filter(|c| c.half.is_none()).count();
            if strangers >= MAX_STRANGERS {
                log("too many stream connections without a hello; one was refused");
                continue;
            }
            let id = self.next_token;
            let token = self.token(Slot::ChannelEnd(id));
            let mut socket = Socket::tcp(socket);
            if socket.register(self.poll.registry(), token).is_err() {
                self.slots.remove(&token);
                continue;
            }
            self.channels
                .insert(id, Channel::incoming(now.mono, End::new(token, socket)));
            self.busy.push(id);
        }
    }

    /// Destination: finds the VM of a hello and connects its QEMU.
    fn answer_hello(&mut self, now: Now, id: usize, hello: &Hello) {
        if hello.channel == PROBE_CHANNEL {
            return self.greet_probe(now, id, hello);
        }
        let found = self.runs.get_mut(&hello.run).and_then(|entry| {
            let is_it = |half: &VmHalf| {
                half.half().role == Role::Destination && half.half().uuid == hello.vm
            };
            let index = entry.run.halves.iter().position(is_it)?;
            let io = &entry.io[index];
            (io.token.matches(&hello.token) && !entry.run.has_ended()).then_some(index)
        });
        let Some(index) = found else {
            self.refuse(id, Answer::Unknown);
            return;
        };
        let key = (hello.run, index);
        let transport = |entry: &Entry| entry.run.halves[index].half().transport;
        let direct = self.runs.get(&hello.run).map(transport) == Some(Transport::Direct);
        match (direct, hello.channel) {
            (true, _) => return self.greet_direct(now, id, key, hello),
            (false, COMPANION) => return self.refuse(id, Answer::Unknown),
            _ => {}
        }
        let is_disk = hello.channel == DISK_CHANNEL;
        let token = self.token(Slot::ChannelEnd(id));
        let Some(entry) = self.runs.get_mut(&hello.run) else {
            return;
        };
        let path = if is_disk {
            &entry.io[index].nbd_path
        } else {
            &entry.io[index].incoming_path
        };
        let connected = Socket::connect_unix(path).and_then(|mut socket| {
            socket.register(self.poll.registry(), token)?;
            Ok(socket)
        });
        let Ok(socket) = connected else {
            self.slots.remove(&token);
            self.refuse(id, Answer::NotListening);
            return;
        };
        entry.io[index].channels.push(id);
        let mut changed = false;
        if let Some(destination) = entry.run.halves[index].destination_mut() {
            changed = destination.greeted(hello);
        }
        if let Some(channel) = self.channels.get_mut(&id) {
            channel.accept(key, End::new(token, socket), is_disk);
            self.busy.push(id);
        }
        if changed {
            self.save_note(hello.run);
        }
    }

    pub(super) fn refuse(&mut self, id: usize, answer: Answer) {
        log(&format!(
            "a stream connection was refused: {}",
            answer.explain()
        ));
        if let Some(channel) = self.channels.get_mut(&id) {
            channel.refuse(answer);
        }
        self.drop_channel(id);
    }

    pub(super) fn drop_channel(&mut self, id: usize) {
        let Some(mut channel) = self.channels.remove(&id) else {
            return;
        };
        let ends = channel.qemu.as_mut().into_iter().chain([&mut channel.peer]);
        for end in ends {
            end.socket.deregister(self.poll.registry());
            self.slots.remove(&end.token);
        }
        let Some((run, half)) = channel.half else {
            return;
        };
        if let Some(entry) = self.runs.get_mut(&run) {
            let io = &mut entry.io[half];
            io.channels.retain(|other| *other != id);
            io.closed_bytes += channel.bytes;
            self.update_backlog((run, half));
        }
    }

    pub(super) fn cut_stream(&mut self, key: HalfKey) {
        let Some(entry) = self.runs.get_mut(&key.0) else {
            return;
        };
        let io = &mut entry.io[key.1];
        io.write_back = None;
        let channels = std::mem::take(&mut io.channels);
        if let Some((token, mut listener, path)) = io.listener.take() {
            let _ = self.poll.registry().deregister(&mut listener);
            self.slots.remove(&token);
            let _ = std::fs::remove_file(path);
        }
        for id in channels {
            self.drop_channel(id);
        }
        self.close_disk_listener(key);
        self.cut_direct(key);
    }

    pub(super) fn open_gate(&mut self, key: HalfKey) {
        let Some(entry) = self.runs.get_mut(&key.0) else {
            return;
        };
        entry.io[key.1].gate_open = true;
        for id in &entry.io[key.1].channels {
            if let Some(channel) = self.channels.get_mut(id) {
                channel.open_gate();
                self.busy.push(*id);
            }
        }
    }

    pub(super) fn unpace(&mut self, now: Now, key: HalfKey) {
        let Some(entry) = self.runs.get(&key.0) else {
            return;
        };
        if let Some(leaf) = entry.io[key.1].leaf {
            self.pacing.set_leaf_limit(now.mono, leaf, None);
        }
        self.direct_at = self.direct_at.map(|_| now.mono);
    }

    /// Moves what may be moved now.
    pub(super) fn move_bytes(&mut self, now: Now) {
        let mut busy = std::mem::take(&mut self.busy);
        let late = self
            .channels
            .iter()
            .filter(|(_, c)| c.deadline().is_some_and(|at| at <= now.mono));
        busy.extend(late.map(|(id, _)| *id));
        busy.sort_unstable();
        busy.dedup();
        for id in busy {
            self.step_channel(now, id);
        }
        self.pace_at = None;
        for _ in 0..GRANTS_PER_TURN {
            match self.pacing.poll(now.mono) {
                Poll::Idle => return,
                Poll::Wait(at) => {
                    self.pace_at = Some(at);
                    return;
                }
                Poll::Grant { leaf, bytes } => {
                    let budget = usize::try_from(bytes.0).unwrap_or(usize::MAX);
                    let moved = match self.leaves.get(&leaf).copied() {
                        Some(key) => self.send_paced(now, key, budget),
                        None => 0,
                    };
                    self.pacing.charge(now.mono, leaf, Bytes(moved as u64));
                }
            }
        }
        self.pace_at = Some(now.mono);
    }

    fn send_paced(&mut self, now: Now, key: HalfKey, mut budget: usize) -> usize {
        let channels = self.in_turn(key);
        let mut moved = 0;
        for id in channels {
            let Some(channel) = self.channels.get_mut(&id) else {
                continue;
            };
            if !channel.is_backlogged() || budget == 0 {
                continue;
            }
            match channel.send(now.mono, budget) {
                Ok(n) => {
                    moved += n;
                    budget -= n;
                }
                Err(error) => {
                    self.break_channel(id, &error);
                    continue;
                }
            }
            // There is room again: take what QEMU has waiting.
            self.step_channel(now, id);
        }
        self.update_backlog(key);
        moved
    }

    fn step_channel(&mut self, now: Now, id: usize) {
        let Some(channel) = self.channels.get_mut(&id) else {
            return;
        };
        let step = channel.step(now.mono);
        let half = channel.half;
        let stalled = channel.stalled(now.mono);
        self.stirred |= !matches!(step, Step::Fine | Step::More);
        match step {
            Step::Fine => {
                if let Some(reason) = stalled {
                    self.break_channel(id, reason);
                }
            }
            Step::More => self.busy.push(id),
            Step::Hello(hello) => self.answer_hello(now, id, &hello),
            Step::Finished if channel.is_disk => self.disk_ended(now, id),
            Step::Finished => self.drop_channel(id),
            Step::Broken(error) => self.break_channel(id, &error),
            Step::Dropped => self.disk_dropped(id),
        }
        if let Some(key) = half {
            self.update_backlog(key);
        }
    }

    fn break_channel(&mut self, id: usize, error: &str) {
        let half = self.channels.get(&id).and_then(|channel| channel.half);
        self.drop_channel(id);
        let Some(key) = half else { return };
        self.stirred = true;
        // One broken channel breaks the stream: QEMU must see it on all of them.
        self.cut_stream(key);
        if let Some(entry) = self.runs.get_mut(&key.0) {
            entry.run.halves[key.1].stream_failed(error);
        }
    }

    fn update_backlog(&mut self, key: HalfKey) {
        let Some(entry) = self.runs.get(&key.0) else {
            return;
        };
        let Some(leaf) = entry.io[key.1].leaf else {
            return;
        };
        let backlogged = entry.io[key.1]
            .channels
            .iter()
            .any(|id| self.channels.get(id).is_some_and(Channel::is_backlogged));
        self.pacing.set_backlogged(leaf, backlogged);
    }

    /// Makes the pacing leaf of a source.
    pub(super) fn add_leaf(&mut self, now: Now, key: HalfKey) {
        let Some(entry) = self.runs.get_mut(&key.0) else {
            return;
        };
        let leaf = self.pacing.add_leaf(now.mono, entry.group);
        entry.io[key.1].leaf = Some(leaf);
        self.leaves.insert(leaf, key);
    }

    /// Applies `pace`.
    pub(super) fn pace(&mut self, now: Now, args: &PaceArgs) -> Result<(), String> {
        let entry = self.runs.get(&args.run).ok_or("unknown run")?;
        let limit = |rate: u64| (rate > 0).then_some(BytesPerSecond(rate));
        let mut settings: Vec<(rate_limiter::LeafId, PaceVm)> = Vec::new();
        for (vm, pace) in &args.vms {
            let index = entry
                .run
                .halves
                .iter()
                .position(|half| half.half().name == *vm);
            let index = index.ok_or_else(|| format!("VM `{vm}` is not in this run here"))?;
            let leaf = entry.io[index].leaf;
            settings.push((
                leaf.ok_or_else(|| format!("VM `{vm}` is no source here"))?,
                *pace,
            ));
        }
        if let Some(rate) = args.group_bytes_per_s {
            self.pacing
                .set_group_limit(now.mono, entry.group, limit(rate));
        }
        for (leaf, pace) in settings {
            if let Some(weight) = pace.weight {
                self.pacing
                    .set_leaf_weight(leaf, weight)
                    .map_err(|error| error.to_string())?;
            }
            if let Some(rate) = pace.bytes_per_s {
                self.pacing.set_leaf_limit(now.mono, leaf, limit(rate));
            }
        }
        self.direct_at = self.direct_at.map(|_| now.mono);
        Ok(())
    }

    pub(super) fn apply_scheduled(&mut self, now: Now) {
        let mut due = Vec::new();
        for entry in self.runs.values_mut() {
            entry.scheduled.retain(|(at, args)| {
                let later = *at > now.mono;
                if !later {
                    due.push(args.clone());
                }
                later
            });
        }
        for args in due {
            if let Err(error) = self.pace(now, &args) {
                log(&format!("a scheduled `pace` could not be applied: {error}"));
            }
        }
    }

    /// Keeps the measured speeds up to date.
    pub(super) fn measure(&mut self, now: Now) {
        if self
            .measured_at
            .is_some_and(|at: Instant| now.mono.duration_since(at) < MEASURE)
        {
            return;
        }
        let before = self.measured_at.replace(now.mono).unwrap_or(now.mono);
        // What is seen now counts for the time since it was looked at last, unless that is long ago.
        let time = now.mono.duration_since(before).min(MEASURE * 2);
        self.reap();
        for entry in self
            .runs
            .values_mut()
            .filter(|entry| !entry.run.has_ended())
        {
            for (half, io) in entry.run.halves.iter_mut().zip(&mut entry.io) {
                let bytes = io.stream_bytes(half.half().role, &self.channels);
                io.rate_bytes_per_s = io.meter.observe(now.mono, bytes);
                if let Some(source) = half.source_mut() {
                    source.rate_bytes_per_s = io.rate_bytes_per_s;
                    if io.waits_for_path(&self.channels) {
                        io.link_wait += time;
                    }
                }
            }
        }
    }

    /// Adds what the relay knows to reports.
    pub(super) fn complete_reports(&self, run: Uuid, reports: &mut [VmReport]) {
        let Some(entry) = self.runs.get(&run) else {
            return;
        };
        for (report, io) in reports.iter_mut().zip(&entry.io) {
            report.transferred_bytes = io.stream_bytes(report.role, &self.channels);
            report.rate_bytes_per_s = io.rate_bytes_per_s;
            report.link_wait_ms = crate::hold::millis(io.link_wait);
            let limit = io.leaf.and_then(|leaf| self.pacing.leaf_limit(leaf));
            report.limit_bytes_per_s = limit.map(|rate| rate.0);
        }
    }

    pub(super) fn set_peer(&mut self, key: HalfKey, address: SocketAddr) {
        if let Some(entry) = self.runs.get_mut(&key.0) {
            entry.io[key.1].peer = Some(address);
        }
    }
}
