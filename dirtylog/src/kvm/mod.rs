//! KVM's own dirty logs, for a VMM that embeds this crate.
//!
//! A VMM owns its VM's descriptors; only its process may use them (the kernel checks), which is
//! why a sidecar reads QEMU's export instead. Two logs exist:
//!
//! - the bitmap of a memory slot ([`SlotLog`]): KVM_GET_DIRTY_LOG, which also clears and
//!   write-protects, or, with [`Vm::enable_manual_protect`], KVM_GET_DIRTY_LOG that only reads
//!   and KVM_CLEAR_DIRTY_LOG for the parts that were dirty, with the MMU lock held for less;
//! - a ring for each vCPU ([`RingLog`]): no cost for clean memory, but its kernel side is younger
//!   and wrong on some hosts: ask [`check_ring`] before you rely on it.
//!
//! Slots must have KVM_MEM_LOG_DIRTY_PAGES set. Copy a page's contents *after* the round that
//! reports it was collected: only then a later write to it is logged again.

#[cfg(target_arch = "x86_64")]
mod check;
mod error;
#[cfg(target_arch = "x86_64")]
mod guest;
mod log;
mod ring;

use std::os::fd::{AsRawFd, BorrowedFd};

use kvm_bindings::{
    KVM_CAP_DIRTY_LOG_RING, KVM_CAP_DIRTY_LOG_RING_ACQ_REL, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2,
    KVM_DIRTY_LOG_INITIALLY_SET, KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE, kvm_dirty_gfn,
};
use kvm_ioctls::{VcpuFd, VmFd};

#[cfg(target_arch = "x86_64")]
pub use check::{RingFault, check_ring};
pub use error::KvmError;
#[cfg(target_arch = "x86_64")]
pub use guest::{Guest, GuestError, Logging};
pub use log::{Protect, SlotLog};
pub use ring::{Ring, RingLog, RingSlot};

use crate::sys::kvm as sys;

/// A VM of this process.
#[derive(Debug, Clone, Copy)]
pub struct Vm<'fd> {
    fd: BorrowedFd<'fd>,
}

impl<'fd> From<&'fd VmFd> for Vm<'fd> {
    fn from(vm: &'fd VmFd) -> Self {
        Self {
            fd: sys::borrow(vm),
        }
    }
}

impl<'fd> Vm<'fd> {
    /// The VM behind a descriptor.
    ///
    /// # Errors
    /// It is no VM of KVM.
    pub fn new(fd: BorrowedFd<'fd>) -> Result<Self, KvmError> {
        expect_kind(fd, "anon_inode:kvm-vm")?;
        Ok(Self { fd })
    }

    /// Lets KVM_GET_DIRTY_LOG leave clearing to KVM_CLEAR_DIRTY_LOG: for slots made from now on,
    /// logging with [`Protect::Manual`].
    ///
    /// With `initially_set`, every page of a slot counts as dirty when its logging begins, which
    /// saves write-protecting all of it at once.
    ///
    /// # Errors
    /// The kernel cannot do it.
    pub fn enable_manual_protect(self, initially_set: bool) -> Result<(), KvmError> {
        let mut flags = u64::from(KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE);
        if initially_set {
            flags |= u64::from(KVM_DIRTY_LOG_INITIALLY_SET);
        }
        let offered = self.offers(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2);
        if offered & flags != flags {
            return Err(KvmError::Unsupported("KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2"));
        }
        sys::enable_cap(self.fd, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, flags)
            .map_err(KvmError::os("KVM_ENABLE_CAP(manual dirty log protect)"))
    }

    /// Gives every vCPU made from now on a dirty ring of `entries`, a power of two. On x86 the
    /// VM's slots then have no bitmap.
    ///
    /// # Errors
    /// The kernel has no rings, or none so large; or the VM has vCPUs already.
    pub fn enable_rings(self, entries: u32) -> Result<(), KvmError> {
        let bytes = u64::from(entries) * size_of::<kvm_dirty_gfn>() as u64;
        let choices = [KVM_CAP_DIRTY_LOG_RING_ACQ_REL, KVM_CAP_DIRTY_LOG_RING];
        let fits = |capability: &u32| self.offers(*capability) >= bytes;
        let Some(capability) = choices.into_iter().find(fits) else {
            return Err(KvmError::Unsupported("a dirty ring of this size"));
        };
        sys::enable_cap(self.fd, capability, bytes)
            .map_err(KvmError::os("KVM_ENABLE_CAP(dirty ring)"))
    }

    /// What KVM_CHECK_EXTENSION answers; 0 if the kernel does not know the capability.
    fn offers(self, capability: u32) -> u64 {
        sys::check_extension(self.fd, capability).unwrap_or(0)
    }

    /// KVM_RESET_DIRTY_RINGS: takes back, and protects again, what was harvested of all rings.
    fn reset_rings(self) -> Result<u64, KvmError> {
        sys::reset_rings(self.fd).map_err(KvmError::os("KVM_RESET_DIRTY_RINGS"))
    }
}

/// A vCPU of this process.
#[derive(Debug, Clone, Copy)]
pub struct Vcpu<'fd> {
    fd: BorrowedFd<'fd>,
}

impl<'fd> From<&'fd VcpuFd> for Vcpu<'fd> {
    fn from(vcpu: &'fd VcpuFd) -> Self {
        Self {
            fd: sys::borrow(vcpu),
        }
    }
}

impl<'fd> Vcpu<'fd> {
    /// The vCPU behind a descriptor.
    ///
    /// # Errors
    /// It is no vCPU of KVM.
    pub fn new(fd: BorrowedFd<'fd>) -> Result<Self, KvmError> {
        expect_kind(fd, "anon_inode:kvm-vcpu")?;
        Ok(Self { fd })
    }
}

/// Checks what a descriptor refers to: an ioctl's number means something else elsewhere.
fn expect_kind(fd: BorrowedFd, kind: &'static str) -> Result<(), KvmError> {
    let link = std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()))
        .map_err(KvmError::os("readlink(/proc/self/fd)"))?;
    let found = link.to_string_lossy().into_owned();
    if found.starts_with(kind) {
        Ok(())
    } else {
        Err(KvmError::WrongFile {
            expected: kind,
            found,
        })
    }
}
