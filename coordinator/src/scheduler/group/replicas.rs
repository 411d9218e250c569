//! Groups that keep every tier served on both sites while an application is split.
//!
//! Where every tier has at least two VMs, the first and the last group each hold at least one VM of
//! every tier and the rest go between. From the end of the first group to the start of the last,
//! both sites then hold every tier: whoever asks finds an answer without crossing the link. A tier
//! with one VM cannot do this; such an application moves as one group, or not at all.

/// The tier of each VM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tiers {
    of_vm: Vec<usize>,
    count: usize,
}

/// Why tiers cannot be kept on both sites.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TiersError {
    /// A VM names no tier.
    #[error("VM {vm} names no tier; give it `tier`, or do without replica groups")]
    None {
        /// The VM's index.
        vm: usize,
    },
    /// There is only one VM of a tier.
    #[error(
        "tier `{tier}` has one VM, so it cannot be on both sites; move the VMs as one group \
         (policy muster holds them until they switch over together), or do without replica groups"
    )]
    Single {
        /// The tier.
        tier: String,
    },
}

impl Tiers {
    /// The tiers that the VMs name.
    ///
    /// # Errors
    /// A VM names none, or a tier has one VM.
    pub fn new<'n>(names: impl IntoIterator<Item = Option<&'n str>>) -> Result<Self, TiersError> {
        let mut known: Vec<(&str, usize)> = Vec::new();
        let mut of_vm = Vec::new();
        for (vm, name) in names.into_iter().enumerate() {
            let name = name.ok_or(TiersError::None { vm })?;
            let tier = known.iter().position(|(known, _)| *known == name);
            let tier = tier.unwrap_or_else(|| {
                known.push((name, 0));
                known.len() - 1
            });
            known[tier].1 += 1;
            of_vm.push(tier);
        }
        match known.iter().find(|(_, vms)| *vms < 2) {
            Some((name, _)) => Err(TiersError::Single {
                tier: (*name).to_owned(),
            }),
            None => Ok(Self {
                of_vm,
                count: known.len(),
            }),
        }
    }

    /// Whether two VMs are of one tier.
    #[must_use]
    pub fn same(&self, a: usize, b: usize) -> bool {
        self.of_vm[a] == self.of_vm[b]
    }

    /// Whether these VMs are of every tier.
    pub fn cover(&self, vms: impl IntoIterator<Item = usize>) -> bool {
        let mut seen = vec![false; self.count];
        let mut missing = self.count;
        for vm in vms {
            let seen = &mut seen[self.of_vm[vm]];
            missing -= usize::from(!*seen);
            *seen = true;
        }
        missing == 0
    }

    /// Whether both sites hold every tier from the end of the first group to the start of the last.
    #[must_use]
    pub fn kept(&self, groups: &[Vec<usize>]) -> bool {
        let covers = |group: Option<&Vec<usize>>| {
            group.is_some_and(|group| self.cover(group.iter().copied()))
        };
        covers(groups.first()) && covers(groups.last())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tier_with_one_vm_is_refused() {
        let error = Tiers::new([Some("web"), Some("db"), Some("web")]).expect_err("one db");
        assert!(error.to_string().contains("`db` has one VM"), "{error}");
        let error = Tiers::new([Some("web"), None]).expect_err("none");
        assert_eq!(error, TiersError::None { vm: 1 });
    }

    #[test]
    fn first_and_last_group_hold_every_tier() {
        let tiers = Tiers::new(["web", "db", "db", "web", "web"].map(Some)).expect("two of each");
        assert!(tiers.cover([4, 1]) && !tiers.cover([0, 3]));
        assert!(tiers.kept(&[vec![0, 1], vec![4], vec![3, 2]]));
        assert!(!tiers.kept(&[vec![0, 1], vec![3, 2], vec![4]]));
        assert!(tiers.kept(&[vec![0, 1, 2, 3, 4]]));
    }
}
