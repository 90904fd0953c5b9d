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

/// The choices of a chunk gathered by expert: each choice has a row, and the
/// rows of an expert follow each other.
#[derive(Clone, Debug, Default)]
pub struct Grouping {
    /// Expert and first row, by expert.
    groups: Vec<(u32, usize)>,
    /// `[rows]`: the token of each row.
    token_of: Vec<u32>,
    /// `[choices]`: the row of each of [`Routes::all`].
    row_of: Vec<u32>,
    order: Vec<u32>,
}

impl Grouping {
    /// Gathers `routes`, reusing the buffers.
    pub fn gather(&mut self, routes: &Routes) {
        let all = routes.all();
        self.order.clear();
        self.order.extend(0..all.len() as u32);
        // Stable: an expert's tokens stay in order.
        self.order.sort_by_key(|&choice| all[choice as usize].expert);
        self.token_of.clear();
        self.token_of.resize(all.len(), 0);
        self.row_of.clear();
        self.row_of.resize(all.len(), 0);
        self.groups.clear();
        for (row, &choice) in self.order.iter().enumerate() {
            self.row_of[choice as usize] = row as u32;
            let expert = all[choice as usize].expert;
            if self.groups.last().is_none_or(|(last, _)| *last != expert) {
                self.groups.push((expert, row));
            }
        }
        for token in 0..routes.tokens() {
            let start = routes.start(token);
            for choice in start..start + routes.of(token).len() {
                self.token_of[self.row_of[choice] as usize] = token as u32;
            }
        }
    }

    /// Distinct experts.
    pub fn len(&self) -> usize {
        self.groups.len()
    }

    pub fn is_empty(&self) -> bool {
        self.groups.is_empty()
    }

    /// Rows of all experts together.
    pub fn rows(&self) -> usize {
        self.token_of.len()
    }

    /// The distinct experts, rising.
    pub fn experts(&self) -> impl Iterator<Item = u32> {
        self.groups.iter().map(|(expert, _)| *expert)
    }

    /// Group `index` with the weights of its expert.
    pub fn group<'a>(&'a self, index: usize, weights: ExpertWeights<'a>) -> ExpertGroup<'a> {
        let first_row = self.groups[index].1;
        let end = self.groups.get(index + 1).map_or(self.rows(), |(_, row)| *row);
        ExpertGroup { weights, tokens: &self.token_of[first_row..end], first_row }
    }

    /// The group of an expert.
    pub fn index_of(&self, expert: u32) -> Option<usize> {
        self.groups.binary_search_by_key(&expert, |(expert, _)| *expert).ok()
    }

    /// The row of choice `choice` of [`Routes::all`].
    pub fn row_of(&self, choice: usize) -> usize {
        self.row_of[choice] as usize
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

/// One expert and the tokens that chose it, for [`Backend::expert_rows`].
#[derive(Clone, Copy, Debug)]
pub struct ExpertGroup<'a> {
    pub weights: ExpertWeights<'a>,
    /// Rows of the input, each once.
    pub tokens: &'a [u32],
    /// The first of `tokens.len()` rows of the answers.
    pub first_row: usize,
}

/// Some of a layer's routed experts on the tokens that chose them.
pub struct ExpertRows<'a> {
    /// `[tokens, hidden]`
    pub x: &'a [f32],
    pub tokens: usize,
    /// Not empty, of one shape, in rising order of `first_row`, rows
    /// disjoint.
    pub groups: &'a [ExpertGroup<'a>],
    pub activation: GatedActivation,
    /// `[rows, hidden]`; the groups' rows are overwritten, others are left.
    pub answers: &'a mut [f32],
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

    /// What each expert answers to each of its tokens. A row does not depend
    /// on which groups share a call, so experts may be computed as they
    /// arrive.
    fn expert_rows(&self, call: ExpertRows<'_>);

    /// `out[t] = fma(w_n, y_n, ... fma(w_1, y_1, 0))` over the choices of
    /// token `t` in router order, `y_i` being the row of `answers` that
    /// `grouping` gives the choice. `out` is `[tokens, hidden]`.
    fn combine(&self, routes: &Routes, grouping: &Grouping, answers: &[f32], out: &mut [f32]);

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

    /// Work will come soon: threads that sleep come back and look for it for a
    /// while. Changes no answer.
    fn rouse(&self) {}

    /// Calls `task(i)` for every `i < count`, on all of the device's host
    /// threads, and returns when all are done.
    fn for_each(&self, count: usize, task: &(dyn Fn(usize) + Sync));
}
