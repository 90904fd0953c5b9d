//! Matrix products: preparing activations, cutting rows into units.

use super::Cpu;
use super::kernels::{ActivationMut, Activations, Kernels, Layout, Rows, Scratch, Tile};
use super::pool::{Columns, Grid, lock};
use crate::backend::Linear;
use crate::format::{ActivationKind, Format};
use crate::matrix::Matrix;

/// Weight bytes of a unit when each row is read once from memory.
const UNIT_BYTES: usize = 128 * 1024;
/// The same for one token, whose weights are read once and not kept.
const LONG_UNIT_BYTES: usize = 1024 * 1024;
/// Rows whose weights stay in the first-level cache while a few tokens pass.
const FEW_TOKEN_ROW_BYTES: usize = 24 * 1024;

#[derive(Default)]
pub(super) struct Buffers {
    prepared: Prepared,
    tiles: Tiles,
}

/// One input in every layout that the jobs want.
#[derive(Default)]
pub(super) struct Prepared {
    sets: Vec<Activations>,
    used: usize,
}

/// Packed tiles of several token lists and formats.
#[derive(Default)]
pub(super) struct Tiles {
    tiles: Vec<Tile>,
    /// What to gather into each tile.
    plan: Vec<TilePlan>,
}

struct TilePlan {
    format: Format,
    list: usize,
    first: usize,
    count: usize,
}

/// Where the tiles of one list and format are.
pub(super) type TileRange = std::ops::Range<usize>;

impl Prepared {
    pub fn of(&self, layout: Layout) -> &Activations {
        self.sets[..self.used]
            .iter()
            .find(|set| set.layout == Some(layout))
            .expect("prepared for every job")
    }
}

impl Tiles {
    pub fn clear(&mut self) {
        self.plan.clear();
    }

    /// Plans the tiles of token list `list` for rows of `format`, if a batch
    /// pays for `tokens` tokens.
    pub fn plan(
        &mut self,
        kernels: &dyn Kernels,
        format: Format,
        list: usize,
        tokens: usize,
    ) -> Option<TileRange> {
        if tokens < kernels.batch_from(format) {
            return None;
        }
        // The most recent plan of the same list and format is shared.
        let is_same = |plan: &TilePlan| plan.list == list && plan.format == format;
        if let Some(end) = self.plan.iter().rposition(is_same) {
            let count = self.plan[..=end].iter().rev().take_while(|plan| is_same(plan)).count();
            return Some(end + 1 - count..end + 1);
        }
        let start = self.plan.len();
        let (each, _) = kernels.tile_shape(format);
        for first in (0..tokens).step_by(each) {
            let count = each.min(tokens - first);
            self.plan.push(TilePlan { format, list, first, count });
        }
        Some(start..self.plan.len())
    }

    pub fn get(&self, range: &TileRange) -> &[Tile] {
        &self.tiles[range.clone()]
    }
}

impl Cpu {
    pub(super) fn layout(&self, format: Format) -> Layout {
        Layout { kind: format.activation(), order: self.kernels.order(format) }
    }

    /// Prepares `x` (`[tokens, cols]`) for rows of `formats`.
    pub(super) fn prepare(
        &self,
        prepared: &mut Prepared,
        x: &[f32],
        tokens: usize,
        cols: usize,
        formats: impl Iterator<Item = Format>,
    ) {
        assert_eq!(x.len(), tokens * cols, "input [tokens, cols]");
        prepared.used = 0;
        for format in formats {
            let layout = self.layout(format);
            if prepared.sets[..prepared.used].iter().any(|set| set.layout == Some(layout)) {
                continue;
            }
            if prepared.used == prepared.sets.len() {
                prepared.sets.push(Activations::default());
            }
            let set = &mut prepared.sets[prepared.used];
            prepared.used += 1;
            set.resize(layout, tokens, cols);
            if layout.kind == ActivationKind::F32 {
                set.x.copy_from_slice(x);
            } else {
                self.quantise(set, layout, x, cols);
            }
        }
    }

    fn quantise(&self, set: &mut Activations, layout: Layout, x: &[f32], cols: usize) {
        let group = if layout.kind == ActivationKind::Int8Per256 { 256 } else { 32 };
        let mut own = set.own.chunks_mut(cols.next_multiple_of(256));
        let mut sums16 = set.sums16.chunks_mut(cols / 16);
        let token_parts = set
            .q
            .chunks_mut(cols)
            .zip(set.scales.chunks_mut(cols / group))
            .zip(set.sums32.chunks_mut(cols / 32))
            .map(|((q, scales), sums32)| ActivationMut {
                q,
                own: own.next().unwrap_or_default(),
                scales,
                sums16: sums16.next().unwrap_or_default(),
                sums32,
            });
        if x.len() <= 8192 {
            for (x, part) in x.chunks_exact(cols).zip(token_parts) {
                self.kernels.quantise(x, group, layout, part);
            }
            return;
        }
        let mut parts: Vec<Option<ActivationMut<'_>>> = token_parts.map(Some).collect();
        self.pool.each_mut(&mut parts, |_, t, part| {
            let part = part.take().expect("each token once");
            self.kernels.quantise(&x[t * cols..(t + 1) * cols], group, layout, part);
        });
    }

    /// Fills the planned tiles; `lists[plan.list]` names tokens of the input.
    pub(super) fn pack(&self, tiles: &mut Tiles, prepared: &Prepared, lists: &[&[u32]]) {
        let Tiles { tiles, plan } = tiles;
        if plan.is_empty() {
            return;
        }
        if tiles.len() < plan.len() {
            tiles.resize_with(plan.len(), Tile::default);
        }
        self.pool.each_mut(&mut tiles[..plan.len()], |_, i, tile| {
            let TilePlan { format, list, first, count } = plan[i];
            let tokens = &lists[list][first..first + count];
            tile.tokens = count;
            self.kernels.pack(format, prepared.of(self.layout(format)), tokens, tile);
        });
    }

    /// Row bounds of units of `matrix` for `tokens` tokens, in a region over
    /// `matrices` matrices of about its size.
    ///
    /// One token wants few, long units: each begins with cold prefetchers.
    /// Sixteen a thread over the whole region keep the threads' ends close.
    pub(super) fn cut(
        &self,
        matrix: &Matrix<'_>,
        tokens: usize,
        matrices: usize,
        is_batch: bool,
    ) -> Vec<usize> {
        let rows = matrix.rows();
        let per_thread = match tokens {
            1 => rows.div_ceil((self.threads() * 16).div_ceil(matrices)),
            _ => rows.div_ceil(self.threads() * 8),
        };
        let each = if is_batch {
            let (_, multiple) = self.kernels.tile_shape(matrix.format());
            per_thread.div_ceil(multiple).clamp(1, 16) * multiple
        } else {
            let most = if tokens == 1 { LONG_UNIT_BYTES } else { UNIT_BYTES / tokens.min(8) };
            let unit_bytes = most.max(matrix.row_bytes());
            per_thread.clamp(1, unit_bytes / matrix.row_bytes()).max(16).next_multiple_of(16)
        };
        (0..rows).step_by(each).chain([rows]).collect()
    }

    /// `out.row(i)[r]` = row `first + r` times token `tokens[i]`, plus bias.
    #[allow(clippy::too_many_arguments)]
    pub(super) fn product(
        &self,
        matrix: &Matrix<'_>,
        first: usize,
        bias: Option<&[f32]>,
        prepared: &Prepared,
        tokens: &[u32],
        tiles: Option<&[Tile]>,
        scratch: &mut Scratch,
        out: &mut Columns<'_, f32>,
    ) {
        let count = out.width();
        match matrix.canonical_rows() {
            Some((bytes, stride)) => {
                let rows = Rows::new(
                    matrix.format(),
                    count,
                    matrix.cols(),
                    &bytes[first * stride..],
                    stride,
                );
                self.rows_product(rows, prepared, tokens, tiles, scratch, out);
            }
            None => {
                let row_bytes = matrix.row_bytes();
                let mut built = std::mem::take(&mut scratch.rows);
                // A few rows at a time stay in cache between the two passes.
                for start in (0..count).step_by(64) {
                    let some = 64.min(count - start);
                    built.clear();
                    for r in first + start..first + start + some {
                        built.extend_from_slice(matrix.row(r, &mut scratch.row));
                    }
                    let rows = Rows::new(matrix.format(), some, matrix.cols(), &built, row_bytes);
                    let mut out = out.part(0, tokens.len(), start, some);
                    self.rows_product(rows, prepared, tokens, tiles, scratch, &mut out);
                }
                scratch.rows = built;
            }
        }
        if let Some(bias) = bias {
            let bias = &bias[first..first + count];
            for i in 0..tokens.len() {
                for (out, bias) in out.row(i).iter_mut().zip(bias) {
                    *out += bias;
                }
            }
        }
    }

    fn rows_product(
        &self,
        rows: Rows<'_>,
        prepared: &Prepared,
        tokens: &[u32],
        tiles: Option<&[Tile]>,
        scratch: &mut Scratch,
        out: &mut Columns<'_, f32>,
    ) {
        if let Some(tiles) = tiles {
            self.kernels.batch(rows, tiles, scratch, out);
            return;
        }
        let set = prepared.of(self.layout(rows.format));
        let some = if tokens.len() == 1 {
            rows.rows
        } else {
            (FEW_TOKEN_ROW_BYTES / rows.row_bytes()).max(4)
        };
        for start in (0..rows.rows).step_by(some.max(1)) {
            let count = some.min(rows.rows - start);
            let bytes = &rows.bytes[start * rows.stride..];
            let few = Rows::new(rows.format, count, rows.cols, bytes, rows.stride);
            for (i, t) in tokens.iter().enumerate() {
                let out = &mut out.row(i)[start..start + count];
                self.kernels.rows(few, set.token(*t as usize), out);
            }
        }
    }

    pub(super) fn linear_on(
        &self,
        buffers: &mut Buffers,
        x: &[f32],
        tokens: usize,
        jobs: &mut [Linear<'_>],
    ) {
        let Some(cols) = jobs.first().map(|job| job.weight.cols()) else { return };
        if tokens == 0 {
            return;
        }
        for job in jobs.iter() {
            let rows = job.weight.rows();
            assert_eq!(job.weight.cols(), cols, "jobs share their input");
            assert_eq!(job.out.len(), tokens * rows, "output [tokens, rows]");
            assert!(job.bias.is_none_or(|bias| bias.len() == rows), "bias [rows]");
        }
        let Buffers { prepared, tiles } = buffers;
        let formats = jobs.iter().map(|job| job.weight.format());
        self.prepare(prepared, x, tokens, cols, formats);
        let all: Vec<u32> = (0..tokens as u32).collect();
        tiles.clear();
        let ranges: Vec<Option<TileRange>> = jobs
            .iter()
            .map(|job| tiles.plan(self.kernels, job.weight.format(), 0, tokens))
            .collect();
        self.pack(tiles, prepared, &[&all]);
        let cuts: Vec<Vec<usize>> = jobs
            .iter()
            .zip(&ranges)
            .map(|(job, range)| self.cut(&job.weight, tokens, jobs.len(), range.is_some()))
            .collect();
        let row_bounds = [0, tokens];
        let mut units = Vec::new();
        let mut targets = Vec::new();
        for (j, (job, cut)) in jobs.iter_mut().zip(&cuts).enumerate() {
            units.extend((0..cut.len() - 1).map(|c| (j, c)));
            let rows = job.weight.rows();
            targets.push((job.weight, job.bias, Grid::new(job.out, rows, &row_bounds, cut)));
        }
        let (prepared, tiles) = (&*prepared, &*tiles);
        self.pool.run(units.len(), &|worker, unit| {
            let (j, c) = units[unit];
            let (matrix, bias, grid) = &targets[j];
            let tiles = ranges[j].as_ref().map(|range| tiles.get(range));
            let scratch = &mut lock(&self.scratch[worker]);
            let out = &mut grid.take(0, c);
            self.product(matrix, cuts[j][c], *bias, prepared, &all, tiles, scratch, out);
        });
    }

    /// `out[t, c] = sum_r x[t, r] W[r, c]` in row order, threads over columns.
    pub(super) fn transposed(&self, x: &[f32], tokens: usize, weight: Matrix<'_>, out: &mut [f32]) {
        let (rows, cols, format) = (weight.rows(), weight.cols(), weight.format());
        assert_eq!(x.len(), tokens * rows, "input [tokens, rows]");
        assert_eq!(out.len(), tokens * cols, "output [tokens, cols]");
        if tokens == 0 {
            return;
        }
        let align = format.block_len().max(64);
        let each = cols.div_ceil(self.threads() * 2).next_multiple_of(align);
        let cut: Vec<usize> = (0..cols).step_by(each).chain([cols]).collect();
        let row_bounds = [0, tokens];
        let grid = Grid::new(out, cols, &row_bounds, &cut);
        self.pool.run(cut.len() - 1, &|worker, c| {
            let scratch = &mut *lock(&self.scratch[worker]);
            let mut out = grid.take(0, c);
            let width = out.width();
            for t in 0..tokens {
                out.row(t).fill(0.0);
            }
            scratch.floats.resize(width, 0.0);
            let bytes = |c: usize| c / format.block_len() * format.block_bytes();
            for r in 0..rows {
                let row = weight.row(r, &mut scratch.row);
                let row = &row[bytes(cut[c])..bytes(cut[c + 1])];
                self.kernels.dequantise(format, row, &mut scratch.floats);
                for t in 0..tokens {
                    self.kernels.axpy(x[t * rows + r], &scratch.floats, out.row(t));
                }
            }
        });
    }
}
