//! Writers of traces for other programs.

mod rtrace;

pub use rtrace::rtrace;

use crate::{Row, Source, TraceError, format};
use serde_json::{Value, json};
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

/// Told the tokens written so far.
pub type Tell<'a> = &'a mut dyn FnMut(u64);

/// Hands every row of `source` to `write`, from its beginning.
fn rows(
    source: &mut dyn Source,
    tell: Tell<'_>,
    mut write: impl FnMut(&Row) -> Result<(), TraceError>,
) -> Result<u64, TraceError> {
    source.rewind()?;
    let mut row = Row::default();
    let mut tokens = 0;
    while source.next(&mut row)? {
        write(&row)?;
        tokens += 1;
        tell(tokens);
    }
    Ok(tokens)
}

/// A file of our own. Answers the tokens.
///
/// # Errors
/// Those of `source` and of the file.
pub fn own(source: &mut dyn Source, path: &Path, tell: Tell<'_>) -> Result<u64, TraceError> {
    let io = |error| TraceError::io(path, error);
    let file = BufWriter::new(File::create(path).map_err(io)?);
    let header = source.header().clone();
    let mut writer = format::Writer::new(file, &header, source.sequences()).map_err(io)?;
    let tokens = rows(source, tell, |row| writer.push(row).map_err(io))?;
    writer.finish().map_err(io)?;
    Ok(tokens)
}

/// One line of JSON about the trace, then one for each token.
///
/// # Errors
/// Those of `source` and of `out`, which is called `path`.
pub fn jsonl(
    source: &mut dyn Source,
    path: &Path,
    mut out: impl Write,
    tell: Tell<'_>,
) -> Result<u64, TraceError> {
    let io = |error| TraceError::io(path, error);
    let header = source.header();
    let layers: Vec<Value> = header
        .shape
        .layers
        .iter()
        .map(|layer| layer.map_or(Value::Null, |layer| {
            json!({"experts": layer.experts, "top_k": layer.top_k, "expert_bytes": layer.expert_bytes})
        }))
        .collect();
    let about = json!({
        "format": "pregate-trace-jsonl-1",
        "model": header.model,
        "provenance": format!("{:?}", header.source),
        "layers": layers,
    });
    writeln!(out, "{about}").map_err(io)?;
    let tokens = rows(source, tell, |row| writeln!(out, "{}", line(row)).map_err(io))?;
    out.flush().map_err(io)?;
    Ok(tokens)
}

/// A token as JSON.
pub fn line(row: &Row) -> Value {
    let layers = || 0..row.layers();
    let mut line = json!({
        "starts_sequence": row.starts_sequence,
        "pass_tokens": row.pass_tokens,
        "is_prompt": row.is_prompt,
        "position": row.position,
        "token": row.token,
        "experts": layers().map(|layer| row.experts(layer)).collect::<Vec<_>>(),
    });
    if layers().any(|layer| !row.weights(layer).is_empty()) {
        line["weights"] = layers().map(|layer| row.weights(layer)).collect::<Vec<_>>().into();
    }
    if !row.served.is_empty() {
        let served = row.served.iter().map(|served| {
            let origins: Vec<Value> = served
                .origins
                .iter()
                .map(|(expert, origin)| json!([expert, format!("{origin:?}")]))
                .collect();
            json!({
                "layer": served.layer, "origins": origins, "evictions": served.evictions,
                "bytes": served.bytes, "stall_ns": served.stall_ns,
            })
        });
        line["served"] = served.collect();
    }
    line
}

/// A table that [`crate::import::csv`] reads: a line for each expert.
///
/// # Errors
/// Those of `source` and of `out`, which is called `path`.
pub fn csv(
    source: &mut dyn Source,
    path: &Path,
    mut out: impl Write,
    tell: Tell<'_>,
) -> Result<u64, TraceError> {
    let io = |error| TraceError::io(path, error);
    let shape = &source.header().shape;
    let experts = shape.moe().map(|(_, layer)| layer.experts).max().unwrap_or(0);
    let top_k = shape.moe().map(|(_, layer)| layer.top_k).max().unwrap_or(0);
    let layers = shape.layers.len();
    writeln!(out, "# n_layer={layers} n_expert={experts} n_expert_used={top_k}").map_err(io)?;
    writeln!(out, "sequence,phase,token,token_id,layer,rank,expert,weight").map_err(io)?;
    let mut sequence = 0u64;
    let tokens = rows(source, tell, |row| {
        sequence += u64::from(row.starts_sequence);
        let phase = if row.is_prompt { "prompt" } else { "decode" };
        let id = row.token.map(|id| id.to_string()).unwrap_or_default();
        for layer in 0..row.layers() {
            for (rank, expert) in row.experts(layer).iter().enumerate() {
                let weight = row.weights(layer).get(rank);
                let weight = weight.map(f32::to_string).unwrap_or_default();
                let position = row.position;
                writeln!(
                    out,
                    "{sequence},{phase},{position},{id},{layer},{rank},{expert},{weight}"
                )
                .map_err(io)?;
            }
        }
        Ok(())
    })?;
    out.flush().map_err(io)?;
    Ok(tokens)
}
