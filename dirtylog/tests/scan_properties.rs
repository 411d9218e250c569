//! Scanning by words against the same by single bits.

mod raw;

use dirtylog::export::{Limits, Reader, Retries, View, Visit, Which, Writer, memfd};
use dirtylog::scan::{self, Runs};
use dirtylog::{PageRun, PageSet, Pages};
use proptest::prelude::*;
use raw::{block, sync};

/// Words of which many are empty or full, so that runs are long and clean parts too.
fn words() -> impl Strategy<Value = Vec<u64>> {
    let word = prop_oneof![
        4 => Just(0),
        3 => Just(u64::MAX),
        1 => any::<u64>(),
        1 => (0..64_u32).prop_map(|bits| u64::MAX << bits),
        1 => (0..64_u32).prop_map(|bits| u64::MAX >> bits),
    ];
    prop_oneof![
        proptest::collection::vec(word, 0..100),
        // Long enough for the two streams of the count.
        proptest::collection::vec(any::<u64>(), 1020..2100),
    ]
}

/// An export of `set`, to be read.
fn exported(set: &PageSet) -> Reader {
    let fd = memfd("export").unwrap();
    let reader = Reader::new(fd.try_clone().unwrap(), Limits::default()).unwrap();
    let mut writer = Writer::new(fd, 4096, &[block("pc.ram", set.pages().0)]).unwrap();
    let mut update = writer.begin();
    update.dirtied(0, set);
    update.finish(sync(1));
    reader
}

fn bit(words: &[u64], page: u64) -> bool {
    words[usize::try_from(page / 64).unwrap()] >> (page % 64) & 1 == 1
}

fn runs_by_bits(words: &[u64]) -> Vec<PageRun> {
    let mut runs: Vec<PageRun> = Vec::new();
    for page in (0..words.len() as u64 * 64).filter(|&page| bit(words, page)) {
        match runs.last_mut() {
            Some(run) if run.end() == page => run.count.0 += 1,
            _ => runs.push(PageRun {
                first: page,
                count: Pages(1),
            }),
        }
    }
    runs
}

proptest! {
    #[test]
    fn runs_are_those_of_the_bits(words in words()) {
        let runs: Vec<PageRun> = Runs::new(&words[..]).collect();
        prop_assert_eq!(runs, runs_by_bits(&words));
    }

    #[test]
    fn counts_are_those_of_the_bits(words in words(), other in words(), from in 0..5_usize) {
        // Wherever they begin: vectors begin at multiples of 32 bytes.
        let words = words.get(from..).unwrap_or_default();
        let ones: u64 = words.iter().map(|word| u64::from(word.count_ones())).sum();
        prop_assert_eq!(scan::count(words), ones);
        let both = words.iter().zip(&other).map(|(a, b)| u64::from((a & b).count_ones()));
        prop_assert_eq!(scan::count_common(words, &other), both.sum::<u64>());
    }

    /// Few words that are not zero, at any distance.
    #[test]
    fn runs_far_apart_are_found(
        gaps in proptest::collection::vec((0..300_usize, 1..=u64::MAX), 0..20),
        from in 0..5_usize,
    ) {
        let mut words = Vec::new();
        for (gap, word) in gaps {
            words.resize(words.len() + gap, 0);
            words.push(word);
        }
        let words = words.get(from..).unwrap_or_default();
        let runs: Vec<PageRun> = Runs::new(words).collect();
        prop_assert_eq!(runs, runs_by_bits(words));
    }

    /// Shared words give what the same private ones do.
    #[test]
    fn a_view_is_like_the_set_it_shows(pages in 1_u64..70_000, words in words(), own in words()) {
        let set = PageSet::from_words(Pages(pages), words);
        let mut reader = exported(&set);
        let mut show = |visitor: &mut dyn FnMut(View)| {
            let visit = reader.with_block(0, Which::Dirtied, Retries::NONE, visitor);
            assert!(matches!(visit, Ok(Visit::Whole(()))));
        };
        show(&mut |view| assert_eq!((view.pages(), view.count()), (set.pages(), set.count())));
        show(&mut |view| assert!(view.runs().eq(set.runs())));
        let mut copied = PageSet::default();
        show(&mut |view| view.copy_to(&mut copied));
        prop_assert_eq!(&copied, &set);
        let mut joined = PageSet::from_words(Pages(pages), own);
        let mut expected = joined.clone();
        expected.union_with(&set).unwrap();
        show(&mut |view| view.union_to(&mut joined).unwrap());
        prop_assert_eq!(&joined, &expected);
        let mut longer = PageSet::new(Pages(pages + 1));
        show(&mut |view| assert!(view.union_to(&mut longer).is_err()));
    }

    #[test]
    fn sets_obey_the_algebra(pages in 0_u64..5000, a in words(), b in words()) {
        let a = PageSet::from_words(Pages(pages), a);
        let b = PageSet::from_words(Pages(pages), b);
        let common = a.common(&b).unwrap().0;
        let (mut union, mut less, mut both) = (a.clone(), a.clone(), a.clone());
        union.union_with(&b).unwrap();
        less.subtract(&b).unwrap();
        both.intersect_with(&b).unwrap();
        prop_assert_eq!(both.count().0, common);
        prop_assert_eq!(union.count().0, a.count().0 + b.count().0 - common);
        prop_assert_eq!(less.count().0, a.count().0 - common);
        for page in (0..pages).step_by(7) {
            let (a, b) = (a.contains(page), b.contains(page));
            prop_assert_eq!(union.contains(page), a || b);
            prop_assert_eq!(less.contains(page), a && !b);
            prop_assert_eq!(both.contains(page), a && b);
        }
    }

    #[test]
    fn a_set_is_its_runs(pages in 0_u64..5000, words in words()) {
        let set = PageSet::from_words(Pages(pages), words);
        let mut again = PageSet::new(Pages(pages));
        set.runs().for_each(|run| again.insert_run(run));
        prop_assert_eq!(&again, &set);
        prop_assert_eq!(set.bits().count_ones() as u64, set.count().0);
        prop_assert_eq!(set.is_empty(), set.count() == Pages(0));
    }
}
