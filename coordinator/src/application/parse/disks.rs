//! `[[vm.disks]]`: local disks that move with their VM.

use sidecar::config::is_node_name;

use super::tables;
use crate::application::Disk;
use crate::application::reader::{Problems, TableReader};

/// What `[[vm]]` says of its local disks.
pub(super) fn read_disks(vm: &mut TableReader<'_, '_>, problems: &mut Problems<'_>) -> Vec<Disk> {
    let mut disks: Vec<Disk> = Vec::new();
    for mut reader in tables(vm, "disks", problems) {
        reader.name = format!("disks of {}", vm.name);
        let expected = "the name of its block node, such as \"disk0\"";
        match reader.text(problems, "node", expected) {
            None if !reader.has("node") => reader.missing(problems, "node", expected),
            None => {}
            Some(found) if !is_node_name(&found.value) => {
                let text = format!("`node` in {}: expected {expected}", reader.name);
                problems.at(&found.span, text);
            }
            Some(found) if disks.iter().any(|disk| disk.node == found.value) => {
                let text = format!("`{}` is there twice in {}", found.value, reader.name);
                problems.at(&found.span, text);
            }
            Some(found) => disks.push(Disk { node: found.value }),
        }
        reader.finish(problems);
    }
    disks
}
