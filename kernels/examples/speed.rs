//! Speed of the CPU kernels, without a model.
//!
//! `cargo run --release -p pregate-kernels --example speed -- [threads] [format...]`
//! prints, per format, GB/s of a matrix-vector product whose weights come from
//! memory (beside a plain read of the same bytes in the same minute) and
//! GMAC/s of products whose weights are in the cache.

use pregate_kernels::testing::{self, Inputs, Random, Weights};
use pregate_kernels::{Backend, Cpu, CpuOptions, Format, Linear, Matrix};
use std::time::Instant;

const ALL_BYTES: usize = 384 << 20;
/// A slice is short enough that some pass without an interruption, and all of
/// them together do not fit any cache.
const SLICE_BYTES: usize = 8 << 20;

/// The tenth percentile of the seconds of `count` runs: on a machine that
/// others use as well, most runs are interrupted.
fn seconds(count: usize, mut run: impl FnMut(usize)) -> f64 {
    let mut all: Vec<f64> = (0..count)
        .map(|i| {
            let start = Instant::now();
            run(i);
            start.elapsed().as_secs_f64()
        })
        .collect();
    all.sort_by(f64::total_cmp);
    all[count / 10]
}

fn read(cpu: &Cpu, bytes: &[u8]) {
    let parts = cpu.threads() * 8;
    let each = bytes.len() / parts;
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
}

fn main() {
    let mut args = std::env::args().skip(1);
    let threads = args.next().and_then(|a| a.parse().ok());
    let wanted: Vec<String> = args.collect();
    let cpu = Cpu::new(CpuOptions { threads, isa: None }).expect("threads");
    println!("{}", cpu.describe());
    cpu.pinned(|| measure(&cpu, &wanted)).expect("a thread");
}

fn measure(cpu: &Cpu, wanted: &[String]) {
    let mut random = Random::new(1);
    let cols = 2048;
    for format in Format::ALL {
        if !wanted.is_empty() && !wanted.iter().any(|w| w == format.name()) {
            continue;
        }
        let row_bytes = format.row_bytes(cols).expect("whole blocks");
        let rows = SLICE_BYTES / row_bytes;
        let slice = rows * row_bytes;
        let few = testing::weights(format, Weights::Usual, 64, cols, &mut random);
        let bytes: Vec<u8> = few.iter().copied().cycle().take(ALL_BYTES).collect();
        let slices = bytes.len() / slice;
        let part = |i: usize| &bytes[i % slices * slice..(i % slices + 1) * slice];
        let x = testing::inputs(Inputs::Normal, 512 * cols, &mut random);
        let mut out = vec![0.0; rows];
        let plain = slice as f64 / seconds(3 * slices, |i| read(cpu, part(i))) / 1e9;
        let time = seconds(3 * slices, |i| {
            let weight = Matrix::new(format, rows, cols, part(i)).expect("shape");
            cpu.linear(&x[..cols], 1, &mut [Linear { weight, bias: None, out: &mut out }]);
        });
        let decode = slice as f64 / time / 1e9;
        // Small enough for the last-level cache: arithmetic only.
        let rows = 256;
        let weight = Matrix::new(format, rows, cols, &bytes).expect("shape");
        let mut out = vec![0.0; 512 * rows];
        let mut prefill = [0.0; 3];
        for (figure, tokens) in prefill.iter_mut().zip([1, 64, 512]) {
            let time = seconds(4000 / tokens.max(32), |_| {
                let out = &mut out[..tokens * rows];
                let jobs = &mut [Linear { weight, bias: None, out }];
                cpu.linear(&x[..tokens * cols], tokens, jobs);
            });
            *figure = (tokens * rows * cols) as f64 / time / 1e9;
        }
        println!(
            "{:8} read {plain:6.2} GB/s  decode {decode:6.2} GB/s ({:3.0} %)  \
             GMAC/s from cache: 1 token {:6.1}, 64 {:6.1}, 512 {:6.1}",
            format.name(),
            100.0 * decode / plain,
            prefill[0],
            prefill[1],
            prefill[2],
        );
    }
}
