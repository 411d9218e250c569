//! Limits what a guest writes to a disk that would not be copied otherwise (COMMA 2.3.1, 3.5).
//!
//! The limits are QEMU's, of the device, in a throttle group of our name: so a sidecar that was restarted
//! finds limits that an earlier life has left. A device that has limits already keeps them, and is not
//! slowed further.

use serde_json::{Value, json};

use super::source::{Mirrors, Tag};

/// Of one disk.
#[derive(Debug, Clone, Default)]
pub(super) struct Brake {
    /// The device that may be limited, as QEMU calls it.
    device: Option<String>,
    is_set: bool,
}

fn group(node: &str) -> String {
    format!("muster-{node}")
}

impl Mirrors {
    /// `query-block`: finds the devices that have no limits.
    pub(super) fn read_devices(&mut self, value: &Value) {
        for (index, node) in self.written_nodes() {
            let mut devices = value.as_array().into_iter().flatten();
            let is_it = |found: &&Value| {
                let inserted = &found["inserted"];
                // While it is mirrored the mirror's filter is in the node's place.
                inserted["node-name"].as_str() == Some(&node)
                    || inserted["group"].as_str() == Some(&group(&node))
            };
            let Some(found) = devices.find(is_it) else {
                continue;
            };
            let inserted = &found["inserted"];
            let is_ours = inserted["group"].as_str() == Some(&group(&node));
            let of = |key: &str| inserted[key].as_u64().unwrap_or(0);
            let keys = ["bps", "bps_rd", "bps_wr", "iops", "iops_rd", "iops_wr"];
            let is_limited = keys.iter().any(|key| of(key) > 0);
            if let Some(device) = found["qdev"].as_str() {
                if is_ours || !is_limited {
                    let adopted = self.is_adopted();
                    let brake = self.brake(index);
                    brake.device = Some(device.to_owned());
                    brake.is_set |= is_ours && is_limited;
                    if adopted {
                        self.throttle(0);
                    }
                }
            }
        }
    }

    /// Limits writes to each disk to this rate; 0 takes limits off.
    pub fn throttle(&mut self, bytes_per_s: u64) {
        for (index, node) in self.written_nodes() {
            let brake = self.brake(index);
            if bytes_per_s == 0 && !brake.is_set {
                continue;
            }
            let Some(device) = brake.device.clone() else {
                continue;
            };
            brake.is_set = bytes_per_s > 0;
            let mut arguments = json!({
                "id": device, "bps": 0, "bps_rd": 0, "bps_wr": bytes_per_s,
                "iops": 0, "iops_rd": 0, "iops_wr": 0,
            });
            if bytes_per_s > 0 {
                arguments["group"] = json!(group(&node));
            }
            self.ask(Tag::Throttle(index), "block_set_io_throttle", arguments);
        }
    }
}
