//! Sizes and formats of experts.

use crate::exit::Failure;
use pregate_kernels::{ExpertWeights, Format, Matrix};
use serde::{Serialize, Serializer};

/// One expert's matrices: gate and up `[inner, hidden]`, down `[hidden,
/// inner]`.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Shape {
    /// Whose experts have these sizes.
    pub of: &'static str,
    pub hidden: usize,
    pub inner: usize,
    #[serde(serialize_with = "name")]
    pub gate_up: Format,
    #[serde(serialize_with = "name")]
    pub down: Format,
}

fn name<S: Serializer>(format: &Format, to: S) -> Result<S::Ok, S::Error> {
    to.serialize_str(format.name())
}

/// Sizes of published models, from their configurations.
const SIZES: [(&str, usize, usize); 2] = [("Qwen3-30B-A3B", 2048, 768), ("OLMoE", 2048, 1024)];
/// Of gate and up, of down. Q4_K_M files have Q6_K for half of the downs, Q4_K
/// for the others.
const FORMATS: [(Format, Format); 5] = [
    (Format::Q4K, Format::Q6K),
    (Format::Q4K, Format::Q4K),
    (Format::Q4_0, Format::Q4_0),
    (Format::Q8_0, Format::Q8_0),
    (Format::Mxfp4, Format::Mxfp4),
];

/// What [`crate::commands::bench`] measures.
pub fn shapes() -> Vec<Shape> {
    let of_size = |(of, hidden, inner)| {
        FORMATS.map(|(gate_up, down)| Shape { of, hidden, inner, gate_up, down })
    };
    SIZES.into_iter().flat_map(of_size).collect()
}

/// What stands for all of them where time is short.
pub const USUAL: Shape = Shape {
    of: SIZES[0].0,
    hidden: SIZES[0].1,
    inner: SIZES[0].2,
    gate_up: FORMATS[0].0,
    down: FORMATS[0].1,
};

impl Shape {
    /// Weight bytes of gate or up, and of down.
    fn matrix_bytes(&self) -> Option<(usize, usize)> {
        let gate = self.gate_up.row_bytes(self.hidden)?.checked_mul(self.inner)?;
        let down = self.down.row_bytes(self.inner)?.checked_mul(self.hidden)?;
        Some((gate, down))
    }

    /// Weight bytes of an expert; 0 for sizes that are not whole blocks.
    pub fn bytes(&self) -> usize {
        self.matrix_bytes().map_or(0, |(gate, down)| 2 * gate + down)
    }

    /// The matrices of an expert that starts at `at` of `pool`.
    pub fn weights<'a>(&self, pool: &'a [u8], at: usize) -> Result<ExpertWeights<'a>, Failure> {
        let bad = |error| Failure::Internal(format!("{self:?}: {error}"));
        let (gate_bytes, _) =
            self.matrix_bytes().ok_or_else(|| bad("not whole blocks".to_string()))?;
        let matrix = |format, rows, cols, at: usize| {
            Matrix::new(format, rows, cols, &pool[at..]).map_err(|error| bad(error.to_string()))
        };
        let Self { hidden, inner, gate_up, down, .. } = *self;
        Ok(ExpertWeights {
            gate: matrix(gate_up, inner, hidden, at)?,
            up: matrix(gate_up, inner, hidden, at + gate_bytes)?,
            down: matrix(down, hidden, inner, at + 2 * gate_bytes)?,
            gate_bias: None,
            up_bias: None,
            down_bias: None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_those_of_the_models() {
        // 2 * 768 rows of 8 blocks of 144 bytes, 2048 rows of 3 blocks of 210.
        assert_eq!(USUAL.bytes(), 2 * 768 * 8 * 144 + 2048 * 3 * 210);
        let all = shapes();
        assert_eq!(all.len(), 10);
        assert!(all.iter().all(|shape| shape.bytes() > 2 << 20), "{all:?}");
        let olmoe = all.iter().find(|shape| shape.of == "OLMoE").unwrap();
        assert_eq!((olmoe.hidden, olmoe.inner), (2048, 1024));
    }
}
