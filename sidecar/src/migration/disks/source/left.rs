//! What of the disks is left to send, and what reports say of that.

use serde_json::Value;

use super::super::bitmap::find_node;
use super::{Mirror, Mirrors};
use crate::protocol::types::{Chain, DiskReport};

/// Of what is left to copy one part in so many at least is to be sent: what is known of holes is not
/// exact.
const MOST_HOLES: u64 = 16;

impl Mirrors {
    /// What is still to be sent: what is not copied, less the holes in it as far as they are known.
    /// Where they lie QEMU does not say, so this is what the images hold, and what was written again,
    /// less what has gone.
    #[must_use]
    pub fn left_bytes(&self) -> u64 {
        let left: u64 = self.disks.iter().map(Mirror::left_bytes).sum();
        let mut to_send: u64 = 0;
        for disk in &self.disks {
            let Some(allocated) = disk.written.allocated_bytes else {
                return left;
            };
            let again = disk.len.saturating_sub(disk.size_bytes);
            to_send = to_send.saturating_add(allocated.min(disk.size_bytes) + again);
        }
        if self.disks.iter().all(|disk| disk.ready) {
            return left;
        }
        let to_send = to_send.saturating_sub(self.sent_bytes);
        to_send.clamp(left / MOST_HOLES, left)
    }

    /// What `report`s say of them.
    #[must_use]
    pub fn reports(&self) -> Vec<DiskReport> {
        let copied: u64 = self.disks.iter().map(Mirror::left_bytes).sum();
        // Holes are known of all together.
        let part = |left: u64| {
            let part = u128::from(left) * u128::from(self.left_bytes()) / u128::from(copied.max(1));
            u64::try_from(part).unwrap_or(left)
        };
        let report = |disk: &Mirror| DiskReport {
            node: disk.node.clone(),
            size_bytes: disk.size_bytes,
            copied_bytes: disk.offset,
            remaining_bytes: part(disk.left_bytes()),
            ready: disk.ready,
            dirty_rate_bytes_per_s: disk.written.rate_bytes_per_s,
            dirty_set_bytes: disk.written.set_bytes,
        };
        self.disks.iter().map(report).collect()
    }

    /// How much of the images is no hole.
    pub(in super::super) fn read_images(&mut self, nodes: &Value) {
        for disk in &mut self.disks {
            let Some(node) = find_node(nodes, &disk.node) else {
                continue;
            };
            let is_layered = node["backing_file_depth"].as_u64() != Some(0);
            let is_known = disk.chain == Chain::Keep || !is_layered;
            let allocated = node["image"]["actual-size"].as_u64();
            disk.written.allocated_bytes = allocated.filter(|_| is_known);
        }
    }
}

impl Mirror {
    /// What is still to be copied: as its job says, or as the bitmaps do where it does nothing.
    fn left_bytes(&self) -> u64 {
        let left = self.len.saturating_sub(self.offset);
        left.max(self.written.unsent_bytes.unwrap_or(0))
    }
}
