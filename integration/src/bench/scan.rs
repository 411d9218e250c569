//! `scan`: bitmaps in shared memory, gone over where they lie, against the machine's read
//! bandwidth.
//!
//! The yardstick is the fastest of some plain loops over as much private memory: the C library's
//! memcmp of two halves, and an OR of all words in one and in two streams, as the compiler
//! vectorises them.

use std::hint::black_box;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use dirtylog::export::{
    BlockSpec, Limits, Mode, Reader, Retries, Sync, View, Visit, Which, Writer, memfd,
};
use dirtylog::{PageSet, Pages};

use super::Bench;
use super::output::number;
use super::result::{Bound, Figure, Section, Statistic, Table};

const MIB: usize = 1 << 20;
const GIB: f64 = 1_073_741_824.0;
/// The bitmap of a 1 TiB guest, and one that no cache holds.
const SIZES_MIB: [usize; 2] = [32, 256];
const QUICK_SIZES_MIB: [usize; 1] = [4];
const TURNS: usize = 41;
const SHARE: f64 = 60.0;
/// One word of so many has a page in the bitmap whose runs are extracted.
const SPARSE: usize = 1000;

/// Seconds that each turn took.
struct Turns {
    /// The fastest yardstick over one bitmap.
    read: Vec<f64>,
    /// The same over two.
    read_both: Vec<f64>,
    count: Vec<f64>,
    runs: Vec<f64>,
    union: Vec<f64>,
}

/// Runs it.
///
/// # Errors
/// Memory is short.
pub fn run(bench: &Bench<'_>) -> Result<Section> {
    let (sizes, turns) = if bench.quick {
        (&QUICK_SIZES_MIB[..], 3)
    } else {
        (&SIZES_MIB[..], TURNS)
    };
    let setup = format!(
        "Exports of one block in a memfd, every word with pages, or one of {SPARSE}. Each turn \
         measures all of it, {turns} turns. The read bandwidth is that of the fastest of three \
         loops over private memory of the same size (memcmp of two halves; OR of all words, in \
         one stream and in two); for the union, which reads two bitmaps and writes one of them, \
         over two such memories."
    );
    let mut section = Section::new("scan", "scanning bitmaps in shared memory", setup);
    section.without_qemu = true;
    let mut rows = Vec::new();
    for mib in sizes {
        bench.interrupt.check()?;
        let found = measure(mib * MIB / 8, turns)?;
        let bytes = super::float((mib * MIB) as u64);
        let of = |read: &[f64], task: &[f64]| -> Vec<f64> {
            let turns = read.iter().zip(task);
            turns.map(|(read, task)| read / task * 100.0).collect()
        };
        let shares = [
            ("population count", of(&found.read, &found.count)),
            ("runs of sparse pages", of(&found.read, &found.runs)),
            (
                "union into a private bitmap",
                of(&found.read_both, &found.union),
            ),
        ];
        for (what, shares) in &shares {
            section.figures.push(Figure::bounded(
                format!("{mib} MiB, {what}: share of the read bandwidth"),
                "%",
                shares,
                Statistic::Median,
                Bound::AtLeast(SHARE),
            ));
        }
        let times: Vec<f64> = found.count.iter().map(|time| time * 1e3).collect();
        section.figures.push(Figure::told(
            format!("{mib} MiB, population count: time"),
            "ms",
            &times,
        ));
        for (what, factor, times) in [
            ("reading one", 1.0, &found.read),
            ("reading two", 2.0, &found.read_both),
            ("population count", 1.0, &found.count),
            ("runs of sparse pages", 1.0, &found.runs),
            ("union", 2.0, &found.union),
        ] {
            let rate = |seconds: f64| number(factor * bytes / seconds / GIB);
            let mut sorted = times.clone();
            sorted.sort_unstable_by(f64::total_cmp);
            rows.push(vec![
                format!("{mib} MiB, {what}"),
                rate(sorted[sorted.len() / 2]),
                rate(sorted[0]),
            ]);
        }
        bench.say(&format!("scan: {mib} MiB done"));
    }
    section.tables.push(Table {
        title: "Bytes read, GiB/s".to_owned(),
        columns: vec!["what", "median", "best"],
        rows,
    });
    Ok(section)
}

fn measure(words: usize, turns: usize) -> Result<Turns> {
    let pages = Pages(words as u64 * 64);
    let noise = |at: usize| (at as u64 % (words as u64 / 2)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let dense: Vec<u64> = (0..words).map(|at| noise(at) | 1).collect();
    let sparse = |at: usize| u64::from(at % SPARSE == 0) << (at % 64);
    let sparse = PageSet::from_words(pages, (0..words).map(sparse).collect());
    let other = dense.clone();
    let mut own = PageSet::from_words(pages, dense.clone());
    let (mut full, _full_writer) = exported(&own)?;
    let (mut thin, _thin_writer) = exported(&sparse)?;
    let mut done = Turns {
        read: Vec::new(),
        read_both: Vec::new(),
        count: Vec::new(),
        runs: Vec::new(),
        union: Vec::new(),
    };
    for _ in 0..turns {
        let (left, right) = dense.split_at(words / 2);
        let one = [
            seconds(|| Ok(u64::from(black_box(left) == black_box(right))))?,
            seconds(|| Ok(or(black_box(&dense))))?,
            seconds(|| Ok(or_both(black_box(left), black_box(right))))?,
        ];
        let two = [
            seconds(|| Ok(u64::from(black_box(&dense) == black_box(&other))))?,
            seconds(|| Ok(or_both(black_box(&dense), black_box(&other))))?,
        ];
        done.read.push(one.into_iter().fold(f64::MAX, f64::min));
        done.read_both
            .push(two.into_iter().fold(f64::MAX, f64::min));
        let count = || show(&mut full, |view| view.count().0);
        done.count.push(seconds(count)?);
        let runs = || show(&mut thin, |view| view.runs().count() as u64);
        done.runs.push(seconds(runs)?);
        let union = || show(&mut full, |view| view.union_to(&mut own).map_or(1, |()| 0));
        done.union.push(seconds(union)?);
    }
    Ok(done)
}

/// The OR of all words.
fn or(words: &[u64]) -> u64 {
    words.iter().fold(0, |all, word| all | word)
}

/// The same of two equally long parts, read in turn.
fn or_both(left: &[u64], right: &[u64]) -> u64 {
    let mut all = [0; 16];
    for (left, right) in left.chunks_exact(8).zip(right.chunks_exact(8)) {
        for (all, word) in all.iter_mut().zip(left.iter().chain(right)) {
            *all |= word;
        }
    }
    or(&all)
}

fn seconds(task: impl FnOnce() -> Result<u64>) -> Result<f64> {
    let begin = Instant::now();
    black_box(task()?);
    Ok(begin.elapsed().as_secs_f64())
}

/// The bitmap where it lies.
fn show(reader: &mut Reader, look: impl FnOnce(View<'_>) -> u64) -> Result<u64> {
    match reader.with_block(0, Which::Dirtied, Retries::NONE, look)? {
        Visit::Whole(found) => Ok(found),
        Visit::Torn(_) => anyhow::bail!("the export changed, and nobody writes to it"),
    }
}

fn exported(set: &PageSet) -> Result<(Reader, Writer)> {
    let fd = memfd("scan").context("cannot make a memfd")?;
    let reader = Reader::new(fd.try_clone()?, Limits::default())?;
    let block = BlockSpec {
        name: "pc.ram".to_owned(),
        used_length_bytes: set.pages().0 * 4096,
    };
    let mut writer = Writer::new(fd, 4096, &[block])?;
    let mut update = writer.begin();
    update.dirtied(0, set);
    update.finish(Sync {
        mode: Mode::Measuring,
        round: 1,
        round_ended: true,
        round_begin: Duration::ZERO,
        time: Duration::from_secs(1),
        finished: false,
        spent: Duration::ZERO,
    });
    Ok((reader, writer))
}
