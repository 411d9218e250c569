//! Scanning by words against the same by single bits.

use dirtylog::scan::{self, Runs};
use dirtylog::{PageRun, PageSet, Pages};
use proptest::prelude::*;

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
    fn counts_are_those_of_the_bits(words in words(), other in words()) {
        let ones: u64 = words.iter().map(|word| u64::from(word.count_ones())).sum();
        prop_assert_eq!(scan::count(&words), ones);
        let both = words.iter().zip(&other).map(|(a, b)| u64::from((a & b).count_ones()));
        prop_assert_eq!(scan::count_common(&words, &other), both.sum::<u64>());
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
