//! From a trace to its report.

use super::count::Count;
use super::engine::Engine;
use super::machine::Machine;
use super::options::{Options, ReplayError, Warm};
use super::passes::{Pass, Passes};
use super::report::{Bound, Bracket, Counts, Report, Wire};
use crate::check_remembered;
use crate::{Header, Provenance, Row, Source, TraceError};
use pregate_predictor::forecast::{self, Forecaster};
use pregate_predictor::{Policy, Scope, Shape, policy};

/// Tokens between two calls of `progress`.
const TOKENS_PER_CALL: u64 = 256;

/// Replays `source`, from its start, with the policy and the forecasts that
/// `options` name. `progress` hears the tokens so far.
///
/// # Errors
/// Names that nobody has; those of [`replay_with`].
pub fn replay(
    source: &mut dyn Source,
    machine: &Machine,
    options: &Options,
    progress: &mut dyn FnMut(u64),
) -> Result<Report, ReplayError> {
    let shape = shape_of(source.header(), options);
    let unknown = |kind, name: &str, known: &[&str]| ReplayError::Name {
        kind,
        name: name.to_string(),
        known: known.join(", "),
    };
    let policy = policy::by_name(&options.policy)
        .ok_or_else(|| unknown("policy", &options.policy, &policy::NAMES))?;
    let forecaster = match options.forecast.as_str() {
        "none" => None,
        name => Some(
            Forecaster::by_name(name, &shape, options.horizon)
                .ok_or_else(|| unknown("forecast", name, &forecast::NAMES))?,
        ),
    };
    replay_with(source, machine, options, policy, forecaster, progress)
}

/// [`replay`] with a policy and forecasts of the caller's own; the names in
/// `options` are only told.
///
/// # Errors
/// Machines, slots and traces that cannot be replayed.
pub fn replay_with(
    source: &mut dyn Source,
    machine: &Machine,
    options: &Options,
    policy: Box<dyn Policy>,
    forecaster: Option<Forecaster>,
    progress: &mut dyn FnMut(u64),
) -> Result<Report, ReplayError> {
    let shape = shape_of(source.header(), options);
    check_remembered(&shape).map_err(ReplayError::TooWide)?;
    let scope = scope_of(&shape, options, &*policy);
    let mut engine = Engine::new(&shape, machine, options, policy, forecaster)?;
    source.rewind()?;
    let warm_up = run(source, &mut engine, options.warm, progress)?;
    if engine.totals.phases.iter().all(|phase| phase.tokens == 0) {
        return Err(ReplayError::Empty);
    }
    let mut report = report(&mut engine, source.header(), machine, options);
    if options.bracket {
        let slots = options.slots.per_layer(&shape);
        report.bracket =
            Some(bracket(source, (&slots, scope), (options.warm, warm_up), report.hits)?);
    }
    Ok(report)
}

/// The shape of the trace with the bytes of experts.
fn shape_of(header: &Header, options: &Options) -> Shape {
    let mut shape = header.shape.clone();
    if let Some(bytes) = options.expert_bytes {
        shape.layers.iter_mut().flatten().for_each(|layer| layer.expert_bytes = bytes);
    }
    shape
}

/// Whose slots the policy's layers share: known once it has seen them.
fn scope_of(shape: &Shape, options: &Options, policy: &dyn Policy) -> Scope {
    let slots = options.slots.per_layer(shape);
    let by_name = policy::by_name(policy.name());
    by_name.map_or(Scope::Pool, |mut same| {
        same.prepare(shape, &slots);
        same.scope()
    })
}

/// Runs the trace; answers the passes that only warmed the caches.
fn run(
    source: &mut dyn Source,
    engine: &mut Engine,
    warm: Warm,
    progress: &mut dyn FnMut(u64),
) -> Result<u64, TraceError> {
    let warm_tokens = match warm {
        Warm::Cold => 0,
        Warm::Tokens(tokens) => tokens,
        Warm::Whole => u64::MAX,
    };
    let warm_up = through(source, engine, warm_tokens, progress)?;
    if warm == Warm::Whole {
        source.rewind()?;
        engine.begin_counting();
        through(source, engine, 0, progress)?;
    }
    Ok(warm_up)
}

/// Runs what is left of the trace and begins to count when `warm_tokens` were
/// seen; answers the passes before.
fn through(
    source: &mut dyn Source,
    engine: &mut Engine,
    warm_tokens: u64,
    progress: &mut dyn FnMut(u64),
) -> Result<u64, TraceError> {
    let (mut pass, mut passes, mut warm_up) = (Pass::default(), Passes::new(source), 0);
    let (mut is_warming, mut told) = (warm_tokens > 0, engine.totals.tokens_seen());
    while passes.next(&mut pass)? {
        if is_warming && engine.totals.tokens_seen() >= warm_tokens {
            engine.begin_counting();
            is_warming = false;
        }
        engine.pass(&mut pass);
        warm_up += u64::from(is_warming);
        if engine.totals.tokens_seen() >= told + TOKENS_PER_CALL {
            told = engine.totals.tokens_seen();
            progress(told);
        }
    }
    if is_warming {
        // Nothing is left to count.
        engine.begin_counting();
    }
    progress(engine.totals.tokens_seen());
    Ok(warm_up)
}

/// A trace, and the same once more.
struct Twice<'s> {
    source: &'s mut dyn Source,
    is_again: bool,
}

impl Source for Twice<'_> {
    fn header(&self) -> &Header {
        self.source.header()
    }

    fn next(&mut self, row: &mut Row) -> Result<bool, TraceError> {
        if self.source.next(row)? {
            return Ok(true);
        }
        if std::mem::replace(&mut self.is_again, true) {
            return Ok(false);
        }
        self.source.rewind()?;
        self.source.next(row)
    }

    fn rewind(&mut self) -> Result<(), TraceError> {
        self.is_again = false;
        self.source.rewind()
    }
}

/// LRU's and Belady's hits on the passes that count.
fn bracket(
    source: &mut dyn Source,
    (slots, scope): (&[usize], Scope),
    (warm, warm_up): (Warm, u64),
    this_hits: u64,
) -> Result<Bracket, ReplayError> {
    let mut source = Twice { source, is_again: warm != Warm::Whole };
    let count = Count { slots, warm_up };
    let source: &mut dyn Source = match warm {
        Warm::Whole => &mut source,
        _ => source.source,
    };
    let lru_hits = count.lru(source)?.hits;
    let belady_hits = count.belady(source, Scope::Layer, false)?.hits;
    let best_hits = count.belady(source, scope, true)?.hits;
    Ok(Bracket { no_cache_hits: 0, lru_hits, this_hits, belady_hits, best_hits })
}

fn report(engine: &mut Engine, header: &Header, machine: &Machine, options: &Options) -> Report {
    let (tpot, ttft) = engine.totals.times();
    let mut layers = std::mem::take(&mut engine.totals.layers);
    let mut phases = engine.totals.phases;
    let mut all = Counts::default();
    let (mut ahead_useful, mut ahead_wasted) = (0, 0);
    for (phase, is_token) in phases.iter_mut().zip([true, false]) {
        for (layer, counts) in layers.iter_mut().zip(engine.drive.counts(is_token)) {
            phase.counts.add(counts);
            layer.counts.add(counts);
            all.add(counts);
            ahead_useful += counts.prefetch_useful;
            ahead_wasted += counts.prefetch_wasted;
        }
    }
    let [decode, prompts] = phases;
    let tokens = decode.tokens + prompts.tokens;
    let moe: Vec<usize> = layers.iter().map(|layer| layer.slots).filter(|&one| one > 0).collect();
    let synthetic_from = match &header.source {
        Provenance::Synthetic { from, .. } => Some(from.clone()),
        _ => None,
    };
    let tpot = tpot.unwrap_or_default();
    Report {
        trace: options.trace.clone(),
        model: header.model.clone(),
        synthetic_from,
        machine: machine.name.clone(),
        policy: options.policy.clone(),
        rules: engine.drive.planner().cache().rules(),
        forecast: options.forecast.clone(),
        warm: !matches!(options.warm, Warm::Cold | Warm::Tokens(0)),
        slots_per_layer: moe.iter().sum::<usize>() / moe.len().max(1),
        accesses: all.accesses,
        hits: all.hits,
        misses: all.misses,
        evictions: all.evictions,
        bytes: all.bytes(),
        hit_ratio: all.hit_ratio(),
        bytes_per_token: all.bytes() as f64 / tokens.max(1) as f64,
        tok_s: if tpot.mean_ns > 0.0 { 1e9 / tpot.mean_ns } else { 0.0 },
        bound: engine.bound(&decode),
        tpot,
        ttft,
        decode,
        prompts,
        ahead_useful,
        ahead_wasted,
        bracket: None,
        layers,
    }
}

/// The time of the busiest wire.
pub(super) fn bound_of(busy_ns: [f64; 4]) -> Bound {
    let wires = [Wire::Vram, Wire::Link, Wire::Cpu, Wire::Disk].into_iter().zip(busy_ns);
    let (wire, longest) = wires.max_by(|a, b| a.1.total_cmp(&b.1)).unwrap_or((Wire::Vram, 0.0));
    Bound { tok_s: if longest > 0.0 { 1e9 / longest } else { 0.0 }, wire, busy_ns }
}
