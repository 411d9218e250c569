//! The proof that local disks lose nothing: groups whose guests write numbered blocks all the time are
//! moved, and are taken back by kills and cuts at named steps of the move.
//!
//! - At the barrier, when all have arrived and nothing is decided, the images of both sides are compared,
//!   and both with what the guest says was acknowledged.
//! - After every move, committed or not, the images are compared with that again, and nothing of a
//!   mirror is left in any QEMU.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use coordinator::application::Policy;
use coordinator::engine::Step;
use coordinator::observer::{GroupName, Observer};
use coordinator::report::Outcome;
use coordinator::{MoveReport, RunOptions};
use nix::sys::signal::Signal;
use rate_limiter::{Bytes, BytesPerSecond};
use serde::Serialize;
use serde_json::json;
use sidecar::config::ImageFormat;

use crate::bench::machine::Machine;
use crate::bench::today;
use crate::clock::Micros;
use crate::guest::{DiskSpec, GuestSpec, check};
use crate::lab::verify::{Seen, read_ticks, verify_paused, verify_stopped, wait_for_all};
use crate::lab::{Lab, LabSpec};
use crate::memory::GuestRam;
use crate::net::Cut;
use crate::qemu::{Accel, AccelChoice, accel, installed};
use crate::signals::Interrupt;

const LIMIT: Duration = Duration::from_secs(20);
const LINK: BytesPerSecond = BytesPerSecond(100_000_000);
const SHORT: u32 = 5;
const LONG: u32 = 50;

/// `muster-testbed disks`
#[derive(Debug, Args)]
pub struct ProofOptions {
    /// 50 committed and 50 aborted moves (about 10 minutes) instead of 5 and 5.
    #[arg(long)]
    pub long: bool,
    /// kvm, tcg, or auto: KVM where a guest really runs under it.
    #[arg(long, default_value = "auto")]
    pub accel: AccelChoice,
    /// Where the result goes as JSON.
    #[arg(long)]
    pub json: Option<PathBuf>,
    /// Where it goes as a page of Markdown.
    #[arg(long)]
    pub document: Option<PathBuf>,
}

/// What was done, all of it as it must be.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Proof {
    /// Group moves that were committed.
    pub committed: u32,
    /// Group moves that were taken back.
    pub aborted: u32,
    /// What took them back, how often.
    pub faults: BTreeMap<String, u32>,
    /// Writes that the guests' disks had acknowledged in the end.
    pub writes: u64,
    /// How long it took.
    pub seconds: f64,
}

/// What is done, to the destination where nothing else is said.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Blow {
    Kill,
    Stop,
    DropNbd,
    CutLink,
    /// The sidecar is killed, and started again as by a service manager.
    RestartSidecar(SidecarOf),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum SidecarOf {
    Source,
    Destination,
}

/// A fault: its name, when, and what.
type Fault = (&'static str, fn(&Step) -> bool, Blow);

/// The first five are in every phase of a move.
const FAULTS: [Fault; 14] = [
    (
        "NBD connection dropped when started",
        |step| matches!(step, Step::Started),
        Blow::DropNbd,
    ),
    (
        "source's sidecar killed when a disk is copied",
        |step| matches!(step, Step::DisksCopied { .. }),
        Blow::RestartSidecar(SidecarOf::Source),
    ),
    (
        "link cut when all are held",
        |step| matches!(step, Step::AllHeld),
        Blow::CutLink,
    ),
    (
        "destination's sidecar killed when all are paused",
        |step| matches!(step, Step::AllStopped { .. }),
        Blow::RestartSidecar(SidecarOf::Destination),
    ),
    (
        "QEMU killed in stop-and-copy",
        |step| matches!(step, Step::Continued),
        Blow::Kill,
    ),
    (
        "QEMU killed when its disks are copied",
        |step| matches!(step, Step::DisksCopied { .. }),
        Blow::Kill,
    ),
    (
        "source's sidecar killed when all are paused",
        |step| matches!(step, Step::AllStopped { .. }),
        Blow::RestartSidecar(SidecarOf::Source),
    ),
    (
        "QEMU killed when all are paused",
        |step| matches!(step, Step::AllStopped { .. }),
        Blow::Kill,
    ),
    (
        "destination's sidecar killed when started",
        |step| matches!(step, Step::Started),
        Blow::RestartSidecar(SidecarOf::Destination),
    ),
    (
        "QEMU killed when prepared",
        |step| matches!(step, Step::Prepared),
        Blow::Kill,
    ),
    (
        "source's sidecar killed when armed",
        |step| matches!(step, Step::Armed { .. }),
        Blow::RestartSidecar(SidecarOf::Source),
    ),
    (
        "QEMU stopped when all are paused",
        |step| matches!(step, Step::AllStopped { .. }),
        Blow::Stop,
    ),
    (
        "link cut in stage two",
        |step| matches!(step, Step::Turn),
        Blow::CutLink,
    ),
    (
        "NBD connection dropped when armed",
        |step| matches!(step, Step::Armed { .. }),
        Blow::DropNbd,
    ),
];

/// Runs it and says what was done.
///
/// # Errors
/// A write is lost, an image differs, a move does not end as it must.
pub fn disks(options: &ProofOptions, interrupt: &Interrupt) -> Result<()> {
    let chosen = accel::choose(options.accel)?;
    println!("{}", chosen.reason);
    let moves = if options.long { LONG } else { SHORT };
    let proof = prove(chosen.accel, moves, interrupt, &|line| println!("{line}"))?;
    println!(
        "{} committed and {} aborted moves, {} acknowledged writes: none is lost ({:.0} s)",
        proof.committed, proof.aborted, proof.writes, proof.seconds
    );
    let write = |path: &PathBuf, text: String| {
        std::fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
    };
    if let Some(path) = &options.json {
        write(path, serde_json::to_string_pretty(&proof)? + "\n")?;
    }
    if let Some(path) = &options.document {
        let machine = Machine::here(installed()?, chosen.accel);
        write(path, document(&proof, &machine, &today(), options.long))?;
    }
    Ok(())
}

/// The result as a page.
fn document(proof: &Proof, machine: &Machine, date: &str, long: bool) -> String {
    let command = if long {
        "muster-testbed disks --long"
    } else {
        "muster-testbed disks"
    };
    let mut text = format!(
        "# Local disks lose no write\n\n\
         `{command}` ({:.0} s), {date}, on {}.\n\n\
         {} moves of a group were committed and {} taken back, one after the other in turns. Two of its \
         three guests write numbered blocks to their disks all the time, {} of them were acknowledged in \
         the end, and none is lost: at the barrier the images of both sides were the same, and after \
         every move each guest's disk held what it was told.\n\n\
         | taken back by | moves |\n| --- | --- |\n",
        proof.seconds,
        machine.line(),
        proof.committed,
        proof.aborted,
        proof.writes,
    );
    for (fault, moves) in &proof.faults {
        text += &format!("| {fault} | {moves} |\n");
    }
    text
}

/// As many committed moves as aborted ones, one after the other in turns.
///
/// # Errors
/// A write is lost, an image differs, a move does not end as it must.
pub fn prove(accel: Accel, moves: u32, interrupt: &Interrupt, say: &dyn Fn(&str)) -> Result<Proof> {
    let begun = Instant::now();
    let mut lab = Lab::build(spec(accel)?, interrupt)?;
    let mut proof = Proof::default();
    let mut hosts = ("a", "b");
    for (index, fault) in (0..moves).zip(FAULTS.iter().cycle()) {
        interrupt.check()?;
        commit(&mut lab, hosts).with_context(|| format!("committed move {}", index + 1))?;
        proof.committed += 1;
        hosts = (hosts.1, hosts.0);
        let guest = if index % 2 == 0 { "log" } else { "db" };
        let name = format!("{guest}: {}", fault.0);
        let reason = take_back(&mut lab, hosts, guest, fault).with_context(|| name.clone())?;
        proof.aborted += 1;
        *proof.faults.entry(fault.0.to_owned()).or_default() += 1;
        say(&format!(
            "{}/{moves}: committed; {name}: {reason}",
            index + 1
        ));
    }
    for guest in lab.spec.guests.iter().filter(|guest| guest.disk.is_some()) {
        let mut monitor = lab.monitor(&guest.name, hosts.0)?;
        let ram = GuestRam::open(&mut monitor, guest.memory)?;
        proof.writes += u64::from(check::state(&ram)?.disk_done);
    }
    ensure!(proof.writes > 100, "the guests wrote nothing");
    proof.seconds = begun.elapsed().as_secs_f64();
    Ok(proof)
}

fn spec(accel: Accel) -> Result<LabSpec> {
    let guest = |text: &str, size, rate, write_blocking| -> Result<GuestSpec> {
        let mut guest: GuestSpec = text.parse()?;
        guest.disk = Some(DiskSpec {
            size: Bytes(size),
            rate: BytesPerSecond(rate),
            filled: false,
            write_blocking,
            format: ImageFormat::Raw,
            least: None,
        });
        Ok(guest)
    };
    Ok(LabSpec {
        hosts: vec!["a".into(), "b".into()],
        guests: vec![
            "web:16MiB:1MB/s:2MiB".parse()?,
            guest("db:32MiB:2MB/s:4MiB", 24 << 20, 2_000_000, false)?,
            guest("log:16MiB:1MB/s:2MiB", 8 << 20, 500_000, true)?,
        ],
        link: LINK,
        accel,
        traffic: Vec::new(),
        adopting: Vec::new(),
        resident: Vec::new(),
        programs: Vec::new(),
        settings: vec!["lease = \"3s\"".into()],
    })
}

struct Watch<'a> {
    lab: &'a mut Lab,
    hosts: (&'a str, &'a str),
    fault: Option<(&'a str, &'a Fault)>,
    struck: Option<Result<()>>,
    compared: Option<Result<()>>,
}

impl Observer for Watch<'_> {
    fn step(&mut self, _group: &GroupName, step: &Step) {
        if let (Some((guest, (_, at, blow))), None) = (self.fault, &self.struck) {
            if at(step) {
                self.struck = Some(strike(self.lab, guest, self.hosts, *blow));
            }
        }
        if matches!(step, Step::AllArrived) {
            let (from, to) = self.hosts;
            let mut names = self.lab.spec.guests.iter().map(|guest| &guest.name);
            let all = names.try_for_each(|name| verify_paused(self.lab, name, from, to));
            self.compared = Some(all);
        }
    }
}

fn strike(lab: &mut Lab, guest: &str, hosts: (&str, &str), blow: Blow) -> Result<()> {
    match blow {
        Blow::Kill => Ok(lab.qemu(guest, hosts.1)?.signal(Signal::SIGKILL)?),
        Blow::Stop => Ok(lab.qemu(guest, hosts.1)?.signal(Signal::SIGSTOP)?),
        Blow::CutLink => Ok(lab.network.link(hosts.0, hosts.1)?.cut(Cut::Silent)?),
        Blow::RestartSidecar(of) => {
            let host = match of {
                SidecarOf::Source => hosts.0,
                SidecarOf::Destination => hosts.1,
            };
            Ok(lab.start_sidecar(host)?)
        }
        Blow::DropNbd => {
            wait_for_mirror(lab, guest, hosts.0)?;
            let mut monitor = lab.monitor(guest, hosts.1)?;
            monitor.execute("nbd-server-stop", json!({}), LIMIT)?;
            Ok(())
        }
    }
}

/// Until something of a guest's disk is copied.
///
/// # Errors
/// Nothing is.
pub fn wait_for_mirror(lab: &Lab, guest: &str, host: &str) -> Result<()> {
    let mut source = lab.monitor(guest, host)?;
    let by = Instant::now() + LIMIT;
    loop {
        let jobs = source.execute("query-block-jobs", json!({}), LIMIT)?;
        if jobs[0]["offset"].as_u64() > Some(0) {
            return Ok(());
        }
        ensure!(
            Instant::now() < by,
            "nothing of {guest}'s disk is copied: {jobs}"
        );
        thread::sleep(Duration::from_millis(10));
    }
}

fn go(watch: &mut Watch<'_>) -> Result<MoveReport> {
    let options = RunOptions {
        policy: Some(Policy::Muster),
        ..RunOptions::default()
    };
    let app = watch.lab.application(watch.hosts.0, watch.hosts.1)?;
    Ok(coordinator::run(&app, &options, watch)?)
}

fn commit(lab: &mut Lab, hosts: (&str, &str)) -> Result<()> {
    let since = Micros::now();
    let mut watch = Watch {
        lab,
        hosts,
        fault: None,
        struck: None,
        compared: None,
    };
    let report = go(&mut watch)?;
    if report.result != Outcome::Committed {
        bail!("{}: {:?}", report.result, report.reason);
    }
    let Watch { lab, compared, .. } = watch;
    compared.context("they never arrived")??;
    check_all(lab, hosts.1, since)
}

fn take_back(lab: &mut Lab, hosts: (&str, &str), guest: &str, fault: &Fault) -> Result<String> {
    let since = Micros::now();
    let mut watch = Watch {
        lab,
        hosts,
        fault: Some((guest, fault)),
        struck: None,
        compared: None,
    };
    let report = go(&mut watch);
    let Watch { lab, struck, .. } = watch;
    lab.network.link(hosts.0, hosts.1)?.restore()?;
    let report = report?;
    struck.context("the step never came")??;
    if report.result != Outcome::RolledBack {
        bail!("{}: {:?}", report.result, report.reason);
    }
    check_all(lab, hosts.0, since)?;
    report.reason.context("no reason")
}

/// Every guest runs on this host, has every write, and nothing is left of a move.
fn check_all(lab: &Lab, host: &str, since: Micros) -> Result<()> {
    wait_for_all(lab, host, LIMIT)?;
    for guest in &lab.spec.guests {
        let name = &guest.name;
        let mut seen = Seen::default();
        read_ticks(lab, name, since, &mut seen);
        ensure!(seen.continuous, "{:?}", seen.problem);
        verify_stopped(lab, name, host)?;
        let mut monitor = lab.monitor(name, host)?;
        let jobs = monitor.execute("query-block-jobs", json!({}), LIMIT)?;
        ensure!(jobs == json!([]), "{name}: {jobs}");
        let flat = json!({ "flat": true });
        let nodes = monitor.execute("query-named-block-nodes", flat, LIMIT)?;
        let text = nodes.to_string();
        for left in [
            "\"muster-nbd",
            "\"muster-rate",
            "\"muster-set",
            "\"muster-measured",
        ] {
            ensure!(!text.contains(left), "{name}: {left} is left: {text}");
        }
    }
    Ok(())
}
