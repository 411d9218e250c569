//! `muster dirty` against guests whose dirtying is known.

use std::io::{BufRead, BufReader, Lines, Read};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use coordinator::application::{ControlAddress, HostId, Policy};
use coordinator::client::Client;
use coordinator::engine::Step;
use coordinator::observer::{GroupName, Nobody, Observer};
use coordinator::report::Outcome;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rate_limiter::{Bytes, BytesPerSecond};
use serde_json::{Value, json};
use sidecar::config::ImageFormat;
use sidecar::protocol::command::Command as Ask;
use sidecar::protocol::dirty::DirtyVmArgs;
use sidecar::protocol::types::QemuBuild;
use testbed::clock::Micros;
use testbed::guest::{DiskSpec, PAGE};
use testbed::lab::{Lab, program};
use testbed::qemu::{Accel, DISK_NODE, installed};

use super::LIMIT;
use super::groups::{check_all, go, lab, migration_settings, spec};

const MIB: u64 = 1 << 20;
/// Written 12 times a second and more: each interval finds all of the set.
const GUEST: [&str; 1] = ["db:128MiB:400MB/s:32MiB"];
const SET_BYTES: u64 = 32 * MIB;
/// What the guest dirties beside its set: its counters, below 1 MiB.
const BESIDE_BYTES: u64 = 16 * PAGE;

fn is_patched() -> Result<bool> {
    Ok(installed()?.build == QemuBuild::Patched)
}

fn one(accel: Accel) -> Result<Lab> {
    let mut spec = spec(accel, &GUEST)?;
    spec.traffic.clear();
    lab(spec)
}

fn dirty(lab: &Lab, vm: &str, arguments: &[&str]) -> Result<Command> {
    let mut command = Command::new(program("muster", "MUSTER")?);
    let sidecar = format!("unix:{}", lab.control("a").display());
    command.args(["dirty", vm, "--sidecar", &sidecar, "--json"]);
    command.args(arguments).stdin(Stdio::null());
    Ok(command)
}

/// A `muster dirty` that runs.
struct Running {
    child: Child,
    lines: Lines<BufReader<ChildStdout>>,
}

impl Running {
    fn start(lab: &Lab, arguments: &[&str]) -> Result<Self> {
        let mut child = dirty(lab, "db", arguments)?
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()?;
        let stdout = child.stdout.take().context("no output")?;
        let lines = BufReader::new(stdout).lines();
        Ok(Self { child, lines })
    }

    /// Reads until an event of this name; its data.
    fn wait_for(&mut self, name: &str) -> Result<Value> {
        for line in &mut self.lines {
            let event: Value = serde_json::from_str(&line?)?;
            if event["event"] == name {
                return Ok(event["data"].clone());
            }
        }
        bail!("no {name}: {}", self.end()?.1);
    }

    fn signal(&self, signal: Signal) -> Result<()> {
        Ok(kill(Pid::from_raw(self.child.id().try_into()?), signal)?)
    }

    /// Its exit code, and what it said to the user.
    fn end(&mut self) -> Result<(Option<i32>, String)> {
        let by = Instant::now() + LIMIT;
        let status = loop {
            if let Some(status) = self.child.try_wait()? {
                break status;
            }
            ensure!(Instant::now() < by, "`muster dirty` does not end");
            std::thread::sleep(Duration::from_millis(5));
        };
        let mut said = String::new();
        if let Some(mut stderr) = self.child.stderr.take() {
            stderr.read_to_string(&mut said)?;
        }
        Ok((status.code(), said))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Runs it to its end; the data of its events, by name.
fn measured(lab: &Lab, arguments: &[&str]) -> Result<Vec<(String, Value)>> {
    let output = dirty(lab, "db", arguments)?.output()?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(output.status.code() == Some(0), "{said}");
    let text = String::from_utf8(output.stdout)?;
    let events = text.lines().map(|line| {
        let mut event: Value = serde_json::from_str(line)?;
        let name = event["event"].as_str().context("no name")?.to_owned();
        Ok((name, event["data"].take()))
    });
    events.collect()
}

/// Whether QEMU exports, asked on the testbed's own monitor.
fn exports(lab: &Lab) -> Result<bool> {
    let mut monitor = lab.monitor("db", "a")?;
    let info = monitor.execute("query-dirty-log-export", json!({}), LIMIT)?;
    Ok(info["status"] != "inactive")
}

/// Every figure against what the guest is known to write.
pub fn figures(accel: Accel) -> Result<()> {
    let lab = one(accel)?;
    let before = migration_settings(&lab, "a")?;
    let since = Micros::now();
    let arguments = ["--interval", "500ms", "--duration", "3s", "--delay", "1s"];
    let events = measured(&lab, &arguments)?;
    let names: Vec<&str> = events.iter().map(|(name, _)| &**name).collect();
    ensure!(names[0] == "DIRTY_STARTED", "{names:?}");
    ensure!(names.last() == Some(&"DIRTY_ENDED"), "{names:?}");
    let rounds = events.iter().filter(|(name, _)| name == "DIRTY_ROUND");
    let rounds: Vec<&Value> = rounds.map(|(_, data)| data).collect();
    ensure!((5..=7).contains(&rounds.len()), "{names:?}");
    let started = &events[0].1;
    ensure!(started["memory_bytes"] == 128 * MIB, "{started}");
    if is_patched()? {
        for round in &rounds {
            exported(round)?;
        }
        foreseen(rounds[rounds.len() - 1])?;
        ensure!(!exports(&lab)?, "the export goes on");
    } else {
        rate_only(started, &rounds, accel)?;
    }
    ensure!(
        migration_settings(&lab, "a")? == before,
        "migration settings were left changed"
    );
    check_all(&lab, "a", since)
}

fn number(data: &Value, name: &str) -> Result<u64> {
    data[name]
        .as_u64()
        .with_context(|| format!("{name}: {data}"))
}

fn is_the_set(bytes: u64) -> bool {
    (SET_BYTES..=SET_BYTES + BESIDE_BYTES).contains(&bytes)
}

fn exported(round: &Value) -> Result<()> {
    ensure!(
        round["source"] == "export" && round["missed"] == 0,
        "{round}"
    );
    let dirtied = number(round, "dirtied_bytes")?;
    ensure!(is_the_set(dirtied), "{dirtied}");
    let set = number(round, "working_set_bytes")?;
    ensure!(is_the_set(set), "{set}");
    let duration = number(round, "duration_us")?;
    ensure!((490_000..1_500_000).contains(&duration), "{duration}");
    let expected = dirtied * 1_000_000 / duration;
    let rate = number(round, "dirty_rate_bytes_per_s")?;
    ensure!(rate.abs_diff(expected) < MIB, "{rate}, not {expected}");
    Ok(())
}

/// What the last interval knows: the whole set, which is stable, and where it is.
fn foreseen(round: &Value) -> Result<()> {
    ensure!(round["working_set_stable"] == true, "{round}");
    let predicted = &round["predicted"][0];
    ensure!(predicted["delay_ms"] == 1000, "{predicted}");
    let bytes = number(predicted, "dirty_bytes")?;
    println!(
        "rate {} B/s, set {} B, predicted {bytes} B",
        round["dirty_rate_bytes_per_s"], round["working_set_bytes"]
    );
    ensure!(is_the_set(bytes), "{bytes}");
    let heat = &round["heat"];
    let percent = heat["percent"].as_array().context("no heat map")?;
    let cell = number(heat, "span_bytes")? / percent.len() as u64;
    // The set begins at 2 MiB of RAM, which is the first in the map; cells are equal to a page, which
    // adds up to less than 1 MiB.
    let set = 3 * MIB..SET_BYTES + MIB;
    for (index, percent) in (0..).zip(percent) {
        let (first, end) = (index * cell, (index + 1) * cell);
        let percent = percent.as_u64().context("no number")?;
        if set.contains(&first) && end <= set.end {
            ensure!(percent == 100, "{percent} % at {first}: {heat}");
        }
        if first >= SET_BYTES + 3 * MIB {
            ensure!(percent == 0, "{percent} % at {first}: {heat}");
        }
    }
    Ok(())
}

/// Stock QEMU: 32 MiB each half second are 64 MiB/s.
fn rate_only(started: &Value, rounds: &[&Value], accel: Accel) -> Result<()> {
    ensure!(started["source"] == "calc-dirty-rate", "{started}");
    let note = started["note"].as_str().unwrap_or_default();
    ensure!(note.contains("only the dirty rate"), "{note}");
    let last = rounds[rounds.len() - 1];
    for absent in ["working_set_bytes", "working_set_stable", "heat"] {
        ensure!(last[absent].is_null(), "{last}");
    }
    ensure!(last["predicted"] == json!([]), "{last}");
    let mean = number(last, "mean_dirty_rate_bytes_per_s")? / MIB;
    println!("{accel}: {mean} MiB/s in the mean");
    // Counted, or 64 samples of pages each time: 64 ± 6 MiB/s (one sigma of six intervals).
    let expected = if accel == Accel::Kvm {
        58..=68
    } else {
        34..=94
    };
    ensure!(expected.contains(&mean), "{mean} MiB/s");
    Ok(())
}

/// Tries to measure while everything is stopped for the decision.
struct Intruder<'a> {
    lab: &'a Lab,
    said: Option<Result<(Option<i32>, String)>>,
}

impl Observer for Intruder<'_> {
    fn step(&mut self, _group: &GroupName, step: &Step) {
        if matches!(step, Step::AllArrived) {
            let output = dirty(self.lab, "db", &[]).and_then(|mut c| Ok(c.output()?));
            self.said = Some(output.map(|output| {
                let said = String::from_utf8_lossy(&output.stderr).into_owned();
                (output.status.code(), said)
            }));
        }
    }
}

/// A move takes the monitor of a VM that is measured; one that is moved is not measured.
pub fn yields(accel: Accel) -> Result<()> {
    let mut spec = spec(accel, &["web:32MiB:1MB/s:2MiB", "db:64MiB:4MB/s:8MiB"])?;
    spec.settings.push("max-downtime = \"300ms\"".into());
    let lab = lab(spec)?;
    let mut running = Running::start(&lab, &["--interval", "200ms", "--duration", "0s"])?;
    running.wait_for("DIRTY_ROUND")?;
    let since = Micros::now();
    let mut intruder = Intruder {
        lab: &lab,
        said: None,
    };
    let report = go(&lab, Policy::Muster, "a", "b", &mut intruder)?;
    ensure!(report.result == Outcome::Committed, "{:?}", report.reason);
    let ended = running.wait_for("DIRTY_ENDED")?;
    ensure!(ended["reason"] == "migration", "{ended}");
    let (code, said) = running.end()?;
    ensure!(code == Some(1) && said.contains("precedence"), "{said}");
    let (code, said) = intruder.said.context("never arrived")??;
    ensure!(
        code == Some(1) && said.contains("being moved in run"),
        "{said}"
    );
    check_all(&lab, "b", since)?;
    // Where it is now, an application file finds it.
    let file = lab.application_file("a", "b")?;
    let output = Command::new(program("muster", "MUSTER")?)
        .args([
            "dirty",
            "db",
            "--interval",
            "1s",
            "--duration",
            "1s",
            "--file",
        ])
        .arg(&file)
        .output()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(output.status.code() == Some(0), "{said}");
    let heat = if is_patched()? {
        "a cell"
    } else {
        "no heat map"
    };
    for part in ["db: dirty rate", "working set", heat] {
        ensure!(text.contains(part), "`{part}` is not in: {text}");
    }
    // And back, with nothing in the way.
    let report = go(&lab, Policy::Muster, "b", "a", &mut Nobody)?;
    ensure!(report.result == Outcome::Committed, "{:?}", report.reason);
    Ok(())
}

/// Whatever is asked wrongly, and whoever goes away: nothing stays behind.
pub fn misuse() -> Result<()> {
    let mut spec = spec(Accel::Tcg, &GUEST)?;
    spec.traffic.clear();
    spec.guests[0].disk = Some(DiskSpec {
        size: Bytes(4 * MIB),
        rate: BytesPerSecond(200_000),
        filled: false,
        write_blocking: false,
        format: ImageFormat::Raw,
        least: None,
    });
    let mut lab = lab(spec)?;
    let since = Micros::now();
    for (vm, arguments, expected) in [
        ("nobody", &[][..], "not on this host"),
        ("../db", &[], "no name for a VM"),
        ("db", &["--interval", "0s"], "interval"),
        ("db", &["--interval", "1h"], "interval"),
        ("db", &["--interval", "2s", "--duration", "1s"], "shorter"),
        ("db", &["--delay", "2h"], "delays_ms"),
    ] {
        let output = dirty(&lab, vm, arguments)?.output()?;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure!(
            output.status.code() == Some(1),
            "{vm} {arguments:?}: {said}"
        );
        ensure!(said.contains(expected), "{vm} {arguments:?}: {said}");
    }
    let endless = ["--interval", "100ms", "--duration", "0s"];
    let mut first = Running::start(&lab, &endless)?;
    first.wait_for("DIRTY_ROUND")?;
    let output = dirty(&lab, "db", &endless)?.output()?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(output.status.code() == Some(1), "{said}");
    ensure!(said.contains("being measured already"), "{said}");
    // The first goes on, until Ctrl-C.
    first.wait_for("DIRTY_ROUND")?;
    first.signal(Signal::SIGINT)?;
    first.wait_for("DIRTY_ENDED")?;
    let (code, said) = first.end()?;
    ensure!(code == Some(0), "{said}");
    free(&lab, false)?;

    // Its client is killed.
    let mut second = Running::start(&lab, &endless)?;
    second.wait_for("DIRTY_ROUND")?;
    second.signal(Signal::SIGKILL)?;
    free(&lab, false)?;

    // The sidecar is stopped.
    let mut third = Running::start(&lab, &endless)?;
    third.wait_for("DIRTY_ROUND")?;
    lab.sidecar("a")?.signal(Signal::SIGTERM)?;
    let (code, said) = third.end()?;
    ensure!(code == Some(1), "{said}");
    lab.start_sidecar("a")?;
    free(&lab, false)?;

    // The sidecar is killed: QEMU goes on exporting until the next measurement.
    let mut fourth = Running::start(&lab, &endless)?;
    fourth.wait_for("DIRTY_ROUND")?;
    lab.sidecar("a")?.kill();
    let (code, said) = fourth.end()?;
    ensure!(code == Some(1), "{said}");
    lab.start_sidecar("a")?;
    free(&lab, true)?;
    // Of its disk it has removed what was left.
    wait_for_no_bitmap(&lab)?;
    let events = measured(&lab, &["--interval", "100ms", "--duration", "300ms"])?;
    let mut rounds = events.iter().filter(|(name, _)| name == "DIRTY_ROUND");
    let (_, last) = rounds.next_back().context("no interval")?;
    let disk = &last["disks"][0];
    ensure!(disk["node"] == DISK_NODE, "{last}");
    ensure!(disk["dirty_set_bytes"].as_u64() > Some(0), "{last}");
    free(&lab, false)?;
    wait_for_no_bitmap(&lab)?;
    check_all(&lab, "a", since)
}

/// Until nothing of a measurement is left in the guest's disk.
fn wait_for_no_bitmap(lab: &Lab) -> Result<()> {
    let by = Instant::now() + LIMIT;
    loop {
        let mut monitor = lab.monitor("db", "a")?;
        let flat = json!({ "flat": true });
        let nodes = monitor.execute("query-named-block-nodes", flat, LIMIT)?;
        if !nodes.to_string().contains("muster-measured") {
            return Ok(());
        }
        ensure!(Instant::now() < by, "bitmaps are left: {nodes}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Waits until the VM is measured no more; whether QEMU still exports then.
fn free(lab: &Lab, exported: bool) -> Result<()> {
    let by = Instant::now() + LIMIT;
    let address = ControlAddress::Unix(lab.control("a"));
    let client = Client::connect_to([(HostId(0), address)]);
    for (_, connected) in client.wait_connected(LIMIT) {
        connected?;
    }
    let vm = "db".to_owned();
    let query = [(HostId(0), Ask::QueryDirty(DirtyVmArgs { vm }))];
    loop {
        match client.ask(&query, LIMIT).pop().context("no answer")? {
            Err(error) if error.to_string().contains("not being measured") => break,
            Err(error) => bail!("{error}"),
            Ok(_) => ensure!(Instant::now() < by, "still being measured"),
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    if !is_patched()? {
        return Ok(());
    }
    while exports(lab)? != exported {
        ensure!(Instant::now() < by, "QEMU exports: {}", !exported);
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}
