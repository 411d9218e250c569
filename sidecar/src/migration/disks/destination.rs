//! The destination's side: an NBD server on a unix socket, while the source mirrors into it.

use serde_json::{Value, json};

use super::{Ask, check_node};
use crate::protocol::command::PrepareDisk;
use crate::protocol::types::DiskInfo;

/// Which command an answer belongs to; the number is the disk's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tag {
    /// `nbd-server-start`.
    Serve,
    /// `block-export-add`.
    Export(usize),
    /// `nbd-server-stop`.
    Stop,
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
    exported: usize,
    /// Connections that the source has closed.
    finished: usize,
    commands: Vec<Ask<Tag>>,
    problem: Option<String>,
    path: String,
}

impl Exports {
    /// These disks are to come, over a unix socket at `path`.
    #[must_use]
    pub fn new(disks: Vec<PrepareDisk>, path: String) -> Self {
        Self {
            stage: Stage::Closed,
            disks,
            exported: 0,
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
        disks.find_map(|disk| check_node(nodes, &disk.node, disk.size_bytes).err())
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
                    let node = &self.disks[index].node;
                    let arguments = json!({
                        "type": "nbd",
                        "id": format!("muster-export{index}"),
                        "node-name": node,
                        "name": node,
                        "writable": true,
                    });
                    self.ask(Tag::Export(index), "block-export-add", arguments);
                }
            }
            Tag::Export(_) => {
                self.exported += 1;
                if self.exported == self.disks.len() {
                    self.stage = Stage::Open;
                }
            }
            Tag::Stop => self.stage = Stage::Sealed,
        }
    }

    /// QEMU refused a command.
    pub fn refused(&mut self, tag: Tag, error: &str) {
        self.problem = Some(match tag {
            Tag::Serve => format!("QEMU does not open an NBD server at {}: {error}", self.path),
            Tag::Export(index) => format!(
                "disk `{}` cannot be exported: {error} (is its image in use?)",
                self.disks[index].node
            ),
            Tag::Stop => format!("QEMU does not stop its NBD server: {error}"),
        });
    }
}
