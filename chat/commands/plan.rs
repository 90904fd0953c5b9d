//! `pregate plan`: what goes where in memory, and how fast that can be.

use crate::{
    bandwidth,
    cli::PlanArgs,
    device::Device,
    exit::Failure,
    model,
    output::{self, bytes},
    plan::{self, GpuPlan, Needs, Planned},
    roofline::{self, Prediction},
    split_speed::{self, Facts, SplitSpeed},
};
use pregate_predictor::roofline::Hits;
use pregate_runtime::{
    OpenedModel,
    budget::{ClassPlan, Parts, Placement},
    store::{
        disk::{self, DiskOptions},
        frames::{ClassSpec, Frames},
    },
};
use serde::Serialize;
use std::fmt::Write;

/// The fields of `--json`; scripts read them by name.
#[derive(Serialize)]
struct Report {
    model: String,
    model_bytes: u64,
    device: String,
    threads: usize,
    context: usize,
    /// `null`: as much as there is.
    budget_bytes: Option<u64>,
    budget_source: String,
    /// "gpu", "whole" or "streaming".
    placement: &'static str,
    /// What the GPU holds; `null` where none computes.
    gpu: Option<GpuPlan>,
    parts: Parts,
    left_bytes: Option<u64>,
    /// Per layer of the model, 0 for dense layers; `null` where the whole
    /// model is in memory.
    slots: Option<Vec<usize>>,
    /// Experts of the same layers.
    experts: Vec<usize>,
    ring: Option<usize>,
    classes: Vec<ClassPlan>,
    /// How experts are read; `null` where they are not.
    disk: Option<Disk>,
    read_bandwidth_gb_s: f64,
    /// `null` where a GPU and the processor share the experts.
    prediction: Option<Prediction>,
    /// Where they do.
    split: Option<SplitSpeed>,
    /// Why there is neither.
    not_predicted: Option<String>,
}

/// What the probe of the disk found.
#[derive(Serialize)]
struct Disk {
    /// How it is read.
    path: String,
    /// `null`: there is too little to measure with.
    gb_s: Option<f64>,
    /// Why faster ways cannot be used here.
    refused: Vec<String>,
    #[serde(skip)]
    line: String,
}

/// Frames that are read into while the disk is measured, and their size: what
/// one read has at most.
const FRAMES: ClassSpec = ClassSpec { frame_bytes: 2 << 20, frames: 16 };

/// Reads some of the model's files as streaming would.
fn probe(model: &OpenedModel, options: &DiskOptions) -> Result<Disk, Failure> {
    let names = model.files().paths().iter().cloned();
    let files: Vec<_> = names.zip(model.files().identities()).collect();
    let frames = Frames::new(&[FRAMES])?;
    let (_, report) = disk::probe(&files, &frames, options)?;
    Ok(Disk {
        line: plan::disk_line(&report),
        path: report.words,
        gb_s: report.measured.map(|measured| measured.bytes_per_second() / 1e9),
        refused: report.refused,
    })
}

pub fn run(args: &PlanArgs) -> Result<(), Failure> {
    let path = model::path_or_demo(args.model.model.as_deref())?;
    let device = Device::open(&args.model.device)?;
    let model = model::open(&path)?;
    let needs = Needs::new(&args.memory, args.session.options());
    let planned = plan::make(&model, &device, &needs)?;
    planned.notes();
    let gb_s = bandwidth::of(&device, &planned)?;
    let disk = if planned.plan.is_whole() && planned.on_disk().is_none() {
        None
    } else {
        Some(probe(&model, &planned.streaming.disk())?)
    };
    let disk_rate = disk.as_ref().and_then(|disk| Some(disk.gb_s? * 1e9));
    let prediction = (!planned.is_split()).then(|| {
        roofline::predict(model.bytes_per_token(), &planned.loads(), gb_s * 1e9, disk_rate)
    });
    let (split, not_predicted) = split(&model, &device, &planned, gb_s)?;
    let report = Report {
        model: path.display().to_string(),
        model_bytes: planned.sizes.whole_bytes,
        device: device.describe(),
        threads: device.threads,
        context: planned.context,
        budget_bytes: known(planned.plan.budget_bytes),
        budget_source: planned.source.clone(),
        placement: planned.placement(),
        gpu: planned.gpu.clone(),
        parts: planned.plan.parts,
        left_bytes: known(planned.plan.budget_bytes).map(|_| planned.plan.left_bytes),
        slots: planned.plan.slots().map(<[usize]>::to_vec),
        experts: planned
            .sizes
            .shape
            .layers
            .iter()
            .map(|layer| layer.map_or(0, |layer| layer.experts))
            .collect(),
        ring: match planned.plan.placement {
            Placement::Whole => None,
            Placement::Streaming { ring, .. } => Some(ring),
        },
        classes: match &planned.plan.placement {
            Placement::Whole => Vec::new(),
            Placement::Streaming { classes, .. } => classes.clone(),
        },
        disk,
        read_bandwidth_gb_s: gb_s,
        prediction,
        split,
        not_predicted,
    };
    if args.json {
        return output::json(&report);
    }
    output::line(text(&report, &planned, &model).trim_end())
}

/// What is expected where a GPU and the processor share the experts, or why
/// nothing can be said; neither where they do not.
fn split(
    model: &OpenedModel,
    device: &Device,
    planned: &Planned,
    gpu_read_gb_s: f64,
) -> Result<(Option<SplitSpeed>, Option<String>), Failure> {
    let parts = device.gpu.as_ref().zip(planned.gpu.as_ref());
    let Some((gpu, plan)) = parts.filter(|_| planned.is_split()) else { return Ok((None, None)) };
    if planned.on_disk().is_some() {
        let why = "experts come from disk as well, whose hits depend on the text";
        return Ok((None, Some(why.to_string())));
    }
    let facts = match Facts::measure(gpu, gpu_read_gb_s, &*device.backend, model) {
        Ok(facts) => facts,
        Err(Failure::Resources(why)) => return Ok((None, Some(why))),
        Err(failure) => return Err(failure),
    };
    let bytes = model.bytes_per_token();
    let speed = split_speed::predict(planned, plan, gpu.misses, bytes, Hits::Uniform, &facts);
    Ok((Some(speed), None))
}

/// Where the system does not say what is free, the budget has no number.
fn known(bytes: u64) -> Option<u64> {
    (bytes != u64::MAX).then_some(bytes)
}

/// A part of the picture: letter, name, bytes.
type Part = (char, String, u64);

fn parts(report: &Report, planned: &Planned) -> Vec<Part> {
    let Parts { process_bytes, weights_bytes, kv_bytes, scratch_bytes, slots_bytes, ring_bytes } =
        report.parts;
    if let Some(gpu) = &report.gpu {
        let GpuPlan { parts, budget_bytes, experts: (there, all), share, .. } = gpu;
        let experts = match share.moves() {
            true => format!("room for {there} of {all} experts"),
            false => format!("{there} of {all} experts"),
        };
        let mut ring = Vec::new();
        if share.moves() {
            let name = format!("ring of {} frames a size", share.ring);
            ring.push(('r', name, parts.ring_bytes));
        }
        let rest = vec![
            ('k', format!("KV cache, {} tokens", report.context), parts.kv_bytes),
            ('s', "scratch".to_string(), parts.scratch_bytes),
            ('.', "left".to_string(), budget_bytes - parts.total()),
        ];
        let weights = [
            ('w', "weights of every token".to_string(), parts.weights_bytes),
            ('E', experts, parts.experts_bytes),
        ];
        return weights.into_iter().chain(ring).chain(rest).collect();
    }
    let is_whole = report.slots.is_none();
    let weights = if is_whole { "all weights, mapped" } else { "weights of every token" };
    let mut parts = vec![
        ('w', weights.to_string(), weights_bytes),
        ('k', format!("KV cache, {} tokens", report.context), kv_bytes),
        ('s', "scratch".to_string(), scratch_bytes),
        ('p', "program, tokenizer".to_string(), process_bytes),
    ];
    if !is_whole {
        let ring = report.ring.unwrap_or(0);
        parts.push(('E', format!("slots: {} experts", planned.slots()), slots_bytes));
        parts.push(('r', format!("ring of {ring} frames a size"), ring_bytes));
    }
    if let Some(left) = report.left_bytes {
        parts.push(('.', "left".to_string(), left));
    }
    parts
}

/// Columns of the picture.
const BAR: usize = 72;

/// One letter per share of the budget; a part that is there has at least one.
fn bar(parts: &[Part]) -> String {
    let total: u128 = parts.iter().map(|(_, _, bytes)| u128::from(*bytes)).sum::<u128>().max(1);
    let columns = |bytes: u64| match bytes {
        0 => 0,
        some => ((u128::from(some) * BAR as u128 + total / 2) / total).max(1) as usize,
    };
    parts
        .iter()
        .flat_map(|(letter, _, bytes)| std::iter::repeat_n(*letter, columns(*bytes)))
        .collect()
}

fn text(report: &Report, planned: &Planned, model: &OpenedModel) -> String {
    let mut out = String::new();
    let mut add = |label: &str, value: String| {
        // Writing to a string cannot fail.
        let _ = writeln!(out, "{label:<18} {value}");
    };
    let layers = model.description().moe_layers().count();
    add("model", format!("{}, {}", report.model, bytes(report.model_bytes)));
    add("experts", format!("{} in {layers} layers", model::experts(model.description())));
    add("device", report.device.clone());
    if let Some(gpu) = &planned.gpu {
        add("GPU budget", gpu.budget.words());
    }
    match report.budget_bytes {
        Some(budget) => add("budget", format!("{} ({})", bytes(budget), report.budget_source)),
        None => add("budget", report.budget_source.clone()),
    }
    let parts = parts(report, planned);
    let total = parts.iter().map(|(_, _, bytes)| *bytes as f64).sum::<f64>().max(1.0);
    add("", format!("[{}]", bar(&parts)));
    for (letter, name, size) in &parts {
        let share = *size as f64 / total * 100.0;
        add(&format!("  {letter} {:>10}", bytes(*size)), format!("{share:5.1} %  {name}"));
    }
    if let Some(disk) = planned.on_disk() {
        add("experts from disk", plan::disk_words(disk));
    }
    let of = if report.gpu.is_some() { "GPU memory" } else { "memory" };
    add("read bandwidth", format!("{:.1} GB/s from {of}", report.read_bandwidth_gb_s));
    if let Some(disk) = &report.disk {
        add("disk", disk.line.clone());
    }
    if let Some(found) = &report.prediction {
        prediction(found, report.slots.is_some(), &mut add);
    }
    for (label, value) in report.split.iter().flat_map(split_speed::lines) {
        add(label, value);
    }
    if let Some(why) = &report.not_predicted {
        add("prediction", format!("none: {why}"));
    }
    out
}

fn prediction(found: &Prediction, is_streaming: bool, add: &mut dyn FnMut(&str, String)) {
    let per_token = found.memory_bytes_per_token;
    let mut read = format!("{} from memory", bytes(per_token));
    if is_streaming {
        let _ = write!(read, ", {} from disk", bytes(found.disk_bytes_per_token));
        add("hit ratio", format!("{:.1} % if routing is uniform", found.hit_ratio * 100.0));
    }
    add("read per token", read);
    add("memory allows", format!("{:.1} tok/s", found.compute_bound_tok_s));
    if let Some(disk) = found.disk_bound_tok_s {
        add("disk allows", format!("{disk:.1} tok/s"));
        let least = found.without_overlap_tok_s;
        add(
            "prediction",
            format!(
                "{least:.1} tok/s without prefetch, at most {:.1} with it; the {} binds",
                found.bound_tok_s, found.binds
            ),
        );
    } else if is_streaming && found.disk_bytes_per_token > 0 {
        add("prediction", "none: the disk was not measured".to_string());
    } else {
        add("prediction", format!("at most {:.1} tok/s; the memory binds", found.bound_tok_s));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_part_that_is_there_is_in_the_picture() {
        let part = |letter, bytes| (letter, String::new(), bytes);
        let picture = bar(&[part('w', 500), part('k', 1), part('s', 0), part('.', 499)]);
        assert_eq!(picture.matches('w').count(), BAR / 2);
        assert_eq!(picture.matches('k').count(), 1);
        assert!(!picture.contains('s'));
        assert_eq!(bar(&[]), "");
        assert_eq!(bar(&[part('w', u64::MAX), part('.', u64::MAX)]).len(), BAR);
    }
}
