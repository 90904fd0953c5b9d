//! How fast this machine reads memory: the roof over decoding, which reads
//! every active weight once per token.

use crate::{
    device::Device,
    exit::Failure,
    expert_speed::{Pages, Pool},
    plan::Planned,
};
use pregate_kernels::{
    Backend,
    cuda::{self, CudaError, Span, probe_read},
};
use std::{
    array::from_fn,
    sync::atomic::{AtomicU64, Ordering},
    time::Instant,
};

/// Larger than any cache.
const BUFFER_BYTES: usize = 512 << 20;
/// With less the caches would help.
const SMALLEST_BUFFER_BYTES: usize = 128 << 20;
const PASSES: usize = 8;
/// What a GPU reads first; one that takes so long (less than 1 GB/s) is asked
/// for no more.
const FIRST_BYTES: usize = 4 << 20;
const LONG_S: f64 = 0.004;
/// Sums side by side, so that adding does not limit reading.
const LANES: usize = 32;
/// What a thread reads in one go.
const PART_BYTES: usize = 1 << 20;
/// Places of it that it reads in turn: one alone keeps too few lines under
/// way. On two Zen 4 cores 37 GB/s from one place, 55 from four, 50 from eight.
const STREAMS: usize = 4;

/// Of the memory that holds the weights, in GB/s.
pub fn of(device: &Device, planned: &Planned) -> Result<f64, Failure> {
    match &device.gpu {
        Some(gpu) => gpu_read_gb_s(&gpu.device).map_err(|error| Failure::Runtime(error.into())),
        None => read_gb_s(&*device.backend, planned.plan.budget_bytes),
    }
}

/// The best of several passes in which a GPU reads a buffer once. The buffer
/// is there for this call only, and smaller where memory is short.
pub fn gpu_read_gb_s(gpu: &cuda::Device) -> Result<f64, CudaError> {
    // What a device holds at most: eight blocks of 256 threads each.
    let blocks = 8 * gpu.info().multiprocessors;
    let (free_bytes, _) = gpu.memory()?;
    let words = (free_bytes / 2).min(BUFFER_BYTES as u64) as usize / 16;
    let arena = gpu.arena(16 * words + 4 * 256 * blocks as usize)?;
    let (from, sums) = (arena.take(16 * words, 256)?, arena.take(4 * 256 * blocks as usize, 16)?);
    let stream = gpu.compute();
    let read = |from: &Span| -> Result<f64, CudaError> {
        let since = stream.record_timed()?;
        probe_read(gpu, stream, blocks, from, &sums)?;
        let until = stream.record_timed()?;
        until.synchronize()?;
        Ok(until.seconds_since(&since)?.max(1e-9))
    };
    let gb_s = |from: &Span, seconds: f64| from.bytes() as f64 / seconds / 1e9;
    let first = from.part(0..from.bytes().min(FIRST_BYTES));
    stream.fill(&first, 1)?;
    read(&first)?;
    let seconds = read(&first)?;
    if seconds > LONG_S {
        return Ok(gb_s(&first, seconds));
    }
    stream.fill(&from, 1)?;
    let mut best = 0.0f64;
    for _ in 0..PASSES {
        best = best.max(gb_s(&from, read(&from)?));
    }
    Ok(best)
}

/// The best of several passes in which the processor's threads read a buffer
/// once, in GB/s (10^9 bytes). The buffer is there for this call only, has at
/// most half of `budget_bytes` where that is enough to measure, and lies in
/// large pages, as weights do.
fn read_gb_s(backend: &dyn Backend, budget_bytes: u64) -> Result<f64, Failure> {
    let half = usize::try_from(budget_bytes / 2).unwrap_or(usize::MAX);
    let pool = Pool::new(Pages::Huge, half.clamp(SMALLEST_BUFFER_BYTES, BUFFER_BYTES))?;
    let mut best = 0.0f64;
    for _ in 0..PASSES {
        let started = Instant::now();
        read_once(backend, pool.bytes());
        best = best.max(pool.bytes().len() as f64 / started.elapsed().as_secs_f64() / 1e9);
    }
    Ok(best)
}

/// Reads whole words of `bytes` once with the backend's threads, and sums them.
pub fn read_once(backend: &dyn Backend, bytes: &[u8]) -> u64 {
    let parts: Vec<&[u8]> = bytes.chunks(PART_BYTES).collect();
    let total = AtomicU64::new(0);
    backend.for_each(parts.len(), &|part| {
        total.fetch_add(sum(parts[part].as_chunks().0), Ordering::Relaxed);
    });
    total.into_inner()
}

/// In [`STREAMS`] places at once, and the rest.
fn sum(words: &[[u8; 8]]) -> u64 {
    let each = words.len() / STREAMS / LANES * LANES;
    let (streams, rest) = words.split_at(STREAMS * each);
    let streams: [&[[u8; 8]]; STREAMS] = from_fn(|stream| &streams[stream * each..][..each]);
    let mut lanes = [0u64; LANES];
    for at in (0..each).step_by(LANES) {
        for stream in streams {
            for (lane, word) in lanes.iter_mut().zip(&stream[at..at + LANES]) {
                *lane = lane.wrapping_add(value(word));
            }
        }
    }
    let rest = rest.iter().map(value);
    lanes.into_iter().chain(rest).fold(0, u64::wrapping_add)
}

fn value(word: &[u8; 8]) -> u64 {
    u64::from_ne_bytes(*word)
}

#[cfg(test)]
mod tests {
    use super::*;
    use pregate_kernels::{Cpu, CpuOptions};

    #[test]
    fn every_word_is_read() {
        let cpu = Cpu::new(CpuOptions { threads: Some(3), isa: None }).unwrap();
        let lengths = [0, 1, LANES, STREAMS * LANES - 1, 5 * LANES, 3 * PART_BYTES / 8 + 321];
        for length in lengths {
            let words: Vec<u64> = (1..=length as u64).map(|i| i << 40 | i).collect();
            let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
            let wanted = words.iter().fold(0, |sum: u64, word| sum.wrapping_add(*word));
            assert_eq!(read_once(&cpu, &bytes), wanted, "{length} words");
        }
    }
}
