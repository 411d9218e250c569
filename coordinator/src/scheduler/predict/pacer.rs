//! Pacer's prediction of dirty set and dirty rate, which COMMA (3.1, 3.2.2) uses.
//!
//! A block that was written twice or more is expected to be written again at its mean interval.
//! For pages at a large scale `dirtylog` has the same idea in 12 bytes a page (`NextWrite`), and an
//! estimator that is better ([`Dirtying::Curve`](super::Dirtying)).

/// When a block was written.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Block {
    writes: u32,
    last_s: f64,
    mean_interval_s: f64,
    /// Sum of squared differences of the intervals from their mean (Welford).
    squares: f64,
}

impl Block {
    /// Notes a write. Times must not fall: one before the last counts as at the last.
    pub fn written(&mut self, at_s: f64) {
        if self.writes > 0 {
            let interval = (at_s - self.last_s).max(0.0);
            let off = interval - self.mean_interval_s;
            self.mean_interval_s += off / f64::from(self.writes);
            self.squares += off * (interval - self.mean_interval_s);
        }
        self.last_s = if self.writes > 0 {
            at_s.max(self.last_s)
        } else {
            at_s
        };
        self.writes = self.writes.saturating_add(1);
    }

    /// A: the mean interval; `None` before the second write, or if both were at once.
    fn interval_s(&self) -> Option<f64> {
        (self.writes >= 2 && self.mean_interval_s > 0.0).then_some(self.mean_interval_s)
    }

    /// The first expected write after `time_s`: last + k·A.
    fn next_after(&self, time_s: f64) -> Option<f64> {
        let interval = self.interval_s()?;
        let steps = ((time_s - self.last_s) / interval).floor().max(0.0) + 1.0;
        Some(self.last_s + steps * interval)
    }

    /// 1/A, if it is still being written: its last write is no longer ago than A + 2σ.
    fn rate(&self, now_s: f64) -> Option<f64> {
        let interval = self.interval_s()?;
        let deviation = (self.squares / f64::from(self.writes - 1)).sqrt();
        (now_s - self.last_s <= interval + 2.0 * deviation).then_some(1.0 / interval)
    }
}

/// How many blocks will be dirty at `end_s`, the end of pre-copy. Each comes with the time at which
/// it was, or will be, copied.
///
/// It counts if it was written since its copy, or if its next expected write lies between its copy,
/// or now, and the end.
#[must_use]
pub fn dirty_set(blocks: &[(Block, f64)], now_s: f64, end_s: f64) -> usize {
    let is_dirty = |(block, copied_s): &&(Block, f64)| {
        let already = block.writes > 0 && *copied_s <= now_s && block.last_s > *copied_s;
        let next = block.next_after(copied_s.max(now_s));
        already || next.is_some_and(|next| next <= end_s)
    };
    blocks.iter().filter(is_dirty).count()
}

/// Blocks dirtied a second while the `dirty` ones are sent, in their order, and `clean` ones are
/// written: the k-th of n dirty blocks is clean, and can become dirty, for (n − k)/n of that time.
#[must_use]
#[allow(clippy::cast_precision_loss, reason = "a number of blocks")]
pub fn dirty_rate(dirty: &[Block], clean: &[Block], now_s: f64) -> f64 {
    let n = dirty.len();
    let sent = dirty.iter().zip(1..).filter_map(|(block, k)| {
        let part = (n - k) as f64 / n as f64;
        block.rate(now_s).map(|rate| part * rate)
    });
    sent.sum::<f64>() + max_dirty_rate(clean, now_s)
}

/// Blocks dirtied a second once all are clean, as at the end of the dirty iteration: COMMA's maximal
/// dirty rate (3.2.2), wanted before stage two begins.
#[must_use]
pub fn max_dirty_rate(blocks: &[Block], now_s: f64) -> f64 {
    blocks.iter().filter_map(|block| block.rate(now_s)).sum()
}

#[cfg(test)]
mod tests {
    use super::super::stage_two_s;
    use super::*;

    fn block(writes: &[f64]) -> Block {
        let mut block = Block::default();
        writes.iter().for_each(|&at| block.written(at));
        block
    }

    #[test]
    fn a_block_is_dirty_at_the_end_if_it_is_written_after_its_copy() {
        let periodic = block(&[1.0, 3.0, 5.0]); // 7, 9, 11 …
        for (copied, end, dirty) in [
            (8.0, 8.5, 0), // will be copied at 8, next write at 9
            (8.0, 9.0, 1),
            (2.0, 6.5, 1), // was written since its copy
            (5.5, 6.5, 0), // is clean, next write at 7
            (5.5, 7.0, 1),
        ] {
            assert_eq!(
                dirty_set(&[(periodic, copied)], 6.0, end),
                dirty,
                "{copied} {end}"
            );
        }
        assert_eq!(
            dirty_set(&[(block(&[1.0]), 2.0)], 6.0, 1e6),
            0,
            "written once"
        );
        assert_eq!(dirty_set(&[(block(&[]), 2.0)], 6.0, 1e6), 0);
    }

    #[test]
    fn rates_count_how_long_a_block_is_clean() {
        let every_2 = block(&[0.0, 2.0, 4.0, 6.0]);
        let every_4 = block(&[0.0, 4.0]);
        let stale = block(&[0.0, 1.0, 2.0]);
        // k = 1 of 2: half of 1/2; k = 2: nothing; clean: 1/4. The stale one: 6 − 2 > 1.
        let rate = dirty_rate(&[every_2, every_4], &[every_4, stale], 6.0);
        assert!((rate - 0.5).abs() < 1e-12, "{rate}");
        let most = max_dirty_rate(&[every_2, every_4, stale], 6.0);
        assert!((most - 0.75).abs() < 1e-12, "{most}");
        assert_eq!(stage_two_s(2.0, rate, 1.5), Some(2.0));
    }

    #[test]
    fn an_irregular_block_is_waited_for() {
        // Intervals 1, 1, 4: A = 2, σ = √2.
        let irregular = block(&[0.0, 1.0, 2.0, 6.0]);
        assert!(max_dirty_rate(&[irregular], 6.0 + 2.0 + 2.0 * 2.0_f64.sqrt() - 1e-9) > 0.0);
        assert_eq!(
            max_dirty_rate(&[irregular], 6.0 + 2.0 + 2.0 * 2.0_f64.sqrt() + 1e-6),
            0.0
        );
        assert_eq!(
            max_dirty_rate(&[block(&[3.0, 3.0])], 3.0),
            0.0,
            "no interval, no rate"
        );
    }
}
