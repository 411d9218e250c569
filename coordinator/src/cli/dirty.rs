//! `muster dirty`.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicU8;
use std::time::Duration;

use anyhow::Context;
use coordinator::application::{Application, ControlAddress};
use coordinator::dirty::show::Show;
use coordinator::dirty::{Wish, measure};
use rate_limiter::units::parse_duration;
use sidecar::protocol::codec::dirty_event_line;

use super::signals;

/// What stands on its command line.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The VM's name on its host.
    vm: String,
    /// The sidecar of its host: unix:PATH or tcp:HOST:PORT.
    #[arg(
        long,
        value_name = "ADDRESS",
        default_value = "unix:/run/muster/control.sock"
    )]
    sidecar: ControlAddress,
    /// An application file that says on which hosts it may be, instead.
    #[arg(long, value_name = "FILE", conflicts_with = "sidecar")]
    file: Option<PathBuf>,
    /// Length of an interval, 50ms to 60s.
    #[arg(long, value_name = "TIME", default_value = "1s", value_parser = parse_duration)]
    interval: Duration,
    /// How long it is measured; 0s: until Ctrl-C.
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = parse_duration)]
    duration: Duration,
    /// Predicts what will be dirty after this delay; may be given several times.
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = parse_duration)]
    delay: Vec<Duration>,
    /// One JSON object a line: the sidecar's events.
    #[arg(long)]
    json: bool,
}

impl Args {
    fn sidecars(&self) -> anyhow::Result<Vec<ControlAddress>> {
        let Some(file) = &self.file else {
            return Ok(vec![self.sidecar.clone()]);
        };
        let app = Application::load(file)?;
        let vm = app.vms.iter().find(|vm| vm.name == self.vm);
        let vm = vm.with_context(|| format!("{}: no VM `{}`", file.display(), self.vm))?;
        let mut sidecars = vec![app.host(vm.from).control.clone()];
        if vm.to != vm.from {
            sidecars.push(app.host(vm.to).control.clone());
        }
        Ok(sidecars)
    }
}

pub(super) fn run(args: Args) -> anyhow::Result<u8> {
    let sidecars = args.sidecars()?;
    let wish = Wish {
        vm: args.vm,
        interval: args.interval,
        duration: args.duration,
        delays: args.delay,
    };
    let interrupt = Arc::new(AtomicU8::new(0));
    signals::watch(&interrupt, signals::MEASUREMENT).context("cannot watch for signals")?;
    let mut show = Show::new();
    measure(&sidecars, &wish, &interrupt, &mut |event, at_us| {
        if args.json {
            let line = dirty_event_line(event, at_us);
            super::out(String::from_utf8_lossy(&line).trim_end());
        } else {
            show.event(event);
        }
    })?;
    Ok(0)
}
