//! Streams that go from QEMU to QEMU: the direct transport, and a patched QEMU's own hold.

use std::time::Duration;

use anyhow::{Result, ensure};
use coordinator::application::Policy;
use coordinator::observer::Nobody;
use coordinator::report::{MoveReport, Outcome};
use coordinator::{RunError, RunOptions};
use sidecar::protocol::types::{QemuBuild, Transport};
use testbed::clock::Micros;
use testbed::lab::Lab;
use testbed::qemu::{Accel, installed};

use super::groups::{self, GUESTS, check_all, lab, migration_settings, nothing_left, spec};

fn with(accel: Accel, transport: &str) -> Result<Lab> {
    let mut spec = spec(accel, &GUESTS)?;
    spec.settings.push(format!("transport = \"{transport}\""));
    lab(spec)
}

fn went(report: &MoveReport, transport: Transport) -> Result<()> {
    ensure!(report.result == Outcome::Committed, "{:?}", report.reason);
    for vm in &report.vms {
        ensure!(vm.transport == transport, "{}: {}", vm.name, vm.transport);
    }
    Ok(())
}

/// Policies that hold nothing need no patch.
pub fn without_hold(accel: Accel) -> Result<()> {
    let lab = with(accel, "direct")?;
    let before = migration_settings(&lab, "a")?;
    let moves = [(Policy::Sequential, "a", "b"), (Policy::Parallel, "b", "a")];
    for (policy, from, to) in moves {
        let since = Micros::now();
        let report = groups::go(&lab, policy, from, to, &mut Nobody)?;
        went(&report, Transport::Direct)?;
        check_all(&lab, to, since)?;
        ensure!(
            migration_settings(&lab, to)? == before,
            "migration settings were left changed"
        );
        nothing_left(&lab, to)?;
    }
    Ok(())
}

/// The kernel keeps the application's bandwidth, shared by both.
pub fn paced(accel: Accel) -> Result<()> {
    let mut spec = spec(accel, &["web:48MiB:1MB/s:32MiB", "db:48MiB:1MB/s:32MiB"])?;
    spec.settings.push("transport = \"direct\"".into());
    spec.link = rate_limiter::BytesPerSecond(20_000_000);
    let lab = lab(spec)?;
    let report = groups::go(&lab, Policy::Parallel, "a", "b", &mut Nobody)?;
    went(&report, Transport::Direct)?;
    #[allow(clippy::cast_precision_loss, reason = "bytes of one move")]
    let rate = report.sent_bytes as f64 / report.total_s;
    #[allow(clippy::cast_precision_loss, reason = "bytes per second")]
    let allowed = lab.bandwidth().0 as f64;
    println!("{rate:.0} of {allowed:.0} B/s");
    ensure!(rate < allowed * 1.05, "{rate} of {allowed} B/s");
    ensure!(rate > allowed * 0.7, "{rate} of {allowed} B/s");
    Ok(())
}

/// On stock QEMU nothing would hold it; on a patched one, a held group goes there and back.
pub fn with_hold(accel: Accel) -> Result<()> {
    for transport in ["direct", "relay"] {
        let lab = with(accel, transport)?;
        let before = migration_settings(&lab, "a")?;
        for (from, to) in [("a", "b"), ("b", "a")] {
            let since = Micros::now();
            let options = RunOptions {
                policy: Some(Policy::Muster),
                ..RunOptions::default()
            };
            let ran = coordinator::run(&lab.application(from, to)?, &options, &mut Nobody);
            let report = match ran {
                Err(RunError::Preflight { problems }) if transport == "direct" => {
                    let text = problems.join("; ");
                    ensure!(text.contains("nothing would hold it"), "{text}");
                    println!("{} is stock: {text}", installed()?.program);
                    check_all(&lab, "a", since)?;
                    break;
                }
                ran => ran?,
            };
            let (direct, relay) = (Transport::Direct, Transport::Relay);
            went(&report, if transport == "direct" { direct } else { relay })?;
            for vm in &report.vms {
                let patched = vm.qemu_build == QemuBuild::Patched;
                ensure!(patched || transport == "relay");
                ensure!(vm.hold_reason.is_some() && vm.remaining_at_release_bytes.is_some());
            }
            ensure!(report.split_s <= 0.0, "split for {} s", report.split_s);
            println!(
                "{transport}, {}: STOP skew {:.1} ms, RESUME skew {:.1} ms",
                report.vms[0].qemu_build,
                report.stop_skew_s * 1e3,
                report.resume_skew_s * 1e3,
            );
            check_all(&lab, to, since)?;
            ensure!(
                migration_settings(&lab, to)? == before,
                "migration settings were left changed"
            );
            nothing_left(&lab, to)?;
            std::thread::sleep(Duration::from_millis(50));
        }
    }
    Ok(())
}
