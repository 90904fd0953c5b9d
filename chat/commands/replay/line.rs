//! The fields of `--json`, one object for each setting; scripts read them by
//! name.

use super::runs::{Asked, Run};
use pregate_traces::replay::{Report, Spread, Stall, Warm, Wire};
use serde::Serialize;
use std::collections::BTreeMap;

#[derive(Serialize)]
pub struct Line<'a> {
    trace: &'a str,
    model: &'a str,
    /// What a synthetic trace was made after; `null` for real routing.
    synthetic_from: Option<&'a str>,
    /// What is missing from the trace: it was cut off, or passes were dropped
    /// while it was recorded; `null` where nothing is known to be.
    notice: Option<&'a str>,
    /// Who says how large experts are.
    weights: &'a str,
    machine: &'a str,
    policy: &'a str,
    /// What layers go by at the end, where the policy has several rules, with
    /// how many layers each.
    rules: BTreeMap<&'a str, usize>,
    forecast: &'a str,
    warm: bool,
    /// That only warmed the caches.
    warm_tokens: u64,
    /// The mean over MoE layers, rounded down, and each MoE layer's.
    slots_per_layer: usize,
    slots: Vec<usize>,
    /// Whether the machine has memory for so many, beside all other weights
    /// and the KV cache.
    fits: bool,
    tokens: u64,
    prompt_tokens: u64,
    /// Experts asked for, in a slot, read ahead and there, on their way, and
    /// nowhere.
    accesses: u64,
    hits: u64,
    early: u64,
    in_flight: u64,
    misses: u64,
    hit_ratio: f64,
    evictions: u64,
    bytes: u64,
    bytes_ahead: u64,
    bytes_wasted: u64,
    bytes_per_token: f64,
    ahead_useful: u64,
    ahead_wasted: u64,
    /// Of the same slots; `null` where they were not counted.
    no_cache_hits: Option<u64>,
    lru_hits: Option<u64>,
    belady_hits: Option<u64>,
    /// The most that any policy could hit in this one's scope.
    best_hits: Option<u64>,
    /// Share of the way from LRU to the best; `null` where they tie.
    gap_closed: Option<f64>,
    tok_s: f64,
    tpot_ms: Times,
    /// `null`: no prompts in the trace.
    ttft_ms: Option<Times>,
    /// Of decode, by what was waited for.
    stall_ns: Stall,
    bound_tok_s: f64,
    /// "VRAM", "link", "processor" or "disk".
    bound_by: &'static str,
}

#[derive(Clone, Copy, Serialize)]
struct Times {
    mean: f64,
    median: f64,
    p95: f64,
}

impl From<Spread> for Times {
    fn from(spread: Spread) -> Self {
        let ms = |ns: u64| ns as f64 / 1e6;
        Self { mean: spread.mean_ns / 1e6, median: ms(spread.median_ns), p95: ms(spread.p95_ns) }
    }
}

pub fn wire(wire: Wire) -> &'static str {
    match wire {
        Wire::Vram => "VRAM",
        Wire::Link => "link",
        Wire::Cpu => "processor",
        Wire::Disk => "disk",
    }
}

impl<'a> Line<'a> {
    pub fn new(asked: &'a Asked, run: &'a Run) -> Self {
        let subject = &asked.subjects[run.job.trace];
        let report: &Report = &run.report;
        let bracket = report.bracket;
        let both = |of: fn(&pregate_traces::replay::Counts) -> u64| {
            of(&report.decode.counts) + of(&report.prompts.counts)
        };
        Self {
            trace: &report.trace,
            model: &report.model,
            synthetic_from: report.synthetic_from.as_deref(),
            notice: run.notice.as_deref(),
            weights: &subject.weights.words,
            machine: &report.machine,
            policy: &report.policy,
            rules: report.rules.iter().copied().collect(),
            forecast: &report.forecast,
            warm: report.warm,
            warm_tokens: match asked.warm(subject) {
                Warm::Tokens(tokens) => tokens,
                Warm::Whole => subject.tokens,
                Warm::Cold => 0,
            },
            slots_per_layer: report.slots_per_layer,
            slots: report
                .layers
                .iter()
                .zip(&subject.header.shape.layers)
                .filter_map(|(layer, shape)| shape.map(|_| layer.slots))
                .collect(),
            fits: run.fits(),
            tokens: report.decode.tokens,
            prompt_tokens: report.prompts.tokens,
            accesses: report.accesses,
            hits: report.hits,
            early: both(|counts| counts.early),
            in_flight: both(|counts| counts.in_flight),
            misses: report.misses,
            hit_ratio: report.hit_ratio,
            evictions: report.evictions,
            bytes: report.bytes,
            bytes_ahead: both(|counts| counts.bytes_ahead),
            bytes_wasted: both(|counts| counts.bytes_wasted),
            bytes_per_token: report.bytes_per_token,
            ahead_useful: report.ahead_useful,
            ahead_wasted: report.ahead_wasted,
            no_cache_hits: bracket.map(|bracket| bracket.no_cache_hits),
            lru_hits: bracket.map(|bracket| bracket.lru_hits),
            belady_hits: bracket.map(|bracket| bracket.belady_hits),
            best_hits: bracket.map(|bracket| bracket.best_hits),
            gap_closed: bracket.and_then(|bracket| bracket.closed()),
            tok_s: report.tok_s,
            tpot_ms: report.tpot.into(),
            ttft_ms: report.ttft.map(Times::from),
            stall_ns: report.decode.stall,
            bound_tok_s: report.bound.tok_s,
            bound_by: wire(report.bound.wire),
        }
    }
}
