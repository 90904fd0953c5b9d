//! Speed of the CPU kernels, without a model.
//!
//! `cargo run --release -p pregate-kernels --example speed -- [threads] [format...]`
//! prints, per format, GB/s of a matrix-vector product whose weights come from
//! memory (beside a plain read of the same bytes in the same minute) and
//! GMAC/s of a matrix product with 64 and 512 tokens.

use pregate_kernels::testing::{self, Inputs, Random, Weights};
use pregate_kernels::{Backend, Cpu, CpuOptions, Format, Linear, Matrix};
use std::time::Instant;

const GEMV_BYTES: usize = 384 << 20;

fn best(repeats: usize, mut run: impl FnMut()) -> f64 {
    (0..repeats)
        .map(|_| {
            let start = Instant::now();
            run();
            start.elapsed().as_secs_f64()
        })
        .fold(f64::INFINITY, f64::min)
}

fn read_gb_per_s(cpu: &Cpu, bytes: &[u8]) -> f64 {
    let parts = 64;
    let each = bytes.len() / parts;
    let seconds = best(5, || {
        cpu.for_each(parts, &|i| {
            let (words, _) = bytes[i * each..(i + 1) * each].as_chunks::<8>();
            let mut sums = [0u64; 8];
            for words in words.chunks_exact(8) {
                for (sum, word) in sums.iter_mut().zip(words) {
                    *sum ^= u64::from_ne_bytes(*word);
                }
            }
            std::hint::black_box(sums);
        });
    });
    bytes.len() as f64 / seconds / 1e9
}

fn main() {
    let mut args = std::env::args().skip(1);
    let threads = args.next().and_then(|a| a.parse().ok());
    let wanted: Vec<String> = args.collect();
    let cpu = Cpu::new(CpuOptions { threads, isa: None }).expect("threads");
    cpu.pin_caller();
    println!("{}", cpu.describe());
    let mut random = Random::new(1);
    let cols = 2048;
    for format in Format::ALL {
        if !wanted.is_empty() && !wanted.iter().any(|w| w == format.name()) {
            continue;
        }
        let row_bytes = format.row_bytes(cols).expect("whole blocks");
        let rows = GEMV_BYTES / row_bytes;
        let few = testing::weights(format, Weights::Usual, 64, cols, &mut random);
        let bytes: Vec<u8> = few.iter().copied().cycle().take(rows * row_bytes).collect();
        let matrix = Matrix::new(format, rows, cols, &bytes).expect("shape");
        let x = testing::inputs(Inputs::Normal, 512 * cols, &mut random);
        let mut out = vec![0.0; rows];
        let read = read_gb_per_s(&cpu, &bytes);
        let seconds = best(5, || {
            cpu.linear(&x[..cols], 1, &mut [Linear { weight: matrix, bias: None, out: &mut out }]);
        });
        let decode = bytes.len() as f64 / seconds / 1e9;
        // Small enough for the last-level cache: arithmetic only.
        let rows = 2048;
        let matrix = Matrix::new(format, rows, cols, &bytes).expect("shape");
        let mut out = vec![0.0; 512 * rows];
        let mut prefill = [0.0; 2];
        for (figure, tokens) in prefill.iter_mut().zip([64, 512]) {
            let seconds = best(5, || {
                let out = &mut out[..tokens * rows];
                let jobs = &mut [Linear { weight: matrix, bias: None, out }];
                cpu.linear(&x[..tokens * cols], tokens, jobs);
            });
            *figure = (tokens * rows * cols) as f64 / seconds / 1e9;
        }
        println!(
            "{:8} read {read:6.2} GB/s  decode {decode:6.2} GB/s ({:3.0} %)  prefill 64: {:6.1}  512: {:6.1} GMAC/s",
            format.name(),
            100.0 * decode / read,
            prefill[0],
            prefill[1]
        );
    }
}
