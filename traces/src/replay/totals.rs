//! Adds up what a replay sees.

use super::report::{Counts, LayerReport, PhaseReport, Spread, Stall, Times};
use pregate_predictor::drive::LayerCounts;
use pregate_predictor::{ExpertId, Request, Shape};

/// Sums over the passes that count.
pub struct Totals {
    /// `[layers]`; counts are the drive's and join at the end.
    pub layers: Vec<LayerReport>,
    /// Decode, and prompts.
    pub phases: [PhaseReport; 2],
    decoded: Times,
    prompts: Times,
    /// Of the prompt that runs.
    prompt_ns: u64,
    tokens_seen: u64,
    /// The pass that runs is a prompt's.
    is_prompt: bool,
}

impl Totals {
    pub fn new(shape: &Shape, slots: &[usize]) -> Self {
        let layer = |(index, &slots): (usize, &usize)| {
            let experts = shape.layer(index).map_or(0, |layer| layer.experts);
            let (expert_accesses, expert_hits) = (vec![0; experts], vec![0; experts]);
            LayerReport { slots, expert_accesses, expert_hits, ..LayerReport::default() }
        };
        Self {
            layers: slots.iter().enumerate().map(layer).collect(),
            phases: [PhaseReport::default(); 2],
            decoded: Times::default(),
            prompts: Times::default(),
            prompt_ns: 0,
            tokens_seen: 0,
            is_prompt: false,
        }
    }

    /// Tokens since the engine was made.
    pub fn tokens_seen(&self) -> u64 {
        self.tokens_seen
    }

    pub fn begin_counting(&mut self) {
        self.phases = [PhaseReport::default(); 2];
        (self.decoded, self.prompts) = (Times::default(), Times::default());
        self.prompt_ns = 0;
        for layer in &mut self.layers {
            layer.stall = Stall::default();
            layer.expert_accesses.fill(0);
            layer.expert_hits.fill(0);
        }
    }

    /// A pass begins, of a prompt or of decoded tokens.
    pub fn begin_pass(&mut self, is_start: bool, is_prompt: bool) {
        if is_start || !is_prompt {
            self.end_prompt();
        }
        self.is_prompt = is_prompt;
    }

    /// A layer of the pass was served.
    pub fn served(&mut self, layer: usize, request: &Request, stall: Stall) {
        let Request { resident, early, in_flight, missing, .. } = request;
        let found = &mut self.layers[layer];
        found.stall.add(&stall);
        self.phases[usize::from(self.is_prompt)].stall.add(&stall);
        let mut note = |ids: &[ExpertId]| {
            ids.iter().for_each(|id| found.expert_accesses[id.expert()] += 1);
        };
        [resident, early, in_flight, missing].into_iter().for_each(|ids| note(ids));
        resident.iter().for_each(|id| found.expert_hits[id.expert()] += 1);
    }

    /// A pass is over.
    pub fn passed(&mut self, tokens: usize, ns: u64) {
        self.tokens_seen += tokens as u64;
        let phase = &mut self.phases[usize::from(self.is_prompt)];
        phase.passes += 1;
        phase.tokens += tokens as u64;
        phase.time_ns += ns;
        match self.is_prompt {
            true => self.prompt_ns += ns,
            false => self.decoded.add(ns),
        }
    }

    fn end_prompt(&mut self) {
        if self.prompt_ns > 0 {
            self.prompts.add(std::mem::take(&mut self.prompt_ns));
        }
    }

    /// Times of decoded tokens, and of prompts to the first token.
    pub fn times(&mut self) -> (Option<Spread>, Option<Spread>) {
        self.end_prompt();
        (self.decoded.spread(), self.prompts.spread())
    }
}

impl Stall {
    pub(super) fn add(&mut self, other: &Self) {
        self.demand_ns += other.demand_ns;
        self.behind_read_ahead_ns += other.behind_read_ahead_ns;
        self.late_read_ahead_ns += other.late_read_ahead_ns;
        self.cpu_ns += other.cpu_ns;
        self.visits_ns += other.visits_ns;
    }

    /// What was added since `before`.
    pub(super) fn since(&self, before: &Self) -> Self {
        Self {
            demand_ns: self.demand_ns - before.demand_ns,
            behind_read_ahead_ns: self.behind_read_ahead_ns - before.behind_read_ahead_ns,
            late_read_ahead_ns: self.late_read_ahead_ns - before.late_read_ahead_ns,
            cpu_ns: self.cpu_ns - before.cpu_ns,
            visits_ns: self.visits_ns - before.visits_ns,
        }
    }
}

impl Counts {
    pub(super) fn add(&mut self, layer: &LayerCounts) {
        self.accesses += layer.hits + layer.early + layer.in_flight + layer.misses;
        self.hits += layer.hits;
        self.early += layer.early;
        self.in_flight += layer.in_flight;
        self.misses += layer.misses;
        self.left += layer.left;
        self.evictions += layer.evictions;
        self.bypassed += layer.bypassed;
        self.bytes_demand += layer.bytes_demand;
        self.bytes_ahead += layer.bytes_prefetch;
        self.bytes_wasted += layer.bytes_wasted;
    }
}
