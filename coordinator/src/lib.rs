//! The coordinator: moves the virtual machines of one application together, or none of them.
//!
//! ```text
//! application file ─► application ─► policy ─► conductor ─► engine (one per group)
//!                                                  ▲   │
//!                       client (control sockets) ──┴───┴──► sidecars      all driven by drive::run
//! ```
//!
//! `policy`, `capacity`, `conductor`, `engine` and the judging half of `preflight` are pure: they
//! take input and the time, and return output and the next deadline. Sockets, threads and files
//! are in `client`, `drive`, and the command line.
//!
//! - [`application`]: the file that says what is to be moved.
//! - [`policy`]: which VMs switch over together, and in what order.
//! - [`engine`]: the state machine of one group's move; the protocol's client side.
//! - [`conductor`]: several groups, and what happens when a later one fails.
//! - [`drive`]: [`run`], which carries a move out.
//! - [`observer`]: watching it; [`live`]: on a terminal; [`screen`]: that.
//! - [`preflight`], [`status`], [`operate`]: `muster check`, `status`, `abort`, `recover`.
//! - [`scheduler`]: predicts, allocates, groups, orders; simulates.
//! - [`dirty`]: `muster dirty`, how a VM dirties its memory.
//! - [`survey`]: what the file leaves out is measured, before a plan or a move.
//! - [`simulation`]: `muster simulate`: the papers' set-ups, and files, in virtual time.
//! - [`report`]: what a move did; table, picture.

#![forbid(unsafe_code)]

pub mod application;
pub mod capacity;
pub mod client;
pub mod conductor;
pub mod dirty;
pub mod drive;
pub mod engine;
pub mod live;
pub mod observer;
pub mod operate;
pub mod policy;
pub mod preflight;
pub mod report;
pub mod scheduler;
pub mod screen;
pub mod simulation;
pub mod status;
pub mod survey;
pub mod traffic;

pub use application::Application;
pub use drive::{RunError, RunOptions, run};
pub use observer::Observer;
pub use report::MoveReport;
