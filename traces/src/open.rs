//! One door for every file that is a trace.

use crate::import::{self, Hints, cache_eval, csv, jsonl, responses, rtrace};
use crate::{Header, Source, TraceError, format};
use serde::Deserialize;
use serde::de::IgnoredAny;
use std::ffi::OsStr;
use std::fs::File;
use std::io::{BufReader, Read};
use std::path::{Path, PathBuf};

const NEITHER: &str = "not a trace: neither a file of pregate (.pgtrace, .jsonl) nor a manifest \
     of rtrace-1 or moe-cache-eval; pregate trace import reads tables with --form csv, and answers \
     of servers with --form responses";

/// What a file is, by what it begins with.
enum Kind {
    Own,
    Rtrace,
    Lines,
    CacheEval,
    /// JSON, and none of these.
    Answers,
    Other,
}

/// Of the first value of a JSON file, what tells formats apart.
#[derive(Deserialize)]
struct Probe {
    #[serde(default)]
    format: Option<String>,
    #[serde(default)]
    scheduler_steps: Option<IgnoredAny>,
}

/// Opens a trace by what it begins with: a file of ours, an rtrace-1 manifest
/// (`.json`), our JSON lines, or a manifest of moe-cache-eval.
///
/// # Errors
/// A file that cannot be read or is none of these.
pub fn open(path: &Path) -> Result<Box<dyn Source>, TraceError> {
    let kind = kind(path)?;
    known(path, &kind, &Hints::default())?.ok_or_else(|| TraceError::whole(path, NEITHER))
}

/// The same, and what else [`import`] reads: tables by their name (`.csv`,
/// `.tsv`), answers of servers.
///
/// # Errors
/// A file that cannot be read or is none of these, or says something else than
/// `hints`.
pub fn open_any(path: &Path, hints: &Hints) -> Result<Box<dyn Source>, TraceError> {
    let has = |name: &str| path.extension() == Some(OsStr::new(name));
    if has("csv") || has("tsv") {
        return Ok(Box::new(csv::open(path, hints)?));
    }
    match kind(path)? {
        Kind::Answers => Ok(Box::new(responses::open(path, hints)?)),
        kind => known(path, &kind, hints)?.ok_or_else(|| TraceError::whole(path, NEITHER)),
    }
}

/// All files that are read where `path` is opened: its own, the columns beside
/// a manifest of rtrace-1, the table beside one of moe-cache-eval. Who writes a
/// file asks first. A file that cannot be read has none beside it.
pub fn files(path: &Path) -> Vec<PathBuf> {
    let beside = match kind(path) {
        Ok(Kind::Rtrace) => rtrace::columns(path).into(),
        Ok(Kind::CacheEval) => vec![cache_eval::table(path)],
        _ => Vec::new(),
    };
    let beside = beside.into_iter().filter(|beside| beside.exists());
    [path.to_path_buf()].into_iter().chain(beside).collect()
}

fn known(path: &Path, kind: &Kind, hints: &Hints) -> Result<Option<Box<dyn Source>>, TraceError> {
    let apply =
        |header: &mut Header| hints.apply(header).map_err(|what| TraceError::whole(path, what));
    Ok(match kind {
        Kind::Own => {
            let mut reader = format::Reader::open(path)?;
            apply(&mut reader.header)?;
            Some(Box::new(reader))
        }
        Kind::Rtrace => {
            let mut trace = rtrace::open(path)?;
            apply(&mut trace.header)?;
            Some(Box::new(trace))
        }
        Kind::Lines => {
            let mut lines = jsonl::open(path)?;
            apply(&mut lines.header)?;
            Some(Box::new(lines))
        }
        Kind::CacheEval => Some(Box::new(cache_eval::open(path, hints)?)),
        Kind::Answers | Kind::Other => None,
    })
}

/// # Errors
/// What can be read only once, as a pipe, or not at all.
pub(crate) fn check_file(path: &Path) -> Result<(), TraceError> {
    let about = path.metadata().map_err(|source| TraceError::io(path, source))?;
    match about.is_file() {
        true => Ok(()),
        false if about.is_dir() => Err(TraceError::whole(path, "a folder; a trace is a file")),
        false => Err(TraceError::whole(
            path,
            "a trace is read more than once, so it has to be a file; write what comes through a \
             pipe to one",
        )),
    }
}

fn kind(path: &Path) -> Result<Kind, TraceError> {
    // A pipe would be empty for who reads what it is.
    check_file(path)?;
    let io = |source| TraceError::io(path, source);
    let mut file = BufReader::with_capacity(1 << 16, File::open(path).map_err(io)?);
    let mut start = Vec::new();
    file.by_ref().take(64).read_to_end(&mut start).map_err(io)?;
    if start.starts_with(&format::MAGIC) {
        return Ok(Kind::Own);
    }
    match start.iter().find(|byte| !byte.is_ascii_whitespace()) {
        Some(b'{') => {}
        Some(b'[') => return Ok(Kind::Answers),
        _ => return Ok(Kind::Other),
    }
    let all = start.chain(file.take(import::MAX_JSON));
    // Only the first value: others may follow on lines of their own.
    let first = serde_json::Deserializer::from_reader(all).into_iter::<Probe>().next();
    let Some(probe) = first else { return Ok(Kind::Other) };
    let probe = probe.map_err(|error| {
        TraceError::line(path, error.line() as u64, format!("{NEITHER} (JSON: {error})"))
    })?;
    Ok(match probe {
        Probe { format: Some(format), .. } if format == jsonl::FORMAT => Kind::Lines,
        // Which checks the rest of the name.
        Probe { format: Some(_), .. } => Kind::Rtrace,
        Probe { scheduler_steps: Some(_), .. } => Kind::CacheEval,
        Probe { .. } => Kind::Answers,
    })
}
