//! The disks of a guest: what QEMU is told of them, and the images that they lie in.
//!
//! Idle disks hold a pattern that follows from their name, so that any copy of one can be checked.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::Command;

use sidecar::config::ImageFormat;
use sidecar::protocol::types::Chain;

use super::{DISK_NODE, Launch, QemuError, Role, quote};
use crate::guest::{IdleDisk, IdleKind, PAGE, disk};

/// Of a layered disk so much is in its topmost image, at its beginning.
const TOP: usize = 64 << 10;

impl IdleDisk {
    /// What kind of image it lies in.
    #[must_use]
    pub fn format(&self) -> ImageFormat {
        match self.kind {
            IdleKind::Raw | IdleKind::Shared => ImageFormat::Raw,
            IdleKind::ReadOnly | IdleKind::Layered(_) => ImageFormat::Qcow2,
        }
    }

    /// What it holds.
    fn content(&self) -> Vec<u8> {
        let mut state = self.node.bytes().fold(0x9e37_79b9_u32, |state, byte| {
            state.rotate_left(5) ^ u32::from(byte)
        });
        let size = usize::try_from(self.size.0).unwrap_or(0);
        let words = (0..size / 4).flat_map(|_| {
            state ^= state << 13;
            state ^= state >> 17;
            state ^= state << 5;
            state.to_le_bytes()
        });
        words.collect()
    }
}

/// Runs qemu-img; what it said, if it fails.
fn qemu_img(arguments: &[&str]) -> io::Result<Vec<u8>> {
    let output = Command::new("qemu-img").args(arguments).output()?;
    if output.status.success() {
        return Ok(output.stdout);
    }
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    Err(io::Error::other(format!("qemu-img {arguments:?}: {said}")))
}

/// A raw copy of a qcow2 image, beside it.
///
/// # Errors
/// qemu-img cannot make it.
pub fn raw_copy(image: &Path) -> io::Result<PathBuf> {
    let raw = image.with_extension("raw");
    let (from, to) = (image.to_string_lossy(), raw.to_string_lossy());
    qemu_img(&["convert", "-U", "-f", "qcow2", "-O", "raw", &from, &to])?;
    Ok(raw)
}

impl Launch {
    /// The image of an idle disk on this host.
    #[must_use]
    pub fn idle_image(&self, disk: &IdleDisk) -> PathBuf {
        let (name, node) = (&self.spec.name, &disk.node);
        self.directory.join(match disk.kind {
            IdleKind::Shared => format!("{name}.{node}.shared"),
            _ => format!("{name}.{}.{node}.img", self.host),
        })
    }

    /// The backing file of a layered disk, the same on all hosts.
    #[must_use]
    pub fn base_image(&self, disk: &IdleDisk) -> PathBuf {
        let name = format!("{}.{}.base", self.spec.name, disk.node);
        self.directory.join(name)
    }

    pub(super) fn disk_options(&self, role: Role) -> Vec<(&'static str, String)> {
        let mut options = Vec::new();
        let mut node = |name: &str, image: &Path, format: ImageFormat, rest: &str, device: &str| {
            let image = quote(image);
            let read_only = if device == "ide-cd" {
                ",read-only=on"
            } else {
                ""
            };
            let file = format!("driver=file,node-name={name}-file,filename={image}{read_only}");
            options.push(("-blockdev", file));
            let driver = format.name();
            let node =
                format!("driver={driver},node-name={name},file={name}-file{read_only}{rest}");
            options.push(("-blockdev", node));
            // Two at each of the two channels.
            let at = options
                .iter()
                .filter(|option| option.0 == "-device")
                .count();
            let place = format!("bus=ide.{},unit={}", at / 2, at % 2);
            options.push((
                "-device",
                format!("{device},{place},drive={name},id={name}-device"),
            ));
        };
        if let Some(disk) = self.spec.disk {
            node(DISK_NODE, &self.image, disk.format, "", "ide-hd");
        }
        for disk in &self.spec.idle {
            let has_base = match disk.kind {
                IdleKind::Layered(chain) => role == Role::Boot || chain == Chain::Keep,
                _ => false,
            };
            let base = quote(&self.base_image(disk));
            let rest = if has_base {
                format!(",backing.driver=raw,backing.file.driver=file,backing.file.filename={base}")
            } else {
                String::new()
            };
            let device = match disk.kind {
                IdleKind::ReadOnly => "ide-cd",
                _ => "ide-hd",
            };
            let image = self.idle_image(disk);
            node(&disk.node, &image, disk.format(), &rest, device);
        }
        options
    }

    /// Makes the images of its disks, unless they are there.
    pub(super) fn make_images(&self, role: Role) -> Result<(), QemuError> {
        let failed = |path: &Path| {
            let path = path.to_owned();
            move |error| QemuError::Image { path, error }
        };
        if let Some(disk) = self.spec.disk.filter(|_| !self.image.exists()) {
            let made = match disk.filled && role == Role::Boot {
                true => make_filled(&self.image, disk.format, disk.size.0),
                false => make_empty(&self.image, disk.format, disk.size.0),
            };
            made.map_err(failed(&self.image))?;
        }
        for disk in self.spec.idle.iter().filter(|_| role == Role::Boot) {
            let path = self.idle_image(disk);
            self.make_idle(disk, &path).map_err(failed(&path))?;
        }
        Ok(())
    }

    fn make_idle(&self, disk: &IdleDisk, path: &Path) -> io::Result<()> {
        let content = disk.content();
        let shown = path.to_string_lossy();
        match disk.kind {
            IdleKind::Raw | IdleKind::Shared => fs::write(path, content),
            IdleKind::ReadOnly => {
                let raw = path.with_extension("raw");
                fs::write(&raw, content)?;
                let from = raw.to_string_lossy();
                qemu_img(&["convert", "-f", "raw", "-O", "qcow2", &from, &shown])?;
                fs::remove_file(raw)
            }
            IdleKind::Layered(_) => {
                // What the base has at the beginning is not what the guest reads there.
                let (base, top) = (self.base_image(disk), path.with_extension("top"));
                let mut below = vec![0x5a; TOP];
                below.extend(&content[TOP..]);
                fs::write(&base, below)?;
                let (lower, upper) = (base.to_string_lossy(), top.to_string_lossy());
                qemu_img(&[
                    "create", "-q", "-f", "qcow2", "-F", "raw", "-b", &lower, &shown,
                ])?;
                let mut file = File::create(&top)?;
                file.write_all(&content[..TOP])?;
                let write = format!("write -q -s {upper} 0 {TOP}");
                let status = Command::new("qemu-io")
                    .args(["-f", "qcow2", "-c", &write, &shown])
                    .status()?;
                fs::remove_file(top)?;
                if status.success() {
                    return Ok(());
                }
                Err(io::Error::other("qemu-io cannot write"))
            }
        }
    }

    /// Whether an idle disk holds on this host what it must, and lies in what it must.
    ///
    /// # Errors
    /// It does not, or cannot be read.
    pub fn check_idle(&self, disk: &IdleDisk) -> io::Result<()> {
        let image = self.idle_image(disk);
        let expected = self
            .directory
            .join(format!("{}.{}.expected", self.spec.name, disk.node));
        fs::write(&expected, disk.content())?;
        let (one, other) = (expected.to_string_lossy(), image.to_string_lossy());
        let format = disk.format().name();
        qemu_img(&[
            "compare", "-q", "-U", "-f", "raw", "-F", format, &one, &other,
        ])?;
        fs::remove_file(&expected)?;
        if let IdleKind::Layered(chain) = disk.kind {
            let said = qemu_img(&["info", "-U", "--output=json", &other])?;
            let info: serde_json::Value = serde_json::from_slice(&said)?;
            let kept = info["backing-filename"].is_string();
            let small = info["actual-size"].as_u64() < Some(disk.size.0 / 2);
            if (kept, small) != (chain == Chain::Keep, chain == Chain::Keep) {
                return Err(io::Error::other(format!("chain {chain}: {info}")));
            }
        }
        Ok(())
    }
}

fn make_filled(path: &Path, format: ImageFormat, size: u64) -> io::Result<()> {
    let blocks = u32::try_from(size / PAGE).map_err(io::Error::other)?;
    match format {
        ImageFormat::Raw => disk::make_filled(path, blocks),
        ImageFormat::Qcow2 => {
            let raw = path.with_extension("filled");
            disk::make_filled(&raw, blocks)?;
            let (from, to) = (raw.to_string_lossy(), path.to_string_lossy());
            qemu_img(&["convert", "-f", "raw", "-O", "qcow2", &from, &to])?;
            fs::remove_file(&raw)
        }
    }
}

fn make_empty(path: &Path, format: ImageFormat, size: u64) -> io::Result<()> {
    match format {
        ImageFormat::Raw => File::create_new(path)?.set_len(size),
        ImageFormat::Qcow2 => {
            let shown = path.to_string_lossy();
            qemu_img(&["create", "-q", "-f", "qcow2", &shown, &size.to_string()]).map(drop)
        }
    }
}
