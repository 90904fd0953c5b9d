//! The oracle: weights dequantised to f32, activations not quantised, plain
//! loops in index order on one thread. It shares no arithmetic with the CPU
//! kernels, so that a mistake in those shows as a difference.

use crate::backend::{
    AttentionCall, Backend, ExpertRows, ExpertWeights, GatedActivation, Grouping, KvCells, KvView,
    Linear, Routes,
};
use crate::dequant::dequantize_row;
use crate::matrix::Matrix;

/// Plain f32 loops.
#[derive(Clone, Copy, Debug, Default)]
pub struct Reference;

impl Backend for Reference {
    fn describe(&self) -> String {
        "reference: plain f32 loops on one CPU thread, weights dequantised".to_string()
    }

    fn linear(&self, x: &[f32], tokens: usize, jobs: &mut [Linear<'_>]) {
        for job in jobs {
            product(&job.weight, job.bias, x, tokens, job.out);
        }
    }

    fn linear_transposed(&self, x: &[f32], tokens: usize, weight: Matrix<'_>, out: &mut [f32]) {
        let (rows, cols) = (weight.rows(), weight.cols());
        assert_eq!(x.len(), tokens * rows);
        assert_eq!(out.len(), tokens * cols);
        out.fill(0.0);
        let mut row = Row::new(cols);
        for r in 0..rows {
            let values = row.load(&weight, r);
            for t in 0..tokens {
                let factor = x[t * rows + r];
                for (sum, value) in out[t * cols..(t + 1) * cols].iter_mut().zip(values) {
                    *sum += factor * value;
                }
            }
        }
    }

    fn expert_rows(&self, call: ExpertRows<'_>) {
        let hidden = call.x.len() / call.tokens.max(1);
        for group in call.groups {
            for (row, token) in (group.first_row..).zip(group.tokens) {
                let x = &call.x[*token as usize * hidden..][..hidden];
                let answer = &mut call.answers[row * hidden..][..hidden];
                gated_block(x, 1, &group.weights, call.activation, answer);
            }
        }
    }

    fn combine(&self, routes: &Routes, grouping: &Grouping, answers: &[f32], out: &mut [f32]) {
        let hidden = out.len() / routes.tokens().max(1);
        for (t, out) in out.chunks_exact_mut(hidden.max(1)).enumerate() {
            out.fill(0.0);
            for (choice, at) in routes.of(t).iter().zip(routes.start(t)..) {
                let row = grouping.row_of(at);
                for (sum, value) in out.iter_mut().zip(&answers[row * hidden..][..hidden]) {
                    *sum += choice.weight * value;
                }
            }
        }
    }

    fn feed_forward(
        &self,
        x: &[f32],
        tokens: usize,
        weights: ExpertWeights<'_>,
        activation: GatedActivation,
        out: &mut [f32],
    ) {
        gated_block(x, tokens, &weights, activation, out);
    }

    fn attention(&self, call: AttentionCall<'_>) {
        let (dk, dv) = (call.keys.width, call.values.width);
        assert_eq!(call.q.len(), call.tokens * call.heads * dk);
        assert_eq!(call.out.len(), call.tokens * call.heads * dv);
        let group = call.heads / call.kv_heads;
        for t in 0..call.tokens {
            let last = call.first_position + t;
            let first = call.window.map_or(0, |window| (last + 1).saturating_sub(window));
            for head in 0..call.heads {
                let at = t * call.heads + head;
                let q = &call.q[at * dk..(at + 1) * dk];
                let mut scores: Vec<f32> = (first..=last)
                    .map(|p| call.scale * dot(q, cells(&call.keys, head / group, p)))
                    .collect();
                let sink = call.sinks.map(|sinks| sinks[head]);
                let top = scores.iter().copied().chain(sink).fold(f32::NEG_INFINITY, f32::max);
                let mut total = sink.map_or(0.0, |sink| (sink - top).exp());
                for score in &mut scores {
                    *score = (*score - top).exp();
                    total += *score;
                }
                let out = &mut call.out[at * dv..(at + 1) * dv];
                out.fill(0.0);
                for (weight, p) in scores.iter().zip(first..) {
                    for (sum, v) in out.iter_mut().zip(cells(&call.values, head / group, p)) {
                        *sum += weight / total * v;
                    }
                }
            }
        }
    }

    fn for_each(&self, count: usize, task: &(dyn Fn(usize) + Sync)) {
        (0..count).for_each(task);
    }
}

/// A dequantised row and the bytes it came from.
struct Row {
    scratch: Vec<u8>,
    values: Vec<f32>,
}

impl Row {
    fn new(cols: usize) -> Self {
        Self { scratch: Vec::new(), values: vec![0.0; cols] }
    }

    fn load(&mut self, weight: &Matrix<'_>, r: usize) -> &[f32] {
        dequantize_row(weight.format(), weight.row(r, &mut self.scratch), &mut self.values);
        &self.values
    }
}

fn product(weight: &Matrix<'_>, bias: Option<&[f32]>, x: &[f32], tokens: usize, out: &mut [f32]) {
    let (rows, cols) = (weight.rows(), weight.cols());
    assert_eq!(x.len(), tokens * cols, "input of a {rows} x {cols} map");
    assert_eq!(out.len(), tokens * rows, "output of a {rows} x {cols} map");
    let mut row = Row::new(cols);
    for r in 0..rows {
        let values = row.load(weight, r);
        for t in 0..tokens {
            let sum = dot(&x[t * cols..(t + 1) * cols], values.iter().copied());
            out[t * rows + r] = sum + bias.map_or(0.0, |bias| bias[r]);
        }
    }
}

fn gated_block(
    x: &[f32],
    tokens: usize,
    weights: &ExpertWeights<'_>,
    activation: GatedActivation,
    out: &mut [f32],
) {
    let inner = weights.gate.rows();
    let mut gate = vec![0.0; tokens * inner];
    let mut up = vec![0.0; tokens * inner];
    product(&weights.gate, weights.gate_bias, x, tokens, &mut gate);
    product(&weights.up, weights.up_bias, x, tokens, &mut up);
    for (g, u) in gate.iter_mut().zip(&up) {
        *g = activate(activation, *g, *u);
    }
    product(&weights.down, weights.down_bias, &gate, tokens, out);
}

fn activate(activation: GatedActivation, gate: f32, up: f32) -> f32 {
    let sigmoid = |v: f32| 1.0 / (1.0 + (-v).exp());
    match activation {
        GatedActivation::Silu => gate * sigmoid(gate) * up,
        GatedActivation::ClampedSwiglu { alpha, limit } => {
            let gate = gate.min(limit);
            let up = up.clamp(-limit, limit);
            (up + 1.0) * (gate * sigmoid(alpha * gate))
        }
    }
}

fn dot(a: &[f32], b: impl Iterator<Item = f32>) -> f32 {
    a.iter().zip(b).fold(0.0, |sum, (a, b)| sum + a * b)
}

fn cells<'a>(view: &KvView<'a>, head: usize, position: usize) -> impl Iterator<Item = f32> + 'a {
    let start = head * view.head_stride + position * view.position_stride;
    let (cells, width) = (view.cells, view.width);
    (start..start + width).map(move |i| match cells {
        KvCells::F16(cells) => cells[i].to_f32(),
        KvCells::F32(cells) => cells[i],
    })
}
