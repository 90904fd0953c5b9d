//! What quantised activations cost: one expert's output on the `Cpu` backend
//! against the `Reference` (weights dequantised, activations f32).
//!
//! An expert of 512 x 768 with random weights of deviation 0.03, four tokens,
//! four experts; the worst `|difference|` over the root mean square of the
//! expert's output. "Normal": inputs with deviation 1. "Outliers": one in 64
//! is a hundred times larger, which costs its whole group of 32 or 256 the
//! resolution, as in real hidden states. The contract fixes every bit of the
//! `Cpu` side, so these are the figures of every machine:
//!
//! | format | normal | outliers |
//! |---|---|---|
//! | F32 | 3.9e-6 | 5.3e-6 |
//! | F16 | 4.8e-6 | 5.8e-6 |
//! | BF16 | 4.7e-6 | 4.1e-6 |
//! | Q8_0 | 5.7e-2 | 1.1e-1 |
//! | Q4_0 | 4.9e-2 | 1.2e-1 |
//! | Q4_1 | 4.6e-2 | 1.0e-1 |
//! | Q5_0 | 4.9e-2 | 1.0e-1 |
//! | Q5_1 | 5.4e-2 | 1.0e-1 |
//! | Q2_K | 9.3e-2 | 2.7e-1 |
//! | Q3_K | 8.7e-2 | 2.3e-1 |
//! | Q4_K | 1.2e-1 | 2.8e-1 |
//! | Q5_K | 8.8e-2 | 2.8e-1 |
//! | Q6_K | 1.2e-1 | 3.3e-1 |
//! | IQ4_NL | 6.1e-2 | 1.2e-1 |
//! | IQ4_XS | 9.5e-2 | 2.4e-1 |
//! | MXFP4 | 5.1e-2 | 1.3e-1 |
//!
//! F32, F16 and BF16 differ by the order of the sums only.

use pregate_kernels::testing::{Inputs, Random, Weights, inputs, weights};
use pregate_kernels::{
    Backend, Cpu, CpuOptions, ExpertWeights, Format, GatedActivation, Matrix, Reference,
};

const HIDDEN: usize = 512;
const INNER: usize = 768;
const TOKENS: usize = 4;
const SEEDS: u64 = 4;

/// The largest `|difference| / deviation of the output` over all seeds.
fn worst_error(cpu: &Cpu, format: Format, kind: Inputs) -> f64 {
    let mut worst = 0.0f64;
    for seed in 0..SEEDS {
        let mut random = Random::new(seed);
        let mut bytes = |rows, cols| weights(format, Weights::Usual, rows, cols, &mut random);
        let (gate, up) = (bytes(INNER, HIDDEN), bytes(INNER, HIDDEN));
        let down = bytes(HIDDEN, INNER);
        let weights = ExpertWeights {
            gate: Matrix::new(format, INNER, HIDDEN, &gate).unwrap(),
            up: Matrix::new(format, INNER, HIDDEN, &up).unwrap(),
            down: Matrix::new(format, HIDDEN, INNER, &down).unwrap(),
            gate_bias: None,
            up_bias: None,
            down_bias: None,
        };
        let x = inputs(kind, TOKENS * HIDDEN, &mut random);
        let run = |backend: &dyn Backend| {
            let mut out = vec![0.0; TOKENS * HIDDEN];
            backend.feed_forward(&x, TOKENS, weights, GatedActivation::Silu, &mut out);
            out
        };
        let (exact, found) = (run(&Reference), run(cpu));
        let mean_square =
            exact.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>() / exact.len() as f64;
        for (exact, found) in exact.iter().zip(&found) {
            let error = (f64::from(*exact) - f64::from(*found)).abs() / mean_square.sqrt();
            worst = worst.max(error);
        }
    }
    worst
}

/// Bounds for normal inputs and with outliers: the measured values and about
/// a third more.
const fn bounds(format: Format) -> (f64, f64) {
    match format {
        Format::F32 | Format::F16 | Format::Bf16 => (7e-6, 8e-6),
        Format::Q8_0 => (0.075, 0.15),
        Format::Q4_0 => (0.065, 0.16),
        Format::Q4_1 => (0.06, 0.14),
        Format::Q5_0 => (0.065, 0.14),
        Format::Q5_1 => (0.07, 0.14),
        Format::Q2K => (0.125, 0.36),
        Format::Q3K => (0.115, 0.31),
        Format::Q4K => (0.16, 0.37),
        Format::Q5K => (0.12, 0.37),
        Format::Q6K => (0.16, 0.44),
        Format::Iq4Nl => (0.08, 0.16),
        Format::Iq4Xs => (0.125, 0.32),
        Format::Mxfp4 => (0.07, 0.17),
    }
}

#[test]
fn one_expert_stays_within_the_bound_of_its_format() {
    let cpu = Cpu::new(CpuOptions { threads: Some(2), isa: None }).unwrap();
    for format in Format::ALL {
        let normal = worst_error(&cpu, format, Inputs::Normal);
        let outliers = worst_error(&cpu, format, Inputs::Outliers);
        println!("//! | {format} | {normal:.1e} | {outliers:.1e} |");
        let bounds = bounds(format);
        assert!(normal < bounds.0, "{format}: {normal:.2e}, bound {:.2e}", bounds.0);
        assert!(outliers < bounds.1, "{format}, outliers: {outliers:.2e}, bound {:.2e}", bounds.1);
        // A difference of nothing would mean that nothing was compared.
        assert!(normal > 1e-8, "{format}: no difference at all");
    }
}
