//! Bad days: what is wrong before the move begins, or becomes wrong on the way, without anybody
//! dying. Each is said in one clear line, before anything is moved or after a clean roll-back.

use std::fmt;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::mount::{MntFlags, MsFlags, mount, umount2};

use super::aftermath::{Asker, Baseline};
use super::log::{Entry, Log, What};
use super::play::lab_spec;
use super::steer::{At, Coordinator, Said};
use sidecar::protocol::types::Transport;

use crate::guest::GuestSpec;
use crate::lab::verify::verify_stopped;
use crate::lab::{Lab, LabError};
use crate::qemu::{Accel, installed};
use crate::signals::Interrupt;

const FROM: &str = "a";
const TO: &str = "b";
const WITNESS: &str = "w";
const END_LIMIT: Duration = Duration::from_secs(40);
const SETTLE_LIMIT: Duration = Duration::from_secs(10);
const TICKING: Duration = Duration::from_millis(250);
const LOOK_EVERY: Duration = Duration::from_millis(20);
/// Room of a state directory that can be filled.
const STATE_BYTES: usize = 8 << 20;

/// What is wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BadDay {
    /// The destination's template names no program.
    NoProgram,
    /// The destination's QEMU ends at once.
    BadOption,
    /// Another machine type in the destination's template.
    WrongMachine,
    /// Another UUID there.
    WrongUuid,
    /// Another size of memory there.
    WrongMemory,
    /// Somebody else has the stream's port.
    PortInUse,
    /// The disk under the source's state directory is full before the move.
    DiskFullBefore,
    /// It is full when the VMs are held: the note before the release cannot be written.
    DiskFullHeld,
    /// The disk under the destination's is full from the beginning of its preparation.
    DiskFullPreparing,
    /// The register's is full when every VM has arrived; later there is room again.
    RegisterFull,
}

impl BadDay {
    /// All of them.
    pub const ALL: [Self; 10] = [
        Self::NoProgram,
        Self::BadOption,
        Self::WrongMachine,
        Self::WrongUuid,
        Self::WrongMemory,
        Self::PortInUse,
        Self::DiskFullBefore,
        Self::DiskFullHeld,
        Self::DiskFullPreparing,
        Self::RegisterFull,
    ];

    /// The exit code, and words that the reason must contain.
    fn expected(self) -> (u8, &'static str) {
        match self {
            Self::NoProgram => (2, "cannot be started"),
            Self::BadOption => (2, "see its log"),
            Self::WrongMachine => (2, "machine type"),
            Self::WrongUuid => (2, "UUID"),
            Self::WrongMemory => (2, "set `-m` in its template"),
            Self::PortInUse => (1, "is the port taken?"),
            Self::DiskFullBefore => (1, "free in the sidecar's state directory"),
            Self::DiskFullHeld | Self::DiskFullPreparing => (2, "full?"),
            Self::RegisterFull => (0, ""),
        }
    }

    fn disk(self) -> Option<&'static str> {
        match self {
            Self::DiskFullBefore | Self::DiskFullHeld => Some(FROM),
            Self::DiskFullPreparing => Some(TO),
            Self::RegisterFull => Some(WITNESS),
            _ => None,
        }
    }

    /// Changes the destination's configuration.
    fn edit(self, text: String, guest: &GuestSpec) -> Result<String> {
        let qemu = installed()?;
        let replaced = match self {
            Self::NoProgram => text.replace(
                &format!("\"{}\"", qemu.program),
                "\"/nonexistent/qemu-system-x86_64\"",
            ),
            Self::BadOption => text.replace("-no-user-config", "-no-such-option"),
            Self::WrongMachine => text.replace("pc-i440fx-", "pc-q35-"),
            Self::WrongUuid => text.replace(
                &guest.uuid.to_string(),
                "00000000-0000-4000-8000-000000000001",
            ),
            Self::WrongMemory => {
                let size = guest.memory.0 >> 20;
                text.replace(&format!("size={size}M"), &format!("size={}M", size * 2))
            }
            _ => return Ok(text),
        };
        ensure!(replaced != text, "the template holds nothing to get wrong");
        Ok(replaced)
    }
}

impl fmt::Display for BadDay {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::NoProgram => "template-names-no-program",
            Self::BadOption => "destination-ends-at-once",
            Self::WrongMachine => "wrong-machine-type",
            Self::WrongUuid => "wrong-uuid",
            Self::WrongMemory => "wrong-memory-size",
            Self::PortInUse => "stream-port-in-use",
            Self::DiskFullBefore => "disk-full-before",
            Self::DiskFullHeld => "disk-full-when-held",
            Self::DiskFullPreparing => "disk-full-when-preparing",
            Self::RegisterFull => "register-full-when-arrived",
        })
    }
}

/// A small file system that can be filled; it goes with this.
#[derive(Debug)]
struct SmallDisk {
    path: PathBuf,
}

impl SmallDisk {
    fn mount(path: &Path) -> Result<Self> {
        std::fs::create_dir_all(path)?;
        let options = format!("size={STATE_BYTES}");
        let none: Option<&str> = None;
        mount(
            none,
            path,
            Some("tmpfs"),
            MsFlags::empty(),
            Some(options.as_str()),
        )
        .with_context(|| format!("cannot mount a tmpfs on {}", path.display()))?;
        Ok(Self {
            path: path.to_owned(),
        })
    }

    fn ballast(&self) -> PathBuf {
        self.path.join("ballast")
    }

    fn fill(&self) -> Result<()> {
        let full = std::fs::write(self.ballast(), vec![1; STATE_BYTES * 2]);
        ensure!(full.is_err(), "{} cannot be filled", self.path.display());
        Ok(())
    }

    fn empty(&self) -> Result<()> {
        Ok(std::fs::remove_file(self.ballast())?)
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        // Its files go with the laboratory's directory otherwise.
        let _ = umount2(&self.path, MntFlags::MNT_DETACH);
    }
}

/// Plays one bad day; what was said.
///
/// # Errors
/// What is not as it must be, and what happened.
pub fn play(day: BadDay, accel: Accel, interrupt: &Interrupt) -> Result<String> {
    let spec = lab_spec(accel, 2, Some(WITNESS), Transport::Relay)?;
    let mut lab = Lab::build(spec, interrupt)?;
    let mut disk = None;
    if let Some(host) = day.disk() {
        lab.stop_sidecar(host);
        let state = lab.host_directory(host).join("state");
        disk = Some(SmallDisk::mount(&state)?);
        lab.start_sidecar(host)?;
    }
    if day == BadDay::PortInUse {
        return port_in_use(&mut lab);
    }
    let guest = lab.spec.guests[0].clone();
    let mut edited = Ok(());
    lab.start_sidecar_with(TO, |text| match day.edit(text.clone(), &guest) {
        Ok(text) => text,
        Err(error) => {
            edited = Err(error);
            text
        }
    })?;
    edited?;
    let log = Log::default();
    let result = move_and_check(day, &lab, disk.as_ref(), &log);
    result.map_err(|error| {
        let begin = log
            .entries()
            .first()
            .map_or_else(crate::clock::Micros::now, |e| e.at);
        error.context(format!("{day}:\n{}", log.text(begin)))
    })
}

fn port_in_use(lab: &mut Lab) -> Result<String> {
    lab.stop_sidecar(TO);
    let host = lab.network.host(TO)?;
    let address = (host.address(), 4601);
    let taken = host.enter(|| TcpListener::bind(address))??;
    let said = match lab.start_sidecar(TO) {
        Err(LabError::Sidecar { said, .. }) => said,
        Err(error) => return Err(error.into()),
        Ok(()) => bail!("the sidecar started although its port is taken"),
    };
    let words = BadDay::PortInUse.expected().1;
    ensure!(said.contains(words), "it said: {said}");
    drop(taken);
    lab.start_sidecar(TO)?;
    Ok(said)
}

fn move_and_check(day: BadDay, lab: &Lab, disk: Option<&SmallDisk>, log: &Log) -> Result<String> {
    let baseline = Baseline::read(lab, FROM)?;
    let asker = Asker::new(lab);
    if day == BadDay::DiskFullBefore {
        disk.context("a disk")?.fill()?;
    }
    let file = lab.application_file(FROM, TO)?;
    let mut coordinator = Coordinator::start(&file, lab.directory(), log)?;
    let fill_at = match day {
        BadDay::DiskFullPreparing => Some(At::SourcePrepared),
        BadDay::DiskFullHeld => Some(At::Held),
        BadDay::RegisterFull => Some(At::Arrived),
        _ => None,
    };
    let (code, reason) = drive(
        &mut coordinator,
        log,
        |at| {
            if Some(at) == fill_at {
                disk.context("a disk")?.fill()?;
            }
            Ok(Some(at) == fill_at && day == BadDay::RegisterFull)
        },
        || disk.context("a disk")?.empty(),
    )?;
    let (expected, words) = day.expected();
    let reason = reason.unwrap_or_default();
    ensure!(
        code == expected && reason.contains(words),
        "exit code {code}, {reason}; expected {expected} and `{words}`"
    );
    let host = if expected == 0 { TO } else { FROM };
    let by = Instant::now() + SETTLE_LIMIT;
    loop {
        let mut wrong = asker.open();
        let mut places = Vec::new();
        for guest in &lab.spec.guests {
            let hosts = lab.ticks.running(&guest.name, TICKING);
            if hosts != [host] {
                wrong.push(format!("{} runs at {hosts:?}, not {host}", guest.name));
            }
            places.push((guest.name.clone(), Some(host.to_owned())));
        }
        if wrong.is_empty() {
            wrong = baseline.differences(lab, &places)?;
        }
        if wrong.is_empty() {
            break;
        }
        ensure!(Instant::now() < by, "{}", wrong.join("; "));
        std::thread::sleep(LOOK_EVERY);
    }
    for guest in &lab.spec.guests {
        let record = lab.ticks.record(&guest.name);
        ensure!(record.overlaps().is_empty(), "{} ran twice", guest.name);
        ensure!(record.breaks().is_empty(), "{} lost ticks", guest.name);
        verify_stopped(lab, &guest.name, host)?;
    }
    Ok(reason)
}

/// Drives a move to its end. `at` is called wherever it stands still, and says whether the trouble
/// that follows is to be waited for and ended by `relieve`.
fn drive(
    coordinator: &mut Coordinator,
    log: &Log,
    mut at: impl FnMut(At) -> Result<bool>,
    relieve: impl FnOnce() -> Result<()>,
) -> Result<(u8, Option<String>)> {
    let mut relieve = Some(relieve);
    let mut passed = 0;
    loop {
        let next = log.wait(END_LIMIT, |entries: &[Entry]| {
            let mut points = entries.iter().filter_map(|entry| match &entry.what {
                What::Said(Said::At(at, _)) => Some(Ok(*at)),
                What::Said(Said::End(code, reason)) => Some(Err((*code, reason.clone()))),
                _ => None,
            });
            points.nth(passed)
        });
        passed += 1;
        match next {
            Some(Ok(point)) => {
                let trouble = at(point)?;
                coordinator.go_on();
                if trouble {
                    let named = |entries: &[Entry]| {
                        let mut words = entries.iter().filter_map(Entry::trouble);
                        words.next().map(str::to_owned)
                    };
                    ensure!(log.wait(END_LIMIT, named).is_some(), "no trouble was told");
                    relieve.take().context("relieved twice")?()?;
                }
            }
            Some(Err(end)) => return Ok(end),
            None => bail!("the move did not end within {END_LIMIT:?}"),
        }
    }
}
