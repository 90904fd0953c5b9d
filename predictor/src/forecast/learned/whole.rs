//! Products of a few rows of eight-bit weights with numbers, in whole numbers:
//! the same sum in every order and on every machine, whatever instructions it
//! has, and a fraction of the work of floats where a processor has only SSE2.

use super::matrix::Matrix;
pub use super::simd::Times;
use super::simd::{self, BLOCK, Table};

/// Larger magnitudes of a value count as this: logarithms of shares are below
/// 4, log-odds of an id seldom beyond.
const MOST: f32 = 8.0;
/// Weights are kept as bytes from 1 to 255.
const MIDDLE: i32 = 128;

/// Rows of several matrices with equally many columns, one behind the other.
pub struct Whole {
    columns: usize,
    /// Columns up to a whole number of blocks.
    stride: usize,
    /// `[rows][stride]`: weight and [`MIDDLE`].
    bytes: Vec<u8>,
    /// `[rows]`: what a value times this is in whole numbers.
    factors: Vec<f32>,
    /// What one is worth.
    unit: f32,
    /// Magnitude of a whole number that keeps sums of all rows within 32 bits.
    most: f32,
}

impl Whole {
    pub fn new(columns: usize, parts: &[&Matrix]) -> Self {
        let rows: usize = parts.iter().map(|part| part.scales.len()).sum();
        let stride = columns.next_multiple_of(BLOCK);
        let largest = parts.iter().flat_map(|part| &part.scales).fold(0f32, |a, &b| a.max(b));
        let most = (i32::MAX as f32 / (127.0 * rows.max(1) as f32)).clamp(1.0, 32_000.0).floor();
        let unit = MOST * largest / most;
        let inverse = if unit > 0.0 { 1.0 / unit } else { 0.0 };
        let mut bytes = vec![MIDDLE as u8; rows * stride];
        let values = parts.iter().flat_map(|part| part.values.chunks_exact(columns.max(1)));
        for (to, row) in bytes.chunks_exact_mut(stride.max(1)).zip(values) {
            to.iter_mut().zip(row).for_each(|(to, &weight)| *to = weight as u8 ^ MIDDLE as u8);
        }
        let factors = parts.iter().flat_map(|part| &part.scales).map(|scale| scale * inverse);
        Self { columns, stride, bytes, factors: factors.collect(), unit, most }
    }

    /// How often `row` counts for `value`.
    pub fn times(&self, row: u32, value: f32) -> Times {
        let exact = (value * self.factors[row as usize]).clamp(-self.most, self.most);
        // Rounds to nearest by adding and taking away 1.5 * 2^23.
        (row, ((exact + 12_582_912.0) - 12_582_912.0) as i16)
    }

    /// An empty sum.
    pub fn zero(&self) -> Vec<i32> {
        vec![0; self.stride]
    }

    /// `sums [stride] += times * row` for each of `rows`.
    pub fn add(&self, sums: &mut [i32], rows: &[Times]) {
        let middle: i32 = rows.iter().map(|&(_, times)| i32::from(times)).sum();
        let middle = middle.wrapping_mul(MIDDLE);
        simd::add(self.table(), rows, sums);
        sums.iter_mut().for_each(|sum| *sum = sum.wrapping_sub(middle));
    }

    fn table(&self) -> Table<'_> {
        Table { bytes: &self.bytes, stride: self.stride }
    }

    /// `to [columns]`: what the sums are as floats.
    pub fn floats(&self, sums: &[i32], to: &mut [f32]) {
        for (to, &sum) in to[..self.columns].iter_mut().zip(sums) {
            *to = sum as f32 * self.unit;
        }
    }

    /// Bytes that it holds.
    pub fn memory_bytes(&self) -> usize {
        self.bytes.len() + 4 * self.factors.len()
    }
}

#[cfg(test)]
mod tests {
    use super::super::simd::{plainly, ways};
    use super::*;

    #[test]
    fn sums_are_those_of_floats_and_of_plain_code() {
        let mut state = 7u32;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 24) as f32 - 0.5
        };
        for (columns, rows) in [(192, 40), (9, 7), (16, 1), (33, 2)] {
            let mut matrix =
                |size| Matrix::nearest(columns, &(0..size).map(|_| next()).collect::<Vec<_>>());
            let parts = [matrix(rows * columns), matrix(3 * columns)];
            let whole = Whole::new(columns, &[&parts[0], &parts[1]]);
            let values: Vec<f32> = (0..rows + 3).map(|_| 6.0 * next()).collect();
            let times: Vec<Times> =
                (0..).zip(&values).map(|(row, &value)| whole.times(row, value)).collect();
            let mut sums = whole.zero();
            whole.add(&mut sums, &times[..times.len() / 2]);
            whole.add(&mut sums, &times[times.len() / 2..]);
            let mut found = vec![0.0; columns];
            whole.floats(&sums, &mut found);
            let mut wanted = vec![0f64; columns];
            let weights =
                parts.iter().flat_map(|part| (0..part.scales.len()).map(|row| part.row(row)));
            for (weights, &value) in weights.zip(&values) {
                for (sum, weight) in wanted.iter_mut().zip(weights) {
                    *sum += f64::from(weight) * f64::from(value);
                }
            }
            for (found, wanted) in found.iter().zip(&wanted) {
                assert!((f64::from(*found) - wanted).abs() < 2e-3, "{found} {wanted}");
            }
            let mut wanted = whole.zero();
            plainly(whole.table(), &times, &mut wanted);
            for way in ways() {
                let mut found = whole.zero();
                way(whole.table(), &times, &mut found);
                assert_eq!(found, wanted);
            }
        }
    }

    #[test]
    fn the_largest_sums_stay_within_32_bits() {
        for rows in [1, 200, 20_000] {
            let weights: Vec<f32> = (0..rows * 2).map(|at| [1.0, -1.0][at % 2]).collect();
            let whole = Whole::new(2, &[&Matrix::nearest(2, &weights)]);
            let times: Vec<Times> = (0..rows as u32).map(|row| whole.times(row, 1e9)).collect();
            let mut sums = whole.zero();
            whole.add(&mut sums, &times);
            let mut found = [0.0; 2];
            whole.floats(&sums, &mut found);
            let wanted = MOST * rows as f32;
            assert!((found[0] / wanted - 1.0).abs() < 0.01 && found[1] == -found[0], "{found:?}");
        }
        let zero = Whole::new(3, &[&Matrix::nearest(3, &[0.0; 9])]);
        assert_eq!(zero.times(2, 5.0), (2, 0));
        assert_eq!(zero.times(2, f32::NAN).1, 0);
    }
}
