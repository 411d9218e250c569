//! The dirty bitmap of a memory slot.

use std::time::Instant;

use super::{KvmError, Vm};
use crate::scan::Words;
use crate::sys::kvm::LogBuffer;
use crate::{Bitmap, PageSet, Pages, Round};

/// Who makes pages clean again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Protect {
    /// KVM_GET_DIRTY_LOG, all of the slot at once.
    Automatic,
    /// KVM_CLEAR_DIRTY_LOG, only where there is something to clear. The VM needs
    /// [`Vm::enable_manual_protect`] before the slot begins logging.
    Manual,
}

/// Clean words in a row that are worth another KVM_CLEAR_DIRTY_LOG: less is cheaper to clear
/// along. 64 words are 16 MiB of guest memory.
const GAP_WORDS: usize = 64;

/// Words cleared by one call at most: the kernel holds its MMU lock meanwhile. 1 GiB of guest.
const CALL_WORDS: usize = 4096;

/// The log of one slot.
#[derive(Debug)]
pub struct SlotLog<'fd> {
    vm: Vm<'fd>,
    slot: u32,
    pages: u64,
    protect: Protect,
    buffer: LogBuffer,
    rounds: u64,
    begin: Instant,
}

impl<'fd> SlotLog<'fd> {
    /// The log of `slot`, which has `pages`.
    ///
    /// # Errors
    /// No memory is left for its buffer.
    pub fn new(
        vm: impl Into<Vm<'fd>>,
        slot: u32,
        pages: Pages,
        protect: Protect,
    ) -> Result<Self, KvmError> {
        Ok(Self {
            vm: vm.into(),
            slot,
            pages: pages.0,
            protect,
            buffer: LogBuffer::new(pages.0).map_err(KvmError::os("mmap"))?,
            rounds: 0,
            begin: Instant::now(),
        })
    }

    /// Clears what the buffer has, in as few calls as do not clear much in vain.
    fn clear(&mut self) -> Result<(), KvmError> {
        let mut from = 0;
        while let Some((first, end)) = next_range(self.buffer.words(), from) {
            let pages = (self.pages - first as u64 * 64).min((end - first) as u64 * 64);
            let pages = u32::try_from(pages).unwrap_or(u32::MAX);
            self.buffer
                .clear(self.vm.fd, self.slot, first, pages)
                .map_err(KvmError::os("KVM_CLEAR_DIRTY_LOG"))?;
            from = end;
        }
        Ok(())
    }
}

/// The next words that one call should clear: from the first dirty one to before a gap.
fn next_range(words: &[u64], from: usize) -> Option<(usize, usize)> {
    let (first, _) = words.next_nonzero(from)?;
    let mut end = first + 1;
    while let Some((next, _)) = words.next_nonzero(end) {
        if next - end >= GAP_WORDS || next - first >= CALL_WORDS {
            break;
        }
        end = next + 1;
    }
    Some((first, end))
}

impl Bitmap for SlotLog<'_> {
    type Error = KvmError;

    fn pages(&self) -> Pages {
        Pages(self.pages)
    }

    fn collect(&mut self, into: &mut PageSet) -> Result<Option<Round>, KvmError> {
        self.buffer.get(self.vm.fd, self.slot).map_err(|error| {
            if error.raw_os_error() == Some(libc::EFAULT) {
                return KvmError::SlotLarger {
                    slot: self.slot,
                    pages: self.pages,
                };
            }
            KvmError::os("KVM_GET_DIRTY_LOG")(error)
        })?;
        if self.protect == Protect::Manual {
            self.clear()?;
        }
        into.reset(Pages(self.pages));
        into.words_mut().copy_from_slice(self.buffer.words());
        into.mask_tail();
        let now = Instant::now();
        let duration = now.duration_since(self.begin);
        self.begin = now;
        self.rounds += 1;
        Ok(Some(Round {
            number: self.rounds,
            duration: Some(duration),
            missed: 0,
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_bridge_small_gaps_and_stay_bounded() {
        let mut words = vec![0; 10_000];
        assert_eq!(next_range(&words, 0), None);
        words[5] = 1;
        words[5 + GAP_WORDS] = 1; // 63 clean words between them
        words[6 + 2 * GAP_WORDS] = 1; // 64
        assert_eq!(next_range(&words, 0), Some((5, 6 + GAP_WORDS)));
        let rest = (6 + 2 * GAP_WORDS, 7 + 2 * GAP_WORDS);
        assert_eq!(next_range(&words, 6 + GAP_WORDS), Some(rest));
        words.fill(1);
        assert_eq!(next_range(&words, 0), Some((0, CALL_WORDS)));
        assert_eq!(next_range(&words, 9_999), Some((9_999, 10_000)));
        assert_eq!(next_range(&words, 10_000), None);
    }
}
