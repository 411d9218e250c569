//! The testbed on the command line.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};
use rate_limiter::BytesPerSecond;
use testbed::app::{self, AppOptions};
use testbed::bench::{self, BenchOptions};
use testbed::clock::Micros;
use testbed::demo::{self, DemoOptions};
use testbed::faults::{self, FaultOptions, steer};
use testbed::guest::{GuestSpec, check};
use testbed::memory::GuestRam;
use testbed::net::{Network, throughput};
use testbed::process::Isolation;
use testbed::proof::{self, ProofOptions};
use testbed::qemu::{AccelChoice, Launch, Role, accel};
use testbed::rootless::become_root;
use testbed::signals::{Interrupt, Interrupted};
use testbed::ticks::Collector;

const HOST: &str = "here";
const LIMIT: Duration = Duration::from_secs(30);

/// Hosts, links and guests to try Muster on.
#[derive(Debug, Parser)]
#[command(version, about)]
struct Arguments {
    #[command(subcommand)]
    command: Subcommands,
}

#[derive(Debug, Subcommand)]
enum Subcommands {
    /// Boots one guest; shows how it ticks and dirties its memory; verifies its RAM at the end.
    Guest {
        /// NAME:MEMORY:DIRTY_RATE:WORKING_SET
        #[arg(default_value = "db:512MiB:12MB/s:64MiB")]
        guest: GuestSpec,
        /// kvm, tcg, or auto: KVM where a guest really runs under it.
        #[arg(long, default_value = "auto")]
        accel: AccelChoice,
        /// For how long.
        #[arg(long, default_value_t = 5)]
        seconds: u64,
    },
    /// Moves three guests between two hosts under each policy and shows what each costs.
    Demo(DemoOptions),
    /// Moves web, app and db in Linux guests over a WAN under each policy, and shows what users feel.
    App(Box<AppOptions>),
    /// Measures what Muster promises, in pairs, and says which bounds were kept.
    Bench(BenchOptions),
    /// Plays the table of faults: signals to every process in every phase of a move.
    Faults(FaultOptions),
    /// Proves that local disks lose no write: committed moves, and moves that are taken back.
    Disks(ProofOptions),
    /// The coordinator of a cell of that table.
    #[command(hide = true)]
    FaultsCoordinate {
        /// The application file.
        file: PathBuf,
        /// Where the table listens.
        socket: PathBuf,
    },
    /// Joins two hosts by a link and measures what it carries each way.
    Link {
        /// The rate to which it is shaped.
        #[arg(long, default_value = "400Mbit/s")]
        rate: BytesPerSecond,
        /// For how long it is measured, each way.
        #[arg(long, default_value_t = 2)]
        seconds: u64,
    },
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match start(arguments.command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("muster-testbed: {error:#}");
            ExitCode::from(if error.is::<Interrupted>() { 130 } else { 1 })
        }
    }
}

fn start(command: Subcommands) -> Result<()> {
    // One guest alone needs no host.
    if !matches!(command, Subcommands::Guest { .. }) {
        become_root()?;
    }
    run(command)
}

fn run(command: Subcommands) -> Result<()> {
    let interrupt = Interrupt::install().context("cannot handle signals")?;
    match command {
        Subcommands::Guest {
            guest,
            accel,
            seconds,
        } => show_guest(&guest, accel, seconds, &interrupt),
        Subcommands::Demo(options) => demo::demo(&options, &interrupt),
        Subcommands::App(options) => app::app(&options, &interrupt),
        Subcommands::Bench(options) => bench::bench(&options, &interrupt),
        Subcommands::Faults(options) => faults::faults(&options, &interrupt),
        Subcommands::Disks(options) => proof::disks(&options, &interrupt),
        Subcommands::FaultsCoordinate { file, socket } => {
            // Its exit code is told over the socket.
            steer::coordinate(&file, &socket).map(|_| ())
        }
        Subcommands::Link { rate, seconds } => show_link(rate, seconds, &interrupt),
    }
}

fn show_guest(
    spec: &GuestSpec,
    choice: AccelChoice,
    seconds: u64,
    interrupt: &Interrupt,
) -> Result<()> {
    let params = spec.params()?;
    let chosen = accel::choose(choice)?;
    println!("{}", chosen.reason);
    let directory = tempfile::Builder::new().prefix("muster-").tempdir()?;
    let collector = Collector::start(directory.path())?;
    let ticks = collector.listen(&spec.name, HOST, spec.tick_period())?;
    let launch = Launch::new(spec, chosen.accel, directory.path(), HOST, ticks)?;
    let isolation = Isolation {
        netns: None,
        log: Some(directory.path().join("log")),
    };
    let start = Micros::now();
    let mut qemu = launch.start(Role::Boot, &directory.path().join("qmp"), &isolation)?;
    let first = collector.wait_for_tick(&spec.name, HOST, LIMIT)?;
    println!("{}: first tick after {:.0?}", spec.name, first.since(start));
    let ram = GuestRam::open(&mut qemu.monitor, spec.memory)?;
    let mut before = (Micros::now(), check::state(&ram)?);
    for _ in 0..seconds {
        interrupt.sleep(Duration::from_secs(1))?;
        qemu.process.must_run()?;
        let now = (Micros::now(), check::state(&ram)?);
        let written = u64::from(now.1.writes.wrapping_sub(before.1.writes)) * 4096;
        let took = now.0.since(before.0).as_micros().max(1);
        let rate = u128::from(written) * 1_000_000 / took;
        let record = collector.record(&spec.name).window(before.0..now.0);
        let stats = record.gaps().context("the guest does not tick")?;
        println!(
            "{:7.1} ticks/s, gaps p50 {:.2} p99 {:.2} max {:.2} ms; dirty rate {} (asked {})",
            stats.hz,
            stats.p50_ms,
            stats.p99_ms,
            stats.max_ms,
            BytesPerSecond(u64::try_from(rate)?),
            spec.dirty_rate,
        );
        before = now;
    }
    qemu.monitor.execute("stop", serde_json::json!({}), LIMIT)?;
    let start = Micros::now();
    let state = check::check(&ram, &params)?;
    let checked = Micros::now();
    let hash = ram.hash()?;
    println!(
        "RAM verified in {:.0?}: {} ticks, {} page writes; hash {hash:032x} in {:.0?}",
        checked.since(start),
        state.ticks,
        state.writes,
        Micros::now().since(checked),
    );
    Ok(())
}

fn show_link(rate: BytesPerSecond, seconds: u64, interrupt: &Interrupt) -> Result<()> {
    let network = Network::create(&["a", "b"], rate)?;
    for (from, to) in [("a", "b"), ("b", "a")] {
        for _ in 0..seconds {
            interrupt.check()?;
            let time = Duration::from_secs(1);
            let result = throughput(network.host(from)?, network.host(to)?, time)?;
            println!(
                "{from} to {to}: {:.1} Mbit/s of TCP payload (shaped to {:.1} Mbit/s)",
                mbit(result.rate),
                mbit(rate),
            );
        }
    }
    Ok(())
}

fn mbit(rate: BytesPerSecond) -> f64 {
    f64::from(u32::try_from(rate.0 / 125).unwrap_or(u32::MAX)) / 1e3
}
