//! The WAN, and the application that moves over it.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use clap::Parser;
use coordinator::client::Client;
use coordinator::traffic;
use testbed::app::load::{Ending, Load, LoadSpec, Pace, Shape};
use testbed::app::{AppOptions, app};
use testbed::net::wan::{Path, Wan};
use testbed::net::{Network, throughput};
use testbed::signals::Interrupt;

use super::LIMIT;

const MEASURE: Duration = Duration::from_millis(1500);
const TURNS: u32 = 10;
/// The largest frame of segmentation offload.
const FRAME: u64 = 64 << 10;

/// The mean time of a request and its answer, over one connection.
fn round_trip(network: &Network) -> Result<Duration> {
    let (a, b) = (network.host("a")?, network.host("b")?);
    let listener = b.enter(|| TcpListener::bind((b.address(), 0)))??;
    let address = listener.local_addr()?;
    let mut here = a.enter(|| TcpStream::connect_timeout(&address, LIMIT))??;
    let (mut there, _) = listener.accept()?;
    for stream in [&here, &there] {
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(LIMIT))?;
    }
    let began = Instant::now();
    for _ in 0..TURNS {
        here.write_all(b"?")?;
        there.read_exact(&mut [0])?;
        there.write_all(b"!")?;
        here.read_exact(&mut [0])?;
    }
    Ok(began.elapsed() / TURNS)
}

pub fn wan() -> Result<()> {
    let network = Network::islands(&["a", "b"])?;
    for host in network.hosts() {
        host.add_bridge()?;
    }
    let (a, b) = (network.host("a")?, network.host("b")?);
    let wan = Wan::join(&[(a, 0), (b, 1)])?;
    let open = round_trip(&network)?;
    println!("open: {open:?}");
    for (rtt_ms, rate) in [(20, "100Mbit/s"), (100, "200Mbit/s")] {
        let asked: rate_limiter::BytesPerSecond = rate.parse()?;
        let rtt = Duration::from_millis(rtt_ms);
        let queue = rtt.max(Duration::from_millis(50));
        wan.set_path(
            0,
            1,
            Path {
                delay: rtt / 2,
                rate: Some(asked),
                loss: 0.0,
                queue,
            },
        );
        let found = round_trip(&network)?;
        ensure!(found >= rtt, "{found:?} is less than {rtt:?}");
        ensure!(found < rtt + open + rtt / 4, "{found:?} for {rtt:?}");
        let (before, began) = (wan.count(0, 1).bytes, Instant::now());
        let flow = throughput(a, b, MEASURE)?;
        let carried = flow.rate;
        // A frame counts when it is let into the queue: as much as fits is ahead of the line.
        let within = began.elapsed() + queue;
        let bytes = wan.count(0, 1).bytes - before;
        println!("{rtt:?}: {found:?}; {carried} of {asked}, {bytes} bytes counted");
        ensure!(
            bytes <= asked.in_time(within).0 + FRAME,
            "{bytes} bytes within {within:?} are more than {asked}"
        );
        // Nothing came that was not counted.
        ensure!(flow.payload.0 <= bytes, "{} of {bytes} bytes", flow.payload);
        // Windows grow for a while. Much was received already when a late receiver comes to read: so
        // there is no upper bound for what it counts.
        ensure!(carried.0 >= asked.0 / 2, "{carried} of {asked}");
    }
    wan.set_path(
        0,
        1,
        Path {
            loss: 1.0,
            ..Path::OPEN
        },
    );
    let address = (b.address(), 9);
    let lost = a.enter(|| TcpStream::connect_timeout(&address.into(), MEASURE))?;
    ensure!(lost.is_err(), "a frame came through");
    ensure!(wan.count(0, 1).lost > 0);
    Ok(())
}

pub fn traffic_matrix() -> Result<()> {
    const COUNT: Duration = Duration::from_secs(4);
    const ASK: Duration = Duration::from_millis(1500);
    let Wrapped { options } = Wrapped::try_parse_from(["app", "--quick"])?;
    let stage = options.stage(&Interrupt::install()?)?;
    let application = stage.application(0, 1)?;
    let client = Client::connect(&application, &traffic::hosts(&application));
    for (_, result) in client.wait_connected(LIMIT) {
        result?;
    }
    let users = stage.users()?;
    let thinking = LoadSpec {
        front: stage.front(),
        pace: Pace::Closed {
            users: Shape::constant(3.0),
            think: Duration::from_millis(20),
            seed: 1,
        },
        writes: 0.0,
    };
    let host = stage.host(0, 0)?;
    let counting = || {
        let mut nft = Command::new("nft");
        nft.args(["list", "table", "bridge", "muster_traffic"]);
        host.enter(|| nft.output())
    };
    let db = stage.vms.len() - 1;
    let (counted, carried, asked) = std::thread::scope(|scope| {
        let count = scope.spawn(|| traffic::count(&application, &client, COUNT));
        let by = Instant::now() + LIMIT;
        while !counting()??.status.success() {
            ensure!(Instant::now() < by, "nothing is counted");
        }
        let before = stage.tap_counters(db, 0)?;
        let load = Load::start(users, &thinking)?;
        std::thread::sleep(ASK);
        let asked = load.finish();
        let after = stage.tap_counters(db, 0)?;
        ensure!(counting()??.status.success(), "it was counted too short");
        let counted = count.join().map_err(|_| anyhow!("the count broke"))??;
        let carried = (after.received.0 - before.received.0) + (after.sent.0 - before.sent.0);
        Ok::<_, anyhow::Error>((counted, carried, asked))
    })?;
    // Three users who think for 20 ms: some dozens at least, and no two of one user at once.
    ensure!(asked.len() > 30, "{} requests", asked.len());
    ensure!(asked.iter().all(|sample| sample.ending == Ending::Answered));
    ensure!(!counting()??.status.success(), "the table is left behind");
    let pairs: Vec<String> = counted.pairs.iter().map(|p| p.between.join("-")).collect();
    ensure!(pairs == ["web-app", "app-db"], "{pairs:?}");
    // The database's tap sees the app server and nobody else: an acknowledgement may be late, and
    // addresses are asked for by broadcast.
    let pair = &counted.pairs[1];
    let found = pair.sent_bytes + pair.received_bytes;
    println!("counted {found} bytes, the tap carried {carried}; {pair:?}");
    ensure!(found.abs_diff(carried) <= carried / 100 + 500);
    Ok(())
}

#[derive(Debug, Parser)]
struct Wrapped {
    #[command(flatten)]
    options: AppOptions,
}

pub fn three_policies() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let change = "--wan-at=500ms:rtt=60ms";
    let words = [
        "app",
        "--quick",
        "--wan=800Mbit/s",
        "--before=2s",
        change,
        "--out",
    ];
    let out = directory.path().as_os_str();
    let words = words.map(std::ffi::OsStr::new).into_iter().chain([out]);
    let Wrapped { options } = Wrapped::try_parse_from(words)?;
    let began = Instant::now();
    app(&options, &Interrupt::install()?)?;
    println!("took {:?}", began.elapsed());
    let read = |name: &str| std::fs::read_to_string(directory.path().join(name));
    let report: serde_json::Value = serde_json::from_str(&read("report.json")?)?;
    let runs = report["runs"].as_array().context("no runs")?;
    ensure!(runs.len() == 3, "{} runs", runs.len());
    for run in runs {
        let (policy, feel) = (&run["policy"], &run["feel"]);
        let requests = feel["requests"].as_u64().context("no requests")?;
        ensure!(requests > 40, "{policy}: {requests} requests");
        ensure!(
            feel["refused"] == 0 && feel["lost"] == 0,
            "{policy}: {} refused, {} connections lost",
            feel["refused"],
            feel["lost"]
        );
        ensure!(
            run["wan_bytes"].as_u64() > Some(50_000_000),
            "{policy}: {}",
            run["wan_bytes"]
        );
        let changes = run["wan_changes"].as_array().context("no changes")?;
        ensure!(changes.len() == 1, "{policy}: {changes:?}");
        let at = changes[0]["at_s"].as_f64();
        ensure!(at >= Some(0.5) && at < Some(1.5), "{policy}: {changes:?}");
        for away in run["downtimes"].as_array().context("no downtimes")? {
            let (inside, outside) = (&away["inside_s"], &away["outside_s"]);
            let inside = inside.as_f64().context("not measured inside")?;
            let outside = outside.as_f64().context("not measured outside")?;
            ensure!(inside > 0.0, "{policy}: {away}");
            // Pings are 20 ms apart; what is seen from outside includes what is inside.
            ensure!(outside > inside - 0.05, "{policy}: {away}");
        }
    }
    let split = runs[0]["movement"]["impact_bytes"].as_f64();
    ensure!(
        split > Some(0.0),
        "no traffic was counted before the move: {split:?}"
    );
    // A split application pays with every turn between its sites; one that moves together does not.
    let between = |at: usize| runs[at]["wan_bytes_between_vms"].as_u64();
    ensure!(
        between(0) > between(2).map(|bytes| bytes * 2),
        "sequential {:?}, muster {:?}",
        between(0),
        between(2)
    );
    let costs = report["costs"].as_array().context("no costs")?;
    let relative = |cost: &&serde_json::Value| cost["what"] == "completion, relative to parallel";
    let relative: Vec<_> = costs.iter().filter(relative).collect();
    ensure!(relative.len() == 3, "{relative:?}");
    ensure!(relative[1]["values"][0] == 1.0, "{relative:?}");
    ensure!(read("report.svg")?.starts_with("<svg"));
    ensure!(read("report.html")?.contains("<svg"));
    Ok(())
}
