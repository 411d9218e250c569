//! A group that QEMU moves by itself: one TCP migration per guest, all at once, auto-converge.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::json;

use super::super::watch::{Stood, stood};
use crate::clock::Micros;
use crate::lab::Lab;
use crate::process::Process;
use crate::qmp::{Qmp, QmpError};

const LIMIT: Duration = Duration::from_secs(10);
const MIGRATION_LIMIT: Duration = Duration::from_secs(180);
/// How often a migration is asked how much its guest is throttled.
const LOOK: Duration = Duration::from_millis(100);
const FIRST_PORT: u16 = 4750;

/// Keeps the QEMUs that were started for it.
#[derive(Debug, Default)]
pub struct Alone {
    processes: Vec<Process>,
}

/// One such move.
#[derive(Debug)]
pub struct Moved {
    /// When the first migration was started.
    pub begun: Micros,
    /// What each guest saw.
    pub stood: Vec<Stood>,
    /// The most that any guest was throttled.
    pub throttled_percent: u64,
}

/// One guest's two monitors.
struct Ends {
    source: Qmp,
    destination: Qmp,
    uri: String,
}

impl Alone {
    /// Moves all guests of the lab.
    ///
    /// # Errors
    /// A migration fails, or a guest lost ticks.
    pub fn migrate(
        &mut self,
        lab: &Lab,
        [from, to]: [&str; 2],
        downtime_limit: Duration,
    ) -> Result<Moved> {
        let mut started = Vec::new();
        let mut all = Vec::new();
        for (port, guest) in (FIRST_PORT..).zip(&lab.spec.guests) {
            started.push(lab.start_incoming(&guest.name, to)?);
            let mut ends = Ends {
                source: lab.monitor(&guest.name, from)?,
                destination: lab.monitor(&guest.name, to)?,
                uri: format!("tcp:{}:{port}", lab.network.host(to)?.address()),
            };
            ends.prepare(downtime_limit)?;
            all.push(ends);
        }
        let begun = Micros::now();
        for ends in &mut all {
            let uri = json!({"uri": ends.uri});
            ends.source.execute("migrate", uri, LIMIT)?;
        }
        let throttled = std::thread::scope(|scope| {
            let waiting = all.iter_mut().map(|ends| scope.spawn(|| ends.follow()));
            let waiting: Vec<_> = waiting.collect();
            let done = waiting.into_iter().map(|thread| match thread.join() {
                Ok(throttled) => throttled,
                Err(_) => bail!("a thread has panicked"),
            });
            done.collect::<Result<Vec<u64>>>()
        })?;
        let guests = lab.spec.guests.iter();
        let stood = guests.map(|guest| stood(lab, &guest.name, to, begun));
        let stood = stood.collect::<Result<_>>()?;
        for ends in &mut all {
            ends.source.execute("quit", json!({}), LIMIT)?;
        }
        // What was started for the move before is not needed any more.
        self.processes = started;
        Ok(Moved {
            begun,
            stood,
            throttled_percent: throttled.into_iter().max().unwrap_or(0),
        })
    }
}

impl Ends {
    fn prepare(&mut self, downtime_limit: Duration) -> Result<()> {
        for (monitor, throttle) in [(&mut self.source, true), (&mut self.destination, false)] {
            let capabilities = [
                ("events", true),
                ("return-path", true),
                ("auto-converge", throttle),
            ];
            let capabilities =
                capabilities.map(|(name, state)| json!({"capability": name, "state": state}));
            let arguments = json!({"capabilities": capabilities});
            monitor.execute("migrate-set-capabilities", arguments, LIMIT)?;
        }
        let parameters = json!({
            "max-bandwidth": 1_u64 << 40,
            "downtime-limit": u64::try_from(downtime_limit.as_millis())?,
        });
        self.source
            .execute("migrate-set-parameters", parameters, LIMIT)?;
        let uri = json!({"uri": self.uri});
        self.destination.execute("migrate-incoming", uri, LIMIT)?;
        Ok(())
    }

    /// Waits until the migration is complete, lets the guest run, and tells by how many percent
    /// it was throttled at most.
    fn follow(&mut self) -> Result<u64> {
        let by = Instant::now() + MIGRATION_LIMIT;
        let mut throttled = 0;
        while Instant::now() < by {
            match self.source.wait_event("MIGRATION", LOOK) {
                Ok(event) => match event.data["status"].as_str().unwrap_or_default() {
                    "completed" => {
                        self.destination.execute("cont", json!({}), LIMIT)?;
                        return Ok(throttled);
                    }
                    "failed" | "cancelled" => bail!("a migration {}", event.data["status"]),
                    _ => {}
                },
                Err(QmpError::Timeout { .. }) => {
                    let told = self.source.execute("query-migrate", json!({}), LIMIT)?;
                    let percent = told["cpu-throttle-percentage"].as_u64();
                    throttled = throttled.max(percent.unwrap_or(0));
                }
                Err(error) => return Err(error).context("a migration is not heard of"),
            }
        }
        bail!("a migration took longer than {MIGRATION_LIMIT:?}")
    }
}
