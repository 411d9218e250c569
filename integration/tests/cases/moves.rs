//! One guest, two QEMUs, a migration over a unix socket driven by the testbed itself.

use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use serde_json::json;
use testbed::guest::{GuestSpec, check};
use testbed::memory::{GuestRam, compare_paused, compare_running};
use testbed::qemu::{Accel, Qemu, Role};
use testbed::qmp::Qmp;

use super::{LIMIT, Lab};

const LOOK_EVERY: Duration = Duration::from_millis(2);

/// Source and destination, both paused at the barrier: completed/postmigrate, completed/paused.
fn migrate(lab: &Lab, spec: &GuestSpec) -> Result<(Qemu, Qemu)> {
    let mut source = lab.start(spec, "a", Role::Boot)?;
    lab.collector.wait_for_tick(&spec.name, "a", LIMIT)?;
    let mut destination = lab.start(spec, "b", Role::Incoming)?;
    let uri = format!("unix:{}", lab.path("stream").display());
    for qemu in [&mut source, &mut destination] {
        let list = json!([
            {"capability": "return-path", "state": true},
            {"capability": "events", "state": true},
        ]);
        let arguments = json!({"capabilities": list});
        qemu.monitor
            .execute("migrate-set-capabilities", arguments, LIMIT)?;
    }
    let parameters = json!({"max-bandwidth": 400_000_000, "downtime-limit": 50});
    source
        .monitor
        .execute("migrate-set-parameters", parameters, LIMIT)?;
    let arguments = json!({"uri": uri});
    destination
        .monitor
        .execute("migrate-incoming", arguments.clone(), LIMIT)?;
    source.monitor.execute("migrate", arguments, LIMIT)?;
    wait_for(&mut source.monitor, "postmigrate")?;
    wait_for(&mut destination.monitor, "paused")?;
    Ok((source, destination))
}

/// Waits until the migration is completed and the run state is `state`.
fn wait_for(monitor: &mut Qmp, state: &str) -> Result<()> {
    let deadline = Instant::now() + LIMIT;
    loop {
        let migration = monitor.execute("query-migrate", json!({}), LIMIT)?;
        let status = migration["status"].as_str().unwrap_or_default().to_owned();
        let run_state = monitor.run_state(LIMIT)?;
        if (status.as_str(), run_state.as_str()) == ("completed", state) {
            return Ok(());
        }
        if status == "failed" || Instant::now() >= deadline {
            bail!("migration {status}, VM {run_state}; expected completed, {state}");
        }
        std::thread::sleep(LOOK_EVERY);
    }
}

pub fn plain_migration(accel: Accel) -> Result<()> {
    let lab = Lab::new(accel)?;
    let spec: GuestSpec = "app:128MiB:20MB/s:16MiB".parse()?;
    let params = spec.params()?;
    let (mut source, mut destination) = migrate(&lab, &spec)?;
    ensure!(lab.collector.running("app", LIMIT) == ["a"]);

    let before = GuestRam::open(&mut source.monitor, spec.memory)?;
    let after = GuestRam::open(&mut destination.monitor, spec.memory)?;
    compare_paused(&before, &after)?;
    ensure!(before.hash()? == after.hash()?, "RAM differs");
    let stopped = check::check(&before, &params)?;
    ensure!(stopped == check::check(&after, &params)?);

    destination.monitor.execute("cont", json!({}), LIMIT)?;
    lab.collector.wait_for_tick("app", "b", LIMIT)?;
    std::thread::sleep(Duration::from_millis(200));
    let compared = compare_running(&before, &after, &params)?;
    ensure!(compared.rewritten > 0, "the destination writes nothing");

    let stop = source.monitor.wait_event("STOP", LIMIT)?;
    let resume = destination.monitor.wait_event("RESUME", LIMIT)?;
    let record = lab.collector.record("app");
    let moves = record.switchovers();
    let [switchover] = &moves[..] else {
        bail!("expected one switchover: {moves:?}")
    };
    println!(
        "{accel}: downtime {:.1?} by ticks, {:.1?} by STOP and RESUME (barrier included)",
        switchover.downtime,
        resume.at.since(stop.at),
    );
    ensure!(switchover.continuous && record.breaks().is_empty());
    ensure!(record.overlaps().is_empty());
    let by_events = resume.at.since(stop.at).as_secs_f64();
    let difference = switchover.downtime.as_secs_f64() - by_events;
    ensure!(
        difference.abs() < 0.02,
        "ticks and events differ by {difference} s"
    );
    ensure!(lab.collector.running("app", Duration::from_millis(50)) == ["b"]);

    destination.monitor.execute("stop", json!({}), LIMIT)?;
    let later = check::check(&after, &params)?;
    ensure!(later.writes > stopped.writes && later.ticks > stopped.ticks);
    Ok(())
}

pub fn two_running_copies(accel: Accel) -> Result<()> {
    let lab = Lab::new(accel)?;
    let spec: GuestSpec = "app:32MiB:1MB/s:4MiB".parse()?;
    let (mut source, mut destination) = migrate(&lab, &spec)?;
    for monitor in [&mut destination.monitor, &mut source.monitor] {
        monitor.execute("cont", json!({}), LIMIT)?;
    }
    for host in ["a", "b", "a"] {
        lab.collector.wait_for_tick("app", host, LIMIT)?;
    }
    let record = lab.collector.record("app");
    ensure!(
        !record.overlaps().is_empty(),
        "two running copies went unnoticed"
    );
    ensure!(!record.breaks().is_empty());
    ensure!(lab.collector.running("app", LIMIT).len() == 2);
    Ok(())
}
