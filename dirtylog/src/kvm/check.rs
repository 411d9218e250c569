//! Whether the dirty ring tells the truth on this machine.
//!
//! It does not everywhere: under the paravirtual kvm_pvm it misreports. The two logs cannot be
//! compared inside one VM (with rings there is no bitmap), so the same guest runs twice, and both
//! reports are held against the list of pages that it wrote.

use std::os::fd::AsFd;

use kvm_ioctls::Kvm;

use super::{Guest, GuestError, KvmError, Logging, Protect, Ring, RingLog, RingSlot, SlotLog, Vm};
use crate::{Bitmap, PageSet, Pages, scan};

const PAGES: Pages = Pages(512);
const ENTRIES: u32 = 4096;

/// What is wrong with the dirty ring; or why that could not be found out.
#[derive(Debug, thiserror::Error)]
pub enum RingFault {
    /// The guest cannot be run.
    #[error(transparent)]
    Guest(#[from] GuestError),
    /// A log cannot be had, or contradicts itself.
    #[error(transparent)]
    Log(#[from] KvmError),
    /// Not even the bitmap is right: nothing can be said about the ring.
    #[error("KVM's dirty bitmap misreports: {missing} missing, {extra} never written")]
    Bitmap {
        /// Pages that were written and not reported.
        missing: Pages,
        /// Pages that were reported and not written.
        extra: Pages,
    },
    /// The ring differs from the bitmap.
    #[error(
        "KVM's dirty ring misreports on this machine (round {round}: {missing} missing, {extra} \
         never written), its bitmap does not: use the bitmap"
    )]
    Ring {
        /// The round of the comparison, from 1.
        round: usize,
        /// Pages that were written, and reported by the bitmap only.
        missing: Pages,
        /// Pages that only the ring reported.
        extra: Pages,
    },
}

/// Runs a tiny guest with the dirty ring and with the bitmap, and compares what they report.
/// Takes a few milliseconds.
///
/// # Errors
/// The ring cannot be relied on, or this cannot be found out.
pub fn check_ring(kvm: &Kvm) -> Result<(), RingFault> {
    let rounds = rounds();
    let truth: Vec<_> = rounds.iter().map(|pages| set(pages)).collect();

    let mut guest = Guest::new(kvm, PAGES, Logging::Automatic)?;
    let vm = guest.vm().map_err(KvmError::os("dup"))?;
    let log = SlotLog::new(Vm::new(vm.as_fd())?, Guest::SLOT, PAGES, Protect::Automatic)?;
    let bitmap = reports(&mut guest, log, &rounds)?;
    if let Some((_, missing, extra)) = difference(&truth, &bitmap) {
        return Err(RingFault::Bitmap { missing, extra });
    }

    let mut guest = Guest::new(kvm, PAGES, Logging::Ring(ENTRIES))?;
    let vm = guest.vm().map_err(KvmError::os("dup"))?;
    let ring = Ring::new(guest.vcpu(), ENTRIES)?;
    let slot = RingSlot {
        slot: Guest::SLOT,
        pages: PAGES,
    };
    let log = RingLog::new(Vm::new(vm.as_fd())?, vec![ring], vec![slot]);
    let ring = reports(&mut guest, log, &rounds)?;
    match difference(&bitmap, &ring) {
        Some((round, missing, extra)) => Err(RingFault::Ring {
            round,
            missing,
            extra,
        }),
        None => Ok(()),
    }
}

/// What the guest writes, round by round: runs, scattered pages, the same ones again, nothing.
fn rounds() -> Vec<Vec<u64>> {
    let scattered: Vec<u64> = (0..PAGES.0).map(|i| i * 37 % PAGES.0).step_by(5).collect();
    vec![
        (0..PAGES.0).collect(),
        scattered.clone(),
        vec![],
        vec![0, 63, 64, PAGES.0 - 1, 64, 0],
        scattered,
    ]
}

fn set(pages: &[u64]) -> PageSet {
    let mut set = PageSet::new(PAGES);
    for &page in pages {
        set.insert(page);
    }
    set
}

/// What `log` says of each round.
fn reports(
    guest: &mut Guest,
    mut log: impl Bitmap<Error = KvmError>,
    rounds: &[Vec<u64>],
) -> Result<Vec<PageSet>, RingFault> {
    let mut all = Vec::new();
    log.collect(&mut PageSet::default())?; // what setting up has dirtied
    for pages in rounds {
        guest.write(pages)?;
        let mut set = PageSet::default();
        log.collect(&mut set)?;
        all.push(set);
    }
    Ok(all)
}

/// The first round in which two reports differ: what is missing in the second one, what is extra.
fn difference(expected: &[PageSet], found: &[PageSet]) -> Option<(usize, Pages, Pages)> {
    let rounds = (1..).zip(expected.iter().zip(found));
    rounds
        .map(|(round, (expected, found))| {
            let common = scan::count_common(expected.words(), found.words());
            let missing = Pages(expected.count().0 - common);
            (round, missing, Pages(found.count().0 - common))
        })
        .find(|&(_, missing, extra)| (missing, extra) != (Pages(0), Pages(0)))
}
