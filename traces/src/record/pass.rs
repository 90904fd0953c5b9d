//! One pass, as the runtime tells it: by layers, in any order.

use crate::format::Dropped;
use crate::{LayerServed, Row};
use half::f16;
use pregate_predictor::{Fed, Origin, Served, Shape};
use std::ops::Range;

/// Flat lists, so that a buffer is used again and again.
#[derive(Default)]
pub struct Recorded {
    /// What was dropped right before.
    pub gap: Dropped,
    session: u64,
    first_position: usize,
    tokens: Vec<u32>,
    is_prompt: bool,
    routed: Vec<Routed>,
    experts: Vec<u16>,
    weights: Vec<f32>,
    served: Vec<Cost>,
    origins: Vec<(u16, Origin)>,
    /// A number that the format has no room for: an expert of more than 16
    /// bits, a weight that is no half.
    is_odd: bool,
}

struct Routed {
    layer: u32,
    /// Counted from the pass's first.
    token: u32,
    range: Range<usize>,
}

struct Cost {
    layer: u32,
    origins: Range<usize>,
    evictions: u32,
    bytes: u64,
    stall_ns: u64,
}

impl Recorded {
    pub fn begin(&mut self, fed: &Fed<'_>) {
        self.clear();
        self.session = fed.session;
        self.first_position = fed.first_position;
        self.tokens.extend_from_slice(fed.tokens);
        self.is_prompt = fed.is_prompt;
    }

    pub fn routed(&mut self, layer: usize, position: usize, experts: &[u32], weights: &[f32]) {
        let start = self.experts.len();
        for &expert in experts {
            self.is_odd |= expert > u16::MAX.into();
            self.experts.push(expert as u16);
        }
        self.weights.extend_from_slice(weights);
        self.is_odd |= !weights.iter().all(|&weight| f16::from_f32(weight).is_finite());
        self.is_odd |= weights.len() != experts.len();
        let token = position.wrapping_sub(self.first_position);
        self.is_odd |= token >= self.tokens.len();
        let range = start..self.experts.len();
        self.routed.push(Routed { layer: layer as u32, token: token as u32, range });
    }

    pub fn served(&mut self, served: &Served<'_>) {
        let start = self.origins.len();
        let origin = |&(expert, origin): &(u32, Origin)| (expert as u16, origin);
        self.origins.extend(served.experts.iter().map(origin));
        self.served.push(Cost {
            layer: served.layer as u32,
            origins: start..self.origins.len(),
            evictions: served.evictions as u32,
            bytes: served.bytes,
            stall_ns: served.stall_ns,
        });
    }

    pub fn tokens(&self) -> usize {
        self.tokens.len()
    }

    /// Of what was told.
    pub fn bytes(&self) -> u64 {
        let lists = self.tokens.len() * 4
            + self.routed.len() * size_of::<Routed>()
            + self.experts.len() * 6
            + self.origins.len() * 4
            + self.served.len() * size_of::<Cost>();
        lists as u64
    }

    /// Did every token pass all MoE layers?
    pub fn is_whole(&self, moe_layers: usize) -> bool {
        let is_whole = self.routed.len() == moe_layers * self.tokens.len();
        !self.tokens.is_empty() && is_whole
    }

    /// Can it be written?
    pub fn fits(&self) -> bool {
        !self.is_odd
    }

    pub fn clear(&mut self) {
        self.gap = Dropped::default();
        self.is_odd = false;
        self.tokens.clear();
        self.routed.clear();
        self.experts.clear();
        self.weights.clear();
        self.served.clear();
        self.origins.clear();
    }
}

/// Makes rows of passes.
pub struct Rows {
    row: Row,
    /// The layers of the model.
    layers: usize,
    is_moe: Vec<bool>,
    /// `[tokens, layers]`, which of `routed` has it, plus one.
    index: Vec<u32>,
    session: Option<u64>,
}

impl Rows {
    pub fn new(shape: &Shape) -> Self {
        let is_moe: Vec<bool> = shape.layers.iter().map(Option::is_some).collect();
        let layers = is_moe.len();
        Self { row: Row::default(), layers, is_moe, index: Vec::new(), session: None }
    }

    /// Hands every token of `pass` to `push`.
    pub fn of<E>(
        &mut self,
        pass: &Recorded,
        mut push: impl FnMut(&Row) -> Result<(), E>,
    ) -> Result<(), E> {
        self.index.clear();
        self.index.resize(pass.tokens.len() * self.layers, 0);
        for (number, routed) in pass.routed.iter().enumerate() {
            let layer = routed.layer as usize;
            if self.is_moe.get(layer) == Some(&true) {
                self.index[routed.token as usize * self.layers + layer] = number as u32 + 1;
            }
        }
        for (token, &id) in pass.tokens.iter().enumerate() {
            let row = &mut self.row;
            row.clear();
            row.position = (pass.first_position + token) as u32;
            row.token = Some(id);
            row.is_prompt = pass.is_prompt;
            if token == 0 {
                row.pass_tokens = pass.tokens.len() as u32;
                let is_gap = pass.gap != Dropped::default();
                let is_new = self.session != Some(pass.session);
                row.starts_sequence = pass.first_position == 0 || is_new || is_gap;
                row.served.extend(pass.served.iter().map(|cost| LayerServed {
                    layer: cost.layer,
                    origins: pass.origins[cost.origins.clone()].to_vec(),
                    evictions: cost.evictions,
                    bytes: cost.bytes,
                    stall_ns: cost.stall_ns,
                }));
                row.served.sort_by_key(|served| served.layer);
            }
            for &number in &self.index[token * self.layers..][..self.layers] {
                match number.checked_sub(1) {
                    Some(number) => {
                        let range = pass.routed[number as usize].range.clone();
                        row.push_layer(&pass.experts[range.clone()], &pass.weights[range]);
                    }
                    None => row.push_layer(&[], &[]),
                }
            }
            push(row)?;
        }
        self.session = Some(pass.session);
        Ok(())
    }
}
