//! The register: records that are written once, on disk before they are answered.
//!
//! One directory per run, one file per record. A record is written to a temporary file, synced,
//! and linked to its name: the link fails if a record stands already, and then that one is the
//! answer. The directory is synced before the answer is given. So whoever asks, and however often
//! the sidecar dies meanwhile, all get the same answer.
//!
//! [`Register`] is the boundary behind which another store (etcd, say) can stand.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use uuid::Uuid;

use crate::protocol::types::{RecordKey, RecordValue};

/// Why a record could not be written or read.
#[derive(Debug, thiserror::Error)]
pub enum RegisterError {
    /// The value does not belong to the key.
    #[error(
        "`{value:?}` is no value for this record: the group takes commit or abort, a VM source or destination"
    )]
    Value {
        /// The value.
        value: RecordValue,
    },
    /// The file system.
    #[error("the register's file {path}: {error} (is the disk under the state directory full?)")]
    Io {
        /// Which file.
        path: PathBuf,
        /// What the kernel said.
        error: io::Error,
    },
    /// A file that is no record.
    #[error("the register's file {path} holds no record: restore it from a backup or remove it")]
    Corrupt {
        /// Which file.
        path: PathBuf,
    },
}

/// Keeps write-once records.
pub trait Register {
    /// Records `value` unless a record stands; returns the one that stands, durable.
    ///
    /// # Errors
    /// Nothing is promised then: ask again.
    fn decide(
        &mut self,
        run: Uuid,
        key: RecordKey,
        value: RecordValue,
    ) -> Result<RecordValue, RegisterError>;

    /// Every record of a run.
    ///
    /// # Errors
    /// A record cannot be read.
    fn records(&self, run: Uuid) -> Result<Vec<(RecordKey, RecordValue)>, RegisterError>;

    /// Removes the records of a run that nobody will ask for again.
    ///
    /// # Errors
    /// They cannot be removed.
    fn forget(&mut self, run: Uuid) -> Result<(), RegisterError>;
}

/// The register in a directory.
#[derive(Debug)]
pub struct FileRegister {
    directory: PathBuf,
}

fn at<T>(path: &Path, result: io::Result<T>) -> Result<T, RegisterError> {
    result.map_err(|error| RegisterError::Io {
        path: path.to_owned(),
        error,
    })
}

/// Syncs a directory, so that the names in it survive a crash of the host.
///
/// # Errors
/// Those of the file system.
pub fn sync_directory(path: &Path) -> io::Result<()> {
    fs::File::open(path)?.sync_all()
}

fn text(value: RecordValue) -> &'static str {
    match value {
        RecordValue::Commit => "commit",
        RecordValue::Abort => "abort",
        RecordValue::Source => "source",
        RecordValue::Destination => "destination",
    }
}

fn read_value(text: &str) -> Option<RecordValue> {
    let all = [
        RecordValue::Commit,
        RecordValue::Abort,
        RecordValue::Source,
        RecordValue::Destination,
    ];
    all.into_iter()
        .find(|value| self::text(*value) == text.trim_end())
}

fn fits(key: RecordKey, value: RecordValue) -> bool {
    match key {
        RecordKey::Group => matches!(value, RecordValue::Commit | RecordValue::Abort),
        RecordKey::Vm(_) => matches!(value, RecordValue::Source | RecordValue::Destination),
    }
}

impl FileRegister {
    /// The register in `directory`, which is made if it is not there.
    ///
    /// # Errors
    /// It cannot be made.
    pub fn open(directory: PathBuf) -> Result<Self, RegisterError> {
        at(&directory, fs::create_dir_all(&directory))?;
        at(&directory, sync_directory(&directory))?;
        Ok(Self { directory })
    }

    /// Removes the records of runs that were last written to longer than `age` ago: their
    /// coordinator died before it could say that they are needed no more.
    ///
    /// # Errors
    /// The register cannot be listed.
    pub fn expire(&mut self, age: Duration) -> Result<(), RegisterError> {
        for entry in at(&self.directory, fs::read_dir(&self.directory))?.flatten() {
            let written = entry.metadata().and_then(|metadata| metadata.modified());
            let is_old = written.is_ok_and(|at| at.elapsed().is_ok_and(|elapsed| elapsed > age));
            let run = entry
                .file_name()
                .to_str()
                .and_then(|name| name.parse().ok());
            if let (true, Some(run)) = (is_old, run) {
                self.forget(run)?;
            }
        }
        Ok(())
    }

    fn run_directory(&self, run: Uuid) -> PathBuf {
        self.directory.join(run.to_string())
    }

    fn read(path: &Path) -> Result<Option<RecordValue>, RegisterError> {
        match fs::read_to_string(path) {
            Ok(text) => match read_value(&text) {
                Some(value) => Ok(Some(value)),
                None => Err(RegisterError::Corrupt {
                    path: path.to_owned(),
                }),
            },
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(RegisterError::Io {
                path: path.to_owned(),
                error,
            }),
        }
    }
}

impl Register for FileRegister {
    fn decide(
        &mut self,
        run: Uuid,
        key: RecordKey,
        value: RecordValue,
    ) -> Result<RecordValue, RegisterError> {
        if !fits(key, value) {
            return Err(RegisterError::Value { value });
        }
        let directory = self.run_directory(run);
        let path = directory.join(match key {
            RecordKey::Group => "group".to_owned(),
            RecordKey::Vm(vm) => format!("vm-{vm}"),
        });
        if !directory.exists() {
            at(&directory, fs::create_dir_all(&directory))?;
            at(&self.directory, sync_directory(&self.directory))?;
        }
        let temporary = path.with_extension(format!("new-{}", Uuid::new_v4()));
        let written = (|| {
            let mut file = fs::File::create_new(&temporary)?;
            file.write_all(text(value).as_bytes())?;
            file.write_all(b"\n")?;
            file.sync_all()?;
            fs::hard_link(&temporary, &path)
        })();
        let _ = fs::remove_file(&temporary);
        match written {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => {
                return Err(RegisterError::Io {
                    path: temporary,
                    error,
                });
            }
        }
        at(&directory, sync_directory(&directory))?;
        Self::read(&path)?.ok_or(RegisterError::Corrupt { path })
    }

    fn records(&self, run: Uuid) -> Result<Vec<(RecordKey, RecordValue)>, RegisterError> {
        let directory = self.run_directory(run);
        let entries = match fs::read_dir(&directory) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => {
                return Err(RegisterError::Io {
                    path: directory,
                    error,
                });
            }
        };
        let mut records = Vec::new();
        for entry in entries {
            let entry = at(&directory, entry)?;
            let name = entry.file_name();
            let name = name.to_string_lossy();
            let key = match name.strip_prefix("vm-").map(str::parse) {
                Some(Ok(vm)) => RecordKey::Vm(vm),
                None if name == "group" => RecordKey::Group,
                // What a crash left of a record that was never linked.
                _ => continue,
            };
            if let Some(value) = Self::read(&entry.path())? {
                records.push((key, value));
            }
        }
        records.sort_by_key(|(key, _)| *key);
        Ok(records)
    }

    fn forget(&mut self, run: Uuid) -> Result<(), RegisterError> {
        let directory = self.run_directory(run);
        match fs::remove_dir_all(&directory) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(RegisterError::Io {
                path: directory,
                error,
            }),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_record_stands_across_restarts() {
        let directory = tempfile::tempdir().expect("a directory");
        let open = || FileRegister::open(directory.path().join("register")).expect("opens");
        let (run, vm) = (Uuid::from_u128(1), RecordKey::Vm(Uuid::from_u128(2)));
        let decide = |key, value| open().decide(run, key, value).expect("decides");
        assert_eq!(
            decide(RecordKey::Group, RecordValue::Abort),
            RecordValue::Abort
        );
        assert_eq!(
            decide(RecordKey::Group, RecordValue::Commit),
            RecordValue::Abort
        );
        assert_eq!(decide(vm, RecordValue::Source), RecordValue::Source);
        let all = vec![
            (RecordKey::Group, RecordValue::Abort),
            (vm, RecordValue::Source),
        ];
        assert_eq!(open().records(run).expect("reads"), all);
        assert!(
            open()
                .decide(run, RecordKey::Group, RecordValue::Source)
                .is_err()
        );
        open().forget(run).expect("forgets");
        assert_eq!(open().records(run).expect("reads"), []);
        open().forget(run).expect("is idempotent");
        assert_eq!(decide(vm, RecordValue::Source), RecordValue::Source);
        open().expire(Duration::from_secs(60)).expect("lists");
        assert_eq!(open().records(run).expect("reads").len(), 1);
        open().expire(Duration::ZERO).expect("lists");
        assert_eq!(open().records(run).expect("reads"), []);
    }

    #[test]
    fn many_at_once_agree() {
        let directory = tempfile::tempdir().expect("a directory");
        let run = Uuid::from_u128(1);
        let answers: Vec<RecordValue> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..8)
                .map(|i| {
                    let path = directory.path().join("register");
                    scope.spawn(move || {
                        let value = if i % 2 == 0 {
                            RecordValue::Commit
                        } else {
                            RecordValue::Abort
                        };
                        let mut register = FileRegister::open(path).expect("opens");
                        register
                            .decide(run, RecordKey::Group, value)
                            .expect("decides")
                    })
                })
                .collect();
            threads
                .into_iter()
                .map(|thread| thread.join().expect("no panic"))
                .collect()
        });
        assert!(
            answers.windows(2).all(|pair| pair[0] == pair[1]),
            "{answers:?}"
        );
    }

    #[test]
    fn a_full_disk_is_said() {
        let error = FileRegister::open(PathBuf::from("/proc/none")).expect_err("not writable");
        assert!(error.to_string().contains("/proc/none"), "{error}");
    }
}
