//! How fast the processor computes experts that come from memory, beside a
//! plain read of the same memory by the same threads.
//!
//! Where a GPU holds only some of the experts, this decides what the others
//! cost: each is read once per token and used for one token.

mod line;
mod pool;
mod quiet;
mod shape;

pub use line::{AT_ONCE, Line};
pub use pool::{Pages, Pool};
pub use shape::{Shape, USUAL, shapes};

use crate::{bandwidth, exit::Failure, memory, output};
use pool::random;
use pregate_kernels::{Backend, ExpertGroup, ExpertRows, ExpertWeights, GatedActivation};
use quiet::Watch;
use serde::Serialize;
use std::{
    hint::black_box,
    thread,
    time::{Duration, Instant},
};

/// Where experts start in the pool, as in a GPU's arena.
const EXPERT_ALIGN_BYTES: usize = 256;

/// Experts of one shape in a pool, drawn so that none comes back before all
/// others were read: no cache holds one of them.
pub struct Experts<'a> {
    shape: Shape,
    weights: Vec<ExpertWeights<'a>>,
    /// The next one to draw.
    next: usize,
    x: Vec<f32>,
    answers: Vec<f32>,
}

/// Measurements keep to a core, which takes a thread.
pub fn no_thread(error: std::io::Error) -> Failure {
    Failure::Resources(format!("cannot start a thread that measures: {error}"))
}

impl<'a> Experts<'a> {
    /// As many experts as `pool` holds, at least `most`, which is how many are
    /// asked for at once.
    pub fn new(shape: Shape, pool: &'a [u8], most: usize) -> Result<Self, Failure> {
        let stride = shape.bytes().max(1).next_multiple_of(EXPERT_ALIGN_BYTES);
        let count = pool.len() / stride;
        if count < most.max(1) {
            return Err(Failure::Internal(format!(
                "{most} experts of {} bytes in {} bytes",
                shape.bytes(),
                pool.len()
            )));
        }
        let mut state = 7u64;
        let mut order: Vec<usize> = (0..count).collect();
        for last in (1..count).rev() {
            order.swap(last, (random(&mut state) % (last as u64 + 1)) as usize);
        }
        let weights = order.into_iter().map(|expert| shape.weights(pool, expert * stride));
        let x = (0..shape.hidden).map(|_| random(&mut state) as i64 as f32 / i64::MAX as f32);
        Ok(Self {
            shape,
            weights: weights.collect::<Result<_, _>>()?,
            next: 0,
            x: x.collect(),
            answers: vec![0.0; most * shape.hidden],
        })
    }

    /// One token with `count` experts.
    fn token(&mut self, backend: &dyn Backend, count: usize) {
        let from = if self.next + count <= self.weights.len() { self.next } else { 0 };
        self.next = from + count;
        let drawn = self.weights[from..self.next].iter().enumerate();
        let groups: Vec<ExpertGroup<'_>> = drawn
            .map(|(row, weights)| ExpertGroup { weights: *weights, tokens: &[0], first_row: row })
            .collect();
        backend.expert_rows(ExpertRows {
            x: &self.x,
            tokens: 1,
            groups: &groups,
            activation: GatedActivation::Silu,
            answers: &mut self.answers[..count * self.shape.hidden],
        });
    }

    /// Weight bytes per second, in GB/s, over tokens with `count` experts
    /// each, which read `bytes` or a little more.
    pub fn gb_s(&mut self, backend: &dyn Backend, count: usize, bytes: usize) -> f64 {
        let per_token = count * self.shape.bytes();
        let tokens = bytes.div_ceil(per_token.max(1));
        let started = Instant::now();
        for _ in 0..tokens {
            self.token(backend, count);
        }
        black_box(&self.answers);
        (tokens * per_token) as f64 / started.elapsed().as_secs_f64() / 1e9
    }
}

impl Experts<'_> {
    /// As [`Experts::gb_s`], one token at least and more while `more` says so.
    pub fn gb_s_while<E>(
        &mut self,
        backend: &dyn Backend,
        count: usize,
        more: &mut dyn FnMut() -> Result<bool, E>,
    ) -> Result<f64, E> {
        let started = Instant::now();
        let mut tokens = 0;
        loop {
            self.token(backend, count);
            tokens += 1;
            if !more()? {
                break;
            }
        }
        black_box(&self.answers);
        let bytes = tokens * count * self.shape.bytes();
        Ok(bytes as f64 / started.elapsed().as_secs_f64() / 1e9)
    }
}

/// Plain reads that walk over a pool.
pub struct Reader<'a> {
    pool: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    pub fn new(pool: &'a [u8]) -> Self {
        Self { pool, at: 0 }
    }

    /// Of `bytes` (at most the pool's), read once by the backend's threads.
    pub fn gb_s(&mut self, backend: &dyn Backend, bytes: usize) -> f64 {
        let bytes = bytes.min(self.pool.len());
        if self.at + bytes > self.pool.len() {
            self.at = 0;
        }
        let part = &self.pool[self.at..self.at + bytes];
        self.at += bytes;
        let started = Instant::now();
        black_box(bandwidth::read_once(backend, part));
        bytes as f64 / started.elapsed().as_secs_f64() / 1e9
    }
}

/// Rounds of a plain read, experts, and a plain read again.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Speed {
    /// Experts of one token that are computed at once.
    pub experts: usize,
    /// Medians.
    pub gb_s: f64,
    pub read_gb_s: f64,
    /// The median of the rounds' ratios: what else runs on the machine changes
    /// both figures of a round alike.
    pub share: f64,
    pub rounds: Vec<Round>,
    /// Rounds that were left out because other programs took the processor.
    pub left_out: usize,
    /// Whether no others were to be had, so that these count all the same.
    pub disturbed: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Round {
    pub gb_s: f64,
    /// Of the reads before and behind.
    pub read_gb_s: [f64; 2],
}

impl Round {
    fn read(&self) -> f64 {
        (self.read_gb_s[0] + self.read_gb_s[1]) / 2.0
    }
}

impl Speed {
    fn of(experts: usize, quiet: Vec<Round>, loud: Vec<Round>) -> Self {
        let disturbed = quiet.is_empty();
        let (rounds, left_out) = if disturbed { (loud, 0) } else { (quiet, loud.len()) };
        let middle = |of: fn(&Round) -> f64| {
            median(&rounds.iter().map(of).collect::<Vec<_>>()).unwrap_or(0.0)
        };
        let (gb_s, read_gb_s) = (middle(|round| round.gb_s), middle(Round::read));
        let share = middle(|round| round.gb_s / round.read());
        Self { experts, gb_s, read_gb_s, share, rounds, left_out, disturbed }
    }
}

/// How long to measure.
#[derive(Clone, Copy, Debug)]
pub struct Effort {
    pub pool_bytes: usize,
    /// Read per round by the experts, and by each plain read.
    pub round_bytes: usize,
    pub rounds: usize,
}

/// How long quiet rounds are waited for.
const PATIENCE: Duration = Duration::from_millis(400);
/// Behind a disturbed round, so that the others have their turn first.
const PAUSE: Duration = Duration::from_millis(2);

impl Effort {
    /// Under a second.
    const SHORT: Self = Self { pool_bytes: 256 << 20, round_bytes: 16 << 20, rounds: 9 };

    pub fn full(rounds: usize) -> Self {
        Self { pool_bytes: 768 << 20, round_bytes: 24 << 20, rounds }
    }
}

/// Tokens that miss `at_once` experts of `shape` each. Where no round was
/// quiet, all of them count.
pub fn measure(
    backend: &dyn Backend,
    pool: &Pool,
    shape: Shape,
    at_once: usize,
    effort: Effort,
) -> Result<Speed, Failure> {
    let Effort { round_bytes, rounds, .. } = effort;
    let mut experts = Experts::new(shape, pool.bytes(), at_once)?;
    let mut reader = Reader::new(pool.bytes());
    // Buffers are made and threads wake.
    experts.gb_s(backend, at_once, round_bytes / 4);
    let (mut quiet, mut loud) = (Vec::new(), Vec::new());
    let started = Instant::now();
    while quiet.len() < rounds && (loud.len() < rounds || started.elapsed() < PATIENCE) {
        let watch = Watch::start();
        let before = reader.gb_s(backend, round_bytes);
        let gb_s = experts.gb_s(backend, at_once, round_bytes);
        let behind = reader.gb_s(backend, round_bytes);
        let round = Round { gb_s, read_gb_s: [before, behind] };
        if watch.was_quiet() {
            quiet.push(round);
        } else {
            loud.push(round);
            thread::sleep(PAUSE);
        }
    }
    Ok(Speed::of(at_once, quiet, loud))
}

/// Memory for short measurements; of the large pages that experts have.
pub fn pool() -> Result<Pool, Failure> {
    let free = memory::available().bytes;
    if free / 2 < Effort::SHORT.pool_bytes as u64 {
        let words = format!("{} of free memory are too little to measure in", output::bytes(free));
        return Err(Failure::Resources(words));
    }
    Pool::new(Pages::Huge, Effort::SHORT.pool_bytes)
}

/// One expert alone and [`AT_ONCE`] at once, in less than a second; the line
/// through both, and the second.
pub fn line(backend: &dyn Backend, pool: &Pool, shape: Shape) -> Result<(Line, Speed), Failure> {
    let one = measure(backend, pool, shape, 1, Effort::SHORT)?;
    let some = measure(backend, pool, shape, AT_ONCE, Effort::SHORT)?;
    Ok((Line::through(shape.bytes(), one.gb_s, some.gb_s), some))
}

/// The middle of the samples; of an even number, the mean of the two there.
pub fn median(samples: &[f64]) -> Option<f64> {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    match sorted.len() {
        0 => None,
        length if length % 2 == 1 => Some(sorted[middle]),
        _ => Some((sorted[middle - 1] + sorted[middle]) / 2.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pregate_kernels::{Cpu, CpuOptions};
    use std::collections::HashSet;

    #[test]
    fn no_expert_comes_back_before_all_others_were_read() {
        let shape = Shape { hidden: 256, inner: 256, ..USUAL };
        let pool = Pool::new(Pages::Small, 40 * shape.bytes().next_multiple_of(256)).unwrap();
        let mut experts = Experts::new(shape, pool.bytes(), 4).unwrap();
        assert_eq!(experts.weights.len(), 40);
        let starts: HashSet<_> = experts
            .weights
            .iter()
            .map(|weights| weights.gate.canonical_rows().unwrap().0.as_ptr() as usize)
            .collect();
        assert_eq!(starts.len(), 40, "each expert once");
        let cpu = Cpu::new(CpuOptions { threads: Some(2), isa: None }).unwrap();
        for _ in 0..2 {
            (0..10).for_each(|_| experts.token(&cpu, 4));
            assert_eq!(experts.next, 40);
        }
    }

    #[test]
    fn the_pools_weights_are_ordinary_numbers_in_every_format() {
        let cpu = Cpu::new(CpuOptions { threads: Some(1), isa: None }).unwrap();
        for pages in [Pages::Huge, Pages::Small] {
            for shape in shapes() {
                let pool = Pool::new(pages, 2 * shape.bytes().next_multiple_of(256)).unwrap();
                let mut experts = Experts::new(shape, pool.bytes(), 2).unwrap();
                experts.token(&cpu, 2);
                // Where all gates are far below 0, the answers are 0.
                let usual = |value: &f32| value.is_finite() && !value.is_subnormal();
                assert!(experts.answers.iter().all(usual), "{shape:?}");
            }
        }
    }

    #[test]
    fn a_share_is_of_the_reads_around_it() {
        // The machine is three times as slow in the second round.
        let round = |gb_s, before, behind| Round { gb_s, read_gb_s: [before, behind] };
        let quiet = vec![round(9.0, 10.0, 10.0), round(3.0, 10.0, 2.0)];
        let speed = Speed::of(1, quiet.clone(), vec![round(0.1, 1.0, 1.0); 4]);
        assert!((speed.share - (0.9 + 0.5) / 2.0).abs() < 1e-12);
        assert_eq!((speed.gb_s, speed.read_gb_s), (6.0, 8.0));
        assert_eq!((speed.left_out, speed.disturbed), (4, false));
        let loud = Speed::of(1, Vec::new(), quiet);
        assert_eq!((loud.share, loud.left_out, loud.disturbed), (speed.share, 0, true));
    }

    #[test]
    fn a_measurement_has_all_its_rounds() {
        let cpu = Cpu::new(CpuOptions { threads: Some(2), isa: None }).unwrap();
        let effort = Effort { pool_bytes: 16 << 20, round_bytes: 2 << 20, rounds: 3 };
        let pool = Pool::new(Pages::Small, effort.pool_bytes).unwrap();
        let speed = measure(&cpu, &pool, USUAL, 2, effort).unwrap();
        // Tests run side by side, so that no round may have been quiet.
        assert!(speed.rounds.len() == 3 || speed.disturbed || speed.left_out > 0, "{speed:?}");
        assert!(speed.gb_s > 0.0 && speed.read_gb_s > 0.0 && speed.share > 0.0);
        assert!(measure(&cpu, &pool, USUAL, 20, effort).is_err(), "more than the pool holds");
    }

    #[test]
    fn medians() {
        assert_eq!(median(&[]), None);
        assert_eq!(median(&[3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), Some(2.5));
    }
}
