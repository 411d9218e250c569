//! Token buckets and a hierarchy of them (link → group → VM), without a clock or I/O.
//!
//! Everything here takes `now` and returns the next deadline: the caller owns the clock and the
//! sockets, so that tests run in virtual time.

#![forbid(unsafe_code)]

pub mod bucket;
pub mod shares;
pub mod units;

pub use bucket::TokenBucket;
pub use units::{Bytes, BytesPerSecond};
