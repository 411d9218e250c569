//! A tiny guest that writes exactly the pages it is told to: what KVM then reports can be
//! compared with the truth.
//!
//! One vCPU in real mode with flat data segments runs straight-line code that is made for each
//! list of pages: an `inc byte [address]` for each of them, then `hlt`. One instruction a page is
//! the fastest way to dirty memory, and so the hardest test of a dirty ring.

use std::collections::VecDeque;
use std::io;
use std::os::fd::OwnedFd;

use kvm_bindings::{KVM_EXIT_DIRTY_RING_FULL, KVM_MEM_LOG_DIRTY_PAGES};
use kvm_ioctls::{Kvm, VcpuExit};

use super::{KvmError, Vcpu, Vm};
use crate::sys::machine::{Machine, Slot};
use crate::{Pages, index};

/// Where the code is.
const CODE: u64 = 0x1000;
/// The memory that the code is in is not logged; real mode reaches no further.
const PROGRAM_BYTES: usize = 0x10000;
/// Where the logged memory begins.
const DATA: u64 = 0x10_0000;

/// `inc byte [disp32]` in 16-bit code; four bytes of address follow.
const INCREMENT: [u8; 3] = [0x67, 0xfe, 0x05];
/// `hlt`.
const HALT: u8 = 0xf4;

/// How the guest's writes are logged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Logging {
    /// In the slot's bitmap, cleared by KVM_GET_DIRTY_LOG.
    Automatic,
    /// In the slot's bitmap, cleared by KVM_CLEAR_DIRTY_LOG.
    Manual,
    /// In a ring with this many entries.
    Ring(u32),
}

/// Why the guest does not run.
#[derive(Debug, thiserror::Error)]
pub enum GuestError {
    /// A call of KVM failed.
    #[error("{call} failed for the test guest")]
    Kvm {
        /// The call.
        call: &'static str,
        /// Its error.
        #[source]
        source: io::Error,
    },
    /// The wanted log is not to be had.
    #[error(transparent)]
    Log(#[from] KvmError),
    /// A dirty ring wants to be collected; then [`Guest::resume`].
    #[error("the dirty ring is full (KVM_EXIT_DIRTY_RING_FULL)")]
    RingFull,
    /// The guest did something else than halt.
    #[error("the test guest left KVM_RUN with {0}; expected it to halt")]
    Exit(String),
}

fn failed<E: Into<io::Error>>(call: &'static str) -> impl Fn(E) -> GuestError {
    move |error| GuestError::Kvm {
        call,
        source: error.into(),
    }
}

/// The guest.
#[derive(Debug)]
pub struct Guest {
    machine: Machine,
    pages: u64,
    /// What it has not been told yet, and whether it has still to finish what it was told.
    pending: VecDeque<u64>,
    running: bool,
}

impl Guest {
    /// The slot that is logged.
    pub const SLOT: u32 = 1;

    /// The most pages that it can have: 512 MiB.
    pub const MOST: Pages = Pages(1 << 17);

    /// A guest with `pages` of logged memory.
    ///
    /// # Errors
    /// KVM cannot do it.
    ///
    /// # Panics
    /// `pages` is 0 or more than [`Guest::MOST`].
    pub fn new(kvm: &Kvm, pages: Pages, logging: Logging) -> Result<Self, GuestError> {
        assert!(pages.0 > 0 && pages <= Self::MOST, "a guest of {pages}");
        let vm = kvm.create_vm().map_err(failed("KVM_CREATE_VM"))?;
        match logging {
            Logging::Automatic => {}
            Logging::Manual => Vm::from(&vm).enable_manual_protect(false)?,
            Logging::Ring(entries) => Vm::from(&vm).enable_rings(entries)?,
        }
        let slots = [
            Slot {
                number: 0,
                flags: 0,
                address: 0,
                bytes: PROGRAM_BYTES,
            },
            Slot {
                number: Self::SLOT,
                flags: KVM_MEM_LOG_DIRTY_PAGES,
                address: DATA,
                bytes: index(pages.0 * 4096),
            },
        ];
        let mut machine = Machine::new(vm, &slots).map_err(failed("giving memory to the VM"))?;
        let mut sregs = machine
            .vcpu()
            .get_sregs()
            .map_err(failed("KVM_GET_SREGS"))?;
        sregs.cs.base = 0;
        sregs.cs.selector = 0;
        for data in [&mut sregs.ds, &mut sregs.es] {
            data.base = 0;
            data.selector = 0;
            data.limit = u32::MAX;
            data.g = 1;
        }
        let set = machine.vcpu().set_sregs(&sregs);
        set.map_err(failed("KVM_SET_SREGS"))?;
        Ok(Self {
            machine,
            pages: pages.0,
            pending: VecDeque::new(),
            running: false,
        })
    }

    /// Another descriptor of its VM: see [`Vm::new`].
    ///
    /// # Errors
    /// No descriptors are left.
    pub fn vm(&self) -> io::Result<OwnedFd> {
        self.machine.vm()
    }

    /// Its vCPU.
    #[must_use]
    pub fn vcpu(&self) -> Vcpu<'_> {
        self.machine.shared_vcpu().into()
    }

    /// How many pages are logged.
    #[must_use]
    pub fn pages(&self) -> Pages {
        Pages(self.pages)
    }

    /// Lets the guest write to `pages`, each once, in this order.
    ///
    /// # Errors
    /// It does not get to the end.
    ///
    /// # Panics
    /// A page does not exist.
    pub fn write(&mut self, pages: &[u64]) -> Result<(), GuestError> {
        for &page in pages {
            assert!(page < self.pages, "page {page} of {}", self.pages);
        }
        self.pending.extend(pages);
        self.resume()
    }

    /// Lets the guest go on with what it was told, after [`GuestError::RingFull`].
    ///
    /// # Errors
    /// It does not get to the end.
    pub fn resume(&mut self) -> Result<(), GuestError> {
        loop {
            if !self.running {
                if self.pending.is_empty() {
                    return Ok(());
                }
                self.prepare()?;
                self.running = true;
            }
            let exit = self.machine.vcpu().run().map_err(failed("KVM_RUN"))?;
            match exit {
                VcpuExit::Hlt => self.running = false,
                VcpuExit::Unsupported(KVM_EXIT_DIRTY_RING_FULL) => {
                    return Err(GuestError::RingFull);
                }
                other => return Err(GuestError::Exit(format!("{other:?}"))),
            }
        }
    }

    /// Makes code for as many of the pending pages as there is room for.
    fn prepare(&mut self) -> Result<(), GuestError> {
        let room = (PROGRAM_BYTES - index(CODE) - 1) / (INCREMENT.len() + size_of::<u32>());
        let count = self.pending.len().min(room);
        let mut code = Vec::new();
        for page in self.pending.drain(..count) {
            let address = u32::try_from(DATA + page * 4096).unwrap_or(u32::MAX);
            code.extend(INCREMENT);
            code.extend(address.to_le_bytes());
        }
        code.push(HALT);
        self.machine.write(0, index(CODE), &code);
        let vcpu = self.machine.vcpu();
        let mut regs = vcpu.get_regs().map_err(failed("KVM_GET_REGS"))?;
        (regs.rip, regs.rflags) = (CODE, 2);
        vcpu.set_regs(&regs).map_err(failed("KVM_SET_REGS"))
    }
}
