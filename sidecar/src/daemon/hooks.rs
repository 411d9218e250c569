//! Programs of the host that are run around a switchover: for tunnels, names, load balancers.
//!
//! They stand in the host's own configuration, and are told in their environment what it is about. The
//! one before is waited for, while the VM still runs; it can refuse the switchover. The one after cannot:
//! what it says is only logged.

use std::fs::OpenOptions;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

use super::channel::HalfKey;
use super::storage::Job;
use super::{Daemon, log};
use crate::migration::Now;
use crate::protocol::types::{Phase, Role};

/// The group waits for it.
const BEFORE_WITHIN: Duration = Duration::from_secs(2);
const AFTER_WITHIN: Duration = Duration::from_secs(60);
/// How often it is looked whether it has ended.
const LOOK: Duration = Duration::from_millis(5);

/// One that is to be run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hook {
    /// Program and arguments.
    pub command: Vec<String>,
    /// What it is about.
    pub environment: Vec<(&'static str, String)>,
    /// It ends within this time.
    pub within: Duration,
    /// Where its output goes.
    pub log: PathBuf,
}

impl Hook {
    /// Runs it to its end.
    ///
    /// # Errors
    /// It cannot be run, fails, or does not end in time.
    pub fn run(&self) -> Result<(), String> {
        let Some((program, arguments)) = self.command.split_first() else {
            return Ok(());
        };
        let cannot = |error: std::io::Error| {
            format!(
                "the hook {program} cannot be run: {error} (`[hooks]` in the sidecar's configuration)"
            )
        };
        let output = OpenOptions::new().create(true).append(true).open(&self.log);
        let output = output.map_err(cannot)?;
        let mut child = Command::new(program)
            .args(arguments)
            .envs(self.environment.iter().map(|(key, value)| (key, value)))
            .stdin(Stdio::null())
            .stdout(output.try_clone().map_err(cannot)?)
            .stderr(output)
            .process_group(0)
            .spawn()
            .map_err(cannot)?;
        let by = Instant::now() + self.within;
        loop {
            match child.try_wait() {
                Ok(Some(status)) if status.success() => return Ok(()),
                Ok(Some(status)) => {
                    let log = self.log.display();
                    return Err(format!("the hook {program} failed: {status} (see {log})"));
                }
                Ok(None) if Instant::now() < by => std::thread::sleep(LOOK),
                Ok(None) => {
                    // What it has started goes with it.
                    let group = i32::try_from(child.id()).map(Pid::from_raw);
                    let _ = group.map(|group| killpg(group, Signal::SIGKILL));
                    let _ = child.wait();
                    return Err(format!(
                        "the hook {program} did not end within {} s",
                        self.within.as_secs()
                    ));
                }
                Err(error) => return Err(cannot(error)),
            }
        }
    }
}

impl Daemon {
    fn hook(
        &self,
        key: HalfKey,
        command: &[String],
        result: &str,
        within: Duration,
    ) -> Option<Hook> {
        let half = self.runs.get(&key.0)?.run.halves[key.1].half();
        let role = match half.role {
            Role::Source => "source",
            Role::Destination => "destination",
        };
        let environment = vec![
            ("MUSTER_VM", half.name.clone()),
            ("MUSTER_UUID", half.uuid.to_string()),
            ("MUSTER_RUN", key.0.to_string()),
            ("MUSTER_ROLE", role.to_owned()),
            ("MUSTER_RESULT", result.to_owned()),
        ];
        Some(Hook {
            command: command.to_vec(),
            environment,
            within,
            log: self.config.runtime_dir.join("hooks.log"),
        })
    }

    /// Source: the VM is about to be armed.
    pub(super) fn hook_before(&mut self, now: Now, key: HalfKey) {
        let command = &self.config.hooks.before_switchover;
        let Some(hook) = self.hook(key, command, "", BEFORE_WITHIN) else {
            return;
        };
        if let Err(error) = self.storage.submit(Job::Hook(hook, Some(key))) {
            let entry = self.runs.get_mut(&key.0);
            if let Some(source) = entry.and_then(|e| e.run.halves[key.1].source_mut()) {
                source.hook_ended(now, Err(error));
            }
        }
    }

    /// A run is over.
    pub(super) fn hook_after(&mut self, key: HalfKey) {
        let command = &self.config.hooks.after_switchover;
        let Some(entry) = self.runs.get(&key.0).filter(|_| !command.is_empty()) else {
            return;
        };
        let result = match entry.run.halves[key.1].half().phase() {
            Phase::Committed => "committed",
            Phase::RolledBack => "rolled-back",
            _ => "failed",
        };
        if let Some(hook) = self.hook(key, command, result, AFTER_WITHIN) {
            if let Err(error) = self.storage.submit(Job::Hook(hook, None)) {
                log(&format!("the hook after a switchover was not run: {error}"));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hook_is_told_what_it_is_about_and_ends_in_time() {
        let directory = tempfile::tempdir().expect("a directory");
        let log = directory.path().join("log");
        let hook = |script: &str, ms| Hook {
            command: ["/bin/sh", "-c", script].map(str::to_owned).into(),
            environment: vec![("MUSTER_VM", "db".to_owned())],
            within: Duration::from_millis(ms),
            log: log.clone(),
        };
        assert_eq!(hook("echo about $MUSTER_VM", 10_000).run(), Ok(()));
        let said = std::fs::read_to_string(&log).expect("a log");
        assert_eq!(said, "about db\n");
        let error = hook("exit 3", 10_000).run().expect_err("it fails");
        assert!(error.contains("exit status: 3"), "{error}");
        let begun = Instant::now();
        let error = hook("sleep 60 & wait", 50).run().expect_err("it is late");
        assert!(error.contains("did not end"), "{error}");
        assert!(begun.elapsed() < Duration::from_secs(30));
        let mut none = hook("", 10_000);
        none.command = vec!["/no/such/program".into()];
        let error = none.run().expect_err("none");
        assert!(error.contains("[hooks]"), "{error}");
    }
}
