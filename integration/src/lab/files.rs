//! The configuration files that a lab writes.

use std::fmt::Write;
use std::path::Path;

use coordinator::Application;
use sidecar::config::ImageFormat;
use sidecar::protocol::types::{Chain, CopyMode};

use super::{Lab, LabError};
use crate::guest::{GuestSpec, IdleDisk, IdleKind};
use crate::qemu::{DISK_NODE, Role};

/// A string as TOML writes it.
pub(crate) fn quoted(text: &str) -> String {
    toml::Value::String(text.to_owned()).to_string()
}

/// What the guest is known to do, for the planner.
fn profile(guest: &GuestSpec) -> String {
    let most = guest.dirty_rate.0;
    let mean = guest.on_off.map_or(most, |phases| {
        let (on, off) = (phases.on.as_millis(), phases.off.as_millis());
        let mean = u128::from(most) * on / (on + off).max(1);
        u64::try_from(mean).unwrap_or(most)
    });
    format!(
        "memory = \"{}B\"\ndirty-rate = \"{mean}B/s\"\nmax-dirty-rate = \"{most}B/s\"\n\
         writable-working-set = \"{}B\"\n",
        guest.memory.0, guest.working_set.0
    )
}

/// Whether a disk moves with its guest.
fn moves(disk: &IdleDisk) -> bool {
    disk.kind != IdleKind::Shared
}

/// Where a disk lies.
fn place(node: &str, image: &Path, format: ImageFormat) -> String {
    let (image, format) = (quoted(&image.to_string_lossy()), format.name());
    format!("\n[[vm.disk]]\nnode = \"{node}\"\nimage = {image}\nformat = \"{format}\"\n")
}

impl Lab {
    /// The sidecar's configuration: every guest has a template on every host.
    pub(super) fn sidecar_config(&self, host: &str) -> Result<String, LabError> {
        let directory = self.host_directory(host);
        let path = |name: &str| quoted(&directory.join(name).to_string_lossy());
        let address = self.network.host(host)?.address();
        let mut text = format!(
            "version = 1\nhost = {}\nstate-dir = {}\nruntime-dir = {}\n\n[control]\nunix = {}\n\n\
             [stream]\nlisten = \"{address}:4601\"\ninsecure = true\n",
            quoted(host),
            path("state"),
            path("run"),
            path("control.sock"),
        );
        for guest in &self.spec.guests {
            let _ = write!(text, "\n[[vm]]\nname = {}\n", quoted(&guest.name));
            if self.spec.adopting.iter().any(|adopting| adopting == host) {
                text.push_str("adopt = true\n");
                continue;
            }
            let template = self.launch(&guest.name, host)?.template(Role::Incoming)?;
            let words: Vec<String> = template.iter().map(|word| quoted(word)).collect();
            let _ = writeln!(text, "incoming = [{}]", words.join(", "));
            let launch = self.launch(&guest.name, host)?;
            if let Some(disk) = guest.disk {
                text += &place(DISK_NODE, &launch.image, disk.format);
                text += "reuse = true\n";
            }
            for disk in guest.idle.iter().filter(|disk| moves(disk)) {
                text += &place(&disk.node, &launch.idle_image(disk), disk.format());
                if disk.kind == IdleKind::Layered(Chain::Keep) {
                    let base = launch.base_image(disk);
                    let _ = writeln!(text, "backing = {}", quoted(&base.to_string_lossy()));
                }
            }
        }
        Ok(text)
    }

    /// The application of some guests, moving from one host to another.
    ///
    /// # Errors
    /// The lab's settings are not valid, or it has no such guests.
    pub fn application_of(
        &self,
        guests: &[&str],
        from: &str,
        to: &str,
    ) -> Result<Application, LabError> {
        let name = format!("{}.{from}-{to}.toml", guests.join("."));
        let text = self.application_text(guests, from, to);
        Ok(Application::parse(&text, &self.directory().join(name))?)
    }

    /// The application file.
    pub(super) fn application_text(&self, guests: &[&str], from: &str, to: &str) -> String {
        let chosen = |name: &str| guests.contains(&name);
        let mut text = format!(
            "version = 1\n\n[application]\nname = \"lab\"\nbandwidth = {}\n",
            quoted(&format!("{}B/s", self.bandwidth().0))
        );
        for line in &self.spec.settings {
            let _ = writeln!(text, "{line}");
        }
        for host in &self.spec.hosts {
            let control = format!("unix:{}", self.control(host).display());
            let _ = write!(
                text,
                "\n[[host]]\nname = {}\ncontrol = {}\n",
                quoted(host),
                quoted(&control)
            );
        }
        for guest in self.spec.guests.iter().filter(|guest| chosen(&guest.name)) {
            let _ = write!(
                text,
                "\n[[vm]]\nname = {}\nuuid = \"{}\"\nfrom = {}\nto = {}\n",
                quoted(&guest.name),
                guest.uuid,
                quoted(from),
                quoted(to)
            );
            text += &profile(guest);
            if guest.balloon {
                text += "balloon = true\nballoon-reserve = \"8MiB\"\n";
            }
            if let Some(least) = guest.disk.and_then(|disk| disk.least) {
                let _ = writeln!(text, "min-write-rate = \"{}B/s\"", least.0);
            }
            if let Some(disk) = guest.disk {
                let mode = if disk.write_blocking {
                    CopyMode::WriteBlocking
                } else {
                    CopyMode::Background
                };
                let _ = write!(
                    text,
                    "\n[[vm.disks]]\nnode = \"{DISK_NODE}\"\ncopy-mode = \"{mode}\"\n"
                );
            }
            for disk in guest.idle.iter().filter(|disk| moves(disk)) {
                let _ = write!(text, "\n[[vm.disks]]\nnode = \"{}\"\n", disk.node);
                if let IdleKind::Layered(chain) = disk.kind {
                    let _ = writeln!(text, "chain = \"{chain}\"");
                }
            }
        }
        for (one, other, rate) in &self.spec.traffic {
            if !chosen(one) || !chosen(other) {
                continue;
            }
            let _ = write!(
                text,
                "\n[[traffic]]\nbetween = [{}, {}]\nrate = \"{}B/s\"\n",
                quoted(one),
                quoted(other),
                rate.0
            );
        }
        text
    }
}
