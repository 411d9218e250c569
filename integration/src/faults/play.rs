//! One cell, from an empty machine to the last check.
//!
//! A lab of three hosts is built: `a` is left, `b` reached, `w` keeps the register. The move runs
//! in a process of its own that stands still wherever a fault may strike; at the cell's point the
//! phase is checked with the sidecars, the fault strikes, and the move goes on. From then on only
//! what can be seen from outside counts (`judge`): ticks, events, processes, files.

mod judge;

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use coordinator::Application;
use coordinator::operate::{self, Wish};
use serde::Deserialize;
use sidecar::protocol::command::{Command, QueryRunArgs};
use sidecar::protocol::types::{Decision, Phase, Transport, VmReport};
use uuid::Uuid;

use super::aftermath::{Asker, Baseline};
use super::cell::{Cell, Expected, Fault, Point, Target};
use super::log::{Listener, Log, What};
use super::steer::{At, Coordinator, Said};
use crate::clock::Micros;
use crate::guest::GuestSpec;
use crate::lab::verify::verify_paused;
use crate::lab::{Lab, LabSpec};
use crate::net::Cut;
use crate::process::PidFd;
use crate::qemu::{Accel, installed};
use crate::signals::Interrupt;

/// A fault is noticed within this time.
pub const NOTICE_LIMIT: Duration = Duration::from_secs(3);
/// Every VM runs on one side within this time, where the living can know it.
pub const SETTLE_LIMIT: Duration = Duration::from_secs(10);
/// The move reaches a point within this time.
const REACH_LIMIT: Duration = Duration::from_secs(30);
/// In doubt for so long, nothing may have moved: the lease, and two seconds.
const DOUBT: Duration = Duration::from_secs(5);
/// The coordinator's own deadlines end its process within this time.
const END_LIMIT: Duration = Duration::from_secs(40);
/// A VM runs where it ticked within this time.
const TICKING: Duration = Duration::from_millis(250);
const LOOK_EVERY: Duration = Duration::from_millis(20);
const FROM: &str = "a";
const TO: &str = "b";
const WITNESS: &str = "w";

/// What came of a cell.
#[derive(Debug, Clone)]
pub struct Row {
    /// Which.
    pub cell: Cell,
    /// Where the VMs ended, in words.
    pub outcome: String,
    /// From the fault to the first word of trouble, and that word.
    pub noticed: Option<(Duration, String)>,
    /// From the fault until every VM ran where it must, without help.
    pub settled: Option<Duration>,
    /// From the help until everything was settled.
    pub healed: Option<Duration>,
    /// The coordinator's exit code, if it was not killed.
    pub code: Option<u8>,
    /// What is wrong; empty if the cell is as it must be.
    pub problems: Vec<String>,
    /// What happened, for a cell that is not.
    pub log: String,
    /// How long the cell took.
    pub took: Duration,
}

/// The guests: small, one hotter than the others.
fn guests(count: usize) -> Result<Vec<GuestSpec>> {
    let texts = [
        "hot:32MiB:6MB/s:8MiB",
        "cool:16MiB:1MB/s:2MiB",
        "idle:16MiB:100kB/s:1MiB",
    ];
    let mut guests = Vec::new();
    for text in &texts[..count.clamp(1, texts.len())] {
        let mut guest: GuestSpec = text.parse()?;
        guest.tick_hz = 250;
        guests.push(guest);
    }
    Ok(guests)
}

/// The lab of a cell.
///
/// # Errors
/// A guest is not possible.
pub fn lab_spec(
    accel: Accel,
    vms: usize,
    register: Option<&str>,
    transport: Transport,
) -> Result<LabSpec> {
    let mut settings = vec![
        format!("transport = \"{transport}\""),
        "lease = \"3s\"".to_owned(),
        "max-downtime = \"300ms\"".to_owned(),
        "report-interval = \"50ms\"".to_owned(),
    ];
    let mut hosts = vec![FROM.to_owned(), TO.to_owned()];
    if let Some(host) = register {
        settings.push(format!("register = \"{host}\""));
        hosts.push(host.to_owned());
    }
    Ok(LabSpec {
        hosts,
        guests: guests(vms)?,
        link: "400Mbit/s".parse().context("a rate")?,
        accel,
        traffic: Vec::new(),
        adopting: Vec::new(),
        resident: Vec::new(),
        programs: Vec::new(),
        settings,
    })
}

/// Plays a cell. Whatever goes wrong becomes a problem of its row.
#[must_use]
pub fn play(cell: Cell, accel: Accel, vms: usize, interrupt: &Interrupt) -> Row {
    let begun = Instant::now();
    let mut row = Row {
        cell,
        outcome: "?".into(),
        noticed: None,
        settled: None,
        healed: None,
        code: None,
        problems: Vec::new(),
        log: String::new(),
        took: Duration::ZERO,
    };
    let register = (!cell.register_at_source()).then_some(WITNESS);
    let played = lab_spec(accel, vms, register, cell.transport)
        .and_then(|spec| Ok(Lab::build(spec, interrupt)?))
        .and_then(|lab| Play::new(cell, lab)?.run(&mut row));
    if let Err(error) = played {
        row.problems.push(format!("{error:#}"));
    }
    row.took = begun.elapsed();
    row
}

struct Play {
    cell: Cell,
    expected: Expected,
    lab: Lab,
    log: Log,
    asker: Asker,
    baseline: Baseline,
    struck_at: Micros,
    run: Uuid,
    /// The QEMU that is to be hit. Opened early: in stop-and-copy a QEMU may not answer.
    qemu: Option<PidFd>,
    stopped: Option<PidFd>,
    _listener: Listener,
}

/// What a sidecar says of a run.
#[derive(Debug, Deserialize)]
struct RunState {
    vms: Vec<VmReport>,
}

impl Play {
    fn new(cell: Cell, lab: Lab) -> Result<Self> {
        let log = Log::default();
        let listener = Listener::start(&lab, &log);
        let baseline = Baseline::read(&lab, FROM)?;
        Ok(Self {
            cell,
            expected: cell.expected(installed()?.build),
            asker: Asker::new(&lab),
            lab,
            log,
            baseline,
            struck_at: Micros::now(),
            run: Uuid::nil(),
            qemu: None,
            stopped: None,
            _listener: listener,
        })
    }

    fn run(mut self, row: &mut Row) -> Result<()> {
        let result = self.try_run(row);
        if let Err(error) = result {
            row.problems.push(format!("{error:#}"));
        }
        if !row.problems.is_empty() {
            row.log = self.log.text(self.struck_at);
            for host in &self.lab.spec.hosts {
                let path = self.lab.host_directory(host).join("sidecar.log");
                let text = std::fs::read_to_string(path).unwrap_or_default();
                for line in text.lines() {
                    row.log += &format!("  log of {host}: {line}\n");
                }
            }
        }
        Ok(())
    }

    fn try_run(&mut self, row: &mut Row) -> Result<()> {
        let file = self.lab.application_file(FROM, TO)?;
        if self.cell.target == Target::SourceQemu {
            self.qemu = Some(self.first_qemu(FROM)?);
        }
        let mut coordinator = Coordinator::start(&file, self.lab.directory(), &self.log)?;
        self.reach(&mut coordinator)?;
        self.check_phase()?;
        if matches!(self.cell.point, Point::Arrived) {
            for guest in &self.lab.spec.guests {
                verify_paused(&self.lab, &guest.name, FROM, TO)?;
            }
        }
        self.strike(&mut coordinator)?;
        if self.cell.point == Point::Switching && self.cell.target != Target::Link {
            self.lab.network.link(FROM, TO)?.restore()?;
        }
        // Nothing stands still any more.
        for _ in 0..16 {
            coordinator.go_on();
        }
        if self.cell.fault == Fault::Restart {
            self.restart()?;
        }
        self.notice(row);
        self.alone(row)?;
        self.help(&mut coordinator, row)?;
        self.heal(row);
        self.end(&mut coordinator, row);
        self.check_everything(row);
        Ok(())
    }

    /// Drives the move to the cell's point.
    fn reach(&mut self, coordinator: &mut Coordinator) -> Result<()> {
        let wanted = match (self.cell.point, self.cell.target) {
            (Point::Preparing, Target::DestinationQemu) => At::DestinationPrepared,
            (Point::Preparing, _) => At::SourcePrepared,
            (Point::Precopy, _) => At::Precopy,
            (Point::Held, _) => At::Held,
            (Point::Stopped, _) => At::Stopped,
            (Point::Switching, _) => At::Switching,
            (Point::Arrived, _) => At::Arrived,
            (Point::Committing, _) => At::Committing,
        };
        let mut passed = 0;
        loop {
            let next = self.log.wait(REACH_LIMIT, |entries| {
                let mut points = entries.iter().filter_map(|entry| match &entry.what {
                    What::Said(Said::At(at, run)) => Some(Ok((*at, *run))),
                    What::Said(Said::End(code, reason)) => Some(Err((*code, reason.clone()))),
                    _ => None,
                });
                points.nth(passed)
            });
            passed += 1;
            let prepared = matches!(next, Some(Ok((At::DestinationPrepared, _))));
            if prepared && self.cell.target == Target::DestinationQemu {
                self.qemu = Some(self.first_qemu(TO)?);
            }
            match next {
                Some(Ok((at, run))) if at == wanted => {
                    self.run = run;
                    return Ok(());
                }
                Some(Ok((at, _))) => {
                    if at == At::Stopped && self.cell.point == Point::Switching {
                        // So that stop-and-copy cannot end before the fault strikes.
                        self.lab.network.link(FROM, TO)?.cut(Cut::Silent)?;
                    }
                    coordinator.go_on();
                }
                Some(Err((code, reason))) => bail!(
                    "the move ended before it was {}: exit code {code}, {}",
                    self.cell.point,
                    reason.unwrap_or_default()
                ),
                None => bail!(
                    "the move was not {} within {REACH_LIMIT:?}",
                    self.cell.point
                ),
            }
        }
    }

    /// The QEMU of the first VM on a host.
    fn first_qemu(&self, host: &str) -> Result<PidFd> {
        let guest = &self.lab.spec.guests[0].name;
        Ok(PidFd::open(self.lab.monitor(guest, host)?.peer_pid()?)?)
    }

    fn reports(&self, host: &str) -> Result<Vec<VmReport>> {
        let args = QueryRunArgs { run: self.run };
        let value = self.asker.ask(host, Command::QueryRun(args))?;
        Ok(serde_json::from_value::<RunState>(value)?.vms)
    }

    /// What the sidecars say must be the cell's phase.
    fn check_phase(&self) -> Result<()> {
        let sources = self.reports(FROM)?;
        let destinations = self.reports(TO)?;
        let all = |reports: &[VmReport], phases: &[Phase]| {
            let here = reports.iter().all(|vm| phases.contains(&vm.phase));
            here && !reports.is_empty()
        };
        let any = |phase| sources.iter().any(|vm| vm.phase == phase);
        let good = match self.cell.point {
            Point::Preparing => {
                let early = [Phase::Preparing, Phase::Prepared];
                all(&sources, &early) && all(&destinations, &early)
            }
            Point::Precopy => {
                any(Phase::Precopy)
                    && all(&sources, &[Phase::Prepared, Phase::Precopy, Phase::Held])
            }
            Point::Held => all(&sources, &[Phase::Held]),
            Point::Stopped => all(&sources, &[Phase::Stopped]),
            Point::Switching => {
                any(Phase::Switching) && all(&sources, &[Phase::Stopped, Phase::Switching])
            }
            Point::Arrived | Point::Committing => {
                let arrived = [Phase::Arrived];
                all(&sources, &arrived) && all(&destinations, &arrived)
            }
        };
        let decided = self.decision()?;
        let phases =
            |reports: &[VmReport]| -> Vec<Phase> { reports.iter().map(|vm| vm.phase).collect() };
        ensure!(
            good && decided == (self.cell.point == Point::Committing).then_some(Decision::Commit),
            "this is not {}: sources {:?}, destinations {:?}, decided {decided:?}",
            self.cell.point,
            phases(&sources),
            phases(&destinations),
        );
        Ok(())
    }

    fn register(&self) -> &'static str {
        if self.cell.register_at_source() {
            FROM
        } else {
            WITNESS
        }
    }

    fn decision(&self) -> Result<Option<Decision>> {
        let args = QueryRunArgs { run: self.run };
        let command = Command::QueryDecision(args);
        let value = self.asker.ask(self.register(), command)?;
        Ok(match value.get("group") {
            Some(group) => Some(serde_json::from_value(group.clone())?),
            None => None,
        })
    }

    fn sidecar_host(&self) -> Option<&'static str> {
        match self.cell.target {
            Target::SourceSidecar => Some(FROM),
            Target::DestinationSidecar => Some(TO),
            Target::Register => Some(WITNESS),
            _ => None,
        }
    }

    fn strike(&mut self, coordinator: &mut Coordinator) -> Result<()> {
        let process = match self.cell.target {
            Target::Coordinator => Some(coordinator.process.pidfd()?),
            Target::SourceQemu | Target::DestinationQemu => {
                Some(self.qemu.take().context("no QEMU was found to be hit")?)
            }
            Target::Link | Target::Nobody => None,
            _ => {
                let host = self.sidecar_host().context("a sidecar")?;
                Some(self.lab.sidecar(host)?.pidfd()?)
            }
        };
        self.struck_at = Micros::now();
        if let (Some(process), Some(signal)) = (&process, self.cell.fault.signal()) {
            process.signal(signal)?;
            if self.cell.fault != Fault::Stop {
                ensure!(
                    process.wait(Duration::from_secs(5))?,
                    "it outlived its SIGKILL"
                );
            }
        }
        if self.cell.target == Target::Link {
            self.lab.network.link(FROM, TO)?.cut(Cut::Silent)?;
        }
        if self.cell.fault == Fault::Stop {
            self.stopped = process;
        }
        Ok(())
    }

    fn since_strike(&self) -> Duration {
        Micros::now().since(self.struck_at)
    }

    fn restart(&mut self) -> Result<()> {
        let host = self.sidecar_host().context("a sidecar")?;
        self.lab.start_sidecar(host)?;
        Ok(())
    }

    /// Whoever was stopped or killed comes back, as after a pause or by a service manager.
    fn help(&mut self, coordinator: &mut Coordinator, row: &mut Row) -> Result<()> {
        if self.cell.fault == Fault::Fence {
            self.recover(row)?;
        }
        if let Some(process) = self.stopped.take() {
            // One that was killed meanwhile needs no SIGCONT.
            let _ = process.signal(nix::sys::signal::Signal::SIGCONT);
        }
        if self.cell.target == Target::Link {
            self.lab.network.link(FROM, TO)?.restore()?;
        }
        if matches!(self.cell.fault, Fault::Kill | Fault::Fence) && self.sidecar_host().is_some() {
            self.restart()?;
        }
        coordinator.go_on();
        Ok(())
    }

    /// `muster recover --fenced`, while the register is away.
    fn recover(&self, row: &mut Row) -> Result<()> {
        let app: Application = self.lab.application(FROM, TO)?;
        let wish = Wish::Fenced {
            host: WITNESS.to_owned(),
            value: Decision::Abort,
        };
        let settled = operate::settle(&app, None, &wish, &mut |text| {
            self.log
                .add(Micros::now(), "recover", What::Event(text.to_owned()));
        })?;
        ensure!(!settled.is_empty(), "recover found no run");
        for one in &settled {
            let text = format!("{}: {}", one.outcome, one.notes.join("; "));
            self.log.add(Micros::now(), "recover", What::Event(text));
        }
        let wrong = self.misplaced(self.expected.finally);
        if !wrong.is_empty() {
            row.problems
                .push(format!("after recover --fenced: {}", wrong.join("; ")));
        }
        Ok(())
    }
}
