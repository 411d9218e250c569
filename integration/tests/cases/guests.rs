//! One guest in one QEMU.

use std::time::Duration;

use anyhow::{Result, ensure};
use serde_json::json;
use testbed::clock::Micros;
use testbed::guest::{Access, GuestSpec, ImageError, OnOff, PAGE, PageReader, check};
use testbed::memory::GuestRam;
use testbed::qemu::{Accel, AccelChoice, Role, accel};

use super::{LIMIT, Lab};

const WATCH: Duration = Duration::from_millis(1500);

pub fn ticks_and_dirties(accel: Accel) -> Result<()> {
    for memory in ["128MiB", "256MiB", "512MiB"] {
        let lab = Lab::new(accel)?;
        let spec: GuestSpec = format!("db:{memory}:40MB/s:32MiB").parse()?;
        let start = Micros::now();
        let mut qemu = lab.start(&spec, "a", Role::Boot)?;
        let first = lab.collector.wait_for_tick("db", "a", LIMIT)?;
        let ram = GuestRam::open(&mut qemu.monitor, spec.memory)?;
        let before = check::state(&ram)?;
        let from = Micros::now();
        std::thread::sleep(WATCH);
        let (after, to) = (check::state(&ram)?, Micros::now());
        let record = lab.collector.record("db").window(from..to);
        let Some(stats) = record.gaps() else {
            anyhow::bail!("no ticks")
        };
        let rate =
            f64::from(after.writes - before.writes) * 4.096e-3 / to.since(from).as_secs_f64();
        println!(
            "{accel} {memory}: ready in {:.0?}; {:.1} ticks/s, p50 {:.2} p99 {:.2} max {:.2} ms; {rate:.2} MB/s",
            first.since(start),
            stats.hz,
            stats.p50_ms,
            stats.p99_ms,
            stats.max_ms,
        );
        ensure!(
            record.breaks().is_empty(),
            "ticks were lost: {:?}",
            record.breaks()
        );
        // What the guest is made to do holds always; how often it is let to, only where the timer
        // makes up for lost ticks, as KVM's does. QEMU's own does not when the machine is busy.
        let writes = f64::from(after.writes - before.writes);
        let per_tick = writes / f64::from(after.ticks - before.ticks);
        ensure!(
            (9.66..9.86).contains(&per_tick),
            "{per_tick} writes per tick"
        );
        if accel == Accel::Kvm {
            ensure!((980.0..1020.0).contains(&stats.hz), "{stats:?}");
            ensure!((39.0..41.0).contains(&rate), "{rate} MB/s, asked for 40");
        }
        ensure!(lab.collector.running("db", WATCH) == ["a"]);
    }
    Ok(())
}

pub fn every_page_verifies(accel: Accel) -> Result<()> {
    for (access, on_off) in [
        (Access::Sweep, None),
        (Access::Random, None),
        (
            Access::Sweep,
            Some(OnOff {
                on: Duration::from_millis(100),
                off: Duration::from_millis(400),
            }),
        ),
    ] {
        let lab = Lab::new(accel)?;
        let mut spec: GuestSpec = "db:128MiB:40MB/s:8MiB".parse()?;
        spec.access = access;
        spec.on_off = on_off;
        let mut qemu = lab.start(&spec, "a", Role::Boot)?;
        lab.collector.wait_for_tick("db", "a", LIMIT)?;
        std::thread::sleep(Duration::from_secs(1));
        qemu.monitor.execute("stop", json!({}), LIMIT)?;
        let ram = GuestRam::open(&mut qemu.monitor, spec.memory)?;
        let start = Micros::now();
        let state = check::check(&ram, &spec.params()?)?;
        let checked = Micros::now();
        let hash = ram.hash()?;
        let hashed = Micros::now();
        ensure!(hash == ram.hash()?, "a paused guest's RAM changes");
        let per_second = |time: Duration| 0.134_217_728 / time.as_secs_f64();
        println!(
            "{accel} {access:?}: {} writes in {} ticks; check {:.1} GB/s, hash {:.1} GB/s",
            state.writes,
            state.ticks,
            per_second(checked.since(start)),
            per_second(hashed.since(checked)),
        );
        let share = if on_off.is_some() { 0.2 } else { 1.0 };
        let expected = f64::from(state.ticks) / 1000.0 * 40e6 / 4096.0 * share;
        let ratio = f64::from(state.writes) / expected;
        let tolerance = if on_off.is_some() { 0.5 } else { 0.02 };
        ensure!(
            (ratio - 1.0).abs() < tolerance,
            "{ratio} of the writes asked for"
        );
    }
    Ok(())
}

/// RAM in which one page is as it was before its last write.
struct Stale<'a> {
    ram: &'a GuestRam,
    page: u64,
}

impl PageReader for Stale<'_> {
    fn read(&self, address: u64, buffer: &mut [u8]) -> std::io::Result<()> {
        self.ram.read(address, buffer)?;
        let pages = u64::try_from(buffer.len()).unwrap_or(0) / PAGE;
        if (address / PAGE..address / PAGE + pages).contains(&self.page) {
            let page = u32::try_from(self.page).unwrap_or(0);
            let at = usize::try_from(self.page * PAGE - address).unwrap_or(0);
            buffer[at..at + 4].copy_from_slice(&0_u32.to_le_bytes());
            buffer[at + 4..at + 8].copy_from_slice(&check::tag(page, 0).to_le_bytes());
        }
        Ok(())
    }
}

pub fn a_stale_page_is_found(accel: Accel) -> Result<()> {
    let lab = Lab::new(accel)?;
    let spec: GuestSpec = "db:32MiB:40MB/s:1MiB".parse()?;
    let mut qemu = lab.start(&spec, "a", Role::Boot)?;
    lab.collector.wait_for_tick("db", "a", LIMIT)?;
    std::thread::sleep(Duration::from_millis(200));
    qemu.monitor.execute("stop", json!({}), LIMIT)?;
    let ram = GuestRam::open(&mut qemu.monitor, spec.memory)?;
    let params = spec.params()?;
    check::check(&ram, &params)?;
    let page = u64::from(params.base_page + 17);
    let result = check::check(&Stale { ram: &ram, page }, &params);
    ensure!(
        matches!(result, Err(ImageError::Page { page: found, .. }) if u64::from(found) == page),
        "{result:?}"
    );
    Ok(())
}

pub fn accelerator() -> Result<()> {
    let chosen = accel::choose(AccelChoice::Auto)?;
    println!("{}", chosen.reason);
    ensure!(!accel::kvm_required() || chosen.accel == Accel::Kvm);
    ensure!(accel::choose(AccelChoice::Tcg)?.accel == Accel::Tcg);
    Ok(())
}
