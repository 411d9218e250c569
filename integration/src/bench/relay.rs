//! `relay`: what it costs that the stream passes through two sidecars, against QEMU's own TCP
//! migration between the same two hosts.
//!
//! The guest stays where it is: after each migration has completed, the destination is killed and
//! the source continued. So both kinds copy the same memory from the same process.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::json;

use super::control::Driver;
use super::cpu::CpuTime;
use super::output::number;
use super::result::{Bound, Figure, Section, Statistic, Table};
use super::{Bench, stats};
use crate::clock::Micros;
use crate::lab::{Lab, LabSpec};
use crate::qemu::Role;
use crate::qmp::Qmp;

const GUEST: &str = "idle:1536MiB:0B/s:4KiB";
const QUICK_GUEST: &str = "idle:256MiB:0B/s:4KiB";
const LIMIT: Duration = Duration::from_secs(10);
const MIGRATION_LIMIT: Duration = Duration::from_secs(60);
const FIRST_PORT: usize = 4700;
const GIB: f64 = 1_073_741_824.0;

/// One migration.
#[derive(Debug)]
struct Run {
    gib: f64,
    seconds: f64,
    /// QEMU at the source and at the destination.
    qemus: [CpuTime; 2],
    /// The sidecars at the source and at the destination; zero without them.
    sidecars: [CpuTime; 2],
}

impl Run {
    fn gib_per_s(&self) -> f64 {
        self.gib / self.seconds
    }

    fn per_gib(&self, time: CpuTime) -> f64 {
        time.total_s() / self.gib
    }
}

/// Runs it.
///
/// # Errors
/// A migration fails.
pub fn run(bench: &Bench<'_>) -> Result<Section> {
    let (pairs, guest) = if bench.quick {
        (1, QUICK_GUEST)
    } else {
        (10, GUEST)
    };
    let mut spec: LabSpec = bench.spec(&[guest], "10Gbit/s")?;
    for guest in &mut spec.guests {
        guest.tick_hz = 100;
    }
    spec.resident = vec!["b".to_owned()];
    let mut lab = bench.lab(spec)?;
    lab.network.link("a", "b")?.unshape()?;
    let sidecars = [lab.sidecar("a")?.pid(), lab.sidecar("b")?.pid()];
    let mut done = Vec::new();
    // The first of each kind meets cold memory; it does not count.
    for index in 0..=pairs {
        bench.interrupt.check()?;
        let (direct, relay) = if index % 2 == 0 {
            let direct = direct(&lab, FIRST_PORT + index)?;
            (direct, relayed(&lab, sidecars)?)
        } else {
            let relay = relayed(&lab, sidecars)?;
            (direct(&lab, FIRST_PORT + index)?, relay)
        };
        bench.say(&format!(
            "relay {index}/{pairs}: direct {:.2} GiB/s, relay {:.2} GiB/s, ratio {:.2}, sidecars {:.2} and {:.2} CPU-s/GiB{}",
            direct.gib_per_s(),
            relay.gib_per_s(),
            relay.gib_per_s() / direct.gib_per_s(),
            relay.per_gib(relay.sidecars[0]),
            relay.per_gib(relay.sidecars[1]),
            if index == 0 { " (not counted)" } else { "" }
        ));
        if index > 0 {
            done.push((direct, relay));
        }
    }
    Ok(section(&done, guest))
}

/// QEMU to QEMU over TCP.
fn direct(lab: &Lab, port: usize) -> Result<Run> {
    let guest = &lab.spec.guests[0].name;
    let log = lab.directory().join("direct.log");
    let isolation = lab.network.host("b")?.isolation(Some(log));
    let launch = lab.launch(guest, "b")?;
    let mut destination = launch.start(
        Role::Incoming,
        &lab.directory().join("direct.qmp"),
        &isolation,
    )?;
    let mut source = lab.monitor(guest, "a")?;
    let uri = format!("tcp:{}:{port}", lab.network.host("b")?.address());
    for monitor in [&mut source, &mut destination.monitor] {
        let on = ["return-path", "events", "late-block-activate"];
        let on = on.map(|name| json!({"capability": name, "state": true}));
        let arguments = json!({"capabilities": on});
        monitor.execute("migrate-set-capabilities", arguments, LIMIT)?;
    }
    let parameters = json!({"max-bandwidth": 1_u64 << 40, "downtime-limit": 300});
    source.execute("migrate-set-parameters", parameters, LIMIT)?;
    let uri = json!({"uri": uri});
    destination
        .monitor
        .execute("migrate-incoming", uri.clone(), LIMIT)?;
    let qemus = [source.peer_pid()?, destination.process.pid()];
    let before = cpu(&qemus)?;
    source.execute("migrate", uri, LIMIT)?;
    let seconds = time_of_migration(&mut source)?;
    let after = cpu(&qemus)?;
    let gib = transferred_gib(&mut source)?;
    drop(destination);
    source.execute("cont", json!({}), LIMIT)?;
    Ok(Run {
        gib,
        seconds,
        qemus: [after[0].since(before[0]), after[1].since(before[1])],
        sidecars: [CpuTime::default(); 2],
    })
}

/// The same through both sidecars, with no limit set.
fn relayed(lab: &Lab, sidecars: [u32; 2]) -> Result<Run> {
    let guest = &lab.spec.guests[0].name;
    let mut driver = Driver::connect(lab, guest, "a", "b")?;
    let stream = driver.prepare(false)?;
    let mut source = lab.monitor(guest, "a")?;
    let destination = lab.monitor(guest, "b")?.peer_pid()?;
    let pids = [source.peer_pid()?, destination, sidecars[0], sidecars[1]];
    let before = cpu(&pids)?;
    driver.start(stream)?;
    let seconds = time_of_migration(&mut source)?;
    let after = cpu(&pids)?;
    let gib = transferred_gib(&mut source)?;
    driver.arrived(LIMIT)?;
    driver.roll_back()?;
    let used = |index: usize| after[index].since(before[index]);
    Ok(Run {
        gib,
        seconds,
        qemus: [used(0), used(1)],
        sidecars: [used(2), used(3)],
    })
}

fn cpu(pids: &[u32]) -> Result<Vec<CpuTime>> {
    let all = pids.iter().map(|pid| CpuTime::of_process(*pid));
    all.collect::<Result<_, _>>().context("a process is gone")
}

/// From the source's `setup` to its `completed`, by its own stamps: with a return path it says so
/// when the destination has loaded everything.
fn time_of_migration(source: &mut Qmp) -> Result<f64> {
    let by = Instant::now() + MIGRATION_LIMIT;
    let mut begun: Option<Micros> = None;
    loop {
        let left = by.saturating_duration_since(Instant::now());
        let event = source.wait_event("MIGRATION", left)?;
        match (event.data["status"].as_str().unwrap_or_default(), begun) {
            ("setup", _) => begun = Some(event.at),
            ("completed", Some(begun)) => return Ok(event.at.since(begun).as_secs_f64()),
            ("failed" | "cancelled", _) => bail!("the migration {}", event.data["status"]),
            _ => {}
        }
    }
}

fn transferred_gib(source: &mut Qmp) -> Result<f64> {
    let migration = source.execute("query-migrate", json!({}), LIMIT)?;
    let bytes = migration["ram"]["transferred"].as_f64();
    Ok(bytes.context("query-migrate tells no ram.transferred")? / GIB)
}

fn section(done: &[(Direct, Relayed)], guest: &str) -> Section {
    let setup = format!(
        "One guest, {guest}, every page non-zero; two hosts joined by an unshaped veth; no rate \
         limit; {} alternating pairs after one that does not count. The destinations' memory is one \
         file that stays allocated, so that no run pays page faults that another does not. Time: \
         from `setup` to `completed`, by QEMU's events.",
        done.len()
    );
    let mut section = Section::new("relay", "throughput of the relay", setup);
    let of = |value: &dyn Fn(&Direct, &Relayed) -> f64| {
        done.iter().map(|(a, b)| value(a, b)).collect::<Vec<f64>>()
    };
    let most = Bound::AtMost(1.1);
    let side = |what, index: usize| {
        let values = of(&|_, relay| relay.per_gib(relay.sidecars[index]));
        Figure::bounded(what, "s/GiB", &values, Statistic::Median, most)
    };
    let qemu = |what, relay: bool, index: usize| {
        let values = of(&|direct, relayed| {
            let run = if relay { relayed } else { direct };
            run.per_gib(run.qemus[index])
        });
        Figure::told(what, "s/GiB", &values)
    };
    section.figures = vec![
        Figure::bounded(
            "throughput, relay / direct",
            "",
            &of(&|direct, relay| relay.gib_per_s() / direct.gib_per_s()),
            Statistic::Median,
            Bound::AtLeast(0.60),
        ),
        Figure::told("relay", "GiB/s", &of(&|_, relay| relay.gib_per_s())),
        Figure::told("direct", "GiB/s", &of(&|direct, _| direct.gib_per_s())),
        side("CPU of the source's sidecar", 0),
        side("CPU of the destination's sidecar", 1),
        qemu("CPU of the source's QEMU, relay", true, 0),
        qemu("CPU of the destination's QEMU, relay", true, 1),
        qemu("CPU of the source's QEMU, direct", false, 0),
        qemu("CPU of the destination's QEMU, direct", false, 1),
    ];
    section.notes.push(limits(done));
    section.tables.push(Table {
        title: "Every pair (CPU in s/GiB, user + system)".to_owned(),
        columns: vec![
            "pair",
            "direct, GiB/s",
            "relay, GiB/s",
            "ratio",
            "source's sidecar",
            "destination's sidecar",
        ],
        rows: rows(done),
    });
    section
}

/// Where the processors' time goes: that is what limits the relay where they are busy.
fn limits(done: &[(Direct, Relayed)]) -> String {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let cores = f64::from(u32::try_from(cores).unwrap_or(u32::MAX));
    let busy = |run: &Run| {
        let all = run.qemus.iter().chain(&run.sidecars);
        all.map(|time| time.total_s()).sum::<f64>() / (cores * run.seconds) * 100.0
    };
    let of = |value: &dyn Fn(&Direct, &Relayed) -> f64| {
        let values: Vec<f64> = done.iter().map(|(a, b)| value(a, b)).collect();
        stats::median(&values)
    };
    let system = of(&|_, relay| {
        let sum = relay.sidecars[0].plus(relay.sidecars[1]);
        sum.system_s / sum.total_s() * 100.0
    });
    format!(
        "Of {cores} cores, the two QEMUs alone keep {:.0} % busy (direct), QEMUs and sidecars \
         together {:.0} % (relay). {system:.0} % of the sidecars' time is in the kernel: copying \
         between unix socket, buffer and TCP.",
        of(&|direct, _| busy(direct)),
        of(&|_, relay| busy(relay)),
    )
}

fn rows(done: &[(Direct, Relayed)]) -> Vec<Vec<String>> {
    let split = |run: &Run, time: CpuTime| {
        let [user, system] = [time.user_s, time.system_s].map(|s| number(s / run.gib));
        format!("{user} + {system}")
    };
    let row = |(index, (direct, relay)): (usize, &(Direct, Relayed))| {
        vec![
            (index + 1).to_string(),
            number(direct.gib_per_s()),
            number(relay.gib_per_s()),
            number(relay.gib_per_s() / direct.gib_per_s()),
            split(relay, relay.sidecars[0]),
            split(relay, relay.sidecars[1]),
        ]
    };
    done.iter().enumerate().map(row).collect()
}

type Direct = Run;
type Relayed = Run;
