//! `muster dirty`: has a sidecar measure how a VM dirties its memory.

pub mod show;

use std::sync::atomic::{AtomicU8, Ordering};
use std::time::{Duration, Instant};

use sidecar::protocol::command::Command;
use sidecar::protocol::dirty::{
    DURATION_MS, DirtyEnd, DirtyEvent, DirtyStartArgs, DirtyVmArgs, INTERVAL_MS,
};

use crate::application::{ControlAddress, HostId};
use crate::client::{Client, Message};

/// The interrupt flag is looked at this often.
const TICK: Duration = Duration::from_millis(50);
const CONNECT_WITHIN: Duration = Duration::from_secs(3);
/// A sidecar that says nothing for so long, beyond three intervals, hangs.
const SILENCE: Duration = Duration::from_secs(10);
/// A measurement that is told to stop ends within this time.
const STOP_WITHIN: Duration = Duration::from_secs(3);
/// What the sidecar's own limit leaves for late intervals.
const SLACK: Duration = Duration::from_secs(30);
/// Cells of the heat map: four lines of 64.
const HEAT_CELLS: usize = 256;

/// What is to be measured.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wish {
    /// The VM's name.
    pub vm: String,
    /// Length of an interval.
    pub interval: Duration,
    /// How long in all; zero: until it is interrupted.
    pub duration: Duration,
    /// For which delays the dirty set is predicted.
    pub delays: Vec<Duration>,
}

/// Why nothing, or nothing more, was measured.
#[derive(Debug, thiserror::Error)]
pub enum MeasureError {
    /// No sidecar took the measurement.
    #[error("VM `{vm}` cannot be measured: {}", errors.join("; "))]
    Refused {
        /// The VM.
        vm: String,
        /// What each sidecar said.
        errors: Vec<String>,
    },
    /// The interval or the duration cannot be used.
    #[error("{0}")]
    Wish(String),
    /// The sidecar is gone.
    #[error("{0}")]
    Lost(String),
    /// It ended before its time.
    #[error("the measurement of VM `{vm}` has ended: {error}")]
    Ended {
        /// The VM.
        vm: String,
        /// Why.
        error: String,
    },
}

fn ms(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

impl Wish {
    fn arguments(&self) -> Result<DirtyStartArgs, MeasureError> {
        if self.duration < self.interval && !self.duration.is_zero() {
            let text = "a duration shorter than an interval measures nothing";
            return Err(MeasureError::Wish(text.into()));
        }
        let longest = Duration::from_millis(*DURATION_MS.end());
        if self.duration > longest {
            let text = format!("a duration is at most {} h", longest.as_secs() / 3600);
            return Err(MeasureError::Wish(text));
        }
        // The sidecar's limit is for a program that is gone: this one ends it itself.
        let limit = if self.duration.is_zero() {
            longest
        } else {
            self.duration.saturating_mul(2).saturating_add(SLACK)
        };
        let arguments = DirtyStartArgs {
            vm: self.vm.clone(),
            interval_ms: ms(self.interval),
            duration_ms: ms(limit.min(longest)),
            delays_ms: self.delays.iter().copied().map(ms).collect(),
            heat_cells: HEAT_CELLS,
            disks: true,
        };
        arguments.check().map_err(|error| {
            let (least, most) = (INTERVAL_MS.start(), INTERVAL_MS.end());
            let text = format!("{error} (an interval is {least} to {most} ms)");
            MeasureError::Wish(text)
        })?;
        Ok(arguments)
    }
}

/// Measures until the time is up, or `interrupt` is not 0; `each` gets every event with its unix
/// time in microseconds. The sidecars are tried in their order.
///
/// # Errors
/// No sidecar takes it, the sidecar is lost, or the measurement ends before its time.
pub fn measure(
    sidecars: &[ControlAddress],
    wish: &Wish,
    interrupt: &AtomicU8,
    each: &mut dyn FnMut(&DirtyEvent, i64),
) -> Result<(), MeasureError> {
    let arguments = wish.arguments()?;
    let hosts = (0..).map(HostId).zip(sidecars.iter().cloned());
    let client = Client::connect_to(hosts);
    let mut errors = Vec::new();
    let mut up = Vec::new();
    for (host, result) in client.wait_connected(CONNECT_WITHIN) {
        match result {
            Ok(_) => up.push(host),
            Err(error) => errors.push(error.to_string()),
        }
    }
    up.sort_unstable();
    for host in up {
        let mut session = Session {
            client: &client,
            host,
            wish,
            measured: Duration::ZERO,
            stopped: None,
            heard: Instant::now(),
        };
        let mut start = |arguments: &DirtyStartArgs| {
            let start = Command::DirtyStart(arguments.clone());
            match client.send(host, &start) {
                Some(id) => session.run(id, interrupt, each),
                None => Ok(Ran::Refused("the connection is gone".into())),
            }
        };
        let ran = match start(&arguments)? {
            // A sidecar before 1.6 measures no disks.
            Ran::Refused(error) if error.contains("`disks`") => start(&DirtyStartArgs {
                disks: false,
                ..arguments.clone()
            })?,
            ran => ran,
        };
        match ran {
            Ran::Over => return Ok(()),
            Ran::Refused(error) => errors.push(error),
        }
    }
    if errors.is_empty() {
        errors.push(format!("no sidecar answers within {CONNECT_WITHIN:?}"));
    }
    Err(MeasureError::Refused {
        vm: wish.vm.clone(),
        errors,
    })
}

enum Ran {
    Over,
    Refused(String),
}

struct Session<'a> {
    client: &'a Client,
    host: HostId,
    wish: &'a Wish,
    measured: Duration,
    stopped: Option<Instant>,
    heard: Instant,
}

impl Session<'_> {
    fn run(
        &mut self,
        start: u64,
        interrupt: &AtomicU8,
        each: &mut dyn FnMut(&DirtyEvent, i64),
    ) -> Result<Ran, MeasureError> {
        loop {
            if interrupt.load(Ordering::Relaxed) > 0 {
                self.stop();
            }
            match self.client.receive(TICK) {
                Some((host, _)) if host != self.host => {}
                Some((_, Message::Lost(error))) => {
                    return Err(MeasureError::Lost(error.to_string()));
                }
                Some((_, Message::Answer { id, result })) if id == start => {
                    self.heard = Instant::now();
                    if let Err(error) = result {
                        return Ok(Ran::Refused(error.desc));
                    }
                }
                Some((_, Message::Dirty { event, at_us })) if event.vm() == self.wish.vm => {
                    self.heard = Instant::now();
                    each(&event, at_us);
                    if let Some(result) = self.take(&event) {
                        return result.map(|()| Ran::Over);
                    }
                }
                _ => {}
            }
            self.check_silence()?;
        }
    }

    /// Counts an interval; how it ended, if it did.
    fn take(&mut self, event: &DirtyEvent) -> Option<Result<(), MeasureError>> {
        match event {
            DirtyEvent::DirtyStarted { .. } => None,
            DirtyEvent::DirtyRound(round) => {
                let intervals = u32::try_from(round.missed.saturating_add(1)).unwrap_or(u32::MAX);
                let length = Duration::from_micros(round.duration_us);
                self.measured = self
                    .measured
                    .saturating_add(length.saturating_mul(intervals));
                let wanted = self.wish.duration;
                // Half an interval is nearer to none than to one.
                if !wanted.is_zero() && self.measured + length / 2 >= wanted {
                    self.stop();
                }
                None
            }
            DirtyEvent::DirtyEnded { reason, error, .. } => {
                if self.stopped.is_some() {
                    return Some(Ok(()));
                }
                let why = match reason {
                    DirtyEnd::Stopped => "somebody else stopped it",
                    DirtyEnd::Duration => "its time was up",
                    DirtyEnd::Migration => "the VM is being migrated",
                    DirtyEnd::Failed => "it failed",
                };
                Some(Err(MeasureError::Ended {
                    vm: self.wish.vm.clone(),
                    error: error.clone().unwrap_or_else(|| why.into()),
                }))
            }
        }
    }

    fn stop(&mut self) {
        if self.stopped.is_none() {
            let vm = self.wish.vm.clone();
            let stop = Command::DirtyStop(DirtyVmArgs { vm });
            // Without a connection the sidecar has ended it already.
            let _ = self.client.send(self.host, &stop);
            self.stopped = Some(Instant::now());
        }
    }

    fn check_silence(&self) -> Result<(), MeasureError> {
        let patience = SILENCE + self.wish.interval.max(Duration::from_secs(1)) * 3;
        let hangs = match self.stopped {
            Some(at) => at.elapsed() > STOP_WITHIN,
            None => self.heard.elapsed() > patience,
        };
        if hangs {
            let text = "the sidecar says nothing any more: it hangs, or it is too far away";
            return Err(MeasureError::Lost(text.into()));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn absurd_wishes_are_refused() {
        let seconds = Duration::from_secs;
        let wish = |interval, duration, delay| Wish {
            vm: "db".into(),
            interval,
            duration,
            delays: vec![delay],
        };
        let good = wish(seconds(1), seconds(10), seconds(10));
        let arguments = good.arguments().expect("good");
        assert_eq!(
            (arguments.interval_ms, arguments.duration_ms),
            (1000, 50_000)
        );
        let endless = wish(seconds(1), Duration::ZERO, seconds(10));
        let arguments = endless.arguments().expect("good");
        assert_eq!(arguments.duration_ms, 86_400_000);
        for bad in [
            wish(Duration::ZERO, seconds(10), seconds(1)),
            wish(seconds(61), seconds(100), seconds(1)),
            wish(seconds(2), seconds(1), seconds(1)),
            wish(seconds(1), seconds(10), Duration::ZERO),
            wish(seconds(1), seconds(10), Duration::MAX),
            wish(seconds(1), Duration::MAX, seconds(1)),
        ] {
            assert!(bad.arguments().is_err(), "{bad:?}");
        }
    }
}
