//! Groups whose VMs have local disks.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use coordinator::application::Policy;
use coordinator::engine::Step;
use coordinator::observer::{GroupName, Observer};
use coordinator::report::Outcome;
use nix::sys::signal::Signal;
use rate_limiter::{Bytes, BytesPerSecond};
use serde_json::json;
use sidecar::config::ImageFormat;
use sidecar::protocol::types::Chain;
use testbed::clock::Micros;
use testbed::guest::{DiskSpec, GuestState, IdleDisk, IdleKind, check};
use testbed::lab::{Lab, LabSpec};
use testbed::memory::GuestRam;
use testbed::qemu::Accel;

use super::LIMIT;
use super::disk_faults::{LONGEST, watched};
use super::groups::{Barrier, check_all, go, lab, migration_settings, nothing_left, spec};

const GUESTS: [&str; 3] = [
    "web:32MiB:1MB/s:2MiB",
    "db:64MiB:4MB/s:8MiB",
    "log:32MiB:1MB/s:2MiB",
];

/// Two of three guests have a disk, and write to it all the time; the writes of one wait for the
/// destination when it moves.
pub fn with_disks(accel: Accel) -> Result<LabSpec> {
    let mut spec = spec(accel, &GUESTS)?;
    for (index, size, rate) in [(1, 48 << 20, 2_000_000), (2, 16 << 20, 500_000)] {
        let write_blocking = index == 2;
        spec.guests[index].disk = Some(DiskSpec {
            size: Bytes(size),
            rate: BytesPerSecond(rate),
            filled: false,
            write_blocking,
            format: ImageFormat::Raw,
            least: None,
        });
    }
    Ok(spec)
}

/// What a guest has counted: its ticks, and the writes that its disk has acknowledged.
fn counters(lab: &Lab, guest: &str, host: &str) -> Result<GuestState> {
    let spec = lab.guest(guest)?;
    let ram = GuestRam::open(&mut lab.monitor(guest, host)?, spec.memory)?;
    Ok(check::state(&ram)?)
}

/// Every kind of disk: qcow2, several of a VM, read-only, with a backing file that is kept or goes, and
/// one that does not move because both hosts have it.
pub fn every_kind(accel: Accel) -> Result<()> {
    let mut spec = with_disks(accel)?;
    let idle = |node: &str, kind| IdleDisk {
        node: node.into(),
        size: Bytes(8 << 20),
        kind,
    };
    if let Some(disk) = &mut spec.guests[1].disk {
        disk.format = ImageFormat::Qcow2;
    }
    spec.guests[1].idle = vec![
        idle("data", IdleKind::Raw),
        idle("cd", IdleKind::ReadOnly),
        idle("kept", IdleKind::Layered(Chain::Keep)),
    ];
    spec.guests[2].idle = vec![
        idle("flat", IdleKind::Layered(Chain::Flatten)),
        idle("common", IdleKind::Shared),
    ];
    let lab = lab(spec)?;
    let since = Micros::now();
    let mut barrier = Barrier::new(&lab, "a", "b");
    let report = go(&lab, Policy::Muster, "a", "b", &mut barrier)?;
    ensure!(report.result == Outcome::Committed, "{:?}", report.reason);
    barrier.result.context("they never arrived")??;
    check_all(&lab, "b", since)?;
    for guest in ["db", "log"] {
        let nodes = lab.monitor(guest, "b")?.execute(
            "query-named-block-nodes",
            json!({ "flat": true }),
            LIMIT,
        )?;
        let left = |node| nodes.to_string().contains(node);
        ensure!(
            !left("muster-image") && !left("muster-nbd"),
            "{guest}: {nodes}"
        );
    }
    nothing_left(&lab, "b")
}

pub fn there_and_back(accel: Accel) -> Result<()> {
    let lab = lab(with_disks(accel)?)?;
    let begun = counters(&lab, "db", "a")?;
    let before = migration_settings(&lab, "a")?;
    for (from, to) in [("a", "b"), ("b", "a")] {
        let since = Micros::now();
        let mut barrier = Barrier::new(&lab, from, to);
        let report = go(&lab, Policy::Muster, from, to, &mut barrier)?;
        ensure!(report.result == Outcome::Committed, "{:?}", report.reason);
        barrier.result.context("they never arrived")??;
        ensure!(report.split_s <= 0.0, "split for {} s", report.split_s);
        check_all(&lab, to, since)?;
        ensure!(
            migration_settings(&lab, to)? == before,
            "migration settings were left changed"
        );
        nothing_left(&lab, to)?;
    }
    // It has written all the time that it ran: 2 MB/s are 488 blocks in 1000 ticks.
    let ended = counters(&lab, "db", "a")?;
    let written = u64::from(ended.disk_done - begun.disk_done);
    let ticks = u64::from(ended.ticks - begun.ticks);
    ensure!(
        written > ticks * 488 / 1000 / 2,
        "only {written} blocks were written in {ticks} ticks"
    );
    Ok(())
}

/// A step, recognised.
pub type At = fn(&Step) -> bool;

/// Sends a signal to the destination's QEMU of a guest, at a step or a while after it.
struct Fault<'a> {
    lab: &'a Lab,
    guest: &'static str,
    at: At,
    delay: Duration,
    signal: Signal,
    sent: Option<Result<()>>,
}

impl Observer for Fault<'_> {
    fn step(&mut self, _group: &GroupName, step: &Step) {
        if self.sent.is_none() && (self.at)(step) {
            let (delay, signal) = (self.delay, self.signal);
            let qemu = self.lab.qemu(self.guest, "b").map_err(anyhow::Error::from);
            self.sent = Some(qemu.and_then(|qemu| {
                if delay.is_zero() {
                    return Ok(qemu.signal(signal)?);
                }
                std::thread::spawn(move || {
                    std::thread::sleep(delay);
                    // Gone already is as good.
                    let _ = qemu.signal(signal);
                });
                Ok(())
            }));
        }
    }
}

/// The guests run on `a` as before: every write is there, no mirror and no image is left.
pub fn all_as_before(lab: &Lab, since: Micros) -> Result<()> {
    check_all(lab, "a", since)?;
    for guest in &lab.spec.guests {
        let mut monitor = lab.monitor(&guest.name, "a")?;
        let jobs = monitor.execute("query-block-jobs", json!({}), LIMIT)?;
        ensure!(jobs == json!([]), "{}: {jobs}", guest.name);
        let nodes = monitor.execute("query-named-block-nodes", json!({ "flat": true }), LIMIT)?;
        ensure!(!nodes.to_string().contains("muster-nbd"), "{nodes}");
        let image = lab.image(&guest.name, "b")?;
        let by = Instant::now() + LIMIT;
        while image.exists() {
            ensure!(Instant::now() < by, "{} is left", image.display());
            std::thread::sleep(Duration::from_millis(10));
        }
    }
    nothing_left(lab, "a")
}

pub fn taken_back(accel: Accel) -> Result<()> {
    let lab = lab(with_disks(accel)?)?;
    let steps: [(At, u64); 3] = [
        (|step| matches!(step, Step::Started), 200),
        (|step| matches!(step, Step::AllHeld), 0),
        (|step| matches!(step, Step::AllStopped { .. }), 0),
    ];
    for (at, delay_ms) in steps {
        let since = Micros::now();
        let mut fault = Fault {
            lab: &lab,
            guest: "db",
            at,
            delay: Duration::from_millis(delay_ms),
            signal: Signal::SIGKILL,
            sent: None,
        };
        let report = go(&lab, Policy::Muster, "a", "b", &mut fault)?;
        fault.sent.context("the step never came")??;
        ensure!(
            report.result == Outcome::RolledBack,
            "{}: {:?}",
            report.result,
            report.reason
        );
        all_as_before(&lab, since)?;
    }
    let since = Micros::now();
    let mut barrier = Barrier::new(&lab, "a", "b");
    let report = go(&lab, Policy::Muster, "a", "b", &mut barrier)?;
    ensure!(report.result == Outcome::Committed, "{:?}", report.reason);
    barrier.result.context("they never arrived")??;
    check_all(&lab, "b", since)
}

pub fn hung(accel: Accel) -> Result<()> {
    let lab = lab(with_disks(accel)?)?;
    // In the last one the others have been paused, and are complete, when that one gives up.
    let steps: [(At, u64, Duration); 3] = [
        (|step| matches!(step, Step::Started), 100, LONGEST),
        (|step| matches!(step, Step::AllHeld), 0, LONGEST),
        (
            |step| matches!(step, Step::AllStopped { .. }),
            0,
            3 * LONGEST,
        ),
    ];
    for (at, delay_ms, longest) in steps {
        let since = Micros::now();
        let mut fault = Fault {
            lab: &lab,
            guest: "log",
            at,
            delay: Duration::from_millis(delay_ms),
            signal: Signal::SIGSTOP,
            sent: None,
        };
        let move_them = || go(&lab, Policy::Muster, "a", "b", &mut fault);
        let (report, silence) = watched(&lab, "log", move_them)?;
        fault.sent.context("the step never came")??;
        ensure!(
            report.result == Outcome::RolledBack,
            "{}: {:?}",
            report.result,
            report.reason
        );
        println!("{silence}");
        silence.at_most(longest)?;
        all_as_before(&lab, since)?;
    }
    Ok(())
}

/// Sees whether a guest's writes are slowed.
#[derive(Default)]
struct Slowed(Vec<u64>);

impl Observer for Slowed {
    fn step(&mut self, _group: &GroupName, step: &Step) {
        if let Step::DisksThrottled { bytes_per_s, .. } = step {
            self.0.push(*bytes_per_s);
        }
    }
}

/// A guest that writes faster than the link carries: slowed until its disk is copied, and not after.
pub fn slowed(accel: Accel) -> Result<()> {
    let mut spec = spec(accel, &["db:16MiB:100kB/s:1MiB"])?;
    spec.link = BytesPerSecond(3_000_000);
    spec.traffic.clear();
    spec.guests[0].disk = Some(DiskSpec {
        size: Bytes(4 << 20),
        rate: BytesPerSecond(4_000_000),
        filled: false,
        write_blocking: false,
        format: ImageFormat::Raw,
        least: Some(BytesPerSecond(500_000)),
    });
    let mut lab = lab(spec)?;
    let told = lab.directory().join("told");
    for host in ["a", "b"] {
        let hook = |when: &str| {
            let say = format!("echo {host} {when} $MUSTER_VM $MUSTER_ROLE $MUSTER_RESULT");
            format!(
                "{when} = [\"/bin/sh\", \"-c\", \"{say} >> {}\"]\n",
                told.display()
            )
        };
        let hooks = hook("before-switchover") + &hook("after-switchover");
        lab.start_sidecar_with(host, |text| {
            text.replace("[control]", &format!("[hooks]\n{hooks}\n[control]"))
        })?;
    }
    let since = Micros::now();
    let mut seen = Slowed::default();
    let report = go(&lab, Policy::Muster, "a", "b", &mut seen)?;
    ensure!(report.result == Outcome::Committed, "{:?}", report.reason);
    ensure!(!seen.0.is_empty(), "it was not slowed");
    ensure!(seen.0.iter().all(|rate| *rate >= 500_000), "{:?}", seen.0);
    check_all(&lab, "b", since)?;
    let said = std::fs::read_to_string(&told)?;
    let mut said: Vec<&str> = said.lines().collect();
    said.sort_unstable();
    let expected = [
        "a after-switchover db source committed",
        "a before-switchover db source",
        "b after-switchover db destination committed",
    ];
    ensure!(said == expected, "{said:?}");
    let begun = counters(&lab, "db", "b")?;
    std::thread::sleep(Duration::from_secs(1));
    let ended = counters(&lab, "db", "b")?;
    let (written, ticks) = (ended.disk_done - begun.disk_done, ended.ticks - begun.ticks);
    ensure!(
        written > ticks / 2,
        "after the move it writes only {written} blocks in {ticks} ticks"
    );
    Ok(())
}
