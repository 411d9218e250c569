//! The QEMUs of VMs in runs: their monitors and their processes.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::path::PathBuf;
use std::process::Child;
use std::time::Duration;

use mio::unix::SourceFd;
use mio::{Interest, Token};
use rate_limiter::LeafId;
use uuid::Uuid;

use super::channel::{Channel, HalfKey};
use super::direct::Direct;
use super::direct_pace::Stream;
use super::images::images_of;
use super::net::{Moved, RateMeter, Socket, read_some, write_some};
use super::process::Process;
use super::storage::Job;
use super::tcp::send_with_descriptor;
use super::write_back::WriteBack;
use super::{Daemon, Slot, log};
use crate::migration::Now;
use crate::protocol::types::Role;
use crate::qmp::QmpClient;
use crate::relay::hello::Token as StreamToken;
use crate::run::VmHalf;

/// What a half has outside of its machine.
#[derive(Debug)]
pub struct HalfIo {
    /// Where its monitor is.
    pub qmp_path: PathBuf,
    /// The connection to it.
    pub qmp: Option<(Token, Socket)>,
    /// The QEMU process.
    pub process: Option<(Token, Process)>,
    /// Source: where QEMU connects with its stream.
    pub listener: Option<(Token, mio::net::UnixListener, PathBuf)>,
    /// Source: where QEMU connects its NBD clients.
    pub disk_listener: Option<(Token, mio::net::UnixListener, PathBuf)>,
    /// Destination: where QEMU takes the stream.
    pub incoming_path: PathBuf,
    /// Destination: where QEMU's NBD server listens.
    pub nbd_path: PathBuf,
    /// Destination: images that were made for this run.
    pub created: Vec<PathBuf>,
    /// Writes images back while disks move.
    pub write_back: Option<WriteBack>,
    /// Source: a write to a disk is answered within this time.
    pub disk_stall: Duration,
    /// Counts grants, so that disks and memory get theirs in turn.
    pub turn: usize,
    /// Pairs stream connections with this VM.
    pub token: StreamToken,
    /// Source: the destination's stream address.
    pub peer: Option<std::net::SocketAddr>,
    /// Source: its leaf in the pacing hierarchy.
    pub leaf: Option<LeafId>,
    /// Its channels.
    pub channels: Vec<usize>,
    /// Source: number of the next channel.
    pub next_channel: u16,
    /// Bytes of channels that are closed.
    pub closed_bytes: u64,
    /// Measures the stream.
    pub meter: RateMeter,
    /// What the meter last said.
    pub rate_bytes_per_s: u64,
    /// Source: for how long bytes have waited for the path, not for their pace.
    pub link_wait: Duration,
    /// Source: the acknowledgement may pass.
    pub gate_open: bool,
    /// Number of the note that the half waits for.
    pub note: Option<u64>,
    /// What it has of the direct transport.
    pub direct: Direct,
}

impl HalfIo {
    /// A half whose monitor is at this path.
    #[must_use]
    pub fn new(qmp_path: PathBuf, incoming_path: PathBuf, token: StreamToken) -> Self {
        Self {
            qmp_path,
            qmp: None,
            process: None,
            listener: None,
            disk_listener: None,
            nbd_path: incoming_path.with_extension("nbd"),
            created: Vec::new(),
            write_back: None,
            disk_stall: Duration::from_secs(2),
            turn: 0,
            incoming_path,
            token,
            peer: None,
            leaf: None,
            channels: Vec::new(),
            next_channel: 0,
            closed_bytes: 0,
            meter: RateMeter::default(),
            rate_bytes_per_s: 0,
            link_wait: Duration::ZERO,
            gate_open: false,
            note: None,
            direct: Direct::default(),
        }
    }

    /// Bytes of the stream that crossed this host, those of `channels` among them.
    #[must_use]
    pub fn stream_bytes(&self, role: Role, channels: &HashMap<usize, Channel>) -> u64 {
        let open = self.channels.iter().filter_map(|id| channels.get(id));
        let relayed: u64 = open.map(|channel| channel.bytes).sum();
        let stream = self.direct.stream.as_ref();
        self.closed_bytes + relayed + stream.map_or(0, |stream| stream.bytes(role))
    }
}

impl HalfIo {
    /// Source: whether bytes wait that the path does not take, though the pace would let them go.
    #[must_use]
    pub fn waits_for_path(&self, channels: &HashMap<usize, Channel>) -> bool {
        let mut open = self.channels.iter().filter_map(|id| channels.get(id));
        let stream = self.direct.stream.as_ref();
        open.any(Channel::waits_for_path) || stream.is_some_and(Stream::waits_for_path)
    }

    /// Source: bytes of its disks that have gone to the destination.
    #[must_use]
    pub fn disk_bytes(&self, channels: &HashMap<usize, Channel>) -> u64 {
        let open = self.channels.iter().filter_map(|id| channels.get(id));
        open.filter(|channel| channel.is_disk)
            .map(|channel| channel.bytes)
            .sum()
    }

    /// Source: bytes that its QEMU has written and that are still on their way.
    #[must_use]
    pub fn in_flight_bytes(&self, channels: &HashMap<usize, Channel>) -> u64 {
        let open = self.channels.iter().filter_map(|id| channels.get(id));
        // A mirror counts by itself what is not acknowledged.
        let streams = open.filter(|channel| !channel.is_disk);
        let relayed: u64 = streams.map(Channel::in_flight_bytes).sum();
        let stream = self.direct.stream.as_ref();
        relayed + stream.map_or(0, Stream::in_flight_bytes)
    }
}

impl Daemon {
    pub(super) fn connect_monitor(&mut self, now: Now, key: HalfKey) {
        let token = self.token(Slot::Monitor(key));
        let Some(entry) = self.runs.get_mut(&key.0) else {
            return;
        };
        let (io, half) = (&mut entry.io[key.1], &mut entry.run.halves[key.1]);
        let connected = Socket::connect_unix(&io.qmp_path).and_then(|mut socket| {
            socket.register(self.poll.registry(), token)?;
            Ok(socket)
        });
        match connected {
            Ok(socket) => {
                let pid = socket.peer_pid();
                io.qmp = Some((token, socket));
                match half {
                    VmHalf::Source(source) => source.qmp_connected(now),
                    VmHalf::Destination(destination) => destination.qmp_connected(now),
                }
                if io.process.is_none() {
                    if let Some(process) = pid.and_then(|pid| Process::watch(pid).ok()) {
                        self.watch_process(key, process);
                    }
                }
            }
            Err(error) => {
                self.slots.remove(&token);
                let alive = io
                    .process
                    .as_mut()
                    .is_some_and(|(_, process)| !process.has_ended());
                let path = io.qmp_path.display();
                let text = format!("the monitor {path} cannot be connected: {error}");
                half.qmp_closed(now, &text, alive);
            }
        }
    }

    pub(super) fn watch_process(&mut self, key: HalfKey, process: Process) {
        let token = self.token(Slot::Process(key));
        let fd = process.fd.as_raw_fd();
        let registered =
            self.poll
                .registry()
                .register(&mut SourceFd(&fd), token, Interest::READABLE);
        if let Err(error) = registered {
            log(&format!(
                "process {} cannot be watched: {error}",
                process.pid
            ));
        }
        if let Some(entry) = self.runs.get_mut(&key.0) {
            entry.io[key.1].process = Some((token, process));
        }
    }

    pub(super) fn spawn(&mut self, now: Now, key: HalfKey) {
        let Some(entry) = self.runs.get(&key.0) else {
            return;
        };
        let arguments = self.incoming_arguments(&entry.run.halves[key.1].half().name);
        let Some(entry) = self.runs.get_mut(&key.0) else {
            return;
        };
        let (io, half) = (&mut entry.io[key.1], &mut entry.run.halves[key.1]);
        let name = half.half().name.clone();
        let Some(destination) = half.destination_mut() else {
            return;
        };
        if Socket::connect_unix(&io.qmp_path).is_ok() {
            destination.spawn_failed(&format!(
                "a QEMU already listens at {}: a VM `{name}` is on this host",
                io.qmp_path.display()
            ));
            return;
        }
        // What a killed QEMU left; its absence is as good.
        let _ = std::fs::remove_file(&io.qmp_path);
        let log = self.config.runtime_dir.join(format!("{name}.log"));
        let images = match images_of(self.config.vm(&name), destination.disks()) {
            Ok(images) => images,
            Err(error) => {
                destination.spawn_failed(&error);
                return;
            }
        };
        let job = Job::Spawn {
            images,
            run: key.0,
            half: key.1,
            arguments,
            log,
        };
        if let Err(error) = self.storage.submit(job) {
            destination.spawn_failed(&error);
        }
        let _ = now;
    }

    /// How the incoming QEMU of this VM is started.
    pub(super) fn incoming_arguments(&self, name: &str) -> Vec<String> {
        let qmp = self.config.qmp_path(name).display().to_string();
        let template = self.config.vm(name).map_or(&[][..], |vm| &vm.incoming);
        template
            .iter()
            .map(|argument| argument.replace("{qmp}", &qmp).replace("{name}", name))
            .collect()
    }

    pub(super) fn spawned(
        &mut self,
        now: Now,
        key: HalfKey,
        child: Result<Child, String>,
        created: Vec<PathBuf>,
    ) {
        let process = child.and_then(|child| {
            Process::of_child(child).map_err(|error| format!("QEMU cannot be watched: {error}"))
        });
        let Some(entry) = self.runs.get_mut(&key.0) else {
            if let Ok(process) = process {
                process.kill();
            }
            self.remove_images(created);
            return;
        };
        entry.io[key.1].created = created;
        let qmp_path = entry.io[key.1].qmp_path.clone();
        let Some(destination) = entry.run.halves[key.1].destination_mut() else {
            return;
        };
        match process {
            Ok(process) if destination.half.phase().is_final() => {
                // The run was given up while it was being started.
                process.kill();
                self.children.push((process, qmp_path));
            }
            Ok(process) => {
                destination.spawned(now);
                self.watch_process(key, process);
                self.save_note(key.0);
            }
            Err(error) => destination.spawn_failed(&error),
        }
    }

    pub(super) fn kill(&mut self, now: Now, key: HalfKey) {
        let Some(entry) = self.runs.get_mut(&key.0) else {
            return;
        };
        match &entry.io[key.1].process {
            Some((_, process)) => process.kill(),
            None => entry.run.halves[key.1].process_gone(now),
        }
    }

    pub(super) fn check_process(&mut self, now: Now, key: HalfKey) {
        let Some(entry) = self.runs.get_mut(&key.0) else {
            return;
        };
        let io = &mut entry.io[key.1];
        let Some((token, mut process)) = io.process.take() else {
            return;
        };
        if !process.has_ended() {
            io.process = Some((token, process));
            return;
        }
        let fd = process.fd.as_raw_fd();
        let _ = self.poll.registry().deregister(&mut SourceFd(&fd));
        self.slots.remove(&token);
        // QEMU's last words (a completed migration, say) count before its end.
        self.serve_monitor(now, key);
        self.close_monitor(key);
        if let Some(entry) = self.runs.get_mut(&key.0) {
            let io = &entry.io[key.1];
            let _ = std::fs::remove_file(&io.qmp_path);
            let _ = std::fs::remove_file(&io.incoming_path);
            let _ = std::fs::remove_file(&io.nbd_path);
            entry.run.halves[key.1].process_gone(now);
        }
    }

    /// Takes note of QEMUs that have ended after their run.
    pub(super) fn reap(&mut self) {
        self.children.retain_mut(|(process, qmp_path)| {
            let ended = process.has_ended();
            if ended {
                remove_if_unserved(qmp_path);
            }
            !ended
        });
    }

    fn close_monitor(&mut self, key: HalfKey) {
        let Some(entry) = self.runs.get_mut(&key.0) else {
            return;
        };
        if let Some((token, mut socket)) = entry.io[key.1].qmp.take() {
            socket.deregister(self.poll.registry());
            self.slots.remove(&token);
        }
    }

    pub(super) fn serve_monitor(&mut self, now: Now, key: HalfKey) {
        let Some(entry) = self.runs.get_mut(&key.0) else {
            return;
        };
        let Some((_, socket)) = &mut entry.io[key.1].qmp else {
            return;
        };
        let half = &mut entry.run.halves[key.1];
        let mut buffer = [0; 16384];
        let closed = loop {
            match read_some(socket, &mut buffer) {
                Moved::Bytes(n) => match half {
                    VmHalf::Source(source) => {
                        if let Some(qmp) = &mut source.qmp {
                            qmp.receive(&buffer[..n]);
                        }
                    }
                    VmHalf::Destination(destination) => {
                        if let Some(qmp) = &mut destination.qmp {
                            qmp.receive(&buffer[..n]);
                        }
                    }
                },
                Moved::Blocked => break None,
                Moved::End => break Some("QEMU closed its monitor".to_owned()),
                Moved::Broken(error) => break Some(error.to_string()),
            }
        };
        if let Some(source) = half.source_mut() {
            source.in_flight_bytes = entry.io[key.1].in_flight_bytes(&self.channels);
        }
        let spoke = loop {
            let message = match half {
                VmHalf::Source(source) => match source.qmp.as_mut().map(|qmp| qmp.poll(now.mono)) {
                    Some(Ok(Some(message))) => {
                        source.handle(now, message);
                        continue;
                    }
                    other => other.map(|result| result.map(|_| ())),
                },
                VmHalf::Destination(destination) => {
                    match destination.qmp.as_mut().map(|qmp| qmp.poll(now.mono)) {
                        Some(Ok(Some(message))) => {
                            destination.handle(now, message);
                            continue;
                        }
                        other => other.map(|result| result.map(|_| ())),
                    }
                }
            };
            break message.and_then(Result::err).map(|error| error.to_string());
        };
        if let Some(error) = closed.or(spoke) {
            let io = &mut entry.io[key.1];
            let alive = io
                .process
                .as_mut()
                .is_some_and(|(_, process)| !process.has_ended());
            self.close_monitor(key);
            if let Some(entry) = self.runs.get_mut(&key.0) {
                entry.run.halves[key.1].qmp_closed(now, &error, alive);
            }
        }
    }

    /// Writes what the machines of a run have for their monitors.
    pub(super) fn flush_monitors(&mut self, _now: Now, run: Uuid) {
        let Some(entry) = self.runs.get_mut(&run) else {
            return;
        };
        for (half, io) in entry.run.halves.iter_mut().zip(&mut entry.io) {
            let Some((_, socket)) = &mut io.qmp else {
                continue;
            };
            let stream = io.direct.stream.as_ref().map(|s| s.socket.as_fd());
            match half {
                VmHalf::Source(source) => {
                    if let Some(qmp) = &mut source.qmp {
                        flush_monitor(socket, qmp, stream);
                    }
                }
                VmHalf::Destination(destination) => {
                    if let Some(qmp) = &mut destination.qmp {
                        flush_monitor(socket, qmp, stream);
                    }
                }
            }
        }
    }

    /// Closes what a run that is over still holds; its destinations' processes live on.
    pub(super) fn release_halves(&mut self, run: Uuid) {
        let Some(entry) = self.runs.get(&run) else {
            return;
        };
        for half in 0..entry.io.len() {
            let key = (run, half);
            self.cut_stream(key);
            self.close_monitor(key);
            let Some(entry) = self.runs.get_mut(&run) else {
                return;
            };
            let io = &mut entry.io[half];
            if let Some((token, process)) = io.process.take() {
                let fd = process.fd.as_raw_fd();
                let _ = self.poll.registry().deregister(&mut SourceFd(&fd));
                self.slots.remove(&token);
                let path = io.qmp_path.clone();
                self.children.push((process, path));
            }
            if let Some(entry) = self.runs.get_mut(&run) {
                let io = &entry.io[half];
                let _ = std::fs::remove_file(&io.incoming_path);
                let _ = std::fs::remove_file(&io.nbd_path);
                remove_if_unserved(&io.qmp_path);
                if let Some(leaf) = entry.io[half].leaf.take() {
                    self.leaves.remove(&leaf);
                    self.pacing.remove_leaf(leaf);
                }
            }
            self.drop_images(key);
            self.hook_after(key);
        }
        if let Some(entry) = self.runs.get(&run) {
            self.pacing.remove_group(entry.group);
        }
    }

    pub(super) fn incoming_path(&self, vm: &str) -> PathBuf {
        self.config.runtime_dir.join(format!("{vm}.in"))
    }
}

/// Writes what a client has for its monitor, with the descriptor where one belongs.
pub(super) fn flush_monitor<T>(
    socket: &mut Socket,
    qmp: &mut QmpClient<T>,
    descriptor: Option<BorrowedFd>,
) {
    while !qmp.output().is_empty() {
        // Without the descriptor, closed meanwhile, QEMU refuses the command.
        let moved = match descriptor.filter(|_| qmp.carries_descriptor()) {
            Some(descriptor) => send_with_descriptor(socket, qmp.output(), &descriptor),
            None => write_some(socket, qmp.output()),
        };
        match moved {
            Moved::Bytes(n) => qmp.written(n),
            // A broken monitor shows itself when it is read.
            Moved::Blocked | Moved::End | Moved::Broken(_) => return,
        }
    }
}

/// Where a source's QEMU connects with its stream.
pub(super) fn outgoing_path(runtime_dir: &std::path::Path, vm: &str) -> PathBuf {
    runtime_dir.join(format!("{vm}.out"))
}

/// Removes the socket of a QEMU that is gone.
fn remove_if_unserved(path: &std::path::Path) {
    let refused = |error: io::Error| error.kind() == io::ErrorKind::ConnectionRefused;
    if Socket::connect_unix(path).is_err_and(refused) {
        let _ = std::fs::remove_file(path);
    }
}
