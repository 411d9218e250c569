//! The `muster` program as operators use it, against real sidecars and QEMUs.

use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use testbed::clock::Micros;
use testbed::lab::verify::{Seen, read_ticks, wait_for_all};
use testbed::lab::{Lab, program};
use testbed::qemu::Accel;

use super::LIMIT;
use super::groups::{GUESTS, lab, spec};

pub fn muster(arguments: &[&str], file: &Path) -> Result<Command> {
    let mut command = Command::new(program("muster", "MUSTER")?);
    command.args(arguments).arg(file).stdin(Stdio::null());
    Ok(command)
}

fn text(output: &Output) -> String {
    let both = [&output.stdout[..], &output.stderr[..]].concat();
    String::from_utf8_lossy(&both).into_owned()
}

pub fn check() -> Result<()> {
    let mut lab = lab(spec(Accel::Tcg, &GUESTS)?)?;
    let file = lab.application_file("a", "b")?;
    let output = muster(&["check"], &file)?.output()?;
    ensure!(output.status.code() == Some(0), "{}", text(&output));
    // A wrong identity, a VM that is not there, and a sidecar that is gone: all at once.
    let web = lab.guest("web")?.uuid.to_string();
    let broken = std::fs::read_to_string(&file)?
        .replace(&web, "11111111-2222-4333-8444-555555555555")
        .replace("\"db\"", "\"dbx\"");
    let path = lab.directory().join("broken.toml");
    std::fs::write(&path, broken)?;
    lab.sidecar("b")?.kill();
    let output = muster(&["check"], &path)?.output()?;
    let said = text(&output);
    ensure!(output.status.code() == Some(1), "{said}");
    for word in ["UUID", "dbx", "host b"] {
        ensure!(said.contains(word), "`{word}` is not in: {said}");
    }
    std::fs::write(&path, "version = 1\n[application]\nbandwith = \"4MB/s\"\n")?;
    let output = muster(&["check"], &path)?.output()?;
    let said = text(&output);
    ensure!(output.status.code() == Some(1), "{said}");
    for word in ["broken.toml", "3", "bandwith", "bandwidth"] {
        ensure!(said.contains(word), "`{word}` is not in: {said}");
    }
    Ok(())
}

pub fn run_and_status() -> Result<()> {
    let lab = lab(spec(Accel::Tcg, &GUESTS)?)?;
    let file = lab.application_file("a", "b")?;
    let (json, svg) = (
        lab.directory().join("r.json"),
        lab.directory().join("r.svg"),
    );
    let mut command = muster(&["run"], &file)?;
    let output = command
        .arg("--json")
        .arg(&json)
        .arg("--svg")
        .arg(&svg)
        .output()?;
    ensure!(output.status.code() == Some(0), "{}", text(&output));
    let report: Value = serde_json::from_str(&std::fs::read_to_string(&json)?)?;
    ensure!(report["result"] == "committed" && report["policy"] == "muster");
    ensure!(report["vms"].as_array().is_some_and(|vms| vms.len() == 2));
    ensure!(std::fs::read_to_string(&svg)?.starts_with("<svg"));
    wait_for_all(&lab, "b", LIMIT)?;
    let output = muster(&["status"], &file)?.output()?;
    ensure!(output.status.code() == Some(0), "{}", text(&output));
    ensure!(text(&output).contains("committed"), "{}", text(&output));
    // Where the VMs are not any more, nothing can be moved from.
    let output = muster(&["run"], &file)?.output()?;
    ensure!(output.status.code() == Some(1), "{}", text(&output));
    Ok(())
}

/// Starts a move over a slow link and waits until its pre-copy shows.
fn begin(lab: &Lab) -> Result<(std::process::Child, Micros)> {
    let file = lab.application_file("a", "b")?;
    let since = Micros::now();
    let child = muster(&["run"], &file)?
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .context("muster run")?;
    let by = Instant::now() + LIMIT;
    while lab.network.link("a", "b")?.carried()?.first.1.0 < 1_000_000 {
        ensure!(Instant::now() < by, "no pre-copy within {LIMIT:?}");
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    Ok((child, since))
}

fn stayed(lab: &Lab, since: Micros) -> Result<()> {
    wait_for_all(lab, "a", LIMIT)?;
    for guest in &lab.spec.guests {
        let mut seen = Seen::default();
        read_ticks(lab, &guest.name, since, &mut seen);
        ensure!(
            seen.continuous && seen.guest_downtime_s.is_none(),
            "{seen:?}"
        );
    }
    Ok(())
}

fn slow() -> Result<Lab> {
    let mut spec = spec(Accel::Tcg, &GUESTS)?;
    spec.link = rate_limiter::BytesPerSecond(5_000_000);
    lab(spec)
}

pub fn interrupted() -> Result<()> {
    let lab = slow()?;
    let (child, since) = begin(&lab)?;
    kill(Pid::from_raw(i32::try_from(child.id())?), Signal::SIGINT)?;
    let output = child.wait_with_output()?;
    ensure!(output.status.code() == Some(2), "{}", text(&output));
    stayed(&lab, since)
}

pub fn aborted() -> Result<()> {
    let lab = slow()?;
    let (child, since) = begin(&lab)?;
    let file = lab.application_file("a", "b")?;
    let abort = muster(&["abort"], &file)?.output()?;
    let output = child.wait_with_output()?;
    ensure!(output.status.code() == Some(2), "{}", text(&output));
    ensure!(abort.status.code() == Some(2), "{}", text(&abort));
    stayed(&lab, since)
}
