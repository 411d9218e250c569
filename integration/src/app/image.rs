//! The image of the application guests, as scripts/build-app-image.sh leaves it.

use std::io;
use std::path::{Path, PathBuf};

use xxhash_rust::xxh3::xxh3_64;

const VARIABLE: &str = "MUSTER_APP_IMAGE";
const DIRECTORY: &str = "app-image";

/// Why there is no image.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// It was not built.
    #[error(
        "there is no image of the application guests: run scripts/build-app-image.sh, or name its directory in {VARIABLE} (looked in {looked})"
    )]
    Missing {
        /// Where.
        looked: String,
    },
    /// It cannot be read.
    #[error("{path}: {error}")]
    File {
        /// Which file.
        path: PathBuf,
        /// Why.
        error: io::Error,
    },
}

/// Kernel and first file system of every application guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AppImage {
    /// Where it lies, and where snapshots of it are kept.
    pub directory: PathBuf,
    /// The kernel.
    pub kernel: PathBuf,
    /// The file system.
    pub initrd: PathBuf,
    /// A number that changes with their contents.
    pub hash: u64,
}

impl AppImage {
    /// Finds it: where a variable says, or in the target directory that this program lies in.
    ///
    /// # Errors
    /// It is not there.
    pub fn find() -> Result<Self, ImageError> {
        if let Some(directory) = std::env::var_os(VARIABLE) {
            return Self::open(Path::new(&directory));
        }
        let here = std::env::current_exe().unwrap_or_default();
        let places: Vec<PathBuf> = here
            .ancestors()
            .skip(1)
            .take(3)
            .map(|directory| directory.join(DIRECTORY))
            .collect();
        let looked: Vec<String> = places.iter().map(|p| p.display().to_string()).collect();
        let found = places.iter().find(|place| place.join("stamp").is_file());
        let found = found.ok_or_else(|| ImageError::Missing {
            looked: looked.join(", "),
        })?;
        Self::open(found)
    }

    fn open(directory: &Path) -> Result<Self, ImageError> {
        let (kernel, initrd) = (directory.join("vmlinuz"), directory.join("initrd"));
        let mut hash = 0;
        for path in [&kernel, &initrd] {
            let bytes = std::fs::read(path).map_err(|error| ImageError::File {
                path: path.clone(),
                error,
            })?;
            hash = xxh3_64(&bytes) ^ u64::rotate_left(hash, 1);
        }
        Ok(Self {
            directory: directory.to_owned(),
            kernel,
            initrd,
            hash,
        })
    }
}
