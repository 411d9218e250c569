//! A measurement for people: figures, and a heat map of the VM's memory.

use std::fmt::Write;
use std::time::Duration;

use rate_limiter::{Bytes, BytesPerSecond};
use sidecar::protocol::dirty::{DirtyDisk, DirtyEvent, DirtyRound, DirtySource, Heat, Predicted};

use crate::screen::Screen;

/// Cells in a line of the heat map.
const LINE: usize = 64;

/// Shows a measurement as it goes.
#[derive(Debug)]
pub struct Show {
    screen: Screen,
    elapsed: Duration,
    last: Option<DirtyRound>,
}

impl Show {
    /// On standard output.
    #[must_use]
    pub fn new() -> Self {
        Self {
            screen: Screen::new(false),
            elapsed: Duration::ZERO,
            last: None,
        }
    }

    /// Shows an event.
    pub fn event(&mut self, event: &DirtyEvent) {
        match event {
            DirtyEvent::DirtyStarted {
                vm,
                memory_bytes,
                interval_ms,
                note,
                ..
            } => {
                let every = Duration::from_millis(*interval_ms);
                let mut text = format!("{vm}: {}, every {every:?}\n", Bytes(*memory_bytes));
                if let Some(note) = note {
                    let _ = writeln!(text, "note: {note}");
                }
                self.screen.put(&text);
            }
            DirtyEvent::DirtyRound(round) => {
                self.elapsed += Duration::from_micros(round.duration_us);
                if self.screen.is_terminal() {
                    self.screen.draw(&picture(round, self.elapsed));
                } else {
                    self.screen.put(&(plain(round, self.elapsed) + "\n"));
                }
                self.last = Some(round.clone());
            }
            DirtyEvent::DirtyEnded { .. } => {
                // Without a terminal, the picture is drawn once.
                match self.last.take() {
                    Some(round) if !self.screen.is_terminal() => {
                        self.screen.draw(&picture(&round, self.elapsed));
                    }
                    _ => self.screen.keep(),
                }
            }
        }
    }
}

impl Default for Show {
    fn default() -> Self {
        Self::new()
    }
}

fn rates(round: &DirtyRound) -> String {
    format!(
        "{}, mean {}, max {}",
        BytesPerSecond(round.dirty_rate_bytes_per_s),
        BytesPerSecond(round.mean_dirty_rate_bytes_per_s),
        BytesPerSecond(round.max_dirty_rate_bytes_per_s)
    )
}

fn working_set(round: &DirtyRound) -> String {
    match (round.working_set_bytes, round.working_set_stable) {
        (Some(bytes), Some(true)) => format!("{} (stable)", Bytes(bytes)),
        (Some(bytes), _) => format!("{} (still growing)", Bytes(bytes)),
        (None, _) => "not known: only the rate is".into(),
    }
}

fn predicted(predicted: &Predicted) -> String {
    let delay = Duration::from_millis(predicted.delay_ms);
    match predicted.dirty_bytes {
        Some(bytes) => format!("{} in {delay:?}", Bytes(bytes)),
        None => format!("– in {delay:?} (not measured for so long yet)"),
    }
}

fn predictions(round: &DirtyRound) -> impl Iterator<Item = String> {
    let unknown = round.source == DirtySource::CalcDirtyRate;
    let unknown = unknown.then(|| "not known: only the rate is".into());
    round.predicted.iter().map(predicted).chain(unknown)
}

fn of_disk(disk: &DirtyDisk) -> String {
    format!(
        "{}: {}, mean {}, max {}; {} written",
        disk.node,
        BytesPerSecond(disk.dirty_rate_bytes_per_s),
        BytesPerSecond(disk.mean_dirty_rate_bytes_per_s),
        BytesPerSecond(disk.max_dirty_rate_bytes_per_s),
        Bytes(disk.dirty_set_bytes)
    )
}

fn missed(round: &DirtyRound) -> String {
    match round.missed {
        0 => String::new(),
        missed => format!(", {missed} intervals missed"),
    }
}

/// Everything, as lines.
fn picture(round: &DirtyRound, elapsed: Duration) -> Vec<String> {
    let mut lines = vec![
        format!(
            "{}, interval {}, {:.1} s{}",
            round.vm,
            round.round,
            elapsed.as_secs_f64(),
            missed(round)
        ),
        format!("dirty rate   {}", rates(round)),
        format!("working set  {}", working_set(round)),
    ];
    lines.extend(predictions(round).map(|text| format!("predicted    {text}")));
    lines.extend(
        round
            .disks
            .iter()
            .map(|disk| format!("disk         {}", of_disk(disk))),
    );
    match &round.heat {
        Some(heat) => lines.extend(map(heat)),
        None => lines.push("memory       no heat map: only the rate is known".into()),
    }
    lines
}

/// The heat map: one character a cell, 64 a line.
fn map(heat: &Heat) -> Vec<String> {
    let cells = heat.percent.len().max(1);
    let each = heat.span_bytes / u64::try_from(cells).unwrap_or(1);
    let head = format!(
        "memory       {} a cell, of it dirtied: · 0 ░ to 25 ▒ 50 ▓ 75 █ 100 %",
        Bytes(each)
    );
    let lines = heat.percent.chunks(LINE).enumerate().map(|(line, cells)| {
        let offset = each.saturating_mul(u64::try_from(line * LINE).unwrap_or(u64::MAX));
        let cells: String = cells.iter().copied().map(cell).collect();
        format!("{:>11}  {cells}", Bytes(offset).to_string())
    });
    std::iter::once(head).chain(lines).collect()
}

fn cell(percent: u8) -> char {
    match percent {
        0 => '·',
        1..=25 => '░',
        26..=50 => '▒',
        51..=75 => '▓',
        _ => '█',
    }
}

/// One line, for logs and pipes.
fn plain(round: &DirtyRound, elapsed: Duration) -> String {
    let mut text = format!(
        "{:>7.1} s  {}: dirty rate {}",
        elapsed.as_secs_f64(),
        round.vm,
        rates(round)
    );
    if round.source == DirtySource::Export {
        let _ = write!(text, "; working set {}", working_set(round));
        for predicted in predictions(round) {
            let _ = write!(text, "; predicted {predicted}");
        }
    }
    for disk in &round.disks {
        let _ = write!(text, "; disk {}", of_disk(disk));
    }
    text + &missed(round)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn round() -> DirtyRound {
        let mut percent = vec![0; 128];
        percent[1] = 3;
        percent[64] = 100;
        DirtyRound {
            vm: "db".into(),
            source: DirtySource::Export,
            round: 7,
            duration_us: 1_000_000,
            missed: 0,
            dirtied_bytes: 2 << 20,
            dirty_rate_bytes_per_s: 40_000_000,
            mean_dirty_rate_bytes_per_s: 39_000_000,
            max_dirty_rate_bytes_per_s: 41_000_000,
            working_set_bytes: Some(2 << 20),
            working_set_stable: Some(true),
            predicted: vec![
                Predicted {
                    delay_ms: 1000,
                    dirty_bytes: Some(1 << 20),
                },
                Predicted {
                    delay_ms: 10_000,
                    dirty_bytes: None,
                },
            ],
            heat: Some(Heat {
                span_bytes: 128 << 20,
                percent,
            }),
            disks: Vec::new(),
        }
    }

    #[test]
    fn the_picture_says_what_was_measured() {
        let lines = picture(&round(), Duration::from_secs(7));
        assert_eq!(lines.len(), 8);
        let text = lines.join("\n");
        for part in [
            "db, interval 7, 7.0 s",
            "40.0 MB/s, mean 39.0 MB/s, max 41.0 MB/s",
            "2.0 MiB (stable)",
            "1.0 MiB in 1s",
            "– in 10s",
            "1.0 MiB a cell",
        ] {
            assert!(text.contains(part), "{part}: {text}");
        }
        let cells = |line: &String| -> Vec<char> {
            let chars: Vec<char> = line.chars().collect();
            chars[13..].to_vec()
        };
        let (first, second) = (cells(&lines[6]), cells(&lines[7]));
        assert_eq!((first.len(), first[0], first[1]), (LINE, '·', '░'));
        assert_eq!((second.len(), second[0], second[1]), (LINE, '█', '·'));
        assert!(
            lines[7].trim_start().starts_with("64.0 MiB"),
            "{}",
            lines[7]
        );
    }

    #[test]
    fn a_rate_alone_is_said_to_be_alone() {
        let rate = DirtyRound {
            source: DirtySource::CalcDirtyRate,
            missed: 2,
            working_set_bytes: None,
            working_set_stable: None,
            predicted: vec![],
            heat: None,
            ..round()
        };
        let text = picture(&rate, Duration::from_secs(1)).join("\n");
        assert_eq!(text.matches("only the rate").count(), 3, "{text}");
        assert!(text.contains("2 intervals missed"), "{text}");
        let line = plain(&rate, Duration::from_secs(1));
        assert!(line.contains("dirty rate 40.0 MB/s"), "{line}");
        assert!(!line.contains("working set"), "{line}");
    }
}
