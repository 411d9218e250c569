//! Images for disks that come here, made before the QEMU that opens them is started.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::statvfs::statvfs;

use super::log;
use crate::config::{DiskConfig, ImageFormat, VmConfig};
use crate::protocol::command::PrepareDisk;
use crate::protocol::types::Chain;

/// qemu-img makes an empty image in that time.
const QEMU_IMG_WITHIN: Duration = Duration::from_secs(10);
/// How often it is looked whether it has.
const LOOK: Duration = Duration::from_millis(5);
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
        let keep = disk.chain == Chain::Keep;
        if keep && found.backing.is_none() {
            return Err(format!(
                "disk `{}` keeps its backing file, and none is configured here: add `backing` to \
                 its [[vm.disk]], or set `chain = \"flatten\"` in the application file",
                disk.node
            ));
        }
        let mut known = found.clone();
        known.backing = known.backing.filter(|_| keep);
        Ok(Image {
            disk: known,
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
            log(&format!("the image {path} cannot be removed: {error}"));
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
            ImageFormat::Qcow2 => self.make_qcow2(qemu_img),
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

    fn make_qcow2(&self, qemu_img: &Path) -> Result<(), String> {
        let cannot = |error: io::Error| format!("{} cannot be run: {error}", qemu_img.display());
        let mut command = Command::new(qemu_img);
        command.args(["create", "-q", "-f", "qcow2"]);
        if let Some(backing) = &self.disk.backing {
            command.args(["-F", self.disk.backing_format.name(), "-b"]);
            command.arg(backing);
        }
        let mut child = command
            .arg(&self.disk.image)
            .arg(self.size_bytes.to_string())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(cannot)?;
        let by = Instant::now() + QEMU_IMG_WITHIN;
        let status = loop {
            match child.try_wait() {
                Ok(None) if Instant::now() < by => std::thread::sleep(LOOK),
                Ok(None) => {
                    // One that waits for a file system ends when that does.
                    let _ = child.kill();
                    return Err(format!(
                        "{} was not done within {QEMU_IMG_WITHIN:?}",
                        qemu_img.display()
                    ));
                }
                result => break result,
            }
        };
        if status
            .as_ref()
            .is_ok_and(|status| status.is_some_and(|status| status.success()))
        {
            return Ok(());
        }
        let _ = fs::remove_file(&self.disk.image);
        status.map_err(cannot)?;
        let mut said = String::new();
        if let Some(errors) = &mut child.stderr {
            errors.read_to_string(&mut said).map_err(cannot)?;
        }
        Err(said.trim().to_owned())
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
                backing: None,
                backing_format: ImageFormat::Raw,
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
    fn why_qemu_img_makes_no_image_is_said() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("a.qcow2");
        let qcow2 = |path: &Path| {
            let mut image = image(path, false, 8192);
            image.disk.format = ImageFormat::Qcow2;
            image
        };
        // Programs that stand for it: one that is content, one that complains.
        let made = make(&[qcow2(&path)], Path::new("/bin/true"));
        assert_eq!(made, Ok(vec![path.clone()]));
        let error = make(&[qcow2(&path)], Path::new("/bin/ls")).expect_err("refused");
        assert!(error.contains("cannot access"), "{error}");
        let error = make(&[qcow2(&path)], Path::new("/no/such/program")).expect_err("none");
        assert!(error.contains("cannot be run"), "{error}");
    }

    #[test]
    fn a_disk_that_is_not_known_here_is_named() {
        let disks = [PrepareDisk {
            node: "disk7".into(),
            size_bytes: 1,
            copy_mode: CopyMode::Background,
            chain: Chain::Keep,
            read_only: false,
        }];
        let config = VmConfig {
            name: "db".into(),
            qmp: None,
            incoming: Vec::new(),
            adopt: false,
            disks: vec![DiskConfig {
                node: "disk7".into(),
                ..image(Path::new("/a"), false, 1).disk
            }],
        };
        let error = images_of(Some(&config), &disks).expect_err("no backing file");
        assert!(error.contains("flatten"), "{error}");
        let error = images_of(None, &disks).expect_err("unknown");
        assert!(
            error.contains("disk7") && error.contains("[[vm.disk]]"),
            "{error}"
        );
    }
}
