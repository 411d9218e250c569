use proptest::prelude::*;

use super::*;

const HERE: Path = (HostId(0), HostId(1));
const THERE: Path = (HostId(0), HostId(2));
const MB: f64 = 1e6;

fn allowance(bandwidth: u64, reserve: u64) -> Allowance {
    Allowance {
        bandwidth: Some(BytesPerSecond(bandwidth * 1_000_000)),
        reserve: BytesPerSecond(reserve * 1_000_000),
    }
}

/// Streams that want all they are allotted, with what each path carries for them.
struct Play {
    paths: Paths,
    told: f64,
    streams: Vec<Stream>,
    changes: Vec<Change>,
}

impl Play {
    fn new(allowance: Allowance, paths: &[Path]) -> Self {
        let streams = paths.iter().enumerate().map(|(vm, &path)| Stream {
            vm: VmId(vm),
            path,
            at_us: 0,
            sent_bytes: 0,
            waited_ms: 0,
            share: 0.0,
            copies: true,
        });
        Self {
            paths: Paths::new(&allowance),
            told: allowance.for_move().0 as f64,
            streams: streams.collect(),
            changes: Vec::new(),
        }
    }

    fn usable(&self, path: Path) -> f64 {
        let mut narrow = self.paths.narrow();
        let found = narrow.find(|(one, _)| *one == path);
        found.map_or(self.told, |(_, rate)| rate.0 as f64)
    }

    /// Half seconds in which every stream sends what it may, all of a path no more than `carries`.
    #[allow(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "bytes of half a second"
    )]
    fn go_on(&mut self, half_seconds: u32, carries: impl Fn(Path) -> f64) {
        for _ in 0..half_seconds {
            let all = self.streams.len() as f64;
            for index in 0..self.streams.len() {
                let path = self.streams[index].path;
                let others = self.streams.iter().filter(|one| one.path == path);
                let count = others.count() as f64;
                // What the others leave of all, or the path's part of what it carries.
                let share = (self.told / all).min(self.usable(path) / count);
                let rate = share.min(carries(path) / count);
                let stream = &mut self.streams[index];
                stream.share = share;
                stream.at_us += 500_000;
                stream.sent_bytes += (rate / 2.0) as u64;
                if stream.copies && rate < share {
                    stream.waited_ms += 400;
                }
            }
            self.changes.extend(self.paths.observe(&self.streams));
        }
    }
}

#[test]
fn a_path_that_carries_what_was_told_changes_nothing() {
    let mut play = Play::new(allowance(50, 0), &[HERE, HERE]);
    play.go_on(200, |_| 50.0 * MB);
    // Nor does one that misses it by what the packets' heads take.
    play.go_on(200, |_| 48.0 * MB);
    assert_eq!(play.changes, []);
    assert_eq!(play.paths.narrow().count(), 0);
}

#[test]
fn a_stream_that_wants_less_says_nothing() {
    let mut play = Play::new(allowance(50, 0), &[HERE]);
    // A guest whose QEMU is slow: no data waits.
    for _ in 0..100 {
        play.streams[0].at_us += 500_000;
        play.streams[0].sent_bytes += 5_000_000;
        play.streams[0].share = 50.0 * MB;
        play.changes.extend(play.paths.observe(&play.streams));
    }
    // One that is held.
    play.streams[0].copies = false;
    for _ in 0..100 {
        play.streams[0].at_us += 500_000;
        play.streams[0].waited_ms += 500;
        play.changes.extend(play.paths.observe(&play.streams));
    }
    assert_eq!(play.changes, []);
}

#[test]
fn a_narrow_path_is_found_within_three_seconds() {
    let mut play = Play::new(allowance(50, 0), &[HERE, HERE]);
    play.go_on(6, |_| 20.0 * MB);
    assert_eq!(play.changes.len(), 1, "{:?}", play.changes);
    assert!(play.changes[0].is_news);
    let found = play.usable(HERE);
    assert!((found - 20.0 * MB).abs() < 0.01 * MB, "{found}");
    // It tries for more, and stays near what there is.
    play.go_on(200, |_| 20.0 * MB);
    let found = play.usable(HERE);
    assert!((20.0..22.0).contains(&(found / MB)), "{found}");
    assert!(play.changes.len() < 4, "{:?}", play.changes);
    assert_eq!(play.changes.iter().filter(|one| one.is_news).count(), 1);
}

#[test]
fn it_grows_again_and_never_above_what_was_told() {
    let mut play = Play::new(allowance(50, 0), &[HERE]);
    play.go_on(10, |_| 10.0 * MB);
    assert!(play.usable(HERE) < 11.0 * MB);
    let rates = |play: &Play| -> Vec<f64> {
        let rates = play.changes.iter().filter_map(|one| one.rate);
        rates.map(|rate| rate.0 as f64).collect()
    };
    play.go_on(60, |_| 50.0 * MB);
    assert_eq!(play.paths.narrow().count(), 0, "{:?}", play.changes);
    assert_eq!(play.changes.last().map(|change| change.rate), Some(None));
    assert!(rates(&play).iter().all(|rate| *rate <= 50.0 * MB));
    // Never by more than a quarter at a time.
    for pair in rates(&play).windows(2) {
        assert!(pair[1] <= pair[0] * 1.2501, "{pair:?}");
    }
    assert_eq!(play.usable(HERE), 50.0 * MB);
}

#[test]
fn the_reserve_comes_off_what_is_carried() {
    let mut play = Play::new(allowance(50, 5), &[HERE]);
    play.go_on(6, |_| 20.0 * MB);
    assert_eq!(play.usable(HERE), 15.0 * MB);
    // It is tried seldom whether there is more.
    let before = play.streams[0].waited_ms;
    play.go_on(400, |_| 20.0 * MB);
    let waited = play.streams[0].waited_ms - before;
    assert!(waited < 20_000, "{waited} ms of 200 s");
    // More than the reserve is never given up.
    play.go_on(400, |_| 100.0 * MB);
    assert_eq!(play.usable(HERE), 45.0 * MB);
}

#[test]
fn one_narrow_path_leaves_the_others_alone() {
    let mut play = Play::new(allowance(60, 0), &[HERE, THERE]);
    let carries = |path| if path == HERE { 5.0 * MB } else { 60.0 * MB };
    play.go_on(20, carries);
    assert!(play.usable(HERE) < 6.0 * MB);
    assert_eq!(play.usable(THERE), 60.0 * MB);
}

#[test]
fn a_dead_path_is_not_taken_to_carry_nothing() {
    let mut play = Play::new(allowance(50, 5), &[HERE]);
    play.go_on(20, |_| 0.0);
    assert!(play.usable(HERE) >= 0.4 * MB, "{}", play.usable(HERE));
}

proptest! {
    #[test]
    fn nothing_that_is_reported_does_harm(
        reports in proptest::collection::vec(
            (0_usize..3, any::<i64>(), any::<u64>(), any::<u64>(), 0.0..1e12, any::<bool>()),
            0..60,
        ),
    ) {
        let mut paths = Paths::new(&allowance(50, 1));
        let mut streams: BTreeMap<usize, Stream> = BTreeMap::new();
        for (vm, at_us, sent_bytes, waited_ms, share, copies) in reports {
            streams.insert(vm, Stream {
                vm: VmId(vm), path: HERE, at_us, sent_bytes, waited_ms, share, copies,
            });
            let all: Vec<Stream> = streams.values().copied().collect();
            paths.observe(&all);
            for (_, rate) in paths.narrow() {
                prop_assert!(rate.0 > 0 && rate.0 <= 49_000_000, "{rate}");
            }
        }
    }
}
