//! `muster traffic`.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, bail};
use coordinator::application::Application;
use coordinator::client::Client;
use coordinator::traffic::{Counted, count, hosts};
use rate_limiter::units::parse_duration;
use rate_limiter::{Bytes, BytesPerSecond};

use super::out;

const CONNECT_WITHIN: Duration = Duration::from_secs(3);

/// What stands on its command line.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The application file; its VMs need `mac`.
    file: PathBuf,
    /// For how long, 100ms to 60s.
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = parse_duration)]
    duration: Duration,
    /// As JSON.
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &Args) -> anyhow::Result<u8> {
    let app = Application::load(&args.file)?;
    let client = Client::connect(&app, &hosts(&app));
    for (host, result) in client.wait_connected(CONNECT_WITHIN) {
        if let Err(error) = result {
            bail!("host {}: {error}", app.host(host).name);
        }
    }
    let counted = count(&app, &client, args.duration)?;
    if args.json {
        out(&serde_json::to_string_pretty(&counted).context("cannot write the matrix")?);
    } else {
        out(text(&counted).trim_end());
    }
    Ok(0)
}

/// As entries of an application file.
fn text(counted: &Counted) -> String {
    let mut text = format!("# counted for {:.1} s\n", counted.duration_s);
    if counted.pairs.is_empty() {
        text += "# no VM sent another one anything\n";
    }
    for pair in &counted.pairs {
        let [one, other] = &pair.between;
        text += &format!(
            "\n# {one} to {other} {}, back {}; {} frames; {}\n[[traffic]]\n\
             between = [\"{one}\", \"{other}\"]\nrate = \"{}B/s\"\n",
            Bytes(pair.sent_bytes),
            Bytes(pair.received_bytes),
            pair.packets,
            BytesPerSecond(pair.rate_bytes_per_s),
            pair.rate_bytes_per_s,
        );
    }
    text
}
