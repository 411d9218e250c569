//! What is simulated.

use crate::capacity::Capacity;
use crate::scheduler::bandwidth::{InputError, MAX_BYTES, check};
use crate::scheduler::predict::{Dirtying, Termination};

/// How a store is dirtied over time: phases that follow each other, and begin anew after the last.
/// The first one begins with the simulation.
#[derive(Debug, Clone, PartialEq)]
pub struct Load {
    /// The phases, at least one.
    pub phases: Vec<Phase>,
}

/// A time in which a guest does the same.
#[derive(Debug, Clone, PartialEq)]
pub struct Phase {
    /// How long it lasts; may be infinite.
    pub duration_s: f64,
    /// What it dirties.
    pub dirtying: Dirtying,
}

impl Load {
    /// One that never changes.
    #[must_use]
    pub fn steady(dirtying: Dirtying) -> Self {
        let phase = Phase {
            duration_s: f64::INFINITY,
            dirtying,
        };
        Self {
            phases: vec![phase],
        }
    }

    fn validate(&self, vm: usize) -> Result<(), InputError> {
        let (mut whole, expected) = (0.0, "at least one phase, of 1 ms or longer");
        for phase in &self.phases {
            let length = phase.duration_s;
            let range = 1e-3..=f64::INFINITY;
            check("a phase", Some(vm), length, range, expected)?;
            phase.dirtying.validate(Some(vm))?;
            whole += length;
        }
        let range = 1e-3..=f64::INFINITY;
        check("the phases' length", Some(vm), whole, range, expected)
    }
}

/// A disk that moves with its guest.
#[derive(Debug, Clone, PartialEq)]
pub struct Disk {
    /// Its size.
    pub size_bytes: f64,
    /// How it is written.
    pub load: Load,
    /// Memory follows once so little of it is dirty.
    pub threshold_bytes: f64,
}

/// A VM that is to move.
#[derive(Debug, Clone, PartialEq)]
pub struct Guest {
    /// What the first copy sends of its memory.
    pub memory_bytes: f64,
    /// How its memory is dirtied.
    pub load: Load,
    /// Its disk, if that moves too.
    pub disk: Option<Disk>,
    /// What its switchover takes beside sending.
    pub overhead_s: f64,
}

/// VMs, and what they pass through.
#[derive(Debug, Clone, PartialEq)]
pub struct Scenario {
    /// The VMs.
    pub guests: Vec<Guest>,
    /// Bandwidth, links and interfaces; members of a cut are positions in `guests`.
    pub capacity: Capacity,
    /// When pre-copy ends.
    pub termination: Termination,
    /// A round takes so long at least, as a bitmap is not looked at all the time. 1 ms to 60 s.
    pub least_round_s: f64,
    /// It is given up after this time.
    pub horizon_s: f64,
}

/// Why a simulation has no result.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum SimulateError {
    /// A value makes no sense.
    #[error(transparent)]
    Input(#[from] InputError),
    /// A cut names a VM that there is not.
    #[error(
        "a link or interface lists VM {member}, but there are only {guests}; correct its members"
    )]
    Member {
        /// What it lists.
        member: usize,
        /// How many there are.
        guests: usize,
    },
    /// The policy does not fit the scenario.
    #[error("the policy names VM {vm}: each of the {guests} VMs must be in it exactly once")]
    Policy {
        /// The first VM that is missing, or is in it twice.
        vm: usize,
        /// How many there are.
        guests: usize,
    },
    /// Some VMs never finish.
    #[error(
        "VMs {unfinished:?} (counted from 0) have not finished after {at_s:.0} s: their pre-copy does \
         not end; raise the bandwidth, move fewer at once, throttle them, or bound pre-copy"
    )]
    Endless {
        /// When it was given up.
        at_s: f64,
        /// Who has not finished.
        unfinished: Vec<usize>,
    },
    /// A held group never fits its limits.
    #[error(
        "VMs {group:?} (counted from 0) are held, and would be paused for {best_s:.2} s at best: \
         throttle them, allow a longer downtime, or move fewer at once"
    )]
    TooHot {
        /// Who is held.
        group: Vec<usize>,
        /// The shortest downtime that there would have been.
        best_s: f64,
    },
}

impl Scenario {
    #[allow(clippy::cast_precision_loss, reason = "rates far below 2^53")]
    pub(super) fn validate(&self) -> Result<(), SimulateError> {
        const AMOUNT: &str = "0 to 1e18 bytes";
        const RATE: &str = "a rate above 0, up to 1e18 B/s";
        let bandwidth = self.capacity.bandwidth.0 as f64;
        check("the bandwidth", None, bandwidth, 1.0..=MAX_BYTES, RATE)?;
        for cut in &self.capacity.cuts {
            check(
                "a link's rate",
                None,
                cut.rate.0 as f64,
                1.0..=MAX_BYTES,
                RATE,
            )?;
            if let Some(&member) = cut.members.iter().find(|&&vm| vm >= self.guests.len()) {
                return Err(SimulateError::Member {
                    member,
                    guests: self.guests.len(),
                });
            }
        }
        let round = self.least_round_s;
        check(
            "the shortest round",
            None,
            round,
            1e-3..=60.0,
            "1 ms to 60 s",
        )?;
        let horizon = self.horizon_s;
        check("the horizon", None, horizon, 1e-3..=1e9, "1 ms to 1e9 s")?;
        for (index, guest) in self.guests.iter().enumerate() {
            let vm = Some(index);
            check(
                "the memory",
                vm,
                guest.memory_bytes,
                0.0..=MAX_BYTES,
                AMOUNT,
            )?;
            check(
                "the overhead",
                vm,
                guest.overhead_s,
                0.0..=1e6,
                "0 to 1e6 s",
            )?;
            guest.load.validate(index)?;
            if let Some(disk) = &guest.disk {
                check("the disk", vm, disk.size_bytes, 0.0..=MAX_BYTES, AMOUNT)?;
                let threshold = disk.threshold_bytes;
                check(
                    "the disk's threshold",
                    vm,
                    threshold,
                    0.0..=MAX_BYTES,
                    AMOUNT,
                )?;
                disk.load.validate(index)?;
            }
        }
        Ok(())
    }
}
