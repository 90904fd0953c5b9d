//! Rotary position embeddings: frequencies once per session, cos and sin
//! once per chunk.

use super::description::{RopeDescription, RopePairs, RopeScaling};
use std::f64::consts::PI;

/// A rotary embedding for a session of a known context limit.
#[derive(Clone, Debug)]
pub struct Rope {
    pairs: RopePairs,
    /// Radians per position, `[dim / 2]`.
    frequencies: Vec<f64>,
    /// Multiplies cos and sin.
    scale: f64,
}

impl Rope {
    /// LongRoPE picks its list by the session's context limit, not by the
    /// position: all keys of a session are rotated alike, so tokens do not
    /// depend on how a prompt was cut into chunks.
    pub fn new(description: &RopeDescription, context: usize) -> Self {
        let RopeDescription { dim, pairs, base, ref scaling } = *description;
        let mut frequencies: Vec<f64> =
            (0..dim / 2).map(|i| base.powf(-(2.0 * i as f64) / dim as f64)).collect();
        let mut scale = 1.0;
        match scaling {
            RopeScaling::None => {}
            RopeScaling::Linear { factor } => {
                frequencies.iter_mut().for_each(|frequency| *frequency /= factor);
            }
            RopeScaling::Yarn {
                factor,
                original_context,
                beta_fast,
                beta_slow,
                truncate,
                attention_factor,
            } => {
                scale = *attention_factor;
                // The dimension whose wavelength fits `rotations` times into
                // the original context.
                let dimension = |rotations: f64| {
                    dim as f64 * (original_context / (rotations * 2.0 * PI)).ln()
                        / (2.0 * base.ln())
                };
                let (mut low, mut high) = (dimension(*beta_fast), dimension(*beta_slow));
                if *truncate {
                    (low, high) = (low.floor(), high.ceil());
                }
                let (low, mut high) = (low.max(0.0), high.min(dim as f64 - 1.0));
                if low == high {
                    high += 0.001;
                }
                for (i, frequency) in frequencies.iter_mut().enumerate() {
                    let interpolated = ((i as f64 - low) / (high - low)).clamp(0.0, 1.0);
                    *frequency =
                        *frequency / factor * interpolated + *frequency * (1.0 - interpolated);
                }
            }
            RopeScaling::Long {
                original_context,
                short_factors,
                long_factors,
                short_scale,
                long_scale,
            } => {
                let long = context > *original_context;
                let factors = if long { long_factors } else { short_factors };
                scale = if long { *long_scale } else { *short_scale };
                frequencies.iter_mut().zip(factors).for_each(|(frequency, f)| *frequency /= f);
            }
            RopeScaling::Factors(factors) => {
                frequencies.iter_mut().zip(factors).for_each(|(frequency, f)| *frequency /= f);
            }
        }
        Self { pairs, frequencies, scale }
    }

    /// Fills `table` with `[cos, sin]` per position and pair for `count`
    /// positions from `first`.
    pub fn fill(&self, first: usize, count: usize, table: &mut Vec<[f32; 2]>) {
        table.clear();
        for position in first..first + count {
            table.extend(self.frequencies.iter().map(|frequency| {
                let (sin, cos) = (position as f64 * frequency).sin_cos();
                [(cos * self.scale) as f32, (sin * self.scale) as f32]
            }));
        }
    }

    /// Pairs per position in a filled table.
    pub fn pairs(&self) -> RopePairs {
        self.pairs
    }

    pub fn half(&self) -> usize {
        self.frequencies.len()
    }

    /// Rotates the leading elements of one head by one position's row of the
    /// table.
    pub fn rotate(&self, row: &[[f32; 2]], head: &mut [f32]) {
        let half = row.len();
        match self.pairs {
            RopePairs::Halves => {
                let (a, b) = head[..2 * half].split_at_mut(half);
                for ((a, b), [cos, sin]) in a.iter_mut().zip(b).zip(row) {
                    (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
                }
            }
            RopePairs::Neighbours => {
                for (pair, [cos, sin]) in head[..2 * half].chunks_exact_mut(2).zip(row) {
                    let (a, b) = (pair[0], pair[1]);
                    pair[0] = a * cos - b * sin;
                    pair[1] = b * cos + a * sin;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rope(pairs: RopePairs, scaling: RopeScaling) -> Rope {
        Rope::new(&RopeDescription { dim: 4, pairs, base: 100.0, scaling }, 64)
    }

    #[test]
    fn dot_products_depend_on_distance_only() {
        for pairs in [RopePairs::Halves, RopePairs::Neighbours] {
            let rope = rope(pairs, RopeScaling::None);
            let rotated = |values: [f32; 4], position| {
                let mut table = Vec::new();
                rope.fill(position, 1, &mut table);
                let mut head = values;
                rope.rotate(&table, &mut head);
                head
            };
            let dot = |a: [f32; 4], b: [f32; 4]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f32>();
            let (q, k) = ([1.0, 2.0, -0.5, 0.25], [0.5, -1.0, 3.0, 1.0]);
            let near = dot(rotated(q, 5), rotated(k, 3));
            let far = dot(rotated(q, 50), rotated(k, 48));
            assert!((near - far).abs() < 1e-4, "{pairs:?}: {near} {far}");
            assert_eq!(rotated(q, 0), q);
        }
    }

    #[test]
    fn long_rope_is_chosen_by_the_context() {
        let description = RopeDescription {
            dim: 2,
            pairs: RopePairs::Halves,
            base: 100.0,
            scaling: RopeScaling::Long {
                original_context: 16,
                short_factors: vec![1.0],
                long_factors: vec![4.0],
                short_scale: 1.0,
                long_scale: 1.5,
            },
        };
        assert_eq!(Rope::new(&description, 16).frequencies, [1.0]);
        assert_eq!(Rope::new(&description, 17).frequencies, [0.25]);
        assert_eq!(Rope::new(&description, 17).scale, 1.5);
    }
}
