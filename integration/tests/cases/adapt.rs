//! A link that carries less than the application file says.

use anyhow::{Result, ensure};
use coordinator::RunOptions;
use coordinator::application::{Policy, TransportChoice};
use coordinator::observer::Nobody;
use coordinator::report::{AdaptationKind, MoveReport, Outcome};
use rate_limiter::BytesPerSecond;
use testbed::clock::Micros;
use testbed::lab::Lab;
use testbed::qemu::Accel;

use super::groups::{check_all, lab, spec};

/// Moves the guests, told so many times what the link carries.
fn go(
    lab: &Lab,
    policy: Policy,
    ends: [&str; 2],
    transport: TransportChoice,
    times: u64,
) -> Result<MoveReport> {
    let mut app = lab.application(ends[0], ends[1])?;
    app.allowance.bandwidth = Some(BytesPerSecond(lab.bandwidth().0 * times));
    app.transport = transport;
    let options = RunOptions {
        policy: Some(policy),
        ..RunOptions::default()
    };
    let since = Micros::now();
    let report = coordinator::run(&app, &options, &mut Nobody)?;
    ensure!(report.result == Outcome::Committed, "{:?}", report.reason);
    check_all(lab, ends[1], since)?;
    println!("{policy} by {transport:?}: {:?}", report.adaptations);
    Ok(report)
}

fn is_found(report: &MoveReport) -> bool {
    let mut adaptations = report.adaptations.iter();
    adaptations.any(|one| one.kind == AdaptationKind::Bandwidth)
}

/// It is found by streams that the relay paces, and by those that the kernel does; and where the link
/// carries what was told, nothing is found.
pub fn a_narrow_link(accel: Accel) -> Result<()> {
    let mut spec = spec(accel, &["web:96MiB:1MB/s:48MiB", "db:96MiB:1MB/s:48MiB"])?;
    spec.link = BytesPerSecond(25_000_000);
    let lab = lab(spec)?;
    let carries = lab.bandwidth().0;
    let report = go(&lab, Policy::Muster, ["a", "b"], TransportChoice::Relay, 3)?;
    ensure!(is_found(&report), "{:?}", report.adaptations);
    let found = report.groups[0].bandwidth_bytes_per_s;
    ensure!(
        (carries / 5 * 4..carries / 4 * 5).contains(&found),
        "{found} of {carries} B/s"
    );
    let report = go(
        &lab,
        Policy::Parallel,
        ["b", "a"],
        TransportChoice::Direct,
        3,
    )?;
    ensure!(is_found(&report), "{:?}", report.adaptations);
    let report = go(&lab, Policy::Muster, ["a", "b"], TransportChoice::Relay, 1)?;
    ensure!(report.adaptations.is_empty(), "{:?}", report.adaptations);
    Ok(())
}
