//! Loads that change: phases of a dirty rate, and when to allocate anew (VMbuddies 3.4).
//!
//! - [`segments()`]: where a measured series changes its level, in spite of noise and single peaks;
//! - [`Pattern`]: whether that is one level, on and off, or nothing regular;
//! - [`Tracker`]: the same while it happens, sample by sample;
//! - [`Reallocator`]: allocates anew at once when a VM enters another phase, else when a window of
//!   fixed length ends, with what remains then.

mod pattern;
mod reallocate;
mod segments;
mod tracker;

pub use pattern::{OnOff, Pattern};
pub use reallocate::{Measured, Reallocator};
pub use segments::{Segment, Sensitivity, segments};
pub use tracker::{Change, Tracker, TrackerSettings};
