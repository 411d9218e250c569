//! The table of faults: every fault, upon every process, in every phase of a move, with real QEMU
//! and real signals; and what must come of it.
//!
//! - [`cell`]: the cells, and what is expected of each.
//! - [`play`]: one cell from beginning to end; [`steer`], [`log`] and [`aftermath`] serve it.
//! - [`table`]: the result for people and programs.

pub mod aftermath;
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

use crate::qemu::{Accel, AccelChoice, accel};
use crate::signals::Interrupt;
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
}

/// Plays the table.
///
/// # Errors
/// A cell is not as it must be.
pub fn faults(options: &FaultOptions, interrupt: &Interrupt) -> Result<()> {
    let chosen = accel::choose(options.accel)?;
    println!("{}", chosen.reason);
    let cells: Vec<Cell> = Cell::all()
        .into_iter()
        .filter(|cell| cell.to_string().contains(&options.only))
        .collect();
    ensure!(
        !cells.is_empty(),
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
        println!("{} cells, {vms} VMs, {accel}", cells.len());
        let rows = play_all(&cells, accel, vms, options.jobs, interrupt);
        passes.push(Pass { accel, vms, rows });
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
    let bad: usize = passes
        .iter()
        .flat_map(|pass| &pass.rows)
        .filter(|row| !row.problems.is_empty())
        .count();
    if bad > 0 {
        bail!("{bad} cells are not as they must be");
    }
    Ok(())
}

/// Plays cells, some at a time.
fn play_all(cells: &[Cell], accel: Accel, vms: usize, jobs: u8, interrupt: &Interrupt) -> Vec<Row> {
    let queue: Mutex<VecDeque<(usize, Cell)>> =
        Mutex::new(cells.iter().copied().enumerate().collect());
    let rows: Mutex<Vec<(usize, Row)>> = Mutex::new(Vec::new());
    let lock = PoisonError::into_inner;
    std::thread::scope(|scope| {
        for _ in 0..jobs {
            scope.spawn(|| {
                loop {
                    let next = queue.lock().unwrap_or_else(lock).pop_front();
                    let Some((index, cell)) = next.filter(|_| interrupt.check().is_ok()) else {
                        return;
                    };
                    let row = play(cell, accel, vms, interrupt);
                    println!("{}", table::line(&row));
                    rows.lock()
                        .unwrap_or_else(PoisonError::into_inner)
                        .push((index, row));
                }
            });
        }
    });
    let mut rows = rows.into_inner().unwrap_or_else(PoisonError::into_inner);
    rows.sort_by_key(|(index, _)| *index);
    rows.into_iter().map(|(_, row)| row).collect()
}
