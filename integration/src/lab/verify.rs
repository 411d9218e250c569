//! Watching a move from outside: what its guests saw, and whether every byte of RAM arrived.

use std::time::Duration;

use anyhow::Context;
use serde::Serialize;
use sidecar::config::ImageFormat;

use super::{Lab, LabError};
use crate::clock::Micros;
use crate::guest::{GuestState, Params, check, disk};
use crate::memory::{self, GuestRam};
use crate::qemu::raw_copy;
use crate::ticks::Record;

const LIMIT: Duration = Duration::from_secs(10);

/// What was found out about one guest's move.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Seen {
    /// How long it stood still, by its own ticks, in seconds.
    pub guest_downtime_s: Option<f64>,
    /// Whether every page of its RAM holds what it must after the move.
    pub memory_verified: bool,
    /// It was never seen to run on both sides, nor to lose or repeat a tick.
    pub continuous: bool,
    /// What is wrong.
    pub problem: Option<String>,
}

/// Stops a guest for a moment and checks all of its RAM, and its disk, against its own account of what
/// it wrote:
/// the order of its writes is fixed, so its counter says what every page must hold, and a page that
/// a migration lost shows an older one.
///
/// # Errors
/// A page does not hold what it must, or cannot be read.
pub fn verify_stopped(lab: &Lab, guest: &str, host: &str) -> anyhow::Result<()> {
    let spec = lab.guest(guest)?;
    let mut monitor = lab.monitor(guest, host)?;
    let ram = GuestRam::open(&mut monitor, spec.memory)?;
    monitor.execute("stop", serde_json::json!({}), LIMIT)?;
    let params = spec.params()?;
    let checked = check::check(&ram, &params).map_err(anyhow::Error::from);
    let checked = checked.and_then(|state| check_disk(lab, guest, host, &params, &state));
    monitor.execute("cont", serde_json::json!({}), LIMIT)?;
    checked
}

/// Compares the RAM of a guest that is paused on both sides, page by page, and its disk, and both with
/// the guest's own account of what it wrote.
///
/// # Errors
/// They differ, or one cannot be read.
pub fn verify_paused(lab: &Lab, guest: &str, from: &str, to: &str) -> anyhow::Result<()> {
    let spec = lab.guest(guest)?;
    let source = GuestRam::open(&mut lab.monitor(guest, from)?, spec.memory)?;
    let destination = GuestRam::open(&mut lab.monitor(guest, to)?, spec.memory)?;
    if source.hash()? != destination.hash()? {
        memory::compare_paused(&source, &destination)?;
        anyhow::bail!("the hashes of {guest}'s RAM differ");
    }
    let params = spec.params()?;
    let state = check::check(&destination, &params)?;
    for host in [from, to] {
        check_disk(lab, guest, host, &params, &state)?;
    }
    if spec
        .disk
        .is_some_and(|disk| disk.format == ImageFormat::Raw)
    {
        let (there, here) = (lab.launch(guest, from)?, lab.launch(guest, to)?);
        disk::compare(&there.image, &here.image, &params)?;
    }
    let launch = lab.launch(guest, to)?;
    for disk in &spec.idle {
        let checked = launch.check_idle(disk);
        checked.with_context(|| format!("disk {} of {guest}", disk.node))?;
    }
    Ok(())
}

/// Checks the disk of a guest that stands still.
fn check_disk(
    lab: &Lab,
    guest: &str,
    host: &str,
    params: &Params,
    state: &GuestState,
) -> anyhow::Result<()> {
    let launch = lab.launch(guest, host)?;
    let Some(spec) = lab.guest(guest)?.disk else {
        return Ok(());
    };
    match spec.format {
        ImageFormat::Raw => disk::check(&launch.image, params, spec.filled, state)?,
        ImageFormat::Qcow2 => {
            let raw = raw_copy(&launch.image)?;
            let checked = disk::check(&raw, params, spec.filled, state);
            std::fs::remove_file(raw)?;
            checked?;
        }
    }
    Ok(())
}

/// What the ticks of a guest say of a move that began at `since`.
pub fn read_ticks(lab: &Lab, guest: &str, since: Micros, seen: &mut Seen) {
    let record: Record = lab.ticks.record_since(guest, since);
    let switchovers = record.switchovers();
    seen.guest_downtime_s = switchovers.last().map(|one| one.downtime.as_secs_f64());
    let overlaps = record.overlaps();
    let breaks = record.breaks();
    seen.continuous = overlaps.is_empty() && breaks.is_empty();
    if let Some(overlap) = overlaps.first() {
        seen.problem = Some(format!(
            "{guest} ran on {} and {}",
            overlap.host, overlap.other
        ));
    } else if let Some(at) = breaks.first() {
        let text = format!("{guest} went from tick {} to {}", at.expected, at.found);
        seen.problem = Some(text);
    }
}

/// Waits until every guest ticks on `host`.
///
/// # Errors
/// One does not.
pub fn wait_for_all(lab: &Lab, host: &str, limit: Duration) -> Result<(), LabError> {
    for guest in &lab.spec.guests {
        lab.ticks.wait_for_tick(&guest.name, host, limit)?;
    }
    Ok(())
}
