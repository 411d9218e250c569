//! The source's side: one mirror job for each disk, from `blockdev-add` to its end.

mod giving_up;
mod left;

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::bitmap::GRANULARITY;
use super::brake::Brake;
use super::written::{COUNT, Written};
use super::{Ask, check_node};
use crate::protocol::command::PrepareDisk;
use crate::protocol::types::{Chain, CopyMode, DiskInfo};

/// How often the jobs are looked at.
const POLL: Duration = Duration::from_millis(100);
/// … while the VM is about to stop.
const QUICK_POLL: Duration = Duration::from_millis(10);
/// What a mirror for whose copy the guest's writes wait has on its way at most: a write waits behind it,
/// as long as the link needs for it. QEMU would send 10 MiB ahead.
const WRITE_BLOCKING_AHEAD: u64 = 2 << 20;

/// Which command an answer belongs to; the number is the disk's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tag {
    /// `blockdev-add`.
    Add(usize),
    /// `blockdev-mirror`.
    Mirror(usize),
    /// `query-block-jobs`.
    Jobs,
    /// `block-job-pause` and `block-job-resume`.
    HoldBack(usize),
    /// `query-block`: which devices the disks are at.
    Devices,
    /// `block_set_io_throttle`.
    Throttle(usize),
    /// `block-dirty-bitmap-add`.
    Track(usize),
    /// `query-named-block-nodes`, for the counts of the bitmaps.
    Count,
    /// `block-dirty-bitmap-clear`.
    Reset(usize),
    /// `block-dirty-bitmap-remove`.
    Untrack(usize),
    /// The same of a VM that was just paused.
    Rest,
    /// `block-job-cancel` of a mirror that is ready: it ends when everything is copied.
    Drain(usize),
    /// `blockdev-del` after that.
    Close(usize),
    /// `block-job-cancel` by force.
    Cancel(usize),
    /// `query-block-jobs` after it.
    Leftover,
    /// `blockdev-del` after that.
    Remove(usize),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// Nothing of QEMU was changed.
    Idle,
    /// The disks are copied.
    Copying,
    /// Every mirror follows the guest's writes.
    Ready,
    /// The guest is paused: the mirrors copy the rest and end.
    Draining,
    /// The NBD nodes are removed.
    Closing,
    /// The destination's NBD server has stopped.
    Sealed,
    /// The move was given up: jobs and nodes are removed.
    Leaving { since: Option<Instant> },
    /// Nothing is left.
    Gone,
}

#[derive(Debug)]
struct Mirror {
    node: String,
    size_bytes: u64,
    copy_mode: CopyMode,
    chain: Chain,
    read_only: bool,
    /// How its guest writes to it.
    written: Written,
    /// How that is limited.
    brake: Brake,
    offset: u64,
    len: u64,
    ready: bool,
    /// The job ended with everything copied.
    drained: bool,
    closed: bool,
    removed: bool,
}

/// The mirrors of one VM. See the module.
#[derive(Debug)]
pub struct Mirrors {
    stage: Stage,
    disks: Vec<Mirror>,
    /// Connections that the destination has closed after its NBD server had stopped.
    sealed: usize,
    commands: Vec<Ask<Tag>>,
    problem: Option<String>,
    poll_at: Option<Instant>,
    poll_every: Duration,
    /// An answer to `query-block-jobs` is outstanding.
    polling: bool,
    /// Mirrors that are complete are held back: what is written is sent later.
    hold_back: bool,
    count_at: Option<Instant>,
    /// What an earlier life of this sidecar, or connection, has done to them is not known.
    is_adopted: bool,
    /// Bytes of NBD that have gone to the destination.
    pub sent_bytes: u64,
}

fn job(index: usize) -> String {
    format!("muster-mirror{index}")
}

fn target(index: usize) -> String {
    format!("muster-nbd{index}")
}

impl Mirrors {
    /// These disks are to move.
    #[must_use]
    pub fn new(disks: &[PrepareDisk]) -> Self {
        let disks = disks.iter().map(|disk| Mirror {
            node: disk.node.clone(),
            size_bytes: disk.size_bytes,
            copy_mode: disk.copy_mode,
            chain: disk.chain,
            read_only: disk.read_only,
            written: Written::default(),
            brake: Brake::default(),
            offset: 0,
            len: disk.size_bytes,
            ready: false,
            drained: false,
            closed: false,
            removed: false,
        });
        Self {
            stage: Stage::Idle,
            disks: disks.collect(),
            sealed: 0,
            commands: Vec::new(),
            problem: None,
            poll_at: None,
            poll_every: POLL,
            polling: false,
            hold_back: false,
            count_at: None,
            is_adopted: false,
            sent_bytes: 0,
        }
    }

    /// Disks that an earlier life of this sidecar may have mirrored: all that is left to do is to
    /// remove that.
    #[must_use]
    pub fn adopt(nodes: &[String]) -> Self {
        let disks: Vec<PrepareDisk> = nodes
            .iter()
            .map(|node| PrepareDisk {
                node: node.clone(),
                size_bytes: 0,
                copy_mode: CopyMode::Background,
                chain: Chain::Flatten,
                read_only: false,
            })
            .collect();
        let mut mirrors = Self::new(&disks);
        mirrors.stage = Stage::Copying;
        mirrors.is_adopted = true;
        mirrors
    }

    /// Whether there is no disk to move.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.disks.is_empty()
    }

    /// Their nodes.
    #[must_use]
    pub fn nodes(&self) -> Vec<String> {
        self.disks.iter().map(|disk| disk.node.clone()).collect()
    }

    /// Whether the copy has begun, and every disk follows the guest's writes.
    #[must_use]
    pub fn are_ready(&self) -> bool {
        self.is_empty() || self.stage == Stage::Ready
    }

    /// Whether everything is at the destination and its NBD server has stopped.
    #[must_use]
    pub fn are_sealed(&self) -> bool {
        self.is_empty() || self.stage == Stage::Sealed
    }

    /// Whether nothing of it is left in QEMU, or never was.
    #[must_use]
    pub fn are_gone(&self) -> bool {
        self.is_empty() || matches!(self.stage, Stage::Idle | Stage::Gone | Stage::Sealed)
    }

    /// How fast the guest writes to them.
    #[must_use]
    pub fn dirty_rate_bytes_per_s(&self) -> u64 {
        let rates = self.disks.iter().map(|disk| disk.written.rate_bytes_per_s);
        rates.sum()
    }

    /// Whether mirrors that are complete are held back.
    #[must_use]
    pub fn are_held_back(&self) -> bool {
        self.hold_back
    }

    /// Mirrors that are complete wait with what is written from then on.
    pub fn hold_back(&mut self) {
        if self.stage == Stage::Idle {
            self.hold_back = true;
        }
    }

    /// Mirrors that were held back go on.
    pub fn send_on(&mut self, now: Instant) {
        if !std::mem::take(&mut self.hold_back) {
            return;
        }
        self.count_at = self.count_at.map(|_| now);
        self.poll_at = self.poll_at.map(|_| now);
        for index in 0..self.disks.len() {
            if self.disks[index].ready && matches!(self.stage, Stage::Copying | Stage::Ready) {
                let arguments = json!({ "device": job(index) });
                self.ask(Tag::HoldBack(index), "block-job-resume", arguments);
            }
        }
    }

    /// Commands to be sent, in order.
    pub fn take_commands(&mut self) -> Vec<Ask<Tag>> {
        std::mem::take(&mut self.commands)
    }

    /// What went wrong since the last time.
    pub fn take_problem(&mut self) -> Option<String> {
        self.problem.take()
    }

    /// Disks that the guest can write, with their nodes.
    pub(super) fn written_nodes(&self) -> Vec<(usize, String)> {
        let disks = self.disks.iter().enumerate();
        disks
            .filter(|(_, disk)| !disk.read_only)
            .map(|(index, disk)| (index, disk.node.clone()))
            .collect()
    }

    pub(super) fn disk(&mut self, index: usize) -> &mut Written {
        &mut self.disks[index].written
    }

    pub(super) fn brake(&mut self, index: usize) -> &mut Brake {
        &mut self.disks[index].brake
    }

    pub(super) fn is_adopted(&self) -> bool {
        self.is_adopted
    }

    pub(super) fn ask(&mut self, tag: Tag, command: &'static str, arguments: Value) {
        self.commands.push(Ask {
            tag,
            command,
            arguments,
        });
    }

    fn trouble(&mut self, text: String) {
        if !matches!(self.stage, Stage::Leaving { .. } | Stage::Gone) {
            self.problem.get_or_insert(text);
        }
    }

    /// Whether the disks are what they are said to be; else what is wrong.
    #[must_use]
    pub fn mismatch(&self, nodes: &[DiskInfo]) -> Option<String> {
        let mut disks = self.disks.iter();
        disks.find_map(|disk| {
            let disk = PrepareDisk {
                node: disk.node.clone(),
                size_bytes: disk.size_bytes,
                copy_mode: disk.copy_mode,
                chain: disk.chain,
                read_only: disk.read_only,
            };
            check_node(nodes, &disk).err()
        })
    }

    /// Whether a guest's writes go to the destination, too, before they are acknowledged. Unpatched QEMU
    /// frees what such a write uses when the job ends before it (block/mirror.c, `mirror_run`).
    #[must_use]
    pub fn are_write_blocking(&self) -> bool {
        let mut disks = self.disks.iter();
        disks.any(|disk| disk.copy_mode == CopyMode::WriteBlocking)
    }

    /// The relay listens for QEMU's NBD clients at this path.
    pub fn start(&mut self, now: Instant, path: &str) {
        if self.stage != Stage::Idle {
            return;
        }
        self.stage = Stage::Copying;
        self.poll_at = Some(now + self.poll_every);
        self.count_at = Some(now);
        self.track();
        self.ask(Tag::Devices, "query-block", Value::Null);
        for index in 0..self.disks.len() {
            let arguments = json!({
                "driver": "nbd",
                "node-name": target(index),
                "server": { "type": "unix", "path": path },
                "export": self.disks[index].node,
            });
            self.ask(Tag::Add(index), "blockdev-add", arguments);
        }
    }

    /// How fresh what is known of them must be.
    pub fn watch_closely(&mut self, now: Instant, closely: bool) {
        self.poll_every = if closely { QUICK_POLL } else { POLL };
        if self.poll_at.is_some() {
            self.poll_at = Some(now);
        }
    }

    fn poll(&mut self) {
        if !self.polling {
            self.polling = true;
            self.ask(Tag::Jobs, "query-block-jobs", Value::Null);
        }
    }

    /// Asks how much is left, the guest being paused.
    pub fn ask_rest(&mut self) {
        self.ask(Tag::Rest, "query-block-jobs", Value::Null);
    }

    /// The guest is paused for the switchover: copy the rest, and end.
    pub fn drain(&mut self, now: Instant) {
        if self.stage != Stage::Ready {
            return;
        }
        self.stage = Stage::Draining;
        self.watch_closely(now, true);
        for index in 0..self.disks.len() {
            let arguments = json!({ "device": job(index), "force": false });
            self.ask(Tag::Drain(index), "block-job-cancel", arguments);
        }
    }

    /// The destination closed a connection, its NBD server having stopped.
    pub fn connection_sealed(&mut self) {
        self.sealed += 1;
        self.look_sealed();
    }

    fn look_sealed(&mut self) {
        let closed = self.disks.iter().all(|disk| disk.closed);
        if self.stage == Stage::Closing && closed && self.sealed >= self.disks.len() {
            self.stage = Stage::Sealed;
        }
    }

    /// When [`Self::tick`] wants to be called.
    #[must_use]
    pub fn deadline(&self) -> Option<Instant> {
        self.poll_at
    }

    /// Does what is due.
    pub fn tick(&mut self, now: Instant) {
        if self.poll_at.is_none_or(|at| at > now) {
            return;
        }
        match self.stage {
            Stage::Copying | Stage::Ready | Stage::Draining => {
                self.poll_at = Some(now + self.poll_every);
                self.poll();
                if self.count_at.is_some_and(|at| at <= now) && self.stage != Stage::Draining {
                    self.count_at = Some(now + COUNT);
                    let flat = json!({ "flat": true });
                    self.ask(Tag::Count, "query-named-block-nodes", flat);
                }
            }
            Stage::Leaving { .. } => {
                self.poll_at = None;
                self.ask(Tag::Leftover, "query-block-jobs", Value::Null);
            }
            _ => self.poll_at = None,
        }
    }

    /// QEMU answered.
    pub fn replied(&mut self, now: Instant, tag: Tag, value: &Value) {
        match tag {
            Tag::Add(index) if self.stage == Stage::Copying => {
                let mut arguments = json!({
                    "job-id": job(index),
                    "device": self.disks[index].node,
                    "target": target(index),
                    "sync": match self.disks[index].chain {
                        Chain::Flatten => "full",
                        Chain::Keep => "top",
                    },
                    "granularity": GRANULARITY,
                    "copy-mode": self.disks[index].copy_mode,
                });
                if self.disks[index].copy_mode == CopyMode::WriteBlocking {
                    arguments["buf-size"] = json!(WRITE_BLOCKING_AHEAD);
                }
                self.ask(Tag::Mirror(index), "blockdev-mirror", arguments);
            }
            Tag::Jobs => {
                self.polling = false;
                self.read_jobs(value);
            }
            Tag::Rest => self.read_jobs(value),
            Tag::Close(index) => {
                self.disks[index].closed = true;
                self.look_sealed();
            }
            Tag::Leftover => self.clean(now, value),
            Tag::Remove(index) => self.removed(index),
            Tag::Count => self.counted(now, value),
            Tag::Devices => self.read_devices(value),
            Tag::Add(_) | Tag::Mirror(_) | Tag::Drain(_) | Tag::Cancel(_) | Tag::HoldBack(_) => {}
            Tag::Track(_) | Tag::Reset(_) | Tag::Untrack(_) | Tag::Throttle(_) => {}
        }
    }

    /// QEMU refused a command.
    pub fn refused(&mut self, now: Instant, tag: Tag, error: &str) {
        match tag {
            // The job has ended by itself: the connection was cut.
            Tag::Cancel(_) | Tag::Rest => {}
            Tag::Leftover => self.ask_again(now, error),
            // Not held back, or not measured: it goes on without.
            Tag::HoldBack(_) | Tag::Track(_) | Tag::Count | Tag::Reset(_) | Tag::Untrack(_) => {}
            Tag::Devices | Tag::Throttle(_) => {}
            Tag::Jobs => self.polling = false,
            Tag::Remove(index) if error.contains("Failed to find node") => self.removed(index),
            Tag::Remove(index) => self.remove_again(now, index, error),
            Tag::Add(index) | Tag::Mirror(index) | Tag::Drain(index) | Tag::Close(index) => {
                let node = self.disks[index].node.clone();
                self.trouble(format!("disk `{node}`: QEMU refused ({tag:?}): {error}"));
            }
        }
    }

    fn read_jobs(&mut self, value: &Value) {
        for (index, disk) in self.disks.iter_mut().enumerate() {
            let jobs = || value.as_array().into_iter().flatten();
            let id = job(index);
            if let Some(found) = jobs().find(|found| found["device"].as_str() == Some(&id)) {
                disk.take_progress(found);
            }
        }
    }

    /// Whether an event is about one of these jobs; then it is taken.
    pub fn event(&mut self, name: &str, data: &Value) -> bool {
        if !name.starts_with("BLOCK_JOB_") {
            return false;
        }
        let device = data["device"].as_str().unwrap_or_default();
        let Some(index) = (0..self.disks.len()).find(|index| job(*index) == device) else {
            return false;
        };
        self.disks[index].take_progress(data);
        match name {
            "BLOCK_JOB_READY" => {
                if self.hold_back && !self.disks[index].ready {
                    let arguments = json!({ "device": job(index) });
                    self.ask(Tag::HoldBack(index), "block-job-pause", arguments);
                }
                self.disks[index].ready = true;
                if self.stage == Stage::Copying && self.disks.iter().all(|disk| disk.ready) {
                    self.stage = Stage::Ready;
                }
            }
            "BLOCK_JOB_COMPLETED" | "BLOCK_JOB_CANCELLED" => self.ended(index, name, data),
            _ => {}
        }
        true
    }

    fn ended(&mut self, index: usize, name: &str, data: &Value) {
        let disk = &mut self.disks[index];
        let node = disk.node.clone();
        let whole = data["offset"].as_u64() == data["len"].as_u64() && data["len"].is_u64();
        let error = data["error"].as_str();
        if self.stage != Stage::Draining || name != "BLOCK_JOB_COMPLETED" {
            let text = error.unwrap_or("it was cancelled by somebody else");
            self.trouble(format!("the mirror of disk `{node}` ended: {text}"));
        } else if let Some(error) = error {
            self.trouble(format!("the mirror of disk `{node}` failed: {error}"));
        } else if !whole {
            self.trouble(format!(
                "the mirror of disk `{node}` ended with {} of {} bytes copied",
                data["offset"], data["len"]
            ));
        } else {
            disk.drained = true;
            if self.disks.iter().all(|disk| disk.drained) {
                self.stage = Stage::Closing;
                self.poll_at = None;
                for index in 0..self.disks.len() {
                    let arguments = json!({ "node-name": target(index) });
                    self.ask(Tag::Close(index), "blockdev-del", arguments);
                }
            }
        }
    }
}

impl Mirror {
    fn take_progress(&mut self, data: &Value) {
        if let (Some(offset), Some(len)) = (data["offset"].as_u64(), data["len"].as_u64()) {
            self.offset = offset;
            self.len = len;
        }
    }
}
