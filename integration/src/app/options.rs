//! The command line of `muster-testbed app`, and the quantities that follow from it.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Result, ensure};
use clap::Args;
use coordinator::application::Policy;
use rate_limiter::{Bytes, BytesPerSecond, units};

use super::load::shape::Course;
use super::load::{Pace, Shape};
use super::sla::Limit;
use super::stage::StageSpec;
use super::wan_plan::{Change, State};
use crate::qemu::{Accel, AccelChoice};

/// Connections of the users of an open loop.
const CONNECTIONS: usize = 64;
/// A load of more is a slip of the pen.
const MOST: f64 = 10_000.0;
/// Every user is a thread.
const MOST_USERS: f64 = 2000.0;

/// `muster-testbed app`
#[derive(Debug, Args)]
pub struct AppOptions {
    /// Rate of the WAN between the two sites, each way; default: 200 Mbit/s, with --quick 400.
    #[arg(long)]
    pub wan: Option<BytesPerSecond>,
    /// Round trip time of the WAN, 0 to 100 ms and more.
    #[arg(long, default_value = "50ms", value_parser = units::parse_duration)]
    pub rtt: Duration,
    /// Share of the WAN's frames that are lost, 0 to 1.
    #[arg(long, default_value_t = 0.0)]
    pub loss: f64,
    /// Round trip time between the users and either site.
    #[arg(long, default_value = "10ms", value_parser = units::parse_duration)]
    pub users_rtt: Duration,
    /// A change of the WAN in the course of each run, such as 5s:rtt=100ms,rate=200Mbit/s,loss=0.1%
    /// (repeated); the time counts from the beginning of the move.
    #[arg(long = "wan-at", value_name = "TIME:CHANGES")]
    pub wan_at: Vec<Change>,
    /// What migration streams leave the application of the WAN; default: a twentieth.
    #[arg(long)]
    pub reserve: Option<BytesPerSecond>,
    /// The course of the load: static (light), on-off (heavy; --rate and --peak in turn) or waves
    /// (evenly from --rate to --peak and back).
    #[arg(long = "load", default_value = "static")]
    pub course: Course,
    /// Requests per second; default: a tenth of VMbuddies' numbers of users, so 20, on-off 50, waves
    /// 1; with --quick half of that.
    #[arg(long)]
    pub rate: Option<f64>,
    /// The high level of on-off and waves; default: 100 and 35, with --quick half of that.
    #[arg(long)]
    pub peak: Option<f64>,
    /// How long each level of on-off lasts, or a wave; default: 30 s, 4 minutes; with --quick 2 s, 4 s.
    #[arg(long, value_parser = units::parse_duration)]
    pub period: Option<Duration>,
    /// A closed loop: so many users, who think after every answer. --peak is a number of users then.
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=2000), conflicts_with = "rate")]
    pub users: Option<u32>,
    /// How long users think on the average (exponentially distributed).
    #[arg(long, default_value = "5s", value_parser = units::parse_duration)]
    pub think: Duration,
    /// The seed of their think times.
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// Share of the requests that write, 0 to 1.
    #[arg(long, default_value_t = 0.1)]
    pub writes: f64,
    /// RAM of every VM; default: 192 MiB, with --quick 160.
    #[arg(long)]
    pub memory: Option<Bytes>,
    /// App servers: 1, or 2 for COMMA's four VMs.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=8))]
    pub apps: u8,
    /// Hosts of each site; the VMs are dealt out to them.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=8))]
    pub hosts: u8,
    /// A policy (repeated); default: sequential, parallel and muster.
    #[arg(long = "policy", value_name = "P")]
    pub policies: Vec<Policy>,
    /// kvm, tcg, or auto: KVM where Linux really boots under it.
    #[arg(long, default_value = "auto")]
    pub accel: AccelChoice,
    /// How long the application is watched before each move; default: 15 s, with --quick 4.
    #[arg(long, value_parser = units::parse_duration)]
    pub before: Option<Duration>,
    /// And after it; default: the same.
    #[arg(long, value_parser = units::parse_duration)]
    pub after: Option<Duration>,
    /// The downtime that the group is released for.
    #[arg(long, default_value = "300ms", value_parser = units::parse_duration)]
    pub max_downtime: Duration,
    /// An action's limit, such as home=1s (repeated); default: Cloudstone's: home 1 s, search 2 s,
    /// detail 2 s, add 4 s.
    #[arg(long = "limit", value_name = "ACTION=TIME")]
    pub limits: Vec<Limit>,
    /// The window in which percentiles are judged.
    #[arg(long, default_value = "300s", value_parser = units::parse_duration)]
    pub window: Duration,
    /// So many rounds of moves under every policy: tables have medians then.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub repeat: u32,
    /// After each move a stream of the same bytes at the same pace, without a move, to compare with.
    #[arg(long)]
    pub dummy: bool,
    /// Watches for a whole window after each move: when is the 90th percentile as it was?
    #[arg(long)]
    pub spacing: bool,
    /// Looks for the highest rate of the open loop at which a move violates no service level, from
    /// --rate on, with the first policy (default: muster).
    #[arg(long, conflicts_with_all = ["users", "repeat", "markdown"])]
    pub find_safe_load: bool,
    /// No higher rate is tried.
    #[arg(long, default_value_t = 400.0)]
    pub highest_load: f64,
    /// Smaller and shorter: some defaults change.
    #[arg(long)]
    pub quick: bool,
    /// Where report.json, report.svg and report.html go.
    #[arg(long, default_value = "target/app")]
    pub out: PathBuf,
    /// Writes medians and spreads into this document, as `muster-testbed bench` does.
    #[arg(long)]
    pub markdown: Option<PathBuf>,
}

/// The quantities whose default depends on others.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Sizes {
    /// As it is at first.
    pub(super) wan: State,
    pub(super) reserve: BytesPerSecond,
    pub(super) pace: Pace,
    pub(super) memory: Bytes,
    pub(super) before: Duration,
    pub(super) after: Duration,
}

impl AppOptions {
    pub(super) fn sizes(&self) -> Result<Sizes> {
        let (megabits, mebibytes, seconds) = if self.quick {
            (400, 160, 4)
        } else {
            (200, 192, 15)
        };
        let rate = self.wan.unwrap_or(BytesPerSecond(megabits * 125_000));
        let before = self.before.unwrap_or(Duration::from_secs(seconds));
        let mut after = self.after.unwrap_or(before);
        if self.spacing {
            // Then nothing of the move is in the window any more.
            after = after.max(self.window + before);
        }
        for (name, share) in [("--loss", self.loss), ("--writes", self.writes)] {
            ensure!(
                (0.0..=1.0).contains(&share),
                "{name} {share}: expected 0 to 1"
            );
        }
        Ok(Sizes {
            wan: State {
                rate,
                rtt: self.rtt,
                loss: self.loss,
            },
            reserve: self.reserve.unwrap_or(BytesPerSecond(rate.0 / 20)),
            pace: self.pace()?,
            memory: self.memory.unwrap_or(Bytes(mebibytes << 20)),
            before,
            after,
        })
    }

    /// The load that is asked for.
    fn pace(&self) -> Result<Pace> {
        let part = if self.quick { 0.5 } else { 1.0 };
        // VMbuddies' users (5.1) by ten.
        let (low, high, period, short) = match self.course {
            Course::Static => (20.0, 20.0, 1, 1),
            Course::OnOff => (50.0, 100.0, 30, 2),
            Course::Waves => (1.0, 35.0, 240, 4),
        };
        let period = Duration::from_secs(if self.quick { short } else { period });
        let given = self.users.map(f64::from).or(self.rate);
        let low = given.unwrap_or(low * part);
        let shape = Shape {
            course: self.course,
            low,
            high: self.peak.unwrap_or(match self.users {
                Some(_) => low * 2.0,
                None => high * part,
            }),
            period: self.period.unwrap_or(period),
        };
        let most = if self.users.is_some() {
            MOST_USERS
        } else {
            MOST
        };
        for level in [shape.low, shape.high] {
            ensure!(
                (0.1..=most).contains(&level),
                "a load of {level}: expected 0.1 to {most}"
            );
        }
        ensure!(!shape.period.is_zero(), "--period is zero");
        Ok(match self.users {
            Some(_) => Pace::Closed {
                users: shape,
                think: self.think,
                seed: self.seed,
            },
            None => open(shape),
        })
    }

    pub(super) fn policies(&self) -> Vec<Policy> {
        match self.policies.as_slice() {
            [] => vec![Policy::Sequential, Policy::Parallel, Policy::Muster],
            chosen => chosen.to_vec(),
        }
    }

    pub(super) fn stage_spec(&self, sizes: Sizes, accel: Accel) -> StageSpec {
        let downtime = self.max_downtime.as_millis();
        StageSpec {
            apps: self.apps,
            memory: sizes.memory,
            hosts: self.hosts,
            accel,
            wan: sizes.wan,
            reserve: sizes.reserve,
            users_rtt: self.users_rtt,
            settings: vec![format!("max-downtime = \"{downtime}ms\"")],
        }
    }
}

/// An open loop of that shape.
pub(super) fn open(rate: Shape) -> Pace {
    Pace::Open {
        rate,
        connections: CONNECTIONS,
    }
}

impl Pace {
    /// Its low level.
    pub(super) fn low(&self) -> f64 {
        match self {
            Self::Open { rate: shape, .. } | Self::Closed { users: shape, .. } => shape.low,
        }
    }

    /// In words.
    #[must_use]
    pub fn text(&self) -> String {
        match self {
            Self::Open { rate, .. } => rate.text("requests/s"),
            Self::Closed { users, think, seed } => {
                let users = users.text("users");
                format!("{users}, who think for {think:?} (seed {seed})")
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Wrapped {
        #[command(flatten)]
        options: AppOptions,
    }

    fn sizes(words: &str) -> Result<Sizes> {
        let words = ["app"].into_iter().chain(words.split_whitespace());
        Wrapped::try_parse_from(words)?.options.sizes()
    }

    #[test]
    fn loads_are_those_of_vmbuddies() {
        let text = |words| sizes(words).unwrap().pace.text();
        assert_eq!(text(""), "20 requests/s");
        assert_eq!(
            text("--load on-off"),
            "50 and 100 requests/s in turn, 30s each"
        );
        assert_eq!(
            text("--load waves --quick"),
            "waves from 0.5 to 17.5 requests/s in 4s"
        );
        assert_eq!(
            text("--load on-off --users 8 --think 700ms --period 3s"),
            "8 and 16 users in turn, 3s each, who think for 700ms (seed 1)"
        );
        for words in [
            "--rate 0",
            "--load waves --peak 1e9",
            "--load waves --period 0s",
            "--users 3 --rate 5",
            "--users 0",
        ] {
            assert!(sizes(words).is_err(), "{words}");
        }
    }

    #[test]
    fn spacing_is_watched_for_a_window() {
        let sizes = sizes("--spacing --window 60s --before 5s --wan 100Mbit/s").unwrap();
        assert_eq!(sizes.after, Duration::from_secs(65));
        assert_eq!(sizes.reserve, BytesPerSecond(625_000));
    }
}
