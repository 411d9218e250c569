//! What is seen of a cell after the fault: who says what, where every VM runs, what is left behind.

use std::time::{Duration, Instant};

use anyhow::Result;

use super::{
    DOUBT, END_LIMIT, FROM, LOOK_EVERY, NOTICE_LIMIT, Play, Row, SETTLE_LIMIT, TICKING, TO,
};
use crate::faults::cell::{Fault, Place, Target};
use crate::faults::log::{Entry, What};
use crate::faults::steer::{Coordinator, Said};
use crate::lab::verify::verify_stopped;
use sidecar::protocol::types::{Phase, Role};

impl Play {
    /// Waits for the first word of trouble, or a move that ended as it should have.
    pub(super) fn notice(&self, row: &mut Row) {
        if self.cell.fault == Fault::None {
            return;
        }
        let struck = self.struck_at;
        let limit = NOTICE_LIMIT * 2;
        let first = |entries: &[Entry]| {
            entries
                .iter()
                .filter(|entry| entry.at >= struck)
                .find_map(|entry| match &entry.what {
                    What::Said(Said::End(0, _)) => {
                        Some((entry.at, "committed all the same".to_owned()))
                    }
                    _ => {
                        let text = entry.trouble()?;
                        Some((entry.at, format!("{}: {text}", entry.who)))
                    }
                })
        };
        match self.log.wait(limit, first) {
            Some((at, text)) => {
                let after = at.since(struck);
                if after > NOTICE_LIMIT {
                    row.problems
                        .push(format!("noticed after {after:.1?}: {text}"));
                }
                row.noticed = Some((after, text));
            }
            None => row.problems.push(format!("not noticed within {limit:?}")),
        }
    }

    /// Where a VM runs now.
    fn runs_at(&self, guest: &str) -> Vec<String> {
        self.lab.ticks.running(guest, TICKING)
    }

    fn fits(&self, guest: &str, place: Place) -> bool {
        let hosts = self.runs_at(guest);
        match place {
            Place::Source => hosts == [FROM],
            Place::Destination => hosts == [TO],
            Place::Together => {
                hosts.len() == 1 && hosts == self.runs_at(&self.lab.spec.guests[0].name)
            }
            Place::SourceOrPaused => hosts.is_empty() || hosts == [FROM],
            Place::OneSide => hosts.len() == 1,
            Place::Lost | Place::Paused => hosts.is_empty(),
        }
    }

    fn expected_of(&self, index: usize, pair: (Place, Place)) -> Place {
        if index == 0 { pair.0 } else { pair.1 }
    }

    /// Guests that are not where they must be, in words.
    pub(super) fn misplaced(&self, pair: (Place, Place)) -> Vec<String> {
        let guests = self.lab.spec.guests.iter().enumerate();
        guests
            .filter(|(index, guest)| !self.fits(&guest.name, self.expected_of(*index, pair)))
            .map(|(index, guest)| {
                let place = self.expected_of(index, pair);
                let hosts = self.runs_at(&guest.name).join(" and ");
                let hosts = if hosts.is_empty() { "nowhere" } else { &hosts };
                format!("{} must be {place:?} and runs {hosts}", guest.name)
            })
            .collect()
    }

    /// Whether nothing will move this guest any more, as far as the living sidecars know.
    fn is_final(&self, guest: &str) -> bool {
        let away = self
            .sidecar_host()
            .filter(|_| self.cell.fault != Fault::Restart);
        [FROM, TO]
            .iter()
            .filter(|host| Some(**host) != away)
            .all(|host| match self.reports(host) {
                Ok(reports) => reports.iter().filter(|vm| vm.vm == guest).all(|vm| {
                    let runs = vm.role == Role::Destination && vm.phase == Phase::Committing;
                    vm.phase.is_final() || runs
                }),
                // A sidecar that never heard of the run, or was restarted after its end.
                Err(error) => error.to_string().contains("not known here"),
            })
    }

    /// Without help: every VM that the living can know about is where it must be.
    pub(super) fn alone(&self, row: &mut Row) -> Result<()> {
        let pair = self.expected.alone;
        let guests = &self.lab.spec.guests;
        let known = |index: usize| !self.expected_of(index, pair).is_open();
        let open = (0..guests.len()).any(|index| !known(index));
        let any_known = (0..guests.len()).any(known);
        loop {
            let over = self.since_strike() >= SETTLE_LIMIT;
            let wrong = self.misplaced(pair);
            let settled = guests
                .iter()
                .enumerate()
                .filter(|(index, _)| known(*index))
                .all(|(_, guest)| self.is_final(&guest.name));
            if wrong.is_empty() && (settled || over) {
                row.settled = any_known.then(|| self.since_strike());
                break;
            }
            if over {
                row.problems
                    .push(format!("within {SETTLE_LIMIT:?}: {}", wrong.join("; ")));
                break;
            }
            std::thread::sleep(LOOK_EVERY);
        }
        while open && self.since_strike() < DOUBT {
            let wrong = self.misplaced(pair);
            if !wrong.is_empty() {
                row.problems.push(format!("in doubt: {}", wrong.join("; ")));
                break;
            }
            std::thread::sleep(LOOK_EVERY);
        }
        let says = |entry: &Entry| entry.trouble().is_some_and(|text| text.contains("doubt"));
        if open && self.cell.target == Target::Register && !self.log.entries().iter().any(says) {
            row.problems
                .push("nobody says that the VMs are in doubt".into());
        }
        Ok(())
    }

    /// After the help: everything is where it must be, and no run and no alarm is open.
    pub(super) fn heal(&self, row: &mut Row) {
        let since = Instant::now();
        loop {
            let mut wrong = self.misplaced(self.expected.finally);
            if wrong.is_empty() {
                wrong = self.asker.open();
            }
            if wrong.is_empty() {
                row.healed = Some(since.elapsed());
                return;
            }
            if since.elapsed() >= SETTLE_LIMIT {
                let text = format!("{SETTLE_LIMIT:?} after the help: {}", wrong.join("; "));
                row.problems.push(text);
                return;
            }
            std::thread::sleep(LOOK_EVERY);
        }
    }

    /// The coordinator ends by itself, and what it says is true.
    pub(super) fn end(&self, coordinator: &mut Coordinator, row: &mut Row) {
        let killed = self.cell.target == Target::Coordinator && self.cell.fault == Fault::Kill;
        if killed {
            return;
        }
        if coordinator.process.wait(END_LIMIT).is_err() {
            row.problems
                .push(format!("the coordinator did not end within {END_LIMIT:?}"));
            return;
        }
        let ended = |entries: &[Entry]| {
            entries.iter().find_map(|entry| match entry.what {
                What::Said(Said::End(code, _)) => Some(code),
                _ => None,
            })
        };
        let Some(code) = self.log.wait(Duration::from_secs(1), ended) else {
            row.problems
                .push("the coordinator ended without a word".into());
            return;
        };
        row.code = Some(code);
        let all = |host: &str| {
            let mut guests = self.lab.spec.guests.iter();
            guests.all(|guest| self.runs_at(&guest.name) == [host])
        };
        let truth = match code {
            0 => all(TO),
            2 => all(FROM),
            3 => true,
            _ => false,
        };
        if !truth {
            row.problems
                .push(format!("the coordinator's exit code {code} is not true"));
        }
    }

    /// One copy of every VM, whole, and nothing left behind.
    pub(super) fn check_everything(&self, row: &mut Row) {
        let mut places = Vec::new();
        for (index, guest) in self.lab.spec.guests.iter().enumerate() {
            let record = self.lab.ticks.record(&guest.name);
            for overlap in record.overlaps() {
                row.problems.push(format!(
                    "SPLIT BRAIN: {} ticked on {} after it had on {}",
                    guest.name, overlap.host, overlap.other
                ));
            }
            if let Some(at) = record.breaks().first() {
                row.problems.push(format!(
                    "{} went from tick {} to {}",
                    guest.name, at.expected, at.found
                ));
            }
            let host = self.runs_at(&guest.name).pop();
            if let Some(host) = &host {
                if let Err(error) = verify_stopped(&self.lab, &guest.name, host) {
                    row.problems.push(format!("{}: {error:#}", guest.name));
                }
            }
            let lost = self.expected_of(index, self.expected.finally) == Place::Lost;
            if host.is_none() && !lost {
                row.problems.push(format!("{} runs nowhere", guest.name));
            }
            places.push((guest.name.clone(), host));
        }
        row.outcome = outcome(&places, self.expected.alone);
        let by = Instant::now() + Duration::from_secs(3);
        loop {
            match self.baseline.differences(&self.lab, &places) {
                Ok(left) if left.is_empty() => return,
                _ if Instant::now() < by => std::thread::sleep(LOOK_EVERY),
                Ok(left) => {
                    row.problems
                        .extend(left.into_iter().map(|one| format!("left: {one}")));
                    return;
                }
                Err(error) => {
                    row.problems.push(format!("{error:#}"));
                    return;
                }
            }
        }
    }
}

fn outcome(places: &[(String, Option<String>)], alone: (Place, Place)) -> String {
    let word = |place: &Option<String>| match place.as_deref() {
        Some(FROM) => "source",
        Some(_) => "destination",
        None => "lost",
    };
    let mut words: Vec<&str> = places.iter().map(|(_, place)| word(place)).collect();
    words.dedup();
    let doubt = alone.0.is_open() || alone.1.is_open();
    let doubt = if doubt { "open → " } else { "" };
    format!("{doubt}{}", words.join(" + "))
}
