//! The table of faults against real QEMU: one test per cell, several at a time, because most of a
//! cell is waiting. What is expected of each is said in `testbed::faults::cell`.
//!
//! Under KVM, where it works or MUSTER_REQUIRE_KVM=1 says that it must; else under TCG.
//! `muster-testbed faults` plays the same cells and prints them as a table.

use libtest_mimic::{Arguments, Failed, Trial};
use sidecar::protocol::types::QemuBuild;
use testbed::faults::bad_days::BadDay;
use testbed::faults::cell::Cell;
use testbed::faults::{bad_days, play, table};
use testbed::qemu::{Accel, AccelChoice, accel};
use testbed::signals::Interrupt;

/// Cells at a time, unless `--test-threads` says otherwise.
const JOBS: usize = 5;
/// VMs of the group.
const VMS: usize = 2;

fn main() -> std::io::Result<()> {
    let mut arguments = Arguments::from_args();
    arguments.test_threads.get_or_insert(JOBS);
    let interrupt = Interrupt::install()?;
    // Listing needs no accelerator; where none can be had, every cell fails and says why.
    let accel: Result<Accel, String> = if arguments.list {
        Ok(Accel::Tcg)
    } else {
        accel::choose(AccelChoice::Auto)
            .map(|chosen| chosen.accel)
            .map_err(|error| error.to_string())
    };
    let mut trials = Vec::new();
    let build = testbed::qemu::installed().map_or(QemuBuild::Stock, |found| found.build);
    for cell in Cell::possible(build) {
        let (accel, interrupt) = (accel.clone(), interrupt.clone());
        let run = move || {
            let row = play::play(cell, accel?, VMS, &interrupt);
            match row.problems.is_empty() {
                true => Ok(()),
                false => Err(Failed::from(table::line(&row))),
            }
        };
        trials.push(Trial::test(format!("faults::{cell}"), run));
    }
    for day in BadDay::ALL {
        let (accel, interrupt) = (accel.clone(), interrupt.clone());
        let run = move || {
            bad_days::play(day, accel?, &interrupt)
                .map(drop)
                .map_err(|error| Failed::from(format!("{error:#}")))
        };
        trials.push(Trial::test(format!("bad_days::{day}"), run));
    }
    libtest_mimic::run(&arguments, trials).exit();
}
