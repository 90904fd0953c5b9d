//! A run of moe-cache-eval (`shared/traces/conformance_toy`): a manifest, and
//! `events.csv` beside it.

use super::csv::{self, Table};
use super::{Hints, MAX_JSON, same};
use crate::TraceError;
use serde::Deserialize;
use std::fs::File;
use std::io::{BufReader, Read};
use std::path::{Path, PathBuf};

#[derive(Deserialize)]
struct Manifest {
    model: Model,
}

#[derive(Deserialize)]
struct Model {
    num_layers: usize,
    num_experts_per_layer: usize,
}

/// Opens the table beside the manifest `path`.
///
/// # Errors
/// Files that cannot be read, are not such ones, or contradict each other or
/// `hints`.
pub fn open(path: &Path, hints: &Hints) -> Result<Table, TraceError> {
    let file = File::open(path).map_err(|source| TraceError::io(path, source))?;
    let manifest: Manifest =
        serde_json::from_reader(BufReader::new(file.take(MAX_JSON))).map_err(|error| {
            let what = format!("not a manifest of moe-cache-eval: {error}");
            TraceError::line(path, error.line() as u64, what)
        })?;
    let Model { num_layers, num_experts_per_layer } = manifest.model;
    same("layers", hints.layers, num_layers)
        .and_then(|()| same("experts", hints.experts, num_experts_per_layer))
        .map_err(|what| TraceError::whole(path, what))?;
    let hints =
        Hints { layers: Some(num_layers), experts: Some(num_experts_per_layer), ..hints.clone() };
    csv::open(&table(path), &hints)
}

/// The table beside the manifest `path`.
pub(crate) fn table(path: &Path) -> PathBuf {
    path.with_file_name("events.csv")
}
