//! Attention in the order of `docs/architecture.md`: chunks of 256 positions,
//! merged in index order. Units are groups of queries that share a cache
//! head, or, for one token over a long cache, its chunks.

use super::Cpu;
use super::kernels::{Cells, Kernels};
use super::pool::{Grid, lock};
use crate::backend::{AttentionCall, KvCells, KvView};
use crate::contract;

/// Positions of a chunk.
const CHUNK: usize = 256;
/// Queries that share each load of keys and values.
const QUERIES: usize = 16;

#[derive(Default)]
pub(super) struct Buffers {
    partial: Vec<Partial>,
}

/// Running softmax of some queries.
#[derive(Default)]
struct Partial {
    /// `[queries]`
    max: Vec<f32>,
    sum: Vec<f32>,
    /// `[queries, width]`
    acc: Vec<f32>,
}

impl Partial {
    fn reset(&mut self, queries: usize, width: usize) {
        self.max.clear();
        self.max.resize(queries, f32::NEG_INFINITY);
        self.sum.clear();
        self.sum.resize(queries, 0.0);
        self.acc.clear();
        self.acc.resize(queries * width, 0.0);
    }

    /// Joins what a later chunk found for query `q`.
    fn merge(&mut self, kernels: &dyn Kernels, q: usize, max: f32, sum: f32, acc: &[f32]) {
        let width = acc.len();
        let top = if max > self.max[q] { max } else { self.max[q] };
        let a = contract::exp(self.max[q] - top);
        let b = contract::exp(max - top);
        self.max[q] = top;
        self.sum[q] = self.sum[q].mul_add(a, sum * b);
        kernels.merge(&mut self.acc[q * width..(q + 1) * width], a, acc, b);
    }
}

/// The parts of the scratch buffers that a chunk needs.
struct Work<'a> {
    queries: &'a [f32],
    scores: &'a mut [f32],
    acc: &'a mut [f32],
}

impl Cpu {
    pub(super) fn attend(&self, buffers: &mut Buffers, call: AttentionCall<'_>) {
        let AttentionCall { q, tokens, heads, kv_heads, keys, values, out, .. } = &call;
        assert!(*kv_heads > 0 && heads.is_multiple_of(*kv_heads), "whole groups of heads");
        assert_eq!(q.len(), tokens * heads * keys.width, "queries [tokens, heads, width]");
        assert_eq!(out.len(), tokens * heads * values.width, "output [tokens, heads, width]");
        assert!(call.sinks.is_none_or(|sinks| sinks.len() == *heads), "sinks [heads]");
        if *tokens == 0 {
            return;
        }
        let positions = call.first_position + tokens;
        check(keys, *kv_heads, positions);
        check(values, *kv_heads, positions);
        let shared = heads / kv_heads;
        let per_head = (tokens * shared).div_ceil(QUERIES);
        let first_chunk = first_visible(call.first_position, call.window) / CHUNK;
        let chunks = positions.div_ceil(CHUNK) - first_chunk;
        if *tokens == 1 && chunks > 1 && kv_heads * per_head < 4 * self.threads() {
            self.attend_by_chunk(buffers, call, first_chunk, chunks);
        } else {
            self.attend_by_queries(call);
        }
    }

    fn attend_by_queries(&self, call: AttentionCall<'_>) {
        let AttentionCall { tokens, heads, kv_heads, .. } = call;
        let shared = heads / kv_heads;
        let per_head = (tokens * shared).div_ceil(QUERIES);
        let width = call.values.width;
        let (out, call) = split(call);
        let (row_bounds, col_bounds) = (Vec::from_iter(0..=tokens * heads), [0, width]);
        let rows = Grid::new(out, width, &row_bounds, &col_bounds);
        self.pool.run(kv_heads * per_head, &|worker, unit| {
            // Late queries see most and start first.
            let (kv_head, tile) = (unit % kv_heads, per_head - 1 - unit / kv_heads);
            let first = tile * QUERIES;
            let count = QUERIES.min(tokens * shared - first);
            let queries = Queries::new(&call, kv_head, first, count);
            let scratch = &mut *lock(&self.scratch[worker]);
            let mut work = work(&mut scratch.floats, &mut scratch.more_floats, &call, &queries);
            let mut state = Partial::default();
            state.reset(count, width);
            for chunk in queries.start / CHUNK..queries.end.div_ceil(CHUNK) {
                self.chunk(&call, &queries, chunk, &mut work, &mut state);
            }
            for i in 0..count {
                let (token, head) = queries.token_and_head(i);
                let mut row = rows.take(token * heads + head, 0);
                finish(&call, head, &mut state, i, row.row(0));
            }
        });
    }

    fn attend_by_chunk(
        &self,
        buffers: &mut Buffers,
        call: AttentionCall<'_>,
        first_chunk: usize,
        chunks: usize,
    ) {
        let AttentionCall { heads, kv_heads, .. } = call;
        let shared = heads / kv_heads;
        let per_head = shared.div_ceil(QUERIES);
        let width = call.values.width;
        let (out, call) = split(call);
        let partial = &mut buffers.partial;
        partial.resize_with(kv_heads * per_head * chunks, Partial::default);
        let locate = |unit: usize| {
            let (tile, chunk) = (unit / chunks, unit % chunks);
            let first = tile % per_head * QUERIES;
            let count = QUERIES.min(shared - first);
            (Queries::new(&call, tile / per_head, first, count), chunk)
        };
        self.pool.each_mut(partial, |worker, unit, state| {
            let (queries, chunk) = locate(unit);
            let scratch = &mut *lock(&self.scratch[worker]);
            let mut work = work(&mut scratch.floats, &mut scratch.more_floats, &call, &queries);
            state.reset(queries.count, width);
            self.chunk_alone(&call, &queries, first_chunk + chunk, &mut work, state);
        });
        let mut tiles: Vec<(&[Partial], usize)> =
            partial.chunks_exact(chunks).enumerate().map(|(i, p)| (p, i)).collect();
        let (row_bounds, col_bounds) = (Vec::from_iter(0..=heads), [0, width]);
        let rows = Grid::new(out, width, &row_bounds, &col_bounds);
        self.pool.each_mut(&mut tiles, |_, _, (parts, tile)| {
            let (queries, _) = locate(*tile * chunks);
            let mut state = Partial::default();
            state.reset(queries.count, width);
            for part in parts.iter() {
                for i in 0..queries.count {
                    let acc = &part.acc[i * width..(i + 1) * width];
                    state.merge(self.kernels, i, part.max[i], part.sum[i], acc);
                }
            }
            for i in 0..queries.count {
                let (token, head) = queries.token_and_head(i);
                let mut row = rows.take(token * heads + head, 0);
                finish(&call, head, &mut state, i, row.row(0));
            }
        });
    }

    /// One chunk's own maximum, sum and accumulator into `work.acc`; `found`
    /// hears of each query that sees something.
    fn chunk_parts(
        &self,
        call: &Shape<'_>,
        queries: &Queries,
        chunk: usize,
        work: &mut Work<'_>,
        mut found: impl FnMut(usize, f32, f32, &[f32]),
    ) {
        let base = chunk * CHUNK;
        let end = queries.end.min(base + CHUNK);
        let first = queries.start.max(base);
        let count = end - first;
        let width = call.values.width;
        let mut ranges = [(0, 0); QUERIES];
        let mut sums = [(0.0, 0.0); QUERIES];
        self.kernels.scores(
            work.queries,
            call.keys.width,
            cells(&call.keys, queries.kv_head, first),
            count,
            call.scale,
            work.scores,
            CHUNK,
        );
        for i in 0..queries.count {
            let (from, to) = queries.visible(call, i);
            let (from, to) = (from.max(first), to.min(end));
            if from >= to {
                continue;
            }
            ranges[i] = (from - first, to - first);
            let scores = &mut work.scores[i * CHUNK..][from - first..to - first];
            sums[i] = self.kernels.softmax_chunk(scores, from);
        }
        work.acc[..queries.count * width].fill(0.0);
        self.kernels.values(
            work.scores,
            CHUNK,
            &ranges[..queries.count],
            cells(&call.values, queries.kv_head, first),
            width,
            work.acc,
        );
        for i in 0..queries.count {
            if ranges[i].0 < ranges[i].1 {
                found(i, sums[i].0, sums[i].1, &work.acc[i * width..(i + 1) * width]);
            }
        }
    }

    fn chunk(
        &self,
        call: &Shape<'_>,
        queries: &Queries,
        chunk: usize,
        work: &mut Work<'_>,
        state: &mut Partial,
    ) {
        self.chunk_parts(call, queries, chunk, work, |i, max, sum, acc| {
            state.merge(self.kernels, i, max, sum, acc);
        });
    }

    /// Leaves the chunk's own parts in `state`.
    fn chunk_alone(
        &self,
        call: &Shape<'_>,
        queries: &Queries,
        chunk: usize,
        work: &mut Work<'_>,
        state: &mut Partial,
    ) {
        self.chunk_parts(call, queries, chunk, work, |i, max, sum, acc| {
            state.max[i] = max;
            state.sum[i] = sum;
            state.acc[i * acc.len()..(i + 1) * acc.len()].copy_from_slice(acc);
        });
    }
}

/// An [`AttentionCall`] without its output.
struct Shape<'a> {
    q: &'a [f32],
    heads: usize,
    kv_heads: usize,
    keys: KvView<'a>,
    values: KvView<'a>,
    first_position: usize,
    scale: f32,
    window: Option<usize>,
    sinks: Option<&'a [f32]>,
}

fn split(call: AttentionCall<'_>) -> (&mut [f32], Shape<'_>) {
    let AttentionCall { q, heads, kv_heads, keys, values, first_position, .. } = call;
    let AttentionCall { scale, window, sinks, out, .. } = call;
    let shape = Shape { q, heads, kv_heads, keys, values, first_position, scale, window, sinks };
    (out, shape)
}

/// The first position that a query at `position` sees.
fn first_visible(position: usize, window: Option<usize>) -> usize {
    window.map_or(0, |window| (position + 1).saturating_sub(window.max(1)))
}

/// Consecutive queries of one cache head, token after token.
struct Queries {
    kv_head: usize,
    shared: usize,
    first: usize,
    count: usize,
    /// Positions that any of them sees.
    start: usize,
    end: usize,
}

impl Queries {
    fn new(call: &Shape<'_>, kv_head: usize, first: usize, count: usize) -> Self {
        let shared = call.heads / call.kv_heads;
        let position = call.first_position + first / shared;
        let start = first_visible(position, call.window);
        let end = call.first_position + (first + count - 1) / shared + 1;
        Self { kv_head, shared, first, count, start, end }
    }

    fn token_and_head(&self, i: usize) -> (usize, usize) {
        let query = self.first + i;
        (query / self.shared, self.kv_head * self.shared + query % self.shared)
    }

    /// Positions that query `i` sees: `from .. to`.
    fn visible(&self, call: &Shape<'_>, i: usize) -> (usize, usize) {
        let position = call.first_position + self.token_and_head(i).0;
        (first_visible(position, call.window), position + 1)
    }
}

/// Gathers the queries and sizes the buffers of a chunk.
fn work<'a>(
    floats: &'a mut Vec<f32>,
    acc: &'a mut Vec<f32>,
    call: &Shape<'_>,
    queries: &Queries,
) -> Work<'a> {
    let width = call.keys.width;
    floats.resize(QUERIES * (width + CHUNK), 0.0);
    acc.resize(QUERIES * call.values.width, 0.0);
    let (q, scores) = floats.split_at_mut(QUERIES * width);
    for i in 0..queries.count {
        let (token, head) = queries.token_and_head(i);
        let at = (token * call.heads + head) * width;
        q[i * width..(i + 1) * width].copy_from_slice(&call.q[at..at + width]);
    }
    Work { queries: &q[..queries.count * width], scores, acc }
}

/// The sink joins, then the division.
fn finish(call: &Shape<'_>, head: usize, state: &mut Partial, i: usize, out: &mut [f32]) {
    let width = out.len();
    let acc = &mut state.acc[i * width..(i + 1) * width];
    let mut sum = state.sum[i];
    if let Some(sinks) = call.sinks {
        let sink = sinks[head];
        let top = if sink > state.max[i] { sink } else { state.max[i] };
        let a = contract::exp(state.max[i] - top);
        sum = sum.mul_add(a, contract::exp(sink - top));
        acc.iter_mut().for_each(|acc| *acc = acc.mul_add(a, 0.0));
    }
    for (out, acc) in out.iter_mut().zip(acc) {
        *out = *acc / sum;
    }
}

fn cells<'a>(view: &KvView<'a>, head: usize, first: usize) -> Cells<'a> {
    let start = head * view.head_stride + first * view.position_stride;
    match view.cells {
        KvCells::F16(cells) => Cells::F16(&cells[start..], view.position_stride),
        KvCells::F32(cells) => Cells::F32(&cells[start..], view.position_stride),
    }
}

fn check(view: &KvView<'_>, kv_heads: usize, positions: usize) {
    let length = match view.cells {
        KvCells::F16(cells) => cells.len(),
        KvCells::F32(cells) => cells.len(),
    };
    let last = (kv_heads - 1) * view.head_stride + (positions - 1) * view.position_stride;
    assert!(view.width > 0 && last + view.width <= length, "cache shorter than its shape");
}
