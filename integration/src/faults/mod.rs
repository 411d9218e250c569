//! The table of faults: every fault, upon every process, in every phase of a move, with real QEMU
//! and real signals; and what must come of it.
//!
//! - [`cell`]: the cells, and what is expected of each.
//! - [`mod@play`]: one cell from beginning to end; [`steer`], [`log`] and [`aftermath`] serve it.
//! - [`bad_days`]: what is wrong without anybody dying.
//! - [`table`]: the result for people and programs.

pub mod aftermath;
pub mod bad_days;
pub mod cell;
pub mod log;
pub mod play;
pub mod steer;
pub mod table;

use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use anyhow::{Result, bail, ensure};
use clap::Args;

use crate::qemu::{Accel, AccelChoice, accel, installed};
use crate::signals::Interrupt;
use bad_days::BadDay;
use cell::Cell;
use play::{Row, play};

/// `muster-testbed faults`
#[derive(Debug, Args)]
pub struct FaultOptions {
    /// Under KVM and TCG where both work, with three VMs, and five times.
    #[arg(long)]
    pub long: bool,
    /// kvm, tcg, or auto: KVM where a guest really runs under it.
    #[arg(long, default_value = "auto")]
    pub accel: AccelChoice,
    /// Only cells whose name (FAULT/TARGET/PHASE) contains this.
    #[arg(long, default_value = "")]
    pub only: String,
    /// Cells at a time; most of a cell is waiting.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u8).range(1..=32))]
    pub jobs: u8,
    /// Where the table goes as JSON.
    #[arg(long)]
    pub json: Option<PathBuf>,
}

/// One pass over the table.
#[derive(Debug)]
pub struct Pass {
    /// Who executed the guests.
    pub accel: Accel,
    /// How many VMs the group had.
    pub vms: usize,
    /// Its cells.
    pub rows: Vec<Row>,
    /// Bad days: what was said, or what is wrong.
    pub days: Vec<(BadDay, Result<String>)>,
}

/// Plays the table.
///
/// # Errors
/// A cell is not as it must be.
pub fn faults(options: &FaultOptions, interrupt: &Interrupt) -> Result<()> {
    let chosen = accel::choose(options.accel)?;
    println!("{}", chosen.reason);
    let cells: Vec<Cell> = Cell::possible(installed()?.build)
        .into_iter()
        .filter(|cell| cell.to_string().contains(&options.only))
        .collect();
    let days: Vec<BadDay> = BadDay::ALL
        .into_iter()
        .filter(|day| format!("bad-day/{day}").contains(&options.only))
        .collect();
    ensure!(
        !cells.is_empty() || !days.is_empty(),
        "no cell's name contains `{}`",
        options.only
    );
    let mut plan = vec![(chosen.accel, 2)];
    if options.long {
        plan.push((chosen.accel, 3));
        if options.accel == AccelChoice::Auto && chosen.accel == Accel::Kvm {
            plan.extend([(Accel::Tcg, 2), (Accel::Tcg, 3)]);
        }
        plan = plan.repeat(5);
    }
    let begun = Instant::now();
    let mut passes = Vec::new();
    for (accel, vms) in plan {
        println!(
            "{} cells and {} bad days, {vms} VMs, {accel}",
            cells.len(),
            days.len()
        );
        let rows = some_at_a_time(&cells, options.jobs, interrupt, |cell| {
            let row = play(cell, accel, vms, interrupt);
            println!("{}", table::line(&row));
            row
        });
        let days = some_at_a_time(&days, options.jobs, interrupt, |day| {
            let said = bad_days::play(day, accel, interrupt);
            println!("{}", table::day_line(day, &said));
            (day, said)
        });
        passes.push(Pass {
            accel,
            vms,
            rows,
            days,
        });
        interrupt.check()?;
    }
    for pass in &passes {
        println!(
            "\n{} VMs, {}:\n{}",
            pass.vms,
            pass.accel,
            table::table(&pass.rows)
        );
    }
    println!("{:.0} s in all", begun.elapsed().as_secs_f64());
    if let Some(path) = &options.json {
        table::write(path, &passes)?;
    }
    let bad_cells = |pass: &Pass| {
        let cells = pass.rows.iter().filter(|row| !row.problems.is_empty());
        cells.count() + pass.days.iter().filter(|(_, said)| said.is_err()).count()
    };
    let bad: usize = passes.iter().map(bad_cells).sum();
    if bad > 0 {
        bail!("{bad} cells are not as they must be");
    }
    Ok(())
}

/// Does `work` for every item on `jobs` threads; the results are in the items' order.
fn some_at_a_time<T: Copy + Send + Sync, R: Send>(
    items: &[T],
    jobs: u8,
    interrupt: &Interrupt,
    work: impl Fn(T) -> R + Sync,
) -> Vec<R> {
    let queue: Mutex<VecDeque<(usize, T)>> =
        Mutex::new(items.iter().copied().enumerate().collect());
    let results: Mutex<Vec<(usize, R)>> = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for _ in 0..jobs {
            scope.spawn(|| {
                loop {
                    let mut waiting = queue.lock().unwrap_or_else(PoisonError::into_inner);
                    let next = waiting.pop_front();
                    drop(waiting);
                    let Some((index, item)) = next.filter(|_| interrupt.check().is_ok()) else {
                        return;
                    };
                    let result = work(item);
                    let mut done = results.lock().unwrap_or_else(PoisonError::into_inner);
                    done.push((index, result));
                }
            });
        }
    });
    let mut results = results.into_inner().unwrap_or_else(PoisonError::into_inner);
    results.sort_by_key(|(index, _)| *index);
    results.into_iter().map(|(_, result)| result).collect()
}
