//! Images for disks that come here, made before the QEMU that opens them is started.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use nix::sys::statvfs::statvfs;

use crate::config::{DiskConfig, ImageFormat, VmConfig};
use crate::protocol::command::PrepareDisk;

/// What a file system must have left beside the disks.
const ROOM: u64 = 16 << 20;

/// An image to be made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Image {
    disk: DiskConfig,
    size_bytes: u64,
}

/// The images of the disks that come with a VM.
///
/// # Errors
/// Nothing is known here of one of them.
pub fn images_of(config: Option<&VmConfig>, disks: &[PrepareDisk]) -> Result<Vec<Image>, String> {
    let known = config.map_or(&[][..], |vm| &vm.disks);
    let image = |disk: &PrepareDisk| {
        let found = known.iter().find(|known| known.node == disk.node);
        let found = found.ok_or_else(|| {
            format!(
                "disk `{}` is not in the sidecar's configuration here: add a [[vm.disk]] with its \
                 `image`",
                disk.node
            )
        })?;
        Ok(Image {
            disk: found.clone(),
            size_bytes: disk.size_bytes,
        })
    };
    disks.iter().map(image).collect()
}

/// Makes the images; those that were there already, where that is allowed, are left out of what it
/// returns. After an error nothing that it made is left.
///
/// # Errors
/// One cannot be made, or is there already and may not be used.
pub fn make(images: &[Image], qemu_img: &Path) -> Result<Vec<PathBuf>, String> {
    let mut made = Vec::new();
    for image in images {
        match image.make(qemu_img) {
            Ok(true) => made.push(image.disk.image.clone()),
            Ok(false) => {}
            Err(error) => {
                remove(&made);
                return Err(format!("disk `{}`: {error}", image.disk.node));
            }
        }
    }
    Ok(made)
}

/// Removes images that a run has made.
pub fn remove(images: &[PathBuf]) {
    for image in images {
        if let Err(error) = fs::remove_file(image) {
            let path = image.display();
            eprintln!("muster-sidecar: the image {path} cannot be removed: {error}");
        }
    }
}

impl Image {
    fn make(&self, qemu_img: &Path) -> Result<bool, String> {
        let path = &self.disk.image;
        let shown = path.display();
        if path.exists() {
            return match self.disk.reuse {
                true => Ok(false),
                false => Err(format!(
                    "its image {shown} is there already: remove it, or set `reuse = true`"
                )),
            };
        }
        self.check_room()
            .map_err(|error| format!("its image {shown} cannot be made: {error}"))?;
        let made = match self.disk.format {
            ImageFormat::Raw => make_raw(path, self.size_bytes).map_err(|error| error.to_string()),
            ImageFormat::Qcow2 => make_qcow2(qemu_img, path, self.size_bytes),
        };
        made.map(|()| true)
            .map_err(|error| format!("its image {shown} cannot be made: {error}"))
    }

    fn check_room(&self) -> Result<(), String> {
        let directory = self.disk.image.parent().unwrap_or(Path::new("/"));
        let found = statvfs(directory).map_err(|error| io::Error::from(error).to_string())?;
        let free = found
            .blocks_available()
            .saturating_mul(found.fragment_size());
        let need = self.size_bytes.saturating_add(ROOM);
        if free < need {
            return Err(format!(
                "{} are free in {}, it may need {}",
                rate_limiter::Bytes(free),
                directory.display(),
                rate_limiter::Bytes(need)
            ));
        }
        Ok(())
    }
}

fn make_raw(path: &Path, size_bytes: u64) -> io::Result<()> {
    let file: File = OpenOptions::new().write(true).create_new(true).open(path)?;
    let sized = file.set_len(size_bytes);
    if sized.is_err() {
        // Half of an image helps nobody.
        let _ = fs::remove_file(path);
    }
    sized
}

fn make_qcow2(qemu_img: &Path, path: &Path, size_bytes: u64) -> Result<(), String> {
    let output = Command::new(qemu_img)
        .args(["create", "-q", "-f", "qcow2"])
        .arg(path)
        .arg(size_bytes.to_string())
        .stdin(Stdio::null())
        .output()
        .map_err(|error| format!("{} cannot be run: {error}", qemu_img.display()))?;
    if output.status.success() {
        return Ok(());
    }
    let _ = fs::remove_file(path);
    Err(String::from_utf8_lossy(&output.stderr).trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::types::CopyMode;

    fn image(path: &Path, reuse: bool, size_bytes: u64) -> Image {
        Image {
            disk: DiskConfig {
                node: "disk0".into(),
                image: path.to_owned(),
                format: ImageFormat::Raw,
                reuse,
            },
            size_bytes,
        }
    }

    #[test]
    fn an_image_is_made_once_and_an_old_one_is_not_touched_unasked() {
        let directory = tempfile::tempdir().expect("a directory");
        let (path, other) = (directory.path().join("a"), directory.path().join("b"));
        let nowhere = Path::new("/no/such/program");
        let made = make(&[image(&path, false, 8192)], nowhere).expect("made");
        assert_eq!(made, std::slice::from_ref(&path));
        assert_eq!(fs::metadata(&path).expect("there").len(), 8192);
        fs::write(&path, b"mine").expect("writes");
        let both = [image(&other, false, 1), image(&path, false, 8192)];
        let error = make(&both, nowhere).expect_err("it is there");
        assert!(error.contains("there already"), "{error}");
        assert!(!other.exists(), "what it had made is left");
        assert_eq!(make(&[image(&path, true, 8192)], nowhere), Ok(vec![]));
        assert_eq!(fs::read(&path).expect("there"), b"mine");
        let error = make(&[image(&other, false, 1 << 60)], nowhere).expect_err("too large");
        assert!(error.contains("are free in"), "{error}");
        remove(&made);
        assert!(!path.exists());
    }

    #[test]
    fn a_disk_that_is_not_known_here_is_named() {
        let disks = [PrepareDisk {
            node: "disk7".into(),
            size_bytes: 1,
            copy_mode: CopyMode::Background,
        }];
        let error = images_of(None, &disks).expect_err("unknown");
        assert!(
            error.contains("disk7") && error.contains("[[vm.disk]]"),
            "{error}"
        );
    }
}
