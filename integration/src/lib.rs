//! The testbed: hosts as network namespaces, guests of our own, and what is needed to measure
//! and verify a migration from outside: ticks on the clock, RAM by hash and pattern.

#![deny(unsafe_code)]

pub mod app;
pub mod bench;
pub mod clock;
pub mod demo;
pub mod faults;
pub mod guest;
pub mod lab;
pub mod memory;
pub mod net;
pub mod process;
pub mod proof;
pub mod qemu;
pub mod qmp;
pub mod rootless;
pub mod signals;
mod sys;
pub mod ticks;
pub mod watch;
