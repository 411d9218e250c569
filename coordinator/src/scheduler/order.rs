//! Which groups, in which order: the least communication impact (COMMA 3.3).
//!
//! Groups finish one after another, so the impact of an order is Σ over k ≥ 2 of
//! T(G_k) · cut(G_1 ∪ … ∪ G_{k−1}, the rest). Among orders of the same impact the shorter is taken;
//! where all VMs are one valid group, that group is the answer.
//!
//! | search | finds | for |
//! |---|---|---|
//! | [`heuristic`] | COMMA 3.3.2 | any size; its last step over more groups than can be permuted is [`heuristic::order_groups`] |
//! | [`brute`] | COMMA 3.3.1, the optimum | up to 9 VMs |
//! | [`exact`] | the optimum, over subsets | up to 20 VMs |
//! | [`large`] | a good order | any size |
//!
//! All of them see bandwidth only through [`GroupTime`].

pub mod brute;
pub mod exact;
pub mod heuristic;
pub mod large;
pub mod rest;

use std::fmt;

use super::group::GroupTime;
use super::group::replicas::Tiers;
use super::impact::{Traffic, of_groups};

/// What is to be ordered.
#[derive(Debug)]
pub struct Problem<'a, T> {
    /// How long groups take, and which are valid.
    pub time: &'a T,
    /// Who talks to whom.
    pub traffic: &'a Traffic,
    /// Tiers that both sites are to hold while the application is split.
    pub tiers: Option<&'a Tiers>,
}

/// Groups in the order they move in.
#[derive(Debug, Clone, PartialEq)]
pub struct Ordered {
    /// The groups; every VM is in one of them.
    pub groups: Vec<Vec<usize>>,
    /// How long each takes, in seconds.
    pub durations_s: Vec<f64>,
    /// Communication impact in bytes.
    pub impact_bytes: f64,
    /// Whether no other groups and order have less impact: proven.
    pub optimal: bool,
}

/// How groups and their order are looked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Search {
    /// COMMA's heuristic.
    Heuristic,
    /// COMMA's brute force.
    Brute,
    /// The optimum over subsets.
    Exact,
    /// Annealing from several seeds.
    Large,
    /// [`Exact`](Self::Exact) up to 16 VMs, else [`Large`](Self::Large).
    #[default]
    Auto,
}

impl Search {
    /// All searches, as files and flags write them.
    pub const ALL: [(&'static str, Self); 5] = [
        ("heuristic", Self::Heuristic),
        ("brute", Self::Brute),
        ("exact", Self::Exact),
        ("large", Self::Large),
        ("auto", Self::Auto),
    ];
}

impl fmt::Display for Search {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = Self::ALL.iter().find(|(_, search)| search == self);
        f.pad(name.map_or("", |(name, _)| name))
    }
}

impl std::str::FromStr for Search {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let found = Self::ALL.into_iter().find(|(name, _)| *name == text);
        found.map(|(_, search)| search).ok_or_else(|| {
            format!("`{text}` is no search; expected heuristic, brute, exact, large or auto")
        })
    }
}

/// Why no order was found.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum OrderError {
    /// A VM does not converge even alone.
    #[error("VM {vm} is no valid group even alone")]
    NotConverging {
        /// The VM's index.
        vm: usize,
    },
    /// The search does not go so far.
    #[error(
        "search {search} does not go beyond {most} VMs, and there are {vms}; use large or auto"
    )]
    TooMany {
        /// The search.
        search: Search,
        /// How far it goes.
        most: usize,
        /// How many VMs there are.
        vms: usize,
    },
    /// No groups keep every tier on both sites.
    #[error(
        "no valid first and last group hold a VM of every tier; do without replica groups, or give \
         the migration more bandwidth"
    )]
    TiersDoNotFit,
    /// The paper's search knows nothing of tiers.
    #[error("search {search} does not keep tiers on both sites; use exact, large or auto")]
    NoTiers {
        /// The search.
        search: Search,
    },
}

/// Up to so many VMs [`Search::Auto`] proves its answer.
pub const AUTO_EXACT_UP_TO: usize = 16;

/// Finds groups and their order.
///
/// # Errors
/// A VM is no valid group even alone, the search cannot take so many VMs, or tiers cannot be kept.
pub fn find<T: GroupTime>(problem: &Problem<'_, T>, search: Search) -> Result<Ordered, OrderError> {
    let vms = problem.time.vms();
    let alone = |vm: &usize| !problem.time.duration(&[*vm]).is_finite();
    if let Some(vm) = (0..vms).find(alone) {
        return Err(OrderError::NotConverging { vm });
    }
    let limit = match search {
        Search::Brute => brute::UP_TO,
        Search::Exact => exact::UP_TO,
        _ => usize::MAX,
    };
    if vms > limit {
        return Err(OrderError::TooMany {
            search,
            most: limit,
            vms,
        });
    }
    if problem.tiers.is_some() && search == Search::Heuristic {
        return Err(OrderError::NoTiers { search });
    }
    let whole = problem.time.order();
    if problem.time.duration(&whole).is_finite() {
        return Ok(problem.judge(vec![whole], true));
    }
    let proven = matches!(search, Search::Brute | Search::Exact)
        || (search == Search::Auto && vms <= AUTO_EXACT_UP_TO);
    let groups = match search {
        Search::Heuristic => Some(heuristic::search(problem)),
        Search::Brute => brute::search(problem),
        _ if proven => exact::search(problem),
        _ => large::search(problem, &large::Effort::default()),
    };
    let groups = groups.ok_or(OrderError::TiersDoNotFit)?;
    Ok(problem.judge(groups, proven))
}

impl<T: GroupTime> Problem<'_, T> {
    /// What these groups in this order cost.
    #[must_use]
    pub fn judge(&self, groups: Vec<Vec<usize>>, proven: bool) -> Ordered {
        let place = super::group::places(self.time);
        let time = |group: &Vec<usize>| {
            let mut group = group.clone();
            group.sort_by_key(|&vm| place[vm]);
            self.time.duration(&group)
        };
        let durations_s: Vec<f64> = groups.iter().map(time).collect();
        let impact_bytes = of_groups(self.traffic, &groups, &durations_s);
        Ordered {
            // Nothing is below zero.
            optimal: proven || impact_bytes == 0.0,
            groups,
            durations_s,
            impact_bytes,
        }
    }

    /// Whether the groups keep the tiers, where that is asked for.
    fn keeps_tiers(&self, groups: &[Vec<usize>]) -> bool {
        self.tiers.is_none_or(|tiers| tiers.kept(groups))
    }
}

#[cfg(test)]
pub(crate) mod tests;
