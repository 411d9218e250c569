//! The VM's local disks: what their mirrors want said to QEMU, and when they let the VM go on.

use rate_limiter::{Bytes, BytesPerSecond};

use super::{SWITCH_SLACK, Source, Tag, mirror};
use crate::commit::SourceHalf;
use crate::migration::{Now, Output};
use crate::protocol::event::Event;
use crate::protocol::types::Phase;

impl Source {
    /// Nodes of the disks that move with it.
    #[must_use]
    pub fn disk_nodes(&self) -> Vec<String> {
        self.mirrors.nodes()
    }

    /// The relay listens on this unix socket for QEMU's NBD clients.
    pub fn disks_listening(&mut self, now: Now, path: &str) {
        if self.half.phase() == Phase::Precopy {
            self.mirrors.start(now.mono, path);
            self.drive_disks(now);
        }
    }

    /// `throttle-disks`: the guest writes no faster than this to each of its disks that move.
    pub fn throttle_disks(&mut self, now: Now, bytes_per_s: u64) {
        if self.started && !self.wants_out {
            self.mirrors.throttle(bytes_per_s);
            self.drive_disks(now);
        }
    }

    /// The destination closed the connection of a disk, whose end had been reached.
    pub fn disk_sealed(&mut self, now: Now) {
        self.mirrors.connection_sealed();
        self.drive_disks(now);
    }

    /// Bytes of its disks that have gone to the destination.
    pub fn disks_sent(&mut self, bytes: u64) {
        self.mirrors.sent_bytes = bytes;
    }

    pub(super) fn tick_disks(&mut self, now: Now) {
        if self.mirrors.deadline().is_some_and(|at| at <= now.mono) {
            self.mirrors.tick(now.mono);
            self.drive_disks(now);
        }
    }

    /// Sends what the mirrors ask for, and does what they allow.
    pub(super) fn drive_disks(&mut self, now: Now) {
        for ask in self.mirrors.take_commands() {
            self.send(now, Tag::Disk(ask.tag), ask.command, ask.arguments);
        }
        if let Some(problem) = self.mirrors.take_problem() {
            self.wants_out = true;
            if problem.contains("No space left") {
                let text = format!(
                    "{problem} (the file system of its image at the destination is full: make room \
                     there)"
                );
                self.half.fault(text, false);
            } else {
                // A connection that broke, mostly: its cause is told elsewhere.
                self.half.secondary_fault(problem);
            }
        }
        if self.mirrors.are_ready() && !self.mirrors.is_empty() && !self.disks_copied {
            self.disks_copied = true;
            let vm = self.half.name.clone();
            let remaining_bytes = self.mirrors.left_bytes();
            self.half.tell(Event::DisksCopied {
                vm,
                remaining_bytes,
            });
        }
        let goes_on = self.state == SourceHalf::Reversible && !self.wants_out;
        let before_memory = self.half.phase() == Phase::Precopy && self.rounds.is_none();
        let may_open = self.mirrors.are_ready() && !self.mirrors.are_held_back();
        if goes_on && before_memory && may_open && !self.stream_opened {
            self.open_stream(now);
        }
        if goes_on && self.draining && self.mirrors.are_sealed() {
            self.switch_over(now);
        }
        self.settle();
    }

    /// A command of the mirrors was answered.
    pub(super) fn after_disk(&mut self, now: Now, tag: mirror::Tag) {
        self.drive_disks(now);
        if tag == mirror::Tag::Rest {
            if let Some(remaining_bytes) = self.pausing.take() {
                self.stopped(now, remaining_bytes);
            }
        }
    }

    /// The VM is paused with so much memory left: STOPPED follows when it is known how much of its
    /// disks is.
    pub(super) fn pause_seen(&mut self, now: Now, remaining_bytes: u64) {
        if self.mirrors.is_empty() {
            self.stopped(now, remaining_bytes);
        } else {
            self.pausing = Some(remaining_bytes);
            self.mirrors.ask_rest();
            self.drive_disks(now);
        }
    }

    /// `continue`: the mirrors copy their rest and end, at full speed.
    pub(super) fn drain_disks(&mut self, now: Now) {
        self.draining = true;
        self.half.put(Output::Unpace);
        let rate = BytesPerSecond(self.rate_bytes_per_s.max(1_000_000));
        let copy = rate.time_for(Bytes(self.mirrors.left_bytes()));
        let longest = copy.max(self.settings.max_downtime) * 3;
        self.switch_by = Some(now.mono + longest + SWITCH_SLACK);
        self.mirrors.drain(now.mono);
        self.drive_disks(now);
    }
}
