//! KVM or TCG, chosen by really trying: a tiny guest must tick.
//!
//! /dev/kvm may be missing, closed to us, or (nested, paravirtual) open but unable to run a guest,
//! so its presence says little.

use std::fmt;
use std::fs::File;
use std::io;
use std::str::FromStr;
use std::time::Duration;

use serde::Serialize;

use super::{Launch, QemuError, Role};
use crate::guest::GuestSpec;
use crate::process::{Isolation, ProcessError};
use crate::ticks::{Collector, TickError};

const KVM: &str = "/dev/kvm";
const TRY_FOR: Duration = Duration::from_secs(5);
const REQUIRE: &str = "MUSTER_REQUIRE_KVM";

/// What executes a guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Accel {
    /// The kernel's KVM.
    Kvm,
    /// QEMU's own translator.
    Tcg,
}

impl fmt::Display for Accel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Kvm => "kvm",
            Self::Tcg => "tcg",
        })
    }
}

/// What the user asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum AccelChoice {
    /// KVM where it works, else TCG.
    #[default]
    Auto,
    /// KVM or nothing.
    Kvm,
    /// TCG, even where KVM works.
    Tcg,
}

/// A word that names no accelerator.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("unknown accelerator `{0}`; expected `auto`, `kvm` or `tcg`")]
pub struct UnknownAccel(String);

impl FromStr for AccelChoice {
    type Err = UnknownAccel;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "auto" => Ok(Self::Auto),
            "kvm" => Ok(Self::Kvm),
            "tcg" => Ok(Self::Tcg),
            _ => Err(UnknownAccel(text.to_owned())),
        }
    }
}

/// Why no guest can be executed as asked.
#[derive(Debug, thiserror::Error)]
pub enum AccelError {
    /// KVM is asked for and does not work.
    #[error("KVM is required ({asked_by}), but {reason}")]
    NoKvm {
        /// Who requires it.
        asked_by: &'static str,
        /// What is wrong with it.
        reason: String,
    },
    /// QEMU itself cannot be used.
    #[error(transparent)]
    Qemu(#[from] QemuError),
    /// The trial could not be made.
    #[error("cannot try KVM: {0}")]
    Trial(#[source] io::Error),
}

/// The accelerator to use, and why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChosenAccel {
    /// The accelerator.
    pub accel: Accel,
    /// One line for the user.
    pub reason: String,
}

/// Whether `MUSTER_REQUIRE_KVM=1` forbids to do without KVM.
#[must_use]
pub fn kvm_required() -> bool {
    std::env::var(REQUIRE).is_ok_and(|value| !value.is_empty() && value != "0")
}

/// Chooses the accelerator.
///
/// # Errors
/// If KVM is required, by `choice` or by `MUSTER_REQUIRE_KVM=1`, and does not work.
pub fn choose(choice: AccelChoice) -> Result<ChosenAccel, AccelError> {
    super::installed()?;
    if choice == AccelChoice::Tcg {
        return Ok(ChosenAccel {
            accel: Accel::Tcg,
            reason: "TCG, as asked".to_owned(),
        });
    }
    let asked_by = match choice {
        AccelChoice::Kvm => Some("asked for"),
        _ if kvm_required() => Some("MUSTER_REQUIRE_KVM is set"),
        _ => None,
    };
    match (try_kvm()?, asked_by) {
        (Ok(took), _) => Ok(ChosenAccel {
            accel: Accel::Kvm,
            reason: format!(
                "KVM: a guest ticked {} ms after its start",
                took.as_millis()
            ),
        }),
        (Err(reason), Some(asked_by)) => Err(AccelError::NoKvm { asked_by, reason }),
        (Err(reason), None) => Ok(ChosenAccel {
            accel: Accel::Tcg,
            reason: format!("TCG, because {reason}"),
        }),
    }
}

/// Boots a tiny guest under KVM: how long it took to tick, or what is wrong.
///
/// # Errors
/// If it could not even be tried.
pub fn try_kvm() -> Result<Result<Duration, String>, AccelError> {
    if let Err(error) = File::options().read(true).write(true).open(KVM) {
        return Ok(Err(format!("{KVM} cannot be opened: {error}")));
    }
    let directory = tempfile::Builder::new()
        .prefix("muster-kvm-")
        .tempdir()
        .map_err(AccelError::Trial)?;
    let collector = Collector::start(directory.path()).map_err(AccelError::Trial)?;
    let spec: GuestSpec = "trial:4MiB:1MB/s:64KiB"
        .parse()
        .map_err(|error| AccelError::Trial(io::Error::other(error)))?;
    let ticks = collector
        .listen(&spec.name, "here", spec.tick_period())
        .map_err(|error| AccelError::Trial(io::Error::other(error)))?;
    let launch = Launch::new(&spec, Accel::Kvm, directory.path(), "here", ticks)?;
    let isolation = Isolation {
        netns: None,
        log: Some(directory.path().join("log")),
    };
    let started = crate::clock::Micros::now();
    let qmp = directory.path().join("qmp");
    match launch.start(Role::Boot, &qmp, &isolation) {
        Ok(mut qemu) => match collector.wait_for_tick(&spec.name, "here", TRY_FOR) {
            Ok(at) => Ok(Ok(at.since(started))),
            Err(TickError::Silent { .. }) => Ok(Err(match qemu.process.must_run() {
                Err(error) => error.to_string(),
                Ok(()) => format!("a guest under KVM did not tick within {TRY_FOR:?}"),
            })),
            Err(error) => Err(AccelError::Trial(io::Error::other(error))),
        },
        Err(QemuError::Process(error @ ProcessError::Ended { .. })) => Ok(Err(error.to_string())),
        Err(error @ QemuError::Monitor { .. }) => Ok(Err(error.to_string())),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn accelerators_are_read() {
        assert_eq!("auto".parse(), Ok(AccelChoice::Auto));
        let error = "xen".parse::<AccelChoice>().unwrap_err();
        assert!(
            error
                .to_string()
                .contains("expected `auto`, `kvm` or `tcg`")
        );
    }
}
