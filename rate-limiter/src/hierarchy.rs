//! A hierarchy of limits, link → groups → leaves, and whose turn it is.
//!
//! A leaf is a VM (how many channels feed it is the caller's matter). The link, every group and
//! every leaf may have a limit. [`poll`](Hierarchy::poll) says which leaf may move how many bytes
//! now, or when to ask again; [`charge`](Hierarchy::charge) says how many it moved. The loop is
//! shown in the crate's documentation.
//!
//! # Who is next
//!
//! A limit *allows* while its bucket holds at least 1 ms of its rate (1 KiB to 64 KiB). Among the
//! backlogged leaves for which their own limit, their group's and the link's allow, start-time fair
//! queueing picks: first a group, whose weight is the sum of the weights of its backlogged leaves,
//! then a leaf in it. It is work conserving: [`Poll::Wait`] means that every backlogged leaf has a
//! limit above it that does not allow. Two leaves of a group that are both held up by nothing but
//! their share get bytes in proportion to their weights, within one quantum each; so do two groups.
//! Time spent idle or held up by an own limit earns no credit: such a leaf or group goes on at the
//! current virtual time.
//!
//! # Grants and deadlines
//!
//! A quantum is 4 ms of a rate, at least 4 KiB, at most 256 KiB; without a limit it is 256 KiB. A
//! grant is the smallest quantum above the leaf, or what the buckets hold if that is less: it never
//! makes a debt. A deadline is the time at which a leaf has whole quanta above it. So a caller that
//! is 10 ms late finds at most 1 + 4 + 10 ms in any bucket: just what it can hold.
//!
//! Charge each grant before the next `poll`: tokens are taken by `charge`. A grant that is never
//! charged costs the leaf its turn, nothing more.
//!
//! # Changes
//!
//! Limits, weights and backlog may change at any time and count from the very next `poll`. A
//! deadline returned before the change is void: poll again. Changed limits keep the tokens gathered
//! so far, at most 15 ms of the new rate (16 KiB if that is more).
//!
//! Identifiers are never used twice. With one that is stale every function does nothing.

mod allot;
mod arena;
mod flow;
mod limit;

use std::time::Instant;

pub use self::allot::Demand;
use self::arena::{Arena, Key};
use self::flow::{Flow, VirtualTime, Weight};
use self::limit::{Limit, MIN_QUANTUM};
use crate::units::{Bytes, BytesPerSecond};

/// A group of a [`Hierarchy`]; meaningless in another one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct GroupId(Key);

/// A leaf of a [`Hierarchy`]; meaningless in another one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LeafId(Key);

/// What to do now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Poll {
    /// Move up to `bytes` for `leaf`, [`charge`](Hierarchy::charge) what was moved, poll again.
    Grant {
        /// Whose turn it is.
        leaf: LeafId,
        /// The most it may move, in bytes; never 0.
        bytes: Bytes,
    },
    /// Limits hold everything back until then; poll again at that time or after any change.
    Wait(Instant),
    /// Nothing is backlogged, or only what a limit of 0 blocks; poll again after a change.
    Idle,
}

/// Why a weight was refused.
#[derive(Debug, Clone, Copy, PartialEq, thiserror::Error)]
#[error("weight {weight} is not usable; expected a finite number above 0, for example 1.0")]
pub struct InvalidWeight {
    /// What was given.
    pub weight: f64,
}

/// Limits and fair queueing for one link; see the [module's text](self).
#[derive(Debug, Clone)]
pub struct Hierarchy {
    link: Limit,
    /// That of the queue of groups.
    virtual_time: VirtualTime,
    groups: Arena<Group>,
    leaves: Arena<Leaf>,
}

#[derive(Debug, Clone)]
struct Group {
    limit: Limit,
    /// The place in the link's queue.
    flow: Flow,
    /// That of the queue of this group's leaves.
    virtual_time: VirtualTime,
    /// The sum of the weights of the backlogged leaves: 0 means none.
    backlog: Weight,
    /// `poll`'s own: the backlogged leaf that its limit allows and that is next.
    candidate: Option<(VirtualTime, Key)>,
}

#[derive(Debug, Clone)]
struct Leaf {
    group: Key,
    limit: Limit,
    /// The place in the group's queue.
    flow: Flow,
    backlogged: bool,
    /// The grant that is not charged yet; `flow` has paid for it in advance.
    granted: Option<Bytes>,
}

impl Hierarchy {
    /// A link without groups; `None` is no limit.
    #[must_use]
    pub fn new(now: Instant, link: Option<BytesPerSecond>) -> Self {
        Self {
            link: Limit::new(now, link),
            virtual_time: 0,
            groups: Arena::new(),
            leaves: Arena::new(),
        }
    }

    /// Changes the link's limit; `None` is no limit, 0 blocks.
    pub fn set_link_limit(&mut self, now: Instant, limit: Option<BytesPerSecond>) {
        self.link.set(now, limit);
    }

    /// The link's limit.
    #[must_use]
    pub fn link_limit(&self) -> Option<BytesPerSecond> {
        self.link.get()
    }

    /// Adds a group; `None` is no limit, 0 blocks.
    pub fn add_group(&mut self, now: Instant, limit: Option<BytesPerSecond>) -> GroupId {
        GroupId(self.groups.insert(Group {
            limit: Limit::new(now, limit),
            flow: Flow::new(self.virtual_time, flow::ONE),
            virtual_time: 0,
            backlog: 0,
            candidate: None,
        }))
    }

    /// Changes a group's limit; `None` is no limit, 0 blocks.
    pub fn set_group_limit(&mut self, now: Instant, group: GroupId, limit: Option<BytesPerSecond>) {
        if let Some(group) = self.groups.get_mut(group.0) {
            group.limit.set(now, limit);
        }
    }

    /// A group's limit; `None` also for a stale id.
    #[must_use]
    pub fn group_limit(&self, group: GroupId) -> Option<BytesPerSecond> {
        self.groups.get(group.0)?.limit.get()
    }

    /// Whether the group exists.
    #[must_use]
    pub fn has_group(&self, group: GroupId) -> bool {
        self.groups.get(group.0).is_some()
    }

    /// Removes a group with all its leaves.
    pub fn remove_group(&mut self, group: GroupId) {
        self.groups.remove(group.0);
        self.leaves.retain(|leaf| leaf.group != group.0);
    }

    /// Adds a leaf with weight 1 and no limit, not backlogged. In a stale group there is no leaf to
    /// add: the id returned is stale from the beginning.
    pub fn add_leaf(&mut self, now: Instant, group: GroupId) -> LeafId {
        let Some(parent) = self.groups.get(group.0) else {
            return LeafId(self.leaves.unused_key());
        };
        LeafId(self.leaves.insert(Leaf {
            group: group.0,
            limit: Limit::new(now, None),
            flow: Flow::new(parent.virtual_time, flow::ONE),
            backlogged: false,
            granted: None,
        }))
    }

    /// Changes a leaf's limit; `None` is no limit, 0 blocks.
    pub fn set_leaf_limit(&mut self, now: Instant, leaf: LeafId, limit: Option<BytesPerSecond>) {
        if let Some(leaf) = self.leaves.get_mut(leaf.0) {
            leaf.limit.set(now, limit);
        }
    }

    /// A leaf's own limit; `None` also for a stale id.
    #[must_use]
    pub fn leaf_limit(&self, leaf: LeafId) -> Option<BytesPerSecond> {
        self.leaves.get(leaf.0)?.limit.get()
    }

    /// Whether the leaf exists.
    #[must_use]
    pub fn has_leaf(&self, leaf: LeafId) -> bool {
        self.leaves.get(leaf.0).is_some()
    }

    /// Changes a leaf's weight: its share relative to the other backlogged leaves. Weights are
    /// kept in steps of 2⁻²⁰ and clamped to 2⁻²⁰..=2²⁰ (about a millionth to a million).
    ///
    /// # Errors
    /// The weight is not finite or not above 0; the leaf keeps the one it has.
    pub fn set_leaf_weight(&mut self, leaf: LeafId, weight: f64) -> Result<(), InvalidWeight> {
        let new = flow::weight_from(weight).ok_or(InvalidWeight { weight })?;
        let Some(leaf) = self.leaves.get_mut(leaf.0) else {
            return Ok(());
        };
        let Some(group) = self.groups.get_mut(leaf.group) else {
            return Ok(());
        };
        let old = leaf.flow.weight();
        leaf.flow.set_weight(group.virtual_time, new);
        if leaf.backlogged {
            group.set_backlog(self.virtual_time, group.backlog - old + new);
        }
        Ok(())
    }

    /// Removes a leaf.
    pub fn remove_leaf(&mut self, leaf: LeafId) {
        self.set_backlogged(leaf, false);
        self.leaves.remove(leaf.0);
    }

    /// Says whether the leaf has something to move and could move it (its source is readable and
    /// its sink writable).
    pub fn set_backlogged(&mut self, leaf: LeafId, backlogged: bool) {
        let Some(leaf) = self.leaves.get_mut(leaf.0) else {
            return;
        };
        let Some(group) = self.groups.get_mut(leaf.group) else {
            return;
        };
        if leaf.backlogged == backlogged {
            return;
        }
        leaf.backlogged = backlogged;
        let weight = leaf.flow.weight();
        if backlogged {
            leaf.flow.catch_up(group.virtual_time);
            group.set_backlog(self.virtual_time, group.backlog + weight);
        } else {
            group.set_backlog(self.virtual_time, group.backlog - weight);
        }
    }

    /// Whose turn it is at `now`, or when to ask again.
    ///
    /// Takes time in proportion to the number of leaves and groups, and allocates nothing.
    pub fn poll(&mut self, now: Instant) -> Poll {
        match self.grant(now) {
            Some((leaf, bytes)) => Poll::Grant { leaf, bytes },
            None => self.deadline(now).map_or(Poll::Idle, Poll::Wait),
        }
    }

    /// Takes what a leaf has moved from its limit, its group's and the link's. It may be less than
    /// the grant; more, or bytes without a grant, make a debt that is waited out.
    ///
    /// A grant of which nothing was moved counts as 4 KiB in the queue (not in the buckets), so
    /// that the next poll goes on to others.
    pub fn charge(&mut self, now: Instant, leaf: LeafId, bytes_moved: Bytes) {
        let Some(leaf) = self.leaves.get_mut(leaf.0) else {
            return;
        };
        let Some(group) = self.groups.get_mut(leaf.group) else {
            return;
        };
        let mut turn = bytes_moved;
        if let Some(granted) = leaf.granted.take() {
            leaf.flow.refund(granted);
            group.flow.refund(granted);
            if bytes_moved.0 == 0 {
                turn = MIN_QUANTUM;
            }
        }
        leaf.flow.spend(turn);
        group.flow.spend(turn);
        leaf.limit.take(now, bytes_moved);
        group.limit.take(now, bytes_moved);
        self.link.take(now, bytes_moved);
    }

    /// Whether the invariants hold; for tests. Takes time in proportion to groups times leaves.
    #[must_use]
    pub fn is_valid(&self) -> bool {
        self.link.is_valid()
            && self
                .leaves
                .iter()
                .all(|(_, leaf)| leaf.limit.is_valid() && self.groups.get(leaf.group).is_some())
            && self.groups.iter().all(|(key, group)| {
                let leaves = self.leaves.iter().map(|(_, leaf)| leaf);
                let backlogged = leaves.filter(|leaf| leaf.group == key && leaf.backlogged);
                let backlog: Weight = backlogged.map(|leaf| leaf.flow.weight()).sum();
                group.limit.is_valid()
                    && group.backlog == backlog
                    && (backlog == 0 || group.flow.weight() == backlog)
            })
    }

    fn grant(&mut self, now: Instant) -> Option<(LeafId, Bytes)> {
        self.nominate_leaves(now);
        let mut best: Option<(VirtualTime, &mut Group, VirtualTime, Key)> = None;
        for (_, group) in self
            .groups
            .iter_mut()
            .filter(|(_, group)| group.backlog > 0)
        {
            let tag = group.flow.tag();
            match group.candidate.filter(|_| group.limit.allows(now)) {
                Some((leaf_tag, key)) => {
                    if best.as_ref().is_none_or(|(least, ..)| tag < *least) {
                        best = Some((tag, group, leaf_tag, key));
                    }
                }
                None => group.flow.catch_up(self.virtual_time),
            }
        }
        let (tag, group, leaf_tag, key) = best.filter(|_| self.link.allows(now))?;
        let leaf = self.leaves.get_mut(key)?;
        let held = leaf.limit.held(now).min(group.limit.held(now));
        let bytes = held.min(self.link.held(now));
        self.virtual_time = self.virtual_time.max(tag);
        group.virtual_time = group.virtual_time.max(leaf_tag);
        group.flow.spend(bytes);
        leaf.flow.spend(bytes);
        leaf.granted = Some(bytes);
        Some((LeafId(key), bytes))
    }

    /// Finds in each group the next of the backlogged leaves that their own limit allows.
    fn nominate_leaves(&mut self, now: Instant) {
        for (_, group) in self.groups.iter_mut() {
            group.candidate = None;
        }
        for (key, leaf) in self.leaves.iter_mut().filter(|(_, leaf)| leaf.backlogged) {
            let Some(group) = self.groups.get_mut(leaf.group) else {
                continue;
            };
            let tag = leaf.flow.tag();
            if !leaf.limit.allows(now) {
                leaf.flow.catch_up(group.virtual_time);
            } else if group.candidate.is_none_or(|(least, _)| tag < least) {
                group.candidate = Some((tag, key));
            }
        }
    }

    /// When a backlogged leaf first has a whole quantum in every bucket above it.
    fn deadline(&self, now: Instant) -> Option<Instant> {
        let link = self.link.ready_at(now)?;
        let backlogged = self.leaves.iter().filter(|(_, leaf)| leaf.backlogged);
        let ready = backlogged.filter_map(|(_, leaf)| {
            let group = self.groups.get(leaf.group)?.limit.ready_at(now)?;
            Some(leaf.limit.ready_at(now)?.max(group).max(link))
        });
        ready.min()
    }
}

impl Group {
    fn set_backlog(&mut self, link_virtual_time: VirtualTime, backlog: Weight) {
        let was_idle = self.backlog == 0;
        self.backlog = backlog;
        if backlog > 0 {
            // An idle group keeps its last weight: that is the scale of its tag.
            self.flow.set_weight(link_virtual_time, backlog);
            if was_idle {
                self.flow.catch_up(link_virtual_time);
            }
        }
    }
}
