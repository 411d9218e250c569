//! Whether the dirty ring tells the truth on this machine.
//!
//! It does not everywhere. KVM must stop a vCPU while at least 64 entries of its ring are free;
//! the paravirtual kvm_pvm (seen with Linux 6.18) emulates instruction after instruction without
//! looking, the ring overruns, the kernel warns (`kvm_dirty_ring_push`) and pages are lost.
//!
//! Two things are compared with the list of pages that a guest wrote: what the bitmap says and
//! what the ring says. (Inside one VM both cannot be had, so the same guest runs once for each.)
//! Then a ring is filled to one entry less than it has: KVM_RUN must end before, and when it is
//! resumed as often as needed, nothing may be missing. No entry is overrun, so that no faulty
//! kernel is made to warn.

use std::os::fd::{AsFd, BorrowedFd};

use kvm_ioctls::Kvm;

use super::{Guest, GuestError, KvmError, Logging, Protect, Ring, RingLog, RingSlot, SlotLog, Vm};
use crate::{Bitmap, PageSet, Pages, scan};

const PAGES: Pages = Pages(512);
const ENTRIES: u32 = 4096;
/// A ring that is small enough to be filled: at least twice what KVM keeps free (576 with PML).
const FEW_ENTRIES: u32 = 2048;
/// How often it is filled. kvm_pvm looks after every few hundred instructions, so that now and
/// then it stops in time by chance: in about one of eight runs.
const FULL_RINGS: usize = 8;

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
    /// The ring fills up, and the vCPU runs on.
    #[error(
        "KVM let a vCPU fill {filled} of its dirty ring's {entries} entries without stopping it: \
         on this machine the ring overruns and loses pages; use the bitmap"
    )]
    NotStopped {
        /// How many entries were in use.
        filled: u64,
        /// The ring's size.
        entries: u32,
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
    let log = ring_log(&guest, vm.as_fd(), ENTRIES)?;
    let ring = reports(&mut guest, log, &rounds)?;
    if let Some((round, missing, extra)) = difference(&bitmap, &ring) {
        return Err(RingFault::Ring {
            round,
            missing,
            extra,
        });
    }
    (0..FULL_RINGS).try_for_each(|number| check_full_ring(kvm, number * 61))
}

/// The log of a guest whose only vCPU has a ring.
fn ring_log<'fd>(
    guest: &Guest,
    vm: BorrowedFd<'fd>,
    entries: u32,
) -> Result<RingLog<'fd>, KvmError> {
    let ring = Ring::new(guest.vcpu(), entries)?;
    let slot = RingSlot {
        slot: Guest::SLOT,
        pages: guest.pages(),
    };
    Ok(RingLog::new(Vm::new(vm)?, vec![ring], vec![slot]))
}

/// Whether KVM stops a vCPU whose ring fills up, and all is there then. `before` pages are written
/// in a run of their own.
fn check_full_ring(kvm: &Kvm, before: usize) -> Result<(), RingFault> {
    let pages = Pages(u64::from(FEW_ENTRIES) - 1);
    let mut guest = Guest::new(kvm, pages, Logging::Ring(FEW_ENTRIES))?;
    let vm = guest.vm().map_err(KvmError::os("dup"))?;
    let mut log = ring_log(&guest, vm.as_fd(), FEW_ENTRIES)?;
    let mut all = PageSet::new(pages);
    let mut part = PageSet::default();
    let every: Vec<u64> = (0..pages.0).collect();
    guest.write(&every[..before])?;
    log.collect(&mut part)?;
    let mut outcome = guest.write(&every);
    let mut stopped = false;
    loop {
        log.collect(&mut part)?;
        scan::union(all.words_mut(), part.words());
        match outcome {
            Ok(()) if stopped => break,
            Ok(()) => {
                return Err(RingFault::NotStopped {
                    filled: part.count().0,
                    entries: FEW_ENTRIES,
                });
            }
            Err(GuestError::RingFull) if !part.is_empty() => stopped = true,
            Err(error) => return Err(error.into()),
        }
        outcome = guest.resume();
    }
    let missing = Pages(pages.0 - all.count().0);
    if missing == Pages(0) {
        return Ok(());
    }
    Err(RingFault::Ring {
        round: rounds().len() + 1,
        missing,
        extra: Pages(0),
    })
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
