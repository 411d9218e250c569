//! How a guest writes to its disks, by QEMU's dirty bitmaps, while they are mirrored.
//!
//! Each disk has two of ours: one is cleared every second, which gives the dirty rate (blocks that are
//! written again within it count once, as they are sent once), the other never, which gives the dirty
//! set. The mirror's own, without a name, says what a mirror that is held back has not sent.

use std::time::{Duration, Instant};

use serde_json::Value;

use super::bitmap;
use super::source::{Mirrors, Tag};

/// How often they are read.
pub(super) const COUNT: Duration = Duration::from_secs(1);
const RATE: &str = "muster-rate";
const SET: &str = "muster-set";

/// What is known of one disk.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Written {
    /// Distinct blocks written per second.
    pub rate_bytes_per_s: u64,
    /// Distinct blocks written since the copy began.
    pub set_bytes: u64,
    /// What a mirror that is held back has to send.
    pub unsent_bytes: Option<u64>,
    /// What its image holds, without holes; not known of one over a backing file.
    pub allocated_bytes: Option<u64>,
    since: Option<Instant>,
}

impl Mirrors {
    /// Adds the bitmaps.
    pub(super) fn track(&mut self) {
        for (index, node) in self.written_nodes() {
            for name in [RATE, SET] {
                let arguments = bitmap::to_add(&node, name);
                self.ask(Tag::Track(index), "block-dirty-bitmap-add", arguments);
            }
        }
    }

    /// Removes them, where there are any.
    pub(super) fn untrack(&mut self) {
        for (index, node) in self.written_nodes() {
            for name in [RATE, SET] {
                let arguments = bitmap::named(&node, name);
                self.ask(Tag::Untrack(index), "block-dirty-bitmap-remove", arguments);
            }
        }
    }

    /// QEMU has told what the images and the bitmaps hold.
    pub(super) fn counted(&mut self, now: Instant, nodes: &Value) {
        self.read_images(nodes);
        for (index, name) in self.written_nodes() {
            let Some(node) = bitmap::find_node(nodes, &name) else {
                continue;
            };
            let held_back = self.are_held_back();
            let disk = self.disk(index);
            let rewritten = bitmap::count(node, RATE);
            if let (Some(count), Some(since)) = (rewritten, disk.since) {
                let ms = u64::try_from((now - since).as_millis()).unwrap_or(u64::MAX);
                disk.rate_bytes_per_s = count.saturating_mul(1000) / ms.max(1);
            }
            disk.set_bytes = bitmap::count(node, SET).unwrap_or(disk.set_bytes);
            disk.unsent_bytes = bitmap::count(node, "").filter(|_| held_back);
            disk.since = Some(now);
            if rewritten.is_some() {
                let arguments = bitmap::named(&name, RATE);
                self.ask(Tag::Reset(index), "block-dirty-bitmap-clear", arguments);
            }
        }
    }
}
