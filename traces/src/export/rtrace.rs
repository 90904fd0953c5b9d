//! Writes rtrace-1; see [`crate::import::rtrace`].

use super::{Tell, rows};
use crate::import::rtrace::NOT_RECORDED;
use crate::{Row, Sequence, Source, TraceError};
use half::f16;
use pregate_predictor::Shape;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

/// A file that counts its digest.
struct Column {
    path: PathBuf,
    file: BufWriter<File>,
    hash: Sha256,
}

impl Column {
    fn create(path: PathBuf) -> Result<Self, TraceError> {
        let file = File::create(&path).map_err(|error| TraceError::io(&path, error))?;
        Ok(Self { path, file: BufWriter::new(file), hash: Sha256::new() })
    }

    fn put(&mut self, bytes: &[u8]) -> Result<(), TraceError> {
        self.hash.update(bytes);
        self.file.write_all(bytes).map_err(|error| TraceError::io(&self.path, error))
    }

    /// Its name and digest.
    fn finish(mut self) -> Result<(String, Value), TraceError> {
        self.file.flush().map_err(|error| TraceError::io(&self.path, error))?;
        let name = self.path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let digest: String =
            self.hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
        Ok((name, digest.into()))
    }
}

/// The manifest `path` (`.json`) and the files beside it. Weights and token
/// ids are written if the first token has them. What rtrace-1 has no place for
/// is left out: passes, costs, the fingerprint.
///
/// # Errors
/// Those of `source` and of the files; layers that differ, or more than 255
/// experts.
pub fn rtrace(source: &mut dyn Source, path: &Path, tell: Tell<'_>) -> Result<u64, TraceError> {
    let wrong = |what: &str| TraceError::format(path, 0, what);
    let header = source.header().clone();
    let (experts, top_k) = uniform(&header.shape)
        .ok_or_else(|| wrong("rtrace-1 has layers of one kind, of 255 experts at most"))?;
    let layers: Vec<usize> = header.shape.moe().map(|(index, _)| index).collect();
    let mut first = Row::default();
    source.rewind()?;
    source.next(&mut first)?;
    let has_weights = (0..first.layers()).any(|layer| !first.weights(layer).is_empty());
    let mut ids = Column::create(path.with_extension("ids.u8"))?;
    let column = |wanted: bool, extension: &str| {
        wanted.then(|| Column::create(path.with_extension(extension))).transpose()
    };
    let mut weights = column(has_weights, "w.f16")?;
    let mut token_ids = column(first.token.is_some(), "tok.u32")?;
    let mut sequences: Vec<Sequence> = Vec::new();
    let known = source.sequences().to_vec();
    let mut start = 0;
    let tokens = rows(source, tell, |row| {
        if row.starts_sequence || sequences.is_empty() {
            sequences.push(Sequence { start, ..Sequence::default() });
        }
        if let Some(last) = sequences.last_mut() {
            last.tokens += 1;
        }
        start += 1;
        for &layer in &layers {
            let (chosen, own) = (row.experts(layer), row.weights(layer));
            if chosen.len() > top_k {
                return Err(wrong("a layer with more experts than its top-k"));
            }
            for rank in 0..top_k {
                ids.put(&[chosen.get(rank).map_or(NOT_RECORDED, |&id| id as u8)])?;
                if let Some(weights) = &mut weights {
                    let weight = own.get(rank).copied().unwrap_or(0.0);
                    weights.put(&f16::from_f32(weight).to_le_bytes())?;
                }
            }
        }
        token_ids.as_mut().map_or(Ok(()), |ids| ids.put(&row.token.unwrap_or(0).to_le_bytes()))
    })?;
    let mut digests = serde_json::Map::new();
    for column in [Some(ids), weights, token_ids].into_iter().flatten() {
        let (name, digest) = column.finish()?;
        digests.insert(name, digest);
    }
    let label = |own: &Sequence| {
        let known = known.iter().find(|known| known.start == own.start).unwrap_or(own);
        json!({
            "start": own.start, "len": own.tokens, "dataset": known.dataset,
            "category": known.category, "repetition": known.is_repetitive,
        })
    };
    let manifest = json!({
        "format": "rtrace-1", "tokens": tokens, "layers": layers.len(), "top_k": top_k,
        "experts": experts, "moe_layers": layers, "model": header.model,
        "source": format!("pregate trace export; {:?}", header.source),
        "sequences": sequences.iter().map(label).collect::<Vec<_>>(), "sha256": digests,
    });
    std::fs::write(path, manifest.to_string()).map_err(|error| TraceError::io(path, error))?;
    Ok(tokens)
}

/// Experts and top-k of all MoE layers.
fn uniform(shape: &Shape) -> Option<(usize, usize)> {
    let (_, first) = shape.moe().next()?;
    let all =
        shape.moe().all(|(_, layer)| (layer.experts, layer.top_k) == (first.experts, first.top_k));
    (all && first.experts <= 255).then_some((first.experts, first.top_k))
}
