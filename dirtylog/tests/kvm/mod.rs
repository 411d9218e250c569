//! KVM's logs, on the real /dev/kvm, with a guest of our own.

use std::os::fd::{AsFd, OwnedFd};

use dirtylog::kvm::{
    Guest, KvmError, Logging, Protect, Ring, RingFault, RingLog, RingSlot, SlotLog, Vm, check_ring,
};
use dirtylog::{Bitmap, PageSet, Pages};
use kvm_ioctls::Kvm;
use libtest_mimic::Failed;

use crate::Case;
use crate::conformance::{Subject, conforms};

pub const CASES: &[Case] = &[
    ("kvm::conformance::bitmap_automatic", automatic),
    ("kvm::conformance::bitmap_manual", manual),
    ("kvm::ring_conforms_or_is_reported", ring),
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

/// Where the ring is right it must conform; where it is wrong the self-check must say so.
fn ring() -> Result<(), Failed> {
    const ENTRIES: u32 = 32_768;
    let verdict = check_ring(&Kvm::new()?);
    let conformed = || -> Result<(), Failed> {
        for pages in [130, 192, 20_000] {
            let (guest, vm) = guest(pages, Logging::Ring(ENTRIES))?;
            let ring = Ring::new(guest.vcpu(), ENTRIES)?;
            let slot = RingSlot {
                slot: Guest::SLOT,
                pages: Pages(pages),
            };
            let log = RingLog::new(Vm::new(vm.as_fd())?, vec![ring], vec![slot]);
            conforms(&mut Logged { guest, log })?;
        }
        Ok(())
    };
    let conformed = conformed();
    match (verdict, conformed) {
        (Ok(()), Ok(())) => Ok(()),
        (Ok(()), Err(error)) => {
            Err(format!("the self-check passed, but: {}", message(&error)).into())
        }
        (Err(fault), Err(error)) => {
            eprintln!("the ring is wrong here, and reported:\n  self-check: {fault}");
            eprintln!("  conformance: {}", message(&error));
            match fault {
                RingFault::Ring { .. }
                | RingFault::Log(
                    KvmError::Unsupported(_)
                    | KvmError::RingMisreports { .. }
                    | KvmError::RingCount { .. },
                ) => Ok(()),
                other => Err(other.into()),
            }
        }
        (Err(fault), Ok(())) => {
            Err(format!("it conforms, but the self-check says: {fault}").into())
        }
    }
}

fn message(error: &Failed) -> &str {
    error.message().unwrap_or("no message")
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
