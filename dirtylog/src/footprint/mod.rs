//! How many distinct pages will be dirtied within a time to come: the footprint of a delay.
//!
//! If a VM is released in `w` ticks, this is what will have to be sent again by then. Time goes
//! by ticks: rounds of equal length, one [`PageSet`](crate::PageSet) each.
//!
//! A page that is dirtied in tick `t` is the first time dirtied in a window that began `j` ticks
//! before `t` if its *backward interval*, the time since it was dirtied last, exceeds `j`. So, with
//! q(j) the mean number of pages per tick whose backward interval exceeds `j`,
//!
//! > D(w) = q(0) + q(1) + … + q(w − 1)
//!
//! is the mean number of distinct pages in a window of `w` ticks. Nothing is assumed about how
//! the guest writes; all that must be remembered of a page is when it was dirtied last. In tick
//! `t` (counted from 0) a page that was never seen has a backward interval of which only is known
//! that it exceeds `t`, so q(j) is averaged over ticks `t ≥ j` alone: no interval is guessed.
//!
//! - [`Footprint`]: D(w) over all time, for guests that go on as they did; 4 bytes a page;
//! - [`PhasedFootprint`]: D(w) over the times whose recent past looked like the present one, for
//!   guests with phases;
//! - [`NextWrite`]: the prediction that Pacer makes, for comparison; 12 bytes a page.
//!
//! Random changes of phase cannot be foreseen by any of them: keep a margin.

mod intervals;
mod next_write;
mod phases;

pub use intervals::Footprint;
pub use next_write::NextWrite;
pub use phases::{PhasedFootprint, Phases};
