//! A fluid simulator of migrations: what a policy would do, in virtual time.
//!
//! Memory is an amount, not pages; a stream is a rate. Between two events (a round ends, a phase
//! of a guest begins, the policy wakes up) all rates are constant, and what is dirty is known in
//! closed form ([`Dirtying`](super::predict::Dirtying)). So a simulation is exact for its model,
//! takes no steps of time, and gives the same for the same input.
//!
//! - A [`Guest`] has memory, with phases of dirtying, and perhaps a disk. Its disk is copied first,
//!   then what was written to it, then memory (COMMA 2.1); from then on rounds send what either
//!   dirtied.
//! - Rounds go on until the [`Termination`](super::predict::Termination) ends pre-copy; then the
//!   guest is held, in rounds too, until its policy releases it. What is left then is sent while it
//!   is paused, with precedence over streams of pre-copy.
//! - The links are a [`Capacity`](crate::capacity::Capacity): whoever wants more than there is gets
//!   max-min fair shares ([`sharing`]).
//! - A [`Policy`] says how fast each may send, and who is released: [`policies`] has those of the
//!   papers, and a [`Timetable`](policies::Timetable) that follows a plan.
//!
//! A round sends what was dirty when it began. Pages dirtied before their turn in it are sent twice,
//! as in the models of VMbuddies; QEMU saves some of that.

mod guest;
mod outcome;
pub mod policies;
pub mod sharing;
mod simulate;
mod stream;

pub use guest::{Disk, Guest, Load, Phase, Scenario, SimulateError};
pub use outcome::{Outcome, Traffic, Travel};
pub use simulate::{GuestView, Orders, Policy, Stage, View, simulate};
