//! `pacing`: how exactly a stream goes at the rate that `pace` sets, seen where it arrives.
//!
//! A thread on the destination's host reads its interface's counters every 5 ms while the rate is
//! changed through the control socket in the midst of a round. The rate is the slope over the
//! second second after a change. The change took effect where the lines of the old and of the new
//! rate meet.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use sidecar::protocol::types::Transport;

use super::control::Driver;
use super::output::number;
use super::result::{Bound, Figure, Section, Statistic, Table};
use super::{Bench, float};
use crate::clock::Micros;
use crate::lab::Lab;

const GUEST: &str = "big:1536MiB:40MB/s:512MiB";
const MB: u64 = 1_000_000;
/// In this order: up and down, near and far.
const RATES_MB: [u64; 5] = [100, 1, 50, 10, 200];
const QUICK_RATES_MB: [u64; 3] = [50, 1, 100];
const SAMPLE_EVERY: Duration = Duration::from_millis(5);
/// A rate stands for so long; its second half is measured.
const STAND: Duration = Duration::from_secs(2);
const SECOND: Duration = Duration::from_secs(1);
/// Of Ethernet, IPv4 and TCP with time stamps.
const HEADER: u64 = 14 + 20 + 32;
const CHANGE_WITHIN_MS: f64 = 150.0;

/// Payload that had arrived at a moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Sample {
    at: Micros,
    bytes: u64,
}

/// A straight line through samples: bytes = level + slope · (t − zero).
#[derive(Debug, Clone, Copy, PartialEq)]
struct Line {
    slope: f64,
    level: f64,
}

/// What became of one setting.
#[derive(Debug, Clone, Copy)]
struct Setting {
    rate: u64,
    from: Option<u64>,
    measured: f64,
    effective_ms: Option<f64>,
}

impl Setting {
    fn error_percent(&self) -> f64 {
        (self.measured / float(self.rate * MB) - 1.0) * 100.0
    }
}

/// Runs it.
///
/// # Errors
/// The run fails, or the interface cannot be watched.
pub fn run(bench: &Bench<'_>) -> Result<Section> {
    let (rounds, rates) = if bench.quick {
        (1, &QUICK_RATES_MB[..])
    } else {
        (5, &RATES_MB[..])
    };
    let lab = bench.lab(bench.spec(&[GUEST], "10Gbit/s")?)?;
    lab.network.link("a", "b")?.unshape()?;
    let mut settings = Vec::new();
    for round in 1..=rounds {
        let found = one_run(bench, &lab, rates)?;
        let text: Vec<String> = found
            .iter()
            .map(|one| format!("{} MB/s {:+.2} %", one.rate, one.error_percent()))
            .collect();
        bench.say(&format!("pacing {round}/{rounds}: {}", text.join(", ")));
        settings.extend(found);
    }
    Ok(section(&settings, rates))
}

fn one_run(bench: &Bench<'_>, lab: &Lab, rates: &[u64]) -> Result<Vec<Setting>> {
    let mut driver = Driver::connect(lab, "big", "a", "b")?;
    let stream = driver.prepare(true, Transport::Relay)?;
    driver.pace(rates[rates.len() - 1] * MB)?;
    driver.start(stream)?;
    let stop = AtomicBool::new(false);
    let (changes, samples) = std::thread::scope(|scope| -> Result<_> {
        let watcher = scope.spawn(|| lab.network.host("b")?.enter(|| watch(&stop)));
        let changes = change_rates(bench, &mut driver, rates);
        stop.store(true, Ordering::Relaxed);
        let samples = watcher
            .join()
            .map_err(|_| anyhow!("the watcher panicked"))?;
        Ok((
            changes?,
            samples?.context("the interface cannot be watched")?,
        ))
    })?;
    driver.roll_back()?;
    Ok(evaluate(&changes, &samples))
}

/// Sets one rate after the other; when each was set, and at last the end.
fn change_rates(
    bench: &Bench<'_>,
    driver: &mut Driver,
    rates: &[u64],
) -> Result<Vec<(Micros, u64)>> {
    // The stream begins, and QEMU's first, small messages go.
    bench.interrupt.sleep(SECOND)?;
    let mut changes = Vec::new();
    for rate in rates {
        changes.push((Micros::now(), *rate));
        driver.pace(rate * MB)?;
        bench.interrupt.sleep(STAND)?;
    }
    Ok(changes)
}

/// Reads the counters of the host that the calling thread is on.
fn watch(stop: &AtomicBool) -> io::Result<Vec<Sample>> {
    let mut samples = Vec::new();
    while !stop.load(Ordering::Relaxed) {
        let text = std::fs::read_to_string("/proc/thread-self/net/dev")?;
        let bytes = received(&text).ok_or_else(|| io::Error::other("no interface to-a"))?;
        samples.push(Sample {
            at: Micros::now(),
            bytes,
        });
        std::thread::sleep(SAMPLE_EVERY);
    }
    Ok(samples)
}

/// Payload from /proc/net/dev: bytes received on `to-a`, less a header per packet.
fn received(text: &str) -> Option<u64> {
    let line = text
        .lines()
        .find_map(|line| line.trim().strip_prefix("to-a:"))?;
    let mut numbers = line.split_whitespace().map(str::parse::<u64>);
    let (bytes, packets) = (numbers.next()?.ok()?, numbers.next()?.ok()?);
    Some(bytes.saturating_sub(packets * HEADER))
}

fn evaluate(changes: &[(Micros, u64)], samples: &[Sample]) -> Vec<Setting> {
    let mut settings = Vec::new();
    let mut before: Option<(u64, Line)> = None;
    for (at, rate) in changes {
        let new = fit(samples, *at + SECOND, *at + STAND, *at);
        let old = before.and_then(|(rate, _)| Some((rate, fit(samples, *at - SECOND, *at, *at)?)));
        let Some(new) = new else { continue };
        settings.push(Setting {
            rate: *rate,
            from: old.map(|(rate, _)| rate),
            measured: new.slope,
            effective_ms: old
                .filter(|(from, old)| keeps(*from, *old) && keeps(*rate, new))
                .map(|(_, old)| meet(old, new) * 1e3),
        });
        before = Some((*rate, new));
    }
    settings
}

/// The line through the samples from `begin` to `end` (least squares), as seen from `zero`.
fn fit(samples: &[Sample], begin: Micros, end: Micros, zero: Micros) -> Option<Line> {
    let seconds = |at: Micros| {
        if at >= zero {
            at.since(zero).as_secs_f64()
        } else {
            -zero.since(at).as_secs_f64()
        }
    };
    let inside: Vec<(f64, f64)> = samples
        .iter()
        .filter(|sample| sample.at >= begin && sample.at < end)
        .map(|sample| (seconds(sample.at), float(sample.bytes)))
        .collect();
    if inside.len() < 10 {
        return None;
    }
    let n = float(inside.len() as u64);
    let mean = |pick: fn(&(f64, f64)) -> f64| inside.iter().map(pick).sum::<f64>() / n;
    let (t, y) = (mean(|one| one.0), mean(|one| one.1));
    let spread: f64 = inside.iter().map(|one| (one.0 - t).powi(2)).sum();
    let common: f64 = inside.iter().map(|one| (one.0 - t) * (one.1 - y)).sum();
    let slope = common / spread;
    Some(Line {
        slope,
        level: y - slope * t,
    })
}

/// Whether a line has the slope of its setting: only then it says when the setting began.
fn keeps(rate: u64, line: Line) -> bool {
    (line.slope / float(rate * MB) - 1.0).abs() <= 0.05
}

/// Where two lines meet, in seconds after their zero.
fn meet(old: Line, new: Line) -> f64 {
    (old.level - new.level) / (new.slope - old.slope)
}

fn section(settings: &[Setting], rates: &[u64]) -> Section {
    let setup = format!(
        "{GUEST}, first round, unshaped veth; `pace` in the order {} MB/s, 2 s each. Payload \
         counted at the destination's interface every 5 ms.",
        rates
            .iter()
            .map(u64::to_string)
            .collect::<Vec<_>>()
            .join(", ")
    );
    let mut section = Section::new("pacing", "pacing, seen at the receiver", setup);
    let mut sorted = rates.to_vec();
    sorted.sort_unstable();
    for rate in sorted {
        let errors: Vec<f64> = settings
            .iter()
            .filter(|one| one.rate == rate)
            .map(|one| one.error_percent().abs())
            .collect();
        section.figures.push(Figure::bounded(
            format!("deviation at {rate} MB/s after 1 s"),
            "%",
            &errors,
            Statistic::Median,
            Bound::AtMost(if rate <= 100 { 3.0 } else { 5.0 }),
        ));
    }
    let effective: Vec<f64> = settings.iter().filter_map(|one| one.effective_ms).collect();
    section.figures.push(Figure::bounded(
        "a change takes effect after",
        "ms",
        &effective,
        Statistic::Max,
        Bound::AtMost(CHANGE_WITHIN_MS),
    ));
    let changes = settings.iter().filter(|one| one.from.is_some()).count();
    if effective.len() < changes {
        section.notes.push(format!(
            "{} of {changes} changes cannot be dated: the rate before or after was off by more than 5 %.",
            changes - effective.len()
        ));
    }
    let row = |one: &Setting| {
        vec![
            one.from.map_or("-".to_owned(), |rate| rate.to_string()),
            one.rate.to_string(),
            number(one.measured / 1e6),
            format!("{:+.2}", one.error_percent()),
            one.effective_ms.map_or("-".to_owned(), number),
        ]
    };
    section.tables.push(Table {
        title: "Every change".to_owned(),
        columns: vec![
            "from, MB/s",
            "to, MB/s",
            "measured, MB/s",
            "deviation, %",
            "after, ms",
        ],
        rows: settings.iter().map(row).collect(),
    });
    section
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rate_and_change_are_read_from_the_curve() {
        // 10 MB/s, and from 40 ms after the command 50 MB/s.
        let bytes = |us: u64| 10 * us + 40 * us.saturating_sub(2_040_000);
        let samples: Vec<Sample> = (0..800_u64)
            .map(|n| Sample {
                at: Micros(n * 5000),
                bytes: bytes(n * 5000),
            })
            .collect();
        let found = evaluate(&[(Micros(0), 10), (Micros(2_000_000), 50)], &samples);
        assert_eq!(found.len(), 2);
        assert!(found[0].error_percent().abs() < 1e-6 && found[0].effective_ms.is_none());
        assert!(found[1].error_percent().abs() < 1e-6);
        assert!((found[1].effective_ms.unwrap() - 40.0).abs() < 1e-3);
    }

    #[test]
    fn headers_do_not_count() {
        let text = "Inter-| Receive\n face |bytes packets\n    lo: 9 1 0\n  to-a: 10066 1 0 0 0\n";
        assert_eq!(received(text), Some(10_000));
        assert_eq!(received("lo: 1 1"), None);
    }
}
