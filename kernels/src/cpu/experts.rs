//! Routed experts and dense feed-forward blocks.

use super::Cpu;
use super::linear::{Prepared, TileRange, Tiles};
use super::pool::{Columns, Grid, lock};
use crate::backend::{ExpertGroup, ExpertRows, ExpertWeights, GatedActivation, Grouping, Routes};

#[derive(Default)]
pub(super) struct Buffers {
    input: Prepared,
    inner: Prepared,
    tiles: Tiles,
    /// `[rows, inner]`, the rows of one call's groups in their order.
    hidden: Vec<f32>,
}

/// How the units of one pass over all groups are cut.
struct Pass {
    row_bounds: Vec<usize>,
    cut: Vec<usize>,
    /// Per group: tiles of its matrices, where a batch pays.
    tiles: Vec<[Option<TileRange>; 2]>,
}

impl Cpu {
    pub(super) fn rows_of_experts(&self, buffers: &mut Buffers, call: ExpertRows<'_>) {
        let ExpertRows { x, tokens, groups, activation, answers } = call;
        let Some(first) = groups.first() else { return };
        let hidden = first.weights.down.rows();
        assert_eq!(x.len(), tokens * hidden, "input [tokens, hidden]");
        self.grouped(buffers, x, tokens, hidden, groups, activation, answers);
    }

    pub(super) fn combine_rows(
        &self,
        routes: &Routes,
        grouping: &Grouping,
        answers: &[f32],
        out: &mut [f32],
    ) {
        let tokens = routes.tokens();
        if tokens == 0 {
            return;
        }
        let hidden = out.len() / tokens;
        assert_eq!(out.len(), tokens * hidden, "output [tokens, hidden]");
        let combine = |t: usize, out: &mut [f32]| {
            out.fill(0.0);
            for (choice, at) in routes.of(t).iter().zip(routes.start(t)..) {
                let row = grouping.row_of(at);
                self.kernels.axpy(choice.weight, &answers[row * hidden..(row + 1) * hidden], out);
            }
        };
        if tokens == 1 {
            combine(0, out);
        } else {
            let mut rows: Vec<&mut [f32]> = out.chunks_exact_mut(hidden).collect();
            self.pool.each_mut(&mut rows, |_, t, out| combine(t, out));
        }
    }

    pub(super) fn dense(
        &self,
        buffers: &mut Buffers,
        x: &[f32],
        tokens: usize,
        weights: ExpertWeights<'_>,
        activation: GatedActivation,
        out: &mut [f32],
    ) {
        if tokens == 0 {
            return;
        }
        let hidden = weights.down.rows();
        assert_eq!(out.len(), tokens * hidden, "output [tokens, hidden]");
        let all: Vec<u32> = (0..tokens as u32).collect();
        let group = ExpertGroup { weights, tokens: &all, first_row: 0 };
        self.grouped(buffers, x, tokens, hidden, &[group], activation, out);
    }

    /// Every group's expert on its tokens; see [`ExpertRows`].
    #[allow(clippy::too_many_arguments)]
    fn grouped(
        &self,
        buffers: &mut Buffers,
        x: &[f32],
        tokens: usize,
        hidden: usize,
        groups: &[ExpertGroup<'_>],
        activation: GatedActivation,
        answers: &mut [f32],
    ) {
        let Some(first) = groups.first() else { return };
        let inner = first.weights.gate.rows();
        for ExpertGroup { weights, .. } in groups {
            check(weights, hidden, inner);
        }
        let Buffers { input, inner: inner_prepared, tiles, hidden: buffer, .. } = buffers;
        let rows: usize = groups.iter().map(|group| group.tokens.len()).sum();

        // Gate, up and the activation.
        let formats = groups.iter().flat_map(|g| [g.weights.gate.format(), g.weights.up.format()]);
        self.prepare(input, x, tokens, hidden, formats);
        let lists: Vec<&[u32]> = groups.iter().map(|group| group.tokens).collect();
        let pass = self.plan(tiles, groups, |w| [w.gate, w.up]);
        self.pack(tiles, input, &lists);
        buffer.resize(rows * inner, 0.0);
        let grid = Grid::new(buffer, inner, &pass.row_bounds, &pass.cut);
        let cells = pass.cut.len() - 1;
        self.pool.run(groups.len() * cells, &|worker, unit| {
            let (g, c) = (unit / cells, unit % cells);
            let ExpertGroup { weights, tokens, .. } = &groups[g];
            let scratch = &mut *lock(&self.scratch[worker]);
            let mut gate = grid.take(g, c);
            let [gate_tiles, up_tiles] =
                pass.tiles[g].each_ref().map(|range| range.as_ref().map(|range| tiles.get(range)));
            let (first, width) = (pass.cut[c], gate.width());
            let bias = weights.gate_bias;
            self.product(&weights.gate, first, bias, input, tokens, gate_tiles, scratch, &mut gate);
            let mut up_buffer = std::mem::take(&mut scratch.more_floats);
            up_buffer.resize(tokens.len() * width, 0.0);
            let mut up = Columns::of(&mut up_buffer[..tokens.len() * width], width, 0, width);
            let bias = weights.up_bias;
            self.product(&weights.up, first, bias, input, tokens, up_tiles, scratch, &mut up);
            for i in 0..tokens.len() {
                self.kernels.gate(activation, gate.row(i), up.row(i));
            }
            scratch.more_floats = up_buffer;
        });
        drop(grid);

        // Down.
        let formats = groups.iter().map(|group| group.weights.down.format());
        self.prepare(inner_prepared, buffer, rows, inner, formats);
        let own_rows: Vec<u32> = (0..rows as u32).collect();
        let lists: Vec<&[u32]> =
            pass.row_bounds.windows(2).map(|rows| &own_rows[rows[0]..rows[1]]).collect();
        let pass = self.plan(tiles, groups, |w| [w.down, w.down]);
        self.pack(tiles, inner_prepared, &lists);
        // Bounds of the groups' rows, and of the gaps between them, in turn.
        let bounds: Vec<usize> =
            groups.iter().flat_map(|g| [g.first_row, g.first_row + g.tokens.len()]).collect();
        let grid = Grid::new(answers, hidden, &bounds, &pass.cut);
        let cells = pass.cut.len() - 1;
        self.pool.run(groups.len() * cells, &|worker, unit| {
            let (g, c) = (unit / cells, unit % cells);
            let weights = &groups[g].weights;
            let scratch = &mut *lock(&self.scratch[worker]);
            let down_tiles = pass.tiles[g][0].as_ref().map(|range| tiles.get(range));
            self.product(
                &weights.down,
                pass.cut[c],
                weights.down_bias,
                inner_prepared,
                lists[g],
                down_tiles,
                scratch,
                &mut grid.take(2 * g, c),
            );
        });
    }

    fn plan<'a>(
        &self,
        tiles: &mut Tiles,
        groups: &[ExpertGroup<'a>],
        matrices: impl Fn(&ExpertWeights<'a>) -> [crate::Matrix<'a>; 2],
    ) -> Pass {
        tiles.clear();
        let mut row_bounds = vec![0];
        let mut ranges = Vec::with_capacity(groups.len());
        let mut most = 0;
        let mut any_batch = false;
        for (g, group) in groups.iter().enumerate() {
            let count = group.tokens.len();
            most = most.max(count);
            row_bounds.push(row_bounds[g] + count);
            let pair = matrices(&group.weights)
                .map(|matrix| tiles.plan(self.kernels, matrix.format(), g, count));
            any_batch |= pair.iter().any(Option::is_some);
            ranges.push(pair);
        }
        let [matrix, _] = matrices(&groups[0].weights);
        Pass { row_bounds, cut: self.cut(&matrix, most, groups.len(), any_batch), tiles: ranges }
    }
}

fn check(weights: &ExpertWeights<'_>, hidden: usize, inner: usize) {
    let shape = |m: &crate::Matrix<'_>| (m.rows(), m.cols());
    assert_eq!(shape(&weights.gate), (inner, hidden), "gate [inner, hidden]");
    assert_eq!(shape(&weights.up), (inner, hidden), "up [inner, hidden]");
    assert_eq!(shape(&weights.down), (hidden, inner), "down [hidden, inner]");
    let fits = |bias: Option<&[f32]>, rows: usize| bias.is_none_or(|bias| bias.len() == rows);
    assert!(fits(weights.gate_bias, inner) && fits(weights.up_bias, inner), "bias [inner]");
    assert!(fits(weights.down_bias, hidden), "bias [hidden]");
}
