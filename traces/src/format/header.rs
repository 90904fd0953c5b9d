//! The header of a trace file: JSON, so that others read it with any tool.
//!
//! `{"model", "fingerprint" (64 hexadecimal digits or null), "provenance":
//! "recorded" | {"imported": {"format"}} | {"synthetic": {"from", "seed"}},
//! "layers": [{"count", "experts", "top_k", "expert_bytes", "class"}],
//! "sequences": [{"start", "tokens", "dataset", "category",
//! "is_repetitive"}]}`. `layers` are runs of equal layers in the order of the
//! model; a run without `experts` is dense. `sequences` is there where labels
//! were known beforehand.

use super::MAX_HEADER;
use crate::bounded::List;
use crate::hex::{hex, unhex};
use crate::limits::{MAX_LAYERS, MAX_SEQUENCES, check};
use crate::{Header, Provenance, Sequence};
use pregate_predictor::{LayerShape, Shape};
use serde::de::DeserializeSeed;
use serde::{Deserialize, Deserializer, Serialize};
use std::borrow::Cow;
use std::io::{self, BufWriter, Write};

#[derive(Serialize, Deserialize)]
struct Fields<'h> {
    model: Cow<'h, str>,
    fingerprint: Option<String>,
    provenance: Cow<'h, Provenance>,
    layers: Vec<Run>,
    #[serde(default, skip_serializing_if = "is_empty", deserialize_with = "sequences")]
    sequences: Cow<'h, [Sequence]>,
}

fn is_empty(sequences: &[Sequence]) -> bool {
    sequences.is_empty()
}

fn sequences<'de, 'h, D: Deserializer<'de>>(from: D) -> Result<Cow<'h, [Sequence]>, D::Error> {
    List::<Sequence, Sequence>::new(MAX_SEQUENCES, "sequences").deserialize(from).map(Cow::Owned)
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

/// A header as it is written, without its text in memory.
pub struct Head<'h> {
    fields: Fields<'h>,
    /// Of the text.
    measure: Measure,
}

impl<'h> Head<'h> {
    /// # Errors
    /// A shape that the format does not hold.
    pub fn new(header: &'h Header, sequences: &'h [Sequence]) -> Result<Self, String> {
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
        let fields = Fields {
            model: Cow::Borrowed(&header.model),
            fingerprint: header.fingerprint.as_ref().map(|digest| hex(digest)),
            provenance: Cow::Borrowed(&header.source),
            layers,
            sequences: Cow::Borrowed(sequences),
        };
        let mut measure = Measure::default();
        serde_json::to_writer(&mut measure, &fields).map_err(|error| error.to_string())?;
        Ok(Self { fields, measure })
    }

    /// Of the text; `None` where a reader would refuse it.
    pub fn length(&self) -> Option<u32> {
        let length = u32::try_from(self.measure.bytes).ok().filter(|&bytes| bytes <= MAX_HEADER);
        length.filter(|_| self.fields.sequences.len() <= MAX_SEQUENCES)
    }

    /// Of `numbers` and the text behind them.
    pub fn checksum(&self, numbers: &[u32]) -> u32 {
        let mut hash = crc32fast::Hasher::new();
        numbers.iter().for_each(|number| hash.update(&number.to_le_bytes()));
        hash.combine(&self.measure.hash);
        hash.finalize()
    }

    /// # Errors
    /// Of `out`.
    pub fn write(&self, out: impl Write) -> io::Result<()> {
        let mut out = BufWriter::new(out);
        serde_json::to_writer(&mut out, &self.fields)?;
        out.flush()
    }
}

/// Takes a text and keeps its length and checksum.
#[derive(Default)]
pub struct Measure {
    pub bytes: u64,
    hash: crc32fast::Hasher,
}

impl Write for Measure {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.bytes += bytes.len() as u64;
        self.hash.update(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
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
    let (model, source) = (fields.model.into_owned(), fields.provenance.into_owned());
    Ok((Header { model, fingerprint, shape, source }, fields.sequences.into_owned()))
}

fn digest(text: &str) -> Result<[u8; 32], String> {
    let wrong = || format!("fingerprint is {text:?}; 64 hexadecimal digits are allowed");
    unhex(text).ok_or_else(wrong)
}
