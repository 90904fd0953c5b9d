//! `pregate bench`: prompt and decode speed, beside what the memory allows.

use super::bench_experts;
use crate::{
    bandwidth,
    cli::BenchArgs,
    device::Device,
    exit::Failure,
    expert_speed::median,
    ledger, memory,
    model::{self, Loaded},
    notices, output,
    plan::{self, GpuPlan, Needs, Planned},
    progress::Progress,
    record::Record,
    signals,
    split_speed::{self, Facts, SplitSpeed},
    statistics::{self, FromDisk, PageLocked, Way},
};
use pregate_predictor::roofline::Hits;
use pregate_runtime::{
    Cancel, Model, OpenedModel, Run, Session, SessionOptions, StreamStats, budget::Parts,
    store::ExpertStore,
};
use pregate_traces::AccessLog;
use serde::Serialize;
use std::time::Instant;

/// The fields of `--json`; scripts read them by name.
#[derive(Serialize)]
struct Report {
    model: String,
    backend: String,
    threads: usize,
    n_prompt: usize,
    n_gen: usize,
    /// One sample per repetition.
    prompt_tok_s: Vec<f64>,
    decode_tok_s: Vec<f64>,
    bytes_per_token: u64,
    read_bandwidth_gb_s: f64,
    /// bytes_per_token * median decode tok/s / bandwidth; `null` without
    /// decode samples, and where a GPU and the processor share the experts.
    decode_bandwidth_share: Option<f64>,
    /// What was predicted with the hit ratio that decoding had, where a GPU and
    /// the processor share the experts; `null` also where nothing could be.
    split: Option<SplitSpeed>,
    /// Median decode tok/s / prediction.
    decode_prediction_share: Option<f64>,
    /// "gpu", "whole" or "streaming".
    placement: &'static str,
    /// The memory as planned.
    /// What the GPU holds; `null` where none computes.
    gpu: Option<GpuPlan>,
    /// `null` where no experts are copied to a GPU.
    host_memory: Option<PageLocked>,
    /// `null` where none come from disk below that.
    from_disk: Option<FromDisk>,
    parts: Parts,
    /// Memory of the process's own, without the page cache: the most that it
    /// held behind a repetition.
    held_bytes: Option<u64>,
    /// Of the repetitions; `null` where the whole model is in memory.
    stats: Option<StreamStats>,
    /// Share of the experts that the repetitions' decoding asked for which the
    /// best policy would have had in slots, without reading ahead.
    belady_hit_ratio: Option<f64>,
    /// With `--ledger`; of all rounds.
    ledger: Option<ledger::Report>,
    /// How experts are read.
    disk: Option<String>,
    /// Of the sources, where PREGATE_COMMIT was set at build time.
    commit: Option<&'static str>,
}

pub fn run(args: &BenchArgs) -> Result<(), Failure> {
    if args.experts {
        return bench_experts::run(args);
    }
    if args.n_prompt == 0 && args.n_gen == 0 {
        return Err(Failure::Usage("-p 0 and -n 0: nothing to measure".to_string()));
    }
    let path = model::path_or_demo(args.model.as_deref())?;
    let device = Device::open(&args.device)?;
    device.announce();
    let context = args.n_prompt.max(args.n_gen);
    let options = SessionOptions { context: Some(context), ..SessionOptions::default() };
    let opened = model::open(&path)?;
    let needs = Needs::new(&args.memory, options);
    let planned = plan::make(&opened, &device, &needs)?;
    planned.announce();
    // Half of the bandwidth passes before, half after, and both when the model
    // takes no memory: the same machine, the same minute, the same budget.
    let before = bandwidth::of(&device, &planned)?;
    let facts = facts(&opened, &device, &planned, before)?;
    let placed = model::place(&path, opened, &device, &needs, planned)?;
    let Loaded { model, session, planned } = placed;
    if let Some((facts, gpu)) = facts.as_ref().zip(model.gpu()) {
        gpu.measured(&facts.machine());
    }
    let cancel = Cancel::new();
    signals::cancel_on_interrupt(cancel.clone())?;
    let log = model.store().map(|_| AccessLog::default());
    let mut warned = session.warning();
    let record = Record::start(args.record.as_deref(), &model, &path, &args.memory)?;
    let mut bench = Bench { session, cancel, log, record };

    let per_round = args.n_prompt + args.n_gen;
    let mut bar = Progress::new("measuring", "tokens", per_round * (args.repetitions + 1));
    let (mut prompt_tok_s, mut decode_tok_s) = (Vec::new(), Vec::new());
    let (mut held_bytes, mut warm_up) = (None, None);
    for round in 0..=args.repetitions {
        let done = round * per_round;
        let prompt = bench.prompt(args.n_prompt, round, &mut |n| bar.set(done + n))?;
        let decode = bench.decode(args.n_gen, round, &mut |n| bar.set(done + args.n_prompt + n))?;
        // The first round reads the weights from disk and wakes the threads.
        if round == 0 {
            warm_up = stream_stats(&model);
            bench.log.iter_mut().for_each(AccessLog::end_warm_up);
        } else {
            held_bytes = held_bytes.max(memory::held_bytes());
            prompt_tok_s.extend(prompt);
            decode_tok_s.extend(decode);
        }
        notices::tell_of_disk(&model);
        notices::tell_of_session(&bench.session, &mut warned);
    }
    drop(bar);
    bench.record.iter().for_each(Record::finish);
    let bytes_per_token = model.bytes_per_token();
    let experts = model::experts(model.description());
    let stats = stream_stats(&model).zip(warm_up).map(|(now, before)| now.since(&before));
    let disk = model.store().map(ExpertStore::describe);
    let belady_hit_ratio = bench.belady_hit_ratio(&planned)?;
    let ledger = if args.ledger { ledger::report(&model) } else { None };
    match (args.ledger, &ledger) {
        (true, None) => eprintln!("{}", ledger::NOTHING),
        (true, Some(_)) => {}
        (false, _) => notices::tell_of_forecasts(&model),
    }
    let (host_memory, from_disk) = (PageLocked::of(&model), FromDisk::of(&model));
    drop((bench, model));
    let read_bandwidth_gb_s = before.max(bandwidth::of(&device, &planned)?);
    let split = split(&device, &planned, bytes_per_token, stats.as_ref(), facts.as_ref());
    let report = Report {
        model: path.display().to_string(),
        backend: device.describe(),
        threads: device.threads,
        n_prompt: args.n_prompt,
        n_gen: args.n_gen,
        decode_bandwidth_share: median(&decode_tok_s)
            .filter(|_| !planned.is_split())
            .map(|speed| bytes_per_token as f64 * speed / (read_bandwidth_gb_s * 1e9)),
        decode_prediction_share: median(&decode_tok_s)
            .zip(split.as_ref())
            .map(|(speed, split)| speed / split.predicted_tok_s),
        split,
        prompt_tok_s,
        decode_tok_s,
        bytes_per_token,
        read_bandwidth_gb_s,
        placement: planned.placement(),
        gpu: planned.gpu.clone(),
        host_memory,
        from_disk,
        parts: planned.plan.parts,
        held_bytes,
        stats,
        belady_hit_ratio,
        ledger,
        disk,
        commit: option_env!("PREGATE_COMMIT"),
    };
    if args.json { output::json(&report) } else { print(&report, &experts) }
}

/// What a prediction rests on, where a GPU and the processor share the
/// experts.
fn facts(
    model: &OpenedModel,
    device: &Device,
    planned: &Planned,
    gpu_read_gb_s: f64,
) -> Result<Option<Facts>, Failure> {
    let Some(gpu) = device.gpu.as_ref().filter(|_| planned.is_split()) else { return Ok(None) };
    match Facts::measure(gpu, gpu_read_gb_s, &*device.backend, model) {
        Ok(facts) => Ok(Some(facts)),
        Err(Failure::Resources(why)) => {
            eprintln!("note: no prediction: {why}");
            Ok(None)
        }
        Err(failure) => Err(failure),
    }
}

/// With the hit ratio that decoding had.
fn split(
    device: &Device,
    planned: &Planned,
    bytes_per_token: u64,
    stats: Option<&StreamStats>,
    facts: Option<&Facts>,
) -> Option<SplitSpeed> {
    let (gpu, plan) = device.gpu.as_ref().zip(planned.gpu.as_ref())?;
    if planned.on_disk().is_some() {
        return None;
    }
    let total = stats.map(|stats| stats.decode.total());
    let hits = match total.filter(|total| total.requests() > 0) {
        Some(total) => Hits::Ratio(total.hits as f64 / total.requests() as f64),
        None => Hits::Uniform,
    };
    Some(split_speed::predict(planned, plan, gpu.misses, bytes_per_token, hits, facts?))
}

fn stream_stats(model: &Model) -> Option<StreamStats> {
    model.store().map(ExpertStore::stats)
}

struct Bench {
    session: Session,
    cancel: Cancel,
    /// Of decoding, where experts are streamed.
    log: Option<AccessLog>,
    /// Of prompts and decoding.
    record: Option<Record>,
}

impl Bench {
    /// Tok/s of one prefill from an empty context.
    fn prompt(
        &mut self,
        count: usize,
        round: usize,
        progress: &mut dyn FnMut(usize),
    ) -> Result<Option<f64>, Failure> {
        if count == 0 {
            return Ok(None);
        }
        let ids = self.ids(count, 2 * round);
        self.session.reset();
        let started = Instant::now();
        Record::during(self.record.as_ref(), |observer| {
            let mut run = Run { observer, cancel: &self.cancel, progress: Some(progress) };
            self.session.feed(&ids, &mut run)
        })?;
        Ok(Some(count as f64 / started.elapsed().as_secs_f64()))
    }

    /// Tok/s of decoding, one token at a time from an empty context.
    fn decode(
        &mut self,
        count: usize,
        round: usize,
        progress: &mut dyn FnMut(usize),
    ) -> Result<Option<f64>, Failure> {
        if count == 0 {
            return Ok(None);
        }
        let ids = self.ids(count, 2 * round + 1);
        self.session.reset();
        let started = Instant::now();
        let Self { session, cancel, log, record } = self;
        Record::during(record.as_ref(), |recorder| {
            let mut observer = (log.as_mut(), recorder);
            for id in ids {
                let mut tell = |tokens| progress(tokens);
                let progress: Option<&mut dyn FnMut(usize)> = Some(&mut tell);
                session.feed(&[id], &mut Run { observer: &mut observer, cancel, progress })?;
            }
            Ok::<_, Failure>(())
        })?;
        Ok(Some(count as f64 / started.elapsed().as_secs_f64()))
    }

    /// What the best policy would have hit in the repetitions.
    fn belady_hit_ratio(&self, planned: &Planned) -> Result<Option<f64>, Failure> {
        let Some((log, slots)) = self.log.as_ref().zip(planned.plan.slots()) else {
            return Ok(None);
        };
        let hits = log.belady(&planned.sizes.shape, slots);
        Ok(hits.map_err(|error| Failure::Internal(error.to_string()))?.ratio())
    }

    fn ids(&self, count: usize, series: usize) -> Vec<u32> {
        let vocab = self.session.model().description().vocab;
        ids(vocab, count, series)
    }
}

/// Pseudo-random ids (a linear congruential generator; Knuth, TAOCP volume 2,
/// section 3.3.4): the same in every run of this program, and others for every
/// `series`, or forecasts would have seen the answers.
pub fn ids(vocab: usize, count: usize, series: usize) -> Vec<u32> {
    let mut state = 42u64.wrapping_add(series as u64);
    (0..count)
        .map(|_| {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            ((state >> 33) % vocab as u64) as u32
        })
        .collect()
}

fn print(report: &Report, experts: &str) -> Result<(), Failure> {
    let show = |label: &str, samples: &[f64]| -> Result<(), Failure> {
        let Some(middle) = median(samples) else { return Ok(()) };
        let low = samples.iter().copied().fold(f64::INFINITY, f64::min);
        let high = samples.iter().copied().fold(0.0, f64::max);
        let count = samples.len();
        output::line(&format!(
            "{label:<16} {middle:10.1} tok/s   median of {count}, {low:.1} to {high:.1}"
        ))
    };
    output::line(&format!("{:<16} {}", "model", report.model))?;
    output::line(&format!("{:<16} {experts}", "experts"))?;
    show(&format!("prompt {}", report.n_prompt), &report.prompt_tok_s)?;
    show(&format!("decode {}", report.n_gen), &report.decode_tok_s)?;
    output::line(&format!(
        "{:<16} {:>10}",
        "read per token",
        output::bytes(report.bytes_per_token)
    ))?;
    output::line(&format!("{:<16} {:10.1} GB/s", "read bandwidth", report.read_bandwidth_gb_s))?;
    if let Some(held) = report.held_bytes {
        output::line(&format!("{:<16} {:>10}", "memory held", output::bytes(held)))?;
    }
    if let Some(share) = report.decode_bandwidth_share {
        output::line(&format!("{:<16} {:10.1} %", "decode uses", share * 100.0))?;
    }
    if let Some((share, split)) = report.decode_prediction_share.zip(report.split.as_ref()) {
        output::line(&format!(
            "{:<16} {:10.1} %       {}",
            "of prediction",
            share * 100.0,
            split_speed::in_short(split)
        ))?;
    }
    if let Some(bound) = report.belady_hit_ratio {
        output::line(&format!(
            "{:<16} {:10.1} %       Belady's rule on the same slots, without reading ahead",
            "hit bound",
            bound * 100.0
        ))?;
    }
    let ledger = report.ledger.iter().flat_map(ledger::Report::lines);
    let way = if report.gpu.is_some() { Way::Link } else { Way::Disk };
    let lines = report.stats.iter().flat_map(|stats| statistics::lines(stats, way)).chain(ledger);
    let lines = lines.chain(report.from_disk.as_ref().map(FromDisk::line));
    lines.into_iter().try_for_each(|line| output::line(&line))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_repetition_repeats_what_another_one_taught() {
        let series: Vec<Vec<u32>> = (0..8).map(|series| ids(50_304, 64, series)).collect();
        assert_eq!(series[3], ids(50_304, 64, 3), "the same in every run");
        for (a, first) in series.iter().enumerate() {
            assert!(first.iter().all(|id| *id < 50_304));
            for second in &series[..a] {
                let common = first.iter().filter(|id| second.contains(id)).count();
                assert!(common <= 3, "{common} of 64 ids are in both");
            }
        }
    }
}
