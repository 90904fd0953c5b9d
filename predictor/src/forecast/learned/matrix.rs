//! Weights in eight bits, a scale per row.

/// `[rows, columns]`; an element is its row's scale times its value.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct Matrix {
    pub columns: usize,
    /// `[rows]`, finite.
    pub scales: Vec<f32>,
    /// `[rows][columns]`.
    pub values: Vec<i8>,
}

impl Matrix {
    /// The nearest to `weights [rows][columns]`, within half of a row's
    /// largest magnitude / 127. What is not finite becomes zero.
    pub fn nearest(columns: usize, weights: &[f32]) -> Self {
        let mut matrix = Self { columns, ..Self::default() };
        if columns == 0 {
            return matrix;
        }
        for row in weights.chunks_exact(columns) {
            let finite = row.iter().map(|&weight| if weight.is_finite() { weight } else { 0.0 });
            let scale = finite.clone().fold(0.0f32, |most, weight| most.max(weight.abs())) / 127.0;
            let inverse = if scale > 0.0 { 1.0 / scale } else { 0.0 };
            matrix.scales.push(scale);
            matrix.values.extend(finite.map(|weight| (weight * inverse).round() as i8));
        }
        matrix
    }

    /// The bytes of a matrix of this size in a file; `None` beyond `usize`.
    pub fn bytes(rows: usize, columns: usize) -> Option<usize> {
        rows.checked_mul(columns.checked_add(4)?)
    }

    /// Appends scales, then values.
    pub fn write(&self, to: &mut Vec<u8>) {
        self.scales.iter().for_each(|scale| to.extend_from_slice(&scale.to_le_bytes()));
        to.extend(self.values.iter().map(|value| value.to_le_bytes()[0]));
    }

    /// Row `row` as floats.
    pub fn row(&self, row: usize) -> impl Iterator<Item = f32> + '_ {
        let values = &self.values[row * self.columns..(row + 1) * self.columns];
        values.iter().map(move |&value| self.scales[row] * f32::from(value))
    }

    /// All of it, `[rows][columns]`.
    pub fn floats(&self) -> Vec<f32> {
        (0..self.scales.len()).flat_map(|row| self.row(row)).collect()
    }

    /// `to += factor * row`.
    pub fn add_row(&self, row: usize, factor: f32, to: &mut [f32]) {
        let values = &self.values[row * self.columns..(row + 1) * self.columns];
        let factor = factor * self.scales[row];
        for (to, &value) in to.iter_mut().zip(values) {
            *to += factor * f32::from(value);
        }
    }
}
