//! The thread that reads the sockets and stamps what comes.

use std::collections::BTreeMap;
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use crossbeam::channel::Receiver;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::{Listening, Shared, Tick};
use crate::clock::Micros;
use crate::sys;

#[derive(Debug)]
struct Connection {
    vm: String,
    source: u16,
    stream: UnixStream,
}

/// The collector's thread.
pub(super) struct Worker {
    shared: Arc<Shared>,
    orders: Receiver<Listening>,
    woken: UnixStream,
    listeners: Vec<Listening>,
    connections: Vec<Connection>,
    /// Per VM, the source that ticked last.
    last: BTreeMap<String, u16>,
}

impl Worker {
    pub(super) fn new(shared: Arc<Shared>, orders: Receiver<Listening>, woken: UnixStream) -> Self {
        Self {
            shared,
            orders,
            woken,
            listeners: Vec::new(),
            connections: Vec::new(),
            last: BTreeMap::new(),
        }
    }

    /// Collects until the collector is dropped.
    pub(super) fn run(mut self) {
        // Without the privilege the stamps are late by what the scheduler takes.
        let _ = sys::make_thread_realtime();
        loop {
            let ready = self.wait();
            if ready[0] {
                let mut sink = [0; 64];
                while matches!(self.woken.read(&mut sink), Ok(1..)) {}
                loop {
                    match self.orders.try_recv() {
                        Ok(listening) => self.listeners.push(listening),
                        Err(error) if error.is_disconnected() => return,
                        Err(_) => break,
                    }
                }
            }
            let of_connections = ready.len() - self.connections.len();
            let vms: Vec<String> = self
                .connections
                .iter()
                .zip(&ready[of_connections..])
                .filter(|(_, ready)| **ready)
                .map(|(connection, _)| connection.vm.clone())
                .collect();
            for vm in &vms {
                self.read_vm(vm);
            }
            self.accept();
        }
    }

    /// Waits until something is ready: the wake-up pipe, the listeners, the connections.
    fn wait(&self) -> Vec<bool> {
        fn watch(fd: BorrowedFd<'_>) -> PollFd<'_> {
            PollFd::new(fd, PollFlags::POLLIN)
        }
        let mut fds = vec![watch(self.woken.as_fd())];
        fds.extend(self.listeners.iter().map(|l| watch(l.listener.as_fd())));
        fds.extend(self.connections.iter().map(|c| watch(c.stream.as_fd())));
        let _ = poll(&mut fds, PollTimeout::NONE);
        fds.iter().map(|fd| fd.any().unwrap_or(false)).collect()
    }

    fn accept(&mut self) {
        for listening in &self.listeners {
            while let Ok((stream, _)) = listening.listener.accept() {
                if stream.set_nonblocking(true).is_err() {
                    continue;
                }
                let mut records = self.shared.lock();
                let record = records.entry(listening.vm.clone()).or_default();
                let Ok(source) = u16::try_from(record.sources.len()) else {
                    continue;
                };
                record.sources.push(listening.host.clone());
                self.connections.push(Connection {
                    vm: listening.vm.clone(),
                    source,
                    stream,
                });
            }
        }
    }

    /// Reads all connections of `vm`: first those that did not tick last, then the one that did;
    /// records them the other way round.
    fn read_vm(&mut self, vm: &str) {
        let last = self.last.get(vm).copied();
        let mut order: Vec<usize> = (0..self.connections.len())
            .filter(|index| self.connections[*index].vm == vm)
            .collect();
        order.sort_by_key(|index| Some(self.connections[*index].source) == last);
        let mut batches = Vec::new();
        let mut ended = Vec::new();
        for index in order {
            let connection = &mut self.connections[index];
            let (bytes, open) = drain(&mut connection.stream);
            batches.push((connection.source, bytes));
            if !open {
                ended.push(index);
            }
        }
        let at = Micros::now();
        let mut records = self.shared.lock();
        let record = records.entry(vm.to_owned()).or_default();
        for (source, bytes) in batches.into_iter().rev() {
            if !bytes.is_empty() {
                self.last.insert(vm.to_owned(), source);
            }
            let ticks = bytes.into_iter().map(|byte| Tick { at, source, byte });
            record.ticks.extend(ticks);
        }
        drop(records);
        self.shared.ticked.notify_all();
        ended.sort_unstable();
        for index in ended.into_iter().rev() {
            self.connections.swap_remove(index);
        }
    }
}

/// Everything that can be read now, and whether more may come.
fn drain(stream: &mut UnixStream) -> (Vec<u8>, bool) {
    let mut bytes = Vec::new();
    let mut chunk = [0; 4096];
    loop {
        match stream.read(&mut chunk) {
            Ok(0) => return (bytes, false),
            Ok(count) => bytes.extend_from_slice(&chunk[..count]),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return (bytes, true),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => return (bytes, false),
        }
    }
}
