//! The coordinator: moves the virtual machines of one application together, or none of them.

#![forbid(unsafe_code)]

pub mod report;
