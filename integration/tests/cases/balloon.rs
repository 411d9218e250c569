//! A guest with a balloon: what it does not use is not copied, and it has it again afterwards.

use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use coordinator::application::Policy;
use coordinator::engine::Step;
use coordinator::observer::{GroupName, Nobody, Observer};
use coordinator::report::Outcome;
use coordinator::{MoveReport, RunOptions};
use nix::sys::signal::Signal;
use serde_json::json;
use testbed::clock::Micros;
use testbed::lab::Lab;
use testbed::qemu::Accel;

use super::LIMIT;
use super::commands::muster;
use super::groups::{check_all, lab, spec};

const MIB: u64 = 1 << 20;
/// All of its memory; it uses 10 MiB, and its reserve is 8 MiB.
const WHOLE: u64 = 192 * MIB;
const GUEST: &str = "db:192MiB:2MB/s:8MiB";
/// More than it keeps while it moves.
const TAKEN: u64 = 24 * MIB;

fn balloon(lab: &Lab, host: &str) -> Result<u64> {
    let told = lab
        .monitor("db", host)?
        .execute("query-balloon", json!({}), LIMIT)?;
    told["actual"].as_u64().context("no size")
}

fn set_balloon(lab: &Lab, bytes: u64) -> Result<()> {
    let value = json!({ "value": bytes });
    lab.monitor("db", "a")?.execute("balloon", value, LIMIT)?;
    until(|| is_balloon(lab, "a", bytes))
}

fn is_balloon(lab: &Lab, host: &str, bytes: u64) -> Result<()> {
    let found = balloon(lab, host)?;
    ensure!(found == bytes, "{host}: {found} bytes, not {bytes}");
    Ok(())
}

/// Waits for what is to come by itself.
fn until(mut good: impl FnMut() -> Result<()>) -> Result<()> {
    let by = Instant::now() + LIMIT;
    loop {
        match good() {
            Err(_) if Instant::now() < by => std::thread::sleep(Duration::from_millis(10)),
            result => return result,
        }
    }
}

/// No run is left at either host, and nothing of the guest at `b`.
fn is_over(lab: &Lab) -> Result<()> {
    for host in ["a", "b"] {
        let notes = lab.host_directory(host).join("state/runs");
        let left = std::fs::read_dir(&notes)?.next();
        ensure!(left.is_none(), "{host}: {left:?}");
    }
    ensure!(lab.qemu("db", "b").is_err(), "a QEMU is left at b");
    Ok(())
}

fn go(lab: &Lab, ends: [&str; 2], ballooned: bool, watch: &mut dyn Observer) -> Result<MoveReport> {
    let mut app = lab.application(ends[0], ends[1])?;
    app.vms[0].balloon = Some(ballooned);
    let options = RunOptions {
        policy: Some(Policy::Muster),
        ..RunOptions::default()
    };
    Ok(coordinator::run(&app, &options, watch)?)
}

/// Sees what the guest has while it is held, and kills the QEMU that it is to go to.
struct Death<'a> {
    lab: &'a Lab,
    seen: Option<Result<u64>>,
}

impl Observer for Death<'_> {
    fn step(&mut self, _group: &GroupName, step: &Step) {
        if *step == Step::AllHeld && self.seen.is_none() {
            let kill = || Ok(self.lab.qemu("db", "b")?.signal(Signal::SIGKILL)?);
            self.seen = Some(balloon(self.lab, "a").and_then(|seen| kill().map(|()| seen)));
        }
    }
}

/// An operator has inflated its balloon a little; the move is taken back.
fn taken_back(lab: &Lab) -> Result<()> {
    let before = 160 * MIB;
    set_balloon(lab, before)?;
    let mut death = Death { lab, seen: None };
    let report = go(lab, ["a", "b"], true, &mut death)?;
    ensure!(report.result == Outcome::RolledBack, "{:?}", report.reason);
    let held = death.seen.context("it was never held")??;
    ensure!(held < TAKEN, "{held} bytes while it was held");
    let told = report.vms[0].balloon.context("not told")?;
    ensure!(told.before_bytes == before && told.given_back, "{told:?}");
    until(|| is_balloon(lab, "a", before))?;
    set_balloon(lab, WHOLE)
}

/// The coordinator and the source's sidecar are killed while the guest is short of memory.
fn left_alone(lab: &mut Lab) -> Result<()> {
    let since = Micros::now();
    let file = lab.application_file("a", "b")?;
    let mut child = muster(&["run"], &file)?
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()?;
    let taken = until(|| {
        let found = balloon(lab, "a")?;
        ensure!(found < TAKEN, "{found} bytes, not taken");
        Ok(())
    });
    child.kill()?;
    lab.sidecar("a")?.kill();
    child.wait()?;
    taken?;
    let found = balloon(lab, "a")?;
    ensure!(found < TAKEN, "{found} bytes, and nobody to give them back");
    lab.start_sidecar("a")?;
    until(|| is_balloon(lab, "a", WHOLE))?;
    until(|| is_over(lab))?;
    check_all(lab, "a", since)
}

pub fn given_and_given_back(accel: Accel) -> Result<()> {
    let mut spec = spec(accel, &[GUEST])?;
    spec.traffic.clear();
    spec.guests[0].balloon = true;
    let mut lab = lab(spec)?;
    is_balloon(&lab, "a", WHOLE)?;
    taken_back(&lab)?;
    left_alone(&mut lab)?;
    // There it goes with its balloon, and back without.
    let mut sent = Vec::new();
    for (ends, ballooned) in [(["a", "b"], true), (["b", "a"], false)] {
        let since = Micros::now();
        let report = go(&lab, ends, ballooned, &mut Nobody)?;
        ensure!(report.result == Outcome::Committed, "{:?}", report.reason);
        let vm = &report.vms[0];
        println!("{} bytes sent, {:?}", vm.sent_bytes, vm.balloon);
        if ballooned {
            let told = vm.balloon.context("not told")?;
            let during = told.during_bytes.context("not ballooned")?;
            ensure!(during < TAKEN && told.given_back, "{told:?}");
            ensure!(told.before_bytes == WHOLE, "{told:?}");
        }
        sent.push(vm.sent_bytes);
        until(|| is_balloon(&lab, ends[1], WHOLE))?;
        check_all(&lab, ends[1], since)?;
    }
    ensure!(sent[0] * 4 < sent[1], "{sent:?} bytes sent");
    is_over(&lab)
}
