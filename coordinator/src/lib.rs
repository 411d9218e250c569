//! The coordinator: moves the virtual machines of one application together, or none of them.
//!
//! - [`application`]: the file that says what is to be moved.

#![forbid(unsafe_code)]

pub mod application;
pub mod capacity;
pub mod client;
pub mod conductor;
pub mod engine;
pub mod observer;
pub mod policy;
pub mod report;
