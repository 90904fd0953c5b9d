//! The manifest of rtrace-1.

use crate::limits::{self, MAX_LAYERS};
use crate::{Sequence, TraceError};
use pregate_predictor::{LayerShape, Shape};
use serde::Deserialize;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

/// A manifest with 16 bytes for each of a million sequences is not larger.
const MAX_BYTES: u64 = 64 << 20;

/// What the manifest says, checked against itself.
#[derive(Clone, Debug)]
pub struct Manifest {
    pub path: PathBuf,
    pub model: String,
    pub tokens: u64,
    /// That were recorded; the model may have dense ones beside.
    pub layers: usize,
    pub experts: usize,
    pub top_k: usize,
    /// In the words of the file, such as "1..26 (layer 0 is dense)".
    moe_layers: Option<Layers>,
    /// Ascending, without overlap.
    pub sequences: Vec<Sequence>,
    /// Of the files beside it, in hexadecimal.
    pub sha256: BTreeMap<String, String>,
    /// Nobody's routing: made up by `pregate trace generate` and exported.
    pub synthetic: Option<Synthetic>,
}

#[derive(Clone, Debug, Deserialize)]
pub struct Synthetic {
    pub from: String,
    #[serde(default)]
    pub seed: u64,
}

#[derive(Deserialize)]
struct Fields {
    format: String,
    tokens: u64,
    layers: usize,
    top_k: usize,
    experts: usize,
    #[serde(default)]
    model: Option<String>,
    #[serde(default)]
    moe_layers: Option<Layers>,
    #[serde(default)]
    sequences: Vec<SequenceFields>,
    #[serde(default)]
    sha256: BTreeMap<String, String>,
    #[serde(default)]
    synthetic: Option<Synthetic>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(untagged)]
enum Layers {
    Words(String),
    Numbers(Vec<usize>),
}

#[derive(Deserialize)]
#[serde(untagged)]
enum SequenceFields {
    Named {
        start: u64,
        len: u64,
        #[serde(default)]
        dataset: Option<String>,
        #[serde(default)]
        category: Option<String>,
        #[serde(default)]
        repetition: Option<bool>,
    },
    Bare(u64, u64),
}

impl Manifest {
    /// # Errors
    /// A file that cannot be read, is not rtrace-1, or contradicts itself.
    pub fn read(path: &Path) -> Result<Self, TraceError> {
        let mut text = String::new();
        let file = File::open(path).map_err(|source| TraceError::io(path, source))?;
        file.take(MAX_BYTES + 1)
            .read_to_string(&mut text)
            .map_err(|source| TraceError::io(path, source))?;
        if text.len() as u64 > MAX_BYTES {
            let what = "a manifest of more than 64 MiB";
            return Err(TraceError::whole(path, what));
        }
        let fields = serde_json::from_str(&text).map_err(|error| {
            TraceError::line(path, error.line() as u64, format!("not rtrace-1: {error}"))
        })?;
        Self::checked(path, fields).map_err(|what| TraceError::whole(path, what))
    }

    fn checked(path: &Path, fields: Fields) -> Result<Self, String> {
        let Fields { format, tokens, layers, top_k, experts, .. } = fields;
        if format != "rtrace-1" {
            return Err(format!("format is {format:?}; this reader knows \"rtrace-1\""));
        }
        let within = |name: &str, value: usize, most: usize| match (1..=most).contains(&value) {
            true => Ok(()),
            false => Err(format!("{name} is {value}; 1 to {most} are allowed")),
        };
        within("layers", layers, MAX_LAYERS)?;
        // Ids are bytes, and 255 has another meaning.
        within("experts", experts, 255)?;
        within("top_k", top_k, experts)?;
        let mut sequences = Vec::with_capacity(fields.sequences.len());
        let mut end = 0;
        for sequence in fields.sequences {
            let sequence = sequence.into_sequence();
            let Sequence { start, tokens: length, .. } = sequence;
            let next = start.checked_add(length).filter(|&next| next <= tokens);
            match next {
                Some(next) if start >= end && length > 0 => end = next,
                _ => {
                    return Err(format!(
                        "the sequence of {length} tokens at {start}: sequences ascend, do not \
                         overlap and end at {tokens}"
                    ));
                }
            }
            sequences.push(sequence);
        }
        let model = fields.model.unwrap_or_default();
        let Fields { moe_layers, sha256, synthetic, .. } = fields;
        let path = path.to_path_buf();
        #[rustfmt::skip]
        let manifest = Self {
            path, model, tokens, layers, experts, top_k, moe_layers, sequences, sha256, synthetic,
        };
        Ok(manifest)
    }

    /// The layers of the model, and which of them were recorded. Experts'
    /// bytes are unknown: 0.
    pub(super) fn shape(&self) -> Result<(Shape, Vec<usize>), String> {
        let recorded: Vec<usize> = match &self.moe_layers {
            None => (0..self.layers).collect(),
            Some(Layers::Numbers(numbers)) => numbers.clone(),
            Some(Layers::Words(words)) => {
                let (first, last) = range(words)
                    .ok_or_else(|| format!("moe_layers is {words:?}; such as 1..26"))?;
                // Before anything is allocated for it.
                if last - first >= MAX_LAYERS {
                    return Err(format!("moe_layers is {words:?}; {MAX_LAYERS} are allowed"));
                }
                (first..=last).collect()
            }
        };
        let ascend = recorded.is_sorted_by(|a, b| a < b);
        let last = recorded.last().copied().unwrap_or(0);
        if recorded.len() != self.layers || !ascend || last >= MAX_LAYERS {
            return Err(format!(
                "moe_layers names {} layers up to {last}; layers is {}",
                recorded.len(),
                self.layers
            ));
        }
        let (experts, top_k) = (self.experts, self.top_k);
        let layer = LayerShape { experts, top_k, expert_bytes: 0, class: 0 };
        let mut shape = Shape { layers: vec![None; last + 1] };
        recorded.iter().for_each(|&index| shape.layers[index] = Some(layer));
        limits::check(&shape)?;
        Ok((shape, recorded))
    }
}

impl SequenceFields {
    fn into_sequence(self) -> Sequence {
        match self {
            Self::Bare(start, tokens) => Sequence { start, tokens, ..Sequence::default() },
            Self::Named { start, len, dataset, category, repetition } => Sequence {
                start,
                tokens: len,
                dataset: dataset.unwrap_or_default(),
                category: category.unwrap_or_default(),
                is_repetitive: repetition.unwrap_or(false),
            },
        }
    }
}

/// "FIRST..LAST", both included, and words behind it.
fn range(words: &str) -> Option<(usize, usize)> {
    let (first, rest) = words.trim().split_once("..")?;
    let digits = rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len());
    let (first, last) = (first.parse().ok()?, rest[..digits].parse().ok()?);
    (first <= last).then_some((first, last))
}
