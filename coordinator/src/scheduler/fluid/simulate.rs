//! From event to event.

use super::guest::{Scenario, SimulateError};
use super::outcome::{Outcome, Travel};
use super::sharing::{Flow, max_min};
use super::stream::Stream;
use crate::capacity::Capacity;
use crate::scheduler::bandwidth::release::{Stop, stop_and_copy};

/// How far a VM is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// Its copy has not begun.
    Waiting,
    /// It is being copied.
    PreCopy,
    /// Its pre-copy has ended; it runs on, and is kept up to date.
    Held,
    /// It is paused, and the rest is sent.
    Stopped,
    /// It runs at its destination.
    Done,
}

/// What a policy sees of a VM, as reports show it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct GuestView {
    /// How far it is.
    pub stage: Stage,
    /// What it would have to send if it dirtied nothing more.
    pub remaining_bytes: f64,
    /// What it dirties in a second.
    pub dirty_rate_bytes_per_s: f64,
    /// What its switchover takes beside sending.
    pub overhead_s: f64,
}

/// What a policy sees.
#[derive(Debug)]
pub struct View<'a> {
    /// The time.
    pub now_s: f64,
    /// The VMs.
    pub vms: &'a [GuestView],
    /// The links.
    pub capacity: &'a Capacity,
}

impl View<'_> {
    /// How long these VMs would be paused, were they released now.
    #[must_use]
    pub fn downtime_s(&self, members: &[usize]) -> f64 {
        self.stop(members).map_or(f64::INFINITY, |stop| stop.0)
    }

    /// The common downtime of some VMs, and the share of every VM.
    fn stop(&self, members: &[usize]) -> Option<(f64, Vec<f64>)> {
        let nothing = Stop {
            remaining_bytes: 0.0,
            overhead_s: 0.0,
        };
        let mut stops = vec![nothing; self.vms.len()];
        for &vm in members {
            stops[vm] = Stop {
                remaining_bytes: self.vms[vm].remaining_bytes,
                overhead_s: self.vms[vm].overhead_s,
            };
        }
        let found = stop_and_copy(self.capacity, &stops).ok()?;
        Some((found.downtime_s, found.rates_bytes_per_s))
    }
}

/// What a policy wants. Limits and the wake-up time stay until they are changed.
#[derive(Debug, Clone, PartialEq)]
pub struct Orders {
    /// How fast each VM may send, in bytes a second: 0 not at all, infinite as the links admit. The
    /// first one above 0 starts it.
    pub limits_bytes_per_s: Vec<f64>,
    /// Groups of held VMs that are paused now, each at once; they go on together.
    pub release: Vec<Vec<usize>>,
    /// When the policy is to be asked at the latest. It is asked at every event anyway.
    pub wake_s: f64,
    /// The simulation ends: this group never fits, and would take so long at best.
    pub too_hot: Option<(Vec<usize>, f64)>,
}

/// Decides who sends, and who is released.
pub trait Policy {
    /// Something has happened, or it is time.
    fn decide(&mut self, view: &View<'_>, orders: &mut Orders);
}

/// More events than any sensible scenario has.
const MAX_EVENTS: u64 = 20_000_000;

/// Moves all VMs of a scenario as `policy` wants it. The same input gives the same outcome.
///
/// # Errors
/// The scenario makes no sense, or not all VMs finish.
pub fn simulate(scenario: &Scenario, policy: &mut dyn Policy) -> Result<Outcome, SimulateError> {
    scenario.validate()?;
    let mut run = Run::new(scenario);
    for _ in 0..MAX_EVENTS {
        run.obey(policy)?;
        if run.finish() {
            continue;
        }
        if run.is_over() {
            return Ok(Outcome { vms: run.travels });
        }
        run.share();
        let streams = run.streams.iter().map(Stream::next_event_s);
        let next = streams.fold(run.orders.wake_s - run.now_s, f64::min);
        if run.now_s + next > scenario.horizon_s {
            break;
        }
        run.advance(next.max(0.0));
    }
    let unfinished = |vm: &usize| run.streams[*vm].stage != Stage::Done;
    Err(SimulateError::Endless {
        at_s: run.now_s,
        unfinished: (0..run.streams.len()).filter(unfinished).collect(),
    })
}

struct Run<'a> {
    scenario: &'a Scenario,
    now_s: f64,
    streams: Vec<Stream<'a>>,
    travels: Vec<Travel>,
    orders: Orders,
    releases: Vec<Vec<usize>>,
}

impl<'a> Run<'a> {
    fn new(scenario: &'a Scenario) -> Self {
        let guests = scenario.guests.iter();
        let count = scenario.guests.len();
        Self {
            scenario,
            now_s: 0.0,
            streams: guests.map(|guest| Stream::new(guest, scenario)).collect(),
            travels: vec![Travel::default(); count],
            orders: Orders {
                limits_bytes_per_s: vec![0.0; count],
                release: Vec::new(),
                wake_s: f64::INFINITY,
                too_hot: None,
            },
            releases: Vec::new(),
        }
    }

    fn is_over(&self) -> bool {
        self.streams
            .iter()
            .all(|stream| stream.stage == Stage::Done)
    }

    /// Asks the policy, and does what it wants.
    fn obey(&mut self, policy: &mut dyn Policy) -> Result<(), SimulateError> {
        if self.orders.wake_s <= self.now_s {
            self.orders.wake_s = f64::INFINITY;
        }
        let vms: Vec<GuestView> = self.streams.iter().map(view_of).collect();
        let view = View {
            now_s: self.now_s,
            vms: &vms,
            capacity: &self.scenario.capacity,
        };
        policy.decide(&view, &mut self.orders);
        if let Some((group, best_s)) = self.orders.too_hot.take() {
            return Err(SimulateError::TooHot { group, best_s });
        }
        for mut group in std::mem::take(&mut self.orders.release) {
            group.retain(|&vm| self.streams[vm].stage == Stage::Held);
            if group.is_empty() {
                continue;
            }
            let shares = view.stop(&group).map_or_else(Vec::new, |stop| stop.1);
            for &vm in &group {
                self.streams[vm].pause();
                // A share of 0 has nothing to send.
                self.streams[vm].weight = shares.get(vm).copied().unwrap_or(0.0).max(1e-9);
                self.travels[vm].paused_s = self.now_s;
            }
            self.releases.push(group);
        }
        for (vm, stream) in self.streams.iter_mut().enumerate() {
            if stream.stage == Stage::Waiting && self.orders.limits_bytes_per_s[vm] > 0.0 {
                stream.start();
                self.travels[vm].start_s = self.now_s;
            }
        }
        Ok(())
    }

    /// Divides the links: the paused first, then the others.
    fn share(&mut self) {
        let capacity = &self.scenario.capacity;
        let flow = |stream: &Stream, limit: f64, weight: f64| Flow {
            limit_bytes_per_s: if stream.wants_to_send() { limit } else { 0.0 },
            weight,
        };
        let is_paused = |stream: &Stream| stream.stage == Stage::Stopped;
        let mut rates = vec![0.0; self.streams.len()];
        let mut taken: Vec<f64> = Vec::new();
        if self.streams.iter().any(is_paused) {
            let paused = self.streams.iter().map(|stream| {
                let weight = if is_paused(stream) {
                    stream.weight
                } else {
                    0.0
                };
                flow(stream, f64::INFINITY, weight)
            });
            rates = max_min(capacity, &[], &paused.collect::<Vec<_>>());
            taken.push(rates.iter().sum());
            let cut =
                |cut: &crate::capacity::Cut| cut.members.iter().map(|&vm| rates[vm]).sum::<f64>();
            taken.extend(capacity.cuts.iter().map(cut));
        }
        let streams = self.streams.iter().zip(&self.orders.limits_bytes_per_s);
        let running = streams.map(|(stream, &limit)| {
            let weight = if is_paused(stream) { 0.0 } else { 1.0 };
            flow(stream, limit, weight)
        });
        let running = max_min(capacity, &taken, &running.collect::<Vec<_>>());
        let all = self.streams.iter_mut().zip(&mut self.travels);
        for ((stream, travel), rate) in all.zip(rates.iter().zip(&running).map(|(a, b)| a + b)) {
            if rate != stream.rate_bytes_per_s {
                travel.rates.push((self.now_s, rate));
                stream.rate_bytes_per_s = rate;
            }
        }
    }

    fn advance(&mut self, time_s: f64) {
        self.now_s += time_s;
        for (stream, travel) in self.streams.iter_mut().zip(&mut self.travels) {
            stream.advance(time_s);
            let was_in_precopy = stream.stage == Stage::PreCopy;
            if stream.end_round() && was_in_precopy {
                travel.rounds = stream.rounds();
                if stream.stage == Stage::Held {
                    travel.ready_s = self.now_s;
                    travel.end = stream.end;
                }
            }
        }
        self.finish();
    }

    /// Groups that are through run at their destination; whether one is.
    fn finish(&mut self) -> bool {
        let before = self.releases.len();
        let (through, open): (Vec<_>, Vec<_>) = std::mem::take(&mut self.releases)
            .into_iter()
            .partition(|group| group.iter().all(|&vm| self.streams[vm].is_through()));
        for vm in through.into_iter().flatten() {
            self.streams[vm].stage = Stage::Done;
            self.travels[vm].finish_s = self.now_s;
            self.travels[vm].traffic_bytes = self.streams[vm].traffic_bytes;
        }
        self.releases = open;
        self.releases.len() < before
    }
}

fn view_of(stream: &Stream) -> GuestView {
    GuestView {
        stage: stream.stage,
        remaining_bytes: stream.remaining_bytes(),
        dirty_rate_bytes_per_s: stream.dirty_rate_bytes_per_s(),
        overhead_s: stream.overhead_s(),
    }
}

#[cfg(test)]
mod tests;
