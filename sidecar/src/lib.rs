//! The sidecar: one per host, it carries, paces, holds and commits the migrations of a group.
//!
//! The core is made of sans-I/O state machines (`qmp`, `relay`, `hold`, `migration`, `commit`,
//! `protocol`): they take input and the time, and return output and the next deadline. `daemon`
//! drives them from one mio event loop.

pub mod bandwidth;
pub mod commit;
pub mod config;
pub mod daemon;
pub mod direct;
pub mod dirty;
pub mod hold;
pub mod migration;
pub mod notes;
pub mod protocol;
pub mod qmp;
pub mod register;
pub mod relay;
pub mod run;
mod sys;
