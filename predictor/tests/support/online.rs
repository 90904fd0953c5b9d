//! Runs a forecaster over a trace the way the runtime does: it sees the truth
//! of a layer only after it guessed.

use pregate_predictor::Shape;
use pregate_predictor::forecast::Forecaster;
use pregate_predictor::ledger::Ledger;

use crate::rtrace::Trace;

/// `[buckets]`: guesses, their mean probability, how many came true.
pub type Reliability = [(u64, f64, u64); 10];

/// The shape of the traced model, one byte per expert.
pub fn shape(trace: &Trace) -> Shape {
    Shape::uniform(trace.layers, trace.experts, trace.top_k, 1)
}

/// Decodes tokens `range` of the trace. Answers how well the probabilities
/// one layer ahead are calibrated.
pub fn run(
    trace: &Trace,
    range: std::ops::Range<usize>,
    forecaster: &mut Forecaster,
    ledger: &mut Ledger,
) -> Reliability {
    let mut reliability = Reliability::default();
    for token in range {
        if trace.starts.contains(&token) {
            forecaster.new_sequence();
        }
        // Without ids every token is a new one.
        let id = trace.token_ids.get(token).copied().unwrap_or(token as u32);
        forecaster.begin_token(id);
        for layer in 0..trace.layers {
            let experts: Vec<u32> = trace.experts(token, layer).collect();
            let weights: Vec<f32> = trace.weights(token, layer).collect();
            if let Some(probabilities) = forecaster.probabilities(layer) {
                for (expert, &p) in probabilities.iter().enumerate() {
                    let bucket = &mut reliability[((p * 10.0) as usize).min(9)];
                    bucket.0 += 1;
                    bucket.1 += f64::from(p);
                    bucket.2 += u64::from(experts.contains(&(expert as u32)));
                }
            }
            forecaster.routed(layer, &experts, &weights, ledger);
            forecaster.forecast(Some(layer), &|_| true);
        }
    }
    reliability
}

/// Adds the buckets of `part`.
#[allow(dead_code)]
pub fn add(sum: &mut Reliability, part: &Reliability) {
    for (sum, part) in sum.iter_mut().zip(part) {
        *sum = (sum.0 + part.0, sum.1 + part.1, sum.2 + part.2);
    }
}
