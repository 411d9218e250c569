//! Moves there and back, each watched from a while before it to a while after it.

use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use coordinator::application::{Application, Policy};
use coordinator::client::Client;
use coordinator::engine::Step;
use coordinator::observer::{GroupName, Observer, Progress};
use coordinator::report::Outcome;
use coordinator::{MoveReport, RunOptions, traffic};
use crossbeam::channel::{Sender, unbounded};
use sidecar::protocol::event::Envelope;
use sidecar::protocol::traffic::COUNT_MS;

use super::feel::{self, Moments};
use super::load::{Action, Ending, Load, Sample};
use super::options::{AppOptions, Sizes};
use super::probe::Probe;
use super::report::{Alone, Away, Run};
use super::stage::Stage;
use super::wan_plan::{self, Mark};
use super::{dummy, sla, spacing};
use crate::clock::Micros;
use crate::signals::Interrupt;
use crate::watch::Watch;

/// Traffic between the VMs is counted for so long at most.
const COUNT: Duration = Duration::from_secs(5);
/// A sidecar is there within this.
const CONNECTS: Duration = Duration::from_secs(10);
const SITES: [&str; 2] = ["a", "b"];

/// A move that went back.
#[derive(Debug, thiserror::Error)]
#[error("{policy}: not committed: {reason}")]
pub(super) struct NotCommitted {
    policy: Policy,
    reason: String,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Tour<'a> {
    pub(super) stage: &'a Stage,
    pub(super) options: &'a AppOptions,
    pub(super) sizes: Sizes,
    pub(super) interrupt: &'a Interrupt,
    /// Writes that users were told are done.
    pub(super) acknowledged: u64,
    probe: Probe,
    /// Where the application is, and where it goes next.
    sites: (usize, usize),
}

/// A move, and the moment it was over.
struct Moved {
    report: MoveReport,
    ended: Micros,
    wan_bytes: u64,
    wan_bytes_between_vms: u64,
    wan_changes: Vec<Mark>,
}

impl<'a> Tour<'a> {
    /// Begins to watch the application, at the first site.
    pub(super) fn begin(
        stage: &'a Stage,
        options: &'a AppOptions,
        sizes: Sizes,
        interrupt: &'a Interrupt,
    ) -> Result<Self> {
        let addresses = stage.vms.iter().map(|vm| vm.address).collect();
        Ok(Self {
            stage,
            options,
            sizes,
            interrupt,
            acknowledged: 0,
            probe: Probe::start(stage.users()?, addresses)?,
            sites: (0, 1),
        })
    }

    /// Counts writes that users were told are done.
    pub(super) fn acknowledge(&mut self, samples: &[Sample]) {
        let done = |s: &&Sample| s.action == Action::Add && s.ending == Ending::Answered;
        let done = samples.iter().filter(done).count();
        self.acknowledged += u64::try_from(done).unwrap_or(u64::MAX);
    }

    /// One move under this load. Either all of its requests end within `settles`, or the run says
    /// that they do not.
    pub(super) fn go(
        &mut self,
        load: &Load,
        policy: Policy,
        round: u32,
        settles: Duration,
    ) -> Result<Run> {
        let (options, sizes) = (self.options, self.sizes);
        let (from, to) = self.sites;
        println!("\n{policy}: site {} → site {}", SITES[from], SITES[to]);
        self.stage.set_wan(sizes.wan);
        self.acknowledge(&load.take());
        let since = Micros::now();
        let application = self.prepare(from, to)?;
        let moved = self.carry_out(&application, policy)?;
        self.sites = (to, from);
        let watched = Micros::now();
        let settled = load.settle(watched, settles, self.interrupt)?;
        let mut samples = load.take();
        self.acknowledge(&samples);
        samples.retain(|sample| sample.due >= since && sample.due < watched);
        samples.sort_by_key(|sample| sample.due);
        let moments = Moments::of(&moved.report).context("a move before 1970")?;
        let dummy = if options.dummy {
            Some(self.dummy(load, &moved.report, &moments)?)
        } else {
            None
        };
        let times = (moments.began, moments.ended, watched);
        Ok(Run {
            policy: policy.to_string(),
            round,
            load: sizes.pace.text(),
            settled,
            feel: feel::feel(&samples, &moments),
            service_levels: sla::judge(&samples, &options.limits, options.window),
            spacing: spacing::spacing(&samples, times, &options.limits, options.window),
            downtimes: self.away(&moved, moments.began),
            wan_bytes: moved.wan_bytes,
            wan_bytes_between_vms: moved.wan_bytes_between_vms,
            wan_changes: moved.wan_changes,
            dummy,
            movement: moved.report,
            began: moments.began,
            samples,
        })
    }

    /// Watches for a while, and counts meanwhile what the VMs send each other.
    fn prepare(&self, from: usize, to: usize) -> Result<Application> {
        let began = Micros::now();
        let mut application = self.stage.application(from, to)?;
        let time = self.sizes.before.min(COUNT);
        if u64::try_from(time.as_millis())? >= *COUNT_MS.start() {
            let client = Client::connect(&application, &traffic::hosts(&application));
            for (_, connected) in client.wait_connected(CONNECTS) {
                connected?;
            }
            match traffic::count(&application, &client, time) {
                Ok(counted) => application.traffic = counted.traffic(),
                Err(error) => println!("traffic is not counted: {error}"),
            }
        }
        // It is not counted, or tried, once more.
        application.measure = false;
        let left = self.sizes.before.saturating_sub(Micros::now().since(began));
        self.interrupt.sleep(left)?;
        Ok(application)
    }

    /// The move, while the WAN changes as it is to, and a while after it.
    fn carry_out(&self, application: &Application, policy: Policy) -> Result<Moved> {
        let run = RunOptions {
            policy: Some(policy),
            ..RunOptions::default()
        };
        let course = wan_plan::course(self.sizes.wan, &self.options.wan_at);
        let (told, line) = unbounded();
        let stage = self.stage;
        let carried = (stage.wan_bytes().0, stage.wan_bytes_between_vms().0);
        std::thread::scope(|scope| {
            let changes =
                scope.spawn(move || wan_plan::follow(&course, &line, |state| stage.set_wan(state)));
            let mut watch = Starts {
                watch: Watch::new(&run, self.interrupt),
                told,
            };
            let report = coordinator::run(application, &run, &mut watch)?;
            watch.watch.finish();
            let ended = Micros::now();
            let after = (stage.wan_bytes().0, stage.wan_bytes_between_vms().0);
            self.interrupt.check()?;
            if report.result != Outcome::Committed {
                let reason = report.reason.unwrap_or_default();
                return Err(NotCommitted { policy, reason }.into());
            }
            self.interrupt.sleep(self.sizes.after)?;
            // Hung up: what has not come by now does not come.
            drop(watch);
            Ok(Moved {
                report,
                ended,
                wan_bytes: after.0 - carried.0,
                wan_bytes_between_vms: after.1 - carried.1,
                wan_changes: changes.join().map_err(|_| anyhow!("the WAN broke"))?,
            })
        })
    }

    fn away(&self, moved: &Moved, began: Micros) -> Vec<Away> {
        let away = self.stage.vms.iter().map(|vm| {
            let of_it = moved.report.vms.iter().find(|other| other.name == vm.name);
            let outside = self.probe.longest_gap(vm.address, began, moved.ended);
            Away {
                name: vm.name.clone(),
                inside_s: of_it.and_then(|of_it| of_it.downtime_s),
                outside_s: outside.as_secs_f64(),
            }
        });
        away.collect()
    }

    /// The same stream without a move, from where the application is now.
    fn dummy(&mut self, load: &Load, report: &MoveReport, moments: &Moments) -> Result<Alone> {
        let (from, to) = self.sites;
        let pace = dummy::pace(report);
        println!("the same stream without a move");
        self.stage.set_wan(self.sizes.wan);
        self.interrupt.sleep(self.sizes.before)?;
        let began = Micros::now();
        let hosts = (self.stage.host(0, from)?, self.stage.host(0, to)?);
        dummy::send(hosts.0, hosts.1, &pace, self.interrupt)?;
        let ended = Micros::now();
        let settled = load.settle(ended, super::SETTLES, self.interrupt)?;
        ensure!(settled, "{}", super::too_much(&self.sizes.pace.text()));
        let samples = load.take();
        self.acknowledge(&samples);
        let precopy = moments.first_stop().since(moments.began);
        Ok(Alone {
            bytes: pace.last().map_or(0, |(_, bytes)| *bytes),
            took_s: ended.since(began).as_secs_f64(),
            p95_ms: feel::p95(&samples, began, began + precopy),
        })
    }
}

/// Passes a move on, and tells when it begins.
struct Starts<'a> {
    watch: Watch<'a>,
    told: Sender<Micros>,
}

impl Observer for Starts<'_> {
    fn event(&mut self, host: &str, envelope: &Envelope) {
        self.watch.event(host, envelope);
    }

    fn step(&mut self, group: &GroupName, step: &Step) {
        if *step == Step::Started {
            // Nobody listens after the last change.
            let _ = self.told.send(Micros::now());
        }
        self.watch.step(group, step);
    }

    fn progress(&mut self, progress: &Progress) {
        self.watch.progress(progress);
    }
}
