//! Measuring what VMs dirty.
//!
//! QEMU itself leaves out what its dirty log says first, when KVM may report every page
//! (`calculate_dirtyrate_dirty_bitmap`, and the export's first look). What a guest does first is
//! another matter: one that boots may write to all of its memory once and never again. Taken into
//! a mean over seconds that is ten times the rate, and it makes the working set the whole memory.
//! So a measurement that begins with such a burst is thrown away, and another one is taken; what
//! that finds counts.

use std::sync::atomic::{AtomicU8, Ordering};
use std::time::Duration;

use rate_limiter::{Bytes, BytesPerSecond};
use sidecar::protocol::dirty::{DirtyDisk, DirtyEvent, DirtyRound, DirtySource};

use super::{Wanted, seconds};
use crate::application::{Application, ControlAddress, VmId, VmProfile};
use crate::dirty::{self, Wish};

/// Length of an interval.
pub const INTERVAL: Duration = Duration::from_secs(1);
/// So many are measured.
pub const INTERVALS: u32 = 5;
/// VMs that are measured at the same time.
const AT_ONCE: usize = 16;
/// A burst is above the rest by this factor …
const BURST_FACTOR: u64 = 4;
/// … and by this rate, in bytes per second: several steps of what stock QEMU tells.
const BURST_BYTES_PER_S: u64 = 4 << 20;

/// What one measurement found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Load {
    memory_bytes: u64,
    source: Option<DirtySource>,
    rounds: Vec<DirtyRound>,
    /// The one before began with a burst of this rate.
    after_burst: Option<u64>,
    /// How long its memory takes to be sent once, where that is known.
    bulk: Option<Duration>,
    /// Block nodes that move with it.
    disks: Vec<String>,
}

/// Measures the VMs that are wanted.
pub(super) fn measure(
    app: &Application,
    wanted: &Wanted,
    interrupt: &AtomicU8,
) -> Vec<(VmId, Result<Load, String>)> {
    let usable = app.allowance.usable();
    let mut found = Vec::new();
    for ids in wanted.vms.chunks(AT_ONCE) {
        std::thread::scope(|scope| {
            let begin = |&id: &VmId| {
                let vm = app.vm(id);
                let sidecar = app.host(vm.from).control.clone();
                let wish = wish(&vm.name, &vm.profile, usable);
                let memory = vm.profile.memory;
                let disks: Vec<String> = vm.disks.iter().map(|disk| disk.node.clone()).collect();
                let measure = move || {
                    let mut load = twice(&sidecar, &wish, interrupt)?;
                    let memory = memory.unwrap_or(Bytes(load.memory_bytes));
                    load.disks = disks;
                    load.bulk = usable.map(|rate| rate.time_for(memory));
                    Ok(load)
                };
                (id, scope.spawn(measure))
            };
            let threads: Vec<_> = ids.iter().map(begin).collect();
            for (id, thread) in threads {
                let result = thread.join();
                found.push((id, result.unwrap_or_else(|_| Err("it failed".into()))));
            }
        });
    }
    found
}

fn wish(vm: &str, profile: &VmProfile, bandwidth: Option<BytesPerSecond>) -> Wish {
    let duration = INTERVAL * INTERVALS;
    let bulk = bandwidth.zip(profile.memory);
    let bulk = bulk.map_or(duration, |(rate, memory)| rate.time_for(memory));
    Wish {
        vm: vm.to_owned(),
        interval: INTERVAL,
        duration,
        // Nothing is foreseen further than it was measured.
        delays: vec![bulk.clamp(INTERVAL, duration)],
    }
}

/// Once; or twice, where the first one began with a burst.
fn twice(sidecar: &ControlAddress, wish: &Wish, interrupt: &AtomicU8) -> Result<Load, String> {
    let first = once(sidecar, wish, interrupt)?;
    let Some(burst) = first.burst() else {
        return Ok(first);
    };
    let mut load = once(sidecar, wish, interrupt)?;
    load.after_burst = Some(burst);
    Ok(load)
}

fn once(sidecar: &ControlAddress, wish: &Wish, interrupt: &AtomicU8) -> Result<Load, String> {
    let mut load = Load::default();
    let sidecars = [sidecar.clone()];
    dirty::measure(&sidecars, wish, interrupt, &mut |event, _| match event {
        DirtyEvent::DirtyStarted {
            memory_bytes,
            source,
            ..
        } => {
            load.memory_bytes = *memory_bytes;
            load.source = Some(*source);
        }
        DirtyEvent::DirtyRound(round) => load.rounds.push(round.clone()),
        DirtyEvent::DirtyEnded { .. } => {}
    })
    .map_err(|error| error.to_string())?;
    if interrupt.load(Ordering::Relaxed) > 0 || load.rounds.is_empty() {
        return Err(format!("the measurement of VM `{}` was cut short", wish.vm));
    }
    Ok(load)
}

impl Load {
    /// The rate of the burst that it began with, if it did.
    fn burst(&self) -> Option<u64> {
        let rate = |round: &DirtyRound| round.dirty_rate_bytes_per_s;
        (1..self.rounds.len()).find_map(|end| {
            let (before, after) = self.rounds.split_at(end);
            let least = before.iter().map(rate).min()?;
            let most = after.iter().map(rate).max()?;
            let bound = most.saturating_mul(BURST_FACTOR);
            // What one interval says of the rest is not much.
            let lasts = after.len() > self.rounds.len() / 2;
            let is_burst = least > bound.saturating_add(BURST_BYTES_PER_S);
            (lasts && is_burst).then(|| before.iter().map(rate).max())?
        })
    }

    /// Fills in what the profile lacks; says what that was.
    pub(super) fn fill(&self, vm: &str, known: &mut VmProfile, dirty_set: bool) -> String {
        let given = *known;
        let Some(last) = self.rounds.last() else {
            return format!("VM {vm}: nothing was measured");
        };
        let memory = known.memory.get_or_insert(Bytes(self.memory_bytes));
        let within = |bytes: u64| Bytes(bytes.min(memory.0));
        // Rates and dirty set are of memory and disks (COMMA 2.2).
        let of_disks = |value: fn(&DirtyDisk) -> u64| {
            let moving = last
                .disks
                .iter()
                .filter(|disk| self.disks.contains(&disk.node));
            moving.map(value).fold(0, u64::saturating_add)
        };
        let rate = |memory: u64, disks: u64| BytesPerSecond(memory.saturating_add(disks));
        let mean = known.dirty_rate.get_or_insert(rate(
            last.mean_dirty_rate_bytes_per_s,
            of_disks(|disk| disk.mean_dirty_rate_bytes_per_s),
        ));
        let most = known.max_dirty_rate.get_or_insert(rate(
            last.max_dirty_rate_bytes_per_s,
            of_disks(|disk| disk.max_dirty_rate_bytes_per_s),
        ));
        // What the file says stands: the other one follows it.
        if given.dirty_rate.is_some() {
            *most = *most.max(mean);
        } else {
            *mean = *mean.min(most);
        }
        let set = last
            .working_set_bytes
            .filter(|_| last.working_set_stable == Some(true));
        if known.writable_working_set.is_none() {
            known.writable_working_set = set.map(within);
        }
        if dirty_set && known.dirty_set.is_none() {
            let foreseen = last.predicted.first().and_then(|found| {
                let reaches = self.bulk? <= Duration::from_millis(found.delay_ms);
                found.dirty_bytes.filter(|_| reaches)
            });
            let disks = of_disks(|disk| disk.dirty_set_bytes);
            let both = |memory: Bytes| Bytes(memory.0.saturating_add(disks));
            known.dirty_set = foreseen.or(set).map(within).map(both);
        }
        self.describe(vm, &given, known)
    }

    fn describe(&self, vm: &str, given: &VmProfile, known: &VmProfile) -> String {
        let mut measured = Vec::new();
        let mut said = Vec::new();
        let mut list = |name: &str, was: bool, now: Option<String>| match (was, now) {
            (true, _) => said.push(name.to_owned()),
            (false, Some(value)) => measured.push(format!("{name} {value}")),
            (false, None) => {}
        };
        let text = |value: Option<Bytes>| value.map(|value| value.to_string());
        list("memory", given.memory.is_some(), text(known.memory));
        let rate = |value: Option<BytesPerSecond>| value.map(|value| value.to_string());
        list(
            "dirty-rate",
            given.dirty_rate.is_some(),
            rate(known.dirty_rate),
        );
        list(
            "max-dirty-rate",
            given.max_dirty_rate.is_some(),
            rate(known.max_dirty_rate),
        );
        let set = known.writable_working_set;
        list(
            "writable-working-set",
            given.writable_working_set.is_some(),
            text(set),
        );
        list(
            "dirty-set",
            given.dirty_set.is_some(),
            text(known.dirty_set),
        );
        let time: Duration = self
            .rounds
            .iter()
            .map(|round| Duration::from_micros(round.duration_us))
            .sum();
        let mut note = format!(
            "VM {vm}: measured in {}: {}",
            seconds(time),
            measured.join(", ")
        );
        if !said.is_empty() {
            note += &format!("; from the file: {}", said.join(", "));
        }
        if set.is_none() {
            note += match self.source {
                Some(DirtySource::CalcDirtyRate) => {
                    "; its QEMU tells no working set, and the rate in steps of 1 MiB/s"
                }
                _ => "; its working set still grew",
            };
        }
        if let Some(burst) = self.after_burst {
            note += &format!(
                "; measured again after a burst of {} at the beginning, as when a guest boots",
                BytesPerSecond(burst)
            );
        }
        note
    }
}

#[cfg(test)]
mod tests {
    use sidecar::protocol::dirty::Predicted;

    use super::*;

    const MB: u64 = 1_000_000;

    fn load(rates: &[u64], set: Option<(u64, bool)>) -> Load {
        let mut all = Vec::new();
        let mut rounds = Vec::new();
        for &rate in rates {
            all.push(rate);
            rounds.push(DirtyRound {
                vm: "db".into(),
                source: DirtySource::Export,
                round: all.len() as u64,
                duration_us: MB,
                missed: 0,
                dirtied_bytes: rate,
                dirty_rate_bytes_per_s: rate,
                mean_dirty_rate_bytes_per_s: all.iter().sum::<u64>() / all.len() as u64,
                max_dirty_rate_bytes_per_s: all.iter().copied().max().unwrap_or(0),
                working_set_bytes: set.map(|(bytes, _)| bytes),
                working_set_stable: set.map(|(_, stable)| stable),
                predicted: vec![Predicted {
                    delay_ms: 5000,
                    dirty_bytes: Some(7 * MB),
                }],
                heat: None,
                disks: Vec::new(),
            });
        }
        Load {
            memory_bytes: 100 * MB,
            source: Some(DirtySource::Export),
            rounds,
            after_burst: None,
            bulk: Some(Duration::from_secs(5)),
            disks: Vec::new(),
        }
    }

    #[test]
    fn disks_that_move_count() {
        let mut load = load(&[10 * MB, 20 * MB], Some((40 * MB, true)));
        let disk = |node: &str| DirtyDisk {
            node: node.into(),
            dirty_rate_bytes_per_s: MB,
            mean_dirty_rate_bytes_per_s: 2 * MB,
            max_dirty_rate_bytes_per_s: 3 * MB,
            dirty_set_bytes: 4 * MB,
        };
        if let Some(last) = load.rounds.last_mut() {
            last.disks = vec![disk("disk0"), disk("shared")];
        }
        load.disks = vec!["disk0".into()];
        let mut profile = VmProfile::default();
        load.fill("db", &mut profile, true);
        assert_eq!(profile.dirty_rate, Some(BytesPerSecond(17 * MB)));
        assert_eq!(profile.max_dirty_rate, Some(BytesPerSecond(23 * MB)));
        assert_eq!(profile.dirty_set, Some(Bytes(11 * MB)));
        assert_eq!(profile.writable_working_set, Some(Bytes(40 * MB)));
    }

    #[test]
    fn a_burst_at_the_beginning_is_told_from_a_load() {
        let burst = |rates: &[u64]| load(rates, None).burst();
        // A guest of 256 MiB that boots.
        assert_eq!(burst(&[268 * MB, 24_576, 24_576, 24_576]), Some(268 * MB));
        assert_eq!(burst(&[116 * MB, 118 * MB, 0, 0, 0]), Some(118 * MB));
        // One that writes all the time, more and less; a quiet one; one that begins to write.
        assert_eq!(burst(&[30 * MB, 28 * MB, 31 * MB, 9 * MB, 30 * MB]), None);
        assert_eq!(burst(&[MB, 0, 0, 0, 0]), None);
        assert_eq!(burst(&[0, 0, 50 * MB, 50 * MB, 50 * MB]), None);
        // On and off: what follows is too short to say that it is over.
        assert_eq!(burst(&[50 * MB, 50 * MB, 50 * MB, 0, 0]), None);
        assert_eq!(burst(&[50 * MB]), None);
        assert_eq!(
            burst(&[u64::MAX / 8, u64::MAX / 8, 1, 1, 1]),
            Some(u64::MAX / 8)
        );
    }

    #[test]
    fn what_the_file_says_stands() {
        let load = load(&[10 * MB, 20 * MB, 30 * MB], Some((40 * MB, true)));
        let mut empty = VmProfile::default();
        let note = load.fill("db", &mut empty, true);
        assert_eq!(empty.memory, Some(Bytes(100 * MB)));
        assert_eq!(empty.dirty_rate, Some(BytesPerSecond(20 * MB)));
        assert_eq!(empty.max_dirty_rate, Some(BytesPerSecond(30 * MB)));
        assert_eq!(empty.writable_working_set, Some(Bytes(40 * MB)));
        assert_eq!(empty.dirty_set, Some(Bytes(7 * MB)));
        assert!(!note.contains("from the file"), "{note}");

        let mut some = VmProfile {
            memory: Some(Bytes(30 * MB)),
            max_dirty_rate: Some(BytesPerSecond(15 * MB)),
            ..VmProfile::default()
        };
        let note = load.fill("db", &mut some, false);
        assert_eq!(some.dirty_rate, Some(BytesPerSecond(15 * MB)));
        assert_eq!(some.max_dirty_rate, Some(BytesPerSecond(15 * MB)));
        assert_eq!(some.writable_working_set, Some(Bytes(30 * MB)));
        assert_eq!(some.dirty_set, None);
        assert!(
            note.contains("from the file: memory, max-dirty-rate"),
            "{note}"
        );

        let mut mean = VmProfile {
            dirty_rate: Some(BytesPerSecond(50 * MB)),
            ..VmProfile::default()
        };
        load.fill("db", &mut mean, false);
        assert_eq!(mean.max_dirty_rate, Some(BytesPerSecond(50 * MB)));
    }

    #[test]
    fn a_set_that_still_grows_is_not_taken() {
        let mut profile = VmProfile::default();
        let mut grows = load(&[MB, MB], Some((2 * MB, false)));
        let note = grows.fill("db", &mut profile, true);
        assert_eq!(profile.writable_working_set, None);
        assert_eq!(profile.dirty_set, Some(Bytes(7 * MB)));
        assert!(note.contains("still grew"), "{note}");
        // The bulk copy takes longer than was measured.
        grows.bulk = Some(Duration::from_secs(6));
        let mut profile = VmProfile::default();
        grows.fill("db", &mut profile, true);
        assert_eq!(profile.dirty_set, None);
    }
}
