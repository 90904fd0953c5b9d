//! A layer's network at work: the answer of [`super::network::forward`], but
//! for rounding. The way to the hidden units stays in eight bits, as a file has
//! it, since a model's networks are larger than the caches of a core, and is
//! added up in whole numbers; what goes on learning is kept as floats.

use super::input::{Input, TOKEN_FIELD, USES};
use super::matrix::Matrix;
use super::network::{Sizes, add_rows, add_scaled};
use super::whole::{Times, Whole};
use crate::forecast::fast;
use std::ops::Range;

/// One layer's weights, and what they say of the running token.
pub struct AtWork {
    sizes: Sizes,
    /// To the hidden units: sparse rows, then `[FIELDS * experts]`.
    units: Whole,
    /// What decayed use gives to the units, and the same with what the id
    /// gives.
    bases: [Vec<i32>; 2],
    sums: Vec<i32>,
    /// `[rows][experts]`, straight from sparse rows to the answer; empty where
    /// the widest models have no room for it.
    direct: Vec<f32>,
    /// `[FIELDS + 1][experts]`, the bias last.
    straight: Vec<f32>,
    /// `[hidden][experts]`.
    out: Vec<f32>,
    /// Scratch: rows and what they count.
    times: Vec<Times>,
    rows: Vec<(u32, f32)>,
}

impl AtWork {
    pub fn new(sizes: Sizes, [units, direct, dense, straight, out]: &[Matrix; 5]) -> Self {
        let units = Whole::new(sizes.hidden, &[units, dense]);
        Self {
            bases: [units.zero(), units.zero()],
            sums: units.zero(),
            units,
            direct: direct.floats(),
            straight: straight.floats(),
            out: out.floats(),
            times: Vec::new(),
            rows: Vec::new(),
            sizes,
        }
    }

    /// Puts `fields` of `dense` on the list of rows.
    fn list(&mut self, dense: &[f32], fields: Range<usize>) {
        let range = fields.start * self.sizes.experts..fields.end * self.sizes.experts;
        let first = (self.sizes.rows.count() + range.start) as u32;
        for (row, &value) in (first..).zip(&dense[range]).filter(|(_, value)| **value != 0.0) {
            self.times.push(self.units.times(row, value));
        }
    }

    /// What decayed use gives to the units is good until the layer runs.
    pub fn uses(&mut self, input: &Input) {
        self.times.clear();
        self.list(&input.dense, 0..USES);
        self.bases[0].fill(0);
        self.units.add(&mut self.bases[0], &self.times);
    }

    /// What the token's id gives to them is good until then, or until another
    /// token begins.
    pub fn add_token(&mut self, input: &Input) {
        self.times.clear();
        self.list(&input.dense, TOKEN_FIELD..TOKEN_FIELD + 1);
        let [uses, both] = &mut self.bases;
        both.copy_from_slice(uses);
        self.units.add(both, &self.times);
    }

    /// After [`Self::uses`] and, where the id is known (`has_token`),
    /// [`Self::add_token`]. `sums [hidden + experts]` gets the rectified units
    /// and the log-odds of each expert behind them.
    pub fn forward(&mut self, input: &Input, has_token: bool, sums: &mut [f32]) {
        let experts = self.sizes.experts;
        let (units, answer) = sums.split_at_mut(self.sizes.hidden);
        self.times.clear();
        let sparse = input.sparse.iter().map(|&(row, value)| self.units.times(row, value));
        self.times.extend(sparse);
        self.list(&input.dense, USES..TOKEN_FIELD);
        self.sums.copy_from_slice(&self.bases[usize::from(has_token)]);
        self.units.add(&mut self.sums, &self.times);
        self.units.floats(&self.sums, units);
        answer.copy_from_slice(&self.straight[self.straight.len() - experts..]);
        if self.sizes.is_direct {
            add_rows(answer, &self.direct, &input.sparse);
        }
        let fields = self.straight.chunks_exact(experts.max(1));
        for (weights, values) in fields.zip(input.dense.chunks_exact(experts.max(1))) {
            for ((answer, weight), value) in answer.iter_mut().zip(weights).zip(values) {
                *answer += weight * value;
            }
        }
        // Half of the units are off, and which ones no processor foresees.
        self.rows.resize(units.len(), (0, 0.0));
        let mut on = 0;
        for (row, unit) in (0..).zip(units) {
            *unit = unit.max(0.0);
            self.rows[on] = (row, *unit);
            on += usize::from(*unit > 0.0);
        }
        add_rows(answer, &self.out, &self.rows[..on]);
    }

    /// One step downhill at running time, of the weights that lead straight to
    /// the answer: what a model does now counts more than what a trace said.
    /// `sums` holds the answer of [`Self::forward`] to `input`; after this, its
    /// errors. `rates`: of rows of experts, and of what every question shares.
    pub fn adapt(&mut self, input: &Input, sums: &mut [f32], used: &[u32], rates: (f32, f32)) {
        let experts = self.sizes.experts;
        let (units, errors) = sums.split_at_mut(self.sizes.hidden);
        errors.iter_mut().for_each(|odds| *odds = fast::sigmoid(*odds));
        for &expert in used {
            errors[expert as usize] -= 1.0;
        }
        for &(row, value) in input.sparse.iter().filter(|_| self.sizes.is_direct) {
            let row = &mut self.direct[row as usize * experts..][..experts];
            add_scaled(row, -rates.0 * value, errors);
        }
        let bias = self.straight.len() - experts;
        add_scaled(&mut self.straight[bias..], -rates.0, errors);
        let fields = self.straight[..bias].chunks_exact_mut(experts.max(1));
        for (weights, values) in fields.zip(input.dense.chunks_exact(experts.max(1))) {
            for ((weight, value), error) in weights.iter_mut().zip(values).zip(&*errors) {
                *weight -= rates.1 * value * error;
            }
        }
        for (unit, row) in units.iter().zip(self.out.chunks_exact_mut(experts.max(1))) {
            if *unit > 0.0 {
                add_scaled(row, -rates.1 * unit, errors);
            }
        }
    }

    /// Bytes that it holds.
    pub fn memory_bytes(&self) -> usize {
        let floats = self.direct.len() + self.straight.len() + self.out.len();
        4 * (floats + 3 * self.sums.len()) + self.units.memory_bytes()
    }
}
