//! The pieces of attention: scores, softmax of a chunk, weighted values.

use super::elementwise::exp;
use super::simd::*;
use crate::cpu::kernels::Cells;
use half::f16;
use std::arch::x86_64::*;

simd! {
    /// Up to 16 cells as f32, the rest zero.
    fn load_f16(cells: &[f16]) -> __m512 {
        // SAFETY: the mask covers at most the slice; masked lanes are not
        // read; `f16` is two bytes without padding.
        let x = unsafe { _mm256_maskz_loadu_epi16(low_bits16(cells.len()), cells.as_ptr().cast()) };
        _mm512_cvtph_ps(x)
    }

    /// Cells `from .. from + 16` (or fewer, up to `end`) of a position.
    fn load_cells(cells: Cells<'_>, position: usize, from: usize, end: usize) -> __m512 {
        let (from, to) = (from.min(end), end.min(from + 16));
        match cells {
            Cells::F16(cells, stride) => {
                load_f16(&cells[position * stride + from..position * stride + to])
            }
            Cells::F32(cells, stride) => {
                load_f32(&cells[position * stride + from..position * stride + to])
            }
        }
    }

    /// Cells `from .. from + 16`, all of which exist.
    fn load_whole(cells: Cells<'_>, position: usize, from: usize) -> __m512 {
        match cells {
            Cells::F16(cells, stride) => {
                let cells: &[f16; 16] =
                    cells[position * stride + from..].first_chunk().expect("a whole register");
                // SAFETY: sixteen `f16` are 32 bytes without padding; the load
                // needs no alignment.
                _mm512_cvtph_ps(unsafe { _mm256_loadu_si256(cells.as_ptr().cast()) })
            }
            Cells::F32(cells, stride) => load_f32x16(
                cells[position * stride + from..].first_chunk().expect("a whole register"),
            ),
        }
    }

    /// The contract's tree over each register, answers in order.
    fn tree_each(a: [__m512; 16]) -> __m512 {
        let mut b = [_mm512_setzero_ps(); 8];
        for (b, a) in b.iter_mut().zip(a.as_chunks::<2>().0) {
            *b = _mm512_add_ps(
                _mm512_shuffle_f32x4::<0b01_00_01_00>(a[0], a[1]),
                _mm512_shuffle_f32x4::<0b11_10_11_10>(a[0], a[1]),
            );
        }
        let mut c = [_mm512_setzero_ps(); 4];
        for (c, b) in c.iter_mut().zip(b.as_chunks::<2>().0) {
            *c = _mm512_add_ps(
                _mm512_shuffle_f32x4::<0b10_00_10_00>(b[0], b[1]),
                _mm512_shuffle_f32x4::<0b11_01_11_01>(b[0], b[1]),
            );
        }
        let mut d = [_mm512_setzero_ps(); 2];
        for (d, c) in d.iter_mut().zip(c.as_chunks::<2>().0) {
            *d = _mm512_add_ps(
                _mm512_shuffle_ps::<0b01_00_01_00>(c[0], c[1]),
                _mm512_shuffle_ps::<0b11_10_11_10>(c[0], c[1]),
            );
        }
        let sums = _mm512_add_ps(
            _mm512_shuffle_ps::<0b10_00_10_00>(d[0], d[1]),
            _mm512_shuffle_ps::<0b11_01_11_01>(d[0], d[1]),
        );
        let order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
        _mm512_permutexvar_ps(order, sums)
    }

    /// `out[n][p]` for `Q` queries and `P` positions, `Q * P = 16`: sixteen
    /// sums at a time, each of them in one register.
    fn score_tile<const Q: usize, const P: usize>(
        queries: &[f32],
        width: usize,
        keys: Cells<'_>,
        first: usize,
        some: usize,
    ) -> __m512 {
        let mut sums = [_mm512_setzero_ps(); 16];
        let whole = width / 16 * 16;
        // Positions that do not exist repeat the last one.
        let mut positions = [0; P];
        for (p, position) in positions.iter_mut().enumerate() {
            *position = first + p.min(some - 1);
        }
        for from in (0..whole).step_by(16) {
            let mut q = [_mm512_setzero_ps(); Q];
            for n in 0..Q {
                q[n] = load_f32x16(queries[n * width + from..].first_chunk().expect("a query"));
            }
            for p in 0..P {
                let k = load_whole(keys, positions[p], from);
                for n in 0..Q {
                    sums[n * P + p] = _mm512_fmadd_ps(q[n], k, sums[n * P + p]);
                }
            }
        }
        if whole < width {
            let mask = low_bits16(width - whole);
            for n in 0..Q {
                let q = load_f32(&queries[n * width + whole..(n + 1) * width]);
                for p in 0..P {
                    let k = load_cells(keys, positions[p], whole, width);
                    sums[n * P + p] = _mm512_mask3_fmadd_ps(q, k, sums[n * P + p], mask);
                }
            }
        }
        tree_each(sums)
    }

    pub fn scores(
        queries: &[f32],
        width: usize,
        keys: Cells<'_>,
        count: usize,
        scale: f32,
        out: &mut [f32],
        out_stride: usize,
    ) {
        let factor = _mm512_set1_ps(scale);
        let total = queries.len() / width;
        let fours = total / 4 * 4;
        for first in (0..count).step_by(4) {
            let some = 4.min(count - first);
            for n in (0..fours).step_by(4) {
                let four = &queries[n * width..(n + 4) * width];
                let scores = score_tile::<4, 4>(four, width, keys, first, some);
                let mut answers = [0.0f32; 16];
                store_f32x16(&mut answers, _mm512_mul_ps(scores, factor));
                for (i, answers) in answers.chunks_exact(4).enumerate() {
                    let at = (n + i) * out_stride + first;
                    out[at..at + some].copy_from_slice(&answers[..some]);
                }
            }
        }
        for n in fours..total {
            let one = &queries[n * width..(n + 1) * width];
            for first in (0..count).step_by(16) {
                let some = 16.min(count - first);
                let scores = score_tile::<1, 16>(one, width, keys, first, some);
                let at = n * out_stride + first;
                store_f32(&mut out[at..at + some], _mm512_mul_ps(scores, factor));
            }
        }
    }

    pub fn softmax_chunk(scores: &mut [f32], first: usize) -> (f32, f32) {
        let mut max = _mm512_set1_ps(f32::NEG_INFINITY);
        for s in scores.chunks(16) {
            let mask = low_bits16(s.len());
            // The second operand is the answer when the first is NaN.
            max = _mm512_mask_max_ps(max, mask, load_f32(s), max);
        }
        let max = _mm512_reduce_max_ps(max);
        let top = _mm512_set1_ps(max);
        let mut lanes = _mm512_setzero_ps();
        // The first register holds what lies before a multiple of sixteen.
        let head = (first.next_multiple_of(16) - first).min(scores.len());
        let (before, rest) = scores.split_at_mut(head);
        if !before.is_empty() {
            let y = exp(_mm512_sub_ps(load_f32(before), top));
            store_f32(before, y);
            let mut shifted = [0.0f32; 16];
            shifted[first % 16..first % 16 + before.len()].copy_from_slice(before);
            lanes = _mm512_add_ps(lanes, load_f32x16(&shifted));
        }
        for s in rest.chunks_mut(16) {
            let mask = low_bits16(s.len());
            let y = exp(_mm512_sub_ps(load_f32(s), top));
            store_f32(s, y);
            lanes = _mm512_mask_add_ps(lanes, mask, lanes, y);
        }
        (max, tree16(lanes))
    }

    /// Adds positions `start .. end` for `Q` queries and the 16 `D` cells from
    /// `from`.
    fn add_values<const Q: usize, const D: usize>(
        weights: [&[f32]; Q],
        (start, end): (usize, usize),
        values: Cells<'_>,
        from: usize,
        width: usize,
        acc: &mut [[__m512; D]; Q],
    ) {
        let is_whole = from + 16 * D <= width;
        for p in start..end {
            for d in 0..D {
                let v = if is_whole {
                    load_whole(values, p, from + 16 * d)
                } else {
                    load_cells(values, p, from + 16 * d, width)
                };
                for n in 0..Q {
                    acc[n][d] = _mm512_fmadd_ps(_mm512_set1_ps(weights[n][p]), v, acc[n][d]);
                }
            }
        }
    }

    /// All cells of `Q` queries: first what only some of them see, then what
    /// all see, then the rest, so that each meets its positions in order.
    fn values_of<const Q: usize, const D: usize>(
        weights: [&[f32]; Q],
        ranges: &[(usize, usize); Q],
        values: Cells<'_>,
        width: usize,
        acc: &mut [f32],
    ) {
        let start = ranges.iter().map(|range| range.0).max().unwrap_or(0);
        let end = ranges.iter().map(|range| range.1).min().unwrap_or(0);
        for from in (0..width).step_by(16 * D) {
            let mut sums = [[_mm512_setzero_ps(); D]; Q];
            for (n, sums) in sums.iter_mut().enumerate() {
                for (d, sum) in sums.iter_mut().enumerate() {
                    let at = (from + 16 * d).min(width);
                    *sum = load_f32(&acc[n * width + at..n * width + (at + 16).min(width)]);
                }
            }
            for n in 0..Q {
                let alone = (ranges[n].0, if start < end { start } else { ranges[n].1 });
                let one: &mut [[__m512; D]; 1] = (&mut sums[n..n + 1]).try_into().expect("one");
                add_values::<1, D>([weights[n]], alone, values, from, width, one);
            }
            add_values::<Q, D>(weights, (start, end), values, from, width, &mut sums);
            if start < end {
                for n in 0..Q {
                    let one: &mut [[__m512; D]; 1] = (&mut sums[n..n + 1]).try_into().expect("one");
                    add_values::<1, D>([weights[n]], (end, ranges[n].1), values, from, width, one);
                }
            }
            for (n, sums) in sums.iter().enumerate() {
                for (d, sum) in sums.iter().enumerate() {
                    let at = (from + 16 * d).min(width);
                    store_f32(&mut acc[n * width + at..n * width + (at + 16).min(width)], *sum);
                }
            }
        }
    }

    pub fn values(
        weights: &[f32],
        weight_stride: usize,
        ranges: &[(usize, usize)],
        values: Cells<'_>,
        width: usize,
        acc: &mut [f32],
    ) {
        let row = |n: usize| &weights[n * weight_stride..(n + 1) * weight_stride];
        let mut n = 0;
        while n + 4 <= ranges.len() {
            let group = ranges[n..].first_chunk().expect("four are left");
            let rows = [row(n), row(n + 1), row(n + 2), row(n + 3)];
            values_of::<4, 4>(rows, group, values, width, &mut acc[n * width..(n + 4) * width]);
            n += 4;
        }
        for (n, range) in ranges.iter().enumerate().skip(n) {
            let acc = &mut acc[n * width..(n + 1) * width];
            if width > 64 {
                values_of::<1, 8>([row(n)], &[*range], values, width, acc);
            } else {
                values_of::<1, 4>([row(n)], &[*range], values, width, acc);
            }
        }
    }
}
