//! Our own JSON lines, as [`crate::export::jsonl`] writes them: what the trace
//! is about, then a token a line. Any tool makes such files.

use crate::format::Dropped;
use crate::hex::unhex;
use crate::limits;
use crate::{Header, LayerServed, Provenance, Row, Source, TraceError};
use half::f16;
use pregate_predictor::{LayerShape, Origin, Shape};
use serde::Deserialize;
use std::fs::File;
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

pub const FORMAT: &str = "pregate-trace-jsonl-1";

/// Of a line; hundreds of times what a model's token takes. Lists of nothing
/// take some ten times their text while a line is parsed.
const MAX_LINE: u64 = 8 << 20;

#[derive(Deserialize)]
struct About {
    #[serde(default)]
    model: String,
    #[serde(default)]
    fingerprint: Option<String>,
    #[serde(default)]
    provenance: Option<Provenance>,
    layers: Vec<Option<Layer>>,
}

#[derive(Deserialize)]
struct Layer {
    experts: usize,
    top_k: usize,
    #[serde(default)]
    expert_bytes: u64,
    #[serde(default)]
    class: usize,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Token {
    starts_sequence: bool,
    pass_tokens: u32,
    is_prompt: bool,
    position: u32,
    token: Option<u32>,
    experts: Vec<Vec<u16>>,
    weights: Vec<Vec<f32>>,
    served: Vec<ServedFields>,
    /// Instead of all others: what is missing here.
    dropped: Option<DroppedFields>,
}

#[derive(Deserialize)]
struct ServedFields {
    layer: u32,
    origins: Vec<(u16, OriginName)>,
    evictions: u32,
    bytes: u64,
    stall_ns: u64,
}

#[derive(Clone, Copy, Deserialize)]
enum OriginName {
    Hit,
    Early,
    InFlight,
    Miss,
}

#[derive(Deserialize)]
struct DroppedFields {
    passes: u64,
    tokens: u64,
}

/// A file that is read line by line.
pub struct Lines {
    path: PathBuf,
    file: BufReader<File>,
    pub(crate) header: Header,
    line: Vec<u8>,
    number: u64,
    /// Where the tokens begin, and the number of the line before.
    start: (u64, u64),
    dropped: Dropped,
}

/// # Errors
/// A file that cannot be read, or whose first line is not ours.
pub fn open(path: &Path) -> Result<Lines, TraceError> {
    let file = File::open(path).map_err(|source| TraceError::io(path, source))?;
    let mut lines = Lines {
        path: path.to_path_buf(),
        file: BufReader::with_capacity(1 << 16, file),
        header: Header::default(),
        line: Vec::new(),
        number: 0,
        start: (0, 0),
        dropped: Dropped::default(),
    };
    if !lines.next_line()? {
        return Err(lines.wrong("no line with what the trace is about"));
    }
    let about: About = serde_json::from_slice(&lines.line).map_err(|e| lines.wrong_json(&e))?;
    lines.header = about.header().map_err(|what| lines.wrong(what))?;
    let at = lines.file.stream_position();
    lines.start = (at.map_err(|source| TraceError::io(path, source))?, lines.number);
    Ok(lines)
}

impl About {
    fn header(self) -> Result<Header, String> {
        let Self { model, fingerprint, provenance, layers } = self;
        let layer = |layer: Layer| {
            let Layer { experts, top_k, expert_bytes, class } = layer;
            LayerShape { experts, top_k, expert_bytes, class }
        };
        let layers = layers.into_iter().map(|own| own.map(layer)).collect();
        let shape = Shape { layers };
        limits::check(&shape)?;
        let wrong = |text| format!("fingerprint is {text:?}; 64 hexadecimal digits are allowed");
        let digest = |text: String| unhex(&text).ok_or_else(|| wrong(text));
        let fingerprint = fingerprint.map(digest).transpose()?;
        let source = provenance.unwrap_or(Provenance::Imported { format: "jsonl".into() });
        Ok(Header { model, fingerprint, shape, source })
    }
}

impl Token {
    fn fill(&self, shape: &Shape, row: &mut Row) -> Result<(), String> {
        let (wanted, found) = (shape.layers.len(), self.experts.len());
        if found != wanted || !(self.weights.is_empty() || self.weights.len() == wanted) {
            let weights = self.weights.len();
            return Err(format!(
                "experts of {found} layers and weights of {weights}; the trace has {wanted}"
            ));
        }
        (row.starts_sequence, row.pass_tokens) = (self.starts_sequence, self.pass_tokens);
        (row.is_prompt, row.position, row.token) = (self.is_prompt, self.position, self.token);
        for (index, experts) in self.experts.iter().enumerate() {
            let weights = self.weights.get(index).map_or(&[][..], Vec::as_slice);
            distinct(shape, index, experts.iter().copied())?;
            if !(self.weights.is_empty() || weights.len() == experts.len()) {
                let (weights, experts) = (weights.len(), experts.len());
                return Err(format!("layer {index}: {weights} weights of {experts} experts"));
            }
            if let Some(weight) = weights.iter().find(|w| !f16::from_f32(**w).is_finite()) {
                return Err(format!("layer {index}: the weight {weight}"));
            }
            row.push_layer(experts, weights);
        }
        for served in &self.served {
            let layer = served.layer;
            let ids = served.origins.iter().map(|&(expert, _)| expert);
            distinct(shape, layer as usize, ids)?;
            let origin = |&(expert, name)| (expert, Origin::from(name));
            row.served.push(LayerServed {
                layer,
                origins: served.origins.iter().map(origin).collect(),
                evictions: served.evictions,
                bytes: served.bytes,
                stall_ns: served.stall_ns,
            });
        }
        Ok(())
    }
}

/// Are these different experts of the layer?
fn distinct(shape: &Shape, index: usize, experts: impl Iterator<Item = u16>) -> Result<(), String> {
    let count = shape.layer(index).map_or(0, |layer| layer.experts);
    let mut seen: Vec<u16> = experts.collect();
    seen.sort_unstable();
    let is_below = seen.last().is_none_or(|&last| usize::from(last) < count);
    match is_below && seen.is_sorted_by(|a, b| a < b) {
        true => Ok(()),
        false => Err(format!("layer {index} of {count} experts: {seen:?}; different ones of them")),
    }
}

impl From<OriginName> for Origin {
    fn from(name: OriginName) -> Self {
        match name {
            OriginName::Hit => Self::Hit,
            OriginName::Early => Self::Early,
            OriginName::InFlight => Self::InFlight,
            OriginName::Miss => Self::Miss,
        }
    }
}

impl Lines {
    fn wrong(&self, what: impl Into<String>) -> TraceError {
        TraceError::line(&self.path, self.number, what)
    }

    fn wrong_json(&self, error: &serde_json::Error) -> TraceError {
        self.wrong(format!("not a line of {FORMAT}: {error}"))
    }

    /// The next line that is not empty; `false` at the end.
    fn next_line(&mut self) -> Result<bool, TraceError> {
        loop {
            self.line.clear();
            let read = self.file.by_ref().take(MAX_LINE).read_until(b'\n', &mut self.line);
            let read = read.map_err(|source| TraceError::io(&self.path, source))?;
            self.number += u64::from(read > 0);
            if read as u64 == MAX_LINE && self.line.last() != Some(&b'\n') {
                return Err(self.wrong("a line of more than 8 MiB"));
            }
            if read == 0 || !self.line.trim_ascii().is_empty() {
                return Ok(read > 0);
            }
        }
    }
}

impl Source for Lines {
    fn header(&self) -> &Header {
        &self.header
    }

    fn next(&mut self, row: &mut Row) -> Result<bool, TraceError> {
        row.clear();
        while self.next_line()? {
            let token: Token =
                serde_json::from_slice(&self.line).map_err(|e| self.wrong_json(&e))?;
            let Some(DroppedFields { passes, tokens }) = token.dropped else {
                let filled = token.fill(&self.header.shape, row);
                return filled.map_err(|what| self.wrong(what)).map(|()| true);
            };
            self.dropped.add(Dropped { passes, tokens });
        }
        Ok(false)
    }

    fn dropped(&self) -> Dropped {
        self.dropped
    }

    fn notice(&self) -> Option<String> {
        self.dropped.notice()
    }

    fn rewind(&mut self) -> Result<(), TraceError> {
        let seek = self.file.seek(SeekFrom::Start(self.start.0));
        seek.map_err(|source| TraceError::io(&self.path, source))?;
        (self.number, self.dropped) = (self.start.1, Dropped::default());
        Ok(())
    }
}
