//! Probing the paths that VMs are going to take.
//!
//! All at once, as they are used in a move: what they carry together is the bandwidth. A rate that
//! still grows when a probe ends is probed once more, for longer.

use std::sync::atomic::{AtomicU8, Ordering};
use std::time::{Duration, Instant};

use rate_limiter::{Bytes, BytesPerSecond};
use sidecar::protocol::command::Command;
use sidecar::protocol::probe::{ProbeAddress, ProbeArgs, ProbeListenArgs, Probed};
use uuid::Uuid;

use super::seconds;
use crate::application::{Application, HostId};
use crate::client::{Client, Message};
use crate::conductor::{Randomness, SystemRandom};

/// Paths that are probed at most: what a sidecar takes at once.
const MAX_PATHS: usize = 16;
const ANSWER_WITHIN: Duration = Duration::from_secs(3);
/// Beyond its own time, a probe is connected, ended and told within this.
const SLACK: Duration = Duration::from_secs(4);
/// The interrupt flag is looked at this often.
const TICK: Duration = Duration::from_millis(50);

/// How long and how much a probe may be.
#[derive(Debug, Clone, Copy)]
struct Bounds {
    duration: Duration,
    bytes: Bytes,
}

const FIRST: Bounds = Bounds {
    duration: Duration::from_millis(500),
    bytes: Bytes(64 << 20),
};
/// Where the first has not settled.
const SECOND: Bounds = Bounds {
    duration: Duration::from_secs(2),
    bytes: Bytes(256 << 20),
};

/// What the probes found.
#[derive(Debug, Clone, Default)]
pub(super) struct Found {
    /// All paths together; `None` where one of them could not be probed.
    pub rate: Option<BytesPerSecond>,
    /// What was measured.
    pub notes: Vec<String>,
    /// What was not.
    pub errors: Vec<String>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Path {
    from: HostId,
    to: HostId,
    probe: Uuid,
    token: String,
}

/// The paths of all VMs, each once.
fn paths(app: &Application) -> Vec<(HostId, HostId)> {
    let mut all: Vec<_> = app.vms.iter().map(|vm| (vm.from, vm.to)).collect();
    all.sort_unstable();
    all.dedup();
    all
}

/// Probes them.
pub(super) fn probe(app: &Application, client: &Client, interrupt: &AtomicU8) -> Found {
    let mut paths = paths(app);
    let left_out = paths.len().saturating_sub(MAX_PATHS);
    paths.truncate(MAX_PATHS);
    let mut results = round(client, &paths, FIRST, interrupt);
    let grows = |result: &Result<Probed, String>| matches!(result, Ok(found) if !found.settled);
    if results.iter().any(grows) && results.iter().all(Result::is_ok) {
        results = round(client, &paths, SECOND, interrupt);
    }
    let name = |host: HostId| app.host(host).name.as_str();
    let mut found = Found::default();
    let mut sum = 0_u64;
    for ((from, to), result) in paths.iter().zip(&results) {
        let path = format!("{} to {}", name(*from), name(*to));
        match result.as_ref().map(|found| (found, found.bytes_per_s)) {
            Ok((probed, Some(rate))) => {
                sum = sum.saturating_add(rate);
                let grows = if probed.settled {
                    ""
                } else {
                    "; it still grew, and may be more"
                };
                found.notes.push(format!(
                    "bandwidth from {path}: {}, probed for {} with {} (round trip {} ms){grows}",
                    BytesPerSecond(rate),
                    seconds(Duration::from_micros(probed.duration_us)),
                    Bytes(probed.acked_bytes),
                    probed.rtt_us.div_ceil(1000),
                ));
            }
            Ok((probed, None)) => {
                let error = probed.error.as_deref().unwrap_or("nothing was found");
                found.errors.push(format!("{path}: {error}"));
            }
            Err(error) => found.errors.push(format!("{path}: {error}")),
        }
    }
    if left_out > 0 {
        found.notes.push(format!(
            "{left_out} more paths were not probed: {MAX_PATHS} are at most"
        ));
    }
    found.rate = found.errors.is_empty().then_some(BytesPerSecond(sum));
    found
}

/// Every path once, all at the same time.
fn round(
    client: &Client,
    paths: &[(HostId, HostId)],
    bounds: Bounds,
    interrupt: &AtomicU8,
) -> Vec<Result<Probed, String>> {
    let mut random = SystemRandom;
    let paths: Vec<Path> = paths
        .iter()
        .map(|&(from, to)| Path {
            from,
            to,
            probe: random.run(),
            token: random.token(),
        })
        .collect();
    let listen = |path: &Path| {
        let (probe, token) = (path.probe, path.token.clone());
        let args = ProbeListenArgs { probe, token };
        (path.to, Command::ProbeListen(args))
    };
    let listens: Vec<_> = paths.iter().map(listen).collect();
    let answers = client.ask(&listens, ANSWER_WITHIN);
    let addresses = answers.into_iter().map(|answer| {
        let value = answer?;
        serde_json::from_value::<ProbeAddress>(value)
            .map_err(|error| format!("the answer to probe-listen is not understood: {error}"))
    });
    let sent = paths.iter().zip(addresses).map(|(path, address)| {
        let args = ProbeArgs {
            probe: path.probe,
            token: path.token.clone(),
            stream: address?.stream,
            duration_ms: u64::try_from(bounds.duration.as_millis()).unwrap_or(u64::MAX),
            max_bytes: bounds.bytes.0,
        };
        let id = client.send(path.from, &Command::Probe(args));
        id.ok_or_else(|| "there is no connection".to_owned())
    });
    let sent: Vec<Result<u64, String>> = sent.collect();
    collect(client, &paths, sent, bounds, interrupt)
}

/// Waits for what the probes find.
fn collect(
    client: &Client,
    paths: &[Path],
    sent: Vec<Result<u64, String>>,
    bounds: Bounds,
    interrupt: &AtomicU8,
) -> Vec<Result<Probed, String>> {
    let by = Instant::now() + bounds.duration + SLACK;
    let mut ids = Vec::new();
    let mut results: Vec<Option<Result<Probed, String>>> = Vec::new();
    for result in sent {
        ids.push(result.as_ref().ok().copied());
        results.push(result.err().map(Err));
    }
    while results.iter().any(Option::is_none) && Instant::now() < by {
        if interrupt.load(Ordering::Relaxed) > 0 {
            break;
        }
        match client.receive(TICK) {
            Some((host, Message::Probed(found))) => {
                let is_it = |path: &Path| path.probe == found.probe && path.from == host;
                if let Some(index) = paths.iter().position(is_it) {
                    results[index].get_or_insert(Ok(found));
                }
            }
            Some((_, Message::Answer { id, result })) => {
                let index = ids.iter().position(|known| *known == Some(id));
                if let (Some(index), Err(error)) = (index, result) {
                    results[index] = Some(Err(error.desc));
                }
            }
            Some((host, Message::Lost(error))) => {
                for (index, path) in paths.iter().enumerate() {
                    if path.from == host || path.to == host {
                        results[index].get_or_insert_with(|| Err(error.to_string()));
                    }
                }
            }
            _ => {}
        }
    }
    let silent = || Err("the probe was not answered in its time".to_owned());
    let results = results.into_iter();
    results
        .map(|result| result.unwrap_or_else(silent))
        .collect()
}
