//! Loops over words with the best instructions that the processor has: AVX2, chosen at run time,
//! or what the target's baseline gives.
//!
//! Words of memory that another process may write to are loaded as the atomics they are, which
//! compilers do one by one. The AVX2 loops load four at once, by a volatile access: that is done
//! exactly once and as one instruction, and does to each aligned word what a relaxed load does. A
//! writer can change what is found, and nothing else. The same loops serve private words.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::scan::{count_common_loop, count_loop, skip_zeros_loop};

/// How many bits are set.
pub(crate) fn count(words: &[u64]) -> u64 {
    #[cfg(target_arch = "x86_64")]
    if avx2::is_there() {
        // SAFETY: the processor has AVX2 and POPCNT; the words are borrowed.
        return unsafe { avx2::count(words.as_ptr(), words.len()) };
    }
    count_loop(words)
}

/// The same of shared words.
pub(crate) fn count_shared(words: &[AtomicU64]) -> u64 {
    #[cfg(target_arch = "x86_64")]
    if avx2::is_there() {
        // SAFETY: as in `count`; only loads are made.
        return unsafe { avx2::count(words.as_ptr().cast(), words.len()) };
    }
    let ones = |word: &AtomicU64| u64::from(word.load(Ordering::Relaxed).count_ones());
    words.iter().map(ones).sum()
}

/// How many bits are set in both; both have as many words.
pub(crate) fn count_common(a: &[u64], b: &[u64]) -> u64 {
    #[cfg(target_arch = "x86_64")]
    if avx2::is_there() {
        // SAFETY: the processor has AVX2 and POPCNT, which is all that the callee asks for.
        return unsafe { avx2::count_common(a, b) };
    }
    count_common_loop(a, b)
}

/// How many words can be skipped because they are zero; the first that is not follows soon.
pub(crate) fn skip_zeros(words: &[u64]) -> usize {
    #[cfg(target_arch = "x86_64")]
    if avx2::is_there() {
        // SAFETY: the processor has AVX2; the words are borrowed.
        return unsafe { avx2::skip_zeros(words.as_ptr(), words.len()) };
    }
    skip_zeros_loop(words)
}

/// The same of shared words.
pub(crate) fn skip_shared_zeros(words: &[AtomicU64]) -> usize {
    #[cfg(target_arch = "x86_64")]
    if avx2::is_there() {
        // SAFETY: as in `skip_zeros`; only loads are made.
        return unsafe { avx2::skip_zeros(words.as_ptr().cast(), words.len()) };
    }
    0
}

/// `own = shared`, or with `UNION` `own |= shared`, over the words that both have. Words are taken
/// as they lie in memory.
pub(crate) fn merge<const UNION: bool>(shared: &[AtomicU64], own: &mut [u64]) {
    let both = shared.len().min(own.len());
    let (shared, own) = (&shared[..both], &mut own[..both]);
    #[cfg(target_arch = "x86_64")]
    if avx2::is_there() {
        // SAFETY: the processor has AVX2; `shared` is only loaded from, `own` borrowed exclusively,
        // and both have `both` words.
        unsafe { avx2::merge::<UNION>(shared.as_ptr().cast(), own.as_mut_ptr(), both) };
        return;
    }
    for (shared, own) in shared.iter().zip(own) {
        let word = shared.load(Ordering::Relaxed);
        *own = if UNION { *own | word } else { word };
    }
}

#[cfg(target_arch = "x86_64")]
mod avx2 {
    #![allow(
        unused_unsafe,
        reason = "intrinsics without pointers are safe since Rust 1.87; older ones are admitted"
    )]

    use std::arch::x86_64::{
        __m256i, _mm256_add_epi8, _mm256_add_epi64, _mm256_and_si256, _mm256_loadu_si256,
        _mm256_or_si256, _mm256_sad_epu8, _mm256_set1_epi8, _mm256_setr_epi8, _mm256_setzero_si256,
        _mm256_shuffle_epi8, _mm256_slli_epi64, _mm256_srli_epi16, _mm256_storeu_si256,
        _mm256_testz_si256, _mm256_xor_si256,
    };

    use crate::scan::count_common_loop;

    /// Words in a vector.
    const LANES: usize = 4;
    /// Words that are looked at together: eight vectors, four cache lines.
    const GROUP: usize = 8 * LANES;

    pub(super) fn is_there() -> bool {
        is_x86_feature_detected!("avx2") && is_x86_feature_detected!("popcnt")
    }

    /// Words before the first one at which a vector can lie.
    fn head(start: *const u64, words: usize) -> usize {
        start.align_offset(align_of::<__m256i>()).min(words)
    }

    /// # Safety
    /// `at` is readable and aligned.
    #[inline]
    unsafe fn word(at: *const u64) -> u64 {
        // SAFETY: as the caller promises.
        unsafe { at.read_volatile() }
    }

    /// # Safety
    /// The 32 bytes at `at` are readable, `at` is a multiple of 32, and AVX2 is there.
    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn vector(at: *const u64) -> __m256i {
        // SAFETY: as the caller promises.
        unsafe { at.cast::<__m256i>().read_volatile() }
    }

    /// The bits of `a`, `b` and `c` added: carries and sums.
    ///
    /// # Safety
    /// AVX2 is there.
    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn add(a: __m256i, b: __m256i, c: __m256i) -> (__m256i, __m256i) {
        // SAFETY: as the caller promises.
        unsafe {
            let differ = _mm256_xor_si256(a, b);
            let carries = _mm256_or_si256(_mm256_and_si256(a, b), _mm256_and_si256(differ, c));
            (carries, _mm256_xor_si256(differ, c))
        }
    }

    /// How many bits are set in each lane.
    ///
    /// # Safety
    /// AVX2 is there.
    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn ones(vector: __m256i) -> __m256i {
        // SAFETY: as the caller promises.
        unsafe {
            let table = _mm256_setr_epi8(
                0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4, 0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3,
                2, 3, 3, 4,
            );
            let mask = _mm256_set1_epi8(0x0f);
            let low = _mm256_and_si256(vector, mask);
            let high = _mm256_and_si256(_mm256_srli_epi16::<4>(vector), mask);
            let low = _mm256_shuffle_epi8(table, low);
            let high = _mm256_shuffle_epi8(table, high);
            _mm256_sad_epu8(_mm256_add_epi8(low, high), _mm256_setzero_si256())
        }
    }

    /// Bits that were added up, by their weight.
    struct Sums {
        ones: __m256i,
        twos: __m256i,
        fours: __m256i,
        /// A number in each lane.
        eights: __m256i,
    }

    impl Sums {
        /// # Safety
        /// AVX2 is there.
        #[target_feature(enable = "avx2")]
        unsafe fn new() -> Self {
            // SAFETY: as the caller promises.
            let zero = unsafe { _mm256_setzero_si256() };
            Self {
                ones: zero,
                twos: zero,
                fours: zero,
                eights: zero,
            }
        }

        /// Adds a group (Harley and Seal's way: one population count for eight vectors).
        ///
        /// # Safety
        /// The group is readable, at a multiple of 32; AVX2 is there.
        #[inline]
        #[target_feature(enable = "avx2")]
        unsafe fn add_group(&mut self, at: *const u64) {
            // SAFETY: as the caller promises; all vectors lie within the group.
            unsafe {
                let (twos_a, ones) = add(self.ones, vector(at), vector(at.add(LANES)));
                let at = at.add(2 * LANES);
                let (twos_b, ones) = add(ones, vector(at), vector(at.add(LANES)));
                let (fours_a, twos) = add(self.twos, twos_a, twos_b);
                let at = at.add(2 * LANES);
                let (twos_a, ones) = add(ones, vector(at), vector(at.add(LANES)));
                let at = at.add(2 * LANES);
                let (twos_b, ones) = add(ones, vector(at), vector(at.add(LANES)));
                let (fours_b, twos) = add(twos, twos_a, twos_b);
                let (eights, fours) = add(self.fours, fours_a, fours_b);
                self.eights = _mm256_add_epi64(self.eights, self::ones(eights));
                (self.ones, self.twos, self.fours) = (ones, twos, fours);
            }
        }

        /// # Safety
        /// AVX2 is there.
        #[target_feature(enable = "avx2")]
        unsafe fn total(&self) -> u64 {
            let mut lanes = [0; LANES];
            // SAFETY: as the caller promises; `lanes` is as long as a vector.
            unsafe {
                let mut sum = _mm256_slli_epi64::<3>(self.eights);
                sum = _mm256_add_epi64(sum, _mm256_slli_epi64::<2>(ones(self.fours)));
                sum = _mm256_add_epi64(sum, _mm256_slli_epi64::<1>(ones(self.twos)));
                sum = _mm256_add_epi64(sum, ones(self.ones));
                _mm256_storeu_si256(lanes.as_mut_ptr().cast(), sum);
            }
            lanes.iter().sum()
        }
    }

    /// Reads both halves in turn: two streams keep the prefetchers busier than one.
    ///
    /// # Safety
    /// `words` words at `start` are readable, aligned; AVX2 and POPCNT are there.
    #[target_feature(enable = "avx2,popcnt")]
    pub(super) unsafe fn count(start: *const u64, words: usize) -> u64 {
        let head = head(start, words);
        let half = (words - head) / 2 / GROUP * GROUP;
        // SAFETY: as the caller promises. Groups end before `head + 2 * half`, and single words
        // are below `words`.
        unsafe {
            let mut sums = Sums::new();
            for at in (head..head + half).step_by(GROUP) {
                sums.add_group(start.add(at));
                sums.add_group(start.add(at + half));
            }
            let mut total = sums.total();
            for at in (0..head).chain(head + 2 * half..words) {
                total += u64::from(word(start.add(at)).count_ones());
            }
            total
        }
    }

    /// # Safety
    /// AVX2 and POPCNT are there. The body itself is safe code.
    #[target_feature(enable = "avx2,popcnt")]
    pub(super) unsafe fn count_common(a: &[u64], b: &[u64]) -> u64 {
        count_common_loop(a, b)
    }

    /// # Safety
    /// `words` words at `start` are readable, aligned; AVX2 is there.
    #[target_feature(enable = "avx2")]
    pub(super) unsafe fn skip_zeros(start: *const u64, words: usize) -> usize {
        let head = head(start, words);
        // SAFETY: as the caller promises. Single words are below `words`, and groups end there at
        // the latest.
        unsafe {
            for at in 0..head {
                if word(start.add(at)) != 0 {
                    return at;
                }
            }
            let mut at = head;
            while words - at >= GROUP {
                let group = start.add(at);
                let mut any = vector(group);
                for lane in (LANES..GROUP).step_by(LANES) {
                    any = _mm256_or_si256(any, vector(group.add(lane)));
                }
                if _mm256_testz_si256(any, any) == 0 {
                    break;
                }
                at += GROUP;
            }
            at
        }
    }

    /// # Safety
    /// `words` words are readable at `shared` and writable at `own`, aligned; AVX2 is there.
    #[target_feature(enable = "avx2")]
    pub(super) unsafe fn merge<const UNION: bool>(shared: *const u64, own: *mut u64, words: usize) {
        let head = head(shared, words);
        let vectors = (words - head) / LANES * LANES;
        // SAFETY: as the caller promises. Vectors end at `words` at the latest, and single words
        // are below it.
        unsafe {
            for at in (head..head + vectors).step_by(LANES) {
                let own = own.add(at).cast::<__m256i>();
                let mut merged = vector(shared.add(at));
                if UNION {
                    merged = _mm256_or_si256(merged, _mm256_loadu_si256(own));
                }
                _mm256_storeu_si256(own, merged);
            }
            for at in (0..head).chain(head + vectors..words) {
                let own = own.add(at);
                let word = word(shared.add(at));
                *own = if UNION { *own | word } else { word };
            }
        }
    }
}
