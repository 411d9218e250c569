//! Checks a guest's disk against what its counters say it must hold.
//!
//! The guest must be paused. Every write that the disk has acknowledged must be there, the latest of
//! its block; the one that was begun after them may be.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::check::tag;
use super::{GuestState, PAGE, Params};

/// Bytes of a block.
const BLOCK: usize = 4096;

/// What is wrong with a disk.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// The image could not be read.
    #[error("cannot read the disk's image: {0}")]
    Read(#[from] io::Error),
    /// A write failed.
    #[error("{0} writes to the disk failed")]
    Failed(u32),
    /// A block does not hold what it must.
    #[error(
        "block {block}: holds {found:x?}; expected write {expected} ({done} writes acknowledged, \
         {begun} begun)"
    )]
    Block {
        /// Which block.
        block: u32,
        /// Number and tag found at its beginning, and at its end.
        found: [u32; 4],
        /// The number of the last write to this block, 0 if there was none.
        expected: u32,
        /// Acknowledged writes.
        done: u32,
        /// Begun writes.
        begun: u32,
    },
    /// Two images of the same disk differ.
    #[error("the images differ in block {0}")]
    Differ(u64),
}

/// What a block of a filled disk holds before it is written.
#[must_use]
pub fn fill(block: u32) -> Vec<u8> {
    let word = block.wrapping_mul(0x9e37_79b9) | 1;
    word.to_le_bytes().repeat(BLOCK / 4)
}

/// Makes the raw image of a filled disk.
///
/// # Errors
/// It is there already, or cannot be written.
pub fn make_filled(image: &Path, blocks: u32) -> io::Result<()> {
    let mut file = BufWriter::with_capacity(1 << 20, File::create_new(image)?);
    for block in 0..blocks {
        file.write_all(&fill(block))?;
    }
    file.flush()
}

/// The number of the last write to a block after `writes` writes, 0 if there was none.
fn last_write(blocks: u32, block: u32, writes: u32) -> u32 {
    // Write n goes to block (n - 1) % blocks.
    let first = block + 1;
    if writes < first {
        return 0;
    }
    first + (writes - first) / blocks * blocks
}

/// Checks a raw image of the disk of a paused guest, which was `filled` or empty in the beginning.
///
/// # Errors
/// Names the first block that does not hold what it must.
pub fn check(
    image: &Path,
    params: &Params,
    filled: bool,
    state: &GuestState,
) -> Result<(), DiskError> {
    if state.disk_failed > 0 {
        return Err(DiskError::Failed(state.disk_failed));
    }
    let file = File::open(image)?;
    let mut data = [0; BLOCK];
    for block in 0..params.disk_blocks {
        file.read_exact_at(&mut data, u64::from(block) * PAGE)?;
        let word = |at: usize| {
            let mut word = [0; 4];
            word.copy_from_slice(&data[at..at + 4]);
            u32::from_le_bytes(word)
        };
        let found = [word(0), word(4), word(4088), word(4092)];
        let good = |number: u32| match number {
            0 if filled => data[..] == fill(block),
            0 => data.iter().all(|byte| *byte == 0),
            _ => {
                let pair = [number, tag(block, number)];
                found == [pair[0], pair[1], pair[0], pair[1]]
            }
        };
        let expected = last_write(params.disk_blocks, block, state.disk_done);
        let begun = last_write(params.disk_blocks, block, state.disk_begun);
        if !good(expected) && !good(begun) {
            return Err(DiskError::Block {
                block,
                found,
                expected,
                done: state.disk_done,
                begun: state.disk_begun,
            });
        }
    }
    Ok(())
}

/// Compares two images of one disk.
///
/// # Errors
/// Names the first block in which they differ.
pub fn compare(one: &Path, other: &Path, params: &Params) -> Result<(), DiskError> {
    let (one, other) = (File::open(one)?, File::open(other)?);
    let (mut a, mut b) = ([0; BLOCK], [0; BLOCK]);
    for block in 0..u64::from(params.disk_blocks) {
        one.read_exact_at(&mut a, block * PAGE)?;
        other.read_exact_at(&mut b, block * PAGE)?;
        if a != b {
            return Err(DiskError::Differ(block));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::GuestSpec;
    use super::*;
    use crate::guest::DiskSpec;

    #[test]
    fn a_lost_a_stale_and_a_torn_write_are_found() {
        let mut spec: GuestSpec = "g:4MiB:1MB/s:64KiB".parse().unwrap();
        spec.disk = Some(DiskSpec {
            size: rate_limiter::Bytes(8 * PAGE),
            rate: rate_limiter::BytesPerSecond(1_000_000),
            filled: false,
            write_blocking: false,
            format: sidecar::config::ImageFormat::Raw,
            least: None,
        });
        let params = spec.params().unwrap();
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("disk");
        let write = |upto: u32| {
            let mut bytes = vec![0_u8; 8 * BLOCK];
            for number in 1..=upto {
                let block = (number - 1) % 8;
                let at = block as usize * BLOCK;
                for at in [at, at + 4088] {
                    bytes[at..at + 4].copy_from_slice(&number.to_le_bytes());
                    bytes[at + 4..at + 8].copy_from_slice(&tag(block, number).to_le_bytes());
                }
            }
            bytes
        };
        let state = |done, begun| GuestState {
            ticks: 0,
            writes: 0,
            disk_begun: begun,
            disk_done: done,
            disk_failed: 0,
            params: params.words(),
        };
        std::fs::write(&path, write(21)).unwrap();
        check(&path, &params, false, &state(21, 21)).unwrap();
        check(&path, &params, false, &state(20, 21)).unwrap();
        check(&path, &params, false, &state(21, 22)).unwrap();
        assert!(
            check(&path, &params, false, &state(22, 22)).is_err(),
            "one is lost"
        );
        assert!(
            check(&path, &params, false, &state(20, 20)).is_err(),
            "one too many"
        );
        let mut torn = write(21);
        torn[4088] ^= 1;
        std::fs::write(&path, torn).unwrap();
        assert!(check(&path, &params, false, &state(21, 21)).is_err());
        let other = directory.path().join("other");
        std::fs::write(&other, write(21)).unwrap();
        assert!(matches!(
            compare(&path, &other, &params),
            Err(DiskError::Differ(0))
        ));
    }
}
