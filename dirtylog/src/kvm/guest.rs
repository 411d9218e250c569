//! A tiny guest that writes exactly the pages it is told to: what KVM then reports can be
//! compared with the truth.
//!
//! One vCPU in real mode with flat data segments runs a dozen bytes of code: for each address in a
//! list, increment the byte there; then halt.

use std::io;
use std::os::fd::OwnedFd;

use kvm_bindings::KVM_MEM_LOG_DIRTY_PAGES;
use kvm_ioctls::{Kvm, VcpuExit};

use super::{KvmError, Vcpu, Vm};
use crate::sys::machine::{Machine, Slot};
use crate::{Pages, index};

/// Where the code is, and the list.
const CODE: u64 = 0x1000;
const LIST: u64 = 0x2000;
/// The slot of code and list is not logged.
const PROGRAM_BYTES: usize = 0x10000;
/// Where the logged memory begins.
const DATA: u64 = 0x10_0000;

/// `again: lodsd; inc byte [eax]; dec ecx; jnz again; hlt`, 16-bit code with 32-bit operands.
const PROGRAM: [u8; 12] = [
    0x67, 0x66, 0xad, // lodsd eax, [esi]
    0x67, 0xfe, 0x00, // inc byte [eax]
    0x66, 0x49, // dec ecx
    0x75, 0xf6, // jnz again
    0xf4, 0x90, // hlt; nop
];

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
        machine.write(0, index(CODE), &PROGRAM);
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
        let room = PROGRAM_BYTES / 4 - index(LIST) / 4;
        pages.chunks(room).try_for_each(|part| self.run(part))
    }

    fn run(&mut self, pages: &[u64]) -> Result<(), GuestError> {
        let mut list = Vec::new();
        for &page in pages {
            assert!(page < self.pages, "page {page} of {}", self.pages);
            let address = u32::try_from(DATA + page * 4096).unwrap_or(u32::MAX);
            list.extend(address.to_le_bytes());
        }
        self.machine.write(0, index(LIST), &list);
        let vcpu = self.machine.vcpu();
        let mut regs = vcpu.get_regs().map_err(failed("KVM_GET_REGS"))?;
        (regs.rip, regs.rsi, regs.rflags) = (CODE, LIST, 2);
        regs.rcx = pages.len() as u64;
        vcpu.set_regs(&regs).map_err(failed("KVM_SET_REGS"))?;
        match vcpu.run().map_err(failed("KVM_RUN"))? {
            VcpuExit::Hlt => Ok(()),
            other => Err(GuestError::Exit(format!("{other:?}"))),
        }
    }
}
