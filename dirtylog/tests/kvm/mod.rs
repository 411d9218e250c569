//! KVM's logs, on the real /dev/kvm, with a guest of our own.

use std::os::fd::{AsFd, OwnedFd};

use dirtylog::kvm::{
    Guest, GuestError, KvmError, Logging, Protect, Ring, RingFault, RingLog, RingSlot, SlotLog, Vm,
    check_ring,
};
use dirtylog::{Bitmap, PageSet, Pages};
use kvm_ioctls::Kvm;
use libtest_mimic::Failed;

use crate::Case;
use crate::conformance::{Subject, conforms};

pub const CASES: &[Case] = &[
    ("kvm::conformance::bitmap_automatic", automatic),
    ("kvm::conformance::bitmap_manual", manual),
    ("kvm::conformance::ring", ring),
    ("kvm::a_full_ring_is_no_loss_or_reported", full_ring),
    ("kvm::a_larger_slot_is_an_error", larger_slot),
    ("kvm::other_files_are_refused", other_files),
];

struct Logged<B> {
    guest: Guest,
    log: B,
}

impl<B: Bitmap> Subject for Logged<B> {
    fn dirty(&mut self, pages: &[u64]) -> Result<(), Failed> {
        Ok(self.guest.write(pages)?)
    }

    fn collect(&mut self, into: &mut PageSet) -> Result<(), Failed> {
        self.log.collect(into)?.ok_or("no round")?;
        Ok(())
    }

    fn pages(&self) -> Pages {
        self.log.pages()
    }
}

fn guest(pages: u64, logging: Logging) -> Result<(Guest, OwnedFd), Failed> {
    let guest = Guest::new(&Kvm::new()?, Pages(pages), logging)?;
    let vm = guest.vm()?;
    Ok((guest, vm))
}

fn bitmap(logging: Logging, protect: Protect) -> Result<(), Failed> {
    // Sizes that end inside a word and with one; 20 000 pages need several CLEAR calls.
    for pages in [130, 192, 20_000] {
        let (guest, vm) = guest(pages, logging)?;
        let log = SlotLog::new(Vm::new(vm.as_fd())?, Guest::SLOT, Pages(pages), protect)?;
        conforms(&mut Logged { guest, log })?;
    }
    Ok(())
}

fn automatic() -> Result<(), Failed> {
    bitmap(Logging::Automatic, Protect::Automatic)
}

fn manual() -> Result<(), Failed> {
    bitmap(Logging::Manual, Protect::Manual)
}

fn ring_log<'fd>(guest: &Guest, vm: &'fd OwnedFd, entries: u32) -> Result<RingLog<'fd>, KvmError> {
    let ring = Ring::new(guest.vcpu(), entries)?;
    let slot = RingSlot {
        slot: Guest::SLOT,
        pages: guest.pages(),
    };
    Ok(RingLog::new(Vm::new(vm.as_fd())?, vec![ring], vec![slot]))
}

/// Rings that are never full are right everywhere that we know.
fn ring() -> Result<(), Failed> {
    const ENTRIES: u32 = 32_768;
    for pages in [130, 192, 20_000] {
        let (guest, vm) = guest(pages, Logging::Ring(ENTRIES))?;
        let log = ring_log(&guest, &vm, ENTRIES)?;
        conforms(&mut Logged { guest, log })?;
    }
    Ok(())
}

const FEW: u32 = 1024;

/// Fills a ring to its last entry, and no further (the kernel would warn). Whether the log saw it
/// overrun; if it did not, nothing is missing.
fn fill_ring(before: u64) -> Result<bool, Failed> {
    let (mut guest, vm) = guest(FEW.into(), Logging::Ring(FEW))?;
    let mut log = ring_log(&guest, &vm, FEW)?;
    let every: Vec<u64> = (0..FEW.into()).collect();
    let mut all = PageSet::new(guest.pages());
    let mut part = PageSet::default();
    guest.write(&every[..usize::try_from(before)?])?;
    log.collect(&mut part)?;
    let mut outcome = guest.write(&every);
    loop {
        match log.collect(&mut part) {
            Ok(_) => all.union_with(&part)?,
            Err(KvmError::RingOverrun { entries: FEW }) => return Ok(true),
            Err(other) => return Err(other.into()),
        }
        match outcome {
            Ok(()) => break,
            Err(GuestError::RingFull) => outcome = guest.resume(),
            Err(other) => return Err(other.into()),
        }
    }
    assert_eq!(all.count(), guest.pages());
    Ok(false)
}

/// Where rings that fill up lose pages, both the self-check and the log itself must say so; where
/// the self-check is content, nothing may be lost.
fn full_ring() -> Result<(), Failed> {
    let verdict = check_ring(&Kvm::new()?);
    // A faulty KVM stops in time by chance now and then, so that one run says little.
    let overruns: Result<Vec<bool>, Failed> = (0..32).map(|run| fill_ring(run * 29)).collect();
    let overruns = overruns?.into_iter().filter(|&overrun| overrun).count();
    match (verdict, overruns) {
        (Ok(()), 0) => Ok(()),
        (Err(fault @ RingFault::NotStopped { .. }), 1..) => {
            println!("the dirty ring is faulty here, as reported: {fault}");
            Ok(())
        }
        (verdict, overruns) => Err(format!(
            "the self-check says {verdict:?}, the log saw {overruns} overruns in 32 runs"
        )
        .into()),
    }
}

/// The kernel writes as much as the slot has, whatever we were told: it must hit the guard page.
fn larger_slot() -> Result<(), Failed> {
    let (mut guest, vm) = guest(100_000, Logging::Automatic)?;
    guest.write(&[0, 99_999])?;
    for said in [1, 64, 32_768, 99_000] {
        let vm = Vm::new(vm.as_fd())?;
        let mut log = SlotLog::new(vm, Guest::SLOT, Pages(said), Protect::Automatic)?;
        match log.collect(&mut PageSet::default()) {
            Err(KvmError::SlotLarger { slot, pages }) => {
                assert_eq!((slot, pages), (Guest::SLOT, said));
            }
            other => return Err(format!("{said} pages: {other:?}").into()),
        }
    }
    Ok(())
}

fn other_files() -> Result<(), Failed> {
    let file = std::fs::File::open("/dev/null")?;
    match Vm::new(file.as_fd()) {
        Err(KvmError::WrongFile { found, .. }) if found == "/dev/null" => Ok(()),
        other => Err(format!("{other:?}").into()),
    }
}
