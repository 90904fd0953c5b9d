//! A model's own decoding while its experts are read from disk: what each part
//! of a token takes beside the reads.

use super::machine_file::LAYER_NS;
use crate::{
    cli::BackendChoice,
    commands::bench::ids,
    device::Device,
    exit::Failure,
    memory, model,
    output::bytes,
    plan::{self, Needs},
    progress::Progress,
    size::Size,
    streaming::MemoryArgs,
};
use pregate_predictor::NoObserver;
use pregate_runtime::{Cancel, Run, SessionOptions, statistics::Phase};
use pregate_traces::replay::FORECAST_NS;
use serde::Serialize;
use std::path::Path;

/// Tokens to warm up with: until slots are filled, the kernel makes their
/// pages, which takes memory from who computes.
const WARM: usize = 64;
/// Tokens to measure.
const TOKENS: usize = 32;
/// Weights that every token reads: fewer may lie in the processor's caches,
/// whose speed says nothing about larger models.
const LEAST_BYTES: u64 = 96 << 20;
/// Experts in memory, as a share of the model's files.
const SHARE: f64 = 0.5;

/// What one token's parts reach, GB/s and microseconds.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Decoding {
    /// Of the model, with how much memory.
    pub of: String,
    pub ms_per_token: f64,
    /// What every token reads, less [`LAYER_NS`] for each layer.
    pub dense_gb_s: f64,
    /// Routed experts from memory, while the disk writes to it.
    pub experts_gb_s: f64,
    /// Of a layer with experts: planning and orders to the disk.
    pub plan_us: f64,
    /// Experts from the disk, while it had anything to read.
    pub disk_gb_s: f64,
}

/// Decodes some tokens of the model at `path`, with half of it in memory.
/// `None`: it has no experts, or too few bytes for figures that hold for
/// others.
///
/// # Errors
/// A model that cannot be streamed here: files, memory, disk.
pub fn measure(path: &Path) -> Result<Option<Decoding>, Failure> {
    let device = Device::for_backend(BackendChoice::Cpu, None)?;
    let opened = model::open(path)?;
    let other_bytes = model::other_bytes(&opened);
    if opened.layout().shape.moe().next().is_none() || other_bytes < LEAST_BYTES {
        return Ok(None);
    }
    let free = memory::available().bytes;
    let room = free - plan::reserve(free);
    let half = Size::Share(SHARE).of(opened.files().total_bytes());
    let memory = MemoryArgs { ram: Some(Size::Bytes(half.min(room))), ..MemoryArgs::default() };
    let session = SessionOptions { context: Some(WARM + TOKENS), ..SessionOptions::default() };
    let needs = Needs::new(&memory, session);
    let planned = plan::make(&opened, &device, &needs)?;
    let of = format!("{} with {}", path.display(), bytes(half.min(room)));
    let mut loaded = model::place(path, opened, &device, &needs, planned)?;
    let vocab = loaded.model.description().vocab;
    let Some(store) = loaded.model.store() else { return Ok(None) };
    let (mut bar, cancel) = (Progress::new("decoding", "tokens", WARM + TOKENS), Cancel::new());
    let mut before = store.stats();
    for (done, id) in ids(vocab, WARM + TOKENS, 0).into_iter().enumerate() {
        if done == WARM {
            before = store.stats();
        }
        let run = &mut Run { observer: &mut NoObserver, cancel: &cancel, progress: None };
        loaded.session.feed(&[id], run)?;
        bar.set(done + 1);
    }
    let decode = store.stats().since(&before).decode;
    let shape = &store.layout().shape;
    let layers = Layers {
        all: shape.layers.len() as f64,
        with_experts: shape.moe().count() as f64,
        other_bytes: other_bytes as f64,
        routed_bytes: model::routed_bytes(shape) as f64,
    };
    Ok(Some(of_time(of, &decode, &layers)))
}

/// What a token's layers are.
struct Layers {
    all: f64,
    with_experts: f64,
    other_bytes: f64,
    routed_bytes: f64,
}

fn of_time(of: String, decode: &Phase, layers: &Layers) -> Decoding {
    let tokens = decode.tokens.max(1) as f64;
    let each = |ns: u64| ns as f64 / tokens;
    let time = &decode.time;
    // Never less than half of what was measured: the rest is an assumption.
    let dense_ns = each(time.compute_ns);
    let reading_ns = (dense_ns - layers.all * LAYER_NS).max(dense_ns / 2.0).max(1.0);
    let planned_ns = each(time.overhead_ns) / layers.with_experts.max(1.0);
    Decoding {
        of,
        ms_per_token: each(time.total_ns) / 1e6,
        dense_gb_s: layers.other_bytes / reading_ns,
        experts_gb_s: layers.routed_bytes / each(time.experts_ns).max(1.0),
        plan_us: (planned_ns - FORECAST_NS as f64).max(0.0) / 1e3,
        disk_gb_s: decode.link.bytes as f64 / decode.link.busy_ns.max(1) as f64,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pregate_runtime::statistics::{LinkStats, Time};

    #[test]
    fn bytes_over_the_time_of_their_part() {
        let time = Time {
            compute_ns: 2 * 10_200_000,
            experts_ns: 2 * 20_000_000,
            overhead_ns: 2 * 1_200_000,
            total_ns: 2 * 90_000_000,
            ..Time::default()
        };
        let link = LinkStats { bytes: 5_000_000, busy_ns: 2_000_000 };
        let decode = Phase { tokens: 2, time, link, ..Phase::default() };
        let layers =
            Layers { all: 10.0, with_experts: 8.0, other_bytes: 250e6, routed_bytes: 500e6 };
        let found = of_time("m".to_string(), &decode, &layers);
        assert_eq!(found.dense_gb_s, 25.0, "200 us are the layers' own");
        assert_eq!((found.experts_gb_s, found.ms_per_token), (25.0, 90.0));
        assert_eq!((found.plan_us, found.disk_gb_s), (130.0, 2.5), "planning less forecasting");
    }

    #[test]
    fn the_demo_model_is_too_small_to_speak_for_others() {
        assert_eq!(measure(&crate::demo::find().unwrap()).unwrap(), None);
    }
}
