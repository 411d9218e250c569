//! Notes: what a sidecar must still know after it died, one file per run, synced.
//!
//! A note is written when a run is prepared and again before a VM may complete, and removed when
//! every half here is final. A restarted sidecar reads them, adopts the QEMUs, and asks the
//! register.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::Value;
use uuid::Uuid;

use crate::migration::balloon::Kept;
use crate::protocol::command::Termination;
use crate::protocol::types::Role;
use crate::register::sync_directory;

/// Everything about one run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Note {
    /// Format of the note.
    pub version: u32,
    /// The run.
    pub run: Uuid,
    /// The highest epoch seen.
    pub epoch: u64,
    /// Address of the register's sidecar.
    pub register: String,
    /// The coordinator's lease in ms.
    pub lease_ms: u64,
    /// The group's downtime limit in ms.
    pub max_downtime_ms: u64,
    /// Whether the VMs are held until released.
    pub hold: bool,
    /// The halves that are here.
    pub vms: Vec<NoteVm>,
}

/// One half.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct NoteVm {
    /// The VM's name.
    pub vm: String,
    /// Its UUID.
    pub uuid: Uuid,
    /// Which half.
    pub role: Role,
    /// The monitor's path.
    pub qmp: String,
    /// Source: whether it may have completed.
    pub released: bool,
    /// Whether the guest ran before the move.
    pub was_running: bool,
    /// Capabilities and parameters to put back.
    pub originals: Option<(Value, Value)>,
    /// Local disks that move with it (their block nodes).
    #[serde(default)]
    pub disks: Vec<String>,
    /// What its balloon was before the move. A destination knows it when the memory comes.
    #[serde(default)]
    pub balloon: Option<Kept>,
    /// Destination: images that were made for it.
    #[serde(default)]
    pub created: Vec<PathBuf>,
    /// The process, and its start time in clock ticks since boot (so that a reused number is not
    /// taken for it).
    pub process: Option<(i32, u64)>,
}

/// Version of the format.
pub const NOTE_VERSION: u32 = 1;

impl Note {
    /// Whether pre-copy bounds matter any more: after a restart nothing is sent on.
    #[must_use]
    pub fn termination(&self) -> Termination {
        Termination::default()
    }
}

fn path_of(directory: &Path, run: Uuid) -> PathBuf {
    directory.join(format!("{run}.json"))
}

/// Writes a note; it is on disk when this returns.
///
/// # Errors
/// Those of the file system, with the path.
pub fn save(directory: &Path, note: &Note) -> io::Result<()> {
    let path = path_of(directory, note.run);
    let temporary = path.with_extension("new");
    let explain = |error: io::Error| {
        io::Error::new(
            error.kind(),
            format!(
                "the note {} cannot be written: {error} (is the disk under the state directory \
                 full?)",
                path.display()
            ),
        )
    };
    let written = (|| {
        fs::create_dir_all(directory)?;
        let mut file = fs::File::create(&temporary)?;
        file.write_all(&serde_json::to_vec_pretty(note)?)?;
        file.sync_all()?;
        fs::rename(&temporary, &path)?;
        sync_directory(directory)
    })();
    if written.is_err() {
        // Half of a note helps nobody.
        let _ = fs::remove_file(&temporary);
    }
    written.map_err(explain)
}

/// Removes a note.
///
/// # Errors
/// Those of the file system; a note that is not there is none.
pub fn remove(directory: &Path, run: Uuid) -> io::Result<()> {
    match fs::remove_file(path_of(directory, run)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Every note in the directory; what cannot be read is told apart, with its path.
///
/// # Errors
/// The directory cannot be read.
pub fn load(directory: &Path) -> io::Result<(Vec<Note>, Vec<String>)> {
    let mut notes = Vec::new();
    let mut problems = Vec::new();
    let entries = match fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok((notes, problems)),
        Err(error) => return Err(error),
    };
    for entry in entries {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "new") {
            // What a crash left of a note that was never renamed; it is written over otherwise.
            let _ = fs::remove_file(&path);
        }
        if path.extension().is_none_or(|extension| extension != "json") {
            continue;
        }
        let note = fs::read(&path)
            .map_err(|error| error.to_string())
            .and_then(|bytes| {
                serde_json::from_slice::<Note>(&bytes).map_err(|error| error.to_string())
            });
        match note {
            Ok(note) if note.version == NOTE_VERSION => notes.push(note),
            Ok(note) => problems.push(format!(
                "the note {} has version {}, this sidecar writes {NOTE_VERSION}: settle that run \
                 with the release that wrote it",
                path.display(),
                note.version
            )),
            Err(error) => problems.push(format!("the note {}: {error}", path.display())),
        }
    }
    Ok((notes, problems))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn note() -> Note {
        Note {
            version: NOTE_VERSION,
            run: Uuid::from_u128(3),
            epoch: 1,
            register: "unix:/run/a".into(),
            lease_ms: 5000,
            max_downtime_ms: 300,
            hold: true,
            vms: vec![],
        }
    }

    #[test]
    fn a_note_comes_back_and_goes() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("runs");
        save(&path, &note()).expect("saves");
        save(&path, &Note { epoch: 2, ..note() }).expect("saves again");
        fs::write(path.join("bad.json"), "{").expect("writes");
        let (notes, problems) = load(&path).expect("loads");
        assert_eq!(notes, [Note { epoch: 2, ..note() }]);
        assert_eq!(problems.len(), 1);
        remove(&path, note().run).expect("removes");
        remove(&path, note().run).expect("is idempotent");
        assert_eq!(load(&path).expect("loads").0, []);
    }

    #[test]
    fn what_cannot_be_written_is_said_with_its_path() {
        let error = save(Path::new("/proc/none"), &note()).expect_err("not writable");
        assert!(error.to_string().contains("/proc/none"), "{error}");
    }
}
