//! The sidecar's configuration file (TOML).
//!
//! Command lines of incoming VMs stand here, on their own host, and nowhere else: the network only
//! ever names a VM.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use rate_limiter::BytesPerSecond;
use serde::Deserialize;

/// The whole file.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Config {
    /// Format of the file: 1.
    pub version: u32,
    /// The host's name, as application files call it.
    pub host: String,
    /// Register and notes; must survive a crash of the host.
    #[serde(default = "default_state_dir")]
    pub state_dir: PathBuf,
    /// Sockets and logs of incoming VMs.
    #[serde(default = "default_runtime_dir")]
    pub runtime_dir: PathBuf,
    /// Where clients connect.
    #[serde(default)]
    pub control: Control,
    /// Where other sidecars connect.
    pub stream: Stream,
    /// Limits of this host.
    #[serde(default)]
    pub limits: Limits,
    /// Programs of this host that are run around a switchover.
    #[serde(default)]
    pub hooks: Hooks,
    /// VMs are also found here: `NAME.qmp` is the monitor of VM `NAME`.
    pub qmp_dir: Option<PathBuf>,
    /// The VMs that run here or may come here.
    #[serde(default, rename = "vm")]
    pub vms: Vec<VmConfig>,
}

/// `[control]`
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Control {
    /// Path of the unix socket (mode 0660).
    #[serde(default = "default_control")]
    pub unix: PathBuf,
    /// Address of the TCP socket, if one is wanted; loopback unless `insecure`.
    pub tcp: Option<SocketAddr>,
    /// Allow TCP beyond loopback without TLS.
    #[serde(default)]
    pub insecure: bool,
}

impl Default for Control {
    fn default() -> Self {
        Self {
            unix: default_control(),
            tcp: None,
            insecure: false,
        }
    }
}

/// `[stream]`
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Stream {
    /// Address to listen on for migration streams.
    pub listen: SocketAddr,
    /// Allow addresses beyond loopback without TLS.
    #[serde(default)]
    pub insecure: bool,
}

/// `[limits]`
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Limits {
    /// Most that all streams leaving this host may take together.
    pub link: Option<BytesPerSecond>,
}

/// `[hooks]`: programs with their arguments, for tunnels, names, load balancers.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Hooks {
    /// Run for a VM that leaves, while it still runs, just before it may be paused.
    #[serde(default)]
    pub before_switchover: Vec<String>,
    /// Run for a VM that has left, has come, or has stayed.
    #[serde(default)]
    pub after_switchover: Vec<String>,
}

/// `[[vm]]`
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct VmConfig {
    /// The VM's name.
    pub name: String,
    /// Its monitor for Muster alone; default: `NAME.qmp` in the runtime directory.
    pub qmp: Option<PathBuf>,
    /// How its QEMU is started to receive it: program and arguments, `{qmp}` and `{name}` are
    /// replaced. Must contain `-incoming defer` and `-S`.
    #[serde(default)]
    pub incoming: Vec<String>,
    /// Adopt a QEMU that already waits (`-incoming defer -S`) at the monitor instead.
    #[serde(default)]
    pub adopt: bool,
    /// Local disks that may come with it.
    #[serde(default, rename = "disk")]
    pub disks: Vec<DiskConfig>,
}

/// `[[vm.disk]]`: a local disk, as the VM has it on this host.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct DiskConfig {
    /// Its block node in QEMU.
    pub node: String,
    /// The image that is made for it before its QEMU is started.
    pub image: PathBuf,
    /// What kind of image.
    #[serde(default)]
    pub format: ImageFormat,
    /// An image that is there already is written over; else it is refused.
    #[serde(default)]
    pub reuse: bool,
    /// The backing file of a qcow2 image, for disks whose chain is kept.
    pub backing: Option<PathBuf>,
    /// What kind of image that is.
    #[serde(default)]
    pub backing_format: ImageFormat,
}

/// Kinds of images that can be made.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ImageFormat {
    /// As many bytes as the disk has, without holes filled.
    #[default]
    Raw,
    /// QEMU's own.
    Qcow2,
}

impl ImageFormat {
    /// QEMU's name for it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
        }
    }
}

fn default_state_dir() -> PathBuf {
    "/var/lib/muster".into()
}

fn default_runtime_dir() -> PathBuf {
    "/run/muster".into()
}

fn default_control() -> PathBuf {
    "/run/muster/control.sock".into()
}

/// Why a configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("the configuration {path} cannot be read: {error}")]
    Read {
        /// Which file.
        path: PathBuf,
        /// What the kernel said.
        error: std::io::Error,
    },
    /// It is not what it should be; the text names line and key.
    #[error("the configuration {path}: {error}")]
    Parse {
        /// Which file.
        path: PathBuf,
        /// Line, key, and what was expected.
        error: Box<toml::de::Error>,
    },
    /// It contradicts itself or the rules.
    #[error("the configuration {path}: {}", problems.join("; "))]
    Invalid {
        /// Which file.
        path: PathBuf,
        /// Every problem.
        problems: Vec<String>,
    },
}

/// Whether a block node can have this name.
#[must_use]
pub fn is_node_name(name: &str) -> bool {
    let good = |c: char| c.is_ascii_alphanumeric() || "-._".contains(c);
    (1..=31).contains(&name.len())
        && name.starts_with(|c: char| c.is_ascii_alphabetic())
        && name.chars().all(good)
}

/// A path of a unix socket may have so many bytes (sun_path less its zero).
const MAX_SOCKET_PATH: usize = 107;

impl Config {
    /// Reads and checks the file.
    ///
    /// # Errors
    /// With the file's path and every problem found.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(path).map_err(|error| ConfigError::Read {
            path: path.to_owned(),
            error,
        })?;
        Self::parse(path, &text)
    }

    fn parse(path: &Path, text: &str) -> Result<Self, ConfigError> {
        let config: Self = toml::from_str(text).map_err(|error| ConfigError::Parse {
            path: path.to_owned(),
            error: Box::new(error),
        })?;
        let problems = config.problems();
        if problems.is_empty() {
            Ok(config)
        } else {
            Err(ConfigError::Invalid {
                path: path.to_owned(),
                problems,
            })
        }
    }

    fn problems(&self) -> Vec<String> {
        let mut problems = Vec::new();
        if self.version != 1 {
            problems.push(format!("`version` is {}, expected 1", self.version));
        }
        if self.host.is_empty() {
            problems.push("`host` is empty".into());
        }
        if let Some(tcp) = self.control.tcp.filter(|tcp| !tcp.ip().is_loopback()) {
            if !self.control.insecure {
                problems.push(format!(
                    "`control.tcp` = {tcp} is reachable from other hosts without TLS: use \
                     loopback, or set `control.insecure = true`"
                ));
            }
        }
        if !self.stream.listen.ip().is_loopback() && !self.stream.insecure {
            problems.push(format!(
                "`stream.listen` = {} is reachable from other hosts without TLS: use loopback, \
                 or set `stream.insecure = true`",
                self.stream.listen
            ));
        }
        if self.stream.listen.ip().is_unspecified() {
            problems.push(format!(
                "`stream.listen` = {} is what other sidecars are told to connect to: name an \
                 address of this host",
                self.stream.listen
            ));
        }
        if self.control.unix.as_os_str().len() > MAX_SOCKET_PATH {
            problems.push(format!(
                "`control.unix` is longer than {MAX_SOCKET_PATH} bytes"
            ));
        }
        let hooks = [
            ("before-switchover", &self.hooks.before_switchover),
            ("after-switchover", &self.hooks.after_switchover),
        ];
        for (name, hook) in hooks {
            if hook
                .first()
                .is_some_and(|program| !program.starts_with('/'))
            {
                problems.push(format!(
                    "`hooks.{name}` must begin with the absolute path of a program"
                ));
            }
        }
        for (index, vm) in self.vms.iter().enumerate() {
            let name = &vm.name;
            if name.is_empty() || name.contains(['/', '\0']) || name.starts_with('.') {
                problems.push(format!("`{name}` is no name for a VM"));
            }
            if self.vms[..index].iter().any(|other| other.name == *name) {
                problems.push(format!("VM `{name}` is there twice"));
            }
            if self.qmp_path(name).as_os_str().len() > MAX_SOCKET_PATH {
                problems.push(format!(
                    "the monitor's path of VM `{name}` is longer than {MAX_SOCKET_PATH} bytes"
                ));
            }
            for (index, disk) in vm.disks.iter().enumerate() {
                let node = &disk.node;
                if !is_node_name(node) {
                    problems.push(format!("VM `{name}`: `{node}` is no name of a block node"));
                }
                if vm.disks[..index].iter().any(|other| other.node == *node) {
                    problems.push(format!("VM `{name}`: disk `{node}` is there twice"));
                }
                if let Some(backing) = &disk.backing {
                    if disk.format != ImageFormat::Qcow2 || !backing.is_absolute() {
                        problems.push(format!(
                            "VM `{name}`, disk `{node}`: `backing` must be an absolute path, and \
                             `format` must be \"qcow2\""
                        ));
                    }
                }
                if !disk.image.is_absolute() {
                    problems.push(format!(
                        "VM `{name}`, disk `{node}`: `image` must be an absolute path"
                    ));
                }
            }
            if vm.incoming.is_empty() {
                continue;
            }
            if vm.adopt {
                problems.push(format!(
                    "VM `{name}`: `incoming` and `adopt` exclude each other"
                ));
            }
            let defers = vm
                .incoming
                .windows(2)
                .any(|pair| pair == ["-incoming", "defer"]);
            if !defers || !vm.incoming.iter().any(|argument| argument == "-S") {
                problems.push(format!(
                    "VM `{name}`: `incoming` must contain `-incoming defer` and `-S`, or the VM \
                     would run as soon as it has arrived"
                ));
            }
            if !vm
                .incoming
                .iter()
                .any(|argument| argument.contains("{qmp}"))
            {
                problems.push(format!(
                    "VM `{name}`: `incoming` must contain `{{qmp}}`, the monitor's path \
                     (-qmp unix:{{qmp}},server=on,wait=off)"
                ));
            }
        }
        problems
    }

    /// The entry of a VM.
    #[must_use]
    pub fn vm(&self, name: &str) -> Option<&VmConfig> {
        self.vms.iter().find(|vm| vm.name == name)
    }

    /// Where the monitor of a VM is.
    #[must_use]
    pub fn qmp_path(&self, name: &str) -> PathBuf {
        let configured = self.vm(name).and_then(|vm| vm.qmp.clone());
        let found = || {
            let path = self.qmp_dir.as_ref()?.join(format!("{name}.qmp"));
            path.exists().then_some(path)
        };
        configured
            .or_else(found)
            .unwrap_or_else(|| self.runtime_dir.join(format!("{name}.qmp")))
    }

    /// Every VM that is configured or whose monitor lies in `qmp-dir`.
    #[must_use]
    pub fn vm_names(&self) -> Vec<String> {
        let mut names: Vec<String> = self.vms.iter().map(|vm| vm.name.clone()).collect();
        let entries = self
            .qmp_dir
            .as_ref()
            .and_then(|path| std::fs::read_dir(path).ok());
        for entry in entries.into_iter().flatten().flatten() {
            let file = entry.file_name();
            let name = file.to_str().and_then(|file| file.strip_suffix(".qmp"));
            if let Some(name) = name.filter(|name| !names.iter().any(|known| known == name)) {
                names.push(name.to_owned());
            }
        }
        names
    }

    /// What stands open to other hosts, to be warned of at every start.
    #[must_use]
    pub fn warnings(&self) -> Vec<String> {
        let mut warnings = Vec::new();
        if let Some(tcp) = self.control.tcp.filter(|tcp| !tcp.ip().is_loopback()) {
            warnings.push(format!(
                "insecure: anyone who reaches {tcp} controls the VMs of this host (no TLS)"
            ));
        }
        if !self.stream.listen.ip().is_loopback() {
            warnings.push(format!(
                "insecure: migration streams to {} cross the network in the clear (no TLS)",
                self.stream.listen
            ));
        }
        warnings
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Config, String> {
        Config::parse(Path::new("a.toml"), text).map_err(|error| error.to_string())
    }

    const HEAD: &str = "version = 1\nhost = \"a\"\n[stream]\nlisten = \"127.0.0.1:0\"\n";

    #[test]
    fn a_small_file_is_enough() {
        let config = parse(HEAD).expect("valid");
        assert_eq!(config.qmp_path("web"), Path::new("/run/muster/web.qmp"));
        assert_eq!(config.warnings().len(), 0);
    }

    #[test]
    fn every_problem_is_named() {
        let text = "version = 2\nhost = \"\"\n[stream]\nlisten = \"10.0.0.1:1\"\n[[vm]]\nname = \
                    \"web\"\nincoming = [\"qemu\"]\n[[vm]]\nname = \"web\"\n";
        let error = parse(text).expect_err("many problems");
        for part in [
            "version",
            "host",
            "insecure",
            "-incoming defer",
            "{qmp}",
            "twice",
        ] {
            assert!(error.contains(part), "{part}: {error}");
        }
    }

    #[test]
    fn an_unknown_key_is_named_with_its_line() {
        let error = parse(&format!("{HEAD}[limits]\nlimk = 1\n")).expect_err("unknown key");
        assert!(
            error.contains("limk") && error.contains("line 6"),
            "{error}"
        );
        let error = parse(&format!("{HEAD}[limits]\nlink = \"fast\"\n")).expect_err("no rate");
        assert!(error.contains("400Mbit/s"), "{error}");
    }
}
