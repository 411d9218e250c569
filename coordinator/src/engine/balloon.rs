//! What the halves say of a VM's balloon: the source what it took, and each what it gave back.

use sidecar::protocol::event::{Envelope, Event};
use sidecar::protocol::types::{Role, VmReport};

use super::group::GroupRun;
use crate::application::HostId;
use crate::report::BalloonMove;

impl GroupRun {
    /// A report came of one of its halves.
    pub(super) fn note_balloon(&mut self, index: usize, report: &VmReport) {
        let vm = &mut self.vms[index];
        vm.free_page_hint |= report.free_page_hint;
        let Some(told) = &report.balloon else {
            return;
        };
        let known = vm.balloon.get_or_insert_with(BalloonMove::default);
        if report.role == Role::Source {
            known.before_bytes = told.before_bytes;
            known.during_bytes = told.during_bytes.or(known.during_bytes);
            known.took_ms = told.took_ms;
        }
        known.given_back |= told.given_back;
        if let Some(notice) = &told.notice {
            let text = format!("{}: {notice}", vm.member.name);
            self.notice(text);
        }
    }

    /// The group has ended; a sidecar has still given back memory.
    pub(super) fn hear_last_words(&mut self, host: HostId, envelope: &Envelope) {
        let Event::RunEnded { vms } = &envelope.event else {
            return;
        };
        for report in vms {
            if let Some(index) = self.index_at(&report.vm, report.role, host) {
                self.note_balloon(index, report);
            }
        }
    }

    /// Guests whose memory was taken, and not given back as far as is known.
    pub fn not_given_back(&self) -> impl Iterator<Item = &str> {
        let taken = self.vms.iter().filter(|vm| {
            let balloon = vm.balloon.as_ref();
            balloon.is_some_and(|told| told.during_bytes.is_some() && !told.given_back)
        });
        taken.map(|vm| vm.member.name.as_str())
    }
}
