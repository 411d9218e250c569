//! What every backend must do.

use std::time::Duration;

use dirtylog::export::{BlockSpec, Limits, Mode, Reader, Retries, Rounds, Sync, Writer, memfd};
use dirtylog::{Bitmap, MemoryLog, PageSet, Pages};
use libtest_mimic::Failed;

use crate::Case;

pub const CASES: &[Case] = &[
    ("conformance::memory", memory),
    ("conformance::export", export),
];

/// A log, and something that dirties pages.
pub trait Subject {
    /// Dirties `pages` and, where the reader does not do it, ends the round.
    fn dirty(&mut self, pages: &[u64]) -> Result<(), Failed>;
    /// Collects.
    fn collect(&mut self, into: &mut PageSet) -> Result<(), Failed>;
    /// The log's size.
    fn pages(&self) -> Pages;
}

/// The conformance test, on a clean log of at least 130 pages.
pub fn conforms(subject: &mut impl Subject) -> Result<(), Failed> {
    let pages = subject.pages();
    assert!(pages.0 >= 130, "{pages}");
    let last = pages.0 - 1;
    // Of a wrong size and full: collecting replaces all of it.
    let mut found = PageSet::from_words(Pages(77), vec![u64::MAX; 2]);
    let all: Vec<u64> = (0..pages.0).collect();
    let scattered: Vec<u64> = (0..pages.0).filter(|page| page * page % 7 == 2).collect();
    let rounds: [&[u64]; 9] = [
        &[],
        &[0],
        &[],                       // a round does not repeat the one before
        &[63, 64, 127, 128, last], // both sides of words, and the last page
        &[last, last, 5, 5, 4],    // more than once, in any order
        &all,
        &scattered,
        &scattered, // what was reported once is reported again
        &[],
    ];
    let mut union = PageSet::new(pages);
    for (number, written) in rounds.iter().enumerate() {
        let mut expected = PageSet::new(pages);
        for &page in *written {
            expected.insert(page);
        }
        subject.dirty(written)?;
        subject.collect(&mut found)?;
        if found != expected {
            let differing: Vec<_> = all
                .iter()
                .filter(|&&page| found.contains(page) != expected.contains(page))
                .take(10)
                .collect();
            return Err(format!("round {number}: pages {differing:?}.. differ").into());
        }
        union.union_with(&found)?;
    }
    assert_eq!(union.count(), pages);
    Ok(())
}

struct Memory<'a>(&'a MemoryLog);

impl Subject for Memory<'_> {
    fn dirty(&mut self, pages: &[u64]) -> Result<(), Failed> {
        pages.iter().for_each(|&page| self.0.mark(page));
        Ok(())
    }

    fn collect(&mut self, into: &mut PageSet) -> Result<(), Failed> {
        self.0.collect(into)?.ok_or("no round")?;
        Ok(())
    }

    fn pages(&self) -> Pages {
        Bitmap::pages(&self.0)
    }
}

fn memory() -> Result<(), Failed> {
    for pages in [130, 192, 5000] {
        conforms(&mut Memory(&MemoryLog::new(Pages(pages))))?;
    }
    Ok(())
}

struct Export {
    pages: Pages,
    writer: Writer,
    rounds: Rounds,
    round: u64,
}

impl Export {
    fn new(pages: Pages) -> Result<Self, Failed> {
        let fd = memfd("conformance")?;
        let block = BlockSpec {
            name: "pc.ram".to_owned(),
            used_length_bytes: pages.0 * 4096,
        };
        let reader = Reader::new(fd.try_clone()?, Limits::default())?;
        Ok(Self {
            pages,
            writer: Writer::new(fd, 4096, &[block])?,
            rounds: Rounds::new(reader, Retries::NONE),
            round: 0,
        })
    }

    fn write(&mut self, pages: &[u64], ended: bool) {
        let mut dirtied = PageSet::new(self.pages);
        for &page in pages {
            dirtied.insert(page);
        }
        let begin = Duration::from_secs(self.round);
        let mut update = self.writer.begin();
        update.dirtied(0, &dirtied);
        update.finish(Sync {
            mode: Mode::Measuring,
            round: self.round,
            round_ended: ended,
            round_begin: begin,
            time: begin + Duration::from_millis(990),
            finished: false,
            spent: Duration::from_micros(3),
        });
    }
}

impl Subject for Export {
    fn dirty(&mut self, pages: &[u64]) -> Result<(), Failed> {
        self.round += 1;
        // Two syncs: what the first one found belongs to the same round.
        let (some, _) = pages.split_at(pages.len() / 2);
        self.write(some, false);
        let mut nothing = PageSet::default();
        if self.rounds.collect(&mut nothing)?.is_some() {
            return Err("a round was collected before it ended".into());
        }
        self.write(pages, true);
        Ok(())
    }

    fn collect(&mut self, into: &mut PageSet) -> Result<(), Failed> {
        let round = self.rounds.collect(into)?.ok_or("no round")?;
        assert_eq!((round.number, round.missed), (self.round, 0));
        assert_eq!(round.duration, Some(Duration::from_millis(990)));
        let again = self.rounds.collect(&mut PageSet::default())?;
        assert_eq!(again, None, "a round was collected twice");
        Ok(())
    }

    fn pages(&self) -> Pages {
        self.pages
    }
}

fn export() -> Result<(), Failed> {
    for pages in [130, 192, 5000] {
        conforms(&mut Export::new(Pages(pages))?)?;
    }
    Ok(())
}
