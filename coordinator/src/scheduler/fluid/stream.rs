//! One VM on its way: rounds, phases, what is left.

use super::guest::{Guest, Load, Scenario};
use super::simulate::Stage;
use crate::scheduler::predict::{Dirtying, End, Progress, Round, Termination};

/// Less than this is nothing, in seconds and, as a part, in bytes.
const NOTHING: f64 = 1e-9;

/// What is dirty of memory, or of a disk.
#[derive(Debug)]
struct Store<'a> {
    load: &'a Load,
    phase: usize,
    phase_left_s: f64,
    /// Whether its copy has begun: what is dirtied before is sent with it.
    is_tracked: bool,
    /// Dirtied since the round began.
    fresh_bytes: f64,
}

impl<'a> Store<'a> {
    fn new(load: &'a Load) -> Self {
        Self {
            load,
            phase: 0,
            phase_left_s: load.phases[0].duration_s,
            is_tracked: false,
            fresh_bytes: 0.0,
        }
    }

    fn dirtying(&self) -> &'a Dirtying {
        &self.load.phases[self.phase].dirtying
    }

    fn advance(&mut self, time_s: f64) {
        if self.is_tracked {
            self.fresh_bytes = self.dirtying().grown(self.fresh_bytes, time_s);
        }
        self.phase_left_s -= time_s;
        if self.phase_left_s <= NOTHING {
            self.phase = (self.phase + 1) % self.load.phases.len();
            self.phase_left_s += self.load.phases[self.phase].duration_s;
        }
    }
}

/// A VM's stream.
#[derive(Debug)]
pub(super) struct Stream<'a> {
    guest: &'a Guest,
    termination: Termination,
    least_round_s: f64,
    pub stage: Stage,
    pub rate_bytes_per_s: f64,
    /// What is left of this round.
    pub to_send_bytes: f64,
    sent_in_round_bytes: f64,
    round_s: f64,
    sending_s: f64,
    memory: Store<'a>,
    disk: Option<Store<'a>>,
    progress: Progress,
    /// Whether memory is being copied, and if so whether for the first time.
    has_memory: bool,
    is_first_copy: bool,
    overhead_left_s: f64,
    pub end: Option<End>,
    pub traffic_bytes: f64,
    /// Its weight among those that are paused.
    pub weight: f64,
}

impl<'a> Stream<'a> {
    pub fn new(guest: &'a Guest, scenario: &Scenario) -> Self {
        Self {
            guest,
            termination: scenario.termination,
            least_round_s: scenario.least_round_s,
            stage: Stage::Waiting,
            rate_bytes_per_s: 0.0,
            to_send_bytes: 0.0,
            sent_in_round_bytes: 0.0,
            round_s: 0.0,
            sending_s: 0.0,
            memory: Store::new(&guest.load),
            disk: guest.disk.as_ref().map(|disk| Store::new(&disk.load)),
            progress: Progress::new(scenario.termination, guest.memory_bytes),
            has_memory: false,
            is_first_copy: true,
            overhead_left_s: guest.overhead_s,
            end: None,
            traffic_bytes: 0.0,
            weight: 0.0,
        }
    }

    pub fn start(&mut self) {
        self.stage = Stage::PreCopy;
        if let (Some(store), Some(disk)) = (&mut self.disk, &self.guest.disk) {
            store.is_tracked = true;
            self.to_send_bytes = disk.size_bytes;
            let bound = Termination::Xen {
                threshold_bytes: disk.threshold_bytes,
                max_rounds: 30,
                traffic_factor: 3.0,
            };
            self.progress = Progress::new(bound, disk.size_bytes);
        } else {
            self.begin_memory(0.0);
        }
    }

    fn begin_memory(&mut self, with_bytes: f64) {
        self.has_memory = true;
        self.memory.is_tracked = true;
        self.to_send_bytes = self.guest.memory_bytes + with_bytes;
        self.progress = Progress::new(self.termination, self.guest.memory_bytes);
    }

    /// Paused: what is left is all that will be.
    pub fn pause(&mut self) {
        self.to_send_bytes = self.remaining_bytes();
        self.stage = Stage::Stopped;
        self.memory.is_tracked = false;
        if let Some(disk) = &mut self.disk {
            disk.is_tracked = false;
        }
    }

    pub fn wants_to_send(&self) -> bool {
        let is_open = matches!(self.stage, Stage::PreCopy | Stage::Held | Stage::Stopped);
        is_open && self.to_send_bytes > 0.0
    }

    pub fn is_through(&self) -> bool {
        self.stage == Stage::Stopped && self.to_send_bytes == 0.0 && self.overhead_left_s <= NOTHING
    }

    /// How long until something happens to it, at its present rate.
    pub fn next_event_s(&self) -> f64 {
        let own = match self.stage {
            Stage::Waiting | Stage::Done => f64::INFINITY,
            _ if self.to_send_bytes > 0.0 => self.to_send_bytes / self.rate_bytes_per_s,
            Stage::Stopped if self.overhead_left_s > NOTHING => self.overhead_left_s,
            // It waits for its group.
            Stage::Stopped => f64::INFINITY,
            _ => self.least_round_s - self.round_s,
        };
        let phases = [Some(&self.memory), self.disk.as_ref()];
        let phases = phases.into_iter().flatten().map(|store| store.phase_left_s);
        let is_done = matches!(self.stage, Stage::Stopped | Stage::Done);
        phases.filter(|_| !is_done).fold(own.max(0.0), f64::min)
    }

    pub fn advance(&mut self, time_s: f64) {
        if matches!(self.stage, Stage::Done) {
            return;
        }
        self.memory.advance(time_s);
        if let Some(disk) = &mut self.disk {
            disk.advance(time_s);
        }
        if matches!(self.stage, Stage::Waiting) {
            return;
        }
        self.round_s += time_s;
        if self.to_send_bytes > 0.0 {
            let mut sent = (self.rate_bytes_per_s * time_s).min(self.to_send_bytes);
            if self.to_send_bytes - sent <= NOTHING * sent + 1e-6 {
                sent = self.to_send_bytes;
            }
            self.to_send_bytes -= sent;
            self.sent_in_round_bytes += sent;
            self.traffic_bytes += sent;
            self.sending_s += time_s;
        } else if self.stage == Stage::Stopped {
            self.overhead_left_s -= time_s;
        }
    }

    /// Begins the next round if this one is over; whether it was.
    pub fn end_round(&mut self) -> bool {
        let is_running = matches!(self.stage, Stage::PreCopy | Stage::Held);
        if !is_running || self.to_send_bytes > 0.0 || self.round_s < self.least_round_s - NOTHING {
            return false;
        }
        let take = |store: &mut Store| std::mem::take(&mut store.fresh_bytes);
        let on_disk = self.disk.as_mut().map_or(0.0, take);
        let in_memory = take(&mut self.memory);
        let round = Round {
            sent_bytes: self.sent_in_round_bytes,
            dirtied_bytes: on_disk + in_memory,
            rate_bytes_per_s: if self.sending_s > 0.0 {
                self.sent_in_round_bytes / self.sending_s
            } else {
                f64::MAX
            },
        };
        self.sent_in_round_bytes = 0.0;
        self.round_s = 0.0;
        self.sending_s = 0.0;
        if self.has_memory {
            self.is_first_copy = false;
            self.to_send_bytes = round.dirtied_bytes;
            if self.stage == Stage::PreCopy {
                self.end = self.progress.round_ended(round);
                if self.end.is_some() {
                    self.stage = Stage::Held;
                }
            }
        } else if self.progress.round_ended(round).is_some() {
            self.begin_memory(on_disk);
        } else {
            self.to_send_bytes = on_disk;
        }
        true
    }

    pub fn rounds(&self) -> u32 {
        self.progress.rounds()
    }

    /// What it would have to send if it dirtied nothing more.
    pub fn remaining_bytes(&self) -> f64 {
        let disk_bytes = self.guest.disk.as_ref().map_or(0.0, |disk| disk.size_bytes);
        match self.stage {
            Stage::Waiting => return self.guest.memory_bytes + disk_bytes,
            Stage::Stopped | Stage::Done => return self.to_send_bytes,
            Stage::PreCopy | Stage::Held => {}
        }
        let stores = [Some(&self.memory), self.disk.as_ref()];
        let stores = stores.into_iter().flatten();
        let fresh: f64 = stores.clone().map(|store| store.fresh_bytes).sum();
        if !self.has_memory {
            return (self.to_send_bytes + fresh).min(disk_bytes) + self.guest.memory_bytes;
        }
        // What is dirty again before it was sent again is to be sent once.
        let sets = stores.map(|store| store.dirtying().set_bytes());
        let most = if self.is_first_copy {
            self.guest.memory_bytes + disk_bytes
        } else {
            sets.sum::<f64>()
        };
        (self.to_send_bytes + fresh).min(most.max(self.to_send_bytes).max(fresh))
    }

    /// Dirtied in a second, as a bitmap would show that is cleaned every second.
    pub fn dirty_rate_bytes_per_s(&self) -> f64 {
        let stores = [Some(&self.memory), self.disk.as_ref()];
        let stores = stores.into_iter().flatten();
        stores.map(|store| store.dirtying().dirtied(1.0)).sum()
    }

    pub fn overhead_s(&self) -> f64 {
        self.guest.overhead_s
    }
}
