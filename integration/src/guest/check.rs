//! Checks a guest's whole RAM against what its write counter says it must hold.
//!
//! The guest must be paused. Between the two words of a page and the counter it may have stopped
//! in the middle of one write: one page may be a write ahead of the counter, and its tag old.

use std::io;

use super::{FIRST_PAGE, PAGE, PARAMS, Params, TAG};

/// Where the guest's control block lies.
pub const CONTROL_BLOCK: u64 = 0x1000;
const PARAMS_AT: usize = 64;
const CHUNK_PAGES: u32 = 256;
/// Offsets of rom.S.
const LCG_FACTOR: u32 = 1_664_525;
const LCG_STEP: u32 = 1_013_904_223;

/// Something that has a guest's RAM: a paused QEMU, a file, a slice.
pub trait PageReader {
    /// Fills `buffer` with the RAM from `address` on.
    ///
    /// # Errors
    /// If it cannot be read whole.
    fn read(&self, address: u64, buffer: &mut [u8]) -> io::Result<()>;
}

impl PageReader for [u8] {
    fn read(&self, address: u64, buffer: &mut [u8]) -> io::Result<()> {
        let start = usize::try_from(address).map_err(|_| io::ErrorKind::UnexpectedEof)?;
        let part = start
            .checked_add(buffer.len())
            .and_then(|end| self.get(start..end))
            .ok_or(io::ErrorKind::UnexpectedEof)?;
        buffer.copy_from_slice(part);
        Ok(())
    }
}

/// What a guest's control block says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GuestState {
    /// Ticks since it was ready.
    pub ticks: u32,
    /// Page writes since it was ready: the number of the last one.
    pub writes: u32,
    /// Disk writes begun.
    pub disk_begun: u32,
    /// Disk writes that the disk has acknowledged.
    pub disk_done: u32,
    /// Disk writes that failed.
    pub disk_failed: u32,
    /// The guest's own copy of its parameters.
    pub params: [u32; PARAMS],
}

/// What is wrong with a guest's RAM.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// The RAM could not be read.
    #[error("cannot read the guest's RAM at {address:#x}: {error}")]
    Read {
        /// Where.
        address: u64,
        /// Why.
        error: io::Error,
    },
    /// There is no ready guest.
    #[error("no ready guest: the control block begins with {found:#010x}, expected {TAG:#010x}")]
    NotReady {
        /// What stands there.
        found: u32,
    },
    /// It is another guest, or its parameters were damaged.
    #[error("the guest's parameters are {found:x?}, expected {expected:x?}")]
    Params {
        /// What stands in RAM.
        found: [u32; PARAMS],
        /// What its ROM was made with.
        expected: [u32; PARAMS],
    },
    /// A page does not hold what it must.
    #[error(
        "page {page:#x}: version {version}, tag {tag:#010x}; expected version {expected} (of {writes} writes){}",
        if *.rest { ", and bytes behind the tag are not zero" } else { "" }
    )]
    Page {
        /// Which page.
        page: u32,
        /// The number of the write found in it.
        version: u32,
        /// The tag found in it.
        tag: u32,
        /// The number of the last write to this page.
        expected: u32,
        /// Writes altogether.
        writes: u32,
        /// There is something where nothing was ever written.
        rest: bool,
    },
}

/// The tag of a page that write number `version` was made to.
#[must_use]
pub fn tag(page: u32, version: u32) -> u32 {
    version ^ page ^ TAG
}

/// The number of the last write to a whole page; nothing if it does not hold the pattern.
#[must_use]
pub fn page_version(page: u32, data: &[u8]) -> Option<u32> {
    let version = word(data, 0);
    (word(data, 4) == tag(page, version) && is_zero(&data[8..])).then_some(version)
}

/// Reads the control block.
///
/// # Errors
/// If it cannot be read, or the guest is not ready.
pub fn state(ram: &(impl PageReader + ?Sized)) -> Result<GuestState, ImageError> {
    let mut block = [0; PARAMS_AT + 4 * PARAMS];
    ram.read(CONTROL_BLOCK, &mut block)
        .map_err(|error| ImageError::Read {
            address: CONTROL_BLOCK,
            error,
        })?;
    if word(&block, 0) != TAG {
        return Err(ImageError::NotReady {
            found: word(&block, 0),
        });
    }
    Ok(GuestState {
        ticks: word(&block, 4),
        writes: word(&block, 8),
        disk_begun: word(&block, 36),
        disk_done: word(&block, 40),
        disk_failed: word(&block, 52),
        params: std::array::from_fn(|index| word(&block, PARAMS_AT + 4 * index)),
    })
}

/// Checks every tagged page of a paused guest made with `params`.
///
/// # Errors
/// Names the first page that does not hold what it must.
pub fn check(ram: &(impl PageReader + ?Sized), params: &Params) -> Result<GuestState, ImageError> {
    let state = state(ram)?;
    if state.params != params.words() {
        return Err(ImageError::Params {
            found: state.params,
            expected: params.words(),
        });
    }
    // The generator's state in RAM may already belong to the write that is half done.
    let (expected, lcg) = replay(params, state.writes);
    let (ahead, _) = next_write(params, state.writes, lcg);
    let mut buffer = vec![0; page_offset(CHUNK_PAGES)];
    let mut page = FIRST_PAGE;
    while page < params.end_page {
        let count = CHUNK_PAGES.min(params.end_page - page);
        let chunk = &mut buffer[..page_offset(count)];
        let address = u64::from(page) * PAGE;
        ram.read(address, chunk)
            .map_err(|error| ImageError::Read { address, error })?;
        for (number, data) in (page..).zip(chunk.chunks_exact(page_offset(1))) {
            let version = working_set_index(params, number).map_or(0, |index| expected[index]);
            check_page(data, number, version, state.writes, number == ahead)?;
        }
        page += count;
    }
    Ok(state)
}

/// Which page of the working set this is, if it is one.
#[must_use]
pub fn working_set_index(params: &Params, page: u32) -> Option<usize> {
    let index = page.checked_sub(params.base_page)?;
    (index < params.pages).then_some(index as usize)
}

/// The number of the last write to each page of the working set after `writes` writes.
#[must_use]
pub fn expected_versions(params: &Params, writes: u32) -> Vec<u32> {
    replay(params, writes).0
}

fn replay(params: &Params, writes: u32) -> (Vec<u32>, u32) {
    let mut versions = vec![0; params.pages as usize];
    if params.random == 0 {
        for version in writes.saturating_sub(params.pages - 1).max(1)..=writes {
            versions[((version - 1) % params.pages) as usize] = version;
        }
        return (versions, 0);
    }
    let mut lcg = 0;
    for version in 1..=writes {
        let (page, next) = next_write(params, version - 1, lcg);
        lcg = next;
        versions[(page - params.base_page) as usize] = version;
    }
    (versions, lcg)
}

/// The page of the write after `writes`, and the generator's state behind it.
fn next_write(params: &Params, writes: u32, lcg: u32) -> (u32, u32) {
    if params.random == 0 {
        return (params.base_page + writes % params.pages, lcg);
    }
    let lcg = lcg.wrapping_mul(LCG_FACTOR).wrapping_add(LCG_STEP);
    let index = (u64::from(lcg) * u64::from(params.pages)) >> 32;
    (params.base_page + u32::try_from(index).unwrap_or(0), lcg)
}

fn check_page(
    data: &[u8],
    page: u32,
    expected: u32,
    writes: u32,
    ahead: bool,
) -> Result<(), ImageError> {
    let (version, found) = (word(data, 0), word(data, 4));
    let whole = version == expected && found == tag(page, expected);
    let next = writes.wrapping_add(1);
    let torn =
        ahead && version == next && (found == tag(page, next) || found == tag(page, expected));
    let rest = !is_zero(&data[8..]);
    if rest || !(whole || torn) {
        return Err(ImageError::Page {
            page,
            version,
            tag: found,
            expected,
            writes,
            rest,
        });
    }
    Ok(())
}

fn is_zero(bytes: &[u8]) -> bool {
    // Sixteen at a time: the whole RAM goes through here.
    let chunks = bytes.chunks_exact(16);
    let tail = chunks.remainder().iter().fold(0, |sum, byte| sum | byte);
    let sum = chunks.fold(0, |sum, chunk| {
        sum | u128::from_ne_bytes(chunk.try_into().unwrap_or([1; 16]))
    });
    sum == 0 && tail == 0
}

fn word(bytes: &[u8], at: usize) -> u32 {
    let mut word = [0; 4];
    word.copy_from_slice(&bytes[at..at + 4]);
    u32::from_le_bytes(word)
}

fn page_offset(pages: u32) -> usize {
    pages as usize * 4096
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::{Access, GuestSpec};
    use super::*;

    /// The guest's work, done the slow way.
    fn image(params: &Params, writes: u32) -> Vec<u8> {
        let mut ram = vec![0; page_offset(params.end_page)];
        let put = |ram: &mut [u8], page: u32, version: u32| {
            let at = page_offset(page);
            ram[at..at + 4].copy_from_slice(&version.to_le_bytes());
            ram[at + 4..at + 8].copy_from_slice(&tag(page, version).to_le_bytes());
        };
        for page in FIRST_PAGE..params.end_page {
            put(&mut ram, page, 0);
        }
        let mut lcg = 0;
        for version in 1..=writes {
            let (page, next) = next_write(params, version - 1, lcg);
            lcg = next;
            put(&mut ram, page, version);
        }
        for (at, value) in [(0, TAG), (8, writes)] {
            ram[0x1000 + at..0x1004 + at].copy_from_slice(&value.to_le_bytes());
        }
        for (index, value) in params.words().into_iter().enumerate() {
            let at = 0x1000 + PARAMS_AT + 4 * index;
            ram[at..at + 4].copy_from_slice(&value.to_le_bytes());
        }
        ram
    }

    fn params(access: Access, working_set: u32) -> Params {
        let mut spec: GuestSpec = "g:4MiB:1MB/s:64KiB".parse().unwrap();
        spec.access = access;
        spec.working_set = rate_limiter::Bytes(u64::from(working_set) * PAGE);
        spec.params().unwrap()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]

        #[test]
        fn what_the_guest_writes_passes_and_any_stale_or_damaged_page_does_not(
            random in any::<bool>(),
            pages in 1_u32..64,
            writes in 0_u32..400,
            victim in 256_u32..1024,
            offset in 0_usize..4096,
        ) {
            let params = params(if random { Access::Random } else { Access::Sweep }, pages);
            let mut ram = image(&params, writes);
            prop_assert_eq!(check(ram.as_slice(), &params).unwrap().writes, writes);
            // A page of one write earlier: what a migration that loses a page leaves.
            if writes > 0 {
                let before = image(&params, writes - 1);
                let page = (0..).zip(ram.chunks_exact(4096).zip(before.chunks_exact(4096)))
                    .filter(|(page, (now, then))| *page >= FIRST_PAGE && now != then)
                    .map(|(page, _)| page).next().unwrap();
                let mut stale = ram.clone();
                let range = page_offset(page)..page_offset(page + 1);
                stale[range.clone()].copy_from_slice(&before[range]);
                prop_assert!(check(stale.as_slice(), &params).is_err());
            }
            ram[page_offset(victim) + offset] ^= 0x40;
            prop_assert!(check(ram.as_slice(), &params).is_err());
        }
    }

    #[test]
    fn one_write_may_be_half_done() {
        let params = params(Access::Sweep, 16);
        let mut ram = image(&params, 20);
        // Write 21 goes to index 20 % 16 = 4: its number is there, its tag not yet.
        let at = page_offset(params.base_page + 4);
        ram[at..at + 4].copy_from_slice(&21_u32.to_le_bytes());
        check(ram.as_slice(), &params).unwrap();
        // The same in any other page is damage.
        let at = page_offset(params.base_page + 5);
        ram[at..at + 4].copy_from_slice(&21_u32.to_le_bytes());
        assert!(matches!(
            check(ram.as_slice(), &params),
            Err(ImageError::Page { .. })
        ));
    }

    #[test]
    fn another_guest_is_refused() {
        let ram = image(&params(Access::Sweep, 16), 3);
        let other = params(Access::Sweep, 17);
        assert!(matches!(
            check(ram.as_slice(), &other),
            Err(ImageError::Params { .. })
        ));
        assert!(matches!(
            check(&vec![0; 8192][..], &other),
            Err(ImageError::NotReady { .. })
        ));
    }
}
