//! The crate's only unsafe code: mappings shared with another process, KVM's ioctls, and calls of
//! code compiled for an instruction set that was found at run time.

#[cfg(feature = "kvm")]
pub(crate) mod kvm;
#[cfg(all(feature = "kvm", target_arch = "x86_64"))]
pub(crate) mod machine;
mod map;
mod simd;

pub use map::MapError;
pub(crate) use map::{ReadMap, SharedWords, WriteMap};
pub(crate) use simd::{count, count_common, skip_zeros};
