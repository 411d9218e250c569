//! A lab: hosts with sidecars, guests that tick on one of them, and the application they make up.
//!
//! [`Lab::build`] makes all of it; dropping the lab removes it: processes, namespaces, files. The
//! demo, the table of faults, and the benchmarks are built on it.

pub(crate) mod files;
pub mod verify;

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use coordinator::Application;
use rate_limiter::BytesPerSecond;
use tempfile::TempDir;

use crate::guest::GuestSpec;
use crate::net::{Host, NetError, Network};
use crate::process::{PidFd, Process, ProcessError};
use crate::qemu::{Accel, Launch, Qemu, QemuError, Role};
use crate::qmp::{Qmp, QmpError};
use crate::signals::{Interrupt, Interrupted};
use crate::ticks::{Collector, TickError};

/// A sidecar answers on its control socket within this time.
const SIDECAR_LIMIT: Duration = Duration::from_secs(10);
/// A guest ticks within this time.
const BOOT_LIMIT: Duration = Duration::from_secs(30);
const MONITOR_LIMIT: Duration = Duration::from_secs(5);
const PAYLOAD_PERCENT: u64 = 94;

/// Why a lab could not be built or used.
#[derive(Debug, thiserror::Error)]
pub enum LabError {
    /// A program of this project is missing.
    #[error("{program} is not built: run `cargo build --release --workspace` (looked in {looked})")]
    Missing {
        /// Which.
        program: String,
        /// Where.
        looked: String,
    },
    /// A file or directory.
    #[error("{path}: {error}")]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        error: io::Error,
    },
    /// A sidecar did not come up.
    #[error("the sidecar of {host} does not serve its control socket: {said}")]
    Sidecar {
        /// Its host.
        host: String,
        /// Its last words.
        said: String,
    },
    /// The application that was put together is not valid.
    #[error(transparent)]
    Application(#[from] coordinator::application::ApplicationError),
    /// Namespaces and links.
    #[error(transparent)]
    Net(#[from] NetError),
    /// A process.
    #[error(transparent)]
    Process(#[from] ProcessError),
    /// QEMU.
    #[error(transparent)]
    Qemu(#[from] QemuError),
    /// A monitor.
    #[error(transparent)]
    Qmp(#[from] QmpError),
    /// Ticks.
    #[error(transparent)]
    Ticks(#[from] TickError),
    /// Ctrl-C.
    #[error(transparent)]
    Interrupted(#[from] Interrupted),
}

/// What is to be built.
#[derive(Debug, Clone)]
pub struct LabSpec {
    /// Names of the hosts; the guests boot on the first.
    pub hosts: Vec<String>,
    /// The guests.
    pub guests: Vec<GuestSpec>,
    /// Rate of every link, each way.
    pub link: BytesPerSecond,
    /// Who executes the guests.
    pub accel: Accel,
    /// Traffic between guests, for the communication impact.
    pub traffic: Vec<(String, String, BytesPerSecond)>,
    /// Hosts that adopt incoming QEMUs that wait already, rather than start them.
    pub adopting: Vec<String>,
    /// Hosts whose guests' memory is there before QEMU is, and stays when it ends: filling it costs
    /// no page faults. See [`Launch::keep_memory`].
    pub resident: Vec<String>,
    /// Programs that execute these guests, in the place of the installed QEMU.
    pub programs: Vec<(String, String)>,
    /// Lines for `[application]` beyond name and bandwidth, such as `max-downtime = "300ms"`.
    pub settings: Vec<String>,
}

/// A lab. See the module.
#[derive(Debug)]
pub struct Lab {
    /// What was asked for.
    pub spec: LabSpec,
    /// Hosts and links.
    pub network: Network,
    /// What the guests' ticks say.
    pub ticks: Collector,
    sidecars: BTreeMap<String, Process>,
    launches: BTreeMap<(String, String), Launch>,
    booted: BTreeMap<String, Process>,
    directory: TempDir,
}

/// What TCP carries as payload over a link of this rate, less a little so that no queue builds up.
#[must_use]
pub fn payload(link: BytesPerSecond) -> BytesPerSecond {
    BytesPerSecond(link.0 / 100 * PAYLOAD_PERCENT)
}

/// Finds a program of this project beside the one that runs, or where a variable says.
///
/// # Errors
/// It is not there.
pub fn program(name: &str, variable: &str) -> Result<PathBuf, LabError> {
    if let Some(path) = std::env::var_os(variable) {
        return Ok(path.into());
    }
    let here = std::env::current_exe().unwrap_or_default();
    let mut looked = Vec::new();
    for directory in here.ancestors().skip(1).take(2) {
        let path = directory.join(name);
        if path.is_file() {
            return Ok(path);
        }
        looked.push(directory.display().to_string());
    }
    Err(LabError::Missing {
        program: name.to_owned(),
        looked: looked.join(", "),
    })
}

/// Starts a host's sidecar with this configuration, whose control socket is `control.sock` in the
/// host's directory, and waits until it serves.
pub(crate) fn serve(host: &Host, directory: &Path, text: &str) -> Result<Process, LabError> {
    let config = directory.join("sidecar.toml");
    std::fs::write(&config, text).map_err(|error| LabError::File {
        path: config.clone(),
        error,
    })?;
    let mut command = Command::new(program("muster-sidecar", "MUSTER_SIDECAR")?);
    command.arg("--config").arg(&config);
    let isolation = host.isolation(Some(directory.join("sidecar.log")));
    let name = format!("sidecar of {}", host.name());
    let mut process = Process::start(&name, command, &isolation)?;
    let by = Instant::now() + SIDECAR_LIMIT;
    let control = directory.join("control.sock");
    while std::os::unix::net::UnixStream::connect(&control).is_err() {
        if process.must_run().is_err() || Instant::now() > by {
            let said = process.last_words();
            return Err(LabError::Sidecar {
                host: host.name().to_owned(),
                said,
            });
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(process)
}

impl Lab {
    /// Makes hosts, starts a sidecar on each, and boots the guests on the first.
    ///
    /// # Errors
    /// What could not be made; nothing is left behind then.
    pub fn build(spec: LabSpec, interrupt: &Interrupt) -> Result<Self, LabError> {
        let names: Vec<&str> = spec.hosts.iter().map(String::as_str).collect();
        let network = Network::create(&names, spec.link)?;
        let directory = tempfile::Builder::new()
            .prefix("muster-lab.")
            .tempdir()
            .map_err(|error| LabError::File {
                path: std::env::temp_dir(),
                error,
            })?;
        let ticks = Collector::start(directory.path()).map_err(|error| LabError::File {
            path: directory.path().to_owned(),
            error,
        })?;
        let mut lab = Self {
            spec,
            network,
            ticks,
            sidecars: BTreeMap::new(),
            launches: BTreeMap::new(),
            booted: BTreeMap::new(),
            directory,
        };
        lab.prepare_guests()?;
        for host in lab.spec.hosts.clone() {
            lab.start_sidecar(&host)?;
        }
        for guest in lab.spec.guests.clone() {
            interrupt.check()?;
            lab.boot(&guest)?;
        }
        for guest in &lab.spec.guests {
            interrupt.check()?;
            lab.ticks
                .wait_for_tick(&guest.name, &lab.spec.hosts[0], BOOT_LIMIT)?;
        }
        Ok(lab)
    }

    /// The directory of everything.
    #[must_use]
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// The directory of one host.
    #[must_use]
    pub fn host_directory(&self, host: &str) -> PathBuf {
        self.directory.path().join(host)
    }

    /// The control socket of a host's sidecar.
    #[must_use]
    pub fn control(&self, host: &str) -> PathBuf {
        self.host_directory(host).join("control.sock")
    }

    /// Muster's monitor of a guest on a host.
    #[must_use]
    pub fn qmp_path(&self, guest: &str, host: &str) -> PathBuf {
        self.host_directory(host)
            .join("run")
            .join(format!("{guest}.qmp"))
    }

    fn prepare_guests(&mut self) -> Result<(), LabError> {
        for host in &self.spec.hosts {
            let run = self.host_directory(host).join("run");
            std::fs::create_dir_all(&run).map_err(|error| LabError::File {
                path: run.clone(),
                error,
            })?;
            for guest in &self.spec.guests {
                let socket = self.ticks.listen(&guest.name, host, guest.tick_period())?;
                let mut launch =
                    Launch::new(guest, self.spec.accel, self.directory.path(), host, socket)?;
                if self.spec.resident.contains(host) {
                    launch.keep_memory()?;
                }
                let mut programs = self.spec.programs.iter();
                if let Some((_, program)) = programs.find(|(name, _)| *name == guest.name) {
                    launch.use_program(program);
                }
                self.launches
                    .insert((guest.name.clone(), host.clone()), launch);
            }
        }
        Ok(())
    }

    /// Starts the sidecar of a host, or starts it again after its end.
    ///
    /// # Errors
    /// It does not serve its control socket.
    pub fn start_sidecar(&mut self, host: &str) -> Result<(), LabError> {
        self.start_sidecar_with(host, |text| text)
    }

    /// The same with its configuration changed by `edit`.
    ///
    /// # Errors
    /// It does not serve its control socket.
    pub fn start_sidecar_with(
        &mut self,
        host: &str,
        edit: impl FnOnce(String) -> String,
    ) -> Result<(), LabError> {
        self.stop_sidecar(host);
        let text = edit(self.sidecar_config(host)?);
        let process = serve(self.network.host(host)?, &self.host_directory(host), &text)?;
        self.sidecars.insert(host.to_owned(), process);
        Ok(())
    }

    /// Kills the sidecar of a host, if it has one.
    pub fn stop_sidecar(&mut self, host: &str) {
        self.sidecars.remove(host);
    }

    /// The sidecar's process of a host.
    ///
    /// # Errors
    /// There is none.
    pub fn sidecar(&mut self, host: &str) -> Result<&mut Process, LabError> {
        self.sidecars
            .get_mut(host)
            .ok_or_else(|| LabError::Sidecar {
                host: host.to_owned(),
                said: "it was not started".to_owned(),
            })
    }

    fn boot(&mut self, guest: &GuestSpec) -> Result<(), LabError> {
        let host = self.spec.hosts[0].clone();
        let launch = self.launch(&guest.name, &host)?;
        let log = self
            .host_directory(&host)
            .join("run")
            .join(format!("{}.log", guest.name));
        let isolation = self.network.host(&host)?.isolation(Some(log));
        let qmp = self.qmp_path(&guest.name, &host);
        let Qemu { process, .. } = launch.start(Role::Boot, &qmp, &isolation)?;
        self.booted.insert(guest.name.clone(), process);
        Ok(())
    }

    /// Starts a QEMU on `host` that waits for a guest, to be adopted by the sidecar there.
    ///
    /// # Errors
    /// It does not start.
    pub fn start_incoming(&self, guest: &str, host: &str) -> Result<Process, LabError> {
        let log = self
            .host_directory(host)
            .join("run")
            .join(format!("{guest}.log"));
        let isolation = self.network.host(host)?.isolation(Some(log));
        let qmp = self.qmp_path(guest, host);
        let Qemu { process, .. } =
            self.launch(guest, host)?
                .start(Role::Incoming, &qmp, &isolation)?;
        Ok(process)
    }

    pub(crate) fn launch(&self, guest: &str, host: &str) -> Result<&Launch, LabError> {
        let key = (guest.to_owned(), host.to_owned());
        self.launches.get(&key).ok_or_else(|| LabError::Missing {
            program: format!("guest {guest}"),
            looked: format!("host {host}"),
        })
    }

    /// The image of a guest's disk on a host, whether or not it is there.
    ///
    /// # Errors
    /// There is no such guest.
    pub fn image(&self, guest: &str, host: &str) -> Result<PathBuf, LabError> {
        Ok(self.launch(guest, host)?.image.clone())
    }

    /// The process of a guest's QEMU on a host, whoever has started it.
    ///
    /// # Errors
    /// There is none.
    pub fn qemu(&self, guest: &str, host: &str) -> Result<PidFd, LabError> {
        for pid in self.network.host(host)?.processes() {
            let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            let mut words = line.split(|byte| *byte == 0);
            if words.any(|word| word == b"-name") && words.next() == Some(guest.as_bytes()) {
                if let Ok(process) = PidFd::open(pid) {
                    return Ok(process);
                }
            }
        }
        Err(LabError::Missing {
            program: format!("a QEMU of {guest}"),
            looked: format!("host {host}"),
        })
    }

    /// The guest's specification.
    ///
    /// # Errors
    /// There is no such guest.
    pub fn guest(&self, name: &str) -> Result<&GuestSpec, LabError> {
        self.spec
            .guests
            .iter()
            .find(|guest| guest.name == name)
            .ok_or_else(|| LabError::Missing {
                program: format!("guest {name}"),
                looked: "the lab".to_owned(),
            })
    }

    /// The testbed's own monitor of a guest's QEMU on a host.
    ///
    /// # Errors
    /// That QEMU does not run or does not answer.
    pub fn monitor(&self, guest: &str, host: &str) -> Result<Qmp, LabError> {
        Ok(Qmp::connect(
            &self.launch(guest, host)?.observe,
            MONITOR_LIMIT,
        )?)
    }

    /// What the migration may use of the link: payload, a little below what it carries.
    #[must_use]
    pub fn bandwidth(&self) -> BytesPerSecond {
        payload(self.spec.link)
    }

    /// The application of all guests, moving from one host to another.
    ///
    /// # Errors
    /// The lab's settings are not valid.
    pub fn application(&self, from: &str, to: &str) -> Result<Application, LabError> {
        let path = self.application_file(from, to)?;
        Ok(Application::load(&path)?)
    }

    /// The same as a file, for the `muster` program.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn application_file(&self, from: &str, to: &str) -> Result<PathBuf, LabError> {
        let path = self.directory.path().join(format!("{from}-{to}.toml"));
        let guests: Vec<&str> = self.spec.guests.iter().map(|g| g.name.as_str()).collect();
        std::fs::write(&path, self.application_text(&guests, from, to)).map_err(|error| {
            LabError::File {
                path: path.clone(),
                error,
            }
        })?;
        Ok(path)
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        // Guests that sidecars started have other parents: they go with their namespace.
        self.sidecars.clear();
        self.booted.clear();
    }
}
