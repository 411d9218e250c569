//! The benchmarks: every number that Muster promises, measured in pairs in one run, with its
//! spread and whether it was kept.
//!
//! Each benchmark is a module with a `run` that builds its own [`Lab`] and returns a [`Section`];
//! what several share is in `watch` (a move by the coordinator), `control` (a run driven directly)
//! and `cpu`.

mod commit;
mod control;
mod cpu;
mod direct;
mod disks;
mod estimator;
mod export;
mod held;
mod hot;
pub(crate) mod machine;
mod memory;
mod moves;
pub mod output;
mod pacing;
mod plain;
mod policies;
mod relay;
pub mod result;
mod scan;
pub mod stats;
mod total;
mod transfer;
mod watch;

use std::path::PathBuf;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result, bail, ensure};
use clap::{Args, ValueEnum};

use crate::lab::{Lab, LabSpec};
use crate::qemu::{Accel, AccelChoice, accel, installed};
use crate::signals::Interrupt;
use machine::Machine;
use result::Section;
use sidecar::protocol::types::QemuBuild;

/// One benchmark.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Name {
    /// Split time, resume skew and group downtime over 20 moves of three VMs (about 3 minutes).
    Moves,
    /// Total time against `parallel`, in alternating pairs (about 5 minutes).
    Total,
    /// Every policy on the same guests: time, bytes, split, impact, prediction (about 5 minutes).
    Policies,
    /// The same with small working sets that are written all the time (about 5 minutes).
    PoliciesHot,
    /// Local disks: bulk copies that end together, every policy side by side, and what a disk adds to
    /// the downtime (about 6 minutes).
    Disks,
    /// Throughput of the relay against QEMU's own TCP migration (about 1 minute).
    Relay,
    /// The direct transport against QEMU's own TCP migration (about 1 minute).
    Direct,
    /// What the hold costs guests and hosts on stock QEMU (about 3 minutes).
    Held,
    /// How exactly a stream keeps the rate that `pace` sets (about 1 minute).
    Pacing,
    /// Memory of a sidecar with 16 VMs in one run (about half a minute).
    Memory,
    /// Latency of the decision (about 1 minute).
    Commit,
    /// A plain migration on the patched QEMU against the same without the patches (about 2 minutes).
    Plain,
    /// Guests that dirty faster than the link carries: when pre-copy ends (about 7 minutes).
    Hot,
    /// The time that exporting the dirty log takes (about 3 minutes).
    Export,
    /// Scanning bitmaps in shared memory against the machine's read bandwidth (seconds).
    Scan,
    /// The predicted footprint on traces of known shape (seconds).
    Estimator,
}

impl Name {
    /// What it needs and is not there.
    #[must_use]
    pub fn lacks(self, build: QemuBuild, base_qemu: Option<&str>) -> Option<&'static str> {
        let patched = build == QemuBuild::Patched;
        match self {
            Self::Plain | Self::Hot | Self::Export if !patched => {
                Some("a patched QEMU (`make qemu` builds it, MUSTER_QEMU names it)")
            }
            Self::Plain if base_qemu.is_none() => Some(
                "the same QEMU without the patches (`make qemu-base` builds it, --base-qemu or \
                 MUSTER_BASE_QEMU names it)",
            ),
            _ => None,
        }
    }

    fn as_str(self) -> String {
        self.to_possible_value()
            .map_or_else(String::new, |value| value.get_name().to_owned())
    }
}

/// `muster-testbed bench`
#[derive(Debug, Args)]
pub struct BenchOptions {
    /// Which; default: all for which everything is there.
    #[arg(value_enum)]
    pub names: Vec<Name>,
    /// A smoke test: everything once and small, nothing to judge by.
    #[arg(long)]
    pub quick: bool,
    /// kvm, tcg, or auto: KVM where a guest really runs under it.
    #[arg(long, default_value = "auto")]
    pub accel: AccelChoice,
    /// QEMU without the patches, for `plain`; default: the one that MUSTER_BASE_QEMU names.
    #[arg(long)]
    pub base_qemu: Option<String>,
    /// Writes everything measured to this file.
    #[arg(long)]
    pub json: Option<PathBuf>,
    /// Writes the results into this document, between its markers.
    #[arg(long)]
    pub markdown: Option<PathBuf>,
}

/// What every benchmark is given.
#[derive(Debug)]
pub struct Bench<'a> {
    /// Once and small.
    pub quick: bool,
    /// Who executes the guests.
    pub accel: Accel,
    /// QEMU without the patches.
    pub base_qemu: Option<&'a str>,
    /// Ctrl-C.
    pub interrupt: &'a Interrupt,
    began: Instant,
}

impl Bench<'_> {
    /// Tells how far it is.
    fn say(&self, text: &str) {
        println!("[{:6.1} s] {text}", self.began.elapsed().as_secs_f64());
    }

    /// Two hosts, a and b, and guests on a.
    fn spec(&self, guests: &[&str], link: &str) -> Result<LabSpec> {
        let guests = guests.iter().map(|text| text.parse().context("a guest"));
        Ok(LabSpec {
            hosts: vec!["a".to_owned(), "b".to_owned()],
            guests: guests.collect::<Result<_>>()?,
            link: link.parse().context("the link's rate")?,
            accel: self.accel,
            traffic: Vec::new(),
            settings: Vec::new(),
            adopting: Vec::new(),
            resident: Vec::new(),
            programs: Vec::new(),
        })
    }

    fn lab(&self, spec: LabSpec) -> Result<Lab> {
        Ok(Lab::build(spec, self.interrupt)?)
    }
}

/// Runs the benchmarks.
///
/// # Errors
/// One could not be carried out, or a bound was missed (not with `quick`).
pub fn bench(options: &BenchOptions, interrupt: &Interrupt) -> Result<()> {
    let chosen = accel::choose(options.accel)?;
    let machine = Machine::here(installed()?, chosen.accel);
    let base_qemu = options.base_qemu.clone();
    let base_qemu = base_qemu.or_else(|| std::env::var("MUSTER_BASE_QEMU").ok());
    let bench = Bench {
        quick: options.quick,
        accel: chosen.accel,
        base_qemu: base_qemu.as_deref(),
        interrupt,
        began: Instant::now(),
    };
    println!("{}\n{}", chosen.reason, machine.line());
    let names = match options.names.as_slice() {
        [] => Name::value_variants(),
        names => names,
    };
    let date = today();
    let mut sections: Vec<Section> = Vec::new();
    for name in names {
        interrupt.check()?;
        if let Some(lacking) = name.lacks(machine.qemu, bench.base_qemu) {
            let text = format!("{} needs {lacking}", name.as_str());
            ensure!(options.names.is_empty(), "{text}");
            bench.say(&format!("not measured: {text}"));
            continue;
        }
        let began = Instant::now();
        let mut section = run_one(&bench, *name)?;
        section.took_s = began.elapsed().as_secs_f64();
        println!("{}", output::terminal(&section));
        // After each, so that an interrupted run leaves what it has.
        if let Some(path) = &options.markdown {
            output::put_section(path, &machine, &date, &section, options.quick)?;
        }
        sections.push(section);
        if let Some(path) = &options.json {
            let report = output::report(&machine, &date, &sections, options.quick);
            let text = serde_json::to_string_pretty(&report)? + "\n";
            std::fs::write(path, text)
                .with_context(|| format!("cannot write {}", path.display()))?;
        }
    }
    let missed: usize = sections.iter().map(Section::missed).sum();
    if missed > 0 && !options.quick {
        bail!("{missed} bounds were missed");
    }
    Ok(())
}

fn run_one(bench: &Bench<'_>, name: Name) -> Result<Section> {
    let run = match name {
        Name::Moves => moves::run,
        Name::Total => total::run,
        Name::Policies => policies::run,
        Name::PoliciesHot => policies::run_hot,
        Name::Disks => disks::run,
        Name::Relay => relay::run,
        Name::Direct => direct::run,
        Name::Held => held::run,
        Name::Pacing => pacing::run,
        Name::Memory => memory::run,
        Name::Commit => commit::run,
        Name::Plain => plain::run,
        Name::Hot => hot::run,
        Name::Export => export::run,
        Name::Scan => scan::run,
        Name::Estimator => estimator::run,
    };
    run(bench).with_context(|| format!("benchmark {}", name.as_str()))
}

/// The date as YYYY-MM-DD (UTC).
pub(crate) fn today() -> String {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    let mut days = since.unwrap_or_default().as_secs() / 86400;
    let (mut year, mut month) = (1970, 0);
    let leap = |year: u64| year % 4 == 0 && (year % 100 != 0 || year % 400 == 0);
    while days >= 365 + u64::from(leap(year)) {
        days -= 365 + u64::from(leap(year));
        year += 1;
    }
    let february = 28 + u64::from(leap(year));
    for length in [31, february, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31] {
        if days < length {
            break;
        }
        days -= length;
        month += 1;
    }
    format!("{year}-{:02}-{:02}", month + 1, days + 1)
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

#[allow(
    clippy::cast_precision_loss,
    reason = "bytes of one run, far below 2^53"
)]
fn float(number: u64) -> f64 {
    number as f64
}
