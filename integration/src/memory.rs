//! Reads and compares the RAM of guests from outside, through /proc/PID/mem of their QEMUs.
//!
//! Two uses. With both sides paused, before `cont`: [`GuestRam::hash`] over all RAM must be equal.
//! After commit, with the destination running and the source still paused: [`compare_running`].

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::time::Duration;

use rate_limiter::Bytes;
use xxhash_rust::xxh3::Xxh3;

use crate::guest::check::{page_version, working_set_index};
use crate::guest::{PAGE, PageReader, Params};
use crate::qmp::{Qmp, QmpError};

const CHUNK: usize = 1 << 20;
const PAGE_BYTES: usize = 4096;
const MONITOR_LIMIT: Duration = Duration::from_secs(10);
/// How often a page that is written at this moment is read again.
const TORN_READS: usize = 10;

/// Why a guest's RAM could not be read or compared.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// QEMU did not tell where the RAM is.
    #[error("cannot find the guest's RAM: {0}")]
    Monitor(#[from] QmpError),
    /// QEMU's answer was not understood.
    #[error("cannot find the guest's RAM: QEMU said `{said}`")]
    Address {
        /// What it said.
        said: String,
    },
    /// The process could not be opened.
    #[error("cannot open the memory of process {pid}: {error} (root is needed)")]
    Open {
        /// The process.
        pid: u32,
        /// Why.
        error: io::Error,
    },
    /// A part could not be read.
    #[error("cannot read guest RAM at {address:#x}: {error}")]
    Read {
        /// Where.
        address: u64,
        /// Why.
        error: io::Error,
    },
    /// The two sides are not of one size.
    #[error("source has {source_size}, destination {destination_size}")]
    Size {
        /// RAM of the source.
        source_size: Bytes,
        /// RAM of the destination.
        destination_size: Bytes,
    },
    /// The two sides differ where they must not.
    #[error(
        "{count} pages differ from the source, the first is {first:#x}: {found} (source: {expected})"
    )]
    Differs {
        /// How many pages.
        count: usize,
        /// The first of them.
        first: u64,
        /// What begins it at the destination.
        found: String,
        /// What begins it at the source.
        expected: String,
    },
}

/// The RAM of one guest.
#[derive(Debug)]
pub struct GuestRam {
    file: File,
    base: u64,
    size: Bytes,
}

impl GuestRam {
    /// Finds the RAM of the guest behind `monitor`, which has `size` of it.
    ///
    /// # Errors
    /// If QEMU does not tell where it is, or its memory may not be read.
    pub fn open(monitor: &mut Qmp, size: Bytes) -> Result<Self, MemoryError> {
        let said = monitor.human("gpa2hva 0", MONITOR_LIMIT)?;
        let base = said
            .rsplit_once("0x")
            .and_then(|(_, hex)| u64::from_str_radix(hex.trim(), 16).ok())
            .ok_or(MemoryError::Address { said })?;
        let pid = monitor
            .peer_pid()
            .map_err(|error| MemoryError::Open { pid: 0, error })?;
        let file = File::open(format!("/proc/{pid}/mem"))
            .map_err(|error| MemoryError::Open { pid, error })?;
        Ok(Self { file, base, size })
    }

    /// How much RAM it has.
    #[must_use]
    pub fn size(&self) -> Bytes {
        self.size
    }

    /// A 128-bit hash (XXH3) of all RAM. Means something only while the guest is paused.
    ///
    /// # Errors
    /// If the RAM cannot be read.
    pub fn hash(&self) -> Result<u128, MemoryError> {
        let mut hash = Xxh3::new();
        let mut buffer = vec![0; CHUNK];
        for (address, length) in chunks(self.size) {
            self.chunk(address, &mut buffer[..length])?;
            hash.update(&buffer[..length]);
        }
        Ok(hash.digest128())
    }

    fn chunk(&self, address: u64, buffer: &mut [u8]) -> Result<(), MemoryError> {
        self.read(address, buffer)
            .map_err(|error| MemoryError::Read { address, error })
    }
}

impl PageReader for GuestRam {
    fn read(&self, address: u64, buffer: &mut [u8]) -> io::Result<()> {
        let length = u64::try_from(buffer.len()).unwrap_or(u64::MAX);
        if address.saturating_add(length) > self.size.0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.file.read_exact_at(buffer, self.base + address)
    }
}

/// What a successful comparison saw.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Comparison {
    /// Pages of RAM.
    pub pages: u64,
    /// Pages of the working set that the destination has written since it runs.
    pub rewritten: u64,
}

/// Compares two paused guests page by page: tells where they differ when their hashes do.
///
/// # Errors
/// If a page differs, or cannot be read.
pub fn compare_paused(
    source: &GuestRam,
    destination: &GuestRam,
) -> Result<Comparison, MemoryError> {
    compare(source, destination, |_, _, _| Verdict::Differs)
}

/// Compares a running destination with its source, which is still paused as it was at switchover:
/// outside the working set and the guest's own first two pages (stack, control block) all must be
/// equal; in it every page must be equal, or hold a later write of this guest.
///
/// # Errors
/// If a page differs otherwise, or cannot be read.
pub fn compare_running(
    source: &GuestRam,
    destination: &GuestRam,
    params: &Params,
) -> Result<Comparison, MemoryError> {
    compare(source, destination, |page, before, now| {
        if page < 2 {
            return Verdict::Rewritten;
        }
        let Some(number) = u32::try_from(page)
            .ok()
            .filter(|page| working_set_index(params, *page).is_some())
        else {
            return Verdict::Differs;
        };
        let Some(sent) = page_version(number, before) else {
            return Verdict::Differs;
        };
        let mut again = [0; PAGE_BYTES];
        again.copy_from_slice(now);
        for _ in 0..TORN_READS {
            match page_version(number, &again) {
                Some(version) if version > sent => return Verdict::Rewritten,
                Some(_) => return Verdict::Differs,
                // The guest is between the two words of its write.
                None if destination.chunk(page * PAGE, &mut again).is_ok() => {}
                None => break,
            }
        }
        Verdict::Differs
    })
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verdict {
    Rewritten,
    Differs,
}

/// Reads both sides and asks `judge` about every page that is not equal.
fn compare(
    source: &GuestRam,
    destination: &GuestRam,
    mut judge: impl FnMut(u64, &[u8], &[u8]) -> Verdict,
) -> Result<Comparison, MemoryError> {
    if source.size != destination.size {
        return Err(MemoryError::Size {
            source_size: source.size,
            destination_size: destination.size,
        });
    }
    let mut rewritten = 0;
    let mut different: Option<(usize, MemoryError)> = None;
    let (mut left, mut right) = (vec![0; CHUNK], vec![0; CHUNK]);
    for (address, length) in chunks(source.size) {
        let (left, right) = (&mut left[..length], &mut right[..length]);
        source.chunk(address, left)?;
        destination.chunk(address, right)?;
        if left == right {
            continue;
        }
        let pages = left
            .chunks_exact(PAGE_BYTES)
            .zip(right.chunks_exact(PAGE_BYTES));
        for (page, (before, now)) in (address / PAGE..).zip(pages) {
            if before == now {
                continue;
            }
            if judge(page, before, now) == Verdict::Rewritten {
                rewritten += 1;
                continue;
            }
            let count = different.as_ref().map_or(0, |(count, _)| *count) + 1;
            let error = different.map_or_else(
                || MemoryError::Differs {
                    count,
                    first: page,
                    found: format!("{:02x?}", &now[..8]),
                    expected: format!("{:02x?}", &before[..8]),
                },
                |(_, error)| error,
            );
            different = Some((count, error));
        }
    }
    match different {
        None => Ok(Comparison {
            pages: source.size.0 / PAGE,
            rewritten,
        }),
        Some((all, mut error)) => {
            if let MemoryError::Differs { count, .. } = &mut error {
                *count = all;
            }
            Err(error)
        }
    }
}

/// Addresses and lengths of the pieces in which RAM is read.
fn chunks(size: Bytes) -> impl Iterator<Item = (u64, usize)> {
    let step = CHUNK as u64;
    (0..size.0.div_ceil(step)).map(move |index| {
        let address = index * step;
        let length = usize::try_from(size.0 - address).map_or(CHUNK, |rest| rest.min(CHUNK));
        (address, length)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest::GuestSpec;
    use crate::guest::check::tag;

    /// RAM as a file: what /proc/PID/mem is, without a QEMU.
    fn ram(pages: &[(u32, u32)]) -> GuestRam {
        let file = tempfile::tempfile().unwrap();
        file.set_len(4 << 20).unwrap();
        for &(page, version) in pages {
            let mut words = version.to_le_bytes().to_vec();
            words.extend(tag(page, version).to_le_bytes());
            file.write_all_at(&words, u64::from(page) * PAGE).unwrap();
        }
        GuestRam {
            file,
            base: 0,
            size: Bytes(4 << 20),
        }
    }

    fn params() -> Params {
        let spec: GuestSpec = "g:4MiB:1MB/s:64KiB".parse().unwrap();
        spec.params().unwrap()
    }

    #[test]
    fn equal_ram_has_equal_hashes() {
        let (one, two) = (ram(&[(300, 0), (513, 7)]), ram(&[(300, 0), (513, 7)]));
        assert_eq!(one.hash().unwrap(), two.hash().unwrap());
        assert_eq!(compare_paused(&one, &two).unwrap().pages, 1024);
        let three = ram(&[(300, 0), (513, 8)]);
        assert_ne!(one.hash().unwrap(), three.hash().unwrap());
        let error = compare_paused(&one, &three).unwrap_err();
        assert!(matches!(
            error,
            MemoryError::Differs {
                count: 1,
                first: 513,
                ..
            }
        ));
    }

    #[test]
    fn a_running_destination_may_write_later_versions_in_its_working_set_only() {
        let source = ram(&[(300, 0), (513, 7), (514, 8)]);
        let later = ram(&[(300, 0), (513, 23), (514, 8)]);
        let result = compare_running(&source, &later, &params()).unwrap();
        assert_eq!(result.rewritten, 1);
        for bad in [
            ram(&[(300, 0), (513, 6), (514, 8)]),
            ram(&[(300, 1), (513, 7), (514, 8)]),
            ram(&[(300, 0), (513, 7)]),
        ] {
            assert!(compare_running(&source, &bad, &params()).is_err());
        }
    }
}
