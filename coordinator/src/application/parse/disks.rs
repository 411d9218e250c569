//! `[[vm.disks]]`: local disks that move with their VM.

use sidecar::config::is_node_name;
use sidecar::protocol::types::{Chain, CopyMode};

use super::settings::choice;
use super::tables;
use crate::application::Disk;
use crate::application::reader::{Problems, TableReader};

/// What `[[vm]]` says of its local disks.
pub(super) fn read_disks(vm: &mut TableReader<'_, '_>, problems: &mut Problems<'_>) -> Vec<Disk> {
    let mut disks: Vec<Disk> = Vec::new();
    for mut reader in tables(vm, "disks", problems) {
        reader.name = format!("disks of {}", vm.name);
        let modes = [CopyMode::Background, CopyMode::WriteBlocking];
        let names = modes.map(|mode| (mode.to_string(), mode));
        let choices = names.each_ref().map(|(name, mode)| (name.as_str(), *mode));
        let copy_mode = choice(&mut reader, problems, "copy-mode", &choices).unwrap_or_default();
        let chains = [Chain::Flatten, Chain::Keep].map(|chain| (chain.to_string(), chain));
        let choices = chains
            .each_ref()
            .map(|(name, chain)| (name.as_str(), *chain));
        let chain = choice(&mut reader, problems, "chain", &choices).unwrap_or_default();
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
            Some(found) => disks.push(Disk {
                node: found.value,
                copy_mode,
                chain,
            }),
        }
        reader.finish(problems);
    }
    disks
}
