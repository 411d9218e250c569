//! How a guest writes to its disks, by QEMU's dirty bitmaps, while they are mirrored.
//!
//! Each disk has two of ours: one is cleared every second, which gives the dirty rate (blocks that are
//! written again within it count once, as they are sent once), the other never, which gives the dirty
//! set. The mirror's own, without a name, says what a mirror that is held back has not sent.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::source::{GRANULARITY, Mirrors, Tag};

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
                let arguments = json!({
                    "node": node, "name": name, "granularity": GRANULARITY, "persistent": false,
                });
                self.ask(Tag::Track(index), "block-dirty-bitmap-add", arguments);
            }
        }
    }

    /// Removes them, where there are any.
    pub(super) fn untrack(&mut self) {
        for (index, node) in self.written_nodes() {
            for name in [RATE, SET] {
                let arguments = json!({ "node": node, "name": name });
                self.ask(Tag::Untrack(index), "block-dirty-bitmap-remove", arguments);
            }
        }
    }

    /// QEMU has told what the images and the bitmaps hold.
    pub(super) fn counted(&mut self, now: Instant, nodes: &Value) {
        self.read_images(nodes);
        for (index, name) in self.written_nodes() {
            let mut nodes = nodes.as_array().into_iter().flatten();
            let Some(node) = nodes.find(|node| node["node-name"].as_str() == Some(&name)) else {
                continue;
            };
            let mut bitmaps = node["dirty-bitmaps"].as_array().into_iter().flatten();
            let held_back = self.are_held_back();
            let disk = self.disk(index);
            let mut read = Written {
                since: Some(now),
                ..*disk
            };
            read.unsent_bytes = None;
            let mut reset = false;
            for bitmap in bitmaps.by_ref() {
                let count = bitmap["count"].as_u64().unwrap_or(0);
                match bitmap["name"].as_str() {
                    Some(RATE) => {
                        if let Some(since) = disk.since {
                            let ms = u64::try_from((now - since).as_millis()).unwrap_or(u64::MAX);
                            read.rate_bytes_per_s = count.saturating_mul(1000) / ms.max(1);
                        }
                        reset = true;
                    }
                    Some(SET) => read.set_bytes = count,
                    None | Some("") if held_back => read.unsent_bytes = Some(count),
                    _ => {}
                }
            }
            *disk = read;
            if reset {
                let arguments = json!({ "node": name, "name": RATE });
                self.ask(Tag::Reset(index), "block-dirty-bitmap-clear", arguments);
            }
        }
    }
}
