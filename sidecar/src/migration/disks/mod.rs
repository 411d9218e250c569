//! Local disks that move with their VM: mirrored by NBD through the relay while the guest runs.
//!
//! ```text
//! source QEMU ── mirror job ── NBD client ═unix═► relay ═TCP═► relay ═unix═► NBD server ── destination QEMU
//! ```
//!
//! The order of the steps loses no write (docs/design.md has the others, which lose some):
//!
//! 1. Destination: NBD server on a unix socket, a writable export for each disk. Of a disk that is
//!    read-only for its guest a second, writable node of the same image is exported, and removed when
//!    the server has stopped; QEMU reads the image anew when the VM is about to run.
//! 2. Source: NBD node, mirror of the whole disk in steps of 4 KiB.
//! 3. Every mirror is ready: memory is copied, held and released as ever; guest writes follow.
//! 4. All are paused, the disks still the source's own: the mirrors end without pivoting, each must
//!    have copied everything; the NBD nodes go, and with them the connections.
//! 5. Destination: the NBD server stops, and only then do its ends of the connections close.
//! 6. Source: stop-and-copy.
//!
//! [`source::Mirrors`] and [`destination::Exports`] are without I/O: answers and events in, commands
//! out. The halves of the VM own them and send what they ask for.

pub mod bitmap;
mod brake;
pub mod destination;
pub mod source;
mod written;

use serde_json::Value;

use crate::protocol::command::PrepareDisk;
use crate::protocol::types::DiskInfo;

/// A command for QEMU, and which answer belongs to it.
#[derive(Debug, Clone, PartialEq)]
pub struct Ask<T> {
    /// Names the answer.
    pub tag: T,
    /// The command.
    pub command: &'static str,
    /// Its arguments.
    pub arguments: Value,
}

/// Block nodes as `query-named-block-nodes` lists them, without those that QEMU named itself.
#[must_use]
pub fn read_nodes(value: &Value) -> Vec<DiskInfo> {
    let nodes = value.as_array().into_iter().flatten();
    nodes
        .filter_map(|node| {
            let name = node["node-name"].as_str()?;
            Some(DiskInfo {
                node: name.to_owned(),
                size_bytes: node["image"]["virtual-size"].as_u64()?,
                format: node["drv"].as_str().unwrap_or_default().to_owned(),
                read_only: node["ro"].as_bool().unwrap_or(false),
            })
        })
        .filter(|node| !node.node.starts_with('#'))
        .collect()
}

/// Finds a disk among the nodes and compares its size.
///
/// # Errors
/// It is not there, or of another size, or only at one end read-only.
pub fn check_node(nodes: &[DiskInfo], disk: &PrepareDisk) -> Result<(), String> {
    let PrepareDisk {
        node, size_bytes, ..
    } = disk;
    let Some(found) = nodes.iter().find(|info| info.node == *node) else {
        let names: Vec<&str> = nodes.iter().map(|info| info.node.as_str()).collect();
        return Err(format!(
            "there is no block node `{node}`; its QEMU has {}",
            match names.as_slice() {
                [] => "none with a name".to_owned(),
                names => names.join(", "),
            }
        ));
    };
    match (found.read_only, disk.read_only) {
        (true, false) => return Err(format!("disk `{node}` is read-only")),
        (false, true) => {
            return Err(format!(
                "disk `{node}` is read-only at the source and can be written here: set \
                 `read-only=on` in the template"
            ));
        }
        _ => {}
    }
    if found.size_bytes != *size_bytes {
        return Err(format!(
            "disk `{node}` has {} bytes, expected {size_bytes}",
            found.size_bytes
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::protocol::types::{Chain, CopyMode};

    #[test]
    fn nodes_are_read_and_compared() {
        let nodes = read_nodes(&json!([
            {"node-name": "disk0", "drv": "raw", "ro": false, "image": {"virtual-size": 8192}},
            {"node-name": "cd", "drv": "raw", "ro": true, "image": {"virtual-size": 4096}},
            {"node-name": "#block012", "drv": "file", "ro": false, "image": {"virtual-size": 1}},
        ]));
        assert_eq!(nodes.len(), 2);
        let disk = |node: &str, size_bytes, read_only| PrepareDisk {
            node: node.into(),
            size_bytes,
            copy_mode: CopyMode::Background,
            chain: Chain::Flatten,
            read_only,
        };
        assert_eq!(check_node(&nodes, &disk("disk0", 8192, false)), Ok(()));
        assert_eq!(check_node(&nodes, &disk("cd", 4096, true)), Ok(()));
        for (node, size, read_only, expected) in [
            ("disk1", 8192, false, "disk0, cd"),
            ("disk0", 4096, false, "8192 bytes, expected 4096"),
            ("cd", 4096, false, "read-only"),
            ("disk0", 8192, true, "can be written here"),
        ] {
            let error = check_node(&nodes, &disk(node, size, read_only)).expect_err("refused");
            assert!(error.contains(expected), "{error}");
        }
        let none = check_node(&[], &disk("disk0", 1, false));
        assert!(none.is_err_and(|text| text.contains("none with a name")));
    }
}
