//! The operations that a device offers to the forward pass.
//!
//! Shapes are row-major, outermost first: `[tokens, hidden]` holds token 0's
//! `hidden` values first. Every method panics on lengths that do not match
//! their shapes: shapes come from a validated model description, never from
//! a file or a request.

use crate::matrix::Matrix;
use half::f16;

/// One linear map of a group that shares its input.
pub struct Linear<'a> {
    /// `[rows, cols]`
    pub weight: Matrix<'a>,
    /// `[rows]`
    pub bias: Option<&'a [f32]>,
    /// `[tokens, rows]`, overwritten
    pub out: &'a mut [f32],
}

/// One routed expert of one token.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Choice {
    pub expert: u32,
    pub weight: f32,
}

/// The router's answer for a chunk of tokens: for each token a list of any
/// length, in router order.
#[derive(Clone, Debug, PartialEq)]
pub struct Routes {
    /// `[tokens + 1]`: token `t` owns `choices[starts[t]..starts[t + 1]]`.
    starts: Vec<usize>,
    choices: Vec<Choice>,
}

impl Default for Routes {
    fn default() -> Self {
        Self::new()
    }
}

impl Routes {
    pub fn new() -> Self {
        Self { starts: vec![0], choices: Vec::new() }
    }

    pub fn clear(&mut self) {
        self.starts.truncate(1);
        self.choices.clear();
    }

    /// Adds the next token's list.
    pub fn push(&mut self, choices: &[Choice]) {
        self.choices.extend_from_slice(choices);
        self.starts.push(self.choices.len());
    }

    pub fn tokens(&self) -> usize {
        self.starts.len() - 1
    }

    pub fn of(&self, token: usize) -> &[Choice] {
        &self.choices[self.starts[token]..self.starts[token + 1]]
    }

    /// All choices, token after token.
    pub fn all(&self) -> &[Choice] {
        &self.choices
    }

    /// Index into [`Routes::all`] of token `token`'s first choice.
    pub fn start(&self, token: usize) -> usize {
        self.starts[token]
    }
}

/// The three matrices of one expert, or of a dense feed-forward layer.
#[derive(Clone, Copy, Debug)]
pub struct ExpertWeights<'a> {
    /// `[inner, hidden]`
    pub gate: Matrix<'a>,
    /// `[inner, hidden]`
    pub up: Matrix<'a>,
    /// `[hidden, inner]`
    pub down: Matrix<'a>,
    /// `[inner]`
    pub gate_bias: Option<&'a [f32]>,
    /// `[inner]`
    pub up_bias: Option<&'a [f32]>,
    /// `[hidden]`
    pub down_bias: Option<&'a [f32]>,
}

/// What stands between gate/up and down.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum GatedActivation {
    /// `silu(gate) * up`
    Silu,
    /// gpt-oss: `g = min(gate, limit)`, `u = clamp(up, -limit, limit)`,
    /// `(u + 1) * g * sigmoid(alpha * g)`
    ClampedSwiglu { alpha: f32, limit: f32 },
}

/// The routed experts of one layer for a chunk of tokens.
pub struct ExpertCall<'a> {
    /// `[tokens, hidden]`
    pub x: &'a [f32],
    pub routes: &'a Routes,
    /// Weights of an expert that `routes` names.
    pub weights: &'a (dyn Fn(u32) -> ExpertWeights<'a> + Sync),
    pub activation: GatedActivation,
    /// `[tokens, hidden]`, overwritten with
    /// `fma(w_n, y_n, ... fma(w_1, y_1, 0))` in router order.
    pub out: &'a mut [f32],
}

/// The cells of a key or value cache.
#[derive(Clone, Copy, Debug)]
pub enum KvCells<'a> {
    F16(&'a [f16]),
    F32(&'a [f32]),
}

/// Keys or values of all positions so far: head `h` of position `p` is the
/// `width` cells from `h * head_stride + p * position_stride`.
#[derive(Clone, Copy, Debug)]
pub struct KvView<'a> {
    pub cells: KvCells<'a>,
    pub head_stride: usize,
    pub position_stride: usize,
    pub width: usize,
}

/// Causal attention of a chunk of queries at positions
/// `first_position .. first_position + tokens` over a cache that already
/// holds their keys and values.
pub struct AttentionCall<'a> {
    /// `[tokens, heads, keys.width]`
    pub q: &'a [f32],
    pub tokens: usize,
    pub heads: usize,
    /// Query heads `h * heads / kv_heads ..` share cache head `h`.
    pub kv_heads: usize,
    pub keys: KvView<'a>,
    pub values: KvView<'a>,
    pub first_position: usize,
    /// Multiplies `q . k` before the softmax.
    pub scale: f32,
    /// A query sees this many positions, itself included; `None`: all.
    pub window: Option<usize>,
    /// `[heads]`: a logit per head that takes part in the softmax and has no
    /// value (gpt-oss).
    pub sinks: Option<&'a [f32]>,
    /// `[tokens, heads, values.width]`, overwritten
    pub out: &'a mut [f32],
}

/// A device that can run the heavy parts of a forward pass.
pub trait Backend: Send + Sync {
    /// What runs and why, for people: "CPU, 2 threads, AVX-512 VNNI".
    fn describe(&self) -> String;

    /// `out[t, r] = sum_c x[t, c] * W[r, c] + bias[r]` for each job.
    /// `x` is `[tokens, cols]`.
    fn linear(&self, x: &[f32], tokens: usize, jobs: &mut [Linear<'_>]);

    /// `out[t, c] = sum_r x[t, r] * W[r, c]`: the product with the transposed
    /// matrix, for the absorbed projections of latent attention.
    /// `x` is `[tokens, rows]`, `out` `[tokens, cols]`.
    fn linear_transposed(&self, x: &[f32], tokens: usize, weight: Matrix<'_>, out: &mut [f32]);

    /// Routed experts, weighted and added in router order.
    fn experts(&self, call: ExpertCall<'_>);

    /// A feed-forward block that every token takes: `[tokens, hidden]` to
    /// `[tokens, hidden]`.
    fn feed_forward(
        &self,
        x: &[f32],
        tokens: usize,
        weights: ExpertWeights<'_>,
        activation: GatedActivation,
        out: &mut [f32],
    );

    fn attention(&self, call: AttentionCall<'_>);

    /// Calls `task(i)` for every `i < count`, on all of the device's host
    /// threads, and returns when all are done.
    fn for_each(&self, count: usize, task: &(dyn Fn(usize) + Sync));
}
