//! QEMU processes: started, watched, killed; never by a number that may have passed on.

use std::fs::{self, OpenOptions};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::sys;

/// A process that is watched through its pidfd.
#[derive(Debug)]
pub struct Process {
    /// Its number.
    pub pid: i32,
    /// Its start in clock ticks since boot.
    pub started: u64,
    /// Readable when it has ended.
    pub fd: OwnedFd,
    child: Option<Child>,
}

impl Process {
    /// Watches a process that was started by somebody else.
    ///
    /// # Errors
    /// It is gone.
    pub fn watch(pid: i32) -> io::Result<Self> {
        let fd = sys::pidfd_open(pid)?;
        let started = start_time(pid).ok_or(io::ErrorKind::NotFound)?;
        Ok(Self {
            pid,
            started,
            fd,
            child: None,
        })
    }

    /// Watches the process of a note, unless its number belongs to another one by now.
    ///
    /// # Errors
    /// It is gone.
    pub fn watch_same(pid: i32, started: u64) -> io::Result<Self> {
        let process = Self::watch(pid)?;
        if process.started == started {
            Ok(process)
        } else {
            Err(io::ErrorKind::NotFound.into())
        }
    }

    /// Watches a child of ours.
    ///
    /// # Errors
    /// The kernel cannot (older than 5.3); the child is killed then.
    pub fn of_child(mut child: Child) -> io::Result<Self> {
        let pid = i32::try_from(child.id()).map_err(io::Error::other)?;
        match Self::watch(pid) {
            Ok(process) => Ok(Self {
                child: Some(child),
                ..process
            }),
            Err(error) => {
                let _ = child.kill();
                let _ = child.wait();
                Err(error)
            }
        }
    }

    /// Kills it.
    pub fn kill(&self) {
        // Gone already is as good.
        let _ = sys::pidfd_kill(&self.fd, libc::SIGKILL);
    }

    /// Whether it has ended; takes its status then, so that no zombie stays.
    pub fn has_ended(&mut self) -> bool {
        match &mut self.child {
            Some(child) => !matches!(child.try_wait(), Ok(None)),
            None => is_readable(&self.fd),
        }
    }
}

fn start_time(pid: i32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let rest = stat.rsplit_once(')')?.1;
    rest.split_ascii_whitespace().nth(19)?.parse().ok()
}

/// A pidfd is when the last thread of its process has ended.
fn is_readable(fd: &OwnedFd) -> bool {
    let mut polled = [PollFd::new(fd.as_fd(), PollFlags::POLLIN)];
    matches!(poll(&mut polled, PollTimeout::ZERO), Ok(n) if n > 0)
}

/// The process that was started with exactly these arguments. A QEMU's are its own: the path of
/// its monitor is among them.
#[must_use]
pub fn find_by_arguments(arguments: &[String]) -> Option<i32> {
    let is_it = |pid: i32| {
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let line = line.strip_suffix(&[0]).unwrap_or(&line);
        let words = line.split(|byte| *byte == 0);
        words.eq(arguments.iter().map(String::as_bytes))
    };
    fs::read_dir("/proc")
        .ok()?
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .find(|pid| is_it(*pid))
}

/// Starts an incoming QEMU in a process group of its own, so that what ends the sidecar does not
/// end its guests. Its output goes to `log`.
///
/// # Errors
/// One line with the program and what to do.
pub fn spawn(arguments: &[String], log: &Path) -> Result<Child, String> {
    let Some((program, rest)) = arguments.split_first() else {
        return Err("the template of this VM is empty".into());
    };
    let output = OpenOptions::new()
        .create(true)
        .append(true)
        .open(log)
        .map_err(|error| format!("the log {} cannot be opened: {error}", log.display()))?;
    let errors = output
        .try_clone()
        .map_err(|error| format!("the log {} cannot be opened: {error}", log.display()))?;
    let mut command = Command::new(program);
    command
        .args(rest)
        .stdin(Stdio::null())
        .stdout(output)
        .stderr(errors)
        .process_group(0);
    sys::unblock_signals(&mut command);
    command
        .spawn()
        .map_err(|error| format!("`{program}` cannot be started: {error} (check the template)"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_child_is_watched_to_its_end() {
        let directory = tempfile::tempdir().expect("a directory");
        let log = directory.path().join("log");
        let arguments = ["sleep".to_owned(), "60".to_owned()];
        let mut process =
            Process::of_child(spawn(&arguments, &log).expect("starts")).expect("is watched");
        assert!(!process.has_ended());
        assert!(Process::watch_same(process.pid, process.started).is_ok());
        assert!(Process::watch_same(process.pid, process.started + 1).is_err());
        process.kill();
        while !process.has_ended() {
            std::thread::yield_now();
        }
        assert!(Process::watch_same(process.pid, process.started).is_err());
        let error = spawn(&["/no/such/qemu".to_owned()], &log).expect_err("no program");
        assert!(error.contains("/no/such/qemu"), "{error}");
    }
}
