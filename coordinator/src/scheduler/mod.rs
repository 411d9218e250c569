//! The scheduler: predicts, allocates, groups and orders. Pure: no clock, no I/O.

pub mod allot;
pub mod bandwidth;
pub mod fluid;
pub mod group;
pub mod impact;
pub mod order;
pub mod paths;
pub mod phases;
pub mod plan;
pub mod predict;
pub(crate) mod random;
pub mod schedule;
