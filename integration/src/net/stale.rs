//! Removal of namespaces, ours and those whose owner is gone.

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::fcntl::{Flock, FlockArg};
use nix::sys::signal::Signal;

use super::{NETNS, NetError, run};
use crate::process::PidFd;

const LOCKS: &str = "/run/muster-testbed";
const END_LIMIT: Duration = Duration::from_secs(5);

/// Takes the lock that says that the namespaces of `prefix` have an owner.
pub(super) fn claim(prefix: &str) -> Result<(Flock<File>, PathBuf), NetError> {
    let path = Path::new(LOCKS).join(prefix);
    let failed = |error| NetError::File {
        path: path.clone(),
        error,
    };
    fs::create_dir_all(LOCKS).map_err(failed)?;
    // Locked before it gets the name by which others find it.
    let unseen = Path::new(LOCKS).join(format!(".{prefix}"));
    let file = File::create(&unseen).map_err(failed)?;
    let lock = Flock::lock(file, FlockArg::LockExclusiveNonblock)
        .map_err(|(_, error)| failed(error.into()))?;
    fs::rename(&unseen, &path).map_err(failed)?;
    Ok((lock, path))
}

/// Removes the namespaces of testbeds that ended without doing so, with the processes in them.
/// Returns the prefixes of those testbeds.
///
/// # Errors
/// If the lock files cannot be listed.
pub fn remove_stale() -> Result<Vec<String>, NetError> {
    let mut removed = Vec::new();
    let locks = match fs::read_dir(LOCKS) {
        Ok(locks) => locks,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(removed),
        Err(error) => {
            let path = LOCKS.into();
            return Err(NetError::File { path, error });
        }
    };
    for entry in locks.flatten() {
        let Ok(prefix) = entry.file_name().into_string() else {
            continue;
        };
        if prefix.starts_with('.') {
            continue;
        }
        let Ok(file) = File::open(entry.path()) else {
            continue;
        };
        let Ok(_lock) = Flock::lock(file, FlockArg::LockExclusiveNonblock) else {
            continue;
        };
        for namespace in namespaces_of(&prefix) {
            remove_namespace(&namespace);
        }
        let _ = fs::remove_file(entry.path());
        removed.push(prefix);
    }
    Ok(removed)
}

fn namespaces_of(prefix: &str) -> Vec<String> {
    let start = format!("{prefix}-");
    fs::read_dir(NETNS)
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| entry.file_name().into_string().ok())
        .filter(|name| name.starts_with(&start))
        .collect()
}

/// Kills the processes in a namespace and removes it.
pub(super) fn remove_namespace(namespace: &str) {
    if let Ok(file) = File::open(Path::new(NETNS).join(namespace)) {
        let inside = || processes_in(&file);
        let ended: Vec<_> = inside()
            .into_iter()
            .filter_map(|pid| {
                let process = PidFd::open(pid).ok()?;
                // The number may have passed on between listing and opening.
                is_in(pid, &file).then_some(process)
            })
            .collect();
        for process in &ended {
            let _ = process.signal(Signal::SIGKILL);
        }
        for process in &ended {
            let _ = process.wait(END_LIMIT);
        }
    }
    let _ = run("ip", &["netns", "del", namespace]);
}

/// The processes whose first thread is in the namespace.
pub(super) fn processes_in(namespace: &File) -> Vec<u32> {
    fs::read_dir("/proc")
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter(|pid| is_in(*pid, namespace))
        .collect()
}

fn is_in(pid: u32, namespace: &File) -> bool {
    let (Ok(theirs), Ok(this)) = (
        fs::metadata(format!("/proc/{pid}/ns/net")),
        namespace.metadata(),
    ) else {
        return false;
    };
    (theirs.dev(), theirs.ino()) == (this.dev(), this.ino())
}
