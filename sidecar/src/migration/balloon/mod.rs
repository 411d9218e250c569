//! Ballooning (VMbuddies 4.2): what a guest does not use is not copied.
//!
//! Before its memory is copied the source's balloon takes what the guest has available beyond a
//! reserve; QEMU drops those pages, and they cross as zeros. When the VM runs for good, here or
//! there, its balloon gets the size again that it had ([`give_back`]): never before `cont`, so that
//! nothing of it counts as downtime.
//!
//! What the size was stands in the source's note before it is changed, and goes to the destination
//! with the stream's hello, into its note: either side gives it back alone, whoever has died.
//!
//! Without I/O, as the disks' mirrors are: answers and the time in, commands out.

pub mod give_back;
pub mod inflate;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::disks::Ask;

/// Which command an answer belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tag {
    /// `qom-get free-page-hint`.
    Hint,
    /// `qom-get guest-stats-polling-interval`, as found.
    Polling,
    /// `query-balloon`, as found.
    Found,
    /// `qom-get guest-stats`, as found.
    Earlier,
    /// `qom-set guest-stats-polling-interval`.
    Poll,
    /// `qom-get guest-stats`.
    Stats,
    /// `balloon`, to take.
    Take,
    /// `balloon`, to take no more or less.
    Ease,
    /// `query-balloon`, while it changes.
    Size,
    /// `balloon`, as it was.
    Back,
}

/// What is put back, and must outlive this process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Kept {
    /// What the balloon left to the guest before the move, in bytes.
    pub before_bytes: u64,
    /// Source: the device (its path in QEMU's object model), and how often it asked its guest for
    /// statistics, in seconds (0: never).
    pub polling: Option<(String, u64)>,
}

/// The balloon among the devices that `qom-list` names under `parent`: its path.
#[must_use]
pub fn find_device(parent: &str, devices: &Value) -> Option<String> {
    let mut devices = devices.as_array().into_iter().flatten();
    let found = devices.find(|device| {
        let kind = device["type"].as_str().unwrap_or_default();
        kind.starts_with("child<virtio-balloon")
    })?;
    Some(format!("{parent}/{}", found["name"].as_str()?))
}

fn balloon(tag: Tag, bytes: u64) -> Ask<Tag> {
    Ask {
        tag,
        command: "balloon",
        arguments: json!({ "value": bytes }),
    }
}

fn get(tag: Tag, device: &str, property: &str) -> Ask<Tag> {
    Ask {
        tag,
        command: "qom-get",
        arguments: json!({ "path": device, "property": property }),
    }
}

fn query(tag: Tag) -> Ask<Tag> {
    Ask {
        tag,
        command: "query-balloon",
        arguments: Value::Null,
    }
}

const POLLING: &str = "guest-stats-polling-interval";

fn set_polling(device: &str, seconds: u64) -> Ask<Tag> {
    Ask {
        tag: Tag::Poll,
        command: "qom-set",
        arguments: json!({ "path": device, "property": POLLING, "value": seconds }),
    }
}
