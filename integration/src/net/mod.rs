//! Hosts as network namespaces, joined by links of a set rate.
//!
//! Every pair of hosts is joined by a veth pair that is created inside the namespaces, so nothing
//! appears among the machine's own interfaces. Each host has one address; each link is shaped at
//! both ends by tbf. Where guests have network cards, hosts have bridges instead, joined by a
//! [`wan`]. Names contain the testbed's process number, and a lock file held for its life
//! tells a later start which namespaces nobody owns any more.

mod bridge;
mod link;
mod stale;
mod throughput;
pub mod wan;

use std::fs::File;
use std::io;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use nix::fcntl::Flock;
use nix::sched::{CloneFlags, setns};
use rate_limiter::BytesPerSecond;

pub use bridge::BRIDGE;
pub use link::{Carried, Counters, Cut, Link};
pub use stale::remove_stale;
pub use throughput::{Throughput, throughput};

use crate::process::Isolation;

const NETNS: &str = "/run/netns";
const CONGESTION_CONTROL: &str = "/proc/sys/net/ipv4/tcp_congestion_control";
/// The first of these that the machine allows in a namespace is set in every one, so that results
/// do not depend on the machine's default. The second is allowed everywhere.
const CONGESTION_CONTROLS: [&str; 2] = ["cubic", "reno"];

/// Why the network could not be made or changed.
#[derive(Debug, thiserror::Error)]
pub enum NetError {
    /// A command of iproute2 failed.
    #[error("`{command}` failed: {said}")]
    Command {
        /// The command.
        command: String,
        /// What it said.
        said: String,
    },
    /// A file could not be used.
    #[error("{path}: {error}")]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        error: io::Error,
    },
    /// A host's name cannot be part of an interface's.
    #[error("host name `{name}`: expected 1 to 10 lower-case letters and digits, each name once")]
    Name {
        /// The name.
        name: String,
    },
    /// There is no such host, or no link between two.
    #[error("there is no {what} in this network")]
    Unknown {
        /// What was looked for.
        what: String,
    },
    /// Traffic could not be sent or received.
    #[error("cannot measure the link from {from} to {to}: {error}")]
    Traffic {
        /// The sender.
        from: String,
        /// The receiver.
        to: String,
        /// Why.
        error: io::Error,
    },
}

/// Hosts and links of one testbed; all is removed when this is dropped.
#[derive(Debug)]
pub struct Network {
    hosts: Vec<Host>,
    links: Vec<Link>,
    _lock: Flock<File>,
    lock_path: PathBuf,
}

/// One host.
#[derive(Debug)]
pub struct Host {
    name: String,
    namespace: String,
    address: Ipv4Addr,
    file: Arc<File>,
}

impl Network {
    /// Makes one host per name, and a link of `rate` each way between every two. Removes what
    /// testbeds that are gone have left.
    ///
    /// # Errors
    /// If a name cannot be used or a step is refused; what was made until then is removed.
    pub fn create(names: &[&str], rate: BytesPerSecond) -> Result<Self, NetError> {
        let mut network = Self::islands(names)?;
        for (index, one) in network.hosts.iter().enumerate() {
            for other in &network.hosts[index + 1..] {
                network.links.push(Link::create(one, other, rate)?);
            }
        }
        Ok(network)
    }

    /// The same hosts without a link.
    ///
    /// # Errors
    /// If a name cannot be used or a step is refused; what was made until then is removed.
    pub fn islands(names: &[&str]) -> Result<Self, NetError> {
        static INSTANCES: AtomicU32 = AtomicU32::new(0);
        for (index, name) in names.iter().enumerate() {
            let good = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
            let once = !names[..index].contains(name);
            if !(1..=10).contains(&name.len()) || !name.chars().all(good) || !once {
                let name = (*name).to_owned();
                return Err(NetError::Name { name });
            }
        }
        remove_stale()?;
        let pid = std::process::id();
        let instance = INSTANCES.fetch_add(1, Ordering::Relaxed);
        let prefix = format!("muster{pid}x{instance}");
        let (lock, lock_path) = stale::claim(&prefix)?;
        let mut network = Self {
            hosts: Vec::new(),
            links: Vec::new(),
            _lock: lock,
            lock_path,
        };
        let [_, _, high, low] = (pid.wrapping_mul(31).wrapping_add(instance)).to_be_bytes();
        for (last, name) in (1..).zip(names) {
            let namespace = format!("{prefix}-{name}");
            run("ip", &["netns", "add", &namespace])?;
            let path = Path::new(NETNS).join(&namespace);
            let file = match File::open(&path) {
                Ok(file) => file,
                Err(error) => {
                    let _ = run("ip", &["netns", "del", &namespace]);
                    return Err(NetError::File { path, error });
                }
            };
            let host = Host {
                name: (*name).to_owned(),
                namespace,
                address: Ipv4Addr::new(10, high, low, last),
                file: Arc::new(file),
            };
            network.hosts.push(host);
            network.hosts[network.hosts.len() - 1].prepare()?;
        }
        Ok(network)
    }

    /// The hosts, in the order of their names' creation.
    #[must_use]
    pub fn hosts(&self) -> &[Host] {
        &self.hosts
    }

    /// The host called `name`.
    ///
    /// # Errors
    /// If there is none.
    pub fn host(&self, name: &str) -> Result<&Host, NetError> {
        let found = self.hosts.iter().find(|host| host.name == name);
        found.ok_or_else(|| NetError::Unknown {
            what: format!("host `{name}`"),
        })
    }

    /// The link between two hosts, whichever is named first.
    ///
    /// # Errors
    /// If there is none.
    pub fn link(&self, one: &str, other: &str) -> Result<&Link, NetError> {
        let found = self.links.iter().find(|link| link.joins(one, other));
        found.ok_or_else(|| NetError::Unknown {
            what: format!("link between `{one}` and `{other}`"),
        })
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        for host in &self.hosts {
            stale::remove_namespace(&host.namespace);
        }
        let _ = std::fs::remove_file(&self.lock_path);
    }
}

impl Host {
    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The name of its namespace, for `ip netns exec`.
    #[must_use]
    pub fn namespace(&self) -> &str {
        &self.namespace
    }

    /// Its address on every link.
    #[must_use]
    pub fn address(&self) -> Ipv4Addr {
        self.address
    }

    /// How to start a process on it.
    #[must_use]
    pub fn isolation(&self, log: Option<PathBuf>) -> Isolation {
        Isolation {
            netns: Some(Arc::clone(&self.file)),
            log,
        }
    }

    /// Runs `work` on a thread that is on this host: sockets it opens are the host's.
    ///
    /// # Errors
    /// If the thread cannot enter the namespace.
    pub fn enter<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T, NetError> {
        let result = std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                setns(self.file.as_ref(), CloneFlags::CLONE_NEWNET)?;
                Ok(work())
            });
            match thread.join() {
                Ok(result) => result,
                Err(panic) => std::panic::resume_unwind(panic),
            }
        });
        result.map_err(|error: nix::Error| NetError::File {
            path: Path::new(NETNS).join(&self.namespace),
            error: error.into(),
        })
    }

    /// The processes on it.
    #[must_use]
    pub fn processes(&self) -> Vec<u32> {
        stale::processes_in(&self.file)
    }

    fn prepare(&self) -> Result<(), NetError> {
        self.ip(&["link", "set", "lo", "up"])?;
        let set = |name| std::fs::write(CONGESTION_CONTROL, name);
        let [first, second] = CONGESTION_CONTROLS;
        self.enter(|| set(first).or_else(|_| set(second)))?
            .map_err(|error| NetError::File {
                path: CONGESTION_CONTROL.into(),
                error,
            })
    }

    fn ip(&self, arguments: &[&str]) -> Result<String, NetError> {
        run("ip", &[&["-n", &self.namespace], arguments].concat())
    }
}

/// Runs a command to its end and returns its output.
fn run(program: &str, arguments: &[&str]) -> Result<String, NetError> {
    let command = || format!("{program} {}", arguments.join(" "));
    let output = Command::new(program)
        .args(arguments)
        .output()
        .map_err(|error| NetError::Command {
            command: command(),
            said: format!("{error}; install it with `apt-get install iproute2`"),
        })?;
    if !output.status.success() {
        return Err(NetError::Command {
            command: command(),
            said: String::from_utf8_lossy(&output.stderr).trim().to_owned(),
        });
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_cannot_be_interfaces_are_refused() {
        for names in [&["a", "a"][..], &["A"], &[""], &["averylongname"], &["a/b"]] {
            let error = Network::create(names, BytesPerSecond(1)).unwrap_err();
            assert!(matches!(error, NetError::Name { .. }), "{names:?}");
        }
    }
}
