//! `muster-sidecar`: the daemon on each host.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use sidecar::config::Config;
use sidecar::daemon::Daemon;

/// Carries, paces, holds and commits the live migrations of this host's virtual machines.
#[derive(Debug, Parser)]
#[command(version)]
struct Options {
    /// The configuration file (TOML).
    #[arg(long, default_value = "/etc/muster/sidecar.toml")]
    config: PathBuf,
    /// Check the configuration and exit.
    #[arg(long)]
    check: bool,
}

fn run(options: &Options) -> anyhow::Result<()> {
    let config = Config::load(&options.config)?;
    if options.check {
        println!("{}: valid, host {}", options.config.display(), config.host);
        return Ok(());
    }
    Daemon::open(config)?.serve()
}

fn main() -> ExitCode {
    match run(&Options::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("muster-sidecar: {error:#}");
            ExitCode::FAILURE
        }
    }
}
