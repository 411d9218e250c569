//! Processes that leave nothing behind.
//!
//! Each one is started as a session of its own by a thread that lives as long as the testbed, and
//! asks the kernel to be killed with that thread: so it ends with its guard, on a panic, and even
//! when the testbed itself is killed with SIGKILL. Processes of others (a QEMU that a sidecar
//! started) are held by [`PidFd`], which cannot hit the wrong process.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use crossbeam::channel::{Sender, bounded, unbounded};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::Signal;

use crate::sys;

/// Why a process could not be started or waited for.
#[derive(Debug, thiserror::Error)]
pub enum ProcessError {
    /// It could not be started.
    #[error("cannot start {name} ({program}): {error}")]
    Start {
        /// What it is for.
        name: String,
        /// The program.
        program: String,
        /// Why.
        error: io::Error,
    },
    /// It ended, and should not have.
    #[error("{name} ended: {how}{}", log_hint(.log))]
    Ended {
        /// What it was for.
        name: String,
        /// Its exit status or signal.
        how: String,
        /// The last lines that it wrote.
        log: String,
    },
    /// It did not end in time.
    #[error("{name} (process {pid}) did not end within {waited:?}")]
    StillRunning {
        /// What it is for.
        name: String,
        /// Its number.
        pid: u32,
        /// How long was waited.
        waited: Duration,
    },
    /// A system call failed.
    #[error("{name}: {error}")]
    System {
        /// What it is for.
        name: String,
        /// Why.
        error: io::Error,
    },
}

fn log_hint(log: &str) -> String {
    if log.is_empty() {
        String::new()
    } else {
        format!("; it wrote:\n{log}")
    }
}

/// How a process is to be started.
#[derive(Debug, Clone, Default)]
pub struct Isolation {
    /// The network namespace to run in; the testbed's own if there is none.
    pub netns: Option<Arc<File>>,
    /// Where its output and errors go; nowhere if there is none.
    pub log: Option<PathBuf>,
}

/// A process of ours; it is killed when this is dropped.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
    log: Option<PathBuf>,
}

impl Process {
    /// Starts `command`. Its standard streams are replaced; standard input is empty.
    ///
    /// # Errors
    /// If its log cannot be opened or it cannot be started.
    pub fn start(
        name: &str,
        mut command: Command,
        isolation: &Isolation,
    ) -> Result<Self, ProcessError> {
        let program = command.get_program().to_string_lossy().into_owned();
        let failed = |error| ProcessError::Start {
            name: name.to_owned(),
            program: program.clone(),
            error,
        };
        let (out, err) = match &isolation.log {
            Some(path) => {
                let file = File::options()
                    .append(true)
                    .create(true)
                    .open(path)
                    .map_err(failed)?;
                (Stdio::from(file.try_clone().map_err(failed)?), file.into())
            }
            None => (Stdio::null(), Stdio::null()),
        };
        command.stdin(Stdio::null()).stdout(out).stderr(err);
        sys::isolate(&mut command, isolation.netns.clone());
        Ok(Self {
            name: name.to_owned(),
            child: start_for_life(command).map_err(failed)?,
            log: isolation.log.clone(),
        })
    }

    /// Its process number. It is not reused before this is dropped.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What it was started as.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Sends it a signal; nothing happens if it has ended.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn signal(&mut self, signal: Signal) -> Result<(), ProcessError> {
        if self.ended()?.is_some() {
            return Ok(());
        }
        self.pidfd()?
            .signal(signal)
            .map_err(|error| self.system(error))
    }

    /// How it ended, if it has.
    ///
    /// # Errors
    /// If the kernel does not know it.
    pub fn ended(&mut self) -> Result<Option<ExitStatus>, ProcessError> {
        self.child.try_wait().map_err(|error| self.system(error))
    }

    /// Fails with its last words if it has ended.
    ///
    /// # Errors
    /// If it has ended.
    pub fn must_run(&mut self) -> Result<(), ProcessError> {
        match self.ended()? {
            None => Ok(()),
            Some(status) => Err(ProcessError::Ended {
                name: self.name.clone(),
                how: describe(status),
                log: self.last_words(),
            }),
        }
    }

    /// Waits until it ends by itself.
    ///
    /// # Errors
    /// If it still runs after `limit`.
    pub fn wait(&mut self, limit: Duration) -> Result<ExitStatus, ProcessError> {
        if let Some(status) = self.ended()? {
            return Ok(status);
        }
        let ended = self.pidfd()?.wait(limit);
        if !ended.map_err(|error| self.system(error))? {
            return Err(ProcessError::StillRunning {
                name: self.name.clone(),
                pid: self.pid(),
                waited: limit,
            });
        }
        self.child.wait().map_err(|error| self.system(error))
    }

    /// Kills it, with what it started in its own process group, and waits for its end.
    pub fn kill(&mut self) {
        if let Ok(None) = self.child.try_wait() {
            if let Ok(pid) = i32::try_from(self.pid()) {
                // Not waited for yet, so the number is still its own.
                let _ = nix::sys::signal::killpg(nix::unistd::Pid::from_raw(pid), Signal::SIGKILL);
            }
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }

    /// A descriptor for it that outlives this.
    ///
    /// # Errors
    /// If it has been waited for.
    pub fn pidfd(&self) -> Result<PidFd, ProcessError> {
        PidFd::open(self.pid()).map_err(|error| self.system(error))
    }

    /// The last lines of its log.
    #[must_use]
    pub fn last_words(&self) -> String {
        let text = self
            .log
            .as_ref()
            .and_then(|path| std::fs::read(path).ok())
            .unwrap_or_default();
        let text = String::from_utf8_lossy(&text).into_owned();
        let lines: Vec<_> = text.lines().collect();
        lines[lines.len().saturating_sub(5)..].join("\n")
    }

    fn system(&self, error: io::Error) -> ProcessError {
        ProcessError::System {
            name: self.name.clone(),
            error,
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

/// A process by descriptor: never another one that got its number.
#[derive(Debug)]
pub struct PidFd(OwnedFd);

impl PidFd {
    /// Opens the process that has the number `pid` now.
    ///
    /// # Errors
    /// If there is none.
    pub fn open(pid: u32) -> io::Result<Self> {
        sys::pidfd_open(pid).map(Self)
    }

    /// Sends a signal.
    ///
    /// # Errors
    /// If it has ended, or the kernel refuses.
    pub fn signal(&self, signal: Signal) -> io::Result<()> {
        sys::pidfd_send_signal(self.0.as_fd(), signal)
    }

    /// Waits for its end; `false` if it did not come within `limit`.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn wait(&self, limit: Duration) -> io::Result<bool> {
        let deadline = Instant::now() + limit;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let timeout = PollTimeout::try_from(left.as_millis().saturating_add(1))
                .unwrap_or(PollTimeout::MAX);
            match poll(
                &mut [PollFd::new(self.0.as_fd(), PollFlags::POLLIN)],
                timeout,
            ) {
                Ok(0) if left.is_zero() => return Ok(false),
                Ok(0) | Err(nix::Error::EINTR) => {}
                Ok(_) => return Ok(true),
                Err(error) => return Err(error.into()),
            }
        }
    }
}

fn describe(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exit status {code}"),
        (None, Some(signal)) => Signal::try_from(signal)
            .map_or_else(|_| format!("signal {signal}"), |name| name.to_string()),
        (None, None) => status.to_string(),
    }
}

type Order = (Command, Sender<io::Result<Child>>);

/// Starts `command` from the one thread that never ends before the testbed does.
fn start_for_life(command: Command) -> io::Result<Child> {
    static STARTER: OnceLock<Sender<Order>> = OnceLock::new();
    let starter = STARTER.get_or_init(|| {
        let (sender, orders) = unbounded::<Order>();
        std::thread::spawn(move || {
            for (mut command, reply) in orders {
                let _ = reply.send(command.spawn());
            }
        });
        sender
    });
    let gone = |_| io::Error::other("the thread that starts processes is gone");
    let (reply, answer) = bounded(1);
    starter.send((command, reply)).map_err(|_| gone(()))?;
    answer.recv().map_err(|_| gone(()))?
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        command
    }

    #[test]
    fn a_dropped_process_is_gone_with_its_children() {
        let directory = tempfile::tempdir().unwrap();
        let log = directory.path().join("log");
        let isolation = Isolation {
            netns: None,
            log: Some(log.clone()),
        };
        let process = Process::start("sh", shell("sleep 600 & echo $!; wait"), &isolation).unwrap();
        let deadline = Instant::now() + Duration::from_secs(10);
        let child = loop {
            let text = std::fs::read_to_string(&log).unwrap_or_default();
            if text.ends_with('\n') {
                break text.trim().parse().unwrap();
            }
            assert!(Instant::now() < deadline);
            std::thread::yield_now();
        };
        let (parent, child) = (process.pidfd().unwrap(), PidFd::open(child).unwrap());
        drop(process);
        assert!(parent.wait(Duration::ZERO).unwrap());
        assert!(child.wait(Duration::from_secs(5)).unwrap());
    }

    #[test]
    fn an_unexpected_end_is_told_with_the_last_words() {
        let directory = tempfile::tempdir().unwrap();
        let isolation = Isolation {
            netns: None,
            log: Some(directory.path().join("log")),
        };
        let script = shell("echo no room; exit 3");
        let mut process = Process::start("guest web", script, &isolation).unwrap();
        assert_eq!(
            process.wait(Duration::from_secs(10)).unwrap().code(),
            Some(3)
        );
        let error = process.must_run().unwrap_err().to_string();
        assert_eq!(error, "guest web ended: exit status 3; it wrote:\nno room");
    }

    #[test]
    fn a_process_that_does_not_end_is_named() {
        let mut process =
            Process::start("sleeper", shell("exec sleep 600"), &Isolation::default()).unwrap();
        let error = process.wait(Duration::from_millis(20)).unwrap_err();
        assert!(matches!(error, ProcessError::StillRunning { .. }));
        process.signal(Signal::SIGTERM).unwrap();
        let status = process.wait(Duration::from_secs(10)).unwrap();
        assert_eq!(describe(status), "SIGTERM");
    }
}
