//! `pregate eval logits`: logits and routing of given tokens, as a file.

use crate::{
    cli::{KvChoice, LogitsArgs, SessionArgs},
    device::Device,
    exit::Failure,
    model::{self, Loaded},
    notices,
    plan::Needs,
    progress::Progress,
    save, signals,
};
use pregate_runtime::{Cancel, KvFormat, Run, SessionOptions, sample::greedy};
use pregate_traces::{Routing, RoutingLog};
use safetensors::{Dtype, tensor::TensorView};
use std::{fs::File, io::Read, path::Path};

/// Tokens per call: what is asked of the engine stays small beside the file.
const CHUNK: usize = 64;
/// A list of ids longer than this is not one.
const MAX_TOKENS_FILE: u64 = 64 << 20;

impl SessionArgs {
    /// What the engine is asked for.
    pub fn options(&self) -> SessionOptions {
        SessionOptions { context: self.context, kv: self.kv.into(), ..SessionOptions::default() }
    }
}

impl From<KvChoice> for KvFormat {
    fn from(choice: KvChoice) -> Self {
        match choice {
            KvChoice::F16 => KvFormat::F16,
            KvChoice::F32 => KvFormat::F32,
        }
    }
}

/// A tensor to write.
struct Tensor {
    name: String,
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: Vec<u8>,
}

pub fn logits(args: &LogitsArgs) -> Result<(), Failure> {
    let ids = read_ids(&args.tokens)?;
    let device = Device::for_backend(args.backend, args.threads)?;
    device.announce();
    let rows = ids.len() + args.greedy.saturating_sub(1);
    let options = SessionOptions {
        context: Some(rows),
        kv: args.kv.into(),
        prefill_chunk: CHUNK,
        ..SessionOptions::default()
    };
    let needs = Needs { logit_rows: CHUNK, ..Needs::new(&args.memory, options) };
    let Loaded { model, mut session, .. } = model::load(&args.model, &device, &needs)?;
    let cancel = Cancel::new();
    signals::cancel_on_interrupt(cancel.clone())?;
    let vocab = model.description().vocab;
    let mut log = RoutingLog::default();
    let mut bar = Progress::new("computing", "tokens", rows);

    let mut logits = reserve(ids.len(), vocab)?;
    let mut last = Vec::new();
    for chunk in ids.chunks(CHUNK) {
        let mut run = Run { observer: &mut log, cancel: &cancel, progress: None };
        let part = session.feed_all(chunk, &mut run)?;
        append(&mut logits, &part);
        last = part[part.len() - vocab..].to_vec();
        bar.set(session.position());
    }
    let mut warned = session.warning();
    let mut greedy_ids: Vec<u32> = Vec::with_capacity(args.greedy);
    let mut greedy_logits = reserve(args.greedy, vocab)?;
    while greedy_ids.len() < args.greedy {
        if let Some(&id) = greedy_ids.last() {
            let mut run = Run { observer: &mut log, cancel: &cancel, progress: None };
            last = session.feed(&[id], &mut run)?.to_vec();
            bar.set(session.position());
        }
        append(&mut greedy_logits, &last);
        greedy_ids.push(greedy(&last));
    }
    drop(bar);
    notices::tell_of_session(&session, &mut warned);

    let mut tensors = vec![Tensor {
        name: "logits".to_string(),
        dtype: Dtype::F32,
        shape: vec![ids.len(), vocab],
        bytes: logits,
    }];
    if args.greedy > 0 {
        tensors.push(Tensor {
            name: "greedy_ids".to_string(),
            dtype: Dtype::I32,
            shape: vec![args.greedy],
            bytes: greedy_ids.iter().flat_map(|id| id.to_le_bytes()).collect(),
        });
        tensors.push(Tensor {
            name: "greedy_logits".to_string(),
            dtype: Dtype::F32,
            shape: vec![args.greedy, vocab],
            bytes: greedy_logits,
        });
    }
    for (layer, answers) in log.layers() {
        tensors.extend(routing(layer, answers)?);
    }
    write(&args.out, &tensors)
}

fn read_ids(path: &Path) -> Result<Vec<u32>, Failure> {
    let failed = |error| Failure::io(path.display().to_string(), error);
    let mut text = String::new();
    let file = File::open(path).map_err(failed)?;
    file.take(MAX_TOKENS_FILE).read_to_string(&mut text).map_err(failed)?;
    let ids: Vec<u32> = serde_json::from_str(&text).map_err(|error| {
        Failure::Usage(format!("{}: a JSON array of token ids is needed: {error}", path.display()))
    })?;
    if ids.is_empty() {
        return Err(Failure::Usage(format!("{}: no token ids", path.display())));
    }
    Ok(ids)
}

/// Room for `[rows, vocab]` floats as bytes.
fn reserve(rows: usize, vocab: usize) -> Result<Vec<u8>, Failure> {
    let mut bytes = Vec::new();
    let size = rows.checked_mul(vocab).and_then(|count| count.checked_mul(size_of::<f32>()));
    size.and_then(|size| bytes.try_reserve_exact(size).ok()).ok_or_else(|| {
        Failure::Resources(format!("no memory for the logits of {rows} tokens; give fewer"))
    })?;
    Ok(bytes)
}

fn append(bytes: &mut Vec<u8>, values: &[f32]) {
    bytes.extend(values.iter().flat_map(|value| value.to_le_bytes()));
}

/// `router_ids.L` and `router_weights.L`, each row sorted by expert id.
fn routing(layer: usize, answers: &[Routing]) -> Result<[Tensor; 2], Failure> {
    let k = answers.first().map_or(0, |answer| answer.experts.len());
    let (mut ids, mut weights) = (Vec::new(), Vec::new());
    for answer in answers {
        if answer.experts.len() != k {
            return Err(Failure::Internal(format!(
                "layer {layer} chose {k} experts for one token and {} for another; \
                 the file format needs one number",
                answer.experts.len()
            )));
        }
        let mut pairs: Vec<(u32, f32)> =
            answer.experts.iter().copied().zip(answer.weights.iter().copied()).collect();
        pairs.sort_by_key(|(expert, _)| *expert);
        ids.extend(pairs.iter().flat_map(|(expert, _)| expert.to_le_bytes()));
        weights.extend(pairs.iter().flat_map(|(_, weight)| weight.to_le_bytes()));
    }
    let shape = vec![answers.len(), k];
    Ok([
        Tensor {
            name: format!("router_ids.{layer}"),
            dtype: Dtype::I32,
            shape: shape.clone(),
            bytes: ids,
        },
        Tensor {
            name: format!("router_weights.{layer}"),
            dtype: Dtype::F32,
            shape,
            bytes: weights,
        },
    ])
}

fn write(path: &Path, tensors: &[Tensor]) -> Result<(), Failure> {
    let internal = |error: safetensors::SafeTensorError| Failure::Internal(error.to_string());
    let mut views = Vec::with_capacity(tensors.len());
    for tensor in tensors {
        let view = TensorView::new(tensor.dtype, tensor.shape.clone(), &tensor.bytes);
        views.push((tensor.name.as_str(), view.map_err(internal)?));
    }
    let bytes = safetensors::serialize(views, None).map_err(internal)?;
    save::write_whole(path, |out| out.write_all(&bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_sorted_by_expert() {
        let answer = |experts: &[u32], weights: &[f32]| Routing {
            position: 0,
            experts: experts.to_vec(),
            weights: weights.to_vec(),
        };
        let [ids, weights] =
            routing(3, &[answer(&[5, 2], &[0.75, 0.25]), answer(&[1, 4], &[0.5, 0.5])]).unwrap();
        assert_eq!((ids.name.as_str(), ids.shape), ("router_ids.3", vec![2, 2]));
        assert_eq!(ids.bytes, [2u32, 5, 1, 4].map(u32::to_le_bytes).concat());
        assert_eq!(weights.bytes, [0.25f32, 0.75, 0.5, 0.5].map(f32::to_le_bytes).concat());
        assert!(routing(0, &[answer(&[1], &[1.0]), answer(&[1, 2], &[0.5, 0.5])]).is_err());
    }
}
