//! Writes rtrace-1; see [`crate::import::rtrace`].

use super::{Exported, Lost, Tell, Whole, rows, uniform};
use crate::format::Measure;
use crate::import::rtrace::{self, MAX_BYTES, NOT_RECORDED};
use crate::limits::MAX_SEQUENCES;
use crate::{Header, Provenance, Row, Sequence, Source, TraceError, hex};
use half::f16;
use serde::{Serialize, Serializer};
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};
use std::fs;
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};

/// A file that counts its digest.
struct Column {
    path: PathBuf,
    file: Whole,
    hash: Sha256,
}

impl Column {
    fn create(path: PathBuf) -> Result<Self, TraceError> {
        Ok(Self { file: Whole::create(&path)?, path, hash: Sha256::new() })
    }

    fn put(&mut self, bytes: &[u8]) -> Result<(), TraceError> {
        self.hash.update(bytes);
        self.file.write_all(bytes).map_err(|error| TraceError::io(&self.path, error))
    }

    /// Hands it to the disk; its name and digest.
    fn settle(&mut self) -> Result<(String, Value), TraceError> {
        self.file.settle()?;
        let name = self.path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        Ok((name, hex(&self.hash.finalize_reset()).into()))
    }
}

/// A column that all tokens have or none: the first token says which, and
/// where another one differs it is given up.
struct Optional {
    /// "weights"
    name: &'static str,
    path: PathBuf,
    state: State,
}

enum State {
    /// No token was there yet.
    Unknown,
    Written(Box<Column>),
    Absent,
    /// Since this token.
    GivenUp(u64),
}

impl Optional {
    fn new(name: &'static str, path: PathBuf) -> Self {
        Self { name, path, state: State::Unknown }
    }

    /// Where to put what the next token, number `token`, has of it.
    fn of_token(&mut self, token: u64, has: bool) -> Result<Option<&mut Column>, TraceError> {
        self.state = match std::mem::replace(&mut self.state, State::Absent) {
            State::Unknown if has => State::Written(Box::new(Column::create(self.path.clone())?)),
            State::Unknown | State::Absent if !has => State::Absent,
            State::Written(column) if has => State::Written(column),
            State::GivenUp(since) => State::GivenUp(since),
            State::Written(_) | State::Unknown | State::Absent => State::GivenUp(token),
        };
        Ok(match &mut self.state {
            State::Written(column) => Some(column),
            _ => None,
        })
    }

    fn left_out(&self) -> Option<String> {
        let Self { name, state: State::GivenUp(token), .. } = self else { return None };
        Some(format!("{name}: some tokens have them and others, such as token {token}, do not"))
    }

    fn settle(&mut self) -> Result<Option<(String, Value)>, TraceError> {
        match &mut self.state {
            State::Written(column) => column.settle().map(Some),
            _ => Ok(None),
        }
    }

    /// Puts it in its place, or removes what an earlier export left there: it
    /// would be read with this one.
    fn commit(self) -> Result<(), TraceError> {
        if let State::Written(column) = self.state {
            return column.file.commit();
        }
        match fs::remove_file(&self.path) {
            Err(error) if error.kind() != ErrorKind::NotFound => {
                Err(TraceError::io(&self.path, error))
            }
            _ => Ok(()),
        }
    }
}

/// The files beside a manifest.
struct Columns {
    ids: Column,
    weights: Optional,
    token_ids: Optional,
    layers: Vec<usize>,
    top_k: usize,
}

impl Columns {
    /// `token` counts over the trace.
    fn put(&mut self, token: u64, row: &Row) -> Result<(), TraceError> {
        let has_weights = self.layers.iter().any(|&layer| !row.weights(layer).is_empty());
        let has_experts = self.layers.iter().any(|&layer| !row.experts(layer).is_empty());
        // A token of which nothing was recorded has weights as others have.
        let has_weights = match self.weights.state {
            State::Written(_) => has_weights || !has_experts,
            _ => has_weights,
        };
        for &layer in &self.layers {
            let chosen = row.experts(layer);
            if chosen.len() > self.top_k {
                let (found, most) = (chosen.len(), self.top_k);
                let what = format!(
                    "token {token}, layer {layer} has {found} experts, and rtrace-1 has room for \
                     its top-{most}; .pgtrace and .jsonl have it"
                );
                return Err(TraceError::whole(&self.ids.path, what));
            }
            for rank in 0..self.top_k {
                self.ids.put(&[chosen.get(rank).map_or(NOT_RECORDED, |&id| id as u8)])?;
            }
        }
        if let Some(column) = self.weights.of_token(token, has_weights)? {
            for &layer in &self.layers {
                for rank in 0..self.top_k {
                    let weight = row.weights(layer).get(rank).copied().unwrap_or(0.0);
                    column.put(&f16::from_f32(weight).to_le_bytes())?;
                }
            }
        }
        let column = self.token_ids.of_token(token, row.token.is_some())?;
        match column.zip(row.token) {
            Some((column, id)) => column.put(&id.to_le_bytes()),
            None => Ok(()),
        }
    }
}

/// The manifest `path` (`.json`) and the files beside it, replacing those that
/// are there. Weights and token ids are written if all tokens have them; else
/// the answer says that they were left out. What rtrace-1 has no place for is
/// left out: passes, costs, the fingerprint, the experts' bytes. The files take
/// their places when all are written, the manifest last.
///
/// # Errors
/// Those of `source` and of the files, which then are as before; layers that differ, or more than 255
/// experts.
pub fn rtrace(
    source: &mut dyn Source,
    path: &Path,
    tell: Tell<'_>,
) -> Result<Exported, TraceError> {
    let header = source.header().clone();
    let kind = uniform(&header.shape).filter(|(experts, _)| *experts <= 255);
    let (experts, top_k) = kind.ok_or_else(|| {
        let what = "rtrace-1 has layers of one kind, of 255 experts at most; .pgtrace and .jsonl \
                    have others";
        TraceError::whole(path, what)
    })?;
    let mut file = Whole::create(path)?;
    let [ids, weights, token_ids] = rtrace::columns(path);
    let mut columns = Columns {
        ids: Column::create(ids)?,
        weights: Optional::new("weights", weights),
        token_ids: Optional::new("token ids", token_ids),
        layers: header.shape.moe().map(|(index, _)| index).collect(),
        top_k,
    };
    // Where each starts, and its tokens.
    let mut sequences: Vec<(u64, u64)> = Vec::new();
    let mut start = 0;
    let tokens = rows(source, tell, |row| {
        if row.starts_sequence || sequences.is_empty() {
            if sequences.len() == MAX_SEQUENCES {
                let what = format!(
                    "more than {MAX_SEQUENCES} sequences, as many as a manifest may have; \
                     .pgtrace and .jsonl have any number"
                );
                return Err(TraceError::whole(path, what));
            }
            sequences.push((start, 0));
        }
        if let Some((_, tokens)) = sequences.last_mut() {
            *tokens += 1;
        }
        columns.put(start, row)?;
        start += 1;
        Ok(())
    })?;
    let Columns { mut ids, mut weights, mut token_ids, layers, .. } = columns;
    let mut left_out: Vec<String> =
        [&weights, &token_ids].into_iter().filter_map(Optional::left_out).collect();
    let lost = Lost { model: false, fingerprint: true, sizes: true, labels: false };
    left_out.extend(lost.told(source));
    let files = [Some(ids.settle()?), weights.settle()?, token_ids.settle()?];
    let synthetic = match &header.source {
        Provenance::Synthetic { from, seed } => Some(json!({ "from": from, "seed": seed })),
        _ => None,
    };
    let manifest = Manifest {
        format: "rtrace-1",
        tokens,
        layers: layers.len(),
        top_k,
        experts,
        moe_layers: &layers,
        model: &header.model,
        source: source_words(&header),
        sequences: Labelled { own: &sequences, known: source.sequences() },
        sha256: files.into_iter().flatten().collect(),
        synthetic,
    };
    let io = |error: serde_json::Error| TraceError::io(path, error.into());
    let mut measure = Measure::default();
    serde_json::to_writer(&mut measure, &manifest).map_err(io)?;
    if measure.bytes > MAX_BYTES {
        let what = "the manifest would be larger than 24 MiB; .pgtrace and .jsonl leave labels out";
        return Err(TraceError::whole(path, what));
    }
    serde_json::to_writer(&mut file, &manifest).map_err(io)?;
    file.settle()?;
    ids.file.commit()?;
    weights.commit()?;
    token_ids.commit()?;
    file.commit()?;
    Ok(Exported { tokens, left_out })
}

fn source_words(header: &Header) -> String {
    let words = match &header.source {
        Provenance::Recorded => "recorded by pregate".to_string(),
        Provenance::Imported { format } => format!("imported from {format}"),
        Provenance::Synthetic { from, .. } => format!("SYNTHETIC, made up after {from}"),
    };
    format!("pregate trace export; {words}")
}

#[derive(Serialize)]
struct Manifest<'m> {
    format: &'m str,
    tokens: u64,
    layers: usize,
    top_k: usize,
    experts: usize,
    moe_layers: &'m [usize],
    model: &'m str,
    source: String,
    sequences: Labelled<'m>,
    sha256: Map<String, Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    synthetic: Option<Value>,
}

/// Sequences as they are in the rows, with the labels that are known of them.
struct Labelled<'m> {
    own: &'m [(u64, u64)],
    known: &'m [Sequence],
}

#[derive(Serialize)]
struct Entry<'m> {
    start: u64,
    len: u64,
    #[serde(skip_serializing_if = "str::is_empty")]
    dataset: &'m str,
    #[serde(skip_serializing_if = "str::is_empty")]
    category: &'m str,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    repetition: bool,
}

impl Serialize for Labelled<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let unknown = Sequence::default();
        serializer.collect_seq(self.own.iter().map(|&(start, len)| {
            let at = self.known.binary_search_by_key(&start, |known| known.start);
            let Sequence { dataset, category, is_repetitive, .. } =
                at.map_or(&unknown, |at| &self.known[at]);
            Entry { start, len, dataset, category, repetition: *is_repetitive }
        }))
    }
}
