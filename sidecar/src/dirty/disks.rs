//! How the guest writes to its disks meanwhile, counted in QEMU's dirty bitmaps.
//!
//! Each disk that it can write has two of ours: one is cleared at each interval, which gives the dirty rate
//! (blocks that are written again within it count once, as a mirror sends them once), the other never,
//! which gives the dirty set. They are removed in the end. Those that a sidecar has left that was killed
//! are removed when it is started again, or measures again.

use std::time::Instant;

use dirtylog::Pages;
use dirtylog::rate::DirtyRate;
use serde_json::{Value, json};

use super::{Measurement, RATES, Tag, whole};
use crate::migration::Now;
use crate::migration::disks::bitmap;
use crate::protocol::dirty::{DirtyDisk, DirtyEnd, DirtyRound};

const RATE: &str = "muster-measured-rate";
const SET: &str = "muster-measured-set";
/// No guest has more.
const MAX_DISKS: usize = 64;

#[derive(Debug, Default)]
pub(super) struct Disks {
    disks: Vec<Disk>,
    /// When they were counted last.
    since: Option<Instant>,
    /// What waits for the counts.
    round: Option<DirtyRound>,
    /// Bitmaps that are still to be removed.
    to_remove: usize,
}

#[derive(Debug)]
struct Disk {
    node: String,
    /// In bytes.
    rate: DirtyRate,
    set_bytes: u64,
}

impl Disks {
    /// Whether nothing of the measurement is left in them.
    pub(super) fn are_left(&self) -> bool {
        self.to_remove == 0
    }
}

/// The block nodes that a guest can write, as `query-block` lists them.
fn written_nodes(value: &Value) -> Vec<String> {
    let devices = value.as_array().into_iter().flatten();
    let node = |device: &Value| {
        let inserted = &device["inserted"];
        let node = inserted["node-name"].as_str()?;
        let is_written = inserted["ro"].as_bool() == Some(false) && !node.starts_with('#');
        is_written.then(|| node.to_owned())
    };
    devices.filter_map(node).take(MAX_DISKS).collect()
}

impl Measurement {
    /// QEMU has said what disks there are.
    pub(super) fn track_disks(&mut self, now: Now, value: &Value) {
        if self.is_ending() {
            return;
        }
        for node in written_nodes(value) {
            if !self.tidies {
                self.track_disk(now, &node);
            }
            self.disks.disks.push(Disk {
                node,
                rate: DirtyRate::new(RATES),
                set_bytes: 0,
            });
        }
        if self.tidies {
            self.end(now, DirtyEnd::Stopped, None);
        }
        self.disks.since = Some(now.mono);
    }

    fn track_disk(&mut self, now: Now, node: &str) {
        for name in [RATE, SET] {
            let stale = bitmap::named(node, name);
            self.send(now, Tag::RemoveStale, "block-dirty-bitmap-remove", stale);
            let arguments = bitmap::to_add(node, name);
            self.send(now, Tag::Bitmap, "block-dirty-bitmap-add", arguments);
        }
    }

    /// Asks what was written in an interval, which waits for that; an interval that need not, or waited
    /// until now.
    pub(super) fn count_disks(&mut self, now: Now, round: DirtyRound) -> Option<DirtyRound> {
        if self.disks.disks.is_empty() || self.is_ending() {
            return Some(round);
        }
        let before = self.disks.round.replace(round);
        if before.is_none() {
            let flat = json!({ "flat": true });
            self.send(now, Tag::Count, "query-named-block-nodes", flat);
        }
        before
    }

    /// QEMU has told what the bitmaps hold, or nothing.
    pub(super) fn disks_counted(&mut self, now: Now, nodes: &Value) {
        let Some(mut round) = self.disks.round.take() else {
            return;
        };
        let since = self.disks.since.replace(now.mono).unwrap_or(now.mono);
        let mut counted = Vec::new();
        for disk in &mut self.disks.disks {
            let node = bitmap::find_node(nodes, &disk.node);
            let count = |name: &str| bitmap::count(node?, name);
            if let (Some(dirtied), Some(set)) = (count(RATE), count(SET)) {
                disk.rate.add(Pages(dirtied), now.mono - since);
                disk.set_bytes = set;
                counted.push(disk.node.clone());
            }
        }
        for node in counted {
            let arguments = bitmap::named(&node, RATE);
            self.send(now, Tag::Bitmap, "block-dirty-bitmap-clear", arguments);
        }
        round.disks = self.disks.disks.iter().map(Disk::report).collect();
        self.tell_whole(round);
    }

    /// Removes the bitmaps.
    pub(super) fn leave_disks(&mut self, now: Now) {
        if let Some(round) = self.disks.round.take() {
            self.tell_whole(round);
        }
        for disk in std::mem::take(&mut self.disks.disks) {
            for name in [RATE, SET] {
                let arguments = bitmap::named(&disk.node, name);
                self.send(now, Tag::Remove, "block-dirty-bitmap-remove", arguments);
                self.disks.to_remove += 1;
            }
        }
    }

    /// A bitmap is gone.
    pub(super) fn disk_left(&mut self) {
        self.disks.to_remove = self.disks.to_remove.saturating_sub(1);
        if self.disks.are_left() && !self.exported && self.is_ending() {
            self.finish();
        }
    }
}

impl Disk {
    fn report(&self) -> DirtyDisk {
        let rate = |rate: Option<dirtylog::rate::PagesPerSecond>| {
            rate.map_or(0, |rate| whole(rate.bytes_per_second(1)))
        };
        DirtyDisk {
            node: self.node.clone(),
            dirty_rate_bytes_per_s: rate(self.rate.latest()),
            mean_dirty_rate_bytes_per_s: rate(self.rate.mean()),
            max_dirty_rate_bytes_per_s: rate(self.rate.max()),
            dirty_set_bytes: self.set_bytes,
        }
    }
}
