//! The numerical contract holds on every instruction set of this machine: the
//! `Cpu` backend's answers have the bits of `contract`'s plain Rust, for all
//! formats, awkward sizes and adversarial values, whatever the number of
//! tokens and threads. Two NaNs count as equal.

use pregate_kernels::testing::{Inputs, Random, Weights, experts_in_parts, inputs, weights};
use pregate_kernels::{
    Backend, Choice, Cpu, CpuOptions, ExpertWeights, Format, GatedActivation, Isa, Linear, Matrix,
    Routes, contract,
};
use proptest::prelude::*;
use proptest::sample::select;
use proptest::test_runner::{Config, TestCaseError, TestRunner};
use std::io::Write;
use std::sync::OnceLock;

/// Every instruction set on one, two and three threads.
fn backends() -> &'static [Cpu] {
    static BACKENDS: OnceLock<Vec<Cpu>> = OnceLock::new();
    BACKENDS.get_or_init(|| {
        let isas = Isa::available();
        let names: Vec<&str> = isas.iter().map(|isa| isa.name()).collect();
        // Past the test harness's capture: a log must show what was compared.
        let line = format!("contract compared with: {}\n", names.join(", "));
        std::io::stderr().write_all(line.as_bytes()).unwrap();
        assert!(isas.contains(&Isa::Scalar));
        isas.iter()
            .flat_map(|isa| (1..=3).map(|threads| (*isa, threads)))
            .map(|(isa, threads)| {
                Cpu::new(CpuOptions { threads: Some(threads), isa: Some(isa) }).unwrap()
            })
            .collect()
    })
}

fn same_bits(cpu: &Cpu, expected: &[f32], found: &[f32]) -> Result<(), TestCaseError> {
    for (i, (expected, found)) in expected.iter().zip(found).enumerate() {
        let same = expected.to_bits() == found.to_bits() || expected.is_nan() && found.is_nan();
        prop_assert!(
            same,
            "{}: element {} is {:e}, the contract says {:e}",
            cpu.describe(),
            i,
            found,
            expected
        );
    }
    Ok(())
}

/// Runs `test` on `cases` values for each format.
fn for_each_format<S: Strategy>(
    cases: u32,
    strategy: impl Fn(Format) -> S,
    test: impl Fn(Format, S::Value) -> Result<(), TestCaseError>,
) {
    for format in Format::ALL {
        let config = Config { cases, failure_persistence: None, ..Config::default() };
        let result = TestRunner::new_deterministic_with(config)
            .run(&strategy(format), |value| test(format, value));
        if let Err(error) = result {
            panic!("{format}: {error}");
        }
    }
}

/// The same cases in every run, on every machine.
trait Deterministic {
    fn new_deterministic_with(config: Config) -> TestRunner;
}

impl Deterministic for TestRunner {
    fn new_deterministic_with(config: Config) -> TestRunner {
        use proptest::test_runner::{RngAlgorithm, TestRng};
        TestRunner::new_with_rng(config, TestRng::deterministic_rng(RngAlgorithm::ChaCha))
    }
}

/// Kinds of values, usual ones as often as all others together.
fn weight_kinds() -> impl Strategy<Value = Weights> {
    prop_oneof![Just(Weights::Usual), select(Weights::ALL.as_slice())]
}

fn input_kinds() -> impl Strategy<Value = Inputs> {
    prop_oneof![Just(Inputs::Normal), select(Inputs::ALL.as_slice())]
}

#[test]
fn products_have_the_bits_of_the_contract() {
    let strategy = |format: Format| {
        let blocks: &[usize] = match format.block_len() {
            // Around the 64 float lanes and their tail.
            1 => &[1, 3, 8, 33, 63, 64, 65, 127, 191, 200, 513],
            // Around the eight lanes of blocks.
            _ => &[1, 2, 3, 7, 8, 9, 15, 16, 17, 33],
        };
        let rows = [1usize, 2, 15, 16, 17, 33];
        let tokens = [1usize, 2, 3, 5, 15, 16, 17, 33, 64];
        let sizes = (select(blocks), select(rows.to_vec()), select(tokens.to_vec()));
        (sizes, weight_kinds(), input_kinds(), any::<bool>(), any::<u64>())
    };
    for_each_format(20, strategy, |format, (sizes, kind, input, biased, seed)| {
        let ((blocks, rows, tokens), mut random) = (sizes, Random::new(seed));
        let cols = blocks * format.block_len();
        let bytes = weights(format, kind, rows, cols, &mut random);
        let x = inputs(input, tokens * cols, &mut random);
        let bias = inputs(Inputs::Normal, rows, &mut random);
        let bias = biased.then_some(bias.as_slice());

        let mut expected = Vec::with_capacity(tokens * rows);
        for x in x.chunks_exact(cols) {
            for (r, row) in bytes.chunks_exact(bytes.len() / rows).enumerate() {
                let y = contract::dot(format, row, x);
                expected.push(bias.map_or(y, |bias| y + bias[r]));
            }
        }
        let weight = Matrix::new(format, rows, cols, &bytes).unwrap();
        for cpu in backends() {
            let mut found = vec![f32::MAX; tokens * rows];
            cpu.linear(&x, tokens, &mut [Linear { weight, bias, out: &mut found }]);
            same_bits(cpu, &expected, &found)?;
        }
        Ok(())
    });
}

/// Experts `0..EXPERTS` of a layer.
const EXPERTS: u32 = 4;

#[derive(Clone, Debug)]
struct Layer {
    gate_up: Format,
    down: Format,
    hidden: usize,
    inner: usize,
    /// Per expert: gate, up, down.
    bytes: Vec<[Vec<u8>; 3]>,
    /// Per expert: gate, up, down.
    biases: Option<Vec<[Vec<f32>; 3]>>,
}

impl Layer {
    fn expert(&self, expert: u32) -> ExpertWeights<'_> {
        let [gate, up, down] = &self.bytes[expert as usize];
        let matrix = |format, rows, cols, bytes| Matrix::new(format, rows, cols, bytes).unwrap();
        let bias = |i: usize| self.biases.as_ref().map(|all| all[expert as usize][i].as_slice());
        ExpertWeights {
            gate: matrix(self.gate_up, self.inner, self.hidden, gate),
            up: matrix(self.gate_up, self.inner, self.hidden, up),
            down: matrix(self.down, self.hidden, self.inner, down),
            gate_bias: bias(0),
            up_bias: bias(1),
            down_bias: bias(2),
        }
    }
}

#[test]
fn whole_experts_have_the_bits_of_the_contract() {
    let strategy = |gate_up: Format| {
        let counts = [1usize, 2, 3, 7, 9];
        let sizes = (select(counts.to_vec()), select(counts.to_vec()), 1usize..=32);
        let down = select(Format::ALL.as_slice());
        let tokens = select(vec![1usize, 2, 5, 17, 64]);
        let kinds = (weight_kinds(), input_kinds());
        (Just(gate_up), down, sizes, tokens, kinds, any::<(bool, bool)>(), any::<u64>())
    };
    for_each_format(8, strategy, |_, case| {
        let (gate_up, down, sizes, tokens, kinds, (biased, clamped), seed) = case;
        let mut random = Random::new(seed);
        // Whole blocks where a format asks for them, else awkward numbers.
        let size = |format: Format, blocks: usize| match format.block_len() {
            1 => 8 * blocks + sizes.2,
            len => len * blocks,
        };
        let (mut hidden, mut inner) = (size(gate_up, sizes.0), size(down, sizes.1));
        // The contract's plain form is slow: at most a few million products.
        while 3 * hidden * inner * tokens > 12_000_000 && hidden.max(inner) > 256 {
            let larger = if hidden > inner { &mut hidden } else { &mut inner };
            *larger = (*larger / 2).next_multiple_of(256);
            if hidden.max(inner) == 256 {
                break;
            }
        }
        let shapes = [(gate_up, inner, hidden), (gate_up, inner, hidden), (down, hidden, inner)];
        let layer = Layer {
            gate_up,
            down,
            hidden,
            inner,
            bytes: (0..EXPERTS)
                .map(|_| {
                    shapes.map(|(format, rows, cols)| {
                        weights(format, kinds.0, rows, cols, &mut random)
                    })
                })
                .collect(),
            biases: biased.then(|| {
                (0..EXPERTS)
                    .map(|_| shapes.map(|(_, rows, _)| inputs(Inputs::Normal, rows, &mut random)))
                    .collect()
            }),
        };
        let activation = match clamped {
            true => GatedActivation::ClampedSwiglu { alpha: 1.702, limit: 7.0 },
            false => GatedActivation::Silu,
        };
        let x = inputs(kinds.1, tokens * hidden, &mut random);
        let mut routes = Routes::new();
        for _ in 0..tokens {
            // Lists of zero to three experts in no particular order.
            let mut left: Vec<u32> = (0..EXPERTS).collect();
            let list: Vec<Choice> = (0..random.below(4).min(if tokens > 17 { 1 } else { 3 }))
                .map(|_| Choice {
                    expert: left.swap_remove(random.below(left.len())),
                    weight: random.unit(),
                })
                .collect();
            routes.push(&list);
        }

        let mut expected = vec![0.0; tokens * hidden];
        for (t, expected) in expected.chunks_exact_mut(hidden).enumerate() {
            let x = &x[t * hidden..(t + 1) * hidden];
            let answer =
                |c: &Choice| (c.weight, contract::expert(x, layer.expert(c.expert), activation));
            let answers: Vec<(f32, Vec<f32>)> = routes.of(t).iter().map(answer).collect();
            contract::combine(&answers, expected);
        }
        for cpu in backends() {
            let weights = |expert| layer.expert(expert);
            let parts = 1 + random.below(3);
            let found = experts_in_parts(cpu, &x, &routes, &weights, activation, parts);
            same_bits(cpu, &expected, &found)?;
        }
        Ok(())
    });
}
