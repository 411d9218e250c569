//! The application's VMs, and the command lines of their QEMUs.

use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};

use rate_limiter::Bytes;
use uuid::Uuid;

use super::image::AppImage;
use crate::net::wan::Mac;
use crate::qemu::{Accel, QMP_PLACEHOLDER, QemuError, installed, quote};

/// Guests keep their addresses, in snapshots too: they are the same in every testbed, whose
/// namespaces keep them apart.
pub const NETWORK: [u8; 3] = [192, 168, 77];
/// Length of the network's prefix.
pub const PREFIX: u8 = 24;
/// The users' address in that network.
pub const USERS: u8 = 254;

/// What a VM is to the application.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Tier {
    /// nginx.
    Web,
    /// The app server.
    App,
    /// redis.
    Db,
}

impl Tier {
    /// As the guest is told it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Web => "web",
            Self::App => "app",
            Self::Db => "db",
        }
    }
}

/// One VM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AppVm {
    /// Its name.
    pub name: String,
    /// What it is.
    pub tier: Tier,
    /// The same at both sites.
    pub uuid: Uuid,
    /// The same at both sites.
    pub mac: Mac,
    /// The same at both sites.
    pub address: Ipv4Addr,
}

impl AppVm {
    /// Its tap, on every host.
    #[must_use]
    pub fn tap(&self) -> String {
        format!("vm-{}", self.name)
    }

    /// Its hardware address as it is written.
    #[must_use]
    pub fn mac_text(&self) -> String {
        self.mac.map(|byte| format!("{byte:02x}")).join(":")
    }
}

/// The VMs of an application with `apps` app servers.
#[must_use]
pub fn machines(apps: u8) -> Vec<AppVm> {
    let mut tiers = vec![("web".to_owned(), Tier::Web)];
    if apps == 1 {
        tiers.push(("app".to_owned(), Tier::App));
    } else {
        tiers.extend((1..=apps).map(|number| (format!("app{number}"), Tier::App)));
    }
    tiers.push(("db".to_owned(), Tier::Db));
    let [a, b, c] = NETWORK;
    (10_u8..)
        .zip(tiers)
        .map(|(last, (name, tier))| AppVm {
            name,
            tier,
            uuid: Uuid::from_u128(0x6d75_7374_6572_4000_8000_0000_0000_0000 | u128::from(last)),
            mac: [0x52, 0x54, 0x00, 0x6d, 0x75, last],
            address: Ipv4Addr::new(a, b, c, last),
        })
        .collect()
}

/// How a QEMU gets its guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Start {
    /// It boots.
    Boot,
    /// From a file that a QEMU with the same guest wrote.
    Snapshot(PathBuf),
    /// It waits for a migration and stays paused after it.
    Incoming,
}

/// One VM on one host: all that its QEMU's command line says.
#[derive(Debug, Clone)]
pub struct AppLaunch {
    /// The VM.
    pub vm: AppVm,
    /// What the guest is told at its boot.
    pub kernel_line: String,
    /// Who executes it.
    pub accel: Accel,
    /// Its RAM.
    pub memory: Bytes,
    /// Its image.
    pub image: AppImage,
    /// Where the guest's console goes.
    pub console: PathBuf,
    /// The socket of the testbed's own monitor.
    pub observe: PathBuf,
    /// Whether it has a network card; without one it only shows that it boots.
    pub networked: bool,
}

/// What the guest of `vm` is told at its boot.
#[must_use]
pub fn kernel_line(vm: &AppVm, all: &[AppVm]) -> String {
    let of = |tier: Tier| {
        let found = all.iter().filter(move |other| other.tier == tier);
        let found: Vec<String> = found.map(|other| other.address.to_string()).collect();
        found.join(",")
    };
    let mut line = format!(
        "console=ttyS0 quiet panic=-1 mitigations=off nokaslr tsc=reliable ipv6.disable=1 \
         muster.tier={} muster.address={}/{PREFIX}",
        vm.tier.name(),
        vm.address
    );
    match vm.tier {
        Tier::Web => line += &format!(" muster.app={}", of(Tier::App)),
        Tier::App => line += &format!(" muster.db={}", of(Tier::Db)),
        Tier::Db => {}
    }
    line
}

impl AppLaunch {
    /// The command vector, with [`QMP_PLACEHOLDER`] for the path of Muster's QMP socket.
    ///
    /// # Errors
    /// If there is no usable QEMU.
    pub fn template(&self, start: &Start) -> Result<Vec<String>, QemuError> {
        let qemu = installed()?;
        let mut command: Vec<String> = [&qemu.program, "-nodefaults", "-no-user-config"]
            .map(str::to_owned)
            .into();
        let mut option = |name: &str, value: String| command.extend([name.to_owned(), value]);
        option("-display", "none".to_owned());
        option("-name", self.vm.name.clone());
        option("-uuid", self.vm.uuid.to_string());
        option("-machine", format!("{},accel={}", qemu.machine, self.accel));
        option("-cpu", "qemu64".to_owned());
        option("-smp", "1".to_owned());
        option("-m", format!("size={}M", self.memory.0 >> 20));
        option("-kernel", path(&self.image.kernel));
        option("-initrd", path(&self.image.initrd));
        option("-append", self.kernel_line.clone());
        option(
            "-chardev",
            format!("file,id=console,path={},append=on", quote(&self.console)),
        );
        option("-serial", "chardev:console".to_owned());
        if self.networked {
            let tap = self.vm.tap();
            option(
                "-netdev",
                format!("tap,id=net,ifname={tap},script=no,downscript=no"),
            );
            let mac = self.vm.mac_text();
            option(
                "-device",
                format!("virtio-net-pci,netdev=net,mac={mac},romfile="),
            );
        }
        option("-qmp", format!("unix:{QMP_PLACEHOLDER},server=on,wait=off"));
        option(
            "-qmp",
            format!("unix:{},server=on,wait=off", quote(&self.observe)),
        );
        match start {
            Start::Boot => command.push("-no-reboot".to_owned()),
            Start::Snapshot(file) => {
                option("-incoming", format!("exec:cat {}", shell(file)));
                command.push("-no-reboot".to_owned());
            }
            Start::Incoming => {
                option("-incoming", "defer".to_owned());
                command.extend(["-no-reboot".to_owned(), "-S".to_owned()]);
            }
        }
        Ok(command)
    }
}

fn path(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

/// A path as a word of the shell.
pub(super) fn shell(path: &Path) -> String {
    format!("'{}'", path.to_string_lossy().replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_tier_is_told_who_is_behind_it() {
        let all = machines(2);
        let names: Vec<&str> = all.iter().map(|vm| vm.name.as_str()).collect();
        assert_eq!(names, ["web", "app1", "app2", "db"]);
        assert!(kernel_line(&all[0], &all).ends_with(" muster.app=192.168.77.11,192.168.77.12"));
        assert!(kernel_line(&all[2], &all).ends_with(" muster.db=192.168.77.13"));
        assert!(
            kernel_line(&all[3], &all).ends_with(" muster.tier=db muster.address=192.168.77.13/24")
        );
        assert_eq!(machines(1).len(), 3);
    }

    #[test]
    fn a_path_is_one_word_of_the_shell() {
        assert_eq!(shell(Path::new("/a b/it's")), r"'/a b/it'\''s'");
    }
}
