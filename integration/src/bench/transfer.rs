//! One migration of an idle guest at full speed, by QEMU itself or carried by the sidecars, with
//! what it cost.
//!
//! The guest stays where it is: after each migration has completed, the destination is killed and
//! the source continued. So all kinds copy the same memory from the same process.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::json;
use sidecar::protocol::types::Transport;

use super::control::Driver;
use super::cpu::CpuTime;
use super::{Bench, stats};
use crate::clock::Micros;
use crate::lab::{Lab, LabSpec};
use crate::qemu::Role;
use crate::qmp::Qmp;

const GUEST: &str = "idle:1536MiB:0B/s:4KiB";
const QUICK_GUEST: &str = "idle:256MiB:0B/s:4KiB";
const LIMIT: Duration = Duration::from_secs(10);
const MIGRATION_LIMIT: Duration = Duration::from_secs(60);
const FIRST_PORT: usize = 4700;
const GIB: f64 = 1_073_741_824.0;

/// One migration.
#[derive(Debug)]
pub struct Run {
    /// What crossed.
    pub gib: f64,
    /// From `setup` to `completed`.
    pub seconds: f64,
    /// QEMU at the source and at the destination.
    pub qemus: [CpuTime; 2],
    /// The sidecars at the source and at the destination; zero without them.
    pub sidecars: [CpuTime; 2],
}

impl Run {
    /// Throughput.
    #[must_use]
    pub fn gib_per_s(&self) -> f64 {
        self.gib / self.seconds
    }

    /// CPU time for each GiB.
    #[must_use]
    pub fn per_gib(&self, time: CpuTime) -> f64 {
        time.total_s() / self.gib
    }

    /// CPU time of QEMUs and sidecars for each GiB.
    #[must_use]
    pub fn all_per_gib(&self) -> f64 {
        let all = self.qemus.iter().chain(&self.sidecars);
        all.map(|time| self.per_gib(*time)).sum()
    }

    /// How much of `cores` it kept busy, in percent.
    #[must_use]
    pub fn busy_percent(&self, cores: f64) -> f64 {
        self.all_per_gib() * self.gib / (cores * self.seconds) * 100.0
    }
}

/// A migration over QEMU's own TCP, and the same carried by the sidecars.
pub type Pair = (Run, Run);

/// Alternating pairs, after one that meets cold memory and does not count; with the guest's name.
///
/// # Errors
/// A migration fails.
pub fn pairs(
    bench: &Bench<'_>,
    name: &str,
    transport: Transport,
    pairs: usize,
) -> Result<(Vec<Pair>, &'static str)> {
    let (pairs, guest) = if bench.quick {
        (1, QUICK_GUEST)
    } else {
        (pairs, GUEST)
    };
    let mut spec: LabSpec = bench.spec(&[guest], "10Gbit/s")?;
    for guest in &mut spec.guests {
        guest.tick_hz = 100;
    }
    spec.resident = vec!["b".to_owned()];
    let mut lab = bench.lab(spec)?;
    lab.network.link("a", "b")?.unshape()?;
    let sidecars = [lab.sidecar("a")?.pid(), lab.sidecar("b")?.pid()];
    let moved = &lab.spec.guests[0].name;
    let mut done = Vec::new();
    for index in 0..=pairs {
        bench.interrupt.check()?;
        let (plain, carried) = if index % 2 == 0 {
            let plain = plain(&lab, moved, FIRST_PORT + index)?;
            (plain, carried(&lab, transport, sidecars)?)
        } else {
            let carried = carried(&lab, transport, sidecars)?;
            (plain(&lab, moved, FIRST_PORT + index)?, carried)
        };
        bench.say(&format!(
            "{name} {index}/{pairs}: QEMU alone {:.2} GiB/s, {transport} {:.2} GiB/s, ratio {:.2}, sidecars {:.3} and {:.3} CPU-s/GiB{}",
            plain.gib_per_s(),
            carried.gib_per_s(),
            carried.gib_per_s() / plain.gib_per_s(),
            carried.per_gib(carried.sidecars[0]),
            carried.per_gib(carried.sidecars[1]),
            if index == 0 { " (not counted)" } else { "" }
        ));
        if index > 0 {
            done.push((plain, carried));
        }
    }
    Ok((done, guest))
}

/// How it was set up, in words.
#[must_use]
pub fn setup(guest: &str, pairs: usize) -> String {
    format!(
        "One guest, {guest}, every page non-zero; two hosts joined by an unshaped veth; no rate \
         limit; {pairs} alternating pairs after one that does not count. The destinations' memory is \
         one file that stays allocated, so that no run pays page faults that another does not. Time: \
         from `setup` to `completed`, by QEMU's events."
    )
}

/// One number of every pair.
pub fn each(done: &[Pair], value: &dyn Fn(&Run, &Run) -> f64) -> Vec<f64> {
    done.iter()
        .map(|(plain, carried)| value(plain, carried))
        .collect()
}

/// Where the processors' time goes: that is what limits a transport where they are busy.
#[must_use]
pub fn busy(done: &[Pair]) -> String {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let count = f64::from(u32::try_from(cores).unwrap_or(u32::MAX));
    let of = |value: &dyn Fn(&Run, &Run) -> f64| stats::median(&each(done, value));
    format!(
        "Of {cores} cores, QEMU alone keeps {:.0} % busy, QEMU and the sidecars together {:.0} %.",
        of(&|plain, _| plain.busy_percent(count)),
        of(&|_, carried| carried.busy_percent(count)),
    )
}

/// QEMU to QEMU over TCP, from host a to b.
///
/// # Errors
/// The migration fails.
pub fn plain(lab: &Lab, guest: &str, port: usize) -> Result<Run> {
    let log = lab.directory().join("plain.log");
    let isolation = lab.network.host("b")?.isolation(Some(log));
    let launch = lab.launch(guest, "b")?;
    let mut destination = launch.start(
        Role::Incoming,
        &lab.directory().join("plain.qmp"),
        &isolation,
    )?;
    let mut source = lab.monitor(guest, "a")?;
    let uri = format!("tcp:{}:{port}", lab.network.host("b")?.address());
    for monitor in [&mut source, &mut destination.monitor] {
        let on = ["return-path", "events", "late-block-activate"];
        let on = on.map(|name| json!({"capability": name, "state": true}));
        let arguments = json!({"capabilities": on});
        monitor.execute("migrate-set-capabilities", arguments, LIMIT)?;
    }
    let parameters = json!({"max-bandwidth": 1_u64 << 40, "downtime-limit": 300});
    source.execute("migrate-set-parameters", parameters, LIMIT)?;
    let uri = json!({"uri": uri});
    destination
        .monitor
        .execute("migrate-incoming", uri.clone(), LIMIT)?;
    let qemus = [source.peer_pid()?, destination.process.pid()];
    let before = cpu(&qemus)?;
    source.execute("migrate", uri, LIMIT)?;
    let seconds = time_of_migration(&mut source)?;
    let after = cpu(&qemus)?;
    let gib = transferred_gib(&mut source)?;
    drop(destination);
    source.execute("cont", json!({}), LIMIT)?;
    Ok(Run {
        gib,
        seconds,
        qemus: [after[0].since(before[0]), after[1].since(before[1])],
        sidecars: [CpuTime::default(); 2],
    })
}

/// The same by both sidecars, with no limit set.
fn carried(lab: &Lab, transport: Transport, sidecars: [u32; 2]) -> Result<Run> {
    let guest = &lab.spec.guests[0].name;
    let mut driver = Driver::connect(lab, guest, "a", "b")?;
    let stream = driver.prepare(false, transport)?;
    let mut source = lab.monitor(guest, "a")?;
    let destination = lab.monitor(guest, "b")?.peer_pid()?;
    let pids = [source.peer_pid()?, destination, sidecars[0], sidecars[1]];
    let before = cpu(&pids)?;
    driver.start(stream)?;
    let seconds = time_of_migration(&mut source)?;
    let after = cpu(&pids)?;
    let gib = transferred_gib(&mut source)?;
    driver.arrived(LIMIT)?;
    driver.roll_back()?;
    let used = |index: usize| after[index].since(before[index]);
    Ok(Run {
        gib,
        seconds,
        qemus: [used(0), used(1)],
        sidecars: [used(2), used(3)],
    })
}

fn cpu(pids: &[u32]) -> Result<Vec<CpuTime>> {
    let all = pids.iter().map(|pid| CpuTime::of_process(*pid));
    all.collect::<Result<_, _>>().context("a process is gone")
}

/// From the source's `setup` to its `completed`, by its own stamps: with a return path it says so
/// when the destination has loaded everything.
fn time_of_migration(source: &mut Qmp) -> Result<f64> {
    let by = Instant::now() + MIGRATION_LIMIT;
    let mut begun: Option<Micros> = None;
    loop {
        let left = by.saturating_duration_since(Instant::now());
        let event = source.wait_event("MIGRATION", left)?;
        match (event.data["status"].as_str().unwrap_or_default(), begun) {
            ("setup", _) => begun = Some(event.at),
            ("completed", Some(begun)) => return Ok(event.at.since(begun).as_secs_f64()),
            ("failed" | "cancelled", _) => bail!("the migration {}", event.data["status"]),
            _ => {}
        }
    }
}

fn transferred_gib(source: &mut Qmp) -> Result<f64> {
    let migration = source.execute("query-migrate", json!({}), LIMIT)?;
    let bytes = migration["ram"]["transferred"].as_f64();
    Ok(bytes.context("query-migrate tells no ram.transferred")? / GIB)
}
