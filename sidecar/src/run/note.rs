//! What of a run has to outlive this process.

use super::{Run, VmHalf};
use crate::hold::millis;
use crate::notes::{NOTE_VERSION, Note, NoteVm};
use crate::protocol::types::Role;

/// What the daemon knows of a half for its note.
#[derive(Debug, Clone, Default)]
pub struct NotePlace {
    /// The monitor's path.
    pub qmp: String,
    /// The process, and its start time.
    pub process: Option<(i32, u64)>,
    /// Images that were made for it.
    pub created: Vec<std::path::PathBuf>,
}

impl Run {
    /// The note of this run; `place` adds what the daemon knows of each half: monitor's path and
    /// process.
    pub fn note(&self, mut place: impl FnMut(usize) -> NotePlace) -> Note {
        let vms = self.halves.iter().enumerate().map(|(index, half)| {
            let place = place(index);
            let disks = match half {
                VmHalf::Source(source) => source.disk_nodes(),
                VmHalf::Destination(destination) => {
                    let nodes = destination.disks().iter();
                    nodes.map(|disk| disk.node.clone()).collect()
                }
            };
            let balloon = match half {
                VmHalf::Source(source) => source.balloon_kept().cloned(),
                VmHalf::Destination(destination) => destination.balloon.clone(),
            };
            let (role, released, was_running, originals) = match half {
                VmHalf::Source(source) => (
                    Role::Source,
                    source.note_released(),
                    source.was_running,
                    source.originals.clone(),
                ),
                VmHalf::Destination(destination) => {
                    let originals = destination.originals.clone();
                    (Role::Destination, true, destination.was_running, originals)
                }
            };
            NoteVm {
                vm: half.half().name.clone(),
                uuid: half.half().uuid,
                role,
                qmp: place.qmp,
                released,
                was_running,
                originals,
                disks,
                balloon,
                created: place.created,
                process: place.process,
            }
        });
        Note {
            version: NOTE_VERSION,
            run: self.id,
            epoch: self.epoch,
            register: self.register.clone(),
            lease_ms: millis(self.lease),
            max_downtime_ms: millis(self.max_downtime),
            hold: self.hold,
            vms: vms.collect(),
        }
    }
}
