//! A layer's network: one hidden layer of rectified units, and straight ways
//! from the input to the answer beside it.

use super::input::{FIELDS, Input, Rows, USES};
use super::matrix::Matrix;

/// The sizes of one layer's network.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Sizes {
    pub rows: Rows,
    pub experts: usize,
    pub hidden: usize,
    /// Sparse rows lead straight to the answer, too. That is as many weights as
    /// experts squared, which the widest models have no room for.
    pub is_direct: bool,
}

impl Sizes {
    /// Of a sparse row: it goes to the hidden units, and straight to the
    /// answer.
    pub fn width(&self) -> usize {
        self.hidden + if self.is_direct { self.experts } else { 0 }
    }

    /// Hidden units and answer.
    pub fn sums(&self) -> usize {
        self.hidden + self.experts
    }

    /// Where each part of the weights begins, and where the last one ends:
    /// `sparse [rows][width]`, `dense [FIELDS * experts][hidden]`, `straight
    /// [FIELDS + 1][experts]` with the bias last, `out [hidden][experts]`.
    pub fn parts(&self) -> [usize; 5] {
        let sparse = self.rows.count() * self.width();
        let dense = sparse + FIELDS * self.experts * self.hidden;
        let straight = dense + (FIELDS + 1) * self.experts;
        [0, sparse, dense, straight, straight + self.hidden * self.experts]
    }

    /// Rows and columns in a file: the sparse rows' two halves apart, since
    /// they are of different magnitude, then the other parts.
    pub fn matrices(&self) -> [(usize, usize); 5] {
        let (hidden, experts) = (self.hidden, self.experts);
        let rows = self.rows.count();
        [
            (rows, hidden),
            (if self.is_direct { rows } else { 0 }, self.width() - hidden),
            (FIELDS * experts, hidden),
            (FIELDS + 1, experts),
            (hidden, experts),
        ]
    }

    /// Weights as in a file.
    pub fn to_matrices(&self, weights: &[f32]) -> [Matrix; 5] {
        let [_, dense, straight, out, end] = self.parts();
        let half = |range: std::ops::Range<usize>| -> Vec<f32> {
            let rows = weights[..dense].chunks_exact(self.width());
            rows.flat_map(|row| &row[range.clone()]).copied().collect()
        };
        [
            Matrix::nearest(self.hidden, &half(0..self.hidden)),
            Matrix::nearest(self.width() - self.hidden, &half(self.hidden..self.width())),
            Matrix::nearest(self.hidden, &weights[dense..straight]),
            Matrix::nearest(self.experts, &weights[straight..out]),
            Matrix::nearest(self.experts, &weights[out..end]),
        ]
    }

    /// Weights as [`forward`] wants them.
    pub fn to_weights(&self, [units, direct, dense, straight, out]: &[Matrix; 5]) -> Vec<f32> {
        let mut weights = Vec::with_capacity(self.count());
        for row in 0..self.rows.count() {
            weights.extend(units.row(row));
            if self.is_direct {
                weights.extend(direct.row(row));
            }
        }
        [dense, straight, out].into_iter().for_each(|part| weights.extend(part.floats()));
        weights
    }

    /// Weights in all.
    pub fn count(&self) -> usize {
        self.parts()[4]
    }
}

/// `to += factor * from`.
#[inline]
pub fn add_scaled(to: &mut [f32], factor: f32, from: &[f32]) {
    for (to, from) in to.iter_mut().zip(from) {
        *to += factor * from;
    }
}

/// `to += value * row` for each of `rows`, four at a time, so that sums are
/// read and written once for four rows.
pub fn add_rows(to: &mut [f32], weights: &[f32], rows: &[(u32, f32)]) {
    let columns = to.len();
    let row = |(row, _): (u32, f32)| &weights[row as usize * columns..][..columns];
    let (fours, rest) = rows.as_chunks::<4>();
    for &four in fours {
        let ([a, b, c, d], f) = (four.map(row), four.map(|(_, value)| value));
        for (at, to) in to.iter_mut().enumerate() {
            *to += (f[0] * a[at] + f[1] * b[at]) + (f[2] * c[at] + f[3] * d[at]);
        }
    }
    for &one in rest {
        add_scaled(to, one.1, row(one));
    }
}

/// What decayed use (the first fields of `dense`) gives to `units [hidden]`.
pub fn uses(sizes: &Sizes, weights: &[f32], dense: &[f32], units: &mut [f32]) {
    let start = sizes.parts()[1];
    units.fill(0.0);
    let rows = weights[start..].chunks_exact(sizes.hidden.max(1));
    for (row, &value) in rows.zip(&dense[..USES * sizes.experts]) {
        add_scaled(units, value, row);
    }
}

/// The log-odds of each expert. `base [hidden]` is the answer of [`uses`];
/// `sums [hidden + experts]` gets the rectified hidden units and the answer
/// `[experts]` behind them.
pub fn forward(sizes: &Sizes, weights: &[f32], input: &Input, base: &[f32], sums: &mut [f32]) {
    let [_, dense, straight, out, _] = sizes.parts();
    let (hidden, width, experts) = (sizes.hidden, sizes.width(), sizes.experts.max(1));
    sums[..hidden].copy_from_slice(base);
    sums[hidden..].copy_from_slice(&weights[out - sizes.experts..out]);
    for &(row, value) in &input.sparse {
        let start = row as usize * width;
        add_scaled(sums, value, &weights[start..start + width]);
    }
    let (units, answer) = sums.split_at_mut(hidden);
    let rest = USES * experts;
    let rows = weights[dense + rest * hidden..straight].chunks_exact(hidden.max(1));
    for (row, &value) in rows.zip(&input.dense[rest..]).filter(|(_, value)| **value != 0.0) {
        add_scaled(units, value, row);
    }
    let direct = weights[straight..out].chunks_exact(experts);
    for (weights, values) in direct.zip(input.dense.chunks_exact(experts)) {
        for ((answer, weight), value) in answer.iter_mut().zip(weights).zip(values) {
            *answer += weight * value;
        }
    }
    for (unit, row) in units.iter_mut().zip(weights[out..].chunks_exact(experts)) {
        *unit = unit.max(0.0);
        if *unit > 0.0 {
            add_scaled(answer, *unit, row);
        }
    }
}
