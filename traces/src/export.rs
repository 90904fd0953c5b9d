//! Writers of traces for other programs.

mod rtrace;
mod whole;

pub use rtrace::rtrace;
pub use whole::Whole;

use crate::format::{self, Dropped};
use crate::{Provenance, Row, Source, TraceError, hex};
use pregate_predictor::Shape;
use serde_json::{Value, json};
use std::io::Write;
use std::path::Path;

/// Told the tokens written so far.
pub type Tell<'a> = &'a mut dyn FnMut(u64);

/// What became of a trace.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Exported {
    pub tokens: u64,
    /// What was left out, beyond what the format never has.
    pub left_out: Vec<String>,
}

/// What a trace consists of.
enum Item<'r> {
    Row(&'r Row),
    /// Missing here.
    Gap(Dropped),
}

/// Hands everything in `source` to `write`, from its beginning.
fn items(
    source: &mut dyn Source,
    tell: Tell<'_>,
    mut write: impl FnMut(Item<'_>) -> Result<(), TraceError>,
) -> Result<u64, TraceError> {
    source.rewind()?;
    let (mut row, mut known) = (Row::default(), Dropped::default());
    let mut tokens = 0;
    loop {
        let is_there = source.next(&mut row)?;
        let dropped = source.dropped();
        if dropped != known {
            write(Item::Gap(dropped.since(known)))?;
            known = dropped;
        }
        if !is_there {
            return Ok(tokens);
        }
        write(Item::Row(&row))?;
        tokens += 1;
        tell(tokens);
    }
}

/// The same for formats that cannot say that something is missing.
fn rows(
    source: &mut dyn Source,
    tell: Tell<'_>,
    mut write: impl FnMut(&Row) -> Result<(), TraceError>,
) -> Result<u64, TraceError> {
    items(source, tell, |item| match item {
        Item::Row(row) => write(row),
        Item::Gap(_) => Ok(()),
    })
}

/// What `source` says beside its rows and a format has no place for.
struct Lost {
    model: bool,
    fingerprint: bool,
    sizes: bool,
    labels: bool,
}

impl Lost {
    /// In words; `None` where `source` does not say it either.
    fn told(self, source: &dyn Source) -> Option<String> {
        let header = source.header();
        let has_sizes = header.shape.moe().any(|(_, layer)| layer.expert_bytes > 0);
        let has_labels = source.sequences().iter().any(|sequence| {
            !sequence.dataset.is_empty() || !sequence.category.is_empty() || sequence.is_repetitive
        });
        let names = [
            (self.model && !header.model.is_empty(), "the model's name"),
            (self.fingerprint && header.fingerprint.is_some(), "the model's fingerprint"),
            (self.sizes && has_sizes, "the experts' bytes"),
            (self.labels && has_labels, "the sequences' labels"),
        ];
        let names: Vec<&str> =
            names.into_iter().filter(|(is_lost, _)| *is_lost).map(|(_, name)| name).collect();
        (!names.is_empty()).then(|| format!("{}; .pgtrace has them", names.join(", ")))
    }
}

/// Experts and top-k of all MoE layers; `None` where they differ or there are
/// none.
fn uniform(shape: &Shape) -> Option<(usize, usize)> {
    let (_, first) = shape.moe().next()?;
    let first = (first.experts, first.top_k);
    shape.moe().all(|(_, layer)| (layer.experts, layer.top_k) == first).then_some(first)
}

/// A file of our own, with the gaps of the recording. A pass that a recording
/// was cut off in is left out: nothing follows it, and it would look as if it
/// had been shorter.
///
/// # Errors
/// Those of `source` and of the file, which then is as it was before.
pub fn own(source: &mut dyn Source, path: &Path, tell: Tell<'_>) -> Result<Exported, TraceError> {
    let io = |error| TraceError::io(path, error);
    let whole = match source.may_end_within_pass() {
        true => whole_passes(source)?,
        false => u64::MAX,
    };
    let file = Whole::create(path)?;
    let header = source.header().clone();
    let labels = source.sequences();
    let head = format::Head::new(&header, labels).map_err(|what| TraceError::whole(path, what))?;
    // The rows say as well where sequences start.
    let has_labels = labels.is_empty() || head.length().is_some();
    let labels = if has_labels { labels } else { &[] };
    let mut writer = format::Writer::new(file, &header, labels).map_err(io)?;
    let read = items(source, tell, |item| match item {
        Item::Row(_) if writer.tokens() == whole => Ok(()),
        Item::Row(row) => writer.push(row).map_err(io),
        Item::Gap(dropped) => writer.gap(dropped).map_err(io),
    })?;
    let tokens = writer.tokens();
    writer.finish().map_err(io)?.commit()?;
    let left_over = read - tokens;
    let what = "as their pass is not whole";
    let passes = (left_over > 0).then(|| format!("the last {left_over} tokens, {what}"));
    let labels = (!has_labels)
        .then(|| "the sequences' labels, which are too many for the header of a .pgtrace".into());
    Ok(Exported { tokens, left_out: passes.into_iter().chain(labels).collect() })
}

/// Tokens up to the end of the last whole pass.
fn whole_passes(source: &mut dyn Source) -> Result<u64, TraceError> {
    source.rewind()?;
    let mut row = Row::default();
    let (mut tokens, mut whole, mut left) = (0, 0, 0);
    while source.next(&mut row)? {
        left = row.pass_tokens.max(left).max(1) - 1;
        tokens += 1;
        if left == 0 {
            whole = tokens;
        }
    }
    Ok(whole)
}

/// One line of JSON about the trace, then one for each token and each gap;
/// [`crate::import::jsonl`] reads them.
///
/// # Errors
/// Those of `source` and of `out`, which is called `path`.
pub fn jsonl(
    source: &mut dyn Source,
    path: &Path,
    mut out: impl Write,
    tell: Tell<'_>,
) -> Result<Exported, TraceError> {
    let io = |error| TraceError::io(path, error);
    let header = source.header();
    let layers: Vec<Value> = header
        .shape
        .layers
        .iter()
        .map(|layer| {
            layer.map_or(Value::Null, |layer| {
                json!({
                    "experts": layer.experts, "top_k": layer.top_k,
                    "expert_bytes": layer.expert_bytes, "class": layer.class,
                })
            })
        })
        .collect();
    let about = json!({
        "format": "pregate-trace-jsonl-1",
        "model": header.model,
        "fingerprint": header.fingerprint.map(|digest| hex(&digest)),
        "provenance": header.source,
        "layers": layers,
    });
    writeln!(out, "{about}").map_err(io)?;
    let tokens = items(source, tell, |item| {
        let line = match item {
            Item::Row(row) => line(row),
            Item::Gap(Dropped { passes, tokens }) => {
                json!({"dropped": {"passes": passes, "tokens": tokens}})
            }
        };
        writeln!(out, "{line}").map_err(io)
    })?;
    out.flush().map_err(io)?;
    let lost = Lost { model: false, fingerprint: false, sizes: false, labels: true };
    Ok(Exported { tokens, left_out: lost.told(source).into_iter().collect() })
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

/// A table that [`crate::import::csv`] reads: a line for each expert. Tokens
/// without experts have no line and are not counted.
///
/// # Errors
/// Those of `source` and of `out`, which is called `path`; layers that differ.
pub fn csv(
    source: &mut dyn Source,
    path: &Path,
    mut out: impl Write,
    tell: Tell<'_>,
) -> Result<Exported, TraceError> {
    let io = |error| TraceError::io(path, error);
    let shape = &source.header().shape;
    let (experts, top_k) = uniform(shape).ok_or_else(|| {
        TraceError::whole(
            path,
            "a table has MoE layers of one kind; .pgtrace and .jsonl have others",
        )
    })?;
    let layers = shape.layers.len();
    writeln!(out, "# n_layer={layers} n_expert={experts} n_expert_used={top_k}").map_err(io)?;
    if let Provenance::Synthetic { from, seed } = &source.header().source {
        writeln!(out, "# synthetic_seed={seed}").map_err(io)?;
        // As JSON has it: whatever the name is, it stays on its line.
        writeln!(out, "# synthetic_from={}", json!(from)).map_err(io)?;
    }
    writeln!(out, "sequence,phase,token,token_id,layer,rank,expert,weight").map_err(io)?;
    let mut sequence = 0u64;
    // Number of the token, how many of those before have no line, and which
    // was the first of them.
    let (mut token, mut without, mut first) = (0u64, 0u64, None);
    let read = rows(source, tell, |row| {
        if row.starts_sequence {
            sequence += 1;
        }
        if (0..row.layers()).all(|layer| row.experts(layer).is_empty()) {
            without += 1;
            first = first.or(Some(token));
        }
        token += 1;
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
    let what = |first: u64| format!("{without} tokens without experts, such as token {first}");
    let lost = Lost { model: true, fingerprint: true, sizes: true, labels: true };
    let left_out = [first.map(what), lost.told(source)].into_iter().flatten().collect();
    Ok(Exported { tokens: read - without, left_out })
}
