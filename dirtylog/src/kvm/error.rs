//! What can go wrong with KVM's logs.

use std::io;

/// Why a dirty log of KVM cannot be set up or collected.
#[derive(Debug, thiserror::Error)]
pub enum KvmError {
    /// A descriptor of something else.
    #[error("expected a descriptor of `{expected}`, found `{found}`")]
    WrongFile {
        /// What it must be.
        expected: &'static str,
        /// What it is.
        found: String,
    },
    /// The kernel is too old or built without it.
    #[error("this kernel's KVM does not offer {0}")]
    Unsupported(&'static str),
    /// The slot is larger than was said.
    #[error("memory slot {slot} is larger than the {pages} pages that its log was made for")]
    SlotLarger {
        /// The slot.
        slot: u32,
        /// The size that was said.
        pages: u64,
    },
    /// The ring names a page that does not exist.
    #[error(
        "the dirty ring reports page {page} of slot {slot}, which does not exist: \
         it cannot be relied on here; use the bitmap"
    )]
    RingMisreports {
        /// The slot, as reported.
        slot: u32,
        /// The page, as reported.
        page: u64,
    },
    /// The ring has no free entry left, which KVM must not let happen.
    #[error(
        "all {entries} entries of a dirty ring are in use, so pages may be missing in it: \
         KVM did not stop the vCPU in time; the ring cannot be relied on here, use the bitmap"
    )]
    RingOverrun {
        /// The ring's size.
        entries: u32,
    },
    /// The kernel took back another number of ring entries than were given back.
    #[error(
        "KVM_RESET_DIRTY_RINGS took back {taken} entries; expected {given}: \
         the dirty ring cannot be relied on here; use the bitmap"
    )]
    RingCount {
        /// How many were given back.
        given: u64,
        /// How many the kernel took.
        taken: u64,
    },
    /// A system call failed.
    #[error("{call} failed")]
    Os {
        /// The call.
        call: &'static str,
        /// Its error.
        #[source]
        source: io::Error,
    },
}

impl KvmError {
    pub(super) fn os(call: &'static str) -> impl Fn(io::Error) -> Self {
        move |source| Self::Os { call, source }
    }
}
