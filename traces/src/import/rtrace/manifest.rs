//! The manifest of rtrace-1.

use super::fields::{self, Layers};
use crate::limits::{self, MAX_LAYERS};
use crate::{Sequence, TraceError};
use pregate_predictor::{LayerShape, Shape};
use serde::Deserialize;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::BufReader;
use std::path::{Path, PathBuf};

/// As many sequences as are allowed take less, unless their labels are long.
pub const MAX_BYTES: u64 = 24 << 20;

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
    #[serde(default, deserialize_with = "fields::sequences")]
    sequences: Vec<Sequence>,
    #[serde(default, deserialize_with = "fields::digests")]
    sha256: BTreeMap<String, String>,
    #[serde(default)]
    synthetic: Option<Synthetic>,
}

impl Manifest {
    /// # Errors
    /// A file that cannot be read, is not rtrace-1, or contradicts itself.
    pub fn read(path: &Path) -> Result<Self, TraceError> {
        let io = |source| TraceError::io(path, source);
        let file = File::open(path).map_err(io)?;
        let bytes = file.metadata().map_err(io)?.len();
        if bytes > MAX_BYTES {
            let what = format!("a manifest of {bytes} bytes; {MAX_BYTES} are allowed");
            return Err(TraceError::whole(path, what));
        }
        let fields = serde_json::from_reader(BufReader::with_capacity(1 << 16, file));
        let fields = fields.map_err(|error| match error.is_io() {
            true => io(error.into()),
            false => TraceError::line(path, error.line() as u64, format!("not rtrace-1: {error}")),
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
        let mut end = 0;
        for &Sequence { start, tokens: length, .. } in &fields.sequences {
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
        }
        let model = fields.model.unwrap_or_default();
        let Fields { moe_layers, sequences, sha256, synthetic, .. } = fields;
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

/// "FIRST..LAST", both included, and words behind it.
fn range(words: &str) -> Option<(usize, usize)> {
    let (first, rest) = words.trim().split_once("..")?;
    let digits = rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len());
    let (first, last) = (first.parse().ok()?, rest[..digits].parse().ok()?);
    (first <= last).then_some((first, last))
}
