//! Groups whose VMs have local disks.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use coordinator::application::Policy;
use coordinator::engine::Step;
use coordinator::observer::{GroupName, Observer};
use coordinator::report::Outcome;
use nix::sys::signal::Signal;
use rate_limiter::{Bytes, BytesPerSecond};
use serde_json::json;
use testbed::clock::Micros;
use testbed::guest::{DiskSpec, check};
use testbed::lab::{Lab, LabSpec};
use testbed::memory::GuestRam;
use testbed::process::PidFd;
use testbed::qemu::Accel;

use super::LIMIT;
use super::groups::{Barrier, check_all, go, lab, migration_settings, nothing_left, spec};

const GUESTS: [&str; 3] = [
    "web:32MiB:1MB/s:2MiB",
    "db:64MiB:4MB/s:8MiB",
    "log:32MiB:1MB/s:2MiB",
];

/// Two of three guests have a disk, and write to it all the time; the writes of one wait for the
/// destination when it moves.
fn with_disks(accel: Accel) -> Result<LabSpec> {
    let mut spec = spec(accel, &GUESTS)?;
    for (index, size, rate) in [(1, 48 << 20, 2_000_000), (2, 16 << 20, 500_000)] {
        let write_blocking = index == 2;
        spec.guests[index].disk = Some(DiskSpec {
            size: Bytes(size),
            rate: BytesPerSecond(rate),
            write_blocking,
        });
    }
    Ok(spec)
}

/// How many writes the disk of a guest has acknowledged.
fn writes(lab: &Lab, guest: &str, host: &str) -> Result<u32> {
    let spec = lab.guest(guest)?;
    let ram = GuestRam::open(&mut lab.monitor(guest, host)?, spec.memory)?;
    Ok(check::state(&ram)?.disk_done)
}

pub fn there_and_back(accel: Accel) -> Result<()> {
    let lab = lab(with_disks(accel)?)?;
    let begun = (writes(&lab, "db", "a")?, Instant::now());
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
    // It has written all the time, less what it stood still: 2 MB/s are 488 blocks.
    let written = writes(&lab, "db", "a")? - begun.0;
    let least = begun.1.elapsed().as_secs() * 488 / 2;
    ensure!(
        u64::from(written) > least,
        "only {written} blocks were written"
    );
    Ok(())
}

/// The QEMU of a guest on a host.
fn qemu_of(lab: &Lab, guest: &str, host: &str) -> Result<PidFd> {
    for pid in lab.network.host(host)?.processes() {
        let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let mut words = line.split(|byte| *byte == 0);
        if words.any(|word| word == b"-name") && words.next() == Some(guest.as_bytes()) {
            return Ok(PidFd::open(pid)?);
        }
    }
    anyhow::bail!("there is no QEMU of {guest} on {host}")
}

/// A step, recognised.
type At = fn(&Step) -> bool;

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
            let qemu = qemu_of(self.lab, self.guest, "b");
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
fn all_as_before(lab: &Lab, since: Micros) -> Result<()> {
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

/// The longest time in which the disk acknowledged nothing to a guest.
fn longest_silence(lab: &Lab, guest: &str, stop: &AtomicBool) -> Result<Duration> {
    let spec = lab.guest(guest)?;
    let ram = GuestRam::open(&mut lab.monitor(guest, "a")?, spec.memory)?;
    let mut longest = Duration::ZERO;
    let (mut last, mut since) = (check::state(&ram)?.disk_done, Instant::now());
    while !stop.load(Ordering::Relaxed) {
        std::thread::sleep(Duration::from_millis(5));
        let done = check::state(&ram)?.disk_done;
        longest = longest.max(since.elapsed());
        if done != last {
            (last, since) = (done, Instant::now());
        }
    }
    Ok(longest)
}

pub fn hung(accel: Accel) -> Result<()> {
    let lab = lab(with_disks(accel)?)?;
    // In the last one the others have been paused, and are complete, when that one gives up.
    let steps: [(At, u64, u64); 3] = [
        (|step| matches!(step, Step::Started), 100, 2500),
        (|step| matches!(step, Step::AllHeld), 0, 2500),
        (|step| matches!(step, Step::AllStopped { .. }), 0, 6000),
    ];
    for (at, delay_ms, longest_ms) in steps {
        let since = Micros::now();
        let mut fault = Fault {
            lab: &lab,
            guest: "log",
            at,
            delay: Duration::from_millis(delay_ms),
            signal: Signal::SIGSTOP,
            sent: None,
        };
        let stop = AtomicBool::new(false);
        let (report, silence) = std::thread::scope(|scope| {
            let watch = scope.spawn(|| longest_silence(&lab, "log", &stop));
            let report = go(&lab, Policy::Muster, "a", "b", &mut fault);
            stop.store(true, Ordering::Relaxed);
            (report, watch.join())
        });
        let report = report?;
        fault.sent.context("the step never came")??;
        ensure!(
            report.result == Outcome::RolledBack,
            "{}: {:?}",
            report.result,
            report.reason
        );
        let silence = silence.map_err(|_| anyhow::anyhow!("the watcher ended"))??;
        ensure!(
            silence < Duration::from_millis(longest_ms),
            "the guest's disk acknowledged nothing for {silence:?}, at most {longest_ms} ms are fine"
        );
        all_as_before(&lab, since)?;
    }
    Ok(())
}
