//! Live progress: redrawn in place on a terminal, plain lines elsewhere.

use std::time::Duration;

use crate::engine::{Step, VmProgress};
use crate::observer::{GroupName, Observer, Progress};
use crate::screen::Screen;
use rate_limiter::{Bytes, BytesPerSecond};

/// Without a terminal, VMs are reported this often.
const PLAIN_INTERVAL: Duration = Duration::from_secs(2);

/// Shows a move as it goes.
#[derive(Debug)]
pub struct Live {
    screen: Screen,
    last: Option<Progress>,
    next_plain: Duration,
}

impl Live {
    /// Writes to standard output, or to standard error where that carries JSON.
    #[must_use]
    pub fn new(to_stderr: bool) -> Self {
        Self {
            screen: Screen::new(to_stderr),
            last: None,
            next_plain: Duration::ZERO,
        }
    }

    fn draw(&mut self) {
        if let Some(progress) = &self.last {
            self.screen.draw(&lines(progress));
        }
    }

    /// Leaves the last state on the screen.
    pub fn finish(&mut self) {
        if self.screen.is_terminal() {
            self.draw();
            self.screen.keep();
        }
    }
}

impl Observer for Live {
    fn survey(&mut self, what: &str) {
        self.screen.put(&format!("{what}\n"));
    }

    fn step(&mut self, group: &GroupName, step: &Step) {
        self.screen.wipe();
        let line = format!("{}: {step}\n", group.vms.join(", "));
        self.screen.put(&line);
        if self.screen.is_terminal() {
            self.draw();
        }
    }

    fn progress(&mut self, progress: &Progress) {
        self.last = Some(progress.clone());
        if self.screen.is_terminal() {
            self.draw();
        } else if progress.elapsed >= self.next_plain {
            self.next_plain = progress.elapsed + PLAIN_INTERVAL;
            let moving = progress.vms.iter().filter(|vm| vm.phase.is_some());
            let text: Vec<String> = moving.map(|vm| plain(progress.elapsed, vm)).collect();
            if !text.is_empty() {
                self.screen.put(&(text.join("\n") + "\n"));
            }
        }
    }
}

fn phase(vm: &VmProgress) -> String {
    vm.phase.map_or("waiting".into(), |phase| phase.to_string())
}

fn left(vm: &VmProgress) -> String {
    vm.time_left
        .map_or("–".into(), |left| format!("{:.0} s", left.as_secs_f64()))
}

fn lines(progress: &Progress) -> Vec<String> {
    let width = progress
        .vms
        .iter()
        .map(|vm| vm.name.chars().count())
        .max()
        .unwrap_or(0)
        .max(4);
    let mut lines = vec![format!(
        "{:<width$}  {:<12} {:>5} {:>11} {:>11} {:>11} {:>7}  {:.1} s",
        "VM",
        "phase",
        "round",
        "remaining",
        "rate",
        "dirty rate",
        "left",
        progress.elapsed.as_secs_f64()
    )];
    for vm in &progress.vms {
        let throttle = match vm.throttle_percent {
            0 => String::new(),
            percent => format!("  vCPUs slowed by {percent} %"),
        };
        lines.push(format!(
            "{:<width$}  {:<12} {:>5} {:>11} {:>11} {:>11} {:>7}  {}{throttle}",
            vm.name,
            phase(vm),
            vm.round,
            Bytes(vm.remaining_bytes).to_string(),
            BytesPerSecond(vm.rate_bytes_per_s).to_string(),
            BytesPerSecond(vm.dirty_rate_bytes_per_s).to_string(),
            left(vm),
            bar(vm)
        ));
    }
    lines
}

/// How much of the memory is clean at the destination.
fn bar(vm: &VmProgress) -> String {
    const CELLS: u64 = 20;
    let clean = vm.total_bytes.saturating_sub(vm.remaining_bytes);
    let begun = vm.transferred_bytes > 0 && vm.total_bytes > 0;
    let full = if begun {
        clean.saturating_mul(CELLS) / vm.total_bytes
    } else {
        0
    };
    (0..CELLS)
        .map(|cell| if cell < full { '█' } else { '░' })
        .collect()
}

fn plain(elapsed: Duration, vm: &VmProgress) -> String {
    format!(
        "{:>7.1} s  {}: {}, round {}, {} left, {} sent, {}, dirty rate {}, ready in {}",
        elapsed.as_secs_f64(),
        vm.name,
        phase(vm),
        vm.round,
        Bytes(vm.remaining_bytes),
        Bytes(vm.transferred_bytes),
        BytesPerSecond(vm.rate_bytes_per_s),
        BytesPerSecond(vm.dirty_rate_bytes_per_s),
        left(vm)
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::application::VmId;
    use sidecar::protocol::types::Phase;

    #[test]
    fn a_line_says_what_a_person_asks() {
        let vm = VmProgress {
            vm: VmId(0),
            name: "web".into(),
            phase: Some(Phase::Precopy),
            round: 2,
            total_bytes: 128 << 20,
            remaining_bytes: 64 << 20,
            transferred_bytes: 64 << 20,
            rate_bytes_per_s: 50_000_000,
            dirty_rate_bytes_per_s: 4_000_000,
            throttle_percent: 20,
            time_left: Some(Duration::from_secs(7)),
            error: None,
        };
        let progress = Progress {
            elapsed: Duration::from_secs(3),
            vms: vec![vm],
        };
        let line = &lines(&progress)[1];
        for part in [
            "web",
            "precopy",
            "64.0 MiB",
            "50.0 MB/s",
            "4.0 MB/s",
            "7 s",
            "20 %",
        ] {
            assert!(line.contains(part), "{part}: {line}");
        }
        assert_eq!(line.matches('█').count(), 10);
    }
}
