//! What an application feels of a move: web, app and db in Linux guests, users who ask, and the same
//! move under one policy after the other, with the response times laid under each other.

pub mod accel;
pub mod costs;
mod dummy;
pub mod feel;
pub mod image;
pub mod load;
pub mod machine;
pub mod options;
pub mod probe;
pub mod report;
pub mod search;
pub mod sla;
pub mod spacing;
pub mod stage;
mod tour;
pub mod wan_plan;

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use coordinator::application::Policy;
use coordinator::report::table;
use serde_json::json;

use crate::bench::machine::Machine;
use crate::bench::{output, today};
use crate::clock::Micros;
use crate::demo::kernel;
use crate::qemu::{Accel, installed};
use crate::signals::Interrupt;
use load::{Action, Load, LoadSpec, Pace, Shape};
pub use options::AppOptions;
use options::Sizes;
use report::{Report, Run};
use search::Search;
use stage::Stage;
use tour::{NotCommitted, Tour};

/// The first requests of a load find caches empty and the machine busy.
const FIRST: Duration = Duration::from_secs(2);
/// Every request ends within that, unless the load is more than the application can bear.
const SETTLES: Duration = Duration::from_secs(120);
/// A load that is only tried has to end sooner.
const TRIED_SETTLES: Duration = Duration::from_secs(20);
/// After a load that was too much.
const REST: Duration = Duration::from_secs(3);
/// An application that answers later than that before a move has more load than it can bear.
const SLOW: Duration = Duration::from_secs(1);

/// Runs `muster-testbed app`.
///
/// # Errors
/// Whatever went wrong; everything is cleaned up then.
pub fn app(options: &AppOptions, interrupt: &Interrupt) -> Result<()> {
    let began = Instant::now();
    // Before anything runs: how busy the machine is otherwise is told.
    let machine = Machine::here(installed()?, Accel::Tcg);
    let report = measure(options, interrupt)?;
    let movements: Vec<_> = report.runs.iter().map(|run| run.movement.clone()).collect();
    println!("\n{}\n{}", table::table(&movements), report.text());
    report.write(&options.out)?;
    println!("report:  {}", options.out.join("report.html").display());
    println!("figures: {}", options.out.join("report.json").display());
    if let Some(path) = &options.markdown {
        let mut section = costs::section(&report, costs::command(std::env::args()));
        section.took_s = began.elapsed().as_secs_f64();
        let machine = Machine {
            accelerator: report.accel,
            ..machine
        };
        output::put_section(path, &machine, &today(), &section, options.quick)?;
    }
    Ok(())
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
        let stage = Stage::build(self.stage_spec(self.sizes()?, chosen.accel), interrupt)?;
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
    let mut tour = Tour::begin(&stage, options, sizes, interrupt)?;
    let added_before = added(&stage)?;
    let (runs, search) = if options.find_safe_load {
        let (runs, search) = find_safe_load(&mut tour)?;
        (runs, Some(search))
    } else {
        (rounds(&mut tour)?, None)
    };
    let (acknowledged, added) = (tour.acknowledged, added(&stage)? - added_before);
    ensure!(
        added >= acknowledged,
        "of {acknowledged} writes that were acknowledged the database has {added}"
    );
    let slow = |run: &&Run| run.feel.before_ms > SLOW.as_secs_f64() * 1e3;
    let notices = runs.iter().filter(slow).map(|run| {
        format!(
            "before {} the application took {:.1} s to answer: this machine is too slow or too busy for {}",
            run.title(),
            run.feel.before_ms / 1e3,
            run.load
        )
    });
    Ok(Report {
        schema_version: report::SCHEMA_VERSION,
        environment: environment(options, sizes, accel)?,
        setting: setting(options, sizes, &stage, accel),
        notices: notices.collect(),
        // Runs of different loads have no median.
        costs: match search {
            Some(_) => Vec::new(),
            None => costs::costs(&runs),
        },
        search,
        runs,
        accel,
    })
}

fn start_load(tour: &Tour<'_>, pace: Pace) -> Result<Load> {
    let spec = LoadSpec {
        front: tour.stage.front(),
        pace,
        writes: tour.options.writes,
    };
    let load = Load::start(tour.stage.users()?, &spec)?;
    tour.interrupt.sleep(FIRST)?;
    Ok(load)
}

/// Rounds of one move under every policy, whose order rotates.
fn rounds(tour: &mut Tour<'_>) -> Result<Vec<Run>> {
    let load = start_load(tour, tour.sizes.pace)?;
    load.settle(Micros::now(), SETTLES, tour.interrupt)?;
    let mut policies = tour.options.policies();
    let mut runs = Vec::new();
    for round in 0..tour.options.repeat {
        for policy in &policies {
            let run = tour.go(&load, *policy, round, SETTLES)?;
            ensure!(run.settled, "{}", too_much(&run.load));
            runs.push(run);
        }
        policies.rotate_left(1);
    }
    tour.acknowledge(&load.finish());
    Ok(runs)
}

fn too_much(load: &str) -> String {
    format!("{load}: more than the application can bear here")
}

/// Tries one move at each load that the search asks for.
fn find_safe_load(tour: &mut Tour<'_>) -> Result<(Vec<Run>, Search)> {
    let policy = *tour.options.policies.first().unwrap_or(&Policy::Muster);
    let mut search = Search::new(tour.sizes.pace.low(), tour.options.highest_load);
    let mut runs = Vec::new();
    for number in 0.. {
        let Some(rate) = search.next_rate() else {
            break;
        };
        println!("\ntrying {rate:.1} requests/s");
        tour.sizes.pace = options::open(Shape::constant(rate));
        let load = start_load(tour, tour.sizes.pace)?;
        let violated = match tour.go(&load, policy, number, TRIED_SETTLES) {
            Ok(run) => {
                let violated = violated(&run);
                runs.push(run);
                violated
            }
            Err(error) if error.is::<NotCommitted>() => vec![error.to_string()],
            Err(error) => return Err(error),
        };
        println!("{rate:.1} requests/s: {}", search::told(&violated));
        search.tell(rate, violated);
        // What waits of a load that was too much is not sent any more.
        drop(load);
        tour.interrupt.sleep(REST)?;
    }
    Ok((runs, search))
}

/// The service levels that a run violates; a request that failed is none that was kept.
fn violated(run: &Run) -> Vec<String> {
    let levels = run.service_levels.iter();
    let mut all: Vec<String> = levels
        .filter(|verdict| verdict.violations > 0)
        .map(|verdict| format!("{} p{}", verdict.action.name(), verdict.percentile))
        .collect();
    match run.feel.refused + run.feel.lost {
        0 => {}
        failed => all.push(format!("{failed} failed")),
    }
    if !run.settled {
        all.push(too_much(&run.load));
    }
    all
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
        "{} VMs of {} under {accel}; WAN {} with {} ms round trip and {} % loss, {} of it reserved; load: {}, {} % of the requests write; users {} ms away",
        stage.vms.len(),
        sizes.memory,
        sizes.wan.rate,
        options.rtt.as_millis(),
        options.loss * 100.0,
        sizes.reserve,
        sizes.pace.text(),
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
        "wan_bytes_per_s": sizes.wan.rate,
        "reserve_bytes_per_s": sizes.reserve,
        "rtt_ms": options.rtt.as_secs_f64() * 1e3,
        "loss": options.loss,
        "users_rtt_ms": options.users_rtt.as_secs_f64() * 1e3,
        "load": sizes.pace.text(),
        "writes": options.writes,
        "memory_bytes": sizes.memory,
        "rounds": options.repeat,
        "app_servers": options.apps,
        "hosts_per_site": options.hosts,
        "max_downtime_ms": options.max_downtime.as_secs_f64() * 1e3,
        "window_s": options.window.as_secs_f64(),
    }))
}
