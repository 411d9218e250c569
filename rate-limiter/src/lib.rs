//! Token buckets and a hierarchy of them (link → group → VM), without a clock or I/O.
//!
//! Everything here takes `now` and returns the next deadline: the caller owns the clock and the
//! sockets, so that tests run in virtual time.
//!
//! - [`TokenBucket`]: one limit, in exact integer arithmetic;
//! - [`Hierarchy`]: who may send how much now, and when to ask again; or what rate each has, where
//!   somebody else sends ([`Hierarchy::allot`]);
//! - [`shares`]: how a bandwidth is divided, as pure functions;
//! - [`units`]: quantities with their unit in the type.
//!
//! # The caller's loop
//!
//! ```
//! use std::time::Instant;
//! use rate_limiter::{Bytes, BytesPerSecond, Hierarchy, Poll};
//!
//! let now = Instant::now();
//! let mut limiter = Hierarchy::new(now, Some(BytesPerSecond(50_000_000)));
//! let group = limiter.add_group(now, None);
//! let vm = limiter.add_leaf(now, group);
//! limiter.set_backlogged(vm, true); // its socket has become readable
//!
//! let deadline = loop {
//!     match limiter.poll(now) {
//!         Poll::Grant { leaf, bytes } => {
//!             let moved = Bytes(bytes.0.min(100_000)); // read and write up to `bytes`
//!             limiter.charge(now, leaf, moved);
//!             if moved < bytes {
//!                 limiter.set_backlogged(leaf, false); // the socket blocked
//!             }
//!         }
//!         Poll::Wait(deadline) => break Some(deadline), // the timeout of the next epoll_wait
//!         Poll::Idle => break None,                     // only an event can change this
//!     }
//! };
//! # assert_eq!(deadline, None);
//! ```
//!
//! # What a limit promises
//!
//! Over any window of length *t*, a limit lets through at most limit·*t* + burst, where the burst
//! is 15 ms of the limit, at least 16 KiB. While there is backlog it lets through at least
//! limit·*t* − burst, as long as the caller comes back no later than 10 ms after the deadline it
//! was given. So any window of 1 s is within 1.5 % from 1.1 MB/s up, and within 3 % from about
//! 260 kB/s up; below that the smallest quantum, 4 KiB, is what shows. `tests/pacing.rs` holds these
//! numbers.

#![forbid(unsafe_code)]

pub mod bucket;
pub mod hierarchy;
pub mod shares;
pub mod units;

pub use bucket::TokenBucket;
pub use hierarchy::{Demand, GroupId, Hierarchy, InvalidWeight, LeafId, Poll};
pub use units::{Bytes, BytesPerSecond};
