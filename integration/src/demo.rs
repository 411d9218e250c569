//! The demo: an application of three tiers moves between two hosts, once under each policy, and
//! the runs are laid side by side.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::Args;
use coordinator::application::Policy;
use coordinator::report::{Outcome, table, timeline};
use coordinator::{MoveReport, RunOptions};
use rate_limiter::{BytesPerSecond, units};
use serde_json::{Value, json};

use crate::clock::Micros;
use crate::guest::GuestSpec;
use crate::lab::verify::{Seen, read_ticks, verify_stopped, wait_for_all};
use crate::lab::{Lab, LabSpec};
use crate::qemu::{Accel, AccelChoice, accel, installed};
use crate::signals::Interrupt;
use crate::watch::Watch;

/// Guests of the default application: small, middle and large dirty rate and working set.
const GUESTS: [&str; 3] = [
    "web:128MiB:1MB/s:4MiB",
    "app:256MiB:4MB/s:16MiB",
    "db:512MiB:10MB/s:48MiB",
];
/// Who talks to whom in the default application, in bytes per second.
const TRAFFIC: [(&str, &str, u64); 2] = [("web", "app", 200_000), ("app", "db", 500_000)];
const SETTLE_LIMIT: Duration = Duration::from_secs(10);

/// `muster-testbed demo`
#[derive(Debug, Args)]
pub struct DemoOptions {
    /// Rate of the link between the two hosts, each way.
    #[arg(long, default_value = "400Mbit/s")]
    pub link: BytesPerSecond,
    /// A guest, NAME:MEMORY:DIRTY_RATE:WORKING_SET (repeated); default: web, app and db.
    #[arg(long = "vm", value_name = "VM")]
    pub vms: Vec<GuestSpec>,
    /// A policy: sequential, parallel, lll, vmbuddies or muster (repeated); default: sequential, parallel and muster.
    #[arg(long = "policy", value_name = "P")]
    pub policies: Vec<Policy>,
    /// How often each policy is run.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub runs: u32,
    /// kvm, tcg, or auto: KVM where a guest really runs under it.
    #[arg(long, default_value = "auto")]
    pub accel: AccelChoice,
    /// The downtime that the group is released for.
    #[arg(long, default_value = "300ms", value_parser = units::parse_duration)]
    pub max_downtime: Duration,
    /// Where the report goes.
    #[arg(long, default_value = "target/demo/report.json")]
    pub json: PathBuf,
    /// Where the picture goes.
    #[arg(long, default_value = "target/demo/timeline.svg")]
    pub svg: PathBuf,
}

/// One move with what was seen of it from outside.
#[derive(Debug)]
struct Run {
    report: MoveReport,
    seen: Vec<(String, Seen)>,
}

/// Runs the demo.
///
/// # Errors
/// Whatever went wrong; everything is cleaned up then.
pub fn demo(options: &DemoOptions, interrupt: &Interrupt) -> Result<()> {
    let chosen = accel::choose(options.accel)?;
    let spec = lab_spec(options, chosen.accel)?;
    for path in [&options.json, &options.svg] {
        if let Some(parent) = path.parent() {
            std::fs::create_dir_all(parent)
                .with_context(|| format!("cannot make {}", parent.display()))?;
        }
    }
    let qemu = installed()?;
    println!(
        "Muster moves {} guests between two hosts.",
        spec.guests.len()
    );
    println!(
        "  QEMU {} ({}), {}",
        qemu.version, qemu.build, chosen.reason
    );
    println!(
        "  link {} each way, of which Muster may use {}",
        options.link,
        lab_share(&spec)
    );
    for guest in &spec.guests {
        println!(
            "  {:<6} {} of memory, writes {} into a working set of {}",
            guest.name, guest.memory, guest.dirty_rate, guest.working_set
        );
    }
    let policies = match options.policies.as_slice() {
        [] => vec![Policy::Sequential, Policy::Parallel, Policy::Muster],
        chosen => chosen.to_vec(),
    };
    let lab = Lab::build(spec, interrupt)?;
    println!(
        "Two hosts with a sidecar each are up, the guests tick on host {}.",
        names(&lab).0
    );
    let runs = run_all(&lab, &policies, options.runs, interrupt)?;
    drop(lab);
    write_results(options, chosen.accel, &runs)
}

fn lab_spec(options: &DemoOptions, accel: Accel) -> Result<LabSpec> {
    let mut guests = options.vms.clone();
    let mut traffic = Vec::new();
    if guests.is_empty() {
        for text in GUESTS {
            guests.push(text.parse().context("a default guest")?);
        }
        traffic
            .extend(TRAFFIC.map(|(a, b, rate)| (a.to_owned(), b.to_owned(), BytesPerSecond(rate))));
    } else {
        // No matrix was given: each guest talks to the one before it.
        for pair in guests.windows(2) {
            let rate = BytesPerSecond(TRAFFIC[0].2);
            traffic.push((pair[0].name.clone(), pair[1].name.clone(), rate));
        }
    }
    for (index, guest) in guests.iter().enumerate() {
        if guests[..index].iter().any(|other| other.name == guest.name) {
            bail!("--vm: there are two guests called `{}`", guest.name);
        }
    }
    Ok(LabSpec {
        hosts: vec!["a".to_owned(), "b".to_owned()],
        guests,
        link: options.link,
        accel,
        traffic,
        adopting: Vec::new(),
        resident: Vec::new(),
        programs: Vec::new(),
        settings: vec![format!(
            "max-downtime = \"{}ms\"",
            options.max_downtime.as_millis()
        )],
    })
}

fn lab_share(spec: &LabSpec) -> BytesPerSecond {
    crate::lab::payload(spec.link)
}

fn names(lab: &Lab) -> (&str, &str) {
    (&lab.spec.hosts[0], &lab.spec.hosts[1])
}

fn run_all(lab: &Lab, policies: &[Policy], times: u32, interrupt: &Interrupt) -> Result<Vec<Run>> {
    let mut runs = Vec::new();
    let (mut from, mut to) = names(lab);
    for policy in (0..times).flat_map(|_| policies.iter().copied()) {
        interrupt.check()?;
        println!("\n{policy}: host {from} → host {to}");
        let run = run_once(lab, policy, from, to, interrupt)?;
        interrupt.check()?;
        let committed = run.report.result == Outcome::Committed;
        let reason = run.report.reason.clone();
        let problems: Vec<String> = run
            .seen
            .iter()
            .filter_map(|(_, seen)| seen.problem.clone())
            .collect();
        runs.push(run);
        if !problems.is_empty() {
            bail!("{policy}: {}", problems.join("; "));
        }
        if !committed {
            bail!("{policy}: not committed: {}", reason.unwrap_or_default());
        }
        std::mem::swap(&mut from, &mut to);
    }
    Ok(runs)
}

fn run_once(lab: &Lab, policy: Policy, from: &str, to: &str, interrupt: &Interrupt) -> Result<Run> {
    let app = lab.application(from, to)?;
    let options = RunOptions {
        policy: Some(policy),
        ..RunOptions::default()
    };
    let mut watch = Watch::new(&options, interrupt);
    let since = Micros::now();
    let report = coordinator::run(&app, &options, &mut watch)?;
    watch.finish();
    let mut seen = Vec::new();
    if report.result == Outcome::Committed {
        wait_for_all(lab, to, SETTLE_LIMIT)?;
    }
    for guest in &lab.spec.guests {
        let mut one = Seen::default();
        read_ticks(lab, &guest.name, since, &mut one);
        if report.result == Outcome::Committed {
            match verify_stopped(lab, &guest.name, to) {
                Ok(()) => one.memory_verified = true,
                Err(error) => one.problem = Some(format!("{}: {error:#}", guest.name)),
            }
        }
        seen.push((guest.name.clone(), one));
    }
    Ok(Run { report, seen })
}

fn write_results(options: &DemoOptions, accel: Accel, runs: &[Run]) -> Result<()> {
    let reports: Vec<MoveReport> = runs.iter().map(|run| run.report.clone()).collect();
    println!("\n{}", table::table(&reports));
    for run in runs {
        let parts: Vec<String> = run
            .seen
            .iter()
            .map(|(name, seen)| one_guest(name, seen))
            .collect();
        println!(
            "{:<10} as the guests saw it: {}",
            run.report.policy,
            parts.join(", ")
        );
    }
    let json = serde_json::to_string_pretty(&report_json(options, accel, runs)?)?;
    write(&options.json, &(json + "\n"))?;
    write(&options.svg, &timeline::timeline(&reports))?;
    println!("\nreport:   {}", options.json.display());
    println!("timeline: {}", options.svg.display());
    Ok(())
}

fn one_guest(name: &str, seen: &Seen) -> String {
    let downtime = seen
        .guest_downtime_s
        .map_or("?".to_owned(), |s| format!("{:.0} ms", s * 1e3));
    let memory = if seen.memory_verified {
        "memory verified"
    } else {
        "MEMORY NOT VERIFIED"
    };
    format!("{name} stood still for {downtime} ({memory})")
}

fn write(path: &Path, text: &str) -> Result<()> {
    std::fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
}

/// The report: every run as the coordinator reports it, with what the testbed saw added.
fn report_json(options: &DemoOptions, accel: Accel, runs: &[Run]) -> Result<Value> {
    let qemu = installed()?;
    let mut list = Vec::new();
    for run in runs {
        let mut value = serde_json::to_value(&run.report)?;
        let vms = value["vms"].as_array_mut().into_iter().flatten();
        for vm in vms {
            let name = vm["name"].as_str().unwrap_or_default().to_owned();
            let seen = run
                .seen
                .iter()
                .find(|(other, _)| *other == name)
                .map(|(_, seen)| seen);
            vm["guest_downtime_s"] = json!(seen.and_then(|seen| seen.guest_downtime_s));
            vm["memory_verified"] = json!(seen.is_some_and(|seen| seen.memory_verified));
            vm["continuous"] = json!(seen.is_some_and(|seen| seen.continuous));
        }
        list.push(value);
    }
    Ok(json!({
        "schema_version": coordinator::report::SCHEMA_VERSION,
        "environment": {
            "qemu_version": qemu.version,
            "qemu": qemu.build,
            "accelerator": accel.to_string(),
            "machine": qemu.machine,
            "kernel": kernel(),
            "cores": std::thread::available_parallelism().map_or(0, usize::from),
            "link_bytes_per_s": options.link,
            "max_downtime_ms": options.max_downtime.as_millis(),
        },
        "runs": list,
    }))
}

pub(crate) fn kernel() -> String {
    std::fs::read_to_string("/proc/sys/kernel/osrelease")
        .unwrap_or_default()
        .trim()
        .to_owned()
}
