//! Sums of rows of bytes, each so many times, with the instructions that a
//! processor has for it. All ways give the same numbers: they are whole.

/// Columns that are added up together.
pub const BLOCK: usize = 32;

/// A row, and how often it counts.
pub type Times = (u32, i16);

/// `[rows][stride]`, the stride being a whole number of blocks.
#[derive(Clone, Copy)]
pub struct Table<'a> {
    pub bytes: &'a [u8],
    pub stride: usize,
}

impl Table<'_> {
    /// Columns of a row from `at` on.
    #[inline(always)]
    fn block(&self, row: u32, at: usize) -> &[u8; BLOCK] {
        self.bytes[row as usize * self.stride + at..].first_chunk().expect("a row has whole blocks")
    }
}

/// Adds `rows` of `table`, each so many times, to `sums [stride]`, modulo 2^32.
pub fn add(table: Table<'_>, rows: &[Times], sums: &mut [i32]) {
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("avx2") {
            // SAFETY: the processor was just found to have AVX2.
            return unsafe { x86::avx2(table, rows, sums) };
        }
        // SAFETY: every x86-64 processor has SSE2.
        unsafe { x86::sse2(table, rows, sums) }
    }
    #[cfg(not(target_arch = "x86_64"))]
    plainly(table, rows, sums)
}

/// What [`add`] does.
pub fn plainly(table: Table<'_>, rows: &[Times], sums: &mut [i32]) {
    for &(row, times) in rows {
        let bytes = &table.bytes[row as usize * table.stride..][..table.stride];
        for (sum, &weight) in sums.iter_mut().zip(bytes) {
            *sum = sum.wrapping_add(i32::from(times) * i32::from(weight));
        }
    }
}

#[cfg(test)]
type Way = fn(Table<'_>, &[Times], &mut [i32]);

/// All ways that this machine knows.
#[cfg(test)]
pub fn ways() -> Vec<Way> {
    let mut ways: Vec<Way> = vec![add];
    #[cfg(target_arch = "x86_64")]
    // SAFETY: every x86-64 processor has SSE2.
    ways.push(|table, rows, sums| unsafe { x86::sse2(table, rows, sums) });
    ways
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{BLOCK, Table, Times};
    use std::arch::x86_64::*;

    /// Both numbers of times, as a lane of `madd` wants them.
    fn both(a: i16, b: i16) -> i32 {
        i32::from(a as u16) | i32::from(b) << 16
    }

    #[target_feature(enable = "avx2")]
    pub fn avx2(table: Table<'_>, rows: &[Times], sums: &mut [i32]) {
        let zero = _mm256_setzero_si256();
        let (pairs, rest) = rows.as_chunks::<2>();
        for (index, sums) in sums.as_chunks_mut::<BLOCK>().0.iter_mut().enumerate() {
            let at = index * BLOCK;
            let mut lanes = [zero; 4];
            for &[a, b] in pairs {
                let times = _mm256_set1_epi32(both(a.1, b.1));
                let (a, b) = (table.block(a.0, at), table.block(b.0, at));
                // SAFETY: both are 32 bytes; unaligned loads have no other demand.
                let (a, b) = unsafe {
                    (_mm256_loadu_si256(a.as_ptr().cast()), _mm256_loadu_si256(b.as_ptr().cast()))
                };
                // Bytes of a and b in turns, within each half of 16 columns,
                // then as numbers of 16 bits.
                let (low, high) = (_mm256_unpacklo_epi8(a, b), _mm256_unpackhi_epi8(a, b));
                let turns = [
                    _mm256_unpacklo_epi8(low, zero),
                    _mm256_unpackhi_epi8(low, zero),
                    _mm256_unpacklo_epi8(high, zero),
                    _mm256_unpackhi_epi8(high, zero),
                ];
                for (lane, turn) in lanes.iter_mut().zip(turns) {
                    *lane = _mm256_add_epi32(*lane, _mm256_madd_epi16(turn, times));
                }
            }
            for (index, lane) in lanes.into_iter().enumerate() {
                let halves = [_mm256_castsi256_si128(lane), _mm256_extracti128_si256::<1>(lane)];
                for (half, four) in halves.into_iter().enumerate() {
                    let at = 16 * half + 4 * index;
                    sums[at..at + 4].iter_mut().zip(numbers(four)).for_each(wrapping);
                }
            }
        }
        super::plainly(table, rest, sums);
    }

    #[target_feature(enable = "sse2")]
    pub fn sse2(table: Table<'_>, rows: &[Times], sums: &mut [i32]) {
        let zero = _mm_setzero_si128();
        let (pairs, rest) = rows.as_chunks::<2>();
        for (index, sums) in sums.as_chunks_mut::<16>().0.iter_mut().enumerate() {
            let (at, half) = (index / 2 * BLOCK, index % 2 * 16);
            let mut lanes = [zero; 4];
            for &[a, b] in pairs {
                let times = _mm_set1_epi32(both(a.1, b.1));
                let (a, b) = (&table.block(a.0, at)[half..], &table.block(b.0, at)[half..]);
                // SAFETY: both have 16 bytes behind the half that they begin
                // with; unaligned loads have no other demand.
                let (a, b) = unsafe {
                    (_mm_loadu_si128(a.as_ptr().cast()), _mm_loadu_si128(b.as_ptr().cast()))
                };
                let (low, high) = (_mm_unpacklo_epi8(a, b), _mm_unpackhi_epi8(a, b));
                let turns = [
                    _mm_unpacklo_epi8(low, zero),
                    _mm_unpackhi_epi8(low, zero),
                    _mm_unpacklo_epi8(high, zero),
                    _mm_unpackhi_epi8(high, zero),
                ];
                for (lane, turn) in lanes.iter_mut().zip(turns) {
                    *lane = _mm_add_epi32(*lane, _mm_madd_epi16(turn, times));
                }
            }
            for (sums, lane) in sums.as_chunks_mut::<4>().0.iter_mut().zip(lanes) {
                sums.iter_mut().zip(numbers(lane)).for_each(wrapping);
            }
        }
        super::plainly(table, rest, sums);
    }

    fn wrapping((sum, more): (&mut i32, i32)) {
        *sum = sum.wrapping_add(more);
    }

    #[target_feature(enable = "sse2")]
    fn numbers(four: __m128i) -> [i32; 4] {
        let low = _mm_cvtsi128_si64(four);
        let high = _mm_cvtsi128_si64(_mm_unpackhi_epi64(four, four));
        [low as i32, (low >> 32) as i32, high as i32, (high >> 32) as i32]
    }
}
