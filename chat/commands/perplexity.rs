//! `pregate eval perplexity`: how well a model predicts a text.

use crate::{
    cli::PerplexityArgs,
    device::Device,
    exit::Failure,
    model::{self, Loaded},
    output,
    plan::Needs,
    progress::Progress,
    signals,
};
use pregate_predictor::NoObserver;
use pregate_runtime::{Cancel, Run, Session, SessionOptions, files::ModelFiles, model::describe};
use serde_json::json;
use std::fs;

/// Tokens of a window unless another number is asked for.
const WINDOW: usize = 512;
/// Tokens per call, so that logits of large vocabularies stay small.
const CHUNK: usize = 64;

pub fn run(args: &PerplexityArgs) -> Result<(), Failure> {
    let text = fs::read_to_string(&args.file)
        .map_err(|error| Failure::io(args.file.display().to_string(), error))?;
    let path = model::path_or_demo(args.model.model.as_deref())?;
    let device = Device::open(&args.model.device)?;
    device.announce();
    let limit = describe(&ModelFiles::open(&path)?)?.context_limit;
    let window = args.context.unwrap_or(WINDOW.min(limit));
    let options =
        SessionOptions { context: Some(window), prefill_chunk: CHUNK, ..SessionOptions::default() };
    let needs = Needs { logit_rows: CHUNK, ..Needs::new(&args.memory, options) };
    let Loaded { model, mut session, .. } = model::load(&path, &device, &needs)?;
    let ids = model.tokenizer()?.encode_document(&text)?;
    // A last window of one token has nothing to predict.
    let windows: Vec<&[u32]> = ids
        .chunks(window)
        .filter(|part| part.len() > 1)
        .take(args.windows.unwrap_or(usize::MAX))
        .collect();
    if windows.is_empty() {
        return Err(Failure::Usage(format!(
            "{}: {} tokens; at least 2 are needed",
            args.file.display(),
            ids.len()
        )));
    }
    let cancel = Cancel::new();
    signals::cancel_on_interrupt(cancel.clone())?;
    let mut bar = Progress::new("perplexity", "tokens", windows.iter().map(|w| w.len()).sum());
    let mut done = 0;
    let mut losses = Vec::new();
    for ids in &windows {
        session.reset();
        losses.extend(score(&mut session, ids, &cancel, &mut |n| bar.set(done + n))?);
        done += ids.len();
    }
    drop(bar);
    let (mean, error) = mean_and_error(&losses);
    let perplexity = mean.exp();
    if args.json {
        return output::json(&json!({
            "model": path.display().to_string(),
            "backend": device.describe(),
            "file": args.file.display().to_string(),
            "context": window,
            "windows": windows.len(),
            "tokens_scored": losses.len(),
            "nats_per_token": mean,
            "nats_per_token_error": error,
            "perplexity": perplexity,
        }));
    }
    output::line(&format!(
        "perplexity {perplexity:.4} +- {:.4}  ({mean:.5} nats per token, {} tokens in {} windows \
         of {window})",
        perplexity * error,
        losses.len(),
        windows.len()
    ))
}

/// The loss of every token of `ids` but the first, in nats.
fn score(
    session: &mut Session,
    ids: &[u32],
    cancel: &Cancel,
    progress: &mut dyn FnMut(usize),
) -> Result<Vec<f64>, Failure> {
    let vocab = session.model().description().vocab;
    let mut losses = Vec::with_capacity(ids.len());
    let mut observer = NoObserver;
    // The last token predicts nothing that we know.
    for (index, chunk) in ids[..ids.len() - 1].chunks(CHUNK).enumerate() {
        let mut run = Run { observer: &mut observer, cancel, progress: None };
        let logits = session.feed_all(chunk, &mut run)?;
        let next = &ids[index * CHUNK + 1..];
        losses.extend(logits.chunks(vocab).zip(next).map(|(row, &id)| loss(row, id as usize)));
        progress(session.position());
    }
    Ok(losses)
}

/// `-log softmax(row)[id]`.
fn loss(row: &[f32], id: usize) -> f64 {
    let best = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = row.iter().map(|&logit| f64::from(logit - best).exp()).sum();
    sum.ln() - f64::from(row[id] - best)
}

/// Mean and its standard error.
fn mean_and_error(values: &[f64]) -> (f64, f64) {
    let count = values.len() as f64;
    let mean = values.iter().sum::<f64>() / count;
    let squares: f64 = values.iter().map(|value| (value - mean).powi(2)).sum();
    (mean, (squares / (count - 1.0).max(1.0) / count).sqrt())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn losses_are_negative_log_probabilities() {
        let row = [1f32.ln(), 2f32.ln(), 5f32.ln(), -200.0];
        assert!((loss(&row, 2) - -(5f64 / 8.0).ln()).abs() < 1e-6);
        assert!((loss(&[1e30, 0.0], 0)).abs() < 1e-12, "large logits do not overflow");
        assert_eq!(mean_and_error(&[1.0, 3.0]), (2.0, 1.0));
    }
}
