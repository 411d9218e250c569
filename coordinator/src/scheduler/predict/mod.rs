//! What a migration will take: time, traffic, downtime; the dirty set and the dirty rate before it.
//!
//! - [`Dirtying`]: how many distinct bytes a guest dirties in a window, D(w). Measured (a footprint
//!   curve, such as `dirtylog`'s `Footprint` gives), or from a model with a saturating working set;
//! - [`precopy()`]: one migration, round by round, until a [`Termination`] ends it;
//! - [`pacer`]: the dirty set and dirty rate as Pacer predicts them, and COMMA with it.

mod dirtying;
pub mod pacer;
mod precopy;
mod termination;

pub use dirtying::{Curve, Dirtying};
pub use precopy::{Migration, Prediction, precopy, stage_two_s};
pub use termination::{End, Progress, Round, Termination};
