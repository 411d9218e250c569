//! What is known of the VMs, and what is wrong with it.

use sidecar::protocol::command::Termination;

/// No quantity of bytes, or of bytes a second, may exceed this.
pub(crate) const MAX_BYTES: f64 = 1e18;

/// What the cost model knows of one VM (VMbuddies, Table 1).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct VmLoad {
    /// M: what is to be sent; during a migration, what remains.
    pub remaining_bytes: f64,
    /// d: memory dirtied a second.
    pub dirty_rate_bytes_per_s: f64,
    /// `V_thd`: pre-copy ends when so little remains.
    pub threshold_bytes: f64,
    /// W: the writable working set. Without one nothing bounds what is sent, and the rate must
    /// exceed the dirty rate.
    pub working_set_bytes: Option<f64>,
}

/// When pre-copy ends without having converged (VMbuddies 3.3.1; the defaults are Xen's).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Limits {
    /// N: rounds at most, 1 to 10 000.
    pub max_rounds: u32,
    /// α: the part of the working set that a round sends again, 0 to 1.
    pub resent_share: f64,
    /// β: traffic at most, as a multiple of the memory, 1 to 1000.
    pub traffic_factor: f64,
}

/// More rounds than any migration makes.
const MOST_ROUNDS: u32 = 10_000;
/// And more traffic, as a multiple of the memory.
const MOST_TRAFFIC: f64 = 1000.0;

impl Limits {
    /// The bounds of a termination rule.
    #[must_use]
    pub fn of(termination: &Termination) -> Self {
        let rounds = termination.max_rounds.unwrap_or(MOST_ROUNDS);
        Self {
            max_rounds: rounds.min(MOST_ROUNDS),
            traffic_factor: termination.max_memory_factor.unwrap_or(MOST_TRAFFIC),
            ..Self::default()
        }
    }
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            max_rounds: 30,
            resent_share: 0.8,
            traffic_factor: 3.0,
        }
    }
}

/// A value that makes no sense.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[error(
    "{what}{} is {value}; give {expected}",
    .vm.map_or_else(String::new, |vm| format!(" of VM {vm} (counted from 0)"))
)]
pub struct InputError {
    /// Which quantity.
    pub what: &'static str,
    /// Whose, by its position.
    pub vm: Option<usize>,
    /// What was given.
    pub value: f64,
    /// What would make sense.
    pub expected: &'static str,
}

/// Why there is no allocation.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum AllocateError {
    /// A value makes no sense.
    #[error(transparent)]
    Input(#[from] InputError),
    /// There is nothing to allocate to.
    #[error("no VM was given; name at least one")]
    NoVms,
    /// The VMs that nothing bounds dirty memory as fast as it can be sent, or faster.
    #[error(
        "the VMs dirty {dirty_bytes_per_s} B/s and {bandwidth_bytes_per_s} B/s are there to send it: \
         pre-copy never ends; raise the bandwidth, move fewer VMs at once, throttle them, or give \
         their writable working sets"
    )]
    DoesNotConverge {
        /// Σd of the VMs without a working set, or of the held ones.
        dirty_bytes_per_s: f64,
        /// What is there for them.
        bandwidth_bytes_per_s: f64,
    },
    /// Algorithm 2 as published did not find its root.
    #[error(
        "Algorithm 2 has not settled after {iterations} iterations (VMbuddies 3.3.2); use the closed \
         form, or give it a smaller first step"
    )]
    NotSettled {
        /// How many were made.
        iterations: u32,
    },
}

pub(crate) fn check(
    what: &'static str,
    vm: Option<usize>,
    value: f64,
    range: std::ops::RangeInclusive<f64>,
    expected: &'static str,
) -> Result<(), InputError> {
    if range.contains(&value) {
        return Ok(());
    }
    Err(InputError {
        what,
        vm,
        value,
        expected,
    })
}

pub(super) fn check_bandwidth(bandwidth: f64) -> Result<(), InputError> {
    let expected = "a rate above 0, up to 1e18 B/s";
    check("the bandwidth", None, bandwidth, 1e-9..=MAX_BYTES, expected)
}

pub(super) fn check_all(
    bandwidth: f64,
    vms: &[VmLoad],
    limits: &Limits,
) -> Result<(), AllocateError> {
    const AMOUNT: &str = "0 to 1e18 bytes";
    check_bandwidth(bandwidth)?;
    if vms.is_empty() {
        return Err(AllocateError::NoVms);
    }
    let rounds = f64::from(limits.max_rounds);
    check("max_rounds", None, rounds, 1.0..=1e4, "1 to 10000")?;
    let share = limits.resent_share;
    check("resent_share", None, share, 0.0..=1.0, "0 to 1")?;
    let factor = limits.traffic_factor;
    check("traffic_factor", None, factor, 1.0..=1e3, "1 to 1000")?;
    for (index, vm) in vms.iter().enumerate() {
        let amount = |what, value| check(what, Some(index), value, 0.0..=MAX_BYTES, AMOUNT);
        amount("the memory to send", vm.remaining_bytes)?;
        amount("the threshold", vm.threshold_bytes)?;
        amount("the working set", vm.working_set_bytes.unwrap_or(0.0))?;
        let rate = vm.dirty_rate_bytes_per_s;
        let expected = "0 to 1e18 B/s";
        check(
            "the dirty rate",
            Some(index),
            rate,
            0.0..=MAX_BYTES,
            expected,
        )?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_says_whose_value_it_is_and_what_to_give() {
        let mut vm = VmLoad {
            remaining_bytes: 1.0,
            dirty_rate_bytes_per_s: -2.0,
            threshold_bytes: 0.0,
            working_set_bytes: None,
        };
        let error = check_all(1.0, &[vm], &Limits::default()).unwrap_err();
        assert_eq!(
            error.to_string(),
            "the dirty rate of VM 0 (counted from 0) is -2; give 0 to 1e18 B/s"
        );
        vm.dirty_rate_bytes_per_s = f64::NAN;
        assert!(check_all(1.0, &[vm], &Limits::default()).is_err());
        vm.dirty_rate_bytes_per_s = 0.0;
        assert_eq!(check_all(1.0, &[vm], &Limits::default()), Ok(()));
        let error = check_all(0.0, &[vm], &Limits::default()).unwrap_err();
        assert_eq!(
            error.to_string(),
            "the bandwidth is 0; give a rate above 0, up to 1e18 B/s"
        );
        assert_eq!(
            check_all(1.0, &[], &Limits::default()),
            Err(AllocateError::NoVms)
        );
    }
}
