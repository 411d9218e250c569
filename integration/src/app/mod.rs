//! What an application feels of a move: web, app and db in Linux guests, users who ask, and the same
//! move under one policy after the other, with the response times laid under each other.

pub mod accel;
pub mod feel;
pub mod image;
pub mod load;
pub mod machine;
pub mod probe;
pub mod report;
pub mod sla;
pub mod stage;

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use coordinator::RunOptions;
use coordinator::application::Policy;
use coordinator::report::{Outcome, table};
use rate_limiter::{Bytes, BytesPerSecond, units};
use serde_json::json;

use crate::clock::Micros;
use crate::demo::kernel;
use crate::qemu::{Accel, AccelChoice, installed};
use crate::signals::Interrupt;
use crate::watch::Watch;
use feel::Moments;
use load::{Action, Ending, Load, LoadSpec, Sample};
use probe::Probe;
use report::{Away, Report, Run};
use sla::Limit;
use stage::{Stage, StageSpec};

/// Connections of the users.
const CONNECTIONS: usize = 64;
/// The first requests of a load find caches empty and the machine busy.
const FIRST: Duration = Duration::from_secs(2);
/// An application that answers later than that before a move has more load than it can bear.
const SLOW: Duration = Duration::from_secs(1);

/// `muster-testbed app`
#[derive(Debug, Args)]
pub struct AppOptions {
    /// Rate of the WAN between the two sites, each way; default: 200 Mbit/s, with --quick 400.
    #[arg(long)]
    pub wan: Option<BytesPerSecond>,
    /// Round trip time of the WAN, 0 to 100 ms and more.
    #[arg(long, default_value = "50ms", value_parser = units::parse_duration)]
    pub rtt: Duration,
    /// Share of the WAN's frames that are lost, 0 to 1.
    #[arg(long, default_value_t = 0.0)]
    pub loss: f64,
    /// Round trip time between the users and either site.
    #[arg(long, default_value = "10ms", value_parser = units::parse_duration)]
    pub users_rtt: Duration,
    /// Requests per second; default: 20, with --quick 10.
    #[arg(long)]
    pub rate: Option<f64>,
    /// Share of the requests that write, 0 to 1.
    #[arg(long, default_value_t = 0.1)]
    pub writes: f64,
    /// RAM of every VM; default: 192 MiB, with --quick 160.
    #[arg(long)]
    pub memory: Option<Bytes>,
    /// App servers: 1, or 2 for COMMA's four VMs.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=8))]
    pub apps: u8,
    /// Hosts of each site; the VMs are dealt out to them.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=8))]
    pub hosts: u8,
    /// A policy (repeated); default: sequential, parallel and muster.
    #[arg(long = "policy", value_name = "P")]
    pub policies: Vec<Policy>,
    /// kvm, tcg, or auto: KVM where Linux really boots under it.
    #[arg(long, default_value = "auto")]
    pub accel: AccelChoice,
    /// How long the application is watched before each move; default: 15 s, with --quick 4.
    #[arg(long, value_parser = units::parse_duration)]
    pub before: Option<Duration>,
    /// And after it; default: the same.
    #[arg(long, value_parser = units::parse_duration)]
    pub after: Option<Duration>,
    /// The downtime that the group is released for.
    #[arg(long, default_value = "300ms", value_parser = units::parse_duration)]
    pub max_downtime: Duration,
    /// An action's limit, such as home=1s (repeated); default: Cloudstone's: home 1 s, search 2 s,
    /// detail 2 s, add 4 s.
    #[arg(long = "limit", value_name = "ACTION=TIME")]
    pub limits: Vec<Limit>,
    /// The window in which percentiles are judged.
    #[arg(long, default_value = "300s", value_parser = units::parse_duration)]
    pub window: Duration,
    /// Smaller and shorter: some defaults change.
    #[arg(long)]
    pub quick: bool,
    /// Where report.json, report.svg and report.html go.
    #[arg(long, default_value = "target/app")]
    pub out: PathBuf,
}

/// Runs `muster-testbed app`.
///
/// # Errors
/// Whatever went wrong; everything is cleaned up then.
pub fn app(options: &AppOptions, interrupt: &Interrupt) -> Result<()> {
    let report = measure(options, interrupt)?;
    let movements: Vec<_> = report.runs.iter().map(|run| run.movement.clone()).collect();
    println!("\n{}\n{}", table::table(&movements), report.text());
    report.write(&options.out)?;
    println!("report:  {}", options.out.join("report.html").display());
    println!("figures: {}", options.out.join("report.json").display());
    Ok(())
}

/// The quantities whose default depends on --quick.
#[derive(Debug, Clone, Copy)]
struct Sizes {
    wan: BytesPerSecond,
    rate: f64,
    memory: Bytes,
    before: Duration,
    after: Duration,
}

impl AppOptions {
    fn sizes(&self) -> Result<Sizes> {
        let (megabits, rate, mebibytes, seconds) = if self.quick {
            (400, 10.0, 160, 4)
        } else {
            (200, 20.0, 192, 15)
        };
        let before = self.before.unwrap_or(Duration::from_secs(seconds));
        let sizes = Sizes {
            wan: self.wan.unwrap_or(BytesPerSecond(megabits * 125_000)),
            rate: self.rate.unwrap_or(rate),
            memory: self.memory.unwrap_or(Bytes(mebibytes << 20)),
            before,
            after: self.after.unwrap_or(before),
        };
        ensure!(
            (0.1..=10_000.0).contains(&sizes.rate),
            "--rate {}: expected 0.1 to 10000 requests per second",
            sizes.rate
        );
        for (name, share) in [("--loss", self.loss), ("--writes", self.writes)] {
            ensure!(
                (0.0..=1.0).contains(&share),
                "{name} {share}: expected 0 to 1"
            );
        }
        Ok(sizes)
    }
}

impl AppOptions {
    /// Builds the stage, and says how.
    ///
    /// # Errors
    /// What could not be made; nothing is left behind then.
    pub fn stage(&self, interrupt: &Interrupt) -> Result<Stage> {
        let chosen = accel::choose(self.accel, interrupt)?;
        println!("{}", chosen.reason);
        let began = Micros::now();
        let stage = Stage::build(stage_spec(self, self.sizes()?, chosen.accel), interrupt)?;
        let how = if stage.booted {
            "booted, and saved for the next time"
        } else {
            "from snapshots"
        };
        let took = Micros::now().since(began).as_secs_f64();
        println!("{} VMs answer after {took:.1} s ({how})", stage.vms.len());
        Ok(stage)
    }
}

/// Makes the moves and measures them.
///
/// # Errors
/// Whatever went wrong; everything is cleaned up then.
pub fn measure(options: &AppOptions, interrupt: &Interrupt) -> Result<Report> {
    let sizes = options.sizes()?;
    let stage = options.stage(interrupt)?;
    let accel = stage.spec.accel;
    let added_before = added(&stage)?;
    let spec = LoadSpec {
        front: stage.front(),
        rate: sizes.rate,
        writes: options.writes,
        connections: CONNECTIONS,
    };
    let probe = Probe::start(
        stage.users()?,
        stage.vms.iter().map(|vm| vm.address).collect(),
    )?;
    let load = Load::start(stage.users()?, &spec)?;
    interrupt.sleep(FIRST)?;
    load.settle(Micros::now(), interrupt)?;
    let policies = match options.policies.as_slice() {
        [] => vec![Policy::Sequential, Policy::Parallel, Policy::Muster],
        chosen => chosen.to_vec(),
    };
    let mut tour = Tour {
        stage: &stage,
        load: &load,
        probe: &probe,
        options,
        sizes,
        interrupt,
        acknowledged: 0,
        sites: (0, 1),
    };
    let mut runs = Vec::new();
    for policy in policies {
        runs.push(tour.go(policy)?);
    }
    let mut acknowledged = tour.acknowledged;
    acknowledged += writes_in(&load.finish());
    let added = added(&stage)? - added_before;
    ensure!(
        added >= acknowledged,
        "of {acknowledged} writes that were acknowledged the database has {added}"
    );
    let notices = runs
        .iter()
        .filter(|run| run.feel.before_ms > SLOW.as_secs_f64() * 1e3);
    let notices = notices.map(|run| {
        format!(
            "before {} the application took {:.1} s to answer: this machine is too slow or too busy for {} requests/s",
            run.policy,
            run.feel.before_ms / 1e3,
            sizes.rate
        )
    });
    Ok(Report {
        schema_version: report::SCHEMA_VERSION,
        environment: environment(options, sizes, accel)?,
        setting: setting(options, sizes, &stage, accel),
        notices: notices.collect(),
        runs,
    })
}

fn stage_spec(options: &AppOptions, sizes: Sizes, accel: Accel) -> StageSpec {
    let downtime = options.max_downtime.as_millis();
    StageSpec {
        apps: options.apps,
        memory: sizes.memory,
        hosts: options.hosts,
        accel,
        rate: sizes.wan,
        rtt: options.rtt,
        loss: options.loss,
        users_rtt: options.users_rtt,
        settings: vec![format!("max-downtime = \"{downtime}ms\"")],
    }
}

/// Moves there and back.
struct Tour<'a> {
    stage: &'a Stage,
    load: &'a Load,
    probe: &'a Probe,
    options: &'a AppOptions,
    sizes: Sizes,
    interrupt: &'a Interrupt,
    /// Writes that users were told are done.
    acknowledged: u64,
    /// Where the application is, and where it goes next.
    sites: (usize, usize),
}

impl Tour<'_> {
    /// One move, watched from a while before it to a while after it.
    fn go(&mut self, policy: Policy) -> Result<Run> {
        let (stage, options) = (self.stage, self.options);
        let (from, to) = self.sites;
        println!(
            "\n{policy}: site {} → site {}",
            ["a", "b"][from],
            ["a", "b"][to]
        );
        self.acknowledged += writes_in(&self.load.take());
        let since = Micros::now();
        self.interrupt.sleep(self.sizes.before)?;
        let application = stage.application(from, to)?;
        let run = RunOptions {
            policy: Some(policy),
            ..RunOptions::default()
        };
        let carried = (stage.wan_bytes().0, stage.wan_bytes_between_vms().0);
        let mut watch = Watch::new(&run, self.interrupt);
        let movement = coordinator::run(&application, &run, &mut watch)?;
        watch.finish();
        let ended = Micros::now();
        self.interrupt.check()?;
        if movement.result != Outcome::Committed {
            bail!(
                "{policy}: not committed: {}",
                movement.reason.unwrap_or_default()
            );
        }
        let wan_bytes = stage.wan_bytes().0 - carried.0;
        let wan_bytes_between_vms = stage.wan_bytes_between_vms().0 - carried.1;
        self.interrupt.sleep(self.sizes.after)?;
        let end = Micros::now();
        self.load.settle(end, self.interrupt)?;
        let mut samples = self.load.take();
        self.acknowledged += writes_in(&samples);
        samples.retain(|sample| sample.due >= since && sample.due < end);
        samples.sort_by_key(|sample| sample.due);
        let began = u64::try_from(movement.started_at_us).context("a move before 1970")?;
        let began = Micros::from_unix_us(began);
        let moments = Moments {
            began,
            ended: began + Duration::from_secs_f64(movement.total_s.max(0.0)),
        };
        let away = stage.vms.iter().map(|vm| {
            let of_it = movement.vms.iter().find(|other| other.name == vm.name);
            Away {
                name: vm.name.clone(),
                inside_s: of_it.and_then(|of_it| of_it.downtime_s),
                outside_s: self
                    .probe
                    .longest_gap(vm.address, began, ended)
                    .as_secs_f64(),
            }
        });
        self.sites = (to, from);
        Ok(Run {
            policy: policy.to_string(),
            feel: feel::feel(&samples, moments),
            service_levels: sla::judge(&samples, &options.limits, options.window),
            downtimes: away.collect(),
            wan_bytes,
            wan_bytes_between_vms,
            movement,
            began,
            samples,
        })
    }
}

fn writes_in(samples: &[Sample]) -> u64 {
    let done = |s: &&Sample| s.action == Action::Add && s.ending == Ending::Answered;
    u64::try_from(samples.iter().filter(done).count()).unwrap_or(u64::MAX)
}

/// How many writes the database has.
fn added(stage: &Stage) -> Result<u64> {
    let front = stage.front();
    let said = stage
        .users()?
        .enter(|| load::ask_once(front, Action::Count, 0))??;
    said.trim()
        .parse()
        .with_context(|| format!("the database counts `{said}` writes"))
}

fn setting(options: &AppOptions, sizes: Sizes, stage: &Stage, accel: Accel) -> String {
    format!(
        "{} VMs of {} under {accel}; WAN {} with {} ms round trip and {} % loss; {} requests/s, {} % of them writes; users {} ms away",
        stage.vms.len(),
        sizes.memory,
        sizes.wan,
        options.rtt.as_millis(),
        options.loss * 100.0,
        sizes.rate,
        options.writes * 100.0,
        options.users_rtt.as_millis()
    )
}

fn environment(options: &AppOptions, sizes: Sizes, accel: Accel) -> Result<serde_json::Value> {
    let qemu = installed()?;
    Ok(json!({
        "qemu_version": qemu.version,
        "qemu": qemu.build,
        "accelerator": accel.to_string(),
        "machine": qemu.machine,
        "kernel": kernel(),
        "cores": std::thread::available_parallelism().map_or(0, usize::from),
        "wan_bytes_per_s": sizes.wan,
        "rtt_ms": options.rtt.as_secs_f64() * 1e3,
        "loss": options.loss,
        "users_rtt_ms": options.users_rtt.as_secs_f64() * 1e3,
        "requests_per_s": sizes.rate,
        "writes": options.writes,
        "memory_bytes": sizes.memory,
        "app_servers": options.apps,
        "hosts_per_site": options.hosts,
        "max_downtime_ms": options.max_downtime.as_secs_f64() * 1e3,
        "window_s": options.window.as_secs_f64(),
    }))
}
