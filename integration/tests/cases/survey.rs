//! What an application file leaves out is measured, and what that finds against what the guests and
//! the link are known to do.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::AtomicU8;
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use coordinator::Application;
use coordinator::application::VmProfile;
use coordinator::scheduler::plan::Stage;
use coordinator::survey::before_a_plan;
use serde_json::{Value, json};
use sidecar::protocol::types::QemuBuild;
use testbed::clock::Micros;
use testbed::lab::{Lab, program};
use testbed::qemu::{Accel, installed};

use super::LIMIT;
use super::groups::{check_all, lab, spec};

const MIB: u64 = 1 << 20;
/// The sets are written whole every two seconds.
const GUESTS: [&str; 2] = ["web:32MiB:2MB/s:4MiB", "db:128MiB:8MB/s:16MiB"];
/// What a guest dirties beside what it is asked to: its counters.
const BESIDE_BYTES: u64 = 128 << 10;
/// Kept for the application.
const RESERVE_BYTES_PER_S: u64 = 5_000_000;
const KEYS: [&str; 5] = [
    "bandwidth",
    "memory",
    "dirty-rate",
    "max-dirty-rate",
    "writable-working-set",
];

/// The application without what can be measured, but with a reserve.
fn file(lab: &Lab) -> Result<PathBuf> {
    let text = std::fs::read_to_string(lab.application_file("a", "b")?)?;
    let is_known = |line: &&str| !KEYS.iter().any(|key| line.starts_with(&format!("{key} =")));
    let lines: Vec<&str> = text.lines().filter(is_known).collect();
    let reserve = format!("[application]\nreserve = \"{RESERVE_BYTES_PER_S}B/s\"");
    let text = lines.join("\n").replace("[application]", &reserve);
    let path = lab.directory().join("unknown.toml");
    std::fs::write(&path, text)?;
    Ok(path)
}

/// Of the path, and of each VM.
fn says_what_was_measured(notes: &str) -> Result<()> {
    for part in [
        "bandwidth from a to b",
        "VM web: measured",
        "VM db: measured",
        "reserved",
    ] {
        ensure!(notes.contains(part), "`{part}` is not in: {notes}");
    }
    Ok(())
}

/// Fills the application in; the notes.
fn survey(app: &mut Application) -> Result<Vec<String>> {
    let interrupt = AtomicU8::new(0);
    Ok(before_a_plan(app, Stage::Whole, &interrupt, &mut |what| {
        println!("{what}");
    })?)
}

/// The rates are those that were asked for; on stock QEMU in steps of 1 MiB/s, rounded down.
fn check_profile(profile: &VmProfile, memory: u64, rate: u64, set: u64) -> Result<()> {
    let is_patched = installed()?.build == QemuBuild::Patched;
    ensure!(
        profile.memory.is_some_and(|found| found.0 == memory),
        "{profile:?}"
    );
    let mean = profile.dirty_rate.context("no rate")?.0;
    let most = profile.max_dirty_rate.context("no highest rate")?.0;
    let least = if is_patched {
        rate / 10 * 9
    } else {
        (rate / 10 * 9).saturating_sub(MIB)
    };
    ensure!(
        (least..=rate / 10 * 12 + BESIDE_BYTES).contains(&mean),
        "{profile:?}"
    );
    ensure!(
        (mean..=rate / 10 * 15 + BESIDE_BYTES).contains(&most),
        "{profile:?}"
    );
    let found = profile.writable_working_set.map(|found| found.0);
    if is_patched {
        let bounds = set..=set + BESIDE_BYTES;
        ensure!(
            found.is_some_and(|found| bounds.contains(&found)),
            "{profile:?}"
        );
    } else {
        ensure!(found.is_none(), "{profile:?}");
    }
    Ok(())
}

/// Bandwidth, memory, rates and sets.
pub fn figures(accel: Accel) -> Result<()> {
    let lab = lab(spec(accel, &GUESTS)?)?;
    let since = Micros::now();
    let file = file(&lab)?;
    let mut app = Application::load(&file)?;
    ensure!(app.allowance.usable().is_none(), "the bandwidth is known");
    let notes = survey(&mut app)?;
    println!("{}", notes.join("\n"));
    let link = lab.spec.link.0;
    let found = app.allowance.bandwidth.context("no bandwidth")?.0;
    ensure!(
        (link / 100 * 90..=link).contains(&found),
        "{found} B/s on a link of {link} B/s"
    );
    let usable = app.allowance.usable().context("nothing to use")?.0;
    ensure!(usable == found - RESERVE_BYTES_PER_S, "{usable}");
    check_profile(&app.vms[0].profile, 32 * MIB, 2_000_000, 4 * MIB)?;
    check_profile(&app.vms[1].profile, 128 * MIB, 8_000_000, 16 * MIB)?;

    // And as a plan.
    let output = muster(&["plan", "--json"], &file)?.output()?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(output.status.code() == Some(0), "{said}");
    let plan: Value = serde_json::from_slice(&output.stdout)?;
    ensure!(plan["converges"] == true, "{plan}");
    let notes = plan["notes"].to_string();
    says_what_was_measured(&notes)?;
    check_all(&lab, "a", since)
}

fn muster(arguments: &[&str], file: &Path) -> Result<Command> {
    let mut command = Command::new(program("muster", "MUSTER")?);
    command.args(arguments).arg(file).stdin(Stdio::null());
    Ok(command)
}

/// A guest that boots while it is measured writes to every page once: its rate is what it does then.
pub fn booting(accel: Accel) -> Result<()> {
    let mut spec = spec(accel, &GUESTS[1..])?;
    spec.traffic.clear();
    let lab = lab(spec)?;
    let mut app = Application::load(&file(&lab)?)?;
    app.probe = false;
    let mut monitor = lab.monitor("db", "a")?;
    monitor.execute("stop", json!({}), LIMIT)?;
    monitor.execute("system_reset", json!({}), LIMIT)?;
    let measuring = std::thread::spawn(move || {
        let notes = survey(&mut app)?;
        anyhow::Ok((app, notes))
    });
    let query = match installed()?.build {
        QemuBuild::Patched => "query-dirty-log-export",
        QemuBuild::Stock => "query-dirty-rate",
    };
    let by = Instant::now() + LIMIT;
    while monitor.execute(query, json!({}), LIMIT)?["status"] != "measuring" {
        ensure!(Instant::now() < by, "it is not measured");
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    monitor.execute("cont", json!({}), LIMIT)?;
    let Ok(found) = measuring.join() else {
        bail!("the measurement panicked");
    };
    let (app, notes) = found?;
    println!("{}", notes.join("\n"));
    ensure!(
        notes
            .iter()
            .any(|note| note.contains("measured again after a burst")),
        "{notes:?}"
    );
    check_profile(&app.vms[0].profile, 128 * MIB, 8_000_000, 16 * MIB)
}

/// A move measures before it begins, and says what.
pub fn before_a_move(accel: Accel) -> Result<()> {
    let lab = lab(spec(accel, &GUESTS)?)?;
    let since = Micros::now();
    let file = file(&lab)?;
    let output = muster(&["run", "--json", "-"], &file)?.output()?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(output.status.code() == Some(0), "{said}");
    let report: Value = serde_json::from_slice(&output.stdout)?;
    ensure!(report["result"] == "committed", "{report}");
    let notices = report["notices"].to_string();
    says_what_was_measured(&notices)?;
    check_all(&lab, "b", since)
}
