//! When pre-copy ends. Independent of the policy, so that VMbuddies' NS, MO, LLL and OBA can all be
//! predicted.

/// When pre-copy ends.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Termination {
    /// QEMU's: when what remains can be sent in the downtime that is allowed. Without bounds.
    Qemu {
        /// `downtime-limit`.
        max_downtime_s: f64,
    },
    /// Xen's (VMbuddies 4.2): when little remains, after so many rounds, or when so much was sent.
    Xen {
        /// 50 pages.
        threshold_bytes: f64,
        /// 30.
        max_rounds: u32,
        /// 3 times the memory.
        traffic_factor: f64,
    },
    /// VMbuddies' (4.2, "MO"): also when a round dirties as much as it sends.
    Intelligent {
        /// As Xen's.
        threshold_bytes: f64,
        /// ε: a round has stalled if it dirtied at least (1 − ε) of what it sent.
        epsilon: f64,
        /// It ends after so many stalled rounds in a row.
        stalled_rounds: u32,
        /// As Xen's.
        max_rounds: u32,
        /// As Xen's.
        traffic_factor: f64,
    },
}

impl Termination {
    /// Xen 4.1's values.
    pub const XEN: Self = Self::Xen {
        threshold_bytes: 50.0 * 4096.0,
        max_rounds: 30,
        traffic_factor: 3.0,
    };
    /// Xen's bounds, and an end at the first round that stalls by 10 %.
    pub const INTELLIGENT: Self = Self::Intelligent {
        threshold_bytes: 50.0 * 4096.0,
        epsilon: 0.1,
        stalled_rounds: 1,
        max_rounds: 30,
        traffic_factor: 3.0,
    };
}

/// Why pre-copy ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// Little enough remains.
    Converged,
    /// A round dirtied about as much as it sent.
    Stalled,
    /// The number of rounds.
    Rounds,
    /// The traffic.
    Traffic,
}

/// A finished round.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Round {
    /// What it sent.
    pub sent_bytes: f64,
    /// What the guest dirtied meanwhile: the next round.
    pub dirtied_bytes: f64,
    /// At which rate the next one can be sent.
    pub rate_bytes_per_s: f64,
}

/// Follows the rounds of one migration.
#[derive(Debug, Clone)]
pub struct Progress {
    termination: Termination,
    memory_bytes: f64,
    rounds: u32,
    sent_bytes: f64,
    stalled: u32,
}

impl Progress {
    /// Of a guest with `memory_bytes` to send.
    #[must_use]
    pub fn new(termination: Termination, memory_bytes: f64) -> Self {
        Self {
            termination,
            memory_bytes,
            rounds: 0,
            sent_bytes: 0.0,
            stalled: 0,
        }
    }

    /// Rounds after the first copy: n of VMbuddies' Eq. 6.
    #[must_use]
    pub fn rounds(&self) -> u32 {
        self.rounds.saturating_sub(1)
    }

    /// What all rounds have sent.
    #[must_use]
    pub fn sent_bytes(&self) -> f64 {
        self.sent_bytes
    }

    /// Takes a finished round: whether pre-copy ends with it, and why.
    pub fn round_ended(&mut self, round: Round) -> Option<End> {
        self.rounds += 1;
        self.sent_bytes += round.sent_bytes;
        let left = round.dirtied_bytes;
        let (threshold, max_rounds, factor) = match self.termination {
            Termination::Qemu { max_downtime_s } => {
                let fits = left <= round.rate_bytes_per_s * max_downtime_s;
                return fits.then_some(End::Converged);
            }
            Termination::Xen {
                threshold_bytes,
                max_rounds,
                traffic_factor,
            }
            | Termination::Intelligent {
                threshold_bytes,
                max_rounds,
                traffic_factor,
                ..
            } => (threshold_bytes, max_rounds, traffic_factor),
        };
        if left <= threshold {
            return Some(End::Converged);
        }
        if let Termination::Intelligent {
            epsilon,
            stalled_rounds,
            ..
        } = self.termination
        {
            // The first copy says nothing: most of what it sends is not dirtied again.
            let stalls = self.rounds > 1 && left >= (1.0 - epsilon) * round.sent_bytes;
            self.stalled = if stalls { self.stalled + 1 } else { 0 };
            if self.stalled >= stalled_rounds.max(1) {
                return Some(End::Stalled);
            }
        }
        if self.rounds >= max_rounds {
            return Some(End::Rounds);
        }
        (self.sent_bytes >= factor * self.memory_bytes).then_some(End::Traffic)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ends(termination: Termination, rounds: &[(f64, f64)]) -> Vec<Option<End>> {
        let mut progress = Progress::new(termination, 1e9);
        let ended = |&(sent_bytes, dirtied_bytes): &(f64, f64)| {
            progress.round_ended(Round {
                sent_bytes,
                dirtied_bytes,
                rate_bytes_per_s: 1e8,
            })
        };
        rounds.iter().map(ended).collect()
    }

    #[test]
    fn each_ends_for_its_reasons() {
        let stalling = [(1e9, 9.5e8), (9.5e8, 9e8), (9e8, 9e8), (9e8, 9e8)];
        assert_eq!(
            ends(Termination::XEN, &stalling),
            [None, None, None, Some(End::Traffic)]
        );
        assert_eq!(
            ends(Termination::INTELLIGENT, &stalling)[..2],
            [None, Some(End::Stalled)]
        );
        let qemu = Termination::Qemu {
            max_downtime_s: 0.3,
        };
        assert_eq!(
            ends(qemu, &[(1e9, 4e7), (4e7, 3e7)]),
            [None, Some(End::Converged)]
        );
        assert_eq!(
            ends(Termination::XEN, &[(1e9, 2e5)]),
            [Some(End::Converged)]
        );
        let slow = [(1e7, 1e6); 30];
        assert_eq!(
            ends(Termination::XEN, &slow).last(),
            Some(&Some(End::Rounds))
        );
    }
}
