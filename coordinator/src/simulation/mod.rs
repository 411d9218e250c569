//! `muster simulate`: applications moved in virtual time, by the planner and the fluid simulator.
//!
//! A [`Study`] is a set-up of a paper, or a file: an application, the cases in which it moves, the
//! approaches that move it, what the source prints, and what it leaves open. The named ones are data
//! (`scenarios/*.toml`): the application in the format of application files, the rest in tables
//! around it.
//!
//! - [`study`]: what such a file says;
//! - [`case`]: from a case to an application that can be planned;
//! - [`guests`]: from there to guests, links and a policy for the simulator;
//! - [`run`]: plans and simulates every approach in every case;
//! - [`mod@compare`]: ours beside the source's.
//!
//! ```text
//! scenarios/*.toml ─► study ─► case ─┬─► scheduler::plan ──┬─► run ─► compare ─► report::simulated
//!                                    └─► scheduler::fluid ─┘
//! ```

pub mod case;
pub mod compare;
pub mod guests;
pub mod run;
pub mod study;

pub use compare::{Comparison, compare};
pub use run::{Amounts, Attempt, CaseResult, simulate};
pub use study::{Approach, NAMED, Study, named};

use crate::application::ApplicationError;
use crate::scheduler::fluid::SimulateError;
use crate::scheduler::order::OrderError;
use crate::scheduler::plan::MissingError;

/// Why a study cannot be simulated.
#[derive(Debug, thiserror::Error)]
pub enum StudyError {
    /// The application in it is wrong.
    #[error(transparent)]
    Application(#[from] ApplicationError),
    /// It does not say enough.
    #[error(transparent)]
    Missing(#[from] MissingError),
    /// No groups were found.
    #[error(transparent)]
    Order(#[from] OrderError),
    /// A value makes no sense to the simulator.
    #[error(transparent)]
    Simulate(#[from] SimulateError),
    /// The study itself is wrong.
    #[error("{0}")]
    Study(String),
}
