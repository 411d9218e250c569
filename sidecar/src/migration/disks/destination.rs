//! The destination's side: an NBD server on a unix socket, while the source mirrors into it.

use serde_json::{Value, json};

use super::{Ask, check_node};
use crate::config::DiskConfig;
use crate::protocol::command::PrepareDisk;
use crate::protocol::types::DiskInfo;

/// Which command an answer belongs to; the number is the disk's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tag {
    /// `nbd-server-start`.
    Serve,
    /// `blockdev-add` of a writable node of a read-only disk.
    Add(usize),
    /// `block-export-add`.
    Export(usize),
    /// `nbd-server-stop`.
    Stop,
    /// `blockdev-del` after it.
    Remove(usize),
}

/// Node that is exported in the place of a read-only disk's own.
fn writable(index: usize) -> String {
    format!("muster-image{index}")
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    Closed,
    Opening,
    Open,
    Stopping,
    Sealed,
}

/// The exports of one VM. See the module.
#[derive(Debug)]
pub struct Exports {
    stage: Stage,
    disks: Vec<PrepareDisk>,
    /// What is known of the images here.
    images: Vec<DiskConfig>,
    exported: usize,
    /// Nodes of read-only disks that are still there.
    to_remove: usize,
    /// Connections that the source has closed.
    finished: usize,
    commands: Vec<Ask<Tag>>,
    problem: Option<String>,
    path: String,
}

impl Exports {
    /// These disks are to come, over a unix socket at `path`.
    #[must_use]
    pub fn new(disks: Vec<PrepareDisk>, images: Vec<DiskConfig>, path: String) -> Self {
        let to_remove = disks.iter().filter(|disk| disk.read_only).count();
        Self {
            stage: Stage::Closed,
            disks,
            images,
            exported: 0,
            to_remove,
            finished: 0,
            commands: Vec::new(),
            problem: None,
            path,
        }
    }

    /// Whether there is no disk to come.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.disks.is_empty()
    }

    /// Whether the source may connect.
    #[must_use]
    pub fn are_open(&self) -> bool {
        self.is_empty() || self.stage == Stage::Open
    }

    /// Whether everything has come and the server has stopped.
    #[must_use]
    pub fn are_sealed(&self) -> bool {
        self.is_empty() || self.stage == Stage::Sealed
    }

    /// Commands to be sent, in order.
    pub fn take_commands(&mut self) -> Vec<Ask<Tag>> {
        std::mem::take(&mut self.commands)
    }

    /// What went wrong since the last time.
    pub fn take_problem(&mut self) -> Option<String> {
        self.problem.take()
    }

    fn ask(&mut self, tag: Tag, command: &'static str, arguments: Value) {
        self.commands.push(Ask {
            tag,
            command,
            arguments,
        });
    }

    /// Whether the disks are what they are said to be; else what is wrong.
    #[must_use]
    pub fn mismatch(&self, nodes: &[DiskInfo]) -> Option<String> {
        let mut disks = self.disks.iter();
        disks.find_map(|disk| check_node(nodes, disk).err())
    }

    /// QEMU is configured: opens the server.
    pub fn open(&mut self) {
        if self.stage == Stage::Closed && !self.is_empty() {
            self.stage = Stage::Opening;
            let address = json!({ "type": "unix", "data": { "path": self.path } });
            self.ask(Tag::Serve, "nbd-server-start", json!({ "addr": address }));
        }
    }

    /// The source closed a connection; after the last one the server stops.
    pub fn connection_finished(&mut self) {
        self.finished += 1;
        if self.stage == Stage::Open && self.finished >= self.disks.len() {
            self.stage = Stage::Stopping;
            self.ask(Tag::Stop, "nbd-server-stop", Value::Null);
        }
    }

    /// QEMU answered.
    pub fn replied(&mut self, tag: Tag) {
        match tag {
            Tag::Serve => {
                for index in 0..self.disks.len() {
                    let node = self.disks[index].node.clone();
                    if self.disks[index].read_only {
                        self.add_writable(index);
                    } else {
                        self.export(index, &node);
                    }
                }
            }
            Tag::Add(index) => self.export(index, &writable(index)),
            Tag::Export(_) => {
                self.exported += 1;
                if self.exported == self.disks.len() {
                    self.stage = Stage::Open;
                }
            }
            Tag::Stop if self.to_remove > 0 => {
                for index in (0..self.disks.len()).filter(|&index| self.disks[index].read_only) {
                    let arguments = json!({ "node-name": writable(index) });
                    self.commands.push(Ask {
                        tag: Tag::Remove(index),
                        command: "blockdev-del",
                        arguments,
                    });
                }
            }
            Tag::Stop => self.stage = Stage::Sealed,
            Tag::Remove(_) => {
                self.to_remove -= 1;
                if self.to_remove == 0 {
                    self.stage = Stage::Sealed;
                }
            }
        }
    }

    fn export(&mut self, index: usize, node: &str) {
        let arguments = json!({
            "type": "nbd",
            "id": format!("muster-export{index}"),
            "node-name": node,
            "name": self.disks[index].node,
            "writable": true,
        });
        self.ask(Tag::Export(index), "block-export-add", arguments);
    }

    /// The guest's own node, read-only, waits for the VM: QEMU's lock of the image is its.
    fn add_writable(&mut self, index: usize) {
        let node = &self.disks[index].node;
        let Some(known) = self.images.iter().find(|image| image.node == *node) else {
            self.problem = Some(format!(
                "disk `{node}` is read-only, and nothing is known of its image here: add a \
                 [[vm.disk]] to the sidecar's configuration"
            ));
            return;
        };
        let arguments = json!({
            "node-name": writable(index),
            "driver": known.format.name(),
            "file": { "driver": "file", "filename": known.image, "locking": "off" },
        });
        self.ask(Tag::Add(index), "blockdev-add", arguments);
    }

    /// QEMU refused a command.
    pub fn refused(&mut self, tag: Tag, error: &str) {
        self.problem = Some(match tag {
            Tag::Serve => format!("QEMU does not open an NBD server at {}: {error}", self.path),
            Tag::Export(index) | Tag::Add(index) => {
                let node = &self.disks[index].node;
                let mut images = self.images.iter();
                let image = match images.find(|image| image.node == *node) {
                    Some(known) => format!("image {}", known.image.display()),
                    None => "image".to_owned(),
                };
                format!(
                    "disk `{node}` cannot be written at the destination: {error} (if another process \
                     uses its {image}, end that, or name another image in [[vm.disk]])"
                )
            }
            Tag::Remove(index) => format!(
                "the image of disk `{}` cannot be closed: {error}",
                self.disks[index].node
            ),
            Tag::Stop => format!("QEMU does not stop its NBD server: {error}"),
        });
    }
}
