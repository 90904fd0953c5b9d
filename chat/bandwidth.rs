//! How fast this machine reads memory: the roof over decoding, which reads
//! every active weight once per token.

use crate::{
    device::{Device, Gpu},
    exit::Failure,
    plan::Planned,
};
use pregate_kernels::cuda::{CudaError, probe_read};
use std::{hint::black_box, thread, time::Instant};

/// Larger than any cache.
const BUFFER_BYTES: usize = 512 << 20;
/// With less the caches would help.
const SMALLEST_BUFFER_BYTES: usize = 128 << 20;
const PASSES: usize = 8;
/// Sums side by side, so that adding does not limit reading.
const LANES: usize = 32;

/// Of the memory that holds the weights, in GB/s.
pub fn of(device: &Device, planned: &Planned) -> Result<f64, Failure> {
    match &device.gpu {
        Some(gpu) => gpu_read_gb_s(gpu).map_err(|error| Failure::Runtime(error.into())),
        None => read_gb_s(device.threads, planned.plan.budget_bytes),
    }
}

/// The best of several passes in which a GPU reads a buffer once. The buffer
/// is there for this call only, and smaller where memory is short.
fn gpu_read_gb_s(gpu: &Gpu) -> Result<f64, CudaError> {
    // What a device holds at most: eight blocks of 256 threads each.
    let blocks = 8 * gpu.device.info().multiprocessors;
    let (free_bytes, _) = gpu.device.memory()?;
    let words = (free_bytes / 2).min(BUFFER_BYTES as u64) as usize / 16;
    let arena = gpu.device.arena(16 * words + 4 * 256 * blocks as usize)?;
    let (from, sums) = (arena.take(16 * words, 256)?, arena.take(4 * 256 * blocks as usize, 16)?);
    let stream = gpu.device.compute();
    stream.fill(&from, 1)?;
    let mut best = 0.0f64;
    for _ in 0..PASSES {
        let since = stream.record_timed()?;
        probe_read(&gpu.device, stream, blocks, &from, &sums)?;
        let until = stream.record_timed()?;
        until.synchronize()?;
        let seconds = until.seconds_since(&since)?.max(1e-9);
        best = best.max(from.bytes() as f64 / seconds / 1e9);
    }
    Ok(best)
}

/// The best of several passes in which `threads` threads read a buffer once,
/// in GB/s (10^9 bytes). The buffer is there for this call only, and has at
/// most half of `budget_bytes` where that is enough to measure.
fn read_gb_s(threads: usize, budget_bytes: u64) -> Result<f64, Failure> {
    let half = usize::try_from(budget_bytes / 2).unwrap_or(usize::MAX);
    let buffer_bytes = half.clamp(SMALLEST_BUFFER_BYTES, BUFFER_BYTES);
    let words = buffer_bytes / size_of::<u64>();
    let mut buffer: Vec<u64> = Vec::new();
    buffer.try_reserve_exact(words).map_err(|_| {
        Failure::Resources(format!(
            "measuring the read bandwidth needs {} MiB of memory",
            buffer_bytes >> 20
        ))
    })?;
    // Written with values, so that every page exists.
    buffer.extend((0..words as u64).map(|i| i.wrapping_mul(0x9e37_79b9_7f4a_7c15)));
    let share = words.div_ceil(threads.max(1));
    let mut best = 0.0f64;
    for _ in 0..PASSES {
        let started = Instant::now();
        let total: Result<u64, Failure> = thread::scope(|scope| {
            let spawned: Result<Vec<_>, _> = buffer
                .chunks(share)
                .map(|part| thread::Builder::new().spawn_scoped(scope, || sum(part)))
                .collect();
            let readers = spawned
                .map_err(|error| Failure::Resources(format!("cannot start a thread: {error}")))?;
            Ok(readers
                .into_iter()
                .filter_map(|reader| reader.join().ok())
                .fold(0, u64::wrapping_add))
        });
        black_box(total?);
        best = best.max(buffer_bytes as f64 / started.elapsed().as_secs_f64() / 1e9);
    }
    Ok(best)
}

fn sum(part: &[u64]) -> u64 {
    let mut lanes = [0u64; LANES];
    let chunks = part.chunks_exact(LANES);
    let rest: u64 = chunks.remainder().iter().fold(0, |sum, word| sum.wrapping_add(*word));
    for chunk in chunks {
        for (lane, word) in lanes.iter_mut().zip(chunk) {
            *lane = lane.wrapping_add(*word);
        }
    }
    lanes.into_iter().fold(rest, u64::wrapping_add)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_word_is_read() {
        for length in [0, 1, LANES - 1, LANES, 5 * LANES + 3] {
            let words: Vec<u64> = (1..=length as u64).map(|i| i << 40 | i).collect();
            assert_eq!(sum(&words), words.iter().sum::<u64>(), "{length} words");
        }
    }
}
