//! Connections of local disks: who they belong to, and how they end.

use std::path::PathBuf;

use uuid::Uuid;

use super::channel::HalfKey;
use super::storage::Job;
use super::streams::listen;
use super::write_back::WriteBack;
use super::{Daemon, Slot, log};
use crate::migration::Now;
use crate::protocol::types::{Phase, Role};
use crate::run::VmHalf;

impl Daemon {
    /// Source: QEMU's NBD clients connect here.
    pub(super) fn listen_for_disks(&mut self, now: Now, key: HalfKey) {
        let token = self.token(Slot::DiskListener(key));
        let Some(entry) = self.runs.get_mut(&key.0) else {
            return;
        };
        let half = &mut entry.run.halves[key.1];
        let nodes = half.source_mut().map(|source| source.disk_nodes());
        let known = self.config.vm(&half.half().name).map(|vm| &vm.disks);
        let moving = known.into_iter().flatten().filter(|disk| {
            let mut nodes = nodes.iter().flatten();
            nodes.any(|node| *node == disk.node)
        });
        let images = moving.map(|disk| disk.image.clone()).collect();
        entry.io[key.1].write_back = WriteBack::start(images);
        let name = format!("{}.mirror", half.half().name);
        let path = self.config.runtime_dir.join(name);
        match listen(self.poll.registry(), token, &path) {
            Ok(listener) => {
                entry.io[key.1].disk_listener = Some((token, listener, path.clone()));
                if let Some(source) = half.source_mut() {
                    source.disks_listening(now, &path.display().to_string());
                }
            }
            Err(error) => half.fail(&error),
        }
    }

    /// Source: what of a disk is still to be sent, as fresh as the report that says it.
    pub(super) fn count_disks(&mut self, now: Now, run: Uuid) {
        let entry = self.runs.get_mut(&run);
        let Some(entry) = entry.filter(|entry| entry.run.report_is_due(now)) else {
            return;
        };
        for (half, io) in entry.run.halves.iter_mut().zip(&entry.io) {
            if let Some(source) = half.source_mut() {
                source.disks_sent(io.disk_bytes(&self.channels));
            }
        }
    }

    /// Destination: disks may come.
    pub(super) fn write_back(&mut self, key: HalfKey) {
        let Some(entry) = self.runs.get_mut(&key.0) else {
            return;
        };
        let half = entry.run.halves[key.1].destination_mut();
        let images = half.map(|destination| destination.images());
        entry.io[key.1].write_back = images.and_then(WriteBack::start);
    }

    pub(super) fn close_disk_listener(&mut self, key: HalfKey) {
        let Some(entry) = self.runs.get_mut(&key.0) else {
            return;
        };
        if let Some((token, mut listener, path)) = entry.io[key.1].disk_listener.take() {
            let _ = self.poll.registry().deregister(&mut listener);
            self.slots.remove(&token);
            let _ = std::fs::remove_file(path);
        }
    }

    /// A disk's connection has ended in good order. At the destination its TCP end stays open until
    /// the NBD server has stopped: that is how the source learns of it.
    pub(super) fn disk_ended(&mut self, now: Now, id: usize) {
        let Some(channel) = self.channels.get_mut(&id) else {
            return;
        };
        let (key, role) = (channel.half, channel.role);
        if role == Role::Source {
            self.drop_channel(id);
        } else if let Some(mut qemu) = channel.linger() {
            qemu.socket.deregister(self.poll.registry());
            self.slots.remove(&qemu.token);
        }
        let Some((run, half)) = key else { return };
        match self.runs.get_mut(&run).map(|e| &mut e.run.halves[half]) {
            Some(VmHalf::Source(source)) => source.disk_sealed(now),
            Some(VmHalf::Destination(destination)) => destination.disk_finished(now),
            None => {}
        }
    }

    /// Destination: QEMU has closed the connection of a disk before the source did.
    pub(super) fn disk_dropped(&mut self, id: usize) {
        let half = self.channels.get(&id).and_then(|channel| channel.half);
        self.drop_channel(id);
        let Some(key) = half else { return };
        self.cut_stream(key);
        if let Some(entry) = self.runs.get_mut(&key.0) {
            entry.run.halves[key.1].fail(
                "the destination's QEMU closed the NBD connection of a disk before it was complete: \
                 its NBD server or export was removed by somebody else (leave its monitor to Muster \
                 while it waits), or see its log",
            );
        }
    }

    /// Destination: the NBD server has stopped.
    pub(super) fn seal_disks(&mut self, key: HalfKey) {
        let Some(entry) = self.runs.get_mut(&key.0) else {
            return;
        };
        entry.io[key.1].write_back = None;
        for id in entry.io[key.1].channels.clone() {
            if self.channels.get(&id).is_some_and(|c| c.is_lingering()) {
                self.drop_channel(id);
            }
        }
    }

    /// The channels of a half in the order in which they may use a grant: disks first every second
    /// time, so that neither they nor the memory starve.
    pub(super) fn in_turn(&mut self, key: HalfKey) -> Vec<usize> {
        let Some(entry) = self.runs.get_mut(&key.0) else {
            return Vec::new();
        };
        let io = &mut entry.io[key.1];
        io.turn = io.turn.wrapping_add(1);
        let disks_first = io.turn % 2 == 0;
        let mut channels = io.channels.clone();
        channels.sort_by_key(|id| {
            let is_disk = self.channels.get(id).is_some_and(|c| c.is_disk);
            is_disk != disks_first
        });
        channels
    }

    /// A run is over: images that were made for VMs that stayed where they were go.
    pub(super) fn drop_images(&mut self, key: HalfKey) {
        let Some(entry) = self.runs.get_mut(&key.0) else {
            return;
        };
        let stayed = entry.run.halves[key.1].half().phase() == Phase::RolledBack;
        let images = std::mem::take(&mut entry.io[key.1].created);
        if stayed {
            self.remove_images(images);
        }
    }

    pub(super) fn remove_images(&self, images: Vec<PathBuf>) {
        if images.is_empty() {
            return;
        }
        if let Err(error) = self.storage.submit(Job::RemoveImages(images)) {
            log(&format!("images of a run are left: {error}"));
        }
    }
}
