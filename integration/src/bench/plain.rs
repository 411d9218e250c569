//! `plain`: a migration without any of our capabilities on the patched QEMU, against the same
//! QEMU without the series.
//!
//! Both source processes are there all the time, and each is migrated from in turn.

use anyhow::{Context, Result, ensure};
use sidecar::protocol::types::QemuBuild;

use super::output::number;
use super::result::{Bound, Figure, Section, Statistic, Table};
use super::transfer::{self, Pair, Run, each};
use super::{Bench, stats};
use crate::lab::LabSpec;
use crate::qemu::{self, Installed, installed};

const GUESTS: [&str; 2] = ["patched:2048MiB:0B/s:4KiB", "base:2048MiB:0B/s:4KiB"];
const QUICK_GUESTS: [&str; 2] = ["patched:256MiB:0B/s:4KiB", "base:256MiB:0B/s:4KiB"];
const PATCHED: &str = "patched";
const BASE: &str = "base";
/// Guests that boot anew lie elsewhere in memory, which can favour one of the two by some percent.
const BOOTS: usize = 5;
const PAIRS_PER_BOOT: usize = 4;
const FIRST_PORT: usize = 4800;

/// Runs it.
///
/// # Errors
/// There is no base to compare with, or a migration fails.
pub fn run(bench: &Bench<'_>) -> Result<Section> {
    let base = base(bench)?;
    let (boots, pairs, guests) = if bench.quick {
        (1, 1, QUICK_GUESTS)
    } else {
        (BOOTS, PAIRS_PER_BOOT, GUESTS)
    };
    let mut done = Vec::new();
    let mut in_order = guests;
    for _ in 0..boots {
        done.extend(since_boot(bench, &base, &in_order, pairs)?);
        in_order.reverse();
    }
    Ok(section(&done, &base, guests[0]))
}

/// The QEMU to compare with, which must be the same one but for the series.
fn base(bench: &Bench<'_>) -> Result<Installed> {
    let program = bench.base_qemu.context(
        "there is no QEMU to compare with: build it with `make qemu-base`, or name it with --base-qemu",
    )?;
    let base = qemu::identify(program)?;
    ensure!(
        base.build == QemuBuild::Stock,
        "{program} is patched; expected the same QEMU without the patches"
    );
    let patched = installed()?;
    ensure!(
        base.version == patched.version || bench.quick,
        "{program} is version {}; expected {}, like the patched one",
        base.version,
        patched.version
    );
    Ok(base)
}

/// Alternating pairs of one pair of guests, after one that does not count.
fn since_boot(
    bench: &Bench<'_>,
    base: &Installed,
    guests: &[&str],
    pairs: usize,
) -> Result<Vec<Pair>> {
    let mut spec = LabSpec {
        resident: vec!["a".to_owned(), "b".to_owned()],
        programs: vec![(BASE.to_owned(), base.program.clone())],
        ..bench.spec(guests, "10Gbit/s")?
    };
    for guest in &mut spec.guests {
        guest.tick_hz = 100;
    }
    let lab = bench.lab(spec)?;
    lab.network.link("a", "b")?.unshape()?;
    let mut done = Vec::new();
    for index in 0..=pairs {
        bench.interrupt.check()?;
        let go = |guest| transfer::plain(&lab, guest, FIRST_PORT + index);
        let (base, patched) = if index % 2 == 0 {
            let base = go(BASE)?;
            (base, go(PATCHED)?)
        } else {
            let patched = go(PATCHED)?;
            (go(BASE)?, patched)
        };
        bench.say(&format!(
            "plain {index}/{pairs}: base {:.2} GiB/s, patched {:.2} GiB/s, CPU {:.3} and {:.3} s/GiB{}",
            base.gib_per_s(),
            patched.gib_per_s(),
            base.all_per_gib(),
            patched.all_per_gib(),
            if index == 0 { " (not counted)" } else { "" }
        ));
        if index > 0 {
            done.push((base, patched));
        }
    }
    Ok(done)
}

fn section(done: &[Pair], base: &Installed, guest: &str) -> Section {
    let setup = format!(
        "Two guests like {guest}, every page non-zero, one in the patched QEMU, one in QEMU {} \
         without the series ({}); two hosts joined by an unshaped veth; TCP, no capability of the \
         series, no rate limit; {} alternating pairs after one for each start of the guests that \
         does not count. All memory lies in files that stay allocated. Time: from `setup` to \
         `completed`, by QEMU's events.",
        base.version,
        base.build,
        done.len()
    );
    let mut section = Section::new("plain", "a plain migration of the patched QEMU", setup);
    let of = |value: &dyn Fn(&Run, &Run) -> f64| each(done, value);
    let wall = of(&|base, patched| patched.seconds / base.seconds);
    let cpu = of(&|base, patched| patched.all_per_gib() / base.all_per_gib());
    let sum = |pick: &dyn Fn(&Pair) -> &Run| -> f64 {
        done.iter().map(|pair| pick(pair).all_per_gib()).sum()
    };
    section.figures = vec![
        Figure::bounded(
            "CPU of both QEMUs, patched / base",
            "",
            &cpu,
            Statistic::Median,
            Bound::AtMost(1.02),
        ),
        Figure::told(
            "the same, sums of all pairs",
            "",
            &[sum(&|pair| &pair.1) / sum(&|pair| &pair.0)],
        ),
        Figure::told("time, patched / base", "", &wall),
        Figure::told("patched", "GiB/s", &of(&|_, patched| patched.gib_per_s())),
        Figure::told("base", "GiB/s", &of(&|base, _| base.gib_per_s())),
    ];
    if let Some((low, high)) = stats::interval(&wall) {
        let end =
            |what, value, bound| Figure::bounded(what, "", &[value], Statistic::Median, bound);
        section.figures.extend([
            end(
                "time, patched / base: lower end of the median's interval",
                low,
                Bound::AtMost(1.0),
            ),
            end("the same, upper end", high, Bound::AtLeast(1.0)),
        ]);
    }
    section.notes.push(
        "The interval of a median holds it with 95 % confidence (order statistics).".to_owned(),
    );
    section.tables.push(Table {
        title: "Every pair".to_owned(),
        columns: vec![
            "pair",
            "base, GiB/s",
            "patched, GiB/s",
            "base, CPU s/GiB",
            "patched, CPU s/GiB",
        ],
        rows: done.iter().enumerate().map(row).collect(),
    });
    section
}

fn row((index, (base, patched)): (usize, &Pair)) -> Vec<String> {
    vec![
        (index + 1).to_string(),
        number(base.gib_per_s()),
        number(patched.gib_per_s()),
        number(base.all_per_gib()),
        number(patched.all_per_gib()),
    ]
}
