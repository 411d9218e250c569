//! Dirty rings: every vCPU lists the pages that it dirtied.

use std::time::Instant;

use super::{KvmError, Vcpu, Vm};
use crate::sys::kvm::RingMap;
use crate::{Bitmap, PageSet, Pages, Round, index, words_for};

/// The kernel has filled this entry.
const DIRTY: u32 = 1;
/// It was read and may be taken back.
const RESET: u32 = 2;

/// The ring of one vCPU.
#[derive(Debug)]
pub struct Ring {
    map: RingMap,
    entries: u32,
    next: u32,
}

impl Ring {
    /// Maps the ring of a vCPU that was made after [`Vm::enable_rings`] with as many `entries`.
    ///
    /// # Errors
    /// The vCPU has no such ring.
    pub fn new<'fd>(vcpu: impl Into<Vcpu<'fd>>, entries: u32) -> Result<Self, KvmError> {
        let map = RingMap::new(vcpu.into().fd, index(entries.into()))
            .map_err(KvmError::os("mmap of a dirty ring"))?;
        Ok(Self {
            map,
            entries,
            next: 0,
        })
    }

    /// Gives what is in the ring to `visit` (slot, page) and marks it as read; how much it was.
    fn harvest(
        &mut self,
        mut visit: impl FnMut(u32, u64) -> Result<(), KvmError>,
    ) -> Result<u64, KvmError> {
        // Entries that were read are free only after the reset, so there are no more than this.
        for done in 0..self.entries {
            let position = index(self.next.into());
            let Some((slot, page)) = self.map.read(position, DIRTY) else {
                return Ok(u64::from(done));
            };
            visit(slot, page)?;
            self.map.give_back(position, RESET);
            self.next = self.next.wrapping_add(1) % self.entries;
        }
        // KVM keeps at least 64 entries free: it stops the vCPU before. Did it not, it may have
        // written over others already.
        Err(KvmError::RingOverrun {
            entries: self.entries,
        })
    }
}

/// A slot whose pages the rings report.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RingSlot {
    /// Its number, with the address space in the upper 16 bits.
    pub slot: u32,
    /// How many pages it has.
    pub pages: Pages,
}

/// The rings of a VM.
///
/// The slots' pages follow one another in the order given, each slot beginning at the next
/// multiple of 64 pages. A vCPU whose ring is full leaves KVM_RUN with KVM_EXIT_DIRTY_RING_FULL:
/// collect then, and keep the sum of what was collected.
#[derive(Debug)]
pub struct RingLog<'fd> {
    vm: Vm<'fd>,
    rings: Vec<Ring>,
    slots: Vec<RingSlot>,
    rounds: u64,
    begin: Instant,
}

impl<'fd> RingLog<'fd> {
    /// The log that `rings`, all the VM has, make of `slots`, all that log.
    #[must_use]
    pub fn new(vm: impl Into<Vm<'fd>>, rings: Vec<Ring>, slots: Vec<RingSlot>) -> Self {
        Self {
            vm: vm.into(),
            rings,
            slots,
            rounds: 0,
            begin: Instant::now(),
        }
    }
}

/// The page in the row of all slots, if it exists.
fn in_row(slots: &[RingSlot], slot: u32, page: u64) -> Option<u64> {
    let mut first = 0;
    for candidate in slots {
        if candidate.slot == slot {
            return (page < candidate.pages.0).then_some(first + page);
        }
        first += words_for(candidate.pages.0) as u64 * 64;
    }
    None
}

impl Bitmap for RingLog<'_> {
    type Error = KvmError;

    fn pages(&self) -> Pages {
        let Some((last, before)) = self.slots.split_last() else {
            return Pages(0);
        };
        let row = before
            .iter()
            .map(|slot| words_for(slot.pages.0) as u64 * 64);
        Pages(row.sum::<u64>() + last.pages.0)
    }

    fn collect(&mut self, into: &mut PageSet) -> Result<Option<Round>, KvmError> {
        into.reset(self.pages());
        let mut given = 0;
        for ring in &mut self.rings {
            given += ring.harvest(|slot, page| {
                let page = in_row(&self.slots, slot, page)
                    .ok_or(KvmError::RingMisreports { slot, page })?;
                into.insert(page);
                Ok(())
            })?;
        }
        let taken = self.vm.reset_rings()?;
        if taken != given {
            return Err(KvmError::RingCount { given, taken });
        }
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
    fn slots_follow_one_another_by_words() {
        let slot = |slot, pages| RingSlot {
            slot,
            pages: Pages(pages),
        };
        let slots = [slot(0, 65), slot(0x1_0000, 3)];
        assert_eq!(in_row(&slots, 0, 64), Some(64));
        assert_eq!(in_row(&slots, 0, 65), None);
        assert_eq!(in_row(&slots, 0x1_0000, 2), Some(130));
        assert_eq!(in_row(&slots, 1, 0), None);
    }
}
