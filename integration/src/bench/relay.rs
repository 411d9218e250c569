//! `relay`: what it costs that the stream passes through two sidecars, against QEMU's own TCP
//! migration between the same two hosts.

use anyhow::Result;
use sidecar::protocol::types::Transport;

use super::cpu::CpuTime;
use super::output::number;
use super::result::{Bound, Figure, Section, Statistic, Table};
use super::transfer::{self, Pair, Run, each};
use super::{Bench, stats};

const PAIRS: usize = 10;

/// Runs it.
///
/// # Errors
/// A migration fails.
pub fn run(bench: &Bench<'_>) -> Result<Section> {
    let (done, guest) = transfer::pairs(bench, "relay", Transport::Relay, PAIRS)?;
    Ok(section(&done, guest))
}

fn section(done: &[Pair], guest: &str) -> Section {
    let setup = transfer::setup(guest, done.len());
    let mut section = Section::new("relay", "throughput of the relay", setup);
    let of = |value: &dyn Fn(&Run, &Run) -> f64| each(done, value);
    let most = Bound::AtMost(1.1);
    let side = |what, index: usize| {
        let values = of(&|_, relay| relay.per_gib(relay.sidecars[index]));
        Figure::bounded(what, "s/GiB", &values, Statistic::Median, most)
    };
    let qemu = |what, relay: bool, index: usize| {
        let values = of(&|direct, relayed| {
            let run = if relay { relayed } else { direct };
            run.per_gib(run.qemus[index])
        });
        Figure::told(what, "s/GiB", &values)
    };
    section.figures = vec![
        Figure::bounded(
            "throughput, relay / direct",
            "",
            &of(&|direct, relay| relay.gib_per_s() / direct.gib_per_s()),
            Statistic::Median,
            Bound::AtLeast(0.60),
        ),
        Figure::told("relay", "GiB/s", &of(&|_, relay| relay.gib_per_s())),
        Figure::told("direct", "GiB/s", &of(&|direct, _| direct.gib_per_s())),
        side("CPU of the source's sidecar", 0),
        side("CPU of the destination's sidecar", 1),
        qemu("CPU of the source's QEMU, relay", true, 0),
        qemu("CPU of the destination's QEMU, relay", true, 1),
        qemu("CPU of the source's QEMU, direct", false, 0),
        qemu("CPU of the destination's QEMU, direct", false, 1),
    ];
    section.notes.push(limits(done));
    section.tables.push(Table {
        title: "Every pair (CPU in s/GiB, user + system)".to_owned(),
        columns: vec![
            "pair",
            "direct, GiB/s",
            "relay, GiB/s",
            "ratio",
            "source's sidecar",
            "destination's sidecar",
        ],
        rows: rows(done),
    });
    section
}

/// Where the time goes.
fn limits(done: &[Pair]) -> String {
    let system = each(done, &|_, relay| {
        let sum = relay.sidecars[0].plus(relay.sidecars[1]);
        sum.system_s / sum.total_s() * 100.0
    });
    format!(
        "{} {:.0} % of the sidecars' time is in the kernel: copying between unix socket, buffer and \
         TCP.",
        transfer::busy(done),
        stats::median(&system),
    )
}

fn rows(done: &[Pair]) -> Vec<Vec<String>> {
    let split = |run: &Run, time: CpuTime| {
        let [user, system] = [time.user_s, time.system_s].map(|s| number(s / run.gib));
        format!("{user} + {system}")
    };
    let row = |(index, (direct, relay)): (usize, &Pair)| {
        vec![
            (index + 1).to_string(),
            number(direct.gib_per_s()),
            number(relay.gib_per_s()),
            number(relay.gib_per_s() / direct.gib_per_s()),
            split(relay, relay.sidecars[0]),
            split(relay, relay.sidecars[1]),
        ]
    };
    done.iter().enumerate().map(row).collect()
}
