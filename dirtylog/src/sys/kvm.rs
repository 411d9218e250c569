//! KVM's ioctls for dirty logging, the buffer that they write to, and the dirty ring's memory.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::sync::atomic::{AtomicU32, Ordering};

use kvm_bindings::{
    KVM_DIRTY_LOG_PAGE_OFFSET, kvm_clear_dirty_log, kvm_dirty_gfn, kvm_dirty_log, kvm_enable_cap,
};
use memmap2::{MmapMut, MmapOptions, MmapRaw};

use crate::{index, words_for};

/// _IO, _IOW and _IOWR of type 0xAE (KVMIO).
const fn request(direction: u64, number: u64, size: usize) -> u64 {
    direction << 30 | (size as u64) << 16 | 0xae << 8 | number
}
const CHECK_EXTENSION: u64 = request(0, 0x03, 0);
const GET_DIRTY_LOG: u64 = request(1, 0x42, size_of::<kvm_dirty_log>());
const ENABLE_CAP: u64 = request(1, 0xa3, size_of::<kvm_enable_cap>());
const CLEAR_DIRTY_LOG: u64 = request(3, 0xc0, size_of::<kvm_clear_dirty_log>());
const RESET_DIRTY_RINGS: u64 = request(0, 0xc7, 0);

fn result(value: libc::c_int) -> io::Result<u64> {
    u64::try_from(value).map_err(|_| io::Error::last_os_error())
}

/// A descriptor that its owner promises to keep open.
pub(crate) fn borrow<T: AsRawFd>(owner: &T) -> BorrowedFd<'_> {
    let fd: RawFd = owner.as_raw_fd();
    // SAFETY: `owner` is a VmFd or VcpuFd of kvm-ioctls (the only callers): it owns the
    // descriptor, and it cannot be dropped while the result borrows it.
    unsafe { BorrowedFd::borrow_raw(fd) }
}

/// KVM_CHECK_EXTENSION on a VM.
pub(crate) fn check_extension(vm: BorrowedFd, capability: u32) -> io::Result<u64> {
    // SAFETY: this ioctl takes an integer and touches no memory of ours.
    result(unsafe { libc::ioctl(vm.as_raw_fd(), CHECK_EXTENSION, u64::from(capability)) })
}

/// KVM_ENABLE_CAP on a VM, with one argument.
pub(crate) fn enable_cap(vm: BorrowedFd, capability: u32, argument: u64) -> io::Result<()> {
    let mut enable = kvm_enable_cap {
        cap: capability,
        ..Default::default()
    };
    enable.args[0] = argument;
    // SAFETY: the kernel reads a kvm_enable_cap, which `enable` is, and writes nothing. The
    // capabilities that callers enable take plain numbers, no addresses.
    result(unsafe { libc::ioctl(vm.as_raw_fd(), ENABLE_CAP, &raw const enable) }).map(drop)
}

/// KVM_RESET_DIRTY_RINGS: how many entries were taken back.
pub(crate) fn reset_rings(vm: BorrowedFd) -> io::Result<u64> {
    // SAFETY: this ioctl takes no argument and touches no memory of ours but the rings, which are
    // shared with the kernel and accessed as such.
    result(unsafe { libc::ioctl(vm.as_raw_fd(), RESET_DIRTY_RINGS, 0) })
}

/// The buffer for a slot's dirty log.
///
/// KVM writes as many bytes as the *slot* needs, which the kernel knows and we only were told. So
/// the buffer ends where a page without any access rights begins: if the slot is larger than was
/// said, the kernel's copy stops there with EFAULT, and nothing of ours is overwritten.
#[derive(Debug)]
pub(crate) struct LogBuffer {
    map: MmapMut,
    /// Where the words begin in `map`; they end at the guard page.
    begin: usize,
    words: usize,
}

impl LogBuffer {
    pub(crate) fn new(pages: u64) -> io::Result<Self> {
        let page = page_size();
        let words = words_for(pages);
        let bytes = words * 8;
        let guard = bytes.next_multiple_of(page);
        let mut map = MmapOptions::new().len(guard + page).map_anon()?;
        // SAFETY: the range is the last page of a mapping that is ours alone; no reference to that
        // page is ever made (`words` ends before it).
        let outcome = unsafe {
            let start = map.as_mut_ptr().add(guard);
            libc::mprotect(start.cast(), page, libc::PROT_NONE)
        };
        result(outcome)?;
        let begin = guard - bytes;
        Ok(Self { map, begin, words })
    }

    pub(crate) fn words(&self) -> &[u64] {
        // SAFETY: `begin` is a multiple of 8 in a page-aligned mapping, `words * 8` bytes follow
        // before the guard page; the kernel writes to them only during `get`, which borrows
        // exclusively. Any bytes are valid words.
        unsafe { std::slice::from_raw_parts(self.map.as_ptr().add(self.begin).cast(), self.words) }
    }

    fn address(&mut self) -> *mut libc::c_void {
        // SAFETY: `begin` lies inside the mapping.
        unsafe { self.map.as_mut_ptr().add(self.begin).cast() }
    }

    /// KVM_GET_DIRTY_LOG.
    pub(crate) fn get(&mut self, vm: BorrowedFd, slot: u32) -> io::Result<()> {
        let address = self.address();
        // SAFETY: as for `words`, and the exclusive borrow lasts until this returns. Zeros first:
        // a slot smaller than was said leaves the rest untouched.
        unsafe { std::ptr::write_bytes(address.cast::<u64>(), 0, self.words) };
        let mut log = kvm_dirty_log {
            slot,
            ..Default::default()
        };
        log.__bindgen_anon_1.dirty_bitmap = address;
        // SAFETY: the kernel reads a kvm_dirty_log, which `log` is, and writes the slot's bitmap
        // from `address` upwards: either it fits, or the copy ends at the guard page.
        result(unsafe { libc::ioctl(vm.as_raw_fd(), GET_DIRTY_LOG, &raw const log) }).map(drop)
    }

    /// KVM_CLEAR_DIRTY_LOG of `pages` pages from the first of word `word` on.
    pub(crate) fn clear(
        &mut self,
        vm: BorrowedFd,
        slot: u32,
        word: usize,
        pages: u32,
    ) -> io::Result<()> {
        assert!(word + words_for(pages.into()) <= self.words);
        let mut log = kvm_clear_dirty_log {
            slot,
            num_pages: pages,
            first_page: word as u64 * 64,
            ..Default::default()
        };
        // SAFETY: `word` lies inside the buffer (checked).
        log.__bindgen_anon_1.dirty_bitmap = unsafe { self.address().add(word * 8) };
        // SAFETY: the kernel reads a kvm_clear_dirty_log, which `log` is, and the bitmap of
        // `pages` pages, which lies inside the buffer (checked). It writes none of our memory.
        result(unsafe { libc::ioctl(vm.as_raw_fd(), CLEAR_DIRTY_LOG, &raw const log) }).map(drop)
    }
}

/// A vCPU's dirty ring, shared with the kernel.
#[derive(Debug)]
pub(crate) struct RingMap {
    map: MmapRaw,
    entries: usize,
}

impl RingMap {
    pub(crate) fn new(vcpu: BorrowedFd, entries: usize) -> io::Result<Self> {
        let offset = u64::from(KVM_DIRTY_LOG_PAGE_OFFSET) * page_size() as u64;
        let map = MmapOptions::new()
            .offset(offset)
            .len(entries * size_of::<kvm_dirty_gfn>())
            .map_raw(vcpu.as_raw_fd())?;
        Ok(Self { map, entries })
    }

    fn entry(&self, position: usize) -> *mut kvm_dirty_gfn {
        let position = position % self.entries;
        // SAFETY: `position` is less than `entries`, and the mapping holds that many.
        unsafe { self.map.as_mut_ptr().cast::<kvm_dirty_gfn>().add(position) }
    }

    fn flags(&self, position: usize) -> &AtomicU32 {
        // SAFETY: the field is an aligned u32 inside the mapping, which lives as long as `self`;
        // the kernel accesses it atomically, and so does everyone here.
        unsafe { AtomicU32::from_ptr(&raw mut (*self.entry(position)).flags) }
    }

    /// The entry at `position`, if it has these flags: slot and page.
    pub(crate) fn read(&self, position: usize, flags: u32) -> Option<(u32, u64)> {
        // Acquire, to the kernel's release: the entry was written before its flag.
        if self.flags(position).load(Ordering::Acquire) != flags {
            return None;
        }
        let entry = self.entry(position);
        // SAFETY: both fields lie inside the mapping, aligned; the kernel does not write an
        // entry between setting its dirty flag and our reset. (A kernel that did would give us
        // wrong numbers, which the caller checks. Volatile: they are read once.)
        unsafe {
            let slot = (&raw const (*entry).slot).read_volatile();
            Some((slot, (&raw const (*entry).offset).read_volatile()))
        }
    }

    /// Gives the entry at `position` back.
    pub(crate) fn give_back(&self, position: usize, flags: u32) {
        self.flags(position).store(flags, Ordering::Release);
    }
}

fn page_size() -> usize {
    // SAFETY: sysconf takes an integer and touches no memory of ours.
    let size = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    usize::try_from(size).map_or(4096, |size| index(size as u64))
}
