//! How much bandwidth each migration gets, so that all finish together as early as possible.
//!
//! VMbuddies 3.3 (OBA): VM k has `M` bytes to send and dirties `d` bytes a second; at a rate `r` it
//! needs T(r). The best allocation uses the whole bandwidth, and all T are equal (Theorem 1).
//!
//! - [`allocate`], [`allocate_within`]: in closed form; T falls strictly with r, so there is exactly
//!   one solution;
//! - [`rounds::allocate`]: the same with whole rounds, as Eq. 6 counts them;
//! - [`published::allocate`]: Algorithm 2 as printed, for comparison;
//! - [`baselines`]: LLL and NS, the sequential ones;
//! - [`release`]: when held VMs switch over, and their shares in stop-and-copy.
//!
//! # Where this departs from the paper
//!
//! Eq. 5 (r > d) goes to infinity, or to N rounds, as r falls to d, and Eq. 8 (r ≤ d) begins
//! elsewhere: T would jump up where r rises. Here the traffic is never above the cap of Eq. 7,
//! C = min(M + N·α·W, β·M + W):
//!
//! > T(r) = min((M − V·d/r)/(r − d), C/r) for r > d, and C/r for r ≤ d
//!
//! with V the threshold at which pre-copy ends. The first term is Eq. 5 with a number of rounds that
//! need not be whole. Its inverse is a root of a quadratic, so only the common T is searched for.

pub mod baselines;
mod closed_form;
mod curve;
mod input;
pub mod published;
pub mod release;
pub mod rounds;

pub use closed_form::{Allocation, allocate, allocate_within};
pub use input::{AllocateError, InputError, Limits, VmLoad};

pub(crate) use input::{MAX_BYTES, check};
