//! QEMU processes for our guests.
//!
//! A [`Launch`] is one VM on one host: it makes the command vector, either to be run by the testbed
//! itself or to stand in a sidecar's configuration, where the sidecar puts the path of its own QMP
//! socket in the place of `{qmp}`. Every QEMU has a second monitor, the testbed's, so that Muster
//! and the testbed never compete for one.

pub mod accel;
mod disks;

use std::io::{self, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};
use nix::sys::memfd::{MFdFlags, memfd_create};
use sidecar::protocol::types::QemuBuild;

pub use accel::{Accel, AccelChoice, AccelError, ChosenAccel};
pub use disks::raw_copy;

use crate::guest::{GuestSpec, TICK_PORT};
use crate::process::{Isolation, Process, ProcessError};
use crate::qmp::{Qmp, QmpError};

/// Stands in a command template for the path of the QMP socket.
pub const QMP_PLACEHOLDER: &str = "{qmp}";
/// Block node of a guest's disk.
pub const DISK_NODE: &str = "disk0";
/// The oldest QEMU that can be held.
pub const MIN_VERSION: (u32, u32) = (8, 1);
const MONITOR_LIMIT: Duration = Duration::from_secs(10);
const END_LIMIT: Duration = Duration::from_millis(500);

/// Why QEMU could not be used.
#[derive(Debug, thiserror::Error)]
pub enum QemuError {
    /// There is no such program.
    #[error(
        "cannot run {program}: {error}; install it with `apt-get install qemu-system-x86` or name another in MUSTER_QEMU"
    )]
    Missing {
        /// The program.
        program: String,
        /// Why.
        error: io::Error,
    },
    /// Its answers to -version or -machine help were not understood.
    #[error("{program} {option} did not tell {what}; it said: {said}")]
    Unknown {
        /// The program.
        program: String,
        /// The option asked with.
        option: &'static str,
        /// What was looked for.
        what: &'static str,
        /// What came.
        said: String,
    },
    /// It is too old.
    #[error(
        "{program} is version {found}; expected {}.{} or newer (on Debian 12: bookworm-backports)",
        MIN_VERSION.0, MIN_VERSION.1
    )]
    TooOld {
        /// The program.
        program: String,
        /// Its version.
        found: String,
    },
    /// The guest's ROM could not be written.
    #[error("cannot write the guest's ROM {path}: {error}")]
    Rom {
        /// The file.
        path: PathBuf,
        /// Why.
        error: io::Error,
    },
    /// The image of a guest's disk could not be made.
    #[error("cannot make the disk {path}: {error}")]
    Image {
        /// The file.
        path: PathBuf,
        /// Why.
        error: io::Error,
    },
    /// Memory that is to outlive QEMU could not be had.
    #[error("cannot allocate the memory of {guest}: {error}")]
    Memory {
        /// Whose.
        guest: String,
        /// Why.
        error: io::Error,
    },
    /// It did not start, or ended.
    #[error(transparent)]
    Process(#[from] ProcessError),
    /// Its monitor did not answer.
    #[error("{monitor}{}", hint(.said))]
    Monitor {
        /// What is wrong with the monitor.
        monitor: QmpError,
        /// What QEMU wrote.
        said: String,
    },
}

fn hint(said: &str) -> String {
    if said.is_empty() {
        String::new()
    } else {
        format!("; QEMU wrote:\n{said}")
    }
}

/// The QEMU that this machine has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Installed {
    /// The program.
    pub program: String,
    /// Its version, such as `10.0.2`.
    pub version: String,
    /// What `pc` stands for in it, such as `pc-i440fx-10.0`.
    pub machine: String,
    /// Whether it has Muster's patches.
    pub build: QemuBuild,
}

/// Finds QEMU: `MUSTER_QEMU`, or `qemu-system-x86_64` on the path. Asked once per process.
///
/// # Errors
/// If there is none, or it is too old.
pub fn installed() -> Result<&'static Installed, QemuError> {
    static FOUND: OnceLock<Installed> = OnceLock::new();
    if let Some(found) = FOUND.get() {
        return Ok(found);
    }
    let program = std::env::var("MUSTER_QEMU").unwrap_or_else(|_| "qemu-system-x86_64".to_owned());
    let found = identify(&program)?;
    Ok(FOUND.get_or_init(|| found))
}

/// Asks a program what it is.
///
/// # Errors
/// It does not run, or is too old.
pub fn identify(program: &str) -> Result<Installed, QemuError> {
    Ok(Installed {
        program: program.to_owned(),
        version: parse_version(program, &ask(program, "-version")?)?,
        machine: parse_machine(program, &ask(program, "-machine=help")?)?,
        build: build_of(program),
    })
}

/// A program that does not answer is no patched one.
fn build_of(program: &str) -> QemuBuild {
    let questions = concat!(
        r#"{"execute":"qmp_capabilities"}"#,
        r#"{"execute":"query-migrate-capabilities"}"#,
        r#"{"execute":"quit"}"#
    );
    let asked = Command::new(program)
        .args([
            "-M",
            "none",
            "-nodefaults",
            "-display",
            "none",
            "-qmp",
            "stdio",
        ])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .and_then(|mut child| {
            if let Some(mut stdin) = child.stdin.take() {
                stdin.write_all(questions.as_bytes())?;
            }
            child.wait_with_output()
        });
    let said = asked.map_or_else(|_| Vec::new(), |output| output.stdout);
    if String::from_utf8_lossy(&said).contains("\"switchover-hold\"") {
        QemuBuild::Patched
    } else {
        QemuBuild::Stock
    }
}

fn ask(program: &str, option: &str) -> Result<String, QemuError> {
    let output = Command::new(program).args(option.split('=')).output();
    let output = output.map_err(|error| QemuError::Missing {
        program: program.to_owned(),
        error,
    })?;
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

fn parse_version(program: &str, said: &str) -> Result<String, QemuError> {
    let rest = said.split_once("version ").map_or("", |(_, rest)| rest);
    let found: String = rest
        .chars()
        .take_while(|c| c.is_ascii_digit() || *c == '.')
        .collect();
    let mut parts = found.split('.').map(|part| part.parse().unwrap_or(0));
    let (Some(major), Some(minor)) = (parts.next(), parts.next()) else {
        return Err(QemuError::Unknown {
            program: program.to_owned(),
            option: "-version",
            what: "its version",
            said: said.to_owned(),
        });
    };
    if (major, minor) < MIN_VERSION {
        return Err(QemuError::TooOld {
            program: program.to_owned(),
            found,
        });
    }
    Ok(found)
}

fn parse_machine(program: &str, said: &str) -> Result<String, QemuError> {
    said.lines()
        .filter(|line| line.starts_with("pc "))
        .find_map(|line| {
            Some(
                line.split_once("(alias of ")?
                    .1
                    .split_once(')')?
                    .0
                    .to_owned(),
            )
        })
        .ok_or_else(|| QemuError::Unknown {
            program: program.to_owned(),
            option: "-machine help",
            what: "what `pc` stands for",
            said: said.to_owned(),
        })
}

/// Which half of a migration a QEMU is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// It boots the guest.
    Boot,
    /// It waits for a migration and stays paused after it.
    Incoming,
}

/// One VM on one host: everything its QEMU's command line says.
#[derive(Debug, Clone)]
pub struct Launch {
    /// The guest.
    pub spec: GuestSpec,
    /// Who executes it.
    pub accel: Accel,
    /// The guest's ROM; the same for all hosts.
    pub rom: PathBuf,
    /// Where the tick collector listens for this VM on this host.
    pub ticks: PathBuf,
    /// The socket of the testbed's own monitor.
    pub observe: PathBuf,
    /// The image of its disk on this host, where it has one.
    pub image: PathBuf,
    directory: PathBuf,
    host: String,
    /// Another program than the installed one.
    program: Option<String>,
    /// Guest memory that outlives QEMU.
    memory: Option<Arc<OwnedFd>>,
}

impl Launch {
    /// Prepares `spec` for one host: writes its ROM to `directory` and names its sockets there.
    ///
    /// # Errors
    /// If the ROM cannot be written.
    pub fn new(
        spec: &GuestSpec,
        accel: Accel,
        directory: &Path,
        host: &str,
        ticks: PathBuf,
    ) -> Result<Self, QemuError> {
        let rom = directory.join(format!("{}.rom", spec.name));
        spec.write_rom(&rom).map_err(|error| QemuError::Rom {
            path: rom.clone(),
            error,
        })?;
        Ok(Self {
            spec: spec.clone(),
            accel,
            rom,
            ticks,
            observe: directory.join(format!("{}.{host}.observe", spec.name)),
            image: directory.join(format!("{}.{host}.img", spec.name)),
            directory: directory.to_owned(),
            host: host.to_owned(),
            program: None,
            memory: None,
        })
    }

    /// Has the VM executed by another program than the installed QEMU.
    pub fn use_program(&mut self, program: &str) {
        self.program = Some(program.to_owned());
    }

    /// Makes the guest's memory now, and keeps it for every QEMU that is started from here.
    ///
    /// Memory that a process has given back can have gone on to the hypervisor below (free page
    /// reporting): then the next process gets some of it at once and some slowly, and what a
    /// migration writes to costs ten times more in one run than in the next.
    ///
    /// # Errors
    /// There is not so much memory.
    pub fn keep_memory(&mut self) -> Result<(), QemuError> {
        let allocate = || {
            let memory = memfd_create(c"guest-memory", MFdFlags::MFD_CLOEXEC)?;
            let size = i64::try_from(self.spec.memory.0).map_err(|_| Errno::EFBIG)?;
            fallocate(&memory, FallocateFlags::empty(), 0, size)?;
            Ok(memory)
        };
        let memory = allocate().map_err(|error: Errno| QemuError::Memory {
            guest: self.spec.name.clone(),
            error: error.into(),
        })?;
        self.memory = Some(Arc::new(memory));
        Ok(())
    }

    /// The command vector, with [`QMP_PLACEHOLDER`] for the path of Muster's QMP socket.
    ///
    /// # Errors
    /// If there is no usable QEMU.
    pub fn template(&self, role: Role) -> Result<Vec<String>, QemuError> {
        let qemu = installed()?;
        let mut command: Vec<String> = [
            self.program.as_ref().unwrap_or(&qemu.program),
            "-nodefaults",
            "-no-user-config",
            "-display",
            "none",
        ]
        .map(str::to_owned)
        .into();
        let mut option = |name: &str, value: String| command.extend([name.to_owned(), value]);
        option("-name", self.spec.name.clone());
        option("-uuid", self.spec.uuid.to_string());
        let mut machine = format!("{},accel={}", qemu.machine, self.accel);
        if let Some(memory) = &self.memory {
            let file = format!("/proc/{}/fd/{}", std::process::id(), memory.as_raw_fd());
            let size = self.spec.memory.0 >> 20;
            let object =
                format!("memory-backend-file,id=pc.ram,size={size}M,share=on,mem-path={file}");
            option("-object", object);
            machine.push_str(",memory-backend=pc.ram");
        }
        option("-machine", machine);
        // The guest needs nothing of the processor; without this a host that lacks SSE3 warns.
        option("-cpu", "qemu64,pni=off".to_owned());
        option("-smp", "1".to_owned());
        option("-m", format!("size={}M", self.spec.memory.0 >> 20));
        option("-bios", quote(&self.rom));
        option(
            "-chardev",
            format!("socket,id=ticks,path={}", quote(&self.ticks)),
        );
        option(
            "-device",
            format!("isa-debugcon,iobase={TICK_PORT:#x},chardev=ticks"),
        );
        if self.spec.balloon {
            option(
                "-device",
                "virtio-balloon-pci,id=balloon0,addr=0x05,disable-modern=on".to_owned(),
            );
        }
        for (name, value) in self.disk_options(role) {
            option(name, value);
        }
        option("-qmp", format!("unix:{QMP_PLACEHOLDER},server=on,wait=off"));
        option(
            "-qmp",
            format!("unix:{},server=on,wait=off", quote(&self.observe)),
        );
        if role == Role::Incoming {
            option("-incoming", "defer".to_owned());
            command.push("-S".to_owned());
        }
        Ok(command)
    }

    /// Starts it, with Muster's monitor at `qmp`, and connects the testbed's own.
    ///
    /// # Errors
    /// If it does not start or its monitor does not answer within 10 seconds.
    pub fn start(&self, role: Role, qmp: &Path, isolation: &Isolation) -> Result<Qemu, QemuError> {
        self.make_images(role)?;
        start(
            &self.spec.name,
            &self.template(role)?,
            qmp,
            &self.observe,
            isolation,
        )
    }
}

/// Starts a command vector with Muster's monitor at `qmp`, and connects the testbed's own at
/// `observe`.
///
/// # Errors
/// If it does not start or its monitor does not answer within 10 seconds.
pub(crate) fn start(
    guest: &str,
    template: &[String],
    qmp: &Path,
    observe: &Path,
    isolation: &Isolation,
) -> Result<Qemu, QemuError> {
    let qmp_text = quote(qmp);
    let mut words = template
        .iter()
        .map(|word| word.replace(QMP_PLACEHOLDER, &qmp_text));
    let mut command = Command::new(words.next().unwrap_or_default());
    command.args(words);
    let name = format!("QEMU of {guest}");
    let mut process = Process::start(&name, command, isolation)?;
    let alive = || process.must_run().is_ok();
    match Qmp::connect_while(observe, MONITOR_LIMIT, alive) {
        Ok(monitor) => Ok(Qemu {
            process,
            monitor,
            qmp: qmp.to_owned(),
        }),
        Err(monitor) => {
            // A monitor that breaks belongs to a QEMU that is about to end: let it say why.
            let _ = process.wait(END_LIMIT);
            process.must_run()?;
            let said = process.last_words();
            Err(QemuError::Monitor { monitor, said })
        }
    }
}

/// A QEMU of ours; it is killed when this is dropped.
#[derive(Debug)]
pub struct Qemu {
    /// The process.
    pub process: Process,
    /// The testbed's own monitor.
    pub monitor: Qmp,
    /// Muster's monitor.
    pub qmp: PathBuf,
}

/// A path as QEMU's option syntax wants it: commas doubled.
pub(crate) fn quote(path: &Path) -> String {
    path.to_string_lossy().replace(',', ",,")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_and_machines_are_read() {
        let said = "QEMU emulator version 10.0.2 (Debian 1:10.0.2+ds-2+deb13u1~bpo12+1)\nCopyright";
        assert_eq!(parse_version("q", said).unwrap(), "10.0.2");
        let old = parse_version("q", "QEMU emulator version 7.2.17 (Debian)").unwrap_err();
        assert!(old.to_string().contains("7.2.17; expected 8.1 or newer"));
        assert!(parse_version("q", "what?").is_err());
        let said = "pc-i440fx-9.2  Standard\npc    Standard PC (i440FX + PIIX, 1996) (alias of pc-i440fx-10.0)\n";
        assert_eq!(parse_machine("q", said).unwrap(), "pc-i440fx-10.0");
    }

    #[test]
    fn commas_in_paths_are_doubled() {
        assert_eq!(quote(Path::new("/a,b")), "/a,,b");
    }
}
