//! A VM with one vCPU that owns its memory.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::{VcpuFd, VmFd};
use memmap2::{MmapOptions, MmapRaw};

use super::kvm::borrow;

/// A memory slot of a [`Machine`].
#[derive(Debug, Clone, Copy)]
pub(crate) struct Slot {
    pub(crate) number: u32,
    pub(crate) flags: u32,
    pub(crate) address: u64,
    pub(crate) bytes: usize,
}

/// The machine. Fields are dropped in this order: nothing can run when the memory goes.
#[derive(Debug)]
pub(crate) struct Machine {
    vcpu: VcpuFd,
    vm: VmFd,
    memory: Vec<MmapRaw>,
}

impl Machine {
    /// Gives `vm` fresh memory and a vCPU.
    pub(crate) fn new(vm: VmFd, slots: &[Slot]) -> io::Result<Self> {
        let mut memory = Vec::new();
        for slot in slots {
            let map = MmapRaw::from(MmapOptions::new().len(slot.bytes).map_anon()?);
            let region = kvm_userspace_memory_region {
                slot: slot.number,
                flags: slot.flags,
                guest_phys_addr: slot.address,
                memory_size: slot.bytes as u64,
                userspace_addr: map.as_ptr().addr() as u64,
            };
            memory.push(map);
            // SAFETY: the region is a whole mapping of ours that no Rust reference points into.
            // It lives as long as the only vCPU that can touch it: both are private parts of the
            // result. If this returns early, no vCPU was made.
            unsafe { vm.set_user_memory_region(region) }?;
        }
        let vcpu = vm.create_vcpu(0)?;
        Ok(Self { vcpu, vm, memory })
    }

    /// The vCPU, to set it up and to run it.
    pub(crate) fn vcpu(&mut self) -> &mut VcpuFd {
        &mut self.vcpu
    }

    /// The vCPU, to map its ring.
    pub(crate) fn shared_vcpu(&self) -> &VcpuFd {
        &self.vcpu
    }

    /// Another descriptor of the VM, for its ioctls.
    pub(crate) fn vm(&self) -> io::Result<OwnedFd> {
        borrow(&self.vm).as_fd().try_clone_to_owned()
    }

    /// Copies `bytes` into the memory of the `index`-th slot.
    pub(crate) fn write(&mut self, index: usize, offset: usize, bytes: &[u8]) {
        let memory = &self.memory[index];
        assert!(offset <= memory.len() && bytes.len() <= memory.len() - offset);
        // SAFETY: the target lies in the mapping (checked), which no Rust reference points into,
        // so it does not overlap `bytes`; the vCPU does not run, because whoever runs it borrows
        // `self` exclusively.
        unsafe {
            let target = memory.as_mut_ptr().add(offset);
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), target, bytes.len());
        }
    }
}
