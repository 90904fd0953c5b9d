//! The header of a trace file: JSON, so that others read it with any tool.
//!
//! `{"model", "fingerprint" (64 hexadecimal digits or null), "provenance":
//! "recorded" | {"imported": {"format"}} | {"synthetic": {"from", "seed"}},
//! "layers": [{"count", "experts", "top_k", "expert_bytes", "class"}],
//! "sequences": [{"start", "tokens", "dataset", "category",
//! "is_repetitive"}]}`. `layers` are runs of equal layers in the order of the
//! model; a run without `experts` is dense. `sequences` is there where labels
//! were known beforehand.

use crate::hex::{hex, unhex};
use crate::limits::{MAX_LAYERS, check};
use crate::{Header, Provenance, Sequence};
use pregate_predictor::{LayerShape, Shape};
use serde::{Deserialize, Serialize};

#[derive(Serialize, Deserialize)]
struct Fields {
    model: String,
    fingerprint: Option<String>,
    provenance: Provenance,
    layers: Vec<Run>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    sequences: Vec<Labels>,
}

/// All of a layer's numbers, or none: then the layers are dense.
#[derive(Serialize, Deserialize)]
struct Run {
    count: usize,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    experts: Option<usize>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    top_k: Option<usize>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    expert_bytes: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    class: Option<usize>,
}

impl Run {
    fn new(layer: Option<LayerShape>) -> Self {
        Self {
            count: 1,
            experts: layer.map(|layer| layer.experts),
            top_k: layer.map(|layer| layer.top_k),
            expert_bytes: layer.map(|layer| layer.expert_bytes),
            class: layer.map(|layer| layer.class),
        }
    }

    fn layer(&self) -> Result<Option<LayerShape>, String> {
        match (self.experts, self.top_k, self.expert_bytes, self.class) {
            (Some(experts), Some(top_k), Some(expert_bytes), Some(class)) => {
                Ok(Some(LayerShape { experts, top_k, expert_bytes, class }))
            }
            (None, None, None, None) => Ok(None),
            _ => Err("half of a layer's experts, top_k, expert_bytes and class".into()),
        }
    }
}

#[derive(Serialize, Deserialize)]
struct Labels {
    start: u64,
    tokens: u64,
    #[serde(default)]
    dataset: String,
    #[serde(default)]
    category: String,
    #[serde(default)]
    is_repetitive: bool,
}

/// # Errors
/// A shape that the format does not hold.
pub fn write(header: &Header, sequences: &[Sequence]) -> Result<Vec<u8>, String> {
    check(&header.shape)?;
    let mut layers: Vec<Run> = Vec::new();
    let mut last = None;
    for &layer in &header.shape.layers {
        match layers.last_mut().filter(|_| last == Some(layer)) {
            Some(run) => run.count += 1,
            None => layers.push(Run::new(layer)),
        }
        last = Some(layer);
    }
    let fingerprint = header.fingerprint.as_ref().map(|digest| hex(digest));
    let provenance = header.source.clone();
    let labels = |sequence: &Sequence| {
        let Sequence { start, tokens, dataset, category, is_repetitive } = sequence.clone();
        Labels { start, tokens, dataset, category, is_repetitive }
    };
    let sequences = sequences.iter().map(labels).collect();
    let model = header.model.clone();
    serde_json::to_vec(&Fields { model, fingerprint, provenance, layers, sequences })
        .map_err(|error| error.to_string())
}

/// # Errors
/// What is not such a header, or a shape that the format does not hold.
pub fn read(json: &[u8]) -> Result<(Header, Vec<Sequence>), String> {
    let fields: Fields =
        serde_json::from_slice(json).map_err(|error| format!("the header: {error}"))?;
    let mut shape = Shape::default();
    for run in fields.layers {
        // Before anything is allocated for it.
        if run.count > MAX_LAYERS - shape.layers.len() {
            return Err(format!("more than {MAX_LAYERS} layers"));
        }
        shape.layers.extend(std::iter::repeat_n(run.layer()?, run.count));
    }
    check(&shape)?;
    let fingerprint = fields.fingerprint.as_deref().map(digest).transpose()?;
    let source = fields.provenance;
    let sequence = |labels: Labels| {
        let Labels { start, tokens, dataset, category, is_repetitive } = labels;
        Sequence { start, tokens, dataset, category, is_repetitive }
    };
    let sequences = fields.sequences.into_iter().map(sequence).collect();
    Ok((Header { model: fields.model, fingerprint, shape, source }, sequences))
}

fn digest(text: &str) -> Result<[u8; 32], String> {
    let wrong = || format!("fingerprint is {text:?}; 64 hexadecimal digits are allowed");
    unhex(text).ok_or_else(wrong)
}
